"""Keys and values of the running sequences in rows that never move: what a captured step can point at.

One cache for the whole life of a model: `[rows, heads, length, width]` a layer, whatever kind of attention the layer
has; a sliding window is the mask's business. Prompts are filled in by passes of the host execution, then each row
grows by a token a step at its own position. Knows columns and rows; refuses to know tokens and experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class Span:
    """Which part of the cache a forward pass works on; all layers share one.

    Attributes:
        rows: rows in use, the first ones.
        columns: int64 `[rows]`, where each row's token goes, in a decode step; None in a prefill pass.
        end: columns a decode step looks at.
    """

    def __init__(self) -> None:
        """Nothing in use."""
        self.rows = 0
        self.columns: Tensor | None = None
        self.end = 0


class RowLayer(CacheLayerMixin):
    """One attention layer's rows."""

    is_sliding = False

    def __init__(self, rows: int, length: int, span: Span) -> None:
        """Room for `rows` sequences of `length` tokens, taken when the first keys come."""
        super().__init__()
        self._rows, self._length, self._span = rows, length, span
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, because what is masked must still be finite."""
        self.keys = key_states.new_zeros(self._rows, key_states.shape[1], self._length, key_states.shape[3])
        self.values = value_states.new_zeros(self._rows, value_states.shape[1], self._length, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values, `[B, heads, C, width]`; everything up to there comes back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        span = self._span
        if span.columns is None:
            begin, self.filled = self.filled, self.filled + key_states.shape[2]
            end = self.filled
        else:
            end = span.end
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            if span.columns is None:
                held[: span.rows, :, begin:end] = new
            else:
                held[: span.rows].scatter_(2, span.columns.view(-1, 1, 1, 1).expand_as(new), new)
        return self.keys[: span.rows, :, :end], self.values[: span.rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a prefill pass looks at, and where they begin."""
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Columns filled by prefill passes."""
        return self.filled

    def get_max_length(self) -> int:
        """Columns there are."""
        return self._length


class RowCache(Cache):
    """All layers' rows."""

    def __init__(self, layers: int, rows: int, length: int) -> None:
        """Room for `rows` sequences of `length` tokens in `layers` attention layers."""
        self.span = Span()
        super().__init__(layers=[RowLayer(rows, length, self.span) for _ in range(layers)])

    def restart(self, rows: int) -> None:
        """Prompts of `rows` new sequences come next."""
        self.span.rows, self.span.columns = rows, None
        for layer in self.layers:
            layer.filled = 0

    def decode(self, columns: Tensor, end: int) -> None:
        """Decode steps come next, in rows `0 .. len(columns) - 1`, looking at columns `0 .. end - 1`."""
        self.span.rows, self.span.columns, self.span.end = len(columns), columns, end

    def pack(self, padding: Sequence[int], width: int) -> None:
        """Move every row's tokens to its beginning: `padding` columns of the `width` filled ones are dropped."""
        for held in self._tensors():
            for row, skip in enumerate(padding):
                if skip:
                    held[row, :, : width - skip] = held[row, :, skip:width].clone()

    def keep(self, rows: Sequence[int]) -> None:
        """Move the given rows, ascending, to the front."""
        for held in self._tensors():
            for target, source in enumerate(rows):
                if target != source:
                    held[target] = held[source]

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]


def step_masks(positions: Tensor, end: int, windows: Sequence[int | None], dtype: torch.dtype) -> list[Tensor]:
    """Additive masks `[B, 1, 1, end]` of a decode step: column j counts up to the row's position, within a window.

    Args:
        positions: int64 `[B]`, of the token that is fed in.
        end: columns looked at.
        windows: tokens a layer kind sees, the current one included; None: all. One mask each.
        dtype: of the model.
    """
    column = torch.arange(end, device=positions.device)
    distance = positions[:, None] - column
    masks = []
    for window in windows:
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = torch.zeros(len(positions), end, dtype=dtype, device=positions.device)
        masks.append(mask.masked_fill_(~seen, float("-inf"))[:, None, None])
    return masks
