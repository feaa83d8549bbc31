"""Plan in, loaded model with offloaded experts out. The only place that wires memory, cache and model together."""

import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.cache.controller import CacheController
from expertflow.cache.decisions import ON_GPU
from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import Strategy
from expertflow.config import EngineConfig
from expertflow.engine.plan import Plan
from expertflow.engine.planning.prefix import buffer_bytes
from expertflow.engine.prepare import Prepared, predictor_load, prepare
from expertflow.errors import BudgetError, ClosedError, QuantisedWarning
from expertflow.events import CacheCounters, EventStream
from expertflow.execution.blocks.match import find_layers
from expertflow.execution.captured.experts import SharedParts
from expertflow.execution.captured.view import CacheView, Coming
from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.handover import Handover
from expertflow.execution.kv.blocks import BlockStore
from expertflow.execution.kv.copies import PageCopies
from expertflow.execution.kv.prefix import NothingKept, PrefixCache
from expertflow.execution.kv_rows import RowModel
from expertflow.execution.observe import StepObserver
from expertflow.execution.passes import Passes
from expertflow.execution.provider import CachedExperts
from expertflow.execution.replay import Playback, Replay, RouteTable
from expertflow.execution.runner import CohortExecutor, EncoderDecoderExecutor, Executor, RowExecutor
from expertflow.formats.records import ExpertStore
from expertflow.formats.table import FORMATS, Formats
from expertflow.live.predictor import LivePredictor
from expertflow.memory.arena import HostArena
from expertflow.memory.devices import entered, free_bytes
from expertflow.memory.meter import CpuMeter, CudaMeter, Meter
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import (
    HostStore,
    check_addresses,
    check_host_memory,
    check_locking,
    memory_reported,
)
from expertflow.memory.transfer import PlainTransfer, StreamTransfer, Transfer
from expertflow.models.context import ForwardContext
from expertflow.models.experts import Uncopied
from expertflow.models.weights.load import bind_experts, unbind_experts
from expertflow.models.weights.sources import SharedWeights, WeightsSource
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor
from expertflow.units import format_bytes, parse_bytes

WIDE = 4
"""Tokens for each expert of a layer from which on a pass is taken to need every expert: of equally likely ones it misses 2 %."""
LEAST_WIDE = 64
"""Tokens of such a pass at least: a shorter one has as little to gain as a decode step."""
_TIMED_BYTES, _TIMED_LOADS = 2**28, 64
"""What `link_speed` copies at most."""


