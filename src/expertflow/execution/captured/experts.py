"""The experts of a decode step, decided, fetched and computed on the device, without waiting for the host.

Stands in for provider and transfer while decode steps run as graphs. Before the first layer the predictor forecasts and
the step is planned; loads ahead begin on a lane of their own. In a layer the router's choice goes to the residency
kernel. Resident experts are computed on one lane, missing ones fetched and computed on another; those that need slots of
the same layer follow phase by phase. Then all pairs are added in ascending order of expert. Loads whose slots the layer
freed follow behind it. Must not know attention, requests, and when the tables change sides (`execution.handover`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from expertflow.cache.controller import CacheController
from expertflow.cache.forecast import Forecast, Step
from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.events import CacheCounters
from expertflow.execution.captured.lanes import Lane
from expertflow.formats.records import ExpertStore
from expertflow.kernels.backend import backend
from expertflow.kernels.blocks.given import Places
from expertflow.kernels.mlp import ExpertMlp, Workspace
from expertflow.kernels.residency.state import CacheState, RoutingOutput, Schedule
from expertflow.live.batch import PredictorInputs
from expertflow.live.predictor import LivePredictor
from expertflow.memory.slots import SlotPool
from expertflow.memory.transfer import Transfer


@dataclass(frozen=True, kw_only=True)
class SharedParts:
    """What host and device execution share: the controller, expert store and slots, what copies records, the totals."""

    controller: CacheController
    store: ExpertStore
    pool: SlotPool
    transfer: Transfer
    counters: CacheCounters
    live_predictor: LivePredictor | None = None
    forecast: Forecast | None = None
    """The caller's own, in place of the strategy's or a predictor."""


class DeviceExperts:
    """Computes a model's experts layer by layer inside a step, eagerly or captured.

    Args:
        mlps: what a record of each layer holds.
        shared: what is shared with the host execution.
        batch: sequences at most.
        top_k: experts a token uses a layer.
        log: keep single events, for listeners; else only totals.

    Attributes:
        state: what the device remembers.
        live: int32 `[1]`, sequences that count; those behind are padding.
        updated: sequences whose newest token the coming step gives to the predictor.
        logs: as above.
        paused: the coming step gives the predictor its tokens, but takes no forecast and loads nothing ahead.
        fixed: every expert is resident and stays: nothing is decided, slots are looked up. Known from `look_up_residents` on.
    """

    def __init__(self, mlps: tuple[ExpertMlp, ...], shared: SharedParts, batch: int, top_k: int, *, log: bool) -> None:
        """Allocate everything a step needs but what the model itself allocates."""
        device, layout = shared.pool.buffer.device, shared.store.layout
        self._mlps, self._shared, self._top_k = mlps, shared, top_k
        controller, strategy = shared.controller, shared.controller.strategy.on_device()
        self.state = CacheState.allocate(
            strategy, controller.tables, device, log=log, future=controller.future, reached=controller.reached,
            given=shared.forecast is not None, layer_bytes=() if layout.equal else layout.layer_bytes,
        )  # fmt: skip
        self._kernels = backend(device)
        live_predictor = shared.live_predictor
        self._inputs = (
            None
            if live_predictor is None
            else PredictorInputs(batch, live_predictor.sequences, live_predictor.spare, device)
        )
        routing = None
        if live_predictor is not None and self._inputs is not None:
            routing = RoutingOutput(routes=live_predictor.routes, state_rows=self._inputs.state_rows)
            live_predictor.pacing.resume()  # kernels must run before they are captured, and a paused step runs fewer
        self._twin = self._kernels.residency(self.state, routing)
        self._work = Workspace.allocate(mlps[0], batch, top_k, device)
        self._work.parts.zero_()  # padding reads what was never written: it has to be finite
        self._work_beside = self._work.beside()
        self.live = torch.zeros(1, dtype=torch.int32, device=device)
        self._count = 0
        self._schedules: dict[int, Schedule] = {}
        self._schedule: Schedule | None = None
        self.logs = log
        self.fixed = self.paused = False
        self.updated = 0
        self._places = torch.full((self.state.layers, self.state.experts + 1), -1, dtype=torch.int32, device=device)
        self._find_large()
        self._prefetches = strategy.prefetch != "none"
        self._corrections, self._plans, self._ahead = Lane(device, urgent=True), Lane(device), Lane(device)

    @property
    def _looks_ahead(self) -> bool:
        return self._prefetches and not self.paused

    @property
    def predicting(self) -> bool:
        """Whether there is a predictor that works, paused or not."""
        return self._shared.live_predictor is not None and self._shared.live_predictor.failure is None

    def begin(self, sequences: Sequence[int], number: int) -> None:
        """Prepare step `number` of these sequences; the GPU has the tables.

        Before this call the predictor gets their tokens, and the sequences that step after them.
        """
        if len(sequences) != self._count:
            self._count = len(sequences)
            self.live.fill_(self._count)
        self.updated, self.paused = 0, False
        if self._shared.forecast is not None and not self.fixed:
            self._foretell(self._shared.forecast, number)
        live_predictor, inputs = self._shared.live_predictor, self._inputs
        if inputs is None or live_predictor is None or self.fixed or not self.predicting:
            return
        self.paused = live_predictor.pacing.paused
        batch = live_predictor.next_batch(inputs.room)
        inputs.write(live_predictor.state_rows(sequences), batch)
        self.updated = 0 if batch is None else len(batch.updated)

    def _foretell(self, forecast: Forecast, number: int) -> None:
        """Copy the caller's own forecast of the coming step to the device, as far as a step looks ahead."""
        state, outlook = self.state, forecast.outlook(Step(number))
        known = 0 if outlook is None else min(len(outlook.demand), STEPS_KNOWN)
        if outlook is not None:
            state.demand[:known].copy_(torch.from_numpy(np.ascontiguousarray(outlook.demand[:known])))
        state.known.fill_(known)

    def look_up_residents(self) -> None:
        """Look up, in tables just borrowed, whether every expert is resident and stays: then nothing has to be decided."""
        state = self.state
        competing = (state.layers - len(state.large)) * state.experts
        self.fixed = state.strategy.retain and int(state.resident) == state.slots == competing
        if self.fixed:
            self._places[:, :-1] = state.slot_of
            self._find_large()

    def _find_large(self) -> None:
        """Number the places of large layers, each from the first place in its own pool."""
        for layer in self.state.large:
            self._places[layer, :-1] = torch.arange(self.state.experts, device=self._places.device)

    def blocks_of(self, record_bytes: int) -> int:
        """Blocks that a record is carried in; the tally counts them."""
        return self._kernels.blocks_of(record_bytes)

    def feed(self, tokens: Tensor) -> None:
        """Give the predictor newest tokens that are on the device, in place of those that `begin` gave it."""
        if self.updated and self._inputs is not None:
            self._inputs.updated_tokens[: self.updated].copy_(tokens[: self.updated])

    @property
    def variants(self) -> tuple[bool, ...]:
        """Values of `paused` that a step is captured for."""
        return (False, True) if self.predicting and not self.fixed else (self.paused,)

    def capture_variants(self) -> Iterator[None]:
        """Yield once for the coming step as it is; with a predictor once more with `paused` inverted."""
        yield
        if self.predicting and not self.fixed:
            self.paused = not self.paused
            try:
                yield
            finally:
                self.paused = not self.paused

    def prepare(self, batch: int) -> None:
        """Allocate buffers for steps of `batch` sequences, because none may be allocated while a graph is captured."""
        if batch not in self._schedules:
            self._schedules[batch] = replace(Schedule.allocate(self.state, batch, self._top_k), live=self.live)
            if self.predicting and self._shared.live_predictor is not None:  # kernels run before a capture
                spare = torch.full((batch,), self._shared.live_predictor.spare, device=self.live.device)
                self._shared.live_predictor.update(spare, torch.zeros_like(spare))

    def open_step(self, batch: int) -> None:
        """Begin a step of `batch` sequences, of which `live` count: forecast, plan, begin to load."""
        self._schedule = self._schedules[batch]
        if self.fixed:
            return
        with self._plans.work():  # beside the first layer's attention
            live_predictor, inputs = self._shared.live_predictor, self._inputs
            if live_predictor is not None and inputs is not None:
                updated = inputs.updated_rows[:batch], inputs.updated_tokens[:batch]
                if self.paused:
                    live_predictor.update(*updated)
                if self.predicting and not self.paused and live_predictor.predict(*updated):
                    self._twin.expect(live_predictor.probabilities, inputs.members, inputs.turns)
                else:
                    self.state.known.zero_()
            self._twin.open_step(ahead=not self.paused)
            self._load_ahead(0)

    def places(self, layer: int) -> Places | None:
        """Where a layer's experts lie, if every one of them stays; None: `run_layer` decides."""
        return Places(self._places[layer], self.live) if self.fixed or layer in self.state.large else None

    def run(
        self,
        layer: int,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        added: tuple[Tensor, ...] = (),
        slots: Tensor | None = None,
    ) -> Tensor:
        """Compute a layer.

        Args:
            layer: number of the MoE layer.
            hidden: states `[T, H]`.
            index: experts `[T, K]`.
            weights: of them, `[T, K]`.
            added: at most two of `[T, H]` that are added behind it.
            slots: of the experts `[T, K]`, if they were looked up in `places`.

        Returns:
            `[T, H]`.
        """
        schedule, kernels, mlp = self._schedule, self._kernels, self._mlps[layer]
        assert schedule is not None
        hidden, index = hidden.contiguous(), index.contiguous()
        if not self.fixed:
            self._plans.join()
            self._twin.run_layer(layer, index, schedule)
        if (places := self.places(layer)) is not None:
            if not self.fixed and self._looks_ahead:
                with self._plans.work():
                    self._twin.bind(layer)
            slots = kernels.find_slots(places.slots, index, places.live) if slots is None else slots
            kernels.expert_pairs(mlp, hidden, slots, self._shared.pool.of(layer)[0], self._work)
        else:
            self._by_phases(layer, hidden, schedule)
        out = torch.empty_like(hidden)
        kernels.combine(self._work.parts, index, weights, self.state.experts, out, added)
        if not self.fixed and self._looks_ahead:
            self._plans.join()
            self._load_ahead(layer + 1)
        return out

    def _by_phases(self, layer: int, hidden: Tensor, schedule: Schedule) -> None:
        """Fetch and compute what `run_layer` decided; plan further loads meanwhile."""
        kernels, mlp, pool = self._kernels, self._mlps[layer], self._shared.pool.buffer
        loads = self._shared.store.buffer, pool, self.state.ledger, schedule.todo
        with self._corrections.work():  # where nothing is missing, this is done before the residents are computed
            kernels.fetch_records(*loads, schedule.bounds[:2])
            kernels.expert_pairs(mlp, hidden, schedule.slots[1], pool, self._work_beside)
        if self._looks_ahead:
            with self._plans.work():
                self._twin.bind(layer)
        kernels.expert_pairs(mlp, hidden, schedule.slots[0], pool, self._work)
        self._corrections.join()
        for phase in range(1, schedule.phases):  # their loads may take slots of what is computed above
            kernels.fetch_records(*loads, schedule.bounds[phase : phase + 2])
            kernels.expert_pairs(mlp, hidden, schedule.slots[1 + phase], pool, self._work)

    def _load_ahead(self, place: int) -> None:
        """Begin the loads that were bound at this place: before layer 0, or behind layer `place - 1`."""
        if not self._looks_ahead:
            return
        state = self.state
        with self._ahead.work():
            self._kernels.fetch_records(
                self._shared.store.buffer,
                self._shared.pool.buffer,
                state.ledger,
                state.order,
                state.ahead[place],
                wait=False,
            )

    def close_step(self) -> None:
        """Finish the step."""
        if self.fixed:
            return
        if self._looks_ahead:
            self._ahead.join()
        self._twin.close_step()

    def break_off(self) -> None:
        """Join all lanes after an error in a step, because a capture cannot end with an open one."""
        for lane in (self._corrections, self._plans, self._ahead):
            lane.join()
