"""The routing path predictor: token ids and past routing in, the experts of all layers out, before layer 0 runs.

For every token and expert it gives a logit for use in this step, and one for use within each of the next 1, 2, 4, 8 steps
(`types.HORIZONS`). Four sources are weighed against each other, layer by layer:

* the token and the two before it, through a compact embedding and a small network;
* the last step's true routing and its faded averages, which are known while serving and cost nothing;
* retrieval: the past positions of this sequence whose token and predecessor are most alike, and the experts they used;
* what came right behind those positions: the likely next step, although its token is not sampled yet.

The paper's predictor (arXiv 2410.17954, section 3.2) sees tokens only; that one is `t5.py`. Must not know traces, files
and engines. Shapes: B sequences, T tokens, L layers, E experts, K experts a token, O outputs, A heads, M matches, S
sources.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from expertflow.predict.network import OUTPUTS, PredictorConfig, Vocabulary
from expertflow.predict.state import Pieces, State, empty_state, fade_in

FLOOR = 0.02
"""Added to a share before its logarithm, because a source that never saw an expert is no proof against it."""
NEVER = -1e4
"""Score of a past position that cannot be copied from."""
FIXED = 1 << 20
"""Shares are summed as multiples of 1 / FIXED, so that the order of a parallel sum cannot change a bit."""
_BLOCK = 64
"""Tokens of a block of `fade_all`."""


class TokenTable(nn.Module):
    """Embeddings of token ids in a table of fixed size; -1 (unknown) has an entry of its own.

    A vocabulary larger than the table is hashed: a token is the sum of two entries. So two tokens are alike only if
        both entries are the same (hash embeddings, Svenstrup et al. 2017).
    """

    def __init__(self, vocabulary: int, entries: int, width: int) -> None:
        """Draw random entries."""
        super().__init__()
        self.vocabulary, self.hashed = Vocabulary(vocabulary), vocabulary > entries
        self.entries = entries if self.hashed else vocabulary
        self.table = nn.Embedding(self.entries + 1, width)
        nn.init.normal_(self.table.weight, std=0.5)

    def forward(self, tokens: Int[Tensor, "*T"]) -> Float[Tensor, "*T D"]:
        """Embeddings of tokens."""
        tokens = self.vocabulary(tokens)
        known = tokens >= 0
        if not self.hashed:
            result: Tensor = self.table(torch.where(known, tokens, self.entries))
            return result
        first = torch.where(known, (tokens * 2654435761 >> 8) % self.entries, self.entries)
        second = torch.where(known, (tokens * 40503 + 12345 >> 3) % self.entries, self.entries)
        both: Tensor = self.table(first) + self.table(second)
        return both


class PathPredictor(nn.Module):
    """Weighs tokens, faded routing and retrieval layer by layer. See the module's docstring."""

    def __init__(self, config: PredictorConfig) -> None:
        """Make an untrained network."""
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
        """Upper bound on a step's working memory, in bytes: sources, their logarithms and sums, logits, counts, probabilities."""
        return rows * self.config.layers * self.config.experts * 4 * (6 * self.sources + 8 * OUTPUTS)

    def prompt_bytes(self, tokens: int) -> int:
        """Upper bound on the working memory of that many tokens of prompts, in bytes: probabilities, counts, marks."""
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
        """Allocate a state for that many sequences."""
        return empty_state(self.config, rows, device)

    def feed(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> Float[Tensor, "B O L E"]:
        """One step: update the state with the tokens, and compute the logits that `forward` gives for them.

        Args:
            state: changed in place.
            rows: state rows, each at most once.
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

    def update(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> None:
        """Take the tokens in as `feed` does, and compute no logits."""
        self._take_in(state, rows, tokens, routes)

    def _take_in(
        self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Update the state with a step.

        Returns:
            Experts of the last step `[B, L, E]`, their faded averages, embeddings `[B, 3 D]`, and the tokens before.
        """
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
        """Update the state with tokens of several sequences, as calls of `feed` would, token by token.

        Args:
            state: changed in place.
            pieces: which sequence each token belongs to.
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
        """`[B, A, T, M]` twice: the share that each position copies of earlier ones (shares sum to less than 1), and which those are."""
        c, (batch, length) = self.config, tokens.shape
        place = torch.arange(length, device=tokens.device)
        age = place[:, None] - place[None, :]
        pair = torch.cat(embedded[:2], dim=-1)
        query, key = (f(pair).view(batch, length, c.heads, c.key) for f in (self.query, self.key))
        same = ((tokens[:, :, None] == tokens[:, None]) & (tokens >= 0)[:, None]).float()[:, None]
        both = same * (before[:, :, None] == before[:, None]).float()[:, None]
        alike, twice, distance, none = (row[None, :, None, None] for row in self.bonus)
        score = torch.einsum("btad,bjad->batj", query, key) / math.sqrt(c.key)
        score = score + alike * same + twice * both + distance * age
        score = score.masked_fill((age < 1) | (age >= c.window), NEVER)
        best = score.topk(min(c.matches, length), dim=-1)
        share = torch.cat([none.expand(batch, -1, length, 1), best.values], dim=-1).softmax(dim=-1)[..., 1:]
        return share, best.indices

    def _retrieve(self, state: State, rows: Tensor, tokens: Tensor, before: Tensor, query: Tensor) -> Tensor:
        """`[B, 2 A, L, E]`: experts of the best past positions, and of the positions right behind them."""
        c = self.config
        place = torch.arange(c.window, device=tokens.device)
        newest = state.taken[rows, None] - 1
        age = (newest - place) % c.window
        same = ((state.tokens[rows] == tokens[:, None]) & (tokens >= 0)[:, None]).float()
        both = same * (state.before[rows] == before[:, None]).float()
        alike, twice, distance, none = (row[None, :, None] for row in self.bonus)
        score = torch.matmul(state.keys[rows], query[..., None])[..., 0] / math.sqrt(c.key)
        score = score + alike * same[:, None] + twice * both[:, None] + distance * age[:, None]
        score = score.masked_fill(((age < 1) | (age > newest))[:, None], NEVER)
        best = score.topk(c.matches, dim=-1)
        share = torch.cat([none.expand(len(tokens), -1, 1), best.values], dim=-1).softmax(dim=-1)[..., 1:]
        has_next = torch.gather(age[:, None].expand_as(score), 2, best.indices) >= 2
        places = torch.cat([best.indices, (best.indices + 1) % c.window], dim=1)
        return self._pour(torch.cat([share, share * has_next], dim=1), state.routes[rows[:, None, None], places])

    def _pour(self, share: Tensor, routes: Tensor) -> Tensor:
        """Add `[N, G, M]` shares up by their `[N, G, M, L, K]` experts, to `[N, G, L, E]`."""
        c, (count, groups, matches) = self.config, share.shape
        amount = share if torch.is_grad_enabled() else (share * FIXED).to(torch.int32)
        total = torch.zeros(count, groups, c.layers, c.experts + 1, dtype=amount.dtype, device=share.device)
        amount = amount[:, :, None, :, None].expand(-1, -1, c.layers, -1, c.top_k).reshape(count, groups, c.layers, -1)
        target = routes.permute(0, 1, 3, 2, 4).reshape(count, groups, c.layers, matches * c.top_k).long()
        total = total.scatter_add(3, target, amount)[..., : c.experts]
        return total if torch.is_grad_enabled() else total / FIXED

    def _read(self, embedded: Tensor, last: Tensor, sources: Tensor) -> Tensor:
        """Sum up all that is known: `[..., 3 D]`, `[..., L E]`, `[..., S, L E]` to a vector `[..., width]`."""
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
        """`[N, width]` and `[N, S, L, E]` to logits `[N, O, L, E]`: the network's own, plus the sources by their weights."""
        c = self.config
        trust = self.trust(z).view(-1, c.layers, OUTPUTS, self.sources)
        seen = torch.log(1 + sources / FLOOR) * self.habit
        weighed = torch.matmul(trust, seen.transpose(1, 2)).transpose(1, 2)
        later = self.spread(self.later(z).view(-1, OUTPUTS - 1, 64))
        own = torch.cat([self.now(z)[:, None], later], dim=1).view(weighed.shape)
        return weighed + own + self.base


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
    """1 where a token uses an expert; routes of E (none) set no mark."""
    marks = torch.zeros(*routes.shape[:-1], experts + 1, device=routes.device)
    return marks.scatter_(-1, routes.long(), 1.0)[..., :experts]
