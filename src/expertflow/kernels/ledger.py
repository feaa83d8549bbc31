"""The loads of a step as one list: which row goes into which slot, how much of it somebody has taken on, how much is there.

Rows move in blocks. Whoever has nothing better to do takes a block of a load that still has some: the copy stream of the
loads ahead, and the layer that needs the row now and will not wait for its place in that queue. A layer waits only for
blocks that somebody is carrying, so nobody waits for a kernel that has not begun. A load whose expert was thrown out
again is called off: no more of its blocks are taken, and the slot's next load waits for those under way.

Entries are written by `kernels.residency` and `kernels.residency.lookahead`, carried out by `kernels.fetch`. Knows numbers only.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SRC, DST, TAKEN, DONE, PRIOR, CARRIED = range(6)
"""Rows of `Ledger.table`: flat expert, slot, blocks taken on, blocks there, the load called off for this one (or -1),
and how many of that one's blocks had been taken on by then."""
CALLED_OFF = 1 << 28
"""Added to TAKEN: more than any row has blocks."""
BLOCK_BYTES = 32768
"""Bytes of a block; what a program of `kernels.fetch` has in flight at a time."""


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
        """Room for that many loads."""
        return cls(
            torch.zeros(6, entries, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )

    @classmethod
    def of(cls, src: Tensor, dst: Tensor) -> Self:
        """The given loads, none of them begun: rows `[N]` and their slots `[N]`."""
        ledger = cls.allocate(len(src), src.device)
        ledger.table[SRC], ledger.table[DST], ledger.table[PRIOR] = src, dst, -1
        ledger.count.fill_(len(src))
        return ledger

    @property
    def entries(self) -> int:
        """N."""
        return self.table.shape[1]

    def renew(self) -> None:
        """The same loads once more: none of them begun."""
        self.table[TAKEN : DONE + 1] = 0
