"""Plan in, loaded model with offloaded experts out. The only place that wires memory, cache and model together."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.cache.controller import CacheController
from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import Strategy, find_strategy
from expertflow.config import EngineConfig
from expertflow.engine.plan import Plan
from expertflow.engine.prepare import Prepared, predictor_load, prepare
from expertflow.errors import BudgetError, ClosedError, ConfigError
from expertflow.events import CacheCounters, Event, EventKind, EventStream
from expertflow.execution.captured.capturable import expert_mlp
from expertflow.execution.captured.experts import DeviceExperts, SharedParts
from expertflow.execution.captured.graph import GraphDecoder
from expertflow.execution.encoder_decoder import EncoderDecoderRows
from expertflow.execution.kv_rows import RowModel
from expertflow.execution.observe import StepObserver, step_tokens, tell_all
from expertflow.execution.passes import Passes
from expertflow.execution.provider import CachedExperts
from expertflow.execution.runner import CohortExecutor, EncoderDecoderExecutor, Executor, RowExecutor
from expertflow.live.predictor import LivePredictor
from expertflow.memory.layout import RecordLayout
from expertflow.memory.meter import CpuMeter, CudaMeter, Meter
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore, check_addresses, check_host_memory, check_locking, memory_reported
from expertflow.memory.transfer import PlainTransfer, StreamTransfer, Transfer
from expertflow.models.experts import Uncopied
from expertflow.models.files.identity import ContentHash, spans_of, stamps
from expertflow.models.load import bind_experts, fill_records, load_dense, unbind_experts
from expertflow.models.mapping import ExpertPiece
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor
from expertflow.progress import Progress
from expertflow.units import format_bytes, parse_bytes

_LONG_TO_LOAD = 1 << 30
"""Bytes of experts from which loading shows its progress: less takes a second or two."""


class OffloadedModel(Uncopied):
    """A transformers model whose experts come through the slot cache, and everything that serves it.

    Attributes:
        model: the ordinary transformers model.
        plan: what it was built from.
        events: everything the cache does.
        counters: running totals of it.
        meter: measures device memory.
        fingerprint: of the checkpoint's weights, sampled.
        identity: hash of all that its answers depend on.
        live_predictor: the predictor at work, or None.
        passes: what lets one pass at a time run.
    """

    @memory_reported()
    @torch.inference_mode(mode=False)  # tensors made inside it could not be written to outside
    def __init__(
        self,
        prepared: Prepared,
        config: EngineConfig,
        forecast: Forecast | None = None,
        beside: "OffloadedModel | None" = None,
    ) -> None:
        """Load. See `load_model`."""
        self.plan = plan = prepared.plan
        self.skeleton, self.fingerprint = prepared.skeleton, prepared.fingerprint
        self.device = torch.device(plan.device)
        self._device_index = torch.cuda.current_device() if self.device.type == "cuda" else 0
        self._beside = beside
        _check_memory(plan if beside is None else replace(plan, host=0), config, prepared.mapped)
        if self.device.type == "cuda":
            cuda_meter = CudaMeter(self.device)
        layout = RecordLayout.of(plan.shape.specs)
        folder, dense = prepared.skeleton.folder, prepared.dense
        self.stamps = stamps(prepared.tensors, folder)
        self.model: PreTrainedModel = load_dense(prepared.skeleton, dense, self.device)
        if beside is None:
            content = ContentHash()
            self.store = HostStore(layout, plan.shape.total_experts, pin=self.device.type == "cuda")
            _fill(prepared.pieces, self.store, content, show=config.progress)
            self.store.lock()
            content.read(spans_of(dense))
            self.identity = content.identity(prepared.tensors, folder)
        else:
            self.store, self.identity = _rows_of(beside, prepared, self.stamps), beside.identity
        self._pool = pool = SlotPool(layout, plan.slots, self.device)
        resident: list[Tensor] = [*self.model.parameters(), *self.model.buffers(), pool.buffer]
        self.meter: Meter = (
            cuda_meter if self.device.type == "cuda" else CpuMeter(resident, exclude=[self.store.buffer])
        )
        self.events = EventStream()
        self.counters = CacheCounters()
        self.events.subscribe(self.counters.count)
        self.live_predictor: LivePredictor | None = None
        self._forecast = forecast
        if prepared.predictor is not None:
            own = self.device if plan.execution == "graph" else torch.device("cpu")  # a graph cannot ask the host
            online = OnlinePredictor(prepared.predictor, predictor_load(config)[0], own, step_kernels(own))
            self.live_predictor = LivePredictor(online, self.events, aside=self.meter.aside, room=config.prefill_chunk)
        self.controller = CacheController(
            layers=plan.shape.layers,
            experts=plan.shape.experts,
            slots=plan.slots,
            strategy=_on(self.device, find_strategy(plan.strategy)),
            record_bytes=plan.record_bytes,
            events=self.events,
            forecast=forecast or self.live_predictor,
            reached=prepared.skeleton.reached,
        )
        self.observers: list[StepObserver] = [self.controller] if self.controller.per_token else []
        self._rows: RowModel | EncoderDecoderRows | None = None
        self._decoder: GraphDecoder | None = None
        self._told_why = ""
        self._transfer: Transfer = (StreamTransfer if self.device.type == "cuda" else PlainTransfer)(self.store, pool)
        self._provider: CachedExperts | None = CachedExperts(self.controller, self._transfer, pool)
        bind_experts(self.model, prepared.skeleton, self._provider)
        self.watch()
        self.passes = Passes(self._begin_step)
        self.passes.guard(self.model)
        if self.skeleton.encoder_decoder:  # it is called on its own, too
            self.passes.guard(self.model.get_encoder(), begins=True)

    def _begin_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check_open()
        assert self._provider is not None
        self.settle()
        if not self.observers:
            self._provider.begin_step()
            return
        tokens = step_tokens(args, kwargs)
        for observer in self.observers:
            observer.begin(tokens)
        self._provider.begin_step(tokens)

    def on_device(self) -> AbstractContextManager[Any]:
        """Inside, the model's device is the current one: every thread has one of its own."""
        return nullcontext() if self.device.type != "cuda" else torch.cuda.device(self._device_index)

    def check_open(self) -> None:
        """Refuse to go on with a model that was closed.

        Raises:
            ClosedError: then.
        """
        if self._provider is None:
            raise ClosedError("this model was closed", "Load it again.")

    def settle(self) -> None:
        """Let the host know what graphs decided and counted, between two steps."""
        if self._decoder is not None:
            self._decoder.end()

    def executor(self) -> Executor:
        """What runs the model's passes and steps. One at a time: it owns the rows of keys and values."""
        _give_logits_alone(self.model)
        plan = self.plan
        if not plan.shape.in_rows:
            return CohortExecutor(self.model, plan.prefill_chunk)
        if self._rows is None:
            kind = EncoderDecoderRows if plan.shape.encoder_decoder else RowModel
            self._rows = kind(self.model, self.skeleton, plan.max_live, plan.max_length)
        if isinstance(self._rows, EncoderDecoderRows):
            return EncoderDecoderExecutor(self._rows, self._graphs, self._learn_beside)
        return RowExecutor(self._rows, self._graphs, self._learn_beside)

    def _learn_beside(self) -> None:
        """A pass is queued. A predictor on the device learns from it now; one in host memory when the tokens are out."""
        if self.plan.execution == "graph":
            self.controller.end_step()

    def _graphs(self) -> GraphDecoder | None:
        """The graphs, if the plan says so and nobody has to see the routing; where not, says why, once."""
        reason = self.plan.graph_unavailable_reason
        if self.plan.execution == "graph":
            if all(observer is self.controller for observer in self.observers):
                self._told_why = ""
                return self._decoder_now()
            reason = "somebody watches the routing, which only the host execution shows"
        if reason and reason != self._told_why:
            self._told_why = reason
            self.events.emit(Event(EventKind.HOST, self.controller.step, reason=reason))
        return None

    def _decoder_now(self) -> GraphDecoder:
        """The graphs' buffers, made when first needed, and anew if events are to be told from now on."""
        log = self.events.listeners > 1  # the counters alone are content with totals
        if self._decoder is None or self._decoder.experts.logs != log:
            assert self._rows is not None
            self.settle()
            self._decoder = None
            held = SharedParts(
                controller=self.controller, store=self.store, pool=self._pool, transfer=self._transfer,
                counters=self.counters, live_predictor=self.live_predictor, forecast=self._forecast,
            )  # fmt: skip
            plan, mlp = self.plan, expert_mlp(self.skeleton)
            with torch.inference_mode(), self.meter.watch():
                experts = DeviceExperts(mlp, held, plan.max_batch, plan.shape.top_k, log=log)
                self._decoder = GraphDecoder(self._rows, experts, plan.max_batch)
        return self._decoder

    def measure(self) -> int:
        """The peak of device memory so far, bytes: what was in use at most, and what captured steps keep."""
        return self.meter.peak_bytes + (0 if self._decoder is None else self._decoder.pool_bytes)

    def watch(self, *observers: StepObserver) -> None:
        """From now on also tell `observers` every step's tokens and every layer's routing."""
        self.observers = [*self.observers, *observers]
        told = tell_all(self.observers) if self.observers else None
        for path in self.skeleton.expert_modules:
            self.model.get_submodule(path).expertflow.observe = told

    def unwatch(self, observer: StepObserver) -> None:
        """Stop telling an observer."""
        self.observers.remove(observer)
        self.watch()

    def close(self) -> None:
        """Wait for passes and copies under way, give store and slots back.

        The model cannot run afterwards; closing twice is fine.
        """
        with self.passes.lock:
            self._close()

    def _close(self) -> None:
        if self._provider is None:
            return
        self.controller.close()
        self._transfer.settle()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        unbind_experts(self.model, self.skeleton)
        if self._rows is not None:
            self._rows.drop()
        self._provider = self._decoder = self._rows = None
        del self._transfer, self._pool
        if self._beside is None:
            self.store.close()


