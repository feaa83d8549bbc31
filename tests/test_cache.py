"""Laws 4: what the cache may and may not do, on random routing."""

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cache.controller import CacheController
from expertflow.cache.strategy import STRATEGIES
from expertflow.cache.table import SlotTable
from expertflow.events import CacheCounters, Event, EventKind, EventStream
from expertflow.types import Access, ExpertId

LAYERS, EXPERTS, ROW = 3, 6, 1000
routing = st.lists(
    st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=LAYERS, max_size=LAYERS),
    min_size=1,
    max_size=12,
)
slot_counts = st.integers(1, LAYERS * EXPERTS)


def make(strategy: str, slots: int) -> tuple[CacheController, list[Event], CacheCounters]:
    events: list[Event] = []
    stream, counters = EventStream(), CacheCounters()
    stream.subscribe(events.append)
    stream.subscribe(counters.count)
    controller = CacheController(
        layers=LAYERS, experts=EXPERTS, slots=slots, strategy=STRATEGIES[strategy], row_bytes=ROW, events=stream
    )
    return controller, events, counters


def replay(strategy: str, slots: int, steps: list[list[set[int]]]) -> tuple[list[list[Access]], CacheCounters]:
    controller, _, counters = make(strategy, slots)
    schedules = []
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            schedules.append(controller.access(layer, sorted(needed)))
            controller.table.check_integrity()
    return schedules, counters


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
def test_every_needed_expert_gets_exactly_one_turn(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Nothing is skipped and nothing computed twice, however few the slots (law 6)."""
    schedules, counters = replay(strategy, slots, steps)
    needed = [sorted(layer) for step in steps for layer in step]
    assert [sorted(access.expert for access in schedule) for schedule in schedules] == needed
    assert counters.accesses == sum(map(len, needed))
    assert counters.bytes_moved == counters.loads * ROW


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
def test_a_slot_holds_the_right_expert_at_its_turn(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Loads carried out in order put each expert into its slot by its turn, after the slot's earlier turn."""
    schedules, _ = replay(strategy, slots, steps)
    content: dict[int, tuple[int, int]] = {}
    for number, schedule in enumerate(schedules):
        layer = number % LAYERS
        for turn, access in enumerate(schedule):
            earlier = [t for t in range(turn) if schedule[t].slot == access.slot]
            assert access.after == (earlier[-1] if earlier else -1)
            if access.load:
                content[access.slot] = (layer, access.expert)
            assert content[access.slot] == (layer, access.expert)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
def test_events_tell_the_whole_story(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Following misses and evictions alone reproduces the table; a hit is always resident, a miss never."""
    controller, events, _ = make(strategy, slots)
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
    resident: dict[int, tuple[int, int]] = {}
    for event in events:
        expert = (event.layer, event.expert)
        match event.kind:
            case EventKind.MISS:
                assert expert not in resident.values()
                assert event.slot not in resident
                resident[event.slot] = expert
            case EventKind.EVICT:
                assert resident.pop(event.slot) == expert
            case EventKind.HIT:
                assert resident[event.slot] == expert
            case EventKind.STEP | EventKind.LAYER:
                pass
    owner = {slot: controller.table.expert_in(slot) for slot in range(slots)}
    assert {slot: ExpertId(*expert) for slot, expert in resident.items()} == {s: e for s, e in owner.items() if e}


@given(steps=routing, slots=slot_counts)
def test_global_lru_is_lru(steps: list[list[set[int]]], slots: int) -> None:
    """Misses of `lru-global` are those of an ordered dictionary that is told the same accesses."""
    schedules, counters = replay("lru-global", slots, steps)
    recent: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for number, schedule in enumerate(schedules):
        for access in schedule:
            key = (number % LAYERS, access.expert)
            if key in recent:
                recent.move_to_end(key)
                continue
            misses += 1
            if len(recent) == slots:
                recent.popitem(last=False)
            recent[key] = None
    assert counters.loads == misses


@given(steps=routing, slots=slot_counts, more=st.integers(1, 6))
@settings(max_examples=200)
def test_more_slots_never_mean_more_misses_of_lru(steps: list[list[set[int]]], slots: int, more: int) -> None:
    """LRU over single accesses is a stack policy: a larger pool contains the smaller one's experts."""
    single = [[{expert}] for step in steps for layer in step[:1] for expert in sorted(layer)]
    few, many = (
        _single_layer_loads("lru-global", count, single) for count in (min(slots, EXPERTS), min(slots + more, EXPERTS))
    )
    assert many <= few


def _single_layer_loads(strategy: str, slots: int, steps: list[list[set[int]]]) -> int:
    stream, counters = EventStream(), CacheCounters()
    stream.subscribe(counters.count)
    controller = CacheController(
        layers=1, experts=EXPERTS, slots=slots, strategy=STRATEGIES[strategy], row_bytes=ROW, events=stream
    )
    for (needed,) in steps:
        controller.access(0, sorted(needed))
    return counters.loads


@given(steps=routing, slots=st.integers(LAYERS, LAYERS * EXPERTS))
def test_layer_shares_are_kept(steps: list[list[set[int]]], slots: int) -> None:
    """Per-layer LRU never lets a layer hold more than its equal share of the slots."""
    controller, _, _ = make("lru", slots)
    for step in steps:
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
            held = (controller.table.slot_of >= 0).sum(axis=1)
            assert held.max() <= -(-slots // LAYERS)


def test_on_demand_keeps_nothing() -> None:
    """Asking for the same experts twice loads them twice."""
    _, counters = replay("on-demand", LAYERS * EXPERTS, [[{0, 1}] * LAYERS] * 2)
    assert (counters.hits, counters.loads) == (0, 2 * 2 * LAYERS)


def test_resident_experts_go_first() -> None:
    """A layer's hits come before its misses, so they compute while the misses are copied."""
    controller, _, _ = make("lru-global", 4)
    controller.access(0, [4, 5])
    assert [(a.expert, a.load) for a in controller.access(0, [0, 4, 5])] == [(4, False), (5, False), (0, True)]


def test_table_refuses_to_lose_an_expert() -> None:
    """Binding over an occupied slot, or an expert twice, is a broken invariant."""
    table = SlotTable(2, 3, 2)
    table.bind(ExpertId(1, 2), 0)
    with pytest.raises(AssertionError, match="occupied"):
        table.bind(ExpertId(0, 0), 0)
    with pytest.raises(AssertionError, match="already has slot"):
        table.bind(ExpertId(1, 2), 1)
    assert table.release(0) == ExpertId(1, 2)
    with pytest.raises(AssertionError, match="already empty"):
        table.release(0)


def test_integrity_check_sees_a_broken_table() -> None:
    """The check fails when the two arrays disagree."""
    table = SlotTable(2, 3, 2)
    table.bind(ExpertId(1, 2), 0)
    table.owner[0] = 0
    with pytest.raises(AssertionError):
        table.check_integrity()
