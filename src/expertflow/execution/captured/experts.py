"""The experts of a decode step, decided, fetched and computed on the device: no answer of the host is waited for.

Stands in for provider and transfer while decode steps run as graphs. Before the first layer the predictor is asked and
the step is planned; loads ahead begin on a line of their own. A layer: the router's choice goes to the residency kernel;
what is resident is computed while what is missing is fetched; then, phase by phase, the rest; then all pairs are added in
ascending order of expert. Loads whose slots the layer gave free follow behind it.
Knows slots and kernels; refuses to know attention and requests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.cache.controller import CacheController, as_event
from expertflow.cache.forecast import Forecast, Step
from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.events import CacheCounters, Event, EventKind
from expertflow.execution.captured.lanes import Lane
from expertflow.kernels.backend import backend
from expertflow.kernels.reference import ExpertMlp, Workspace
from expertflow.kernels.residency.state import (
    AHEAD,
    BLIND,
    BLOCKS,
    EVICTIONS,
    FRESH,
    HITS,
    LOADS,
    WASTES,
    CacheState,
    Notes,
    Schedule,
)
from expertflow.live.batch import PredictorInputs
from expertflow.live.predictor import LivePredictor
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore
from expertflow.memory.transfer import Transfer
from expertflow.models.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class SharedParts:
    """What the device execution takes turns over with the host: the controller, where the rows are, who moves them."""

    controller: CacheController
    store: HostStore
    pool: SlotPool
    transfer: Transfer
    counters: CacheCounters
    live_predictor: LivePredictor | None = None
    forecast: Forecast | None = None
    """The caller's own, in place of the strategy's or a predictor."""


class DeviceExperts:
    """Computes a model's experts layer by layer inside a step, eagerly or captured.

    Args:
        mlp: what a row holds.
        held: what is shared with the host execution.
        rows: sequences at most.
        top_k: experts a token uses a layer.
        log: keep single events, for whoever listens; else only totals.

    Attributes:
        state: what the device remembers.
        live: int32 `[1]`, rows that count; those behind are padding.
        asked: rows of the coming step in which the predictor is told of a token.
        steps: steps since `begin`.
        logs: as above.
        holds: whether what is known about the slots is here, and not with the host's controller.
        resting: the coming step tells the predictor of its tokens, but asks nothing and loads nothing ahead.
        fixed: every expert is resident and stays: nothing is decided, slots are looked up. Known from `begin` on.
    """

    def __init__(self, mlp: ExpertMlp, held: SharedParts, rows: int, top_k: int, *, log: bool) -> None:
        """Allocate everything a step needs but what the model itself allocates."""
        device = held.pool.buffer.device
        self._mlp, self._held, self._top_k = mlp, held, top_k
        controller, strategy = held.controller, held.controller.strategy.on_device()
        self.state = CacheState.allocate(
            strategy, controller.tables, device, log=log, future=controller.future, reached=controller.reached,
            given=held.forecast is not None,
        )  # fmt: skip
        self._kernels = backend(device)
        live_predictor = held.live_predictor
        self._slip = (
            None
            if live_predictor is None
            else PredictorInputs(rows, live_predictor.sequences, live_predictor.spare, device)
        )
        notes = None
        if live_predictor is not None and self._slip is not None:
            notes = Notes(routes=live_predictor.routes, seats=self._slip.seats)
            live_predictor.wake()  # awake at first: a mood is captured whose kernels have run, and rest has fewer of them
        self._twin = self._kernels.residency(self.state, notes)
        self._work = Workspace.allocate(mlp, rows, top_k, device)
        self._work.parts.zero_()  # rows of padding read what was never written: it has to be finite
        self.live = torch.zeros(1, dtype=torch.int32, device=device)
        self._count = 0
        self._schedules: dict[int, Schedule] = {}
        self._schedule: Schedule | None = None
        self.steps = 0
        self.logs = log
        self.fixed = self.holds = self.resting = False
        self.asked = 0
        self._counted: tuple[int, ...] = (0, 0, 0, 0)
        self._places = torch.full((self.state.layers, self.state.experts + 1), -1, dtype=torch.int32, device=device)
        self._padding = torch.zeros(0)
        self._prefetches = strategy.prefetch != "none"
        self._corrections, self._plans, self._ahead = Lane(device), Lane(device), Lane(device)

    @property
    def _looks_ahead(self) -> bool:
        return self._prefetches and not self.resting

    @property
    def predicting(self) -> bool:
        """Whether there is a predictor at work, be it at rest."""
        return self._held.live_predictor is not None and self._held.live_predictor.failure is None

    def begin(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        """A step of these sequences comes, each fed its token: take over from the host, if that has not been done.

        Who steps behind them the live_predictor was told.
        """
        if not self.holds:
            self._take_over()
        if len(tokens) != self._count:
            self._count = len(tokens)
            self.live.fill_(self._count)
        self.asked, self.resting = 0, False
        if self._held.forecast is not None and not self.fixed:
            self._foretell(self._held.forecast)
        live_predictor, slip = self._held.live_predictor, self._slip
        if slip is None or live_predictor is None or self.fixed or not self.predicting:
            return
        self._count_loads()
        self.resting = live_predictor.resting
        live_predictor.sampled(sequences, tokens)
        agenda = live_predictor.agenda(slip.room)
        slip.write(live_predictor.seats(sequences), agenda)
        self.asked = 0 if agenda is None else len(agenda.told)

    def _foretell(self, forecast: Forecast) -> None:
        """The coming step is told what the caller's own forecast says of it, as far as a step looks ahead."""
        state, outlook = self.state, forecast.outlook(Step(self._held.controller.step + self.steps + 1))
        known = 0 if outlook is None else min(len(outlook.demand), STEPS_KNOWN)
        if outlook is not None:
            state.demand[:known].copy_(torch.from_numpy(np.ascontiguousarray(outlook.demand[:known])))
        state.known.fill_(known)

    def _count_loads(self) -> None:
        """Tell how many loads the steps took that are over by now, and what came of those ahead.

        The last step is over if its tokens were waited for.
        """
        counted, before = tuple(self.state.made.tolist()), self._counted
        if counted[1] > before[1] and self._held.live_predictor is not None:
            if any(now < then for now, then in zip(counted, before, strict=True)):  # the tally was taken meanwhile
                before = (0, before[1], 0, 0)
            self._held.live_predictor.loaded(*(now - then for now, then in zip(counted, before, strict=True)))
            self._counted = counted

    def _take_over(self) -> None:
        self._held.transfer.settle()
        self._held.controller.lend_tables(self.state.load)
        self._counted = tuple(self.state.made.tolist())
        self.steps, self.holds = 0, True  # last: a take-over that is broken off has not been
        state = self.state
        self.fixed = state.strategy.retain and int(state.resident) == state.slots == state.layers * state.experts
        if self.fixed:
            self._places[:, :-1] = state.slot_of

    def end(self) -> None:
        """Give back to the host, between two steps, if that has not been done; tell what happened."""
        if not self.holds:
            return
        try:
            self._held.controller.reclaim_tables(self.state.store, self.steps)
        except BaseException:
            self.abandon()  # the host may have half of it
            raise
        self.holds = False
        self._count_loads()
        tally = self.state.take_tally()
        if not self.logs:
            self._held.counters.add(
                CacheCounters(
                    steps=self.steps,
                    hits=tally[HITS],
                    loads=tally[LOADS],
                    prefetched=tally[AHEAD],
                    prefetch_hits=tally[FRESH],
                    wasted=tally[WASTES],
                    evictions=tally[EVICTIONS],
                    bytes_moved=tally[BLOCKS]
                    * self._mlp.record_bytes
                    // self._kernels.blocks_of(self._mlp.record_bytes),
                )
            )
        if tally[BLIND] and self._held.live_predictor is not None:
            self._held.live_predictor.switch_off(self._held.controller.step, "its chances are no numbers")
        self.steps = 0

    def abandon(self) -> None:
        """A step was broken off: no slot can be trusted any more, once nothing is under way."""
        self.holds = False
        if self.live.is_cuda:
            torch.cuda.synchronize(self.live.device)
        controller = self._held.controller
        controller.reclaim_tables(lambda tables, usage: None, self.steps)  # noqa: ARG005 - what is known stays as it was
        controller.forget()
        self.state.drop()
        self.steps = 0

    def moods(self) -> Iterator[None]:
        """Once as the coming step is, and once more as it may come to be, if the predictor asks and rests by turns."""
        yield
        if self.predicting and not self.fixed:
            self.resting = not self.resting
            try:
                yield
            finally:
                self.resting = not self.resting

    def prepare(self, rows: int) -> None:
        """Have the buffers for steps of `rows` rows: they must not be allocated while a graph is captured."""
        if rows not in self._schedules:
            self._schedules[rows] = replace(Schedule.allocate(self.state, rows, self._top_k), live=self.live)
            if self.predicting and self._held.live_predictor is not None:  # what has never run is not captured
                nobody = torch.full((rows,), self._held.live_predictor.spare, device=self.live.device)
                self._held.live_predictor.note(nobody, torch.zeros_like(nobody))

    def open_step(self, rows: int) -> None:
        """A step of so many rows begins, of which `live` count: ask the predictor, plan, begin to load."""
        self._schedule = self._schedules[rows]
        if self.fixed:
            self._padding = torch.arange(rows, device=self.live.device)[:, None] >= self.live
            return
        with self._plans.work():  # beside the first layer's attention
            live_predictor, slip = self._held.live_predictor, self._slip
            if live_predictor is not None and slip is not None:
                told = slip.told_seats[:rows], slip.told_tokens[:rows]
                if self.resting:
                    live_predictor.note(*told)
                if self.predicting and not self.resting and live_predictor.ask(*told):
                    self._twin.expect(live_predictor.said, slip.members, slip.turns)
                else:
                    self.state.known.zero_()
            self._twin.open_step(ahead=not self.resting)
            self._load_ahead(0)

    def run(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """A layer: states `[T, H]`, experts `[T, K]`, weights `[T, K]` to `[T, H]`."""
        schedule, kernels, mlp = self._schedule, self._kernels, self._mlp
        assert schedule is not None
        hidden, index, pool = hidden.contiguous(), index.contiguous(), self._held.pool.buffer
        if self.fixed:
            slots = torch.take(self._places[layer], index).masked_fill_(self._padding, -1)
            kernels.expert_pairs(mlp, hidden, slots, pool, self._work)
        else:
            self._plans.join()
            self._twin.run_layer(layer, index, schedule)
            self._by_phases(layer, hidden, schedule)
        out = torch.empty_like(hidden)
        kernels.combine(self._work.parts, index, weights, self.state.experts, out)
        if not self.fixed and self._looks_ahead:
            self._plans.join()
            self._load_ahead(layer + 1)
        return out

    def _by_phases(self, layer: int, hidden: Tensor, schedule: Schedule) -> None:
        """Fetch and compute what `run_layer` decided; plan on beside it."""
        kernels, mlp, pool = self._kernels, self._mlp, self._held.pool.buffer
        loads = self._held.store.buffer, pool, self.state.ledger, schedule.todo
        with self._corrections.work():
            kernels.fetch_records(*loads, schedule.bounds[:2])
        if self._looks_ahead:
            with self._plans.work():
                self._twin.bind(layer)
        kernels.expert_pairs(mlp, hidden, schedule.slots[0], pool, self._work)
        self._corrections.join()
        for phase in range(schedule.phases):
            if phase:
                kernels.fetch_records(*loads, schedule.bounds[phase : phase + 2])
            kernels.expert_pairs(mlp, hidden, schedule.slots[1 + phase], pool, self._work)

    def _load_ahead(self, place: int) -> None:
        """Begin the loads that were bound at this place: before layer 0, or behind layer `place - 1`."""
        if not self._looks_ahead:
            return
        state = self.state
        with self._ahead.work():
            self._kernels.fetch_records(
                self._held.store.buffer,
                self._held.pool.buffer,
                state.ledger,
                state.order,
                state.ahead[place],
                wait=False,
            )

    def close_step(self) -> None:
        """The step is over."""
        if self.fixed:
            return
        if self._looks_ahead:
            self._ahead.join()
        self._twin.close_step()

    def break_off(self) -> None:
        """A step raised: nothing may stay apart from the main line, or what captures it cannot end."""
        for lane in (self._corrections, self._plans, self._ahead):
            lane.join()

    def told(self) -> None:
        """A step was carried out; with a log, tell its events (this waits for the device)."""
        self.steps += 1
        if not self.logs:
            return
        controller = self._held.controller
        number = controller.step + self.steps
        controller.events.emit(Event(EventKind.STEP, number))
        for row in self.state.take_log():
            controller.events.emit(as_event(row, number, self._mlp.record_bytes))

    def attach(self, model: PreTrainedModel, skeleton: Skeleton) -> None:
        """Let the model's layers call `run` in place of the host execution."""
        for path in skeleton.expert_modules:
            model.get_submodule(path).expertflow.whole = self.run

    @staticmethod
    def detach(model: PreTrainedModel, skeleton: Skeleton) -> None:
        """Let them call the host execution again."""
        for path in skeleton.expert_modules:
            model.get_submodule(path).expertflow.whole = None
