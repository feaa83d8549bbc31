"""Which side decides the next pass, host or GPU, and how the cache's tables change sides.

Passes over prompts are always decided by the host: `CacheController` decides layer by layer. Decode steps are decided by the
GPU if the plan is `graph` and no observer needs the routing. If the plan is `graph`, kernels compute the experts of what the
host decides (`execution.grouped`). Before the first captured step the controller lends its tables to the GPU
(`DeviceTables.borrow`); before the host decides again they come back (`DeviceTables.give_back`). Totals and residency can
be read at any time, from the side that has them. Must not know layers, kernels and requests.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import RLock
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expertflow.cache.controller import as_event
from expertflow.errors import ClosedError, ConfigError
from expertflow.events import CacheCounters, Event, EventKind
from expertflow.execution.blocks.forms import LayerForm
from expertflow.execution.captured.capturable import expert_mlps
from expertflow.execution.captured.dense import PromptParts
from expertflow.execution.captured.experts import DeviceExperts, SharedParts
from expertflow.execution.captured.graph import GraphDecoder
from expertflow.execution.captured.view import CacheView, Coming, StateCopy
from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.grouped import PromptExperts
from expertflow.execution.kv_rows import DecodeInput, RowModel
from expertflow.execution.observe import StepObserver, observe_all, prompt_tokens, step_tokens
from expertflow.execution.provider import CachedExperts
from expertflow.kernels.ledger import LINE
from expertflow.kernels.residency.state import BLIND, BLOCKS, counters_of
from expertflow.models.context import DenseKernels, ForwardContext, LayerExperts, Observer

WATCHED = "the routing is observed, which only the host execution shows"
"""Why the host decides although the plan is `graph`."""


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

    def stepped(self) -> None:
        """Count a finished step; with a log, emit its events, which waits for the device."""
        self._steps += 1
        if not self._experts.logs:
            return
        controller, layer_bytes = self._shared.controller, self._shared.store.layout.layer_bytes
        number = controller.step + self._steps
        controller.events.emit(Event(EventKind.STEP, number))
        for entry in self._experts.state.take_log():
            controller.events.emit(as_event(entry, number, layer_bytes))

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

        The last step is over if its tokens were waited for.
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


class Handover:
    """Decides for every pass of a loaded model whether host or GPU decides it, and hands the tables over in between.

    Args:
        shared: what host and GPU share.
        provider: brings experts to the host's passes.
        context: what the model's passes carry.
        batch: sequences of a captured step at most.
        captured: whether decode steps are captured.
        reason: why execution='auto' fell back to the host; else empty.
        forms: of the decoder layers that building blocks run, by module path.
        one_size: whether every captured step is for `batch` sequences.
        measured: measures device memory while captured steps' buffers are made.

    Attributes:
        rows: the model over its KV rows; set before the first decode step.
        decoder: the captured steps, once one was needed.
        provider: as above; None once the model was closed.
        observers: see every pass's tokens and every layer's routing.
    """

    def __init__(  # noqa: PLR0913 - the last ones by keyword
        self,
        shared: SharedParts,
        provider: CachedExperts,
        context: ForwardContext,
        *,
        batch: int,
        captured: bool,
        reason: str,
        forms: Mapping[str, LayerForm] = MappingProxyType({}),
        one_size: bool = False,
        measured: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Let the host decide until the first decode step."""
        self._controller, self._counters, self._context = shared.controller, shared.counters, context
        self._batch, self._captured, self._reason, self._measured = batch, captured, reason, measured
        self._one_size, self._forms = one_size, forms
        self._shared: SharedParts | None = shared
        self.provider: CachedExperts | None = provider
        self.rows: RowModel | EncoderDecoderRows | None = None
        self.decoder: GraphDecoder | None = None
        self._tables: DeviceTables | None = None
        self._prompts: PromptExperts | None = None
        self._prompt_dense: PromptParts | None = None
        self._emitted = ""
        self._lock = RLock()
        """Taken while captured steps are queued and while the tables change sides, so that a reader sees whole steps."""
        self.observers: list[StepObserver] = [shared.controller] if shared.controller.per_token else []
        self._observe: Observer | None = None
        self.watch()

    def begin_pass(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a pass that the host decides.

        Args:
            args: of the model's forward.
            kwargs: of the model's forward.

        Raises:
            ClosedError: if the model was closed.
        """
        provider = self.check_open()
        self.settle()
        prompts = prompt_tokens(args, kwargs)
        if not self.observers:
            provider.begin_step(prompts=prompts)
            return
        self._context.now = replace(self._context.now, observe=self._observe)
        tokens = step_tokens(args, kwargs)
        for observer in self.observers:
            observer.begin(tokens)
        provider.begin_step(tokens, prompts=prompts)

    def end_pass(self) -> None:
        """End a pass that the host decided, also after an error."""
        if self._context.now.observe is not None:
            self._context.now = replace(self._context.now, observe=None)

    def pass_queued(self) -> None:
        """Let a predictor on the device learn from a queued pass now; one in host memory learns with the tokens."""
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

    def prompt_experts(self) -> LayerExperts | None:
        """What computes the experts of passes and steps that the host decides; None: the family's own code, as in host execution."""
        if not self._captured:
            return None
        if self._prompts is None:
            provider, rows, shared = self.check_open(), self.rows, self._shared
            assert rows is not None
            assert shared is not None
            mlps = expert_mlps(rows.skeleton, shared.store.layout)
            self._prompts = PromptExperts(mlps, provider, shared.pool, self._context)
        return self._prompts.run

    def prompt_dense(self) -> DenseKernels | None:
        """What computes attention and norms of a pass over prompts; None: the model's own modules do, as in host execution."""
        if not self._captured or not isinstance(self.rows, RowModel):  # an encoder's attention looks both ways
            return None
        if self._prompt_dense is None:
            rows = self.rows
            self._prompt_dense = PromptParts(rows.model, rows.skeleton, rows.windows, self._context)
        return self._prompt_dense

    def next_decoder(self) -> GraphDecoder | None:
        """What runs the next decode step if the GPU decides it; else None, and one event with the reason."""
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
        """The captured steps: made when first needed, and again once single events have a listener."""
        log = self._controller.events.listeners > 1  # the counters alone need only totals
        if self.decoder is None or self.decoder.experts.logs != log:
            rows, shared, batch = self.rows, self._shared, self._batch
            assert rows is not None
            assert shared is not None
            self.settle()
            self.decoder = self._tables = None
            skeleton = rows.skeleton
            with torch.inference_mode(), self._measured():
                mlps = expert_mlps(skeleton, shared.store.layout)
                experts = DeviceExperts(mlps, shared, batch, skeleton.top_k, log=log)
                self._tables = DeviceTables(shared, experts)
                self.decoder = GraphDecoder(rows, experts, batch, self._forms, one_size=self._one_size)
        return self.decoder

    def settle(self) -> None:
        """Give the controller the tables, and the counters what the GPU counted; called between two steps."""
        with self._lock:
            if self._tables is not None:
                self._tables.give_back()

    def totals(self) -> CacheCounters:
        """What the cache did so far, steps that the GPU decided included. Changes nothing.

        After a step the totals are those of a run that ends there. Any thread may call it; it waits for a captured step
        that is being queued.
        """
        with self._lock:
            found = self._counted()
            if self._tables is not None:
                found.add(self._tables.totals())
        return found

    def residency(self) -> npt.NDArray[np.int32]:
        """`[L, E]`, the slot that each expert is in, or comes into; -1 if none. A copy; changes nothing, as `totals`."""
        with self._lock:
            if self._tables is not None:
                return self._tables.slot_of()
            return self._controller.table.slot_of.copy()

    def view(self) -> Coming[CacheView]:
        """Totals, residency and uses between two steps, without waiting for the device.

        While the GPU has the tables, copies to host memory are queued behind the steps queued so far. Behind the next step
        they are over. Changes nothing.
        """
        with self._lock:
            counted = self._counted()
            if self._tables is not None and self._tables.lent:
                return self._tables.view(counted)
            slots = self._controller.table.slot_of.copy() if self._tables is None else self._tables.slot_of()
            found = CacheView(counted, slots, self._controller.uses)
        return Coming(lambda: True, lambda: found)

    def _counted(self) -> CacheCounters:
        """What the host counted: events, and how good the demand of its steps was."""
        found = replace(self._counters)
        found.add(self._controller.judged)
        return found

    @property
    def pool_bytes(self) -> int:
        """Device memory that captured steps keep for themselves, bytes."""
        decoder = self.decoder  # another thread may take it away
        return 0 if decoder is None else decoder.pool_bytes

    def watch(self, *observers: StepObserver) -> None:
        """Show `observers` every later pass's tokens and every layer's routing.

        Raises:
            ConfigError: if steps have to be captured ones: an observed step is the host's.
        """
        if observers and self._one_size:
            raise ConfigError(f"batch_invariant excludes {WATCHED}", "Load the model without it.")
        self.observers = [*self.observers, *observers]
        self._observe = observe_all(self.observers) if self.observers else None

    def unwatch(self, observer: StepObserver) -> None:
        """Stop showing passes to an observer."""
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
        """Wait for copies under way and release store and slots; False if that was done before.

        No pass can run afterwards; totals can be read.
        """
        with self._lock:
            if self._shared is None:
                return False
            self.settle()
            self._controller.close()
            self._shared.transfer.settle()
            if (device := self._shared.pool.buffer.device).type == "cuda":
                torch.cuda.synchronize(device)
            self._shared = self.provider = self.decoder = self._tables = self._prompts = self._prompt_dense = (
                self.rows
            ) = None
            return True
