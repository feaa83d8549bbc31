"""The model's forward over any of the live sequences, each of which has a row.

A row is a sequence's place in the page tables of keys and values (`execution.kv`). A pass names the rows it works on, in any
order: regrouping sequences is another list of rows (the paper's Merge and Reindex, section 3.3, without the copies). Sliding
windows are applied by masks or by kernels. Must not know requests, experts and graphs.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.execution.kv.layout import Layout
from expertflow.execution.kv.paged import PagedCache, Span
from expertflow.models.attention import cache_argument, layer_kinds
from expertflow.models.context import ForwardContext, Pieces
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
        rows: int64 `[B]`, each once, but for padding; with `pieces` `[1, T]`, of each token.
        positions: int64 `[B, C]`; each token sees columns up to its own position.
        columns: int64 `[B, C]`, where the tokens' keys and values go: their positions, or nowhere.
        end: columns that are looked at.
        reach: the same of what an encoder has read; 0 without one.
        cells: int64 `[K, B, C]`, where keys and values go in pages, see `PassPages`; of no lines where they lie in rows.
        pieces: which of `[1, T]` tokens are whose; None: a line each.
    """

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    columns: Tensor
    end: int
    reach: int = 0
    cells: Tensor = torch.zeros(0, 1, 1, dtype=torch.long)
    pieces: Pieces | None = None


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
        layout: sizes of keys and values.
        windows: tokens each layer sees, as in `ModelShape`.
        context: what the model's passes carry.

    Attributes:
        rows: sequences that may live at once.
        nowhere: the column of padding.
        windows: each attention layer's sliding window, or None.
        cache: keys and values.
        cell_lines: lines of `ForwardInput.cells`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        layout: Layout,
        windows: Sequence[int | None],
        context: ForwardContext,
    ) -> None:
        """Allocate keys and values."""
        config = skeleton.config.get_text_config(decoder=True)
        self._model, self.skeleton = weakref.ref(model), skeleton
        self.rows, self.nowhere = layout.rows, layout.length
        self.context = context
        self.windows: list[int | None] = list(windows)
        # a decoder whose layers differ takes a mask a kind of layer, by name
        self._kinds = (
            dict(zip(layer_kinds(config), windows, strict=True)) if len(set(windows)) > 1 else {"": windows[0]}
        )
        self._argument = cache_argument(model)
        self._dtype = getattr(torch, skeleton.dtype)
        self._unread = torch.zeros(1, 1, 1, 1, dtype=self._dtype, device=model.device)
        self.cache = PagedCache(layout, context, model.device)
        self.cell_lines = len(layout.kinds) + 1

    def open(self, row: int, tokens: int) -> None:
        """Begin a sequence of so many tokens at most in a row; 0: of as many as there may be."""
        self.cache.open(row, tokens or self.nowhere)

    def leave(self, row: int) -> None:
        """Let other sequences have what a row keeps."""
        self.cache.leave(row)

    def passing(self, spans: Sequence[Span], columns: npt.NDArray[np.int64]) -> AbstractContextManager[Tensor]:
        """Have room for what a pass writes while it is queued; see `PagedCache.passing`."""
        return self.cache.passing(spans, columns)

    def step_cells(self, rows: Sequence[int], positions: Sequence[int], out: npt.NDArray[np.int64]) -> None:
        """Have room for one token of each row, and write where it goes; see `PagedCache.step_cells`."""
        self.cache.step_cells(rows, positions, out)

    def drop(self) -> None:
        """Free keys and values; nothing can be run afterwards."""
        self.cache.drop()

    def reach(self, rows: Sequence[int]) -> int:  # noqa: ARG002 - as of rows behind an encoder
        """Tokens an encoder has read: 0 without one."""
        return 0

    def forward(self, run: Callable[..., Any], given: ForwardInput) -> Float[Tensor, "B V"]:
        """Run a pass; logits of each row's last token.

        Args:
            run: the model, or its bare forward.
            given: what is fed in.
        """
        tokens, rows, positions, columns, end, _, cells, pieces = given
        windows, pages = list(self._kinds.values()), self.cache.of_pass(cells, rows, end)
        where = {"rows": rows, "positions": positions, "columns": columns, "end": end, "pages": pages, "pieces": pieces}
        with self.context.carry(**where):
            unread = self.context.now.unmasked
            masks = [self._unread] * len(windows) if unread else step_masks(positions, end, windows, self._dtype)
            by_kind = dict(zip(self._kinds, masks, strict=True))
            out: Any = run(
                input_ids=tokens,
                attention_mask=by_kind if len(by_kind) > 1 else masks[0],
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1 if pieces is None else pieces.ends,
                **{self._argument: self.cache},
            )
        last: Tensor = out.logits[:, -1] if pieces is None else out.logits[0]
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
