"""Passes and steps over any of the live sequences: tensors in, logits out.

Most models keep keys and values in rows (`execution.kv_rows`, `execution.encoder_decoder`), so sequences may join or
end at any step, in host or graph execution. Others run in cohorts: sequences that come together step together until the
last one is over. Must not know text, sampling and schedules.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.handover import Handover
from expertflow.execution.kv.paged import Span
from expertflow.execution.kv_rows import DecodeInput, ForwardInput, RowModel
from expertflow.execution.rope import use_own_lengths
from expertflow.execution.sampling.scoring import Score, Scored, no_score, score_all, states_kept
from expertflow.models.attention import cache_argument
from expertflow.models.context import ForwardContext, Pieces


class PromptChunk(NamedTuple):
    """Tokens of a prompt, from position `begin` on: the sequence, the tokens, and its KV row.

    `rest` counts the prompt's tokens that later passes read; `room` the tokens that the whole sequence keeps at most, 0: as many
    as there may be. `scored` are positions among these tokens whose logits are wanted too.
    """

    sequence: int
    tokens: Sequence[int]
    row: int
    begin: int
    rest: int = 0
    room: int = 0
    scored: range = range(0)

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.begin + len(self.tokens) + self.rest


class Executor(Protocol):
    """Runs passes and steps.

    Attributes:
        joins: whether sequences may join while others live.
        whole: whether a prompt is read in one pass.
        padded_left: on which side the shorter pieces of a pass are padded.
        unpadded: whether none is: pieces of any sizes follow one another.
    """

    joins: bool
    whole: bool
    padded_left: bool
    unpadded: bool

    def prefill(self, pieces: Sequence[PromptChunk], score: Score = no_score) -> Float[Tensor, "B V"]:
        """Run parts of prompts; logits behind each part's last token. `score` gets those of the positions that are scored."""

    def decode(self, fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> Float[Tensor, "B V"]:
        """Run one new token a sequence; logits of the next. `tokens` on the device replace those of `fed`, where `ready` says so."""

    def ready(self, fed: Sequence[DecodeInput]) -> bool:
        """Whether the next step, of the last one's sequences, can be queued before that one's tokens are known."""

    def leave(self, row: int) -> None:
        """Let other sequences have what a sequence that is over kept in its KV row."""

    def best(self) -> Int[Tensor, " B"] | None:
        """The most probable next tokens, if the last step has them ready."""


class RowExecutor:
    """A decoder-only model whose keys and values lie in rows.

    Args:
        rows: the model over its rows.
        handover: runs the decode steps that the GPU decides, and learns when a pass over prompts is queued.
    """

    joins = padded_left = True
    whole = False

    def __init__(self, rows: RowModel | EncoderDecoderRows, handover: Handover) -> None:
        """Create an executor with no sequences."""
        self._rows, self._handover, self._context = rows, handover, rows.context
        use_own_lengths(rows.model, rows.context)
        self._best: Tensor | None = None
        dense = handover.prompt_dense()
        self.unpadded = dense is not None and dense.in_place  # where a kernel finds each piece's keys and values

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[PromptChunk], score: Score = no_score) -> Float[Tensor, "B V"]:
        """Run parts of prompts: one behind the other, or the shorter ones padded on the left; padding uses no expert."""
        spans = [Span(piece.row, piece.begin, piece.begin + len(piece.tokens)) for piece in pieces]
        prompts, joined = [piece.tokens for piece in pieces], self.unpadded
        ids, mask = _joined(prompts) if joined else _padded(prompts, torch.device("cpu"), left=True)
        columns = np.full(ids.shape, -1)
        columns[mask.numpy() == 1] = np.concatenate([np.arange(span.begin, span.end) for span in spans])
        for piece in pieces:
            if piece.begin == 0:
                self._rows.open(piece.row, piece.room)
        self._best = None
        lengths, handover = None if joined else [piece.length for piece in pieces], self._handover
        experts, dense = handover.prompt_experts(), handover.prompt_dense()
        blocks, padding = handover.prompt_blocks() if joined else None, self._padding(mask == 0)
        with (
            self._given(ids, spans, columns, joined=joined) as given,
            self._context.carry(padding=padding, lengths=lengths, experts=experts, dense=dense, blocks=blocks),
            states_kept(self._rows.model, wanted=any(piece.scored for piece in pieces)) as states,
        ):
            logits = self._rows.forward(self._rows.model, given)
        self._handover.pass_queued()
        if states:
            ends = accumulate(map(len, prompts)) if joined else [ids.shape[1]] * len(pieces)
            score_all(self._rows.model, states[0], _scored(pieces, ends, one_row=joined), score)
        return logits

    @contextmanager
    def _given(
        self,
        ids: Tensor,
        spans: Sequence[Span],
        columns: npt.NDArray[np.int64],
        reach: int = 0,
        *,
        joined: bool = False,
    ) -> Iterator[ForwardInput]:
        """What a pass is fed, on the device, with room for what it writes; columns of padding are -1."""
        device, at = self._rows.model.device, torch.from_numpy(columns)
        pieces = Pieces.of(spans, device) if joined else None
        if pieces is None:
            rows = torch.tensor([span.row for span in spans], device=device)
        else:
            rows = pieces.rows.repeat_interleave(pieces.bounds[1], output_size=ids.numel())[None]
        nowhere, end = self._rows.nowhere, max(span.end for span in spans)
        with self._rows.passing(spans, columns) as cells:
            yield ForwardInput(
                ids.to(device), rows, at.clamp(min=0).to(device), torch.where(at < 0, nowhere, at).to(device), end, reach,
                cells.to(device), pieces,
            )  # fmt: skip

    def _padding(self, padding: Bool[Tensor, "B C"]) -> Bool[Tensor, " T"] | None:
        """The tokens of a pass that are of no sequence, on the device; None if there are none."""
        return padding.reshape(-1).to(self._rows.model.device) if bool(padding.any()) else None

    @torch.inference_mode()
    def decode(self, fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> Float[Tensor, "B V"]:
        """Run one new token a sequence."""
        decided = self._handover.step(fed, tokens)
        if decided is not None:
            self._best = decided.best[: len(fed)]
            return decided.logits[: len(fed)]
        assert tokens is None, "the host decides no step ahead"
        self._best = None
        _, given, rows, positions = zip(*fed, strict=True)
        spans = [Span(row, position, position + 1) for row, position in zip(rows, positions, strict=True)]
        ids, columns, reach = torch.tensor(given)[:, None], np.array(positions)[:, None], self._rows.reach(rows)
        lengths, handover = [one.position + 1 for one in fed], self._handover
        experts, dense = handover.prompt_experts(), handover.prompt_dense()
        with (
            self._given(ids, spans, columns, reach) as given,
            self._context.carry(lengths=lengths, experts=experts, dense=dense),
        ):
            return self._rows.forward(self._rows.model, given)

    def ready(self, fed: Sequence[DecodeInput]) -> bool:
        """Whether the GPU decides the next step as well, and it is captured."""
        return self._handover.ready(fed)

    def leave(self, row: int) -> None:
        """Give back what the sequence in a row kept."""
        self._rows.leave(row)

    def best(self) -> Int[Tensor, " B"] | None:
        """The most probable next tokens, if a graph has them ready."""
        return self._best


class EncoderDecoderExecutor(RowExecutor):
    """An encoder-decoder model in rows: the prompts are what the encoder reads, whole."""

    padded_left = False
    whole = True

    def __init__(self, rows: EncoderDecoderRows, handover: Handover) -> None:
        """Create an executor with no sequences."""
        super().__init__(rows, handover)
        self._encoder = rows

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[PromptChunk], score: Score = no_score) -> Float[Tensor, "B V"]:  # noqa: ARG002 - no logits there
        """Run whole prompts through the encoder, the shorter ones padded on the right, then the decoder's first token."""
        model, prompts = self._encoder.model, [piece.tokens for piece in pieces]
        for piece in pieces:
            self._encoder.open(piece.row, piece.room)
        ids, mask = _padded(prompts, model.device, left=False)
        self._best = None
        experts = self._handover.prompt_experts()
        with self._context.carry(padding=self._padding(mask == 0), experts=experts):
            encoded = self._encoder.encode(ids, mask)
        self._handover.pass_queued()
        with self._context.carry(experts=experts):
            logits = self._encoder.start([piece.row for piece in pieces], encoded, list(map(len, prompts)))
        self._handover.pass_queued()
        return logits


