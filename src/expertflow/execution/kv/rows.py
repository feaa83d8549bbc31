"""A cache in rows of full length: what an encoder-decoder model's decoder keeps, and what it reads of its encoder.

`[rows, heads, length + 1, width]` a layer. The last column is of no token: what padding writes goes there. Must not know
requests, experts and graphs.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from expertflow.models.context import ForwardContext


class RowLayer(CacheLayerMixin):
    """One attention layer's rows. Which of them a pass works on is in the pass's context."""

    is_sliding = False

    def __init__(self, rows: int, length: int, context: ForwardContext) -> None:
        """Room for `rows` sequences of `length` tokens, taken when the first keys come."""
        super().__init__()
        self._rows, self._length, self._context = rows, length, context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, because what is masked must still be finite."""
        columns = self._length + 1
        self.keys = key_states.new_zeros(self._rows, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(self._rows, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a pass's keys and values, `[B, heads, C, width]`; what attention looks at comes back."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        now = self._context.now
        where = now.rows[:, None], slice(None), now.columns
        self.keys[where] = key_states.transpose(1, 2)
        self.values[where] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : now.end], self.values[:, :, : now.end]
        return (keys, values) if now.all_rows else (keys[now.rows], values[now.rows])

    def clear(self, row: int, columns: int) -> None:
        """Zero the first columns of a row."""
        if self.is_initialized:
            self.keys[row, :, :columns].zero_()
            self.values[row, :, :columns].zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - transformers' signature
        """Columns a pass looks at, and where they begin."""
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        """Columns a pass looks at: every sequence has a length of its own."""
        return self._context.now.end

    def get_max_length(self) -> int:
        """Columns there are."""
        return self._length


class RowCache(Cache):
    """All layers' rows, and how many columns of each were written."""

    def __init__(
        self, layers: int, rows: int, length: int, context: ForwardContext, kind: type[RowLayer] = RowLayer
    ) -> None:
        """Room for `rows` sequences of `length` tokens in `layers` attention layers."""
        self._written = [0] * rows
        super().__init__(layers=[kind(rows, length, context) for _ in range(layers)])

    def note(self, row: int, columns: int) -> None:
        """Record that a pass writes rows up to this many columns."""
        self._written[row] = max(self._written[row], columns)

    def clear(self, row: int) -> None:
        """Clear a row for a new sequence. What is masked must be finite: NaN, times a weight of zero, would still be NaN."""
        for layer in self.layers:
            layer.clear(row, self._written[row])
        self._written[row] = 0
