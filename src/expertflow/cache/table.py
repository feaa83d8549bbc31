"""Look experts and slots up in `core.Tables`, and check the tables' invariants. Decides nothing."""

import numpy as np

from expertflow.cache.core import EMPTY, RESIDENT, Tables
from expertflow.types import ONLY_DEVICE, ExpertId, Place


class SlotTable:
    """A read-only view of `core.Tables`: which expert is in which slot.

    Attributes:
        slot_of: `[L, E]` int32, the expert's slot or -1; the experts of large layers are in places behind the slots.
        owner: `[S]` int32, the flat expert number `layer * E + index` in the slot, or -1.
    """

    def __init__(self, tables: Tables) -> None:
        """View `tables` without copying."""
        self._tables = tables
        self.slot_of, self.owner = tables.slot_of, tables.owner
        self.layers, self.experts = tables.slot_of.shape
        self.slots = len(tables.owner)

    def expert_in(self, place: Place) -> ExpertId | None:
        """Return the expert in a place, or None if its slot is empty."""
        if place.slot >= self.slots:
            layer, expert = np.argwhere(self.slot_of == place.slot)[0].tolist()
            return ExpertId(layer, expert)
        flat = int(self.owner[place.slot])
        return None if flat == EMPTY else ExpertId(*divmod(flat, self.experts))

    def places(self) -> dict[ExpertId, Place]:
        """Return the place of every resident expert, all on the one device there is."""
        return {
            ExpertId(layer, expert): Place(ONLY_DEVICE, int(self.slot_of[layer, expert]))
            for layer, expert in np.argwhere(self.slot_of != EMPTY).tolist()
        }

    @property
    def resident(self) -> int:
        """Number of experts in slots."""
        return int(np.count_nonzero(self.owner != EMPTY))

    def check_integrity(self) -> None:
        """Assert that all arrays agree (law 4: resident <= slots)."""
        t = self._tables
        places, slots_of = self.places(), self.slot_of[t.share > 0]
        assert np.count_nonzero(slots_of != EMPTY) == self.resident == t.cursor[RESIDENT] <= self.slots
        assert (slots_of < self.slots).all(), "an expert of a small layer is outside the slots"
        assert (self.slot_of[t.share == 0] >= self.slots).all(), "an expert of a large layer is not in its place"
        for expert, place in places.items():
            assert self.expert_in(place) == expert, (expert, place)
        assert (t.per_layer == ((self.slot_of != EMPTY) & (self.slot_of < self.slots)).sum(axis=1)).all(), t.per_layer
        assert (t.per_layer <= t.share).all(), (t.per_layer, t.share)
        assert not np.isfinite(t.rank[self.slot_of == EMPTY]).any(), "an absent expert has a rank"
        assert not (t.fresh & (self.slot_of == EMPTY)).any(), "an absent expert counts as prefetched"