def _wide(plan: Plan) -> int | None:
    """Tokens from which on a pass over prompts is taken to need every expert; None in host execution, which does as the simulator does."""
    tokens = max(LEAST_WIDE, -(-WIDE * plan.shape.experts // plan.shape.top_k))
    return tokens if plan.execution == "graph" else None


def on_chosen_device(load: Callable[..., None]) -> Callable[..., None]:
    """Make the chosen device the current one while a model is loaded."""

    @wraps(load)
    def entering(model: Any, prepared: Prepared, *args: Any, **kwargs: Any) -> None:
        with entered(prepared.choices.device):
            load(model, prepared, *args, **kwargs)

    return entering


class OffloadedModel(Uncopied):
    """A transformers model whose experts come through the slot cache, and everything that serves it.

    Attributes:
        plan: what it was built from.
        store: every expert's record in host memory.
        events: everything the cache does.
        counters: what the host counted of it so far; `totals` has what the GPU counted, too.
        controller: decides the cache on the host.
        meter: measures device memory.
        fingerprint: of the checkpoint's weights, sampled.
        identity: hash of all that its answers depend on.
        live_predictor: the predictor that works, or None.
        handover: decides for every pass whether host or GPU decides it.
        passes: what lets one pass at a time run.
        prefixes: beginnings of prompts that are kept; nothing before the executor is made.
    """

    @on_chosen_device
    @memory_reported()
    @torch.inference_mode(mode=False)  # tensors made inside it could not be written to outside
    def __init__(
        self,
        prepared: Prepared,
        config: EngineConfig,
        forecast: Forecast | None = None,
    ) -> None:
        """Load. See `load_model`."""
        self.plan = plan = prepared.plan
        self.skeleton, self.fingerprint = prepared.skeleton, prepared.fingerprint
        self.device = prepared.choices.device
        self._weights, located = prepared.weights, prepared.located
        planned = replace(plan, host=0) if self._weights.shared else plan
        _check_memory(planned, config, located.mapped, self.device)
        measured = CudaMeter(self.device) if self.device.type == "cuda" else None  # before anything is loaded
        deciding = ON_GPU if self.device.type == "cuda" else None
        if deciding is not None:
            deciding.compile()
        if changed := self.skeleton.changed:
            warnings.warn(changed, QuantisedWarning, stacklevel=2)
        self.stamps = self._weights.stamps(located)
        self._model: PreTrainedModel | None = self._weights.load_dense(located, self.device)
        self._model_now = weakref.ref(self._model)

        def allocate() -> HostStore:
            return HostStore(plan.shape.records, plan.shape.total_experts, pin=self.device.type == "cuda")

        self.store: ExpertStore
        self.store, self.identity = self._weights.experts(located, allocate, self.device, show=config.progress)
        pool = SlotPool(plan.slot_layout, plan.slots, self.device, plan.shape.experts)
        pool.fill_large(self.store)
        resident: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), *pool.memory]
        self.meter: Meter = measured or CpuMeter(resident, exclude=self.store.memory)
        self.counters = CacheCounters()
        self.events = EventStream(self.counters)
        self.live_predictor = self._make_predictor(prepared, config)
        self.controller = CacheController(
            layers=plan.shape.layers,
            experts=plan.shape.experts,
            slots=plan.slots,
            strategy=_on(self.device, prepared.choices.strategy),
            record_bytes=plan.shape.records.layer_bytes,
            events=self.events,
            forecast=forecast or self.live_predictor,
            reached=prepared.skeleton.reached,
            wide=_wide(plan),
            large=plan.slot_layout.large,
            deciding=deciding,
        )
        self.prefixes = NothingKept()
        self._generated = config.prefix_generated
        self._wire(pool, forecast)

    def _make_predictor(self, prepared: Prepared, config: EngineConfig) -> LivePredictor | None:
        if prepared.predictor is None:
            return None
        own = self.device if self.plan.execution == "graph" else torch.device("cpu")  # a graph cannot wait for the host
        rows, _, room = predictor_load(config)
        online = OnlinePredictor(prepared.predictor, rows, own, step_kernels(own))
        return LivePredictor(online, self.events, aside=self.meter.aside, room=room)

    def _wire(self, pool: SlotPool, forecast: Forecast | None) -> None:
        """Connect model, cache and slots."""
        plan, model, skeleton = self.plan, self.model, self.skeleton
        transfer: Transfer = (StreamTransfer if self.device.type == "cuda" else PlainTransfer)(self.store, pool)
        provider = CachedExperts(self.controller, transfer, pool)
        shared = SharedParts(
            controller=self.controller, store=self.store, pool=pool, transfer=transfer, counters=self.counters,
            live_predictor=self.live_predictor, forecast=forecast,
        )  # fmt: skip
        self._context = ForwardContext()
        bind_experts(model, skeleton, provider, self._context)
        captured = plan.execution == "graph"
        self.handover = Handover(
            shared, provider, self._context, batch=plan.max_batch, captured=captured, reason=plan.graph_unavailable_reason,
            forms=find_layers(skeleton) if captured else {}, one_size=plan.batch_invariant, measured=self.meter.watch,
        )  # fmt: skip
        self.passes = Passes(self.handover.begin_pass, self.handover.end_pass)
        self.passes.device = self.device
        self.passes.guard(model)
        if skeleton.encoder_decoder:  # it is called on its own, too
            self.passes.guard(model.get_encoder(), begins=True)

    @property
    def model(self) -> PreTrainedModel:
        """The ordinary transformers model.

        Raises:
            ClosedError: if it was deleted.
        """
        model = self._model_now()
        if model is None:
            raise ClosedError("this model was deleted", "Load it again.")
        return model

    def let_go_of_model(self) -> None:
        """Let the model live as long as its user holds it, and with it all of this: it refers to this object itself."""
        self._model = None

    @property
    def shared_weights(self) -> SharedWeights:
        """A source for further models of the same checkpoint: they use this one's experts in host memory."""
        return SharedWeights(
            source=self._weights, skeleton=self.skeleton, known=self.stamps, known_identity=self.identity, store=self.store,
            device=self.device,
        )  # fmt: skip

    def on_device(self) -> AbstractContextManager[Any]:
        """Make the model's device the current one inside, because every thread has one of its own."""
        return entered(self.device)

    def check_open(self) -> None:
        """Refuse to run a closed model.

        Raises:
            ClosedError: then.
        """
        self.handover.check_open()

    def settle(self) -> None:
        """Give the host what the GPU decided and counted; called between two steps."""
        self.handover.settle()

    def totals(self) -> CacheCounters:
        """What the cache did so far, whichever side decided; see `Handover.totals`. Changes nothing."""
        return self.handover.totals()

    def residency(self) -> npt.NDArray[np.int32]:
        """`[L, E]`, the slot each expert is in or comes into, or -1; a copy. Changes nothing."""
        return self.handover.residency()

    def view(self) -> Coming[CacheView]:
        """Totals, residency and uses between two steps; see `Handover.view`. Changes nothing."""
        with self.on_device():
            return self.handover.view()

    @torch.inference_mode()
    def link_speed(self) -> float:
        """Bytes a second that loads reach with nothing beside them, measured now with about 256 MiB; 0 once an expert is in a slot."""
        if self.controller.table.resident:
            return 0.0
        layout, experts = self.store.layout, self.plan.shape.experts
        small = [layer for layer in range(len(layout.layers)) if layer not in self.plan.slot_layout.large]
        count = max(1, min(_TIMED_LOADS, _TIMED_BYTES // self.plan.record_bytes))
        records = [small[place // experts % len(small)] * experts + place % experts for place in range(count)]
        with self.on_device():
            seconds = min(self.handover.check_open().time_loads(records) for _ in range(2))
        return sum(layout.layer_bytes[record // experts] for record in records) / max(seconds, 1e-9)

    def executor(self) -> Executor:
        """What runs the model's passes and steps. Use one at a time, because it owns the KV rows."""
        _give_logits_alone(self.model)
        plan = self.plan
        if not plan.shape.in_rows:
            return CohortExecutor(self.model, plan.prefill_chunk, self._context)
        if self.handover.rows is None:
            with self.meter.watch():
                self.handover.rows = self._rows()
        rows = self.handover.rows
        if isinstance(rows, EncoderDecoderRows):
            return EncoderDecoderExecutor(rows, self.handover)
        return RowExecutor(rows, self.handover)

    def _rows(self) -> RowModel | EncoderDecoderRows:
        plan, given = self.plan, (self.model, self.skeleton)
        if plan.kv_layout is None:
            return EncoderDecoderRows(*given, plan.max_live, plan.max_length, self._context)
        rows = RowModel(*given, plan.kv_layout, plan.shape.windows, self._context)
        if plan.prefix:
            with self.on_device():
                self.prefixes = self._keep_prefixes(rows)
        return rows

    def _keep_prefixes(self, rows: RowModel) -> PrefixCache:
        """Page-lock the memory for beginnings of prompts."""
        plan, controller, handover = self.plan, self.controller, self.handover
        arena = HostArena(plan.prefix, pin=self.device.type == "cuda")
        copies = PageCopies(rows.cache.stacks, arena, self.device, buffer_bytes(plan.shape))

        def watched() -> bool:
            return any(observer is not controller for observer in handover.observers)

        return PrefixCache(
            rows.cache, copies, BlockStore(arena), piece=plan.prefix_piece, generated=self._generated,
            predictor=self.live_predictor, aside=self.meter.aside, watched=watched,
        )  # fmt: skip

    def playback(self, replay: Replay) -> Playback:
        """Make every layer use recorded experts, if the replay has some. The executor has to be made before."""
        if not replay.has_routes:
            return Playback(replay, None)
        plan = self.plan
        with self.meter.watch():
            table = RouteTable(plan.shape, self._context, plan.max_live, plan.max_length, self.device)
        for path in self.skeleton.expert_modules:
            self.model.get_submodule(path).expertflow.replay = table.choose
        return Playback(replay, table)

    def measure(self) -> int:
        """The peak of device memory so far, bytes: what was in use at most, and what captured steps keep."""
        return self.meter.peak_bytes + self.handover.pool_bytes

    @property
    def observers(self) -> list[StepObserver]:
        """Observers of every pass's tokens and every layer's routing."""
        return self.handover.observers

    def watch(self, *observers: StepObserver) -> None:
        """Show `observers` every later pass's tokens and every layer's routing."""
        self.handover.watch(*observers)

    def unwatch(self, observer: StepObserver) -> None:
        """Stop showing passes to an observer."""
        self.handover.unwatch(observer)

    def close(self) -> None:
        """Wait for passes and copies under way, then free store and slots.

        The model cannot run afterwards; closing twice is fine.
        """
        with self.passes.lock:
            self._close()

    def _close(self) -> None:
        rows = self.handover.rows
        if not self.handover.close():
            return
        if (model := self._model_now()) is not None:
            unbind_experts(model, self.skeleton)
        self.prefixes.close()
        if rows is not None:
            rows.drop()
        if not self._weights.shared:
            self.store.close()


def _give_logits_alone(model: PreTrainedModel) -> None:
    """Turn off outputs that no step needs; a router's loss cannot be made from masks of a batch."""
    for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                setattr(config, name, False)


def _on(device: torch.device, strategy: Strategy) -> Strategy:
    """The strategy as the host execution runs it on a device: copies beside computation alternate between two slots."""
    return strategy.double_buffered() if device.type == "cuda" else strategy


def load_model(
    model: str | Path,
    config: EngineConfig,
    forecast: Forecast | None = None,
    *,
    weights: WeightsSource | None = None,
    formats: Formats = FORMATS,
    own_cache: bool = False,
) -> OffloadedModel:
    """Plan, check, load and wire.

    Args:
        model: checkpoint folder, GGUF file, or a Hugging Face id.
        config: the options.
        forecast: replaces the strategy's own source of expectations; how a recorded future gets in.
        weights: where the weights come from; None: the folder's files.
        formats: how weights may be stored.
        own_cache: whether the caller brings the cache of keys and values.

    Raises:
        ExpertFlowError: before anything is loaded, if the model, the budget, the device or the host cannot do it.
    """
    prepared = prepare(model, config, forecast, weights=weights, formats=formats, own_cache=own_cache)
    return OffloadedModel(prepared, config, forecast)


def _check_memory(plan: Plan, config: EngineConfig, mapped: int, device: torch.device) -> None:
    """Refuse, before loading, a plan too large for the host or the device.

    Args:
        plan: what will be allocated.
        config: for the stated limit on host memory.
        mapped: bytes of files that are mapped while weights are loaded.
        device: where it will run.

    Raises:
        HostMemoryError: if the host lacks memory.
        BudgetError: if the device has less free memory than the plan takes.
    """
    host = plan.host + plan.prefix
    if config.host_memory is not None:
        check_host_memory(host, parse_bytes(config.host_memory, "host_memory"))
    elif plan.device == "cpu":
        check_host_memory(host + plan.total, None)
    else:
        check_host_memory(host, None)
    check_addresses(host + mapped + (plan.total if plan.device == "cpu" else 0))
    if plan.device == "cuda":
        check_locking(host)
        free = free_bytes(device)
        if plan.total > free:
            raise BudgetError(
                f"the plan takes {format_bytes(plan.total)}, the device has {format_bytes(free)} free",
                "State a smaller gpu_memory or fewer slots.",
                plan.least,
            )
