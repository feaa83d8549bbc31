"""Which side decides the next pass, host or GPU; `execution.tables` has how the cache's tables change sides.

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
from torch import Tensor

from expertflow.errors import ClosedError, ConfigError
from expertflow.events import CacheCounters, Event, EventKind
from expertflow.execution.blocks.forms import LayerForm
from expertflow.execution.blocks.layer import LayerBlocks, of_prompts
from expertflow.execution.captured.capturable import stored_mlps
from expertflow.execution.captured.dense import PromptParts
from expertflow.execution.captured.experts import DeviceExperts, SharedParts
from expertflow.execution.captured.graph import GraphDecoder
from expertflow.execution.captured.view import CacheView, Coming
from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.grouped import PromptExperts
from expertflow.execution.kv_rows import DecodeInput, RowModel
from expertflow.execution.observe import StepObserver, observe_all, prompt_tokens, step_tokens
from expertflow.execution.provider import CachedExperts
from expertflow.execution.tables import DeviceTables
from expertflow.kernels.mlp import ExpertMlp
from expertflow.models.context import DenseKernels, ForwardContext, LayerExperts, LayerKernels, Observer

WATCHED = "the routing is observed, which only the host execution shows"
"""Why the host decides although the plan is `graph`."""


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
        self._mlps: tuple[ExpertMlp, ...] | None = None
        self._prompts: PromptExperts | None = None
        self._prompt_dense: PromptParts | None = None
        self._prompt_blocks: LayerBlocks | None = None
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
    def step(self, fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> GraphDecoder | None:
        """Run a decode step if the GPU decides it.

        Args:
            fed: one token a sequence.
            tokens: int64 `[B]` on the device, in place of those tokens; only where `ready` says so.

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
            decoder.step(fed, tokens)
            self._tables.stepped()
            self._tables.broken = False
            return decoder

    def ready(self, fed: Sequence[DecodeInput]) -> bool:
        """Whether the next step, of these sequences, only has to be queued behind the last one, whose sequences they were."""
        with self._lock:
            tables, decoder, shared = self._tables, self.decoder, self._shared
            if tables is None or decoder is None or shared is None or not tables.runs_on:
                return False
            predictor = shared.live_predictor if decoder.experts.predicting and not decoder.experts.fixed else None
            known = predictor is None or predictor.steps_again([one.sequence for one in fed])
            return known and self.next_decoder() is decoder and decoder.ready(fed)

    def prompt_experts(self) -> LayerExperts | None:
        """What computes the experts of passes and steps that the host decides; None: the family's own code, as in host execution."""
        if not self._captured:
            return None
        if self._prompts is None:
            provider, shared = self.check_open(), self._shared
            assert shared is not None
            self._prompts = PromptExperts(self._expert_mlps(), provider, shared.pool, self._context)
        return self._prompts.run

    def _expert_mlps(self) -> tuple[ExpertMlp, ...]:
        """What the experts are for the kernels; records are looked through once."""
        if self._mlps is None:
            assert self.rows is not None
            assert self._shared is not None
            self._mlps = stored_mlps(self.rows.skeleton, self._shared.store)
        return self._mlps

    def prompt_dense(self) -> DenseKernels | None:
        """What computes attention and norms of a pass over prompts; None: the model's own modules do, as in host execution."""
        if not self._captured or not isinstance(self.rows, RowModel):  # an encoder's attention looks both ways
            return None
        if self._prompt_dense is None:
            rows = self.rows
            self._prompt_dense = PromptParts(rows.model, rows.skeleton, rows.windows, self._context)
        return self._prompt_dense

    def prompt_blocks(self) -> LayerKernels | None:
        """What computes decoder layers of a pass over prompts without padding; None: the model's own modules do."""
        if not self._captured or not self._forms or not isinstance(self.rows, RowModel):
            return None
        if self._prompt_blocks is None:
            self._prompt_blocks = LayerBlocks(
                self.rows.model, of_prompts(self._forms), self._context, 0, lambda _: None
            )
        return self._prompt_blocks

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
        log = self._controller.events.watched
        if self.decoder is None or self.decoder.experts.logs != log:
            rows, shared, batch = self.rows, self._shared, self._batch
            assert rows is not None
            assert shared is not None
            self.settle()
            self.decoder = self._tables = None
            skeleton = rows.skeleton
            with torch.inference_mode(), self._measured():
                experts = DeviceExperts(self._expert_mlps(), shared, batch, skeleton.top_k, log=log)
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
            self._shared = self.provider = self.decoder = self._tables = self.rows = None
            self._prompts = self._prompt_dense = self._prompt_blocks = None
            return True
