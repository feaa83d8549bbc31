"""Law 2 on the device: the twin of the cache's decisions takes them event for event, and hands over without loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cache.controller import CacheController
from expertflow.cache.core import make_tables
from expertflow.cache.forecast import Forecast, NextGate, NoForecast, Recorded, Step
from expertflow.cache.policy import Outlook, Usage, layer_order
from expertflow.cache.strategy import STRATEGIES, Strategy
from expertflow.events import Event, EventKind, EventStream, as_event
from expertflow.kernels.ledger import DST
from expertflow.kernels.residency import driver, reference
from expertflow.kernels.residency.state import (
    AHEAD,
    EVICTIONS,
    FORECAST,
    FORESEEN,
    FRESH,
    HITS,
    LATE,
    LOADS,
    WASTES,
    CacheState,
    Schedule,
    phase_bound,
    refusal,
)
from expertflow.sim.clock import Cost
from expertflow.sim.replay import replay, replay_events, setting_of
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import Trace
from helpers import make_trace

ON_DEVICE = [name for name, entry in STRATEGIES.items() if refusal(entry, given=entry.predicted) is None]
MAKERS = {"reference": reference.Residency, "kernels": driver.Residency}
Make = Callable[[CacheState], Any]


def _device(maker: str) -> str:
    return "cuda" if maker == "kernels" and torch.cuda.is_available() else "cpu"


def run(
    maker: str,
    strategy: Strategy,
    slots: int,
    workload: Workload,
    tokens_known: Forecast | None = None,
    large: tuple[int, ...] = (),
) -> tuple[list[Event], list]:
    """The twin's events and schedules of a workload; a predictor's demand comes from `tokens_known`, which may give none."""
    routes, experts = routes_of(workload), workload.trace.header.experts
    _, tokens, layers, top_k = routes.shape
    tables = make_tables(layers, experts, slots, divided=strategy.partition == "layer", large=large)
    future = workload.needed if strategy.needs_future else None
    device = torch.device(_device(maker))
    given = tokens_known is not None
    state = CacheState.allocate(strategy, tables, device, log=True, future=future, given=given)
    state.copy_from(tables, Usage(layers=layers, experts=experts))
    schedule = Schedule.allocate(state, tokens, top_k)
    twin = MAKERS[maker](state)
    own = strategy.make_forecast(setting_of(workload)) if tokens_known is None else NoForecast()
    events, schedules, judged = [], [], [0, 0]
    for number in range(len(workload)):
        paused, outlook = False, own.outlook(workload.before(number))
        if tokens_known is not None:
            outlook = tokens_known.outlook(workload.before(number))
            paused = outlook is None
            state.known.fill_(0 if outlook is None else len(outlook.demand))
            if outlook is not None:
                state.demand[: len(outlook.demand)] = torch.from_numpy(outlook.demand)
        for layer, expert in np.argwhere(workload.needed[number]):
            if outlook is not None and layer not in large and outlook.demand[0, layer].any():
                judged[0] += 1
                judged[1] += bool(outlook.demand[0, layer, expert] >= 0.5)
        events.append(Event(EventKind.STEP, number))
        twin.open_step(ahead=not paused)
        for layer in range(layers):
            ids = torch.from_numpy(routes[number, :, layer].astype(np.int64)).contiguous().to(device)
            twin.run_layer(layer, ids, schedule)
            check_schedule(schedule, state, ids, layer * experts)
            schedules.append((schedule.slots.tolist(), schedule.bounds.tolist()))
            if not paused:
                twin.bind(layer)
        twin.close_step()
        if tokens_known is not None:
            tokens_known.learn(workload.after(number))
        events += [as_event(entry, number, 1) for entry in state.take_log()]
    kinds = (EventKind.HIT, EventKind.MISS, EventKind.EVICT, EventKind.PREFETCH, EventKind.WASTED)
    made, tally = state.made.tolist(), state.take_tally()
    assert made == [tally[LOADS] + tally[AHEAD], len(workload), tally[AHEAD], tally[FRESH]]
    assert [tally[place] for place in (HITS, LOADS, EVICTIONS, AHEAD, WASTES)] == [
        sum(event.kind is kind for event in events) for kind in kinds
    ]
    assert tally[LATE] == len({event.step for event in events if event.kind is EventKind.MISS})
    assert [tally[FORECAST], tally[FORESEEN]] == judged
    assert tally[FRESH] == sum(event.value for event in events if event.kind is EventKind.HIT)
    return events, schedules


def check_schedule(schedule: Schedule, state: CacheState, ids: torch.Tensor, first: int) -> None:
    """Every pair has one table; a table reads each slot for one expert only, and what a phase waits for it reads."""
    bounds, live = schedule.bounds.tolist(), int(schedule.live)
    counted = (schedule.slots >= 0).sum(0)
    valid = (ids >= 0) & (ids < state.experts)
    valid[live:] = False
    assert torch.equal(counted, valid.long())
    reads = [
        {(int(e), int(s)) for e, s in zip(ids.flatten(), slots.flatten(), strict=True) if s >= 0}
        for slots in schedule.slots
    ]
    assert all(len(table) == len({slot for _, slot in table}) for table in reads)
    for phase, table in enumerate(reads[1:]):
        entries = schedule.todo[bounds[phase] : bounds[phase + 1]].long()
        awaited = state.ledger.table[: DST + 1, entries].T.tolist()
        assert {(src - first, dst) for src, dst in awaited} == table
    if state.strategy.joint:  # what is computed beside the first fetch is not overwritten by it
        assert not {slot for _, slot in reads[0]} & {slot for _, slot in reads[1]}


def forecast_of(strategy: Strategy, workload: Workload) -> Forecast | None:
    """What stands in for a trained predictor: counts by token."""
    return strategy.make_forecast(setting_of(workload)) if strategy.predicted else None


class _Pauses(NoForecast):
    """A forecast that gives nothing in every second pair of steps."""

    def __init__(self, inner: Forecast) -> None:
        self.inner, self.per_token = inner, inner.per_token

    def outlook(self, step: Step) -> Outlook | None:
        return None if step.number % 4 in {2, 3} else self.inner.outlook(step)

    def learn(self, step: Step) -> None:
        self.inner.learn(step)


def expected(
    workload: Workload, strategy: Strategy, slots: int, forecast: Forecast | None = None, large: tuple[int, ...] = ()
) -> list[Event]:
    """Events of the compiled replay, without the end of the run."""
    found = replay_events(workload, strategy, slots, forecast=forecast, large=large)
    while found[-1].kind is EventKind.WASTED:
        del found[-1]
    return found


def routes_of(workload: Workload) -> np.ndarray:
    """`[N, T, L, K]`, E for tokens that are not there."""
    rows = workload.trace.rows.experts[workload.members].astype(np.int64)
    return np.where(workload.members[:, :, None, None] >= 0, rows, workload.trace.header.experts)


def steps_of(workload: Workload, steps: int) -> Workload:
    return Workload(trace=workload.trace, members=workload.members[:steps], batch=workload.batch)


def variants(name: str) -> list[Strategy]:
    """The strategy as the host runs it, as the device runs it, and with waves so small that layers need several."""
    strategy = STRATEGIES[name]
    return [strategy, strategy.on_device(), replace(strategy, wave=2, joint=True)]


def random_workload(seed: int, steps: int = 6) -> Workload:
    """Three sequences on 3 layers of 7 experts; in one step only two of them live."""
    members = np.arange(3 * steps).reshape(steps, 3)
    members[steps // 2, 2] = -1
    return Workload(trace=make_trace(3 * steps, layers=3, experts=7, seed=seed), members=members, batch=3)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_large_layers_are_always_hit(name: str, maker: str) -> None:
    """The twin's events are the replay's; a large layer's are hits alone, in places behind the slots."""
    workload, slots = random_workload(seed=3, steps=3), 5
    for strategy, large in zip(variants(name)[1:], ((0,), (0, 2)), strict=True):
        mine = expected(workload, strategy, slots, forecast_of(strategy, workload), large)
        assert run(maker, strategy, slots, workload, forecast_of(strategy, workload), large)[0] == mine
        theirs = [event for event in mine if event.layer in large]
        assert {event.kind for event in theirs} == {EventKind.LAYER, EventKind.HIT}
        hits = [event for event in theirs if event.kind is EventKind.HIT]
        assert all(event.slot == slots + large.index(event.layer) * 7 + event.expert for event in hits)
        assert len(hits) == int(workload.needed[:, large].sum())
        assert all(event.slot < slots for event in mine if event.layer not in large)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ["pregated", "oracle-step"])
