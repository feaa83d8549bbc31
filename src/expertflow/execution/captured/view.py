"""What the expert cache holds and has done, between two steps, while the GPU has its tables.

Copies to page-locked host memory are queued behind the steps that are queued already, so nobody waits for them before the
next step. They change nothing on the device, and allocate nothing there. Must not know layers and requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from expertflow.events import CacheCounters
from expertflow.kernels.ledger import DONE, SRC
from expertflow.kernels.residency.state import BLOCKS, CacheState
from expertflow.memory.devices import fetched


class CacheView(NamedTuple):
    """The expert cache between two steps.

    Attributes:
        counters: what it did so far.
        slot_of: int32 `[L, E]`, the slot that each expert is in or comes into; -1 if none.
        uses: int64 `[L, E]`, steps and passes so far that used each expert. Captured steps do not count them where all
            experts stay resident.
    """

    counters: CacheCounters
    slot_of: npt.NDArray[np.int32]
    uses: npt.NDArray[np.int64]

    @property
    def resident(self) -> npt.NDArray[np.bool_]:
        """Bool `[L, E]`, whether each expert is on the device, or on its way there."""
        return self.slot_of >= 0


_T = TypeVar("_T")


@dataclass(frozen=True)
class Coming(Generic[_T]):
    """Something that copies under way bring.

    Attributes:
        ready: whether `result` need not wait any more.
        result: waits for the copies, and makes it of them.
    """

    ready: Callable[[], bool]
    result: Callable[[], _T]


class StateCopy:
    """A copy of the device's tables under way to host memory; it shows whole steps, those queued before.

    Args:
        state: on the device. Made in the thread whose stream runs the steps, between two of them.
    """

    @torch.inference_mode()
    def __init__(self, state: CacheState) -> None:
        """Queue the copies."""
        self._lines = state.ledger.lines
        table = state.ledger.table
        wanted = {"slot_of": state.slot_of, "uses": state.count, "tally": state.tally, "done": table[DONE]}
        if self._lines is not None:
            wanted |= {"src": table[SRC], "lines": self._lines}
        self._host = {name: fetched(tensor) for name, tensor in wanted.items()}
        self._event: torch.cuda.Event | None = None
        if state.slot_of.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(state.slot_of.device))

    def _read(self, name: str) -> npt.NDArray[np.generic]:
        if self._event is not None:
            self._event.synchronize()
        found: npt.NDArray[np.generic] = self._host[name].numpy()
        return found

    def ready(self) -> bool:
        """Whether the copies are over."""
        return self._event is None or self._event.query()

    @property
    def slot_of(self) -> npt.NDArray[np.int32]:
        """As of `CacheView`. Waits for the copies, as the others do."""
        return self._read("slot_of").astype(np.int32)

    @property
    def uses(self) -> npt.NDArray[np.int64]:
        """As of `CacheView`."""
        return self._read("uses").astype(np.int64)

    @property
    def tally(self) -> list[int]:
        """As `CacheState.read_tally`."""
        totals: list[int] = self._read("tally").tolist()
        done = self._read("done").astype(np.int64)
        if self._lines is not None:
            done = done * self._read("lines")[self._read("src")].astype(np.int64)
        totals[BLOCKS] += int(done.sum())
        return totals
