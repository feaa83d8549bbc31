"""An encoder-decoder model over rows: the decoder's own keys and values, and those of what the encoder has read.

There are two sets of rows like a decoder-only model's (`execution.kv_rows`). A sequence's first pass reads its whole
prompt through the encoder, and writes what the decoder attends to into its row. From then on it steps beside any other
sequences, eagerly or captured. Each row has its own positions. The T5 relative position bias of transformers does not
allow that, so it is computed here row by row. Must not know requests, experts and graphs.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel

from expertflow.execution.kv.paged import Span
from expertflow.execution.kv.rows import RowCache, RowLayer
from expertflow.execution.kv_rows import ForwardInput, OfModel, step_masks
from expertflow.models.attention import cache_argument
from expertflow.models.context import ForwardContext
from expertflow.models.skeleton import Skeleton


class Encoded(NamedTuple):
    """What an encoder made of the prompts, as the model's forward reads it: by place and by name."""

    last_hidden_state: Tensor
    hidden_states: None = None
    attentions: None = None
    router_logits: None = None


class ReadLayer(RowLayer):
    """One layer's keys and values of what the encoder has read; attention takes them as attributes."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, because what is masked must still be finite."""
        shape = self._rows, key_states.shape[1], self._length, key_states.shape[3]
        self._keys, self._values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keep what the prompts of a pass gave, `[B, heads, W, width]`; attention looks at just that."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        width = key_states.shape[2]
        rows = self._context.now.rows
        self._keys[rows, :, :width] = key_states
        self._values[rows, :, :width] = value_states
        return key_states, value_states

    def clear(self, row: int, columns: int) -> None:
        """Zero the first columns of a row."""
        if self.is_initialized:
            self._keys[row, :, :columns].zero_()
            self._values[row, :, :columns].zero_()

    def get_seq_length(self) -> int:
        """Columns a pass looks at: the longest prompt's."""
        return self._context.now.reach

    def _seen(self, kept: Tensor) -> Tensor:
        now = self._context.now
        columns = kept[:, :, : now.reach]
        return columns if now.all_rows else columns[now.rows]

    @property
    def keys(self) -> Tensor:
        """`[B, heads, end, width]` of the rows in use, or of all if attention finds its rows itself."""
        return self._seen(self._keys)

    @keys.setter
    def keys(self, value: Tensor) -> None:
        """Skip transformers' constructor."""

    @property
    def values(self) -> Tensor:
        """As `keys`."""
        return self._seen(self._values)

    @values.setter
    def values(self, value: Tensor) -> None:
        """As `keys`."""


