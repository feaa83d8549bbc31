"""The routing path predictor: token ids and past routing in, the experts of all layers out, before layer 0 runs.

For every token it says, a logit an expert, whether this step uses the expert, and whether the sequence uses it within
the next 1, 2, 4, 8 steps (`HORIZONS`). Four sources are weighed against each other, layer by layer:

* the token and the two before it, through a compact embedding and a small network;
* the last step's true routing and its faded averages, known while serving and free;
* retrieval: the past positions of this sequence whose token and predecessor are most alike, and the experts they used;
* what came right behind those positions: the likely next step, although its token is not sampled yet.

Goes beyond the paper's predictor (arXiv 2410.17954, section 3.2), which sees tokens only; that one is `t5.py`. Knows
tensors; refuses to know traces, files and engines. Shapes: B sequences, T tokens, L layers, E experts, K experts a
token, O = 1 + len(HORIZONS) outputs.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from expertflow.errors import ConfigError
from expertflow.types import HORIZONS

OUTPUTS = 1 + len(HORIZONS)
_FLOOR = 0.02
"""Added to a share before its logarithm: a source that never saw an expert is no proof against it."""
_NEVER = -1e4
_BLOCK = 64
_FIXED = 1 << 20
"""Shares are summed as multiples of 1 / _FIXED, so that the order of a parallel sum cannot change a bit."""


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Size and shape of a predictor; every field is stored with it.

    Attributes:
        kind: row of `kinds.KINDS`.
        layers: MoE layers of the model it predicts for.
        experts: experts a layer.
        top_k: experts a token uses in a layer.
        vocabulary: token ids it may be asked about.
        table: rows of the embedding table; a larger vocabulary is hashed onto it, two rows a token.
        embedding: width of a row.
        width: of the network.
        heads: retrieval heads.
        key: width of a retrieval key.
        matches: past positions each head looks at.
        window: past positions it can choose from, plus one.
        decays: of the faded averages of past routing; the first few steps weigh most.
        dropout: while training.
        memory: bytes of the rows of frequent tokens and pairs (`memory.py`) beside the network; 0: none.
    """

    kind: str = "path"
    layers: int
    experts: int
    top_k: int
    vocabulary: int
    table: int = 32768
    embedding: int = 96
    width: int = 192
    heads: int = 4
    key: int = 16
    matches: int = 8
    window: int = 256
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.99)
    dropout: float = 0.2
    memory: int = 3_000_000

    def __post_init__(self) -> None:
        """Refuse sizes that cannot mean anything.

        Raises:
            ConfigError: then.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in {"kind", "decays", "dropout", "memory"} and not (
                type(value) is int and 1 <= value < 1 << 24
            ):
                raise ConfigError(
                    f"a predictor's {field.name}={value!r} is no size", "Use a whole number of 1 or more."
                )
        if not all(isinstance(decay, float | int) and 0 <= decay <= 1 for decay in (*self.decays, self.dropout)):
            raise ConfigError(
                f"a predictor's decays={self.decays!r} or dropout={self.dropout!r} is no share", "Use 0 to 1."
            )
        if not self.matches < self.window <= 1 << 16:
            raise ConfigError(
                f"matches={self.matches} of window={self.window} positions cannot be found",
                "Use a window of at most 65536 that is larger than the matches.",
            )


class Predictor(Protocol):
    """What every kind of predictor offers; rows of a state are sequences, named by row number."""

    config: PredictorConfig
    vocabulary: "Vocabulary"

    def step_bytes(self, rows: int) -> int:
        """Upper bound on the working memory of a step of that many rows, chances included."""

    def prompt_bytes(self, tokens: int) -> int:
        """The same for a part of a prompt."""

    def forward(self, tokens: Int[Tensor, "B T"], routes: Int[Tensor, "B T L K"]) -> Float[Tensor, "B T O L E"]:
        """Logits of every token of whole sequences, each from what is known before its step."""

    def blind(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T L E"]:
        """Logits of this step's output where no routing is known yet: a prompt."""

    def fresh(self, rows: int, device: torch.device) -> "State":
        """Room for that many sequences."""

    def feed(
        self, state: "State", rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> Float[Tensor, "B O L E"]:
        """One step: the same logits as `forward`, from the state, which takes the tokens in."""

    def note(
        self, state: "State", rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> None:
        """What `feed` does to the state, without an answer."""

    def absorb(self, state: "State", pieces: "Pieces", tokens: Int[Tensor, " N"], routes: Int[Tensor, "N L K"]) -> None:
        """Take tokens of several sequences in, each with the routing of the token before it, without an answer."""


class State(NamedTuple):
    """What is remembered of C sequences; every tensor's first dimension is the row.

    Attributes:
        taken: `[C]` int64, tokens taken in.
        tokens: `[C, W]` int64, the last W tokens as a ring, token number n at n % W; -1 unknown or none.
        before: `[C, W]` int64, the token before each of them.
        keys: `[C, A, W, D]` float32, their retrieval keys.
        routes: `[C, W, L, K]` uint8 or int16, their experts; E none.
        faded: `[C, R, L, E]` float32, faded averages of past routing.
    """

    taken: Tensor
    tokens: Tensor
    before: Tensor
    keys: Tensor
    routes: Tensor
    faded: Tensor

    def clear(self, rows: Int[Tensor, " B"], experts: int) -> None:
        """Forget sequences."""
        for column, empty in zip(self, (0, -1, -1, 0.0, experts, 0.0), strict=True):
            column[rows] = empty


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on their way to the device: to a GPU from page-locked memory, so that nobody waits for what it is at."""
    if device.type != "cuda":
        return values.to(device)
    locked = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    locked.numpy()[...] = values.numpy()  # `pin_memory` wakes a pool of threads for some ten thousand numbers
    return locked.to(device, non_blocking=True)


class Pieces(NamedTuple):
    """Tokens of several sequences, one sequence after the other: whose each of them is, and where in its piece.

    Attributes:
        rows: int64 `[B]`, the sequences' rows, each once.
        counts: int64 `[B]`, tokens of each, at least 1.
        begins: int64 `[B]`, tokens of the pieces before it.
        owner: int64 `[N]`, which of the B pieces a token belongs to.
        place: int64 `[N]`, tokens of its piece before it.
        left: int64 `[N]`, and behind it.
        newest: int64 `[N']` or None, which tokens a ring of W places keeps; None: all.
    """

    rows: Tensor
    counts: Tensor
    begins: Tensor
    owner: Tensor
    place: Tensor
    left: Tensor
    newest: Tensor | None

    @classmethod
    def of(cls, rows: npt.ArrayLike, counts: npt.ArrayLike, window: int, device: torch.device) -> Self:
        """Count on the host, in one copy to the device.

        Args:
            rows: of the sequences, each once.
            counts: tokens of each, at least 1.
            window: W, places of a ring.
            device: where they are wanted.
        """
        whose, many = np.asarray(rows, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        begins = np.cumsum(many) - many
        owner = np.repeat(np.arange(len(many)), many)
        place = np.arange(len(owner)) - begins[owner]
        left = many[owner] - 1 - place
        newest = np.flatnonzero(left < window)
        parts = (whose, many, begins, owner, place, left, newest)
        told = sent(torch.from_numpy(np.concatenate(parts)), device).split([len(part) for part in parts])
        whose, many, begins, owner, place, left, newest = told
        return cls(whose, many, begins, owner, place, left, newest if len(newest) < len(owner) else None)

    def shifted(self, column: Tensor, first: Tensor) -> Tensor:
        """`[N, ...]`: for each token the entry of the one before it, for a piece's first token that of `first` `[B, ...]`."""
        moved = column.roll(1, 0)
        moved[self.begins] = first.to(column.dtype)
        return moved


def empty_state(config: PredictorConfig, rows: int, device: torch.device) -> State:
    """Room for `rows` sequences, all forgotten."""
    c, dtype = config, torch.uint8 if config.experts < 256 else torch.int16
    return State(
        taken=torch.zeros(rows, dtype=torch.int64, device=device),
        tokens=torch.full((rows, c.window), -1, dtype=torch.int64, device=device),
        before=torch.full((rows, c.window), -1, dtype=torch.int64, device=device),
        keys=torch.zeros(rows, c.heads, c.window, c.key, device=device),
        routes=torch.full((rows, c.window, c.layers, c.top_k), c.experts, dtype=dtype, device=device),
        faded=torch.zeros(rows, len(c.decays), c.layers, c.experts, device=device),
    )


class Vocabulary(nn.Module):
    """Which token ids were seen in training; others have nothing to say and count as unknown."""

    def __init__(self, size: int) -> None:
        """None seen."""
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(size + 1, dtype=torch.bool))

    def learn(self, tokens: Int[Tensor, " N"]) -> None:
        """These are seen; -1 is not one."""
        self.seen[tokens[tokens >= 0]] = True

    def forward(self, tokens: Int[Tensor, "*T"]) -> Int[Tensor, "*T"]:
        """The ids, -1 in place of those never seen or out of range."""
        last = self.seen.shape[0] - 1
        inside = (tokens >= 0) & (tokens < last)
        return torch.where(self.seen[torch.where(inside, tokens, last)], tokens, -1)


class TokenTable(nn.Module):
    """Embeddings of token ids in a table of fixed size; -1 (unknown) has a row of its own.

    A vocabulary larger than the table is hashed: a token is the sum of two rows, so that two tokens are alike only if
    both rows fall together (hash embeddings, Svenstrup et al. 2017).
    """

    def __init__(self, vocabulary: int, rows: int, width: int) -> None:
        """Random rows."""
        super().__init__()
        self.vocabulary, self.hashed = Vocabulary(vocabulary), vocabulary > rows
        self.rows = rows if self.hashed else vocabulary
        self.table = nn.Embedding(self.rows + 1, width)
        nn.init.normal_(self.table.weight, std=0.5)

    def forward(self, tokens: Int[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        """Look tokens up."""
        tokens = self.vocabulary(tokens)
        known = tokens >= 0
        if not self.hashed:
            result: Tensor = self.table(torch.where(known, tokens, self.rows))
            return result
        first = torch.where(known, (tokens * 2654435761 >> 8) % self.rows, self.rows)
        second = torch.where(known, (tokens * 40503 + 12345 >> 3) % self.rows, self.rows)
        both: Tensor = self.table(first) + self.table(second)
        return both


class PathPredictor(nn.Module):
    """Tokens, faded routing and retrieval, weighed layer by layer. See the module's docstring."""

    def __init__(self, config: PredictorConfig) -> None:
        """Untrained."""
        super().__init__()
        self.config = c = config
        flat, width = c.layers * c.experts, c.width
        self.sources = len(c.decays) + 2 * c.heads
        self.rates: Tensor
        self.register_buffer("rates", torch.tensor(c.decays)[:, None, None], persistent=False)
        self.table = TokenTable(c.vocabulary, c.table, c.embedding)
        self.read_tokens = nn.Linear(3 * c.embedding, width)
        self.read_routes = nn.ModuleList(nn.Linear(flat, width, bias=False) for _ in range(3))
        self.query = nn.Linear(2 * c.embedding, c.heads * c.key, bias=False)
        self.key = nn.Linear(2 * c.embedding, c.heads * c.key, bias=False)
        self.bonus = nn.Parameter(torch.tensor([[3.0], [2.0], [-0.003], [0.0]]).repeat(1, c.heads))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(c.dropout),
                nn.Linear(2 * width, width),
            )
            for _ in range(2)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.drop, self.drop_tokens = nn.Dropout(c.dropout), nn.Dropout(c.dropout / 2)
        self.now = nn.Linear(width, flat, bias=False)
        self.later = nn.Linear(width, (OUTPUTS - 1) * 64)
        self.spread = nn.Linear(64, flat, bias=False)
        self.trust = nn.Linear(width, OUTPUTS * self.sources * c.layers)
        self.habit = nn.Parameter(torch.ones(self.sources, c.layers, c.experts))
        self.base = nn.Parameter(torch.full((OUTPUTS, c.layers, c.experts), -2.0))
        nn.init.normal_(self.now.weight, std=0.02)
        nn.init.zeros_(self.trust.weight)
        nn.init.constant_(self.trust.bias, 0.3)

    @property
    def vocabulary(self) -> Vocabulary:
        """Token ids seen in training."""
        return self.table.vocabulary

    def step_bytes(self, rows: int) -> int:
        """Sources, their logarithms and sums, logits, memory rows, chances."""
        return rows * self.config.layers * self.config.experts * 4 * (6 * self.sources + 8 * OUTPUTS)

    def prompt_bytes(self, tokens: int) -> int:
        """Chances, memory rows, marks."""
        return tokens * self.config.layers * self.config.experts * 4 * 14

    def forward(self, tokens: Int[Tensor, "B T"], routes: Int[Tensor, "B T L K"]) -> Float[Tensor, "B T O L E"]:
        """Logits of every token of whole sequences (or windows of them)."""
        c, (batch, length) = self.config, tokens.shape
        used = multi_hot(routes, c.experts).flatten(2)
        before = functional.pad(tokens, (1, 0), value=-1)[:, :length]
        second = functional.pad(before, (1, 0), value=-1)[:, :length]
        embedded = [self.drop_tokens(self.table(ids)) for ids in (tokens, before, second)]
        share, found = self._attend(embedded, tokens, before)
        marks = functional.pad(routes, (0, 0, 0, 0, 0, 1), value=c.experts)
        line = torch.arange(batch, device=tokens.device)[:, None, None, None]
        # token by token, head by head: the found positions' experts, and those of the positions behind them
        behind = torch.where(found + 1 < torch.arange(length, device=tokens.device)[:, None], found + 1, length)
        both = torch.cat([share, share], dim=1).transpose(1, 2).flatten(0, 1)
        poured = marks[line, torch.cat([found, behind], dim=1)].transpose(1, 2).flatten(0, 1)
        copied = self._pour(both, poured).reshape(batch, length, 2 * c.heads, -1)
        last = functional.pad(used, (0, 0, 1, 0))[:, :length]
        sources = torch.cat([fade_all(used, c.decays), copied], dim=2)
        z = self._read(torch.cat(embedded, dim=-1), last, sources)
        flat = self._decide(z.flatten(0, 1), sources.view(batch * length, self.sources, c.layers, c.experts))
        return flat.view(batch, length, *flat.shape[1:])

    def blind(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T L E"]:
        """Logits of this step's output where no routing is known yet: a prompt."""
        before = functional.pad(tokens, (1, 0), value=-1)[:, : tokens.shape[1]]
        second = functional.pad(before, (1, 0), value=-1)[:, : tokens.shape[1]]
        z = self.read_tokens(self.table(torch.stack([tokens, before, second], dim=2)).flatten(2))
        logits: Tensor = self.now(self._refine(z)) + self.base[0].flatten()
        return logits.view(*tokens.shape, self.config.layers, self.config.experts)

    def fresh(self, rows: int, device: torch.device) -> State:
        """Room for that many sequences."""
        return empty_state(self.config, rows, device)

    def feed(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> Float[Tensor, "B O L E"]:
        """One step: the same logits as `forward`, from the state, which takes the tokens in.

        Args:
            state: changed in place.
            rows: which sequences, each at most once.
            tokens: the tokens just sampled.
            routes: the true routing of each sequence's token before; E where there is none or it is not known.
        """
        c = self.config
        used, faded, embedded, before = self._take_in(state, rows, tokens, routes)
        query = self.query(embedded[:, : 2 * c.embedding]).view(-1, c.heads, c.key)
        found = self._retrieve(state, rows, tokens, before, query)
        sources = torch.cat([faded, found], dim=1)
        z = self._read(embedded, used.flatten(1), sources.flatten(2))
        return self._decide(z, sources)

    def note(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> None:
        """What `feed` does to the state, without an answer."""
        self._take_in(state, rows, tokens, routes)

    def _take_in(
        self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Experts of the last step `[B, L, E]`, their faded averages, embeddings `[B, 3 D]`, and the tokens before."""
        c = self.config
        count = state.taken[rows]
        here, last = count % c.window, (count - 1) % c.window
        used = multi_hot(routes, c.experts)
        state.routes[rows, last] = routes.to(state.routes.dtype)
        faded = torch.lerp(used[:, None], state.faded[rows], self.rates)
        state.faded[rows] = faded
        before, second = state.tokens[rows, last], state.before[rows, last]
        embedded = self.table(torch.stack([tokens, before, second], dim=1)).flatten(1)
        state.tokens[rows, here], state.before[rows, here] = tokens, before
        state.keys[rows, :, here] = self.key(embedded[:, : 2 * c.embedding]).view(-1, c.heads, c.key)
        state.taken[rows] = count + 1
        return used, faded, embedded, before

    def absorb(self, state: State, pieces: Pieces, tokens: Int[Tensor, " N"], routes: Int[Tensor, "N L K"]) -> None:
        """Take tokens of several sequences in: the state that calls of `feed`, token by token, would leave.

        Args:
            state: changed in place.
            pieces: whose they are.
            tokens: the next tokens of each sequence.
            routes: the true routing of the token before each of them; E where there is none.
        """
        c, rows = self.config, pieces.rows
        taken = state.taken[rows]
        before = pieces.shifted(tokens, state.tokens[rows, (taken - 1) % c.window])
        fade_in(state, pieces, multi_hot(routes, c.experts), self.rates.flatten())
        state.taken[rows] = taken + pieces.counts
        owner, place = pieces.owner, pieces.place
        if pieces.newest is not None:
            owner, place, tokens, before, routes = (
                part[pieces.newest] for part in (owner, place, tokens, before, routes)
            )
        row, place = rows[owner], taken[owner] + place
        pair = self.table(torch.stack([tokens, before], dim=1)).flatten(1)
        here, last = place % c.window, (place - 1) % c.window
        state.tokens[row, here], state.before[row, here] = tokens, before
        state.keys[row, :, here] = self.key(pair).view(-1, c.heads, c.key)
        state.routes[row, last] = routes.to(state.routes.dtype)

    def _attend(self, embedded: list[Tensor], tokens: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, A, T, M]` twice: what each position copies from earlier ones (the rest goes to nobody), and which."""
        c, (batch, length) = self.config, tokens.shape
        place = torch.arange(length, device=tokens.device)
        age = place[:, None] - place[None, :]
        pair = torch.cat(embedded[:2], dim=-1)
        query, key = (f(pair).view(batch, length, c.heads, c.key) for f in (self.query, self.key))
        same = ((tokens[:, :, None] == tokens[:, None]) & (tokens >= 0)[:, None]).float()[:, None]
        both = same * (before[:, :, None] == before[:, None]).float()[:, None]
        alike, twice, distance, nobody = (row[None, :, None, None] for row in self.bonus)
        score = torch.einsum("btad,bjad->batj", query, key) / math.sqrt(c.key)
        score = score + alike * same + twice * both + distance * age
        score = score.masked_fill((age < 1) | (age >= c.window), _NEVER)
        best = score.topk(min(c.matches, length), dim=-1)
        share = torch.cat([nobody.expand(batch, -1, length, 1), best.values], dim=-1).softmax(dim=-1)[..., 1:]
        return share, best.indices

    def _retrieve(self, state: State, rows: Tensor, tokens: Tensor, before: Tensor, query: Tensor) -> Tensor:
        """`[B, 2 A, L, E]`: experts of the best past positions, and of those right behind them."""
        c = self.config
        place = torch.arange(c.window, device=tokens.device)
        newest = state.taken[rows, None] - 1
        age = (newest - place) % c.window
        same = ((state.tokens[rows] == tokens[:, None]) & (tokens >= 0)[:, None]).float()
        both = same * (state.before[rows] == before[:, None]).float()
        alike, twice, distance, nobody = (row[None, :, None] for row in self.bonus)
        score = torch.matmul(state.keys[rows], query[..., None])[..., 0] / math.sqrt(c.key)
        score = score + alike * same[:, None] + twice * both[:, None] + distance * age[:, None]
        score = score.masked_fill(((age < 1) | (age > newest))[:, None], _NEVER)
        best = score.topk(c.matches, dim=-1)
        share = torch.cat([nobody.expand(len(tokens), -1, 1), best.values], dim=-1).softmax(dim=-1)[..., 1:]
        has_next = torch.gather(age[:, None].expand_as(score), 2, best.indices) >= 2
        places = torch.cat([best.indices, (best.indices + 1) % c.window], dim=1)
        return self._pour(torch.cat([share, share * has_next], dim=1), state.routes[rows[:, None, None], places])

    def _pour(self, share: Tensor, routes: Tensor) -> Tensor:
        """`[N, G, M]` shares and their `[N, G, M, L, K]` experts into `[N, G, L, E]` sums."""
        c, (count, groups, matches) = self.config, share.shape
        amount = share if torch.is_grad_enabled() else (share * _FIXED).to(torch.int32)
        total = torch.zeros(count, groups, c.layers, c.experts + 1, dtype=amount.dtype, device=share.device)
        amount = amount[:, :, None, :, None].expand(-1, -1, c.layers, -1, c.top_k).reshape(count, groups, c.layers, -1)
        target = routes.permute(0, 1, 3, 2, 4).reshape(count, groups, c.layers, matches * c.top_k).long()
        total = total.scatter_add(3, target, amount)[..., : c.experts]
        return total if torch.is_grad_enabled() else total / _FIXED

    def _read(self, embedded: Tensor, last: Tensor, sources: Tensor) -> Tensor:
        """Everything that is known, as a vector: `[..., 3 D]`, `[..., L E]`, `[..., S, L E]` to `[..., width]`."""
        c = self.config
        slow = sources[..., min(2, len(c.decays) - 1), :]
        copied = sources[..., len(c.decays) : len(c.decays) + c.heads, :].mean(dim=-2)
        z = self.read_tokens(embedded)
        for read, seen in zip(self.read_routes, (last, slow, copied), strict=True):
            z = z + self.drop(read(seen))
        return self._refine(z)

    def _refine(self, z: Tensor) -> Tensor:
        for block in self.blocks:
            z = z + block(z)
        refined: Tensor = self.drop(self.norm(z))
        return refined

    def _decide(self, z: Tensor, sources: Tensor) -> Tensor:
        """`[N, width]` and `[N, S, L, E]` to logits `[N, O, L, E]`: what the network says plus what it trusts."""
        c = self.config
        trust = self.trust(z).view(-1, c.layers, OUTPUTS, self.sources)
        seen = torch.log(1 + sources / _FLOOR) * self.habit
        weighed = torch.matmul(trust, seen.transpose(1, 2)).transpose(1, 2)
        later = self.spread(self.later(z).view(-1, OUTPUTS - 1, 64))
        said = torch.cat([self.now(z)[:, None], later], dim=1).view(weighed.shape)
        return weighed + said + self.base


def fade_in(state: State, pieces: Pieces, used: Float[Tensor, "N L E"], rates: Float[Tensor, " R"]) -> None:
    """Bring the pieces' faded averages forward, each by its tokens, in place."""
    mine = torch.arange(len(pieces.rows), device=used.device)[:, None, None] == pieces.owner
    weight = torch.where(mine, (1 - rates[:, None]) * rates[:, None] ** pieces.left, 0.0)  # [B, R, N]
    fresh = (weight.flatten(0, 1) @ used.flatten(1)).view(-1, len(rates), *used.shape[1:])
    kept = rates ** pieces.counts[:, None]
    state.faded[pieces.rows] = state.faded[pieces.rows] * kept[..., None, None] + fresh


def fade_all(used: Float[Tensor, "B T C"], decays: tuple[float, ...]) -> Float[Tensor, "B T R C"]:
    """For every position the faded averages of what came before it, block by block."""
    batch, length, width = used.shape
    place = torch.arange(_BLOCK + 1, device=used.device)
    age = place[:, None] - 1 - place[None, :-1]
    rates = torch.tensor(decays, device=used.device)[:, None, None]
    weight = torch.where(age >= 0, (1 - rates) * rates ** age.clamp(min=0), 0.0)  # [R, BLOCK + 1, BLOCK]
    carried = torch.zeros(batch, len(decays), width, device=used.device)
    parts = []
    for begin in range(0, length, _BLOCK):
        block = used[:, begin : begin + _BLOCK]
        size = block.shape[1]
        fresh = torch.einsum("rtj,bjc->btrc", weight[:, : size + 1, :size], block)
        whole = fresh + carried[:, None] * (rates[:, :, 0] ** place[: size + 1]).T[None, :, :, None]
        parts.append(whole[:, :size])
        carried = whole[:, size]
    return torch.cat(parts, dim=1)


def multi_hot(routes: Int[Tensor, "*B L K"], experts: int) -> Float[Tensor, "*B L E"]:
    """1 where a token uses an expert; routes of E (none) leave no mark."""
    marks = torch.zeros(*routes.shape[:-1], experts + 1, device=routes.device)
    return marks.scatter_(-1, routes.long(), 1.0)[..., :experts]