def test_a_forecast_given_step_by_step_decides_as_its_recording(name: str, maker: str) -> None:
    """A gate's guesses with their mistakes, and the truth, with steps without a forecast: as the replay, which reads the forecast itself."""
    strategy, workload = STRATEGIES[name].on_device(), random_workload(3, 9)
    gate = NextGate(workload.needed, recall=0.7) if name == "pregated" else Recorded(workload.needed)
    events, _ = run(maker, strategy, 15, workload, _Pauses(gate))
    assert events == expected(workload, strategy, 15, _Pauses(gate))
    assert any(event.kind is EventKind.PREFETCH for event in events)


INTERPRETED = () if torch.cuda.is_available() else ("next-use", "plec")
"""Where kernels run on a CPU, a minute for all of them: a strategy without loads ahead, and one with them."""


@pytest.mark.parametrize(
    ("name", "maker"),
    [(name, maker) for maker in MAKERS for name in (maker == "kernels" and INTERPRETED) or ON_DEVICE],
)
def test_twin_decides_as_the_replay_on_real_routing(name: str, maker: str, real: Trace) -> None:
    """On the excerpt, with slots for a tenth and a third of the experts, the twin tells the simulator's events."""
    batch, steps, slots = ((1, 2, 20), (2, 1, 40))[ON_DEVICE.index(name) % 2] if maker == "kernels" else (4, 8, 250)
    workload = steps_of(live_sequences(real, batch), steps)
    strategy = STRATEGIES[name].on_device()
    events, _ = run(maker, strategy, slots, workload, forecast_of(strategy, workload))
    assert events == expected(workload, strategy, slots)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_kernels_decide_as_the_replay_on_random_routing(name: str) -> None:
    """Any number of slots, any waves: same events; reference and kernels cut the same phases."""
    place = ON_DEVICE.index(name)
    workload = random_workload(seed=place, steps=3)
    for turn, slots in enumerate(((2, 11), (5, 16))[place % 2]):
        strategy = variants(name)[(place + turn) % 3]
        events, schedules = run("kernels", strategy, slots, workload, forecast_of(strategy, workload))
        again, cut = run("reference", strategy, slots, workload, forecast_of(strategy, workload))
        assert events == again == expected(workload, strategy, slots), (slots, strategy.wave)
        assert schedules == cut


