"""The (token, expert) pairs of a pass, sorted by expert. Must not know slots, and what is computed with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SortedPairs:
    """Pair `token * K + rank` of T tokens with K experts each, sorted by expert and then by its number.

    The host need not know how many an expert has.

    Attributes:
        order: int64 `[T * K]` on the device, the pairs; behind those of the last expert come pairs without one.
        edges: int32 `[E + 1]` on the device, places in `order` at which each expert's pairs begin; the last one is where the last expert's end.
        top_k: K.
    """

    order: Tensor
    edges: Tensor
    top_k: int

    @property
    def experts(self) -> int:
        """E."""
        return len(self.edges) - 1

    @property
    def mean(self) -> float:
        """Pairs of an expert on average, if as many experts are needed as can be."""
        return len(self.order) / max(1, min(self.experts, len(self.order)))

    def span(self, expert: int) -> tuple[int, int] | None:  # noqa: ARG002 - known once counted
        """Where an expert's places begin and end; None: not known."""
        return None

    def tiles(self, group: Sequence[tuple[int, int]], tile: int) -> int:
        """Tiles of so many pairs that these experts, with their slots, have at most."""
        return min(len(self.order), len(self.order) // tile + len(group))

    def counted(self, routes: npt.NDArray[np.integer]) -> "CountedPairs":
        """The same with what the host knows, once the experts `[T, K]` are there."""
        counts = np.bincount(routes.reshape(-1), minlength=self.experts + 1)[: self.experts]
        bounds = [0, *counts.cumsum().tolist()]
        return CountedPairs(order=self.order, edges=self.edges, top_k=self.top_k, bounds=bounds)


@dataclass(frozen=True, kw_only=True)
class CountedPairs(SortedPairs):
    """Sorted pairs whose number the host knows.

    Attributes:
        bounds: what `edges` holds.
    """

    bounds: list[int]

    def count(self, expert: int) -> int:
        """Pairs of an expert."""
        return self.bounds[expert + 1] - self.bounds[expert]

    @cached_property
    def needed(self) -> list[int]:
        """The experts that have pairs, ascending."""
        return [expert for expert in range(len(self.bounds) - 1) if self.count(expert)]

    @property
    def mean(self) -> float:
        """Pairs of a needed expert on average; 0 if none is needed."""
        return self.bounds[-1] / max(1, len(self.needed))

    def span(self, expert: int) -> tuple[int, int]:
        """See `SortedPairs`."""
        return self.bounds[expert], self.bounds[expert + 1]

    def tiles(self, group: Sequence[tuple[int, int]], tile: int) -> int:
        """Tiles of so many pairs that these experts have."""
        return sum(-(-self.count(expert) // tile) for expert, _ in group)


def sort_pairs(index: Tensor, experts: int) -> SortedPairs:
    """Sort without waiting for the device.

    Args:
        index: experts `[T, K]`; one that is none has the number E.
        experts: E, below 32,768: in 16 bits a device sorts in a quarter of the time.
    """
    keys, order = torch.sort(index.reshape(-1).to(torch.int16), stable=True)
    numbers = torch.arange(experts + 1, dtype=torch.int16, device=index.device)
    edges = torch.searchsorted(keys, numbers, out_int32=True)
    return SortedPairs(order=order, edges=edges, top_k=index.shape[1])


def on_host(index: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Begin to copy a tensor to host memory; work queued before the second result is called runs beside the host.

    Returns:
        The copy, page-locked where the tensor is on a GPU; and what waits until it is there.
    """
    if index.device.type != "cuda":
        return index, lambda: None
    host, copied = index.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()
    return host, copied.synchronize
