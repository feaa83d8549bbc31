"""The words of the project as types: experts, expert tensors, accesses.

Stdlib only, so that cache, trace and simulator never need torch.

*expert* one feed-forward block of one MoE layer · *row* all tensors of one expert as one record ·
*slot* room for one row on the device · *access* one expert's turn in one layer of one step.
"""

from typing import NamedTuple


class ExpertId(NamedTuple):
    """One expert: MoE layer (counted over MoE layers only, from 0) and index within it."""

    layer: int
    expert: int


class Access(NamedTuple):
    """One expert's turn in a layer, as the controller decided it.

    Attributes:
        expert: index of the expert within its layer.
        slot: the slot its row is (or will be) in.
        load: whether the row must be copied into the slot first.
        fresh: whether a copy that was started ahead brings it, and this is its first use.
        after: position, in the same schedule, of the last access that uses the slot before this one; -1 if none.
            The copy may start once that access has been computed.
    """

    expert: int
    slot: int
    load: bool
    fresh: bool
    after: int


class Load(NamedTuple):
    """A copy started ahead: the expert's row goes into a slot that nothing reads any more."""

    layer: int
    expert: int
    slot: int