@pytest.mark.parametrize(("name", "slots"), [("next-use", 700), ("oracle-step", 700), ("oracle-step", 60)])
def test_kernels_decide_as_the_replay_over_many_experts(name: str, slots: int) -> None:
    """512 experts a layer, 10 a token: more than a warp's threads, with waves of 21 and 16."""
    members = np.arange(6).reshape(2, 3)
    workload = Workload(trace=make_trace(6, layers=3, experts=512, top_k=10), members=members, batch=3)
    strategy = STRATEGIES[name].on_device()
    events, _ = run("kernels", strategy, slots, workload)
    assert events == expected(workload, strategy, slots)


@pytest.mark.parametrize(
    ("name", "slots", "ends"), [("next-use", 36, 1), ("plec", 64, 0), ("lru", 20, 1), ("lru-global", 20, 1)]
)
def test_kernels_decide_as_the_replay_with_many_loads(name: str, slots: int, ends: int) -> None:
    """Ten sequences of four experts among 32: most of a layer's experts are loaded at once, out of the layer itself and others."""
    members = np.arange(30).reshape(3, 10)
    workload = Workload(trace=make_trace(30, layers=4, experts=32, top_k=4, seed=slots), members=members, batch=10)
    strategy = STRATEGIES[name].on_device()
    events, schedules = run("kernels", strategy, slots, workload, forecast_of(strategy, workload))
    again, cut = run("reference", strategy, slots, workload, forecast_of(strategy, workload))
    assert events == again == expected(workload, strategy, slots, forecast_of(strategy, workload))
    assert schedules == cut
    waits = [sum(one < bounds[-1] for one in bounds[1:-1]) for _, bounds in schedules]
    assert max(waits) >= ends
    evicted = [event for event in events if event.kind is EventKind.EVICT]
    assert max(sum(one.step == 2 and one.layer == layer for one in evicted) for layer in range(4)) > 4