def _give_logits_alone(model: PreTrainedModel) -> None:
    """No more than what a step needs, whatever the config says: a router's loss cannot be had from masks of a batch."""
    for config in {id(one): one for one in (model.config, model.config.get_text_config(decoder=True))}.values():
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                setattr(config, name, False)


def _on(device: torch.device, strategy: Strategy) -> Strategy:
    """The row as the host execution runs it on a device: copies beside computation need two slots to take turns in."""
    return strategy.double_buffered() if device.type == "cuda" else strategy


def load_model(
    model: str | Path, config: EngineConfig, forecast: Forecast | None = None, beside: OffloadedModel | None = None
) -> OffloadedModel:
    """Plan, check, load and wire.

    Args:
        model: checkpoint folder, or a Hugging Face id.
        config: the wish.
        forecast: replaces the strategy's own source of expectations; how a recorded future gets in.
        beside: the same checkpoint, loaded before and open as long as this one: its experts in host memory are used too.

    Raises:
        ExpertFlowError: before anything is loaded, if the model, the budget, the device or the host cannot do it.
    """
    return OffloadedModel(prepare(model, config, forecast), config, forecast, beside)


def _rows_of(beside: OffloadedModel, prepared: Prepared, seen: object) -> HostStore:
    """The experts that another loaded model keeps in host memory.

    Args:
        beside: the other model.
        prepared: the one that is loaded now.
        seen: what the system knows of its files; if that is what it knew of the other's, nothing is read.

    Raises:
        ConfigError: if they are of another checkpoint, or of another dtype, than asked for.
    """
    if seen == beside.stamps:
        identity = beside.identity
    else:
        content = ContentHash()
        content.read([*(piece.span for piece in prepared.pieces), *spans_of(prepared.dense)])
        identity = content.identity(prepared.tensors, prepared.skeleton.folder)
    if identity != beside.identity or (beside.plan.record_bytes, beside.plan.device) != (
        prepared.plan.record_bytes,
        prepared.plan.device,
    ):
        raise ConfigError(
            f"{prepared.skeleton.folder} cannot share the experts of {beside.skeleton.folder}: checkpoint, dtype or device differ",
            "Load it by itself.",
        )
    return beside.store


