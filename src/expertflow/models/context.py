"""What a forward pass carries beside the arguments of the model's forward, for the modules that were replaced.

A loaded model has one `ForwardContext`. The code that runs a pass enters `carry`; experts, KV rows, attention, norms,
rotary embeddings and position biases read `now`. Between passes `now` is `NOTHING`, and every module runs its class's
own forward. Must not know which code sets it, and what for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from expertflow.models.attention import AttentionForm

Observer = Callable[[int, Tensor, Tensor], None]
"""Called before a layer runs: its number, its experts `[T, K]` in host memory, their weights `[T, K]` where they are."""
LayerExperts = Callable[..., Tensor]
"""A layer's experts in one call: layer, hidden `[T, H]`, experts `[T, K]`, weights `[T, K]` to `[T, H]`. In a decode step what is to be
added behind them may follow: at most two of `[T, H]`."""


_NONE = torch.zeros(0, dtype=torch.long)


class DenseKernels(Protocol):
    """Single kernels in place of a module's own attention and norm.

    Attributes:
        forms: forms of attention that are computed here.
    """

    forms: frozenset[AttentionForm]

    @property
    def attends(self) -> bool:
        """Whether attention is computed here, and goes by positions instead of masks."""

    @property
    def in_place(self) -> bool:
        """Whether it then finds its KV rows among all of them by itself."""

    def norm(self, module: Any, states: Tensor) -> Tensor:
        """What the norm's own forward computes, `[..., H]`."""

    def attend(
        self, module: Any, given: tuple[Tensor, Tensor, Tensor], scale: float, more: Mapping[str, Any]
    ) -> Tensor:
        """Queries `[B, Q, C, D]` over keys and values to `[B, C, Q, V]`; `more` is what transformers gives by name."""

    def seen(self, module: Any) -> Any:
        """What an attention module sees in a pass of one token a sequence, as kernels take it (`kernels.blocks.given`)."""


class LayerKernels(Protocol):
    """Whole decoder layers in place of their own forward."""

    def run(self, layer: Any, hidden: Tensor, more: Mapping[str, Any]) -> Tensor:
        """What the layer's own forward computes of `[B, 1, H]` or `[1, T, H]`; `more` is what it is given by name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pieces:
    """The sequences of a pass of `[1, T]` tokens, which follow one another without padding.

    Attributes:
        bounds: int64 `[2, S]`, first token and number of tokens of each.
        rows: int64 `[S]`, their KV rows.
        lasts: int64 `[S]`, the position in its sequence of each one's last token.
        longest: the most tokens that one has.
        begins: int64 `[S]`, where the columns that each looks at would begin if those of all followed one another.
        columns: how many these are in all.
    """

    bounds: Tensor
    rows: Tensor
    lasts: Tensor
    longest: int
    begins: Tensor
    columns: int

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, int]], device: torch.device) -> "Pieces":
        """Pieces by row, position of the first token, and position behind the last; one copy to the device."""
        rows, firsts, ends = zip(*pieces, strict=True)
        counts = [end - first for first, end in zip(firsts, ends, strict=True)]
        begins = [0, *accumulate(counts)][:-1]
        columns = [0, *accumulate(ends)]
        there = torch.tensor([begins, counts, rows, [end - 1 for end in ends], columns[:-1]]).to(device)
        return cls(
            bounds=there[:2],
            rows=there[2],
            lasts=there[3],
            longest=max(counts),
            begins=there[4],
            columns=columns[-1],
        )

    @property
    def ends(self) -> Tensor:
        """int64 `[S]`, the last token of each among the T."""
        return self.bounds.sum(0) - 1


class KvPages(Protocol):
    """Where one pass writes and reads keys and values that lie in pages."""

    def table(self, layer: int) -> Tensor:
        """The page table of a layer, int32 `[R, m]`, as far as the pass looks."""

    def written(self, kind: int) -> tuple[Tensor, Tensor]:
        """Where each token's keys and values go: pages and places, `[B, C]` each."""

    def seen(self, kind: int, kept: Tensor) -> Tensor:
        """Copy what the pass's rows have, `[P, G, page, D]`, to `[B, G, end, D]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """What one pass carries.

    Attributes:
        rows: int64 `[B]`, the KV row of each sequence; with `pieces` `[1, T]`, of each token.
        pieces: which tokens are whose, if sequences follow one another without padding; None: each has a line.
        positions: int64 `[B, C]`, of the tokens.
        columns: int64 `[B, C]`, where the tokens' keys and values go.
        end: columns of the rows that attention looks at.
        pages: where keys and values lie, if it is in pages; None: in rows.
        reach: columns that it looks at of what an encoder has read; 0 without one.
        lasts: int64 `[B]`, position of the last token that an encoder has read; None without one.
        lengths: tokens of each sequence, by which its rotary table is chosen; None: the module's own choice.
        distances: int64 `[B, C, N]`, of columns from tokens, for position biases; None: the module's own.
        padding: bool `[T]`, tokens of no sequence, which use no expert; None: there are none.
        observe: called with each layer's routing; None: not called.
        experts: computes each layer's experts, and shows the routing to `observe` if the host gets it; None: the family's own code does.
        dense: computes attention and norms; None: the modules do.
        blocks: computes decoder layers of one token a sequence, or of prompts without padding; None: the modules do.
    """

    rows: Tensor = _NONE
    pieces: Pieces | None = None
    positions: Tensor = _NONE
    columns: Tensor = _NONE
    end: int = 0
    pages: KvPages | None = None
    reach: int = 0
    lasts: Tensor | None = None
    lengths: Sequence[int] | None = None
    distances: Tensor | None = None
    padding: Tensor | None = None
    observe: Observer | None = None
    experts: LayerExperts | None = None
    dense: DenseKernels | None = None
    blocks: LayerKernels | None = None

    @property
    def all_rows(self) -> bool:
        """Attention is given the keys and values of all KV rows, or all pages."""
        return self.dense is not None and self.dense.in_place

    @property
    def unmasked(self) -> bool:
        """Attention goes by positions instead of masks."""
        return self.dense is not None and self.dense.attends


NOTHING = Carried()
"""Between passes."""


class ForwardContext:
    """What the running pass of one loaded model carries.

    Attributes:
        now: what the running pass carries; `NOTHING` between passes.
    """

    def __init__(self) -> None:
        """Start with no pass running."""
        self.now = NOTHING

    @contextmanager
    def carry(self, **facts: Any) -> Iterator[None]:
        """Make the pass carry these facts too, inside.

        Args:
            facts: fields of `Carried`.
        """
        before, self.now = self.now, replace(self.now, **facts)
        try:
            yield
        finally:
            self.now = before