def test_many_slots_make_few_phases() -> None:
    """16 sequences of 10 experts a layer in one phase at half and a quarter of 48 x 512 experts; a small pool keeps waves of 16."""
    for name in ("plec", "next-use"):
        strategy = STRATEGIES[name].on_device()
        assert [phase_bound(strategy, 48, slots, 160) for slots in (12_288, 6_144, 384)] == [1, 1, 11]
        assert strategy.rules(48, 6_144).reserve >= strategy.rules(48, 6_144).wave >= 160


@given(seed=st.integers(0, 999), slots=st.integers(1, 21), name=st.sampled_from(ON_DEVICE), variant=st.integers(0, 2))
@settings(max_examples=40)
def test_reference_decides_as_the_replay(seed: int, slots: int, name: str, variant: int) -> None:
    """The reference tells the replay's events, and the bound on phases holds, whatever comes."""
    workload, strategy = random_workload(seed), variants(name)[variant]
    events, schedules = run("reference", strategy, slots, workload, forecast_of(strategy, workload))
    assert events == expected(workload, strategy, slots)
    assert all(len(pairs) == 1 + phase_bound(strategy, 3, slots, 6) for pairs, _ in schedules)


@pytest.mark.parametrize("maker", MAKERS)
def test_nothing_is_planned_without_a_forecast(maker: str) -> None:
    """Without plan and binding a paused twin does what the cache does where nothing is known, and goes on from there."""
    workload, strategy, slots = random_workload(seed=8, steps=6), STRATEGIES["plec"].on_device(), 16
    events, _ = run(maker, strategy, slots, workload, _Pauses(Recorded(workload.needed)))
    assert events == expected(workload, strategy, slots, _Pauses(Recorded(workload.needed)))
    begins = [place for place, event in enumerate(events) if event.kind is EventKind.STEP]
    ahead = [place for place, event in enumerate(events) if event.kind is EventKind.PREFETCH]
    assert any(place > begins[4] for place in ahead)
    assert not any(begins[2] < place < begins[4] for place in ahead)


@pytest.mark.parametrize("maker", MAKERS)
def test_nothing_is_lost_at_a_switch(maker: str) -> None:
    """Two steps on the host, two on the device, two on the host decide like six on the host."""
    workload = random_workload(seed=3)
    strategy = STRATEGIES["next-use" if maker == "kernels" else "lru"].on_device()
    happened: list[Event] = []
    events = EventStream()
    events.subscribe(happened.append)
    controller = CacheController(layers=3, experts=7, slots=8, strategy=strategy, record_bytes=1, events=events)
    state = CacheState.allocate(strategy, controller.tables, torch.device(_device(maker)), log=True)
    schedule, twin = Schedule.allocate(state, 3, 2), MAKERS[maker](state)
    for number, routes in enumerate(routes_of(workload)):
        if number in {2, 3}:
            controller.lend_tables(state.copy_from) if number == 2 else None
            events.emit(Event(EventKind.STEP, number))
            twin.open_step()
            for layer in range(3):
                twin.run_layer(layer, torch.from_numpy(routes[:, layer]).contiguous().to(state.clock.device), schedule)
                twin.bind(layer)
            twin.close_step()
            happened += [as_event(entry, number, 1) for entry in state.take_log()]
            controller.reclaim_tables(state.copy_to, steps=2) if number == 3 else None
        else:
            controller.begin_step()
            for layer in range(3):
                controller.access(layer, np.flatnonzero(workload.needed[number, layer]).tolist())
            controller.table.check_integrity()
    assert happened == expected(workload, strategy, 8)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_layers_that_a_step_leaves_alone(name: str, maker: str) -> None:
    """As a decoder's steps do with the encoder's layers: the twin's events are the host's, also for what was kept of those."""
    workload, layers, experts, slots = random_workload(seed=5, steps=4), 3, 7, 9
    strategy, reached = STRATEGIES[name].on_device(), (False, True, True)
    logs: list[list[Event]] = [[], []]
    knows = workload.needed & np.array(reached)[None, :, None]
    knows[0] = workload.needed[0]
    future = knows if strategy.needs_future else None
    streams = [EventStream() for _ in logs]
    for stream, events in zip(streams, logs, strict=True):
        stream.subscribe(events.append)
    forecast = (
        _OnlyReached(reached, sure=not strategy.predicted)
        if strategy.predicted or strategy.policy is layer_order
        else None
    )
    host, device = (
        CacheController(
            layers=layers, experts=experts, slots=slots, strategy=strategy, record_bytes=1, events=stream, future=future,
            forecast=forecast, reached=reached,
        )
        for stream in streams
    )  # fmt: skip
    on = torch.device(_device(maker))
    state = CacheState.allocate(strategy, device.tables, on, log=True, future=future, reached=reached)
    schedule, twin = Schedule.allocate(state, 3, 2), MAKERS[maker](state)
    for number, routes in enumerate(routes_of(workload)):
        for controller in (host, device) if number == 0 else (host,):
            controller.begin_step()
            for layer in range(layers) if number == 0 else (1, 2):
                controller.access(layer, np.flatnonzero(workload.needed[number, layer]).tolist())
        if number == 0:
            device.lend_tables(state.copy_from)
            continue
        logs[1].append(Event(EventKind.STEP, number))
        if strategy.predicted:
            state.known.fill_(1)
            state.demand[:1] = torch.from_numpy(forecast.outlook(Step(number)).demand)
        twin.open_step()
        for layer in (1, 2):
            twin.run_layer(layer, torch.from_numpy(routes[:, layer]).contiguous().to(on), schedule)
            twin.bind(layer)
        twin.close_step()
        logs[1] += [as_event(entry, number, 1) for entry in state.take_log()]
    device.reclaim_tables(state.copy_to, steps=3)
    assert logs[0] == logs[1]
    assert not device.tables.pinned[0].any()  # what was loaded ahead for that layer may leave


