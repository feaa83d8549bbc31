"""Slots on the device: one tensor, divided into slots once; and the records of large layers beside them, which never leave.

Must not know experts and their order.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from expertflow.formats.records import ALIGNMENT, ExpertStore, StoreLayout


class SlotPool:
    """`[S, record_bytes]` bytes on the device, 256-byte aligned. Large layers have pools of their own, a place for every expert.

    Places in those pools are numbered on from S, large layer by large layer.

    Args:
        layout: what a record of each layer holds.
        slots: S.
        device: where to allocate.
        experts: E, the places of each large layer.

    Attributes:
        layout: as given.
        buffer: uint8 `[S, record_bytes]`.
        large: uint8 `[E, record_bytes]` of each large layer.
    """

    def __init__(self, layout: StoreLayout, slots: int, device: torch.device, experts: int = 0) -> None:
        """Allocate all slots at once."""
        self.layout = layout
        self.buffer = _allocate(slots, layout.record_bytes, device)
        self.large = {layer: _allocate(experts, layout.layers[layer].record_bytes, device) for layer in layout.large}
        self._first = {layer: slots + number * experts for number, layer in enumerate(layout.large)}
        # views of plain numbers are made once: making them costs a host execution more than a small expert's computation
        sharing = {id(one): one for layer, one in enumerate(layout.layers) if layer not in self.large}
        self._views = {key: [one.weights(row) for row in self.buffer] for key, one in sharing.items() if one.is_plain}
        self._large_views = {
            layer: [layout.layers[layer].weights(row) for row in rows]
            for layer, rows in self.large.items()
            if layout.layers[layer].is_plain
        }

    @property
    def memory(self) -> list[Tensor]:
        """Every tensor that the pool keeps on the device."""
        return [self.buffer, *self.large.values()]

    def slot(self, number: int) -> Tensor:
        """Return one slot, uint8 `[record_bytes]`."""
        return self.buffer[number]

    def of(self, layer: int) -> tuple[Tensor, int]:
        """Return the tensor that a layer's records are in, and the number of its first place."""
        return self.large.get(layer, self.buffer), self._first.get(layer, 0)

    def fill_large(self, store: ExpertStore) -> None:
        """Copy every record of the large layers to its place, for good."""
        for layer, rows in self.large.items():
            for expert, row in enumerate(rows):
                row.copy_(store.record(layer * len(rows) + expert))

    def weights(self, number: int, layer: int) -> dict[str, Tensor]:
        """Return the tensors of a layer's expert whose record is in slot `number`; packed ones are decoded now."""
        layout, (rows, first) = self.layout.layers[layer], self.of(layer)
        views = self._large_views.get(layer) if layer in self.large else self._views.get(id(layout))
        return layout.weights(rows[number - first]) if views is None else views[number - first]

    def put(self, number: int, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a layer's expert, in numbers, into a slot of plain numbers."""
        for name, target in self.weights(number, layer).items():
            target.copy_(tensors[name])

    @staticmethod
    def nbytes(record_bytes: int, slots: int) -> int:
        """Return the bytes a pool of slots takes, alignment included, for the planner."""
        return slots * record_bytes + ALIGNMENT

    @staticmethod
    def large_nbytes(layout: StoreLayout, experts: int) -> int:
        """Return the bytes of the large layers of `experts` experts, alignment included, for the planner."""
        return experts * layout.large_bytes + len(layout.large) * ALIGNMENT


def _allocate(rows: int, row: int, device: torch.device) -> Tensor:
    """Device memory uint8 `[rows, row]`, 256-byte aligned."""
    raw = torch.empty(rows * row + ALIGNMENT, dtype=torch.uint8, device=device)
    skip = -raw.data_ptr() % ALIGNMENT  # a CPU allocation is aligned to 64 bytes only
    return raw[skip : skip + rows * row].view(rows, row)
