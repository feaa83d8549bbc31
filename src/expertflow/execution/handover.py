"""Who decides the next pass, host or GPU, and how the cache's tables change sides.

Passes over prompts are always decided by the host: `CacheController` decides layer by layer. Decode steps are decided by
the GPU if the plan says so and no observer needs the routing. Before the first captured step the controller lends its
tables to the GPU (`DeviceTables.borrow`); before the host decides again they come back (`DeviceTables.give_back`).
Totals and residency can be read at any time, from the side that has them.
Must not know layers, kernels and requests.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expertflow.cache.controller import as_event
from expertflow.errors import ClosedError
from expertflow.events import CacheCounters, Event, EventKind
from expertflow.execution.captured.capturable import expert_mlps
from expertflow.execution.captured.experts import DeviceExperts, SharedParts
from expertflow.execution.captured.graph import GraphDecoder
from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.kv_rows import DecodeInput, RowModel
from expertflow.execution.observe import StepObserver, observe_all, step_tokens
from expertflow.execution.provider import CachedExperts
from expertflow.kernels.residency.state import AHEAD, BLIND, BLOCKS, EVICTIONS, FRESH, HITS, LOADS, WASTES
from expertflow.models.context import ForwardContext, Observer

WATCHED = "somebody watches the routing, which only the host execution shows"
"""Why the host decides although the plan says `graph`."""


class DeviceTables:
    """The cache's tables while the GPU decides: lent by the controller before a step, given back behind one.

    Args:
        held: what host and GPU share.
        experts: what decides on the GPU.

    Attributes:
        lent: the GPU has the tables, and not the controller.
        broken: the last step raised half-way, so what the slots hold is unknown.
    """

    def __init__(self, held: SharedParts, experts: DeviceExperts) -> None:
        """The controller has the tables."""
        self._held, self._experts = held, experts
        self._steps = 0
        self._counted: tuple[int, ...] = (0, 0, 0, 0)
        self.lent = self.broken = False

    def begin(self, sequences: Sequence[int]) -> None:
        """A step of these sequences comes: borrow the tables, unless they are here.

        Their tokens, and which sequences step behind them, the predictor has learned before.
        """
        if self.broken:
            self.give_back()  # this may be the broken step once more
        if not self.lent:
            self.borrow()
        experts = self._experts
        if experts.predicting and not experts.fixed:
            self._count_loads()
        experts.begin(sequences, self._held.controller.step + self._steps + 1)

    def stepped(self) -> None:
        """A step was carried out; with a log, emit its events (this waits for the device)."""
        self._steps += 1
        if not self._experts.logs:
            return
        controller, record_bytes = self._held.controller, self._held.store.layout.record_bytes
        number = controller.step + self._steps
        controller.events.emit(Event(EventKind.STEP, number))
        for entry in self._experts.state.take_log():
            controller.events.emit(as_event(entry, number, record_bytes))

    def borrow(self) -> None:
        """Copy the controller's tables to the GPU, once no host copy is under way."""
        self._held.transfer.settle()
        self._held.controller.lend_tables(self._experts.state.copy_from)
        self._counted = tuple(self._experts.state.made.tolist())
        self._steps, self.lent = 0, True  # last: a loan that is broken off has not been
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
            self._held.controller.reclaim_tables(self._experts.state.copy_to, self._steps)
        except BaseException:
            self._abandon()  # the host may have half of it
            raise
        self.lent = False
        self._count_loads()
        tally = self._experts.state.take_tally()
        if not self._experts.logs:
            self._held.counters.add(self._as_counters(tally))
        if tally[BLIND] and self._held.live_predictor is not None:
            self._held.live_predictor.switch_off(self._held.controller.step, "its chances are no numbers")
        self._steps = 0

    def totals(self) -> CacheCounters:
        """What the cache did since the tables were lent and is not in the host's counters. Changes nothing.

        Waits for the steps that are queued.
        """
        if not self.lent or self._experts.logs:
            return CacheCounters()
        self._wait()
        return self._as_counters(self._experts.state.read_tally())

    def slot_of(self) -> npt.NDArray[np.int32]:
        """`[L, E]`, the slot of each expert or -1, on whichever side the tables are; -1 for all after a broken step. A copy."""
        if not self.lent:
            return self._held.controller.table.slot_of.copy()
        self._wait()
        if self.broken:
            return np.full_like(self._held.controller.table.slot_of, -1)
        found: npt.NDArray[np.int32] = self._experts.state.slot_of.cpu().numpy().copy()
        return found

    def _wait(self) -> None:
        """Wait for the steps that are queued, on whichever stream."""
        if self._experts.live.is_cuda:
            torch.cuda.synchronize(self._experts.live.device)

    def _as_counters(self, tally: Sequence[int]) -> CacheCounters:
        record_bytes = self._held.store.layout.record_bytes
        return CacheCounters(
            steps=self._steps,
            hits=tally[HITS],
            loads=tally[LOADS],
            prefetched=tally[AHEAD],
            prefetch_hits=tally[FRESH],
            wasted=tally[WASTES],
            evictions=tally[EVICTIONS],
            bytes_moved=tally[BLOCKS] * record_bytes // self._experts.blocks_of(record_bytes),
        )

    def _count_loads(self) -> None:
        """Give the predictor the number of loads of the steps that are over by now, and what came of those ahead.

        The last step is over if its tokens were waited for.
        """
        counted, before = tuple(self._experts.state.made.tolist()), self._counted
        if counted[1] > before[1] and self._held.live_predictor is not None:
            if any(now < then for now, then in zip(counted, before, strict=True)):  # the tally was taken meanwhile
                before = (0, before[1], 0, 0)
            self._held.live_predictor.pacing.count(*(now - then for now, then in zip(counted, before, strict=True)))
            self._counted = counted

    def _abandon(self) -> None:
        """A step was broken off: no slot can be trusted any more, once nothing is under way.

        What was counted stays, of the broken step too, as in a pass of the host that breaks.
        """
        counted = self.totals()
        self.lent = False
        self._held.counters.add(counted)
        self._wait()
        controller = self._held.controller
        controller.reclaim_tables(lambda tables, usage: None, self._steps)  # noqa: ARG005 - the tables stay as they were
        controller.forget()
        self._experts.state.drop()
        self._steps = 0


