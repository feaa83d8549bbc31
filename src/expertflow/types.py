"""The words of the project as types: experts, places, accesses, loads, expert tensors.

Stdlib only, so that cache, trace and simulator never need torch.

*expert* one feed-forward block of one MoE layer · *record* all tensors of one expert as one block of bytes ·
*slot* room for one record on a device · *access* the use of one expert by one layer of one step.
"""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple


class ExpertId(NamedTuple):
    """One expert: MoE layer (counted over MoE layers only, from 0) and index within it."""

    layer: int
    expert: int


class Place(NamedTuple):
    """Where a resident expert is.

    Attributes:
        device: index of the device among those that have slots; `ONLY_DEVICE` now.
        slot: index of the slot on that device.
    """

    device: int
    slot: int


ONLY_DEVICE = 0
"""Device index of every place: one device has slots."""
LARGE = 1.25
"""Times the median of all layers' records above which a layer is large: slots of its size would waste memory."""
HORIZONS = (1, 2, 4, 8)
"""A predictor's outputs after the first: an expert is used within so many steps after the coming one."""


class Access(NamedTuple):
    """The use of one expert by a layer, as the controller decided it.

    Attributes:
        expert: index of the expert within its layer.
        slot: the slot its record is (or will be) in.
        load: whether the record must be copied into the slot first.
        fresh: whether a copy that was started ahead brings it, and this is its first use.
        after: position, in the same schedule, of the last access that uses the slot before this one; -1 if none.
            The copy may start after that access has been computed.
    """

    expert: int
    slot: int
    load: bool
    fresh: bool
    after: int


class Load(NamedTuple):
    """A copy started ahead: the expert's record goes into a slot that nothing reads any more."""

    layer: int
    expert: int
    slot: int


def large_layers(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the large layers by the bytes of each layer's records: their experts are always resident, outside the slots."""
    return tuple(layer for layer, size in enumerate(sizes) if size > LARGE * median(sizes))
