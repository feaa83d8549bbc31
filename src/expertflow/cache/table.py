"""Checks over the tables: what must hold at every moment, and the words to look things up with.

`check_integrity` states the invariants of `core.Tables`; it decides nothing.
"""

import numpy as np

from expertflow.cache.core import EMPTY, RESIDENT, Tables
from expertflow.types import ExpertId


class SlotTable:
    """The bijection between resident experts and occupied slots, seen through `core.Tables`.

    Attributes:
        slot_of: `[L, E]` int32, the expert's slot or -1.
        owner: `[S]` int32, the flat expert number `layer * E + index` in the slot, or -1.
    """

    def __init__(self, tables: Tables) -> None:
        """Look at `tables`; nothing is copied."""
        self._tables = tables
        self.slot_of, self.owner = tables.slot_of, tables.owner
        self.layers, self.experts = tables.slot_of.shape
        self.slots = len(tables.owner)

    def expert_in(self, slot: int) -> ExpertId | None:
        """The expert in a slot, or None."""
        flat = int(self.owner[slot])
        return None if flat == EMPTY else ExpertId(*divmod(flat, self.experts))

    @property
    def resident(self) -> int:
        """Number of experts in slots."""
        return int(np.count_nonzero(self.owner != EMPTY))

    def check_integrity(self) -> None:
        """Assert that all arrays say the same (law 4: resident <= slots)."""
        t = self._tables
        layers, indexes = np.nonzero(self.slot_of != EMPTY)
        assert len(layers) == self.resident == t.cursor[RESIDENT] <= self.slots
        for layer, index in zip(layers.tolist(), indexes.tolist(), strict=True):
            slot = int(self.slot_of[layer, index])
            assert self.owner[slot] == layer * self.experts + index, (layer, index, slot)
        assert (t.held == (self.slot_of != EMPTY).sum(axis=1)).all(), t.held
        assert (t.held <= t.share).all(), (t.held, t.share)
        assert not np.isfinite(t.rank[self.slot_of == EMPTY]).any(), "an absent expert has a rank"
        assert not (t.fresh & (self.slot_of == EMPTY)).any(), "an absent expert counts as prefetched"