class CohortExecutor:
    """A decoder-only model whose sequences begin together and step together; finished ones are dropped."""

    joins = unpadded = False
    whole = padded_left = True

    def __init__(self, model: PreTrainedModel, chunk: int, context: ForwardContext) -> None:
        """Create an executor with no sequences; prompts are read `chunk` tokens a forward, over all sequences."""
        self._model, self._chunk, self._context = model, chunk, context
        use_own_lengths(model, context)
        self._batch: DecoderBatch | None = None
        self._members: list[int] = []

    def prefill(self, pieces: Sequence[PromptChunk], score: Score = no_score) -> Float[Tensor, "B V"]:
        """Run whole prompts of a new cohort."""
        prompts = [piece.tokens for piece in pieces]
        self._members = [piece.sequence for piece in pieces]
        self._batch = DecoderBatch(self._model, prompts, self._chunk, self._context)
        width = max(map(len, prompts))

        def score_columns(states: Tensor, begin: int) -> None:
            """Score the positions of some columns."""
            columns = range(begin, begin + states.shape[1])
            scored = [
                one._replace(column=one.column + here.start - one.positions.start - begin, positions=here)
                for one in _scored(pieces, [width] * len(pieces))
                if (here := _within(one, columns))
            ]
            score_all(self._model, states, scored, score)

        wanted = any(piece.scored for piece in pieces)
        return self._batch.prefill(score_columns if wanted else None)

    def decode(self, fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> Float[Tensor, "B V"]:
        """Run one token of each sequence that has not ended."""
        assert self._batch is not None
        assert tokens is None, "the host decides no step ahead"
        wanted = [one.sequence for one in fed]
        if wanted != self._members:
            self._batch.keep([self._members.index(sequence) for sequence in wanted])
            self._members = wanted
        return self._batch.decode([one.token for one in fed])

    def ready(self, fed: Sequence[DecodeInput]) -> bool:  # noqa: ARG002 - what the others have
        """Never: the host decides every step."""
        return False

    def leave(self, row: int) -> None:
        """Nothing: a step drops what belongs to sequences that are not in it."""

    def best(self) -> None:
        """Not computed on the way."""


def _scored(pieces: Sequence[PromptChunk], ends: Iterable[int], *, one_row: bool = False) -> list[Scored]:
    """What is scored of a pass whose pieces end before these columns, in a row each or all in one."""
    return [
        Scored(place, 0 if one_row else place, end - len(piece.tokens) + piece.scored.start - piece.begin, piece.scored)
        for place, (piece, end) in enumerate(zip(pieces, ends, strict=True))
        if piece.scored
    ]


def _within(one: Scored, columns: range) -> range:
    """The positions that lie in these columns."""
    first = one.positions.start - one.column
    return range(max(one.positions.start, first + columns.start), min(one.positions.stop, first + columns.stop))


def _padded(prompts: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor `[B, W]`, and a mask that is 1 for their tokens.

    A prompt is padded with a token of its own: what is masked must be finite where the prompt is, whatever the pad token's
    weights are.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[prompt[0]] * width for prompt in prompts])
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def _joined(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts one behind the other, `[1, T]`, and a mask of ones."""
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    return ids, torch.ones_like(ids)


def _cache_of(model: PreTrainedModel) -> DynamicCache:
    """The model's own cache, every attention layer of which keeps all tokens: masks limit what a layer sees.

    transformers drops tokens by the config's `sliding_window`, also where the model's code does not read that key.
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [_unbounded(layer) for layer in cache.layers]
    return cache


def _unbounded(layer: Any) -> Any:
    """A layer of the cache that keeps the same tensors, but of all tokens."""
    if not isinstance(layer, DynamicSlidingWindowLayer):
        return layer
    if isinstance(layer, LinearAttentionLayer):  # it keeps a state beside keys and values
        return LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return DynamicLayer()


class DecoderBatch:
    """Sequences of a decoder-only model with the model's own cache, prompts padded on the left."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], chunk: int, context: ForwardContext
    ) -> None:
        """Pad the prompts and start an empty cache."""
        self._model, self._context = model, context
        self._ids, self._mask = _padded(prompts, model.device, left=True)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._columns = max(1, chunk // len(prompts))
        self._cache = _cache_of(model)
        self._argument = cache_argument(model)
        self._lengths = [len(prompt) for prompt in prompts]

    @torch.inference_mode()
    def prefill(self, seen: Callable[[Tensor, int], None] | None = None) -> Float[Tensor, "B V"]:
        """Run the prompts, `chunk` tokens a pass; `seen` gets the states before the head and the first column of each."""
        width = self._ids.shape[1]
        for begin in range(0, width, self._columns):
            end = min(begin + self._columns, width)
            with states_kept(self._model, wanted=seen is not None) as states:
                logits = self._forward(self._ids[:, begin:end], self._positions[:, begin:end], self._mask[:, :end])
            if seen is not None:
                seen(states[0], begin)
        self._positions = self._positions[:, -1:]
        return logits

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Float[Tensor, "B V"]:
        """Run one token a sequence."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        self._positions = self._positions + 1
        self._lengths = [length + 1 for length in self._lengths]
        return self._forward(ids, self._positions, self._mask)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other sequences' keys, values and masks."""
        index = torch.tensor(rows, device=self._mask.device)
        self._mask, self._positions = self._mask[index], self._positions[index]
        self._lengths = [self._lengths[row] for row in rows]
        self._cache.batch_select_indices(index)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        with self._context.carry(lengths=self._lengths):
            out: Any = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self._argument: self._cache},
            )
        last: Tensor = out.logits[:, -1]
        return last
