"""The loads of a step as one list: which record goes into which slot, how many blocks are taken, how many are done.

Records move in blocks. Any idle program takes the next free block of a load: one of the copy stream of loads ahead, or
one of a layer that needs the record now. A layer waits only for blocks that a running program carries, so it never
waits for a kernel that has not begun. A load whose expert was evicted again is called off: no more of its blocks are
taken, and the slot's next load waits for the blocks under way.

`kernels.residency` writes the entries, `kernels.fetch` carries them out. Must not know experts beyond their numbers,
and records beyond their blocks.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SRC, DST, TAKEN, DONE, PRIOR, CARRIED = range(6)
"""Fields of an entry, the first index of `Ledger.table`: flat expert, slot, blocks taken, blocks done. Then the load into
the same slot that was called off before, or -1. Last, how many blocks of this load were taken when it was called off."""
CALLED_OFF = 1 << 28
"""Added to TAKEN to call a load off; more than the blocks of any record."""
BLOCK_BYTES = 32768
"""Bytes of a block, which a program of `kernels.fetch` has in flight at a time."""


@dataclass(frozen=True)
class Ledger:
    """A step's loads.

    Attributes:
        table: int32 `[6, N]`, an entry a column.
        count: int32 `[1]`, entries written.
    """

    table: Tensor
    count: Tensor

    @classmethod
    def allocate(cls, entries: int, device: torch.device) -> Self:
        """Allocate room for `entries` loads."""
        return cls(
            torch.zeros(6, entries, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    @classmethod
    def of(cls, src: Tensor, dst: Tensor) -> Self:
        """Make a ledger of loads not begun: flat experts `src` `[N]` into slots `dst` `[N]`."""
        ledger = cls.allocate(len(src), src.device)
        ledger.table[SRC], ledger.table[DST], ledger.table[PRIOR] = src, dst, -1
        ledger.count.fill_(len(src))
        return ledger

    @property
    def entries(self) -> int:
        """N, the most loads it has room for."""
        return self.table.shape[1]

    def renew(self) -> None:
        """Mark the same loads as not begun."""
        self.table[TAKEN : DONE + 1] = 0