class _OnlyReached(NoForecast):
    """Every expert of some layers, for sure or more or less; in the first pass, of all layers."""

    def __init__(self, reached: tuple[bool, ...], *, sure: bool) -> None:
        self.reached, self.sure = reached, sure

    def outlook(self, step: Step) -> Outlook:
        known = np.ones(3) if step.number == 0 else np.array(self.reached, dtype=np.float64)
        chances = np.ones((1, 3, 7)) if self.sure else np.random.default_rng(step.number).random((1, 3, 7))
        return Outlook(chances * known[:, None])


def test_what_has_no_twin_says_why() -> None:
    """Every other strategy is refused with its name."""
    for name, strategy in STRATEGIES.items():
        assert (name in ON_DEVICE) or name in str(refusal(strategy))


def test_a_bound_that_does_not_hold_is_seen() -> None:
    """If a layer took more phases than its schedule has, an expert would be skipped: the kernels say so."""
    workload, strategy = random_workload(seed=1), replace(STRATEGIES["lru-global"], wave=2, joint=True)
    tables = make_tables(3, 7, 2, divided=False)
    state = CacheState.allocate(strategy, tables, torch.device(_device("kernels")))
    state.copy_from(tables, Usage(layers=3, experts=7))
    schedule = Schedule.allocate(state, 3, 2)
    short = replace(schedule, slots=schedule.slots[:2], bounds=schedule.bounds[:2])
    twin = driver.Residency(state)
    twin.open_step()
    twin.run_layer(0, torch.from_numpy(routes_of(workload)[0, :, 0].copy()).to(state.clock.device), short)
    with pytest.raises(AssertionError, match="more phases"):
        state.take_tally()


@pytest.mark.parametrize("name", ["lru", "next-use"])
def test_few_waves_cost_few_loads(name: str, real: Trace) -> None:
    """At 25 % slots on real routing, turns of two load at most 1 % more than turns of one, the device's waves at most 6 %."""
    strategy = STRATEGIES[name]
    for batch in (1, 4):
        turns, pairs, waves = (
            replay(live_sequences(real, batch), r, 192, Cost()).loads
            for r in (strategy, strategy.double_buffered(), strategy.on_device())
        )
        assert turns <= 1.001 * pairs <= 1.01 * turns
        assert turns <= 1.001 * waves <= 1.06 * turns
