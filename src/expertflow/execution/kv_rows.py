"""Keys and values of the live sequences in rows that never move, and the model's forward over any of them.

One cache for the whole life of a model: `[rows, heads, length + 1, width]` a layer, whatever kind of attention the
layer has; sliding windows are applied by masks. A pass names the rows it works on, in any order: regrouping sequences
is another list of rows (the paper's Merge and Reindex, section 3.3, without the copies). The last column is of no
token: what padding writes goes there. Must not know requests, experts and graphs.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from expertflow.models.attention import attention_windows, cache_argument, layer_kinds
from expertflow.models.context import ForwardContext
from expertflow.models.skeleton import Skeleton


class DecodeInput(NamedTuple):
    """A token that a sequence is fed: the sequence, the token, the KV row, and the token's position."""

    sequence: int
    token: int
    row: int
    position: int


class ForwardInput(NamedTuple):
    """What a forward pass is fed.

    Attributes:
        tokens: int64 `[B, C]`.
        rows: int64 `[B]`, each once, but for padding.
        positions: int64 `[B, C]`; each token sees columns up to its own position.
        columns: int64 `[B, C]`, where the tokens' keys and values go: their positions, or nowhere.
        end: columns that are looked at.
        reach: the same of what an encoder has read; 0 without one.
    """

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    columns: Tensor
    end: int
    reach: int = 0


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


class OfModel:
    """Refers to the loaded model without keeping it alive, because the model's passes refer to its KV rows."""

    _model: Callable[[], PreTrainedModel | None]

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model."""
        model = self._model()
        assert model is not None, "the rows of a model that is gone"
        return model


class RowModel(OfModel):
    """A decoder-only model's forward over rows of one cache.

    Args:
        model: loaded model of a family with an entry in `models.families`.
        skeleton: of it.
        rows: sequences that may live at once.
        length: tokens of a sequence at most.
        context: what the model's passes carry.

    Attributes:
        nowhere: the column that padding writes to.
        windows: each attention layer's sliding window, or None.
    """

    def __init__(
        self, model: PreTrainedModel, skeleton: Skeleton, rows: int, length: int, context: ForwardContext
    ) -> None:
        """Find out what masks the model's layers are given."""
        config = skeleton.config.get_text_config(decoder=True)
        windows = attention_windows(skeleton.model, config)
        assert windows is not None, "a model in rows has masks that are windows"
        self._model, self.skeleton, self.rows, self.nowhere = weakref.ref(model), skeleton, rows, length
        self.context = context
        self.windows: list[int | None] = list(windows)
        # a decoder whose layers differ takes a mask a kind of layer, by name
        self._kinds = (
            dict(zip(layer_kinds(config), windows, strict=True)) if len(set(windows)) > 1 else {"": windows[0]}
        )
        self._argument = cache_argument(model)
        self._dtype = getattr(torch, skeleton.dtype)
        self._unread = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=model.device)
        self.cache = RowCache(len(windows), rows, length, context)

    def clear(self, row: int) -> None:
        """Clear a row for a new sequence."""
        self.cache.clear(row)

    def drop(self) -> None:
        """Free keys and values; nothing can be run afterwards."""
        self.cache.layers.clear()

    def reach(self, rows: Sequence[int]) -> int:  # noqa: ARG002 - as of rows behind an encoder
        """Tokens an encoder has read: 0 without one."""
        return 0

    def forward(self, run: Callable[..., Any], given: ForwardInput) -> Float[Tensor, "B V"]:
        """Run a pass; logits of each row's last token.

        Args:
            run: the model, or its bare forward.
            given: what is fed in.
        """
        tokens, rows, positions, columns, end, _ = given
        windows = list(self._kinds.values())
        with self.context.carry(rows=rows, positions=positions, columns=columns, end=end):
            unread = self.context.now.unmasked
            masks = [self._unread] * len(windows) if unread else step_masks(positions, end, windows, self._dtype)
            by_kind = dict(zip(self._kinds, masks, strict=True))
            out: Any = run(
                input_ids=tokens,
                attention_mask=by_kind if len(by_kind) > 1 else masks[0],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self._argument: self.cache},
            )
        last: Tensor = out.logits[:, -1]
        return last


def step_masks(
    positions: Int[Tensor, "B C"], end: int, windows: Sequence[int | None], dtype: torch.dtype
) -> list[Tensor]:
    """Additive masks `[B, 1, C, end]`: column j counts up to the token's position, within a window.

    Args:
        positions: of the tokens that are fed in.
        end: columns looked at.
        windows: tokens a layer kind sees, the current one included; None: all. One mask each.
        dtype: of the model.
    """
    column = torch.arange(end, dtype=torch.int32, device=positions.device)
    distance = positions[:, :, None].int() - column
    masks = []
    for window in windows:
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
        masks.append(mask.masked_fill_(~seen, float("-inf"))[:, None])
    return masks
