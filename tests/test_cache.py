"""Laws 4: what the cache may and may not do, on random routing."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cache.controller import CacheController
from expertflow.cache.forecast import Forecast, Recorded
from expertflow.cache.policy import Outlook, Policy, Usage, discounted_use, next_use
from expertflow.cache.strategy import STRATEGIES
from expertflow.errors import ConfigError
from expertflow.events import CacheCounters, Event, EventKind, EventStream
from expertflow.types import Access, ExpertId, Place

LAYERS, EXPERTS, ROW = 3, 6, 1000
routing = st.lists(
    st.lists(st.sets(st.integers(0, EXPERTS - 1), min_size=1), min_size=LAYERS, max_size=LAYERS),
    min_size=1,
    max_size=12,
)
slot_counts = st.integers(1, LAYERS * EXPERTS)
EventList = list[Event]


def as_needed(steps: list[list[set[int]]]) -> np.ndarray:
    """Routing as `[N, L, E]` bool."""
    needed = np.zeros((len(steps), len(steps[0]), EXPERTS), dtype=np.bool_)
    for step, layers in enumerate(steps):
        for layer, experts in enumerate(layers):
            needed[step, layer, list(experts)] = True
    return needed


def make(
    strategy: str,
    slots: int,
    steps: list[list[set[int]]] | None = None,
    layers: int = LAYERS,
    forecast: Forecast | None = None,
) -> tuple[CacheController, EventList, CacheCounters]:
    events: list[Event] = []
    counters = CacheCounters()
    stream = EventStream(counters)
    stream.subscribe(events.append)
    controller = CacheController(
        layers=layers, experts=EXPERTS, slots=slots, strategy=STRATEGIES[strategy], record_bytes=ROW, events=stream,
        future=None if steps is None else as_needed(steps), forecast=forecast,
    )  # fmt: skip
    return controller, events, counters


def replay(strategy: str, slots: int, steps: list[list[set[int]]]) -> tuple[list[list[Access]], CacheCounters]:
    controller, _, counters = make(strategy, slots, steps, len(steps[0]))
    schedules = []
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            schedules.append(controller.access(layer, sorted(needed)))
            controller.table.check_integrity()
    return schedules, counters


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
@settings(max_examples=30)
def test_every_needed_expert_gets_exactly_one_turn(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Nothing is skipped and nothing computed twice, however few the slots (law 6)."""
    schedules, counters = replay(strategy, slots, steps)
    needed = [sorted(layer) for step in steps for layer in step]
    assert [sorted(access.expert for access in schedule) for schedule in schedules] == needed
    assert counters.accesses == sum(map(len, needed))
    assert counters.bytes_moved == (counters.loads + counters.prefetched) * ROW


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
@settings(max_examples=30)
def test_a_slot_holds_the_right_expert_at_its_turn(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Loads carried out in order put each expert into its slot by its turn, after the slot's earlier turn."""
    controller, _, _ = make(strategy, slots, steps)
    content: dict[int, tuple[int, int]] = {}

    def load_ahead() -> None:
        content.update({load.slot: (load.layer, load.expert) for load in controller.take_loads()})

    for step in steps:
        controller.begin_step()
        load_ahead()
        for layer, needed in enumerate(step):
            schedule = controller.access(layer, sorted(needed))
            for turn, access in enumerate(schedule):
                earlier = [t for t in range(turn) if schedule[t].slot == access.slot]
                assert access.after == (earlier[-1] if earlier else -1)
                if access.load:
                    content[access.slot] = (layer, access.expert)
                assert content[access.slot] == (layer, access.expert)
            load_ahead()


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
@settings(max_examples=30)
def test_events_tell_the_whole_story(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Following loads and evictions alone reproduces the table; a hit is always resident, a load never."""
    controller, events, _ = make(strategy, slots, steps)
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
    resident: dict[int, tuple[int, int]] = {}
    for event in events:
        expert = (event.layer, event.expert)
        match event.kind:
            case EventKind.MISS | EventKind.PREFETCH:
                assert expert not in resident.values()
                assert event.slot not in resident
                resident[event.slot] = expert
            case EventKind.EVICT:
                assert resident.pop(event.slot) == expert
            case EventKind.HIT | EventKind.WASTED:
                assert resident[event.slot] == expert
            case EventKind.STEP | EventKind.LAYER:
                pass
    owner = {slot: controller.table.expert_in(Place(0, slot)) for slot in range(slots)}
    assert {slot: ExpertId(*expert) for slot, expert in resident.items()} == {s: e for s, e in owner.items() if e}


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
@settings(max_examples=30)
def test_every_prefetched_expert_ends_as_used_or_wasted(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """After the run, loads ahead = first uses of them + wasted ones, and bytes moved = loads x record bytes."""
    controller, _, counters = make(strategy, slots, steps)
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
    controller.end_step()
    controller.close()
    assert counters.prefetched == counters.prefetch_hits + counters.wasted
    assert counters.bytes_moved == (counters.loads + counters.prefetched) * ROW


@pytest.mark.parametrize("strategy", [name for name, entry in STRATEGIES.items() if entry.prefetch == "step"])
@given(steps=routing, guessed=routing, slots=slot_counts)
def test_what_the_plan_needs_is_not_evicted(
    strategy: str, slots: int, steps: list[list[set[int]]], guessed: list[list[set[int]]]
) -> None:
    """An expert loaded ahead in a step stays until its layer has run in that step, however wrong the forecast is."""
    controller, events, _ = make(strategy, slots, steps, forecast=Recorded(as_needed(guessed)))
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
    awaited: set[tuple[int, int]] = set()
    for event in events:
        if event.kind is EventKind.STEP:
            awaited.clear()
        elif event.kind is EventKind.PREFETCH:
            awaited.add((event.layer, event.expert))
        elif event.kind is EventKind.LAYER:
            awaited = {expert for expert in awaited if expert[0] > event.layer}
        elif event.kind is EventKind.EVICT:
            assert (event.layer, event.expert) not in awaited


def total_loads(strategy: str, slots: int, steps: list[list[set[int]]]) -> int:
    _, counters = replay(strategy, slots, steps)
    return counters.loads + counters.prefetched


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=routing, slots=slot_counts)
@settings(max_examples=60)
def test_belady_never_loads_more(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """With all later uses known, no strategy of the table moves fewer records, also when layers run in waves."""
    assert total_loads("oracle", slots, steps) <= total_loads(strategy, slots, steps)


@given(steps=routing, slots=st.integers(EXPERTS, LAYERS * EXPERTS))
def test_global_lru_is_lru(steps: list[list[set[int]]], slots: int) -> None:
    """Misses of `lru-global` are those of a plain dictionary of last uses, a layer's experts being used at once."""
    _, counters = replay("lru-global", slots, steps)
    last: dict[tuple[int, int], int] = {}
    misses = 0
    for number, needed in enumerate(layer for step in steps for layer in step):
        keys = [(number % LAYERS, expert) for expert in sorted(needed)]
        missing = [key for key in keys if key not in last]
        last.update({key: number for key in keys if key in last})
        for key in missing:
            misses += 1
            if len(last) == slots:
                del last[min(last, key=lambda k: (last[k], k))]
            last[key] = number
    assert counters.loads == misses


def until_next_use(steps: list[list[set[int]]], step: int, layer: int, expert: ExpertId) -> float:
    """Layer times until an expert is used, from just behind a layer of a step; infinite if never."""
    later = [
        (number * LAYERS + place) - (step * LAYERS + layer)
        for number, needed in enumerate(steps)
        for place, experts in enumerate(needed)
        if place == expert.layer and expert.expert in experts and (number, place) > (step, layer)
    ]
    return min(later, default=math.inf)


@pytest.mark.parametrize("strategy", ["lru", "lru-global", "lfu", "oracle"])
@given(steps=routing, slots=slot_counts)
@settings(max_examples=100)
def test_who_leaves_is_who_the_policy_names(strategy: str, slots: int, steps: list[list[set[int]]]) -> None:
    """Every single victim has the oldest use, the fewest uses or the farthest next use of all that could leave."""
    controller, events, _ = make(strategy, slots, steps)
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
    divided = strategy == "lru" and slots >= LAYERS
    last: Counter[ExpertId] = Counter()
    uses: Counter[ExpertId] = Counter()
    resident: set[ExpertId] = set()
    place, worth = (0, 0), {"lru": last, "lru-global": last, "lfu": uses}.get(strategy)
    for event in events:
        expert = ExpertId(event.layer, event.expert)
        if event.kind is EventKind.LAYER:
            place = event.step, event.layer
            for index in steps[event.step][event.layer]:
                used = ExpertId(event.layer, index)
                last[used], uses[used] = event.step * LAYERS + event.layer + 1, uses[used] + 1
        elif event.kind is EventKind.MISS:
            resident.add(expert)
        elif event.kind is EventKind.EVICT:
            others = [other for other in resident if other.layer == place[1] or not divided]
            if worth is None:
                distances = {other: until_next_use(steps, *place, other) for other in others}
                assert distances[expert] == max(distances.values())
            else:
                assert worth[expert] == min(worth[other] for other in others)
            resident.remove(expert)


@pytest.mark.parametrize("strategy", ["lru-global", "lfu", "oracle"])
@given(steps=routing, slots=slot_counts, more=st.integers(1, 6))
@settings(max_examples=60)
def test_more_slots_never_mean_more_misses(strategy: str, steps: list[list[set[int]]], slots: int, more: int) -> None:
    """Stack policies over single accesses: a larger pool contains the smaller one's experts."""
    single = [[{expert}] for step in steps for layer in step[:1] for expert in sorted(layer)]
    few, many = (total_loads(strategy, min(count, EXPERTS), single) for count in (slots, slots + more))
    assert many <= few


@given(steps=routing, slots=st.integers(LAYERS, LAYERS * EXPERTS))
def test_layer_shares_are_kept(steps: list[list[set[int]]], slots: int) -> None:
    """Per-layer LRU never lets a layer hold more than its equal share of the slots."""
    controller, _, _ = make("lru", slots)
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
            held = (controller.table.slot_of >= 0).sum(axis=1)
            assert held.max() <= -(-slots // LAYERS)


def test_on_demand_keeps_nothing() -> None:
    """Asking for the same experts twice loads them twice."""
    _, counters = replay("on-demand", LAYERS * EXPERTS, [[{0, 1}] * LAYERS] * 2)
    assert (counters.hits, counters.loads) == (0, 2 * 2 * LAYERS)


def test_the_true_path_is_loaded_ahead() -> None:
    """A strategy that knows this step's path misses nothing once the slots hold it, and wastes nothing."""
    steps = [[{0, 1}, {2, 3}, {4, 5}], [{2, 3}, {0, 1}, {0, 5}], [{4}, {4}, {4}]]
    controller, _, counters = make("oracle-step", 12, steps)
    for step in steps:
        controller.begin_step()
        for layer, needed in enumerate(step):
            controller.access(layer, sorted(needed))
    assert (counters.loads, counters.wasted) == (0, 0)
    assert counters.prefetched > 0


def test_resident_experts_go_first() -> None:
    """A layer's hits come before its misses, so they compute while the misses are copied."""
    controller, _, _ = make("lru-global", 4)
    controller.access(0, [4, 5])
    assert [(a.expert, a.load) for a in controller.access(0, [0, 4, 5])] == [(4, False), (5, False), (0, True)]


def test_a_strategy_that_needs_a_recording_is_refused_without() -> None:
    """The oracle cannot run on an unknown future; it does not fall back to something else."""
    with pytest.raises(ConfigError, match="'oracle' has to know the run's routing"):
        make("oracle", 4)


def test_integrity_check_sees_a_broken_table() -> None:
    """The check fails when the arrays disagree."""
    controller, _, _ = make("lru", 6)
    controller.access(0, [1])
    controller.table.check_integrity()
    controller.table.owner[0] = 5
    with pytest.raises(AssertionError):
        controller.table.check_integrity()


visits = st.lists(
    st.tuples(
        st.integers(1, 2),  # how often a step is begun: a model and its encoder both tell of it
        st.dictionaries(st.integers(0, LAYERS - 1), st.sets(st.integers(0, EXPERTS - 1), min_size=1)),
        st.booleans(),  # whether experts are requested one by one, as the universal fallback does
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(steps=visits, slots=slot_counts, seed=st.integers(0, 99))
@settings(max_examples=150)
def test_layers_may_be_passed_over(strategy: str, steps: list, slots: int, seed: int) -> None:
    """Steps that run only some layers, twice begun or expert by expert, still give each needed expert a slot."""
    future = np.random.default_rng(seed).random((2 * len(steps), LAYERS, EXPERTS)) < 0.4
    controller = CacheController(
        layers=LAYERS, experts=EXPERTS, slots=slots, strategy=STRATEGIES[strategy], record_bytes=ROW, events=EventStream(),
        forecast=Recorded(future) if STRATEGIES[strategy].needs_future else None,
    )  # fmt: skip
    for begins, layers, single in steps:
        for _ in range(begins):
            controller.begin_step()
        for layer in sorted(layers):
            needed = sorted(layers[layer])
            for part in [[expert] for expert in needed] if single else [needed]:
                schedule = controller.access(layer, part)
                assert sorted(access.expert for access in schedule) == part
                assert all(0 <= access.slot < slots for access in schedule)
                controller.table.check_integrity()


@pytest.mark.parametrize("policy", [next_use, discounted_use])
def test_an_encoders_experts_wait_for_the_next_prompt(policy: Policy) -> None:
    """What an encoder has just used ranks below what decode steps use now and then, and only a demand says otherwise."""
    usage, far = Usage(layers=2, experts=2, reached=(False, True)), Usage(layers=2, experts=2)
    for number in range(24):  # a prompt, then steps that use the decoder's first expert once in ten
        needed = np.array([[number == 23, False], [number % 10 == 0, False]])
        usage.learn(needed)
        far.learn(needed)
    assert policy(usage, None).before[0, 0] < policy(usage, None).before[1, 0]
    assert policy(far, None).before[0, 0] > policy(far, None).before[1, 0]
    wanted = Outlook(np.array([[[1.0, 0.0], [0.0, 0.0]]]))
    assert policy(usage, wanted).before[0, 0] > policy(usage, wanted).before[1, 0]