class EncoderDecoderRows(OfModel):
    """An encoder-decoder model's forward over rows.

    Args:
        model: loaded model of a family with an entry in `models.families`.
        skeleton: of it.
        rows: sequences that may live at once.
        length: tokens of a prompt, and of an answer, at most.
        context: what the model's passes carry.

    Attributes:
        nowhere: the column that padding writes to.
        windows: each decoder layer's sliding window: None.
        cache: the decoder's own keys and values.
        cell_lines: 0: keys and values lie in rows, not in pages.
    """

    cell_lines = 0

    def __init__(
        self, model: PreTrainedModel, skeleton: Skeleton, rows: int, length: int, context: ForwardContext
    ) -> None:
        """Create empty rows."""
        self._model, self.skeleton, self.rows, self.nowhere = weakref.ref(model), skeleton, rows, length
        self.context = context
        layers = int(model.config.num_decoder_layers)
        self._argument = cache_argument(model)
        self.windows: list[int | None] = [None] * layers
        self.cache = RowCache(layers, rows, length, context)
        self._read = RowCache(layers, rows, length, context, kind=ReadLayer)
        self._both = EncoderDecoderCache(self.cache, self._read)
        self._lengths = [1] * rows
        self._lasts = torch.zeros(rows, dtype=torch.long, device=model.device)
        self._dtype = getattr(torch, skeleton.dtype)
        for module in model.get_decoder().modules():
            if getattr(module, "has_relative_attention_bias", False):
                module.compute_bias = _row_bias(module, context)
        self._unread = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=model.device)

    def open(self, row: int, tokens: int) -> None:  # noqa: ARG002 - as of rows in pages
        """Clear a row for a new sequence: what the former one wrote, and what its encoder had read."""
        self.cache.clear(row)
        self._read.clear(row)

    def leave(self, row: int) -> None:
        """Nothing: a row has its memory for good."""

    @contextmanager
    def passing(self, spans: Sequence[Span], columns: npt.NDArray[np.int64]) -> Iterator[Tensor]:
        """Note what a step writes; there are no cells."""
        for span in spans:
            self.cache.note(span.row, span.end)
        yield torch.zeros(0, *columns.shape, dtype=torch.long)

    def step_cells(self, rows: Sequence[int], positions: Sequence[int], out: npt.NDArray[np.int64]) -> None:
        """Note what a step writes; there are no cells."""
        del out
        for row, position in zip(rows, positions, strict=True):
            self.cache.note(row, position + 1)

    def drop(self) -> None:
        """Free keys and values; nothing can be run afterwards."""
        self.cache.layers.clear()
        self._read.layers.clear()

    def reach(self, rows: Sequence[int]) -> int:
        """Tokens of the longest prompt that was read into these rows."""
        return max(self._lengths[row] for row in rows)

    def encode(self, prompts: Int[Tensor, "B W"], mask: Int[Tensor, "B W"]) -> Float[Tensor, "B W H"]:
        """Run the encoder over whole prompts, padded on the right; the mask is 1 for a token, 0 for padding."""
        encoder: Any = self.model.get_encoder()
        states: Tensor = encoder(input_ids=prompts, attention_mask=mask).last_hidden_state
        return states

    def start(
        self, rows: Sequence[int], encoded: Float[Tensor, "B W H"], lengths: Sequence[int]
    ) -> Float[Tensor, "B V"]:
        """Run the decoder's first token in these rows, whatever they contained before; logits of the next.

        Args:
            rows: of the sequences.
            encoded: what the encoder made of their prompts.
            lengths: tokens of each prompt.
        """
        config, device = self.model.config, encoded.device
        where = torch.tensor(rows, device=device)
        self._lasts[where] = torch.tensor(lengths, device=device) - 1
        for row, count in zip(rows, lengths, strict=True):
            self._lengths[row] = count
            self.cache.note(row, 1)
            self._read.note(row, encoded.shape[1])
        token = getattr(config, "decoder_start_token_id", None)
        tokens = torch.full((len(rows), 1), config.pad_token_id if token is None else token, device=device)
        first = torch.zeros_like(tokens)
        return self._run(self.model, ForwardInput(tokens, where, first, first, 1, encoded.shape[1]), encoded)

    def forward(self, run: Callable[..., Any], given: ForwardInput) -> Float[Tensor, "B V"]:
        """Run a step of the decoder; logits of each row's last token.

        Args:
            run: the model, or its bare forward.
            given: what is fed in.
        """
        return self._run(run, given, None)

    def _run(self, run: Callable[..., Any], given: ForwardInput, encoded: Tensor | None) -> Tensor:
        tokens, rows, positions, columns, end, reach, _, _ = given
        self._both.is_updated = dict.fromkeys(range(len(self.windows)), encoded is None)
        lasts = self._lasts[rows]
        if self.context.now.all_rows:
            mask = read_mask = self._unread
            distances = -torch.arange(self.nowhere, device=tokens.device)[None, None]
        else:
            mask = step_masks(positions, end, (None,), self._dtype)[0]
            read_mask = step_masks(lasts[:, None], reach, (None,), self._dtype)[0]
            distances = torch.arange(end, device=tokens.device) - positions[:, :, None]
        where = {"rows": rows, "positions": positions, "columns": columns, "end": end, "reach": reach}
        with self.context.carry(**where, lasts=lasts, distances=distances):
            out: Any = run(
                encoder_outputs=Encoded(self._unread[0] if encoded is None else encoded),
                attention_mask=read_mask,
                decoder_input_ids=tokens,
                decoder_attention_mask=mask,
                use_cache=True,
                **{self._argument: self._both},
            )
        last: Tensor = out.logits[:, -1]
        return last


def _row_bias(module: Any, context: ForwardContext) -> Callable[..., Tensor]:
    """In place of `compute_bias` of T5's attention, whose query position is one for all rows: `[B, heads, C, N]`.

    It must not keep the module alive, which keeps it.
    """
    own: Callable[..., Tensor] = type(module).compute_bias
    attention = weakref.ref(module)

    def compute_bias(*args: Any, **kwargs: Any) -> Tensor:
        module: Any = attention()
        if context.now.distances is None:
            return own(module, *args, **kwargs)
        bucket = module._relative_position_bucket(  # noqa: SLF001 - the family's own rule
            context.now.distances,
            bidirectional=False,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        bias: Tensor = module.relative_attention_bias(bucket)
        return bias.permute(0, 3, 1, 2).contiguous()

    return compute_bias