class Handover:
    """Decides for every pass of a loaded model whether host or GPU decides it, and hands the tables over in between.

    Args:
        held: what host and GPU share.
        provider: brings experts to the host's passes.
        context: what the model's passes carry.
        batch: sequences of a captured step at most.
        captured: the plan says that decode steps are captured.
        reason: why they are not, if they might have been; else empty.
        measured: measures device memory while captured steps' buffers are made.

    Attributes:
        rows: the model over its KV rows; set before the first decode step.
        decoder: the captured steps, once one was needed.
        provider: as above; None once the model was closed.
        observers: see every pass's tokens and every layer's routing.
    """

    def __init__(  # noqa: PLR0913 - the last ones by keyword
        self,
        held: SharedParts,
        provider: CachedExperts,
        context: ForwardContext,
        *,
        batch: int,
        captured: bool,
        reason: str,
        measured: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """The host decides until a decode step comes."""
        self._controller, self._counters, self._context = held.controller, held.counters, context
        self._batch, self._captured, self._reason, self._measured = batch, captured, reason, measured
        self._held: SharedParts | None = held
        self.provider: CachedExperts | None = provider
        self.rows: RowModel | EncoderDecoderRows | None = None
        self.decoder: GraphDecoder | None = None
        self._tables: DeviceTables | None = None
        self._emitted = ""
        self._lock = RLock()
        """Held while captured steps are queued and while the tables change sides, so that a reader sees whole steps."""
        self.observers: list[StepObserver] = [held.controller] if held.controller.per_token else []
        self._observe: Observer | None = None
        self.watch()

    def begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass that the host decides begins.

        Args:
            args: of the model's forward.
            kwargs: of the model's forward.

        Raises:
            ClosedError: if the model was closed.
        """
        provider = self.check_open()
        self.settle()
        if not self.observers:
            provider.begin_step()
            return
        self._context.now = replace(self._context.now, observe=self._observe)
        tokens = step_tokens(args, kwargs)
        for observer in self.observers:
            observer.begin(tokens)
        provider.begin_step(tokens)

    def end_pass(self) -> None:
        """A pass that the host decided is over, or has failed."""
        if self._context.now.observe is not None:
            self._context.now = replace(self._context.now, observe=None)

    def pass_queued(self) -> None:
        """A pass is queued. A predictor on the device learns from it now; one in host memory when the tokens are out."""
        if self._captured:
            self._controller.end_step()

    @torch.inference_mode()
    def step(self, fed: Sequence[DecodeInput]) -> GraphDecoder | None:
        """Run a decode step if the GPU decides it.

        Args:
            fed: one token a sequence.

        Returns:
            What has the step's logits; None if the host decides this step, and nothing was run.
        """
        with self._lock:
            decoder = self.next_decoder()
            if decoder is None:
                return None
            assert self._tables is not None
            self._tables.begin([one.sequence for one in fed])
            self._tables.broken = True
            decoder.step(fed)
            self._tables.stepped()
            self._tables.broken = False
            return decoder

    def next_decoder(self) -> GraphDecoder | None:
        """What runs the next decode step if the GPU decides it; else None, and one event that says why."""
        reason = self._reason
        if self._captured:
            if all(observer is self._controller for observer in self.observers):
                self._emitted = ""
                return self.make_decoder()
            reason = WATCHED
        if reason and reason != self._emitted:
            self._emitted = reason
            self._controller.events.emit(Event(EventKind.HOST, self._controller.step, reason=reason))
        return None

    def make_decoder(self) -> GraphDecoder:
        """The captured steps' buffers: made when first needed, and anew once single events have a listener."""
        log = self._controller.events.listeners > 1  # the counters alone need only totals
        if self.decoder is None or self.decoder.experts.logs != log:
            rows, held, batch = self.rows, self._held, self._batch
            assert rows is not None
            assert held is not None
            self.settle()
            self.decoder = self._tables = None
            skeleton = rows.skeleton
            with torch.inference_mode(), self._measured():
                mlps = expert_mlps(skeleton, held.store.layout)
                experts = DeviceExperts(mlps, held, batch, skeleton.top_k, log=log)
                self._tables, self.decoder = DeviceTables(held, experts), GraphDecoder(rows, experts, batch)
        return self.decoder

    def settle(self) -> None:
        """Between two steps: the controller gets the tables, and the counters what the GPU counted."""
        with self._lock:
            if self._tables is not None:
                self._tables.give_back()

    def totals(self) -> CacheCounters:
        """What the cache did so far, steps that the GPU decided included. Changes nothing.

        After a step the totals are those of a run that ends there. Any thread may call it; it waits for a captured step
        that is being queued.
        """
        with self._lock:
            found = replace(self._counters)
            if self._tables is not None:
                found.add(self._tables.totals())
        return found

    def residency(self) -> npt.NDArray[np.int32]:
        """`[L, E]`, the slot that each expert is in, or comes into; -1 if none. A copy; changes nothing, as `totals`."""
        with self._lock:
            if self._tables is not None:
                return self._tables.slot_of()
            return self._controller.table.slot_of.copy()

    @property
    def pool_bytes(self) -> int:
        """Device memory that captured steps keep for themselves, bytes."""
        decoder = self.decoder  # another thread may take it away
        return 0 if decoder is None else decoder.pool_bytes

    def watch(self, *observers: StepObserver) -> None:
        """From now on also show `observers` every pass's tokens and every layer's routing."""
        self.observers = [*self.observers, *observers]
        self._observe = observe_all(self.observers) if self.observers else None

    def unwatch(self, observer: StepObserver) -> None:
        """Show an observer nothing more."""
        self.observers.remove(observer)
        self.watch()

    def check_open(self) -> CachedExperts:
        """The provider, unless the model was closed.

        Raises:
            ClosedError: if it was.
        """
        if self.provider is None:
            raise ClosedError("this model was closed", "Load it again.")
        return self.provider

    def close(self) -> bool:
        """Wait for copies under way and let go of store and slots; False if that was done before.

        No pass can run afterwards; totals can be read.
        """
        with self._lock:
            if self._held is None:
                return False
            self.settle()
            self._controller.close()
            self._held.transfer.settle()
            if (device := self._held.pool.buffer.device).type == "cuda":
                torch.cuda.synchronize(device)
            self._held = self.provider = self.decoder = self._tables = self.rows = None
            return True