def _check_memory(plan: Plan, config: EngineConfig, mapped: int) -> None:
    """Refuse before loading what the host or the device cannot hold.

    Args:
        plan: what will be allocated.
        config: for the stated limit on host memory.
        mapped: bytes of files that are mapped while weights are loaded.

    Raises:
        HostMemoryError: if the host lacks memory.
        BudgetError: if the device has less free memory than the plan takes.
    """
    if config.host_memory is not None:
        check_host_memory(plan.host, parse_bytes(config.host_memory, "host_memory"))
    elif plan.device == "cpu":
        check_host_memory(plan.host + plan.total, None)
    else:
        check_host_memory(plan.host, None)
    check_addresses(plan.host + mapped + (plan.total if plan.device == "cpu" else 0))
    if plan.device == "cuda":
        check_locking(plan.host)
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if plan.total > free:
            raise BudgetError(
                f"the plan takes {format_bytes(plan.total)}, the device has {format_bytes(free)} free",
                "State a smaller gpu_memory or fewer slots.",
                plan.least,
            )


def _fill(pieces: list[ExpertPiece], store: HostStore, content: ContentHash, *, show: bool) -> None:
    total = sum(piece.nbytes for piece in pieces)
    with Progress("loading experts", total, size=True, show=show and total >= _LONG_TO_LOAD) as bar:
        fill_records(pieces, store, content, bar.advance)
