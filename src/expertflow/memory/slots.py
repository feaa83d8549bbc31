"""Slots on the device: one tensor, divided into slots once. Must not know experts and their order."""

from collections.abc import Mapping

import torch
from torch import Tensor

from expertflow.formats.records import ALIGNMENT, StoreLayout


class SlotPool:
    """`[S, record_bytes]` bytes on the device, 256-byte aligned.

    Args:
        layout: what a record of each layer holds.
        slots: S.
        device: where to allocate.

    Attributes:
        layout: as given.
        buffer: uint8 `[S, record_bytes]`.
    """

    def __init__(self, layout: StoreLayout, slots: int, device: torch.device) -> None:
        """Allocate all slots at once."""
        raw = torch.empty(slots * layout.record_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        skip = -raw.data_ptr() % ALIGNMENT  # a CPU allocation is aligned to 64 bytes only
        self.buffer = raw[skip : skip + slots * layout.record_bytes].view(slots, layout.record_bytes)
        self.layout = layout
        # views of plain numbers are made once: making them costs a host execution more than a small expert's computation
        self._views = {
            key: [one.weights(self.buffer[slot]) for slot in range(slots)]
            for key, one in layout.distinct.items()
            if one.is_plain
        }

    def slot(self, number: int) -> Tensor:
        """Return one slot, uint8 `[record_bytes]`."""
        return self.buffer[number]

    def weights(self, number: int, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer's expert whose record is in slot `number`; packed ones are decoded now."""
        layout = self.layout.layers[layer]
        views = self._views.get(id(layout))
        return layout.weights(self.buffer[number]) if views is None else views[number]

    def put(self, number: int, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a layer's expert, in numbers, into a slot of plain numbers."""
        for name, target in self.weights(number, layer).items():
            target.copy_(tensors[name])

    @staticmethod
    def nbytes(record_bytes: int, slots: int) -> int:
        """Return the bytes a pool takes, alignment included, for the planner."""
        return slots * record_bytes + ALIGNMENT
