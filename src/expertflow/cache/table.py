"""Which expert is in which slot. Two arrays that are each other's inverse, and a check that they are.

Knows nothing of layers' order, recency or bytes.
"""

import numpy as np

from expertflow.types import ExpertId

EMPTY = -1


class SlotTable:
    """The bijection between resident experts and occupied slots.

    Attributes:
        slot_of: `[L, E]` int32, the expert's slot or -1.
        owner: `[S]` int32, the flat expert number `layer * E + index` in the slot, or -1.
    """

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        """Start empty, with `slots` slots for `layers x experts` experts."""
        self.layers, self.experts, self.slots = layers, experts, slots
        self.slot_of = np.full((layers, experts), EMPTY, dtype=np.int32)
        self.owner = np.full(slots, EMPTY, dtype=np.int32)

    def expert_in(self, slot: int) -> ExpertId | None:
        """The expert in a slot, or None."""
        flat = int(self.owner[slot])
        return None if flat == EMPTY else ExpertId(*divmod(flat, self.experts))

    def bind(self, expert: ExpertId, slot: int) -> None:
        """Put an expert into an empty slot."""
        assert self.owner[slot] == EMPTY, f"slot {slot} is occupied"
        assert self.slot_of[expert] == EMPTY, f"{expert} already has slot {self.slot_of[expert]}"
        self.slot_of[expert] = slot
        self.owner[slot] = expert.layer * self.experts + expert.expert

    def release(self, slot: int) -> ExpertId:
        """Empty a slot and say who was in it."""
        expert = self.expert_in(slot)
        assert expert is not None, f"slot {slot} is already empty"
        self.slot_of[expert] = EMPTY
        self.owner[slot] = EMPTY
        return expert

    @property
    def resident(self) -> int:
        """Number of experts in slots."""
        return int(np.count_nonzero(self.owner != EMPTY))

    def check_integrity(self) -> None:
        """Assert that both arrays say the same (law 4: resident <= slots)."""
        layers, indexes = np.nonzero(self.slot_of != EMPTY)
        assert len(layers) == self.resident <= self.slots
        for layer, index in zip(layers.tolist(), indexes.tolist(), strict=True):
            slot = int(self.slot_of[layer, index])
            assert self.owner[slot] == layer * self.experts + index, (layer, index, slot)
