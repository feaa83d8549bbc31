"""Room for rows on the device: one tensor, cut into slots once. Knows no experts and no order."""

import torch
from torch import Tensor

from expertflow.memory.layout import ALIGNMENT, RecordLayout


class SlotPool:
    """`[S, record_bytes]` bytes on the device, 256-byte aligned, with ready-made tensor views.

    Attributes:
        views: for each slot, the expert tensors by name.
    """

    def __init__(self, layout: RecordLayout, slots: int, device: torch.device) -> None:
        """Allocate all slots at once."""
        raw = torch.empty(slots * layout.record_bytes + ALIGNMENT, dtype=torch.uint8, device=device)
        skip = -raw.data_ptr() % ALIGNMENT  # a CPU allocation is aligned to 64 bytes only
        self.buffer = raw[skip : skip + slots * layout.record_bytes].view(slots, layout.record_bytes)
        self.views = [layout.views(self.buffer[slot]) for slot in range(slots)]

    def slot(self, number: int) -> Tensor:
        """One slot, uint8 `[record_bytes]`."""
        return self.buffer[number]

    @staticmethod
    def nbytes(record_bytes: int, slots: int) -> int:
        """Bytes a pool takes, alignment included: what the planner counts."""
        return slots * record_bytes + ALIGNMENT
