"""The loads of a step as one list: which record goes into which slot, how many blocks are taken, how many are done.

Records move in blocks, all in as many, whose size goes by the layer's record. Any idle program takes the next free block of
a load: one of the copy stream of loads ahead, or one of a layer that needs the record now. A layer waits only for blocks
that a running program carries, so it never waits for a kernel that has not begun. Loads ahead leave the link to those that
a layer waits for, block by block. A load whose expert was evicted again is called off: no more of its blocks are taken, and
the slot's next load waits for the blocks under way.

`kernels.residency` writes the entries, `kernels.fetch` carries them out. Must not know experts beyond their numbers,
and records beyond their blocks.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

SRC, DST, TAKEN, DONE, PRIOR, CARRIED = range(6)
"""Fields of an entry, the first index of `Ledger.table`: flat expert, slot, blocks taken, blocks done. Then the load into
the same slot that was called off before, or -1. Last, how many blocks of this load were taken when it was called off."""
CALLED_OFF = 1 << 28
"""Added to TAKEN to call a load off; more than the blocks of any record."""
LINE = 256
"""Bytes that sizes of records are counted in."""
BLOCK_BYTES = 32768
"""Bytes of a block, which a program of `kernels.fetch` has in flight at a time."""


@dataclass(frozen=True)
class Ledger:
    """A step's loads.

    Attributes:
        table: int32 `[6, N]`, an entry a column.
        count: int32 `[1]`, entries written.
        urgent: int32 `[1]`, programs that carry what a layer waits for; while there is one, loads ahead stand still.
        lines: int32 `[records]`, the lines of `LINE` bytes that a load of each record moves; None: as many as a slot has.
    """

    table: Tensor
    count: Tensor
    urgent: Tensor
    lines: Tensor | None = None

    @classmethod
    def allocate(cls, entries: int, device: torch.device, lines: Tensor | None = None) -> Self:
        """Allocate room for `entries` loads."""
        count, urgent = torch.zeros(2, 1, dtype=torch.int32, device=device)
        return cls(torch.zeros(6, entries, dtype=torch.int32, device=device), count, urgent, lines)

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

    def moved(self) -> int:
        """What the loads moved so far: blocks done, each times the lines of its record where records are unequal."""
        table = self.table.cpu().numpy()
        done = table[DONE].astype(np.int64)
        return int(done.sum() if self.lines is None else done @ self.lines.cpu().numpy()[table[SRC]].astype(np.int64))

    def renew(self) -> None:
        """Mark the same loads as not begun."""
        self.table[TAKEN : DONE + 1] = 0
