"""How the expert cache's tables change sides: lent to the GPU before a captured step, given back before the host decides again.

Totals and residency can be read at any time, from the side that has the tables. Must not know layers, passes and requests.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from expertflow.events import CacheCounters, Event, EventKind
from expertflow.execution.captured.experts import DeviceExperts, SharedParts
from expertflow.execution.captured.view import CacheView, Coming, StateCopy
from expertflow.kernels.ledger import LINE
from expertflow.kernels.residency.state import BLIND, BLOCKS, counters_of


class DeviceTables:
    """The cache's tables while the GPU decides: lent by the controller before a step, given back behind one.

    Args:
        shared: what host and GPU share.
        experts: what decides on the GPU.

    Attributes:
        lent: whether the GPU has the tables.
        broken: whether the last step raised half-way, so that the slots' contents are unknown.
    """

    def __init__(self, shared: SharedParts, experts: DeviceExperts) -> None:
        """Start with the tables at the controller."""
        self._shared, self._experts = shared, experts
        self._steps = 0
        self._counted: tuple[int, ...] = (0, 0, 0, 0)
        self.lent = self.broken = False

    def begin(self, sequences: Sequence[int]) -> None:
        """Prepare a step of these sequences: borrow the tables, unless the GPU has them.

        Before this call the predictor gets their tokens, and the sequences that step after them.
        """
        if self.broken:
            self.give_back()  # the broken step may run again
        if not self.lent:
            self.borrow()
        experts = self._experts
        if experts.predicting and not experts.fixed:
            self._count_loads()
        experts.begin(sequences, self._shared.controller.step + self._steps + 1)

    @property
    def runs_on(self) -> bool:
        """Whether a step may be queued behind one whose tokens are not known yet: the GPU has the tables, and no event is wanted."""
        return self.lent and not self.broken and not self._experts.logs

    def stepped(self) -> None:
        """Count a finished step; with a log, emit its events, which waits for the device."""
        self._steps += 1
        if not self._experts.logs:
            return
        controller, layer_bytes = self._shared.controller, self._shared.store.layout.layer_bytes
        number = controller.step + self._steps
        controller.events.emit(Event(EventKind.STEP, number))
        controller.events.emit_log(self._experts.state.take_log(), number, layer_bytes)

    def borrow(self) -> None:
        """Copy the controller's tables to the GPU, once no host copy is under way."""
        self._shared.transfer.settle()
        self._shared.controller.lend_tables(self._experts.state.copy_from)
        self._counted = tuple(self._experts.state.made.tolist())
        self._steps, self.lent = 0, True  # last, so that an error before it leaves them at the controller
        self._experts.look_up_residents()

    def give_back(self) -> None:
        """Copy the tables back to the controller, unless it has them, and add what was counted to the totals.

        After a broken step the slots are emptied instead.
        """
        if self.broken:
            self._abandon()
            self.broken = False
            return
        if not self.lent:
            return
        try:
            self._shared.controller.reclaim_tables(self._experts.state.copy_to, self._steps)
        except BaseException:
            self._abandon()  # the host may have half of the tables
            raise
        self.lent = False
        self._count_loads()
        tally = self._experts.state.take_tally()
        self._shared.counters.add(self._as_counters(tally, self._steps))
        if tally[BLIND] and self._shared.live_predictor is not None:
            self._shared.live_predictor.switch_off(self._shared.controller.step, "its chances are no numbers")
        self._steps = 0

    def totals(self) -> CacheCounters:
        """What the cache did since the tables were lent and is not in the host's counters. Changes nothing.

        Waits for the steps that are queued.
        """
        if not self.lent:
            return CacheCounters()
        self._wait()
        return self._as_counters(self._experts.state.read_tally(), self._steps)

    def view(self, counted: CacheCounters) -> Coming[CacheView]:
        """Begin to copy what the GPU has to host memory; see `Handover.view`.

        Args:
            counted: what the host counted so far.
        """
        copied, steps, broken = StateCopy(self._experts.state), self._steps, self.broken

        def finish() -> CacheView:
            total, slots = replace(counted), copied.slot_of
            total.add(self._as_counters(copied.tally, steps))
            return CacheView(total, np.full_like(slots, -1) if broken else slots, copied.uses)

        return Coming(copied.ready, finish)

    def slot_of(self) -> npt.NDArray[np.int32]:
        """`[L, E]`, the slot of each expert or -1, on whichever side the tables are; -1 for all after a broken step. A copy."""
        if not self.lent:
            return self._shared.controller.table.slot_of.copy()
        self._wait()
        if self.broken:
            return np.full_like(self._shared.controller.table.slot_of, -1)
        found: npt.NDArray[np.int32] = self._experts.state.slot_of.cpu().numpy().copy()
        return found

    def _wait(self) -> None:
        """Wait for the steps that are queued, on whichever stream."""
        if self._experts.live.is_cuda:
            torch.cuda.synchronize(self._experts.live.device)

    def _as_counters(self, tally: Sequence[int], steps: int) -> CacheCounters:
        """What the events of these steps have not counted: all, or with a log what events do not carry."""
        layout = self._shared.store.layout
        a_block = layout.record_bytes if layout.equal else LINE  # what was counted is blocks, or lines of them
        total = counters_of(tally, steps, tally[BLOCKS] * a_block // self._experts.blocks_of(layout.record_bytes))
        return CacheCounters(forecast=total.forecast, foreseen=total.foreseen) if self._experts.logs else total

    def _count_loads(self) -> None:
        """Give the predictor the loads of the steps that are over, and how many loads ahead were needed.

        The last step is over if its tokens were waited for; what one that still runs has not counted yet comes with the next.
        """
        counted, before = tuple(self._experts.state.made.tolist()), self._counted
        if counted[1] > before[1] and self._shared.live_predictor is not None:
            if any(now < then for now, then in zip(counted, before, strict=True)):  # the tally was taken meanwhile
                before = (0, before[1], 0, 0)
            self._shared.live_predictor.pacing.count(*(now - then for now, then in zip(counted, before, strict=True)))
            self._counted = counted

    def _abandon(self) -> None:
        """Empty every slot after a step that was broken off, once no copy is under way.

        What was counted stays, also of the broken step, as in a broken pass of the host.
        """
        counted = self.totals()
        self.lent = False
        self._shared.counters.add(counted)
        self._wait()
        controller = self._shared.controller
        controller.reclaim_tables(lambda tables, usage: None, self._steps)  # noqa: ARG005 - the tables stay as they were
        controller.forget()
        self._experts.state.drop()
        self._steps = 0
