"""Compiled decisions are the plain ones, and compiling waits for nobody."""

import sys

import numpy as np
import pytest

from expertflow.cache import decisions
from expertflow.cache.controller import CacheController
from expertflow.cache.decisions import COMPILED, PLAIN, Deciding, Decisions
from expertflow.cache.strategy import STRATEGIES
from expertflow.events import CacheCounters, Event, EventStream
from expertflow.types import Access, Load

LAYERS, EXPERTS, LARGE = 4, 8, 2
STEPS = 24
NEEDED = np.random.default_rng(7).random((STEPS, LAYERS, EXPERTS)) < 0.4


def decided(strategy: str, slots: int, how: Decisions) -> tuple[list[list[Access | Load]], list[Event], CacheCounters]:
    """Steps and passes over prompts in turns, some given up half-way: all that is decided, and counted."""
    counters, events, found = CacheCounters(), list[Event](), list[list[Access | Load]]()
    stream = EventStream(counters)
    stream.subscribe(events.append)
    controller = CacheController(
        layers=LAYERS, experts=EXPERTS, slots=slots, strategy=STRATEGIES[strategy].double_buffered(), record_bytes=(3, 5, 20, 4),
        events=stream, future=NEEDED if STRATEGIES[strategy].needs_future else None, wide=4, large=(LARGE,), deciding=Deciding(how),
    )  # fmt: skip
    for number, needed in enumerate(NEEDED):
        controller.begin_step(prompts=8 if number % 4 == 1 else 0)
        found.append(list(controller.take_loads()))
        for layer in range(LAYERS):
            found.append(list(controller.access(layer, np.flatnonzero(needed[layer]).tolist())))
            found.append(list(controller.take_loads()))
        if number == STEPS // 2:
            controller.forget()
    controller.close()
    return found, events, counters


@pytest.fixture(scope="module")
def compiled() -> Decisions:
    """The functions, once a process of its own has compiled them."""
    deciding = Deciding()
    thread = deciding.compile()
    assert thread is not None
    assert deciding.compile() is None, "it has begun"
    thread.join()
    assert deciding.now is COMPILED
    return deciding.now


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_decisions_are_the_plain_ones(strategy: str, compiled: Decisions) -> None:
    for slots in (1, 3, 12, 24):
        plain = decided(strategy, slots, PLAIN)
        assert decided(strategy, slots, compiled) == plain
    assert plain[2].hits > 0
    assert all(len(function._dispatcher.signatures) == 1 for function in compiled)  # type: ignore[attr-defined]  # another would be compiled while a pass waits


def test_totals_are_those_of_single_events() -> None:
    _, events, counters = decided("next-use", 12, PLAIN)
    single = CacheCounters()
    for event in events:
        single.count(event)
    assert single == counters
    assert min(counters.loads, counters.prefetched, counters.evictions, counters.late_steps) > 0


def test_where_nothing_was_compiled_decisions_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[list[str]]()

    class Failed:
        def __init__(self, command: list[str], **_: object) -> None:
            given.append(command)

        def wait(self) -> int:
            return 1

        def terminate(self) -> None:
            pass

    monkeypatch.setattr(decisions.subprocess, "Popen", Failed)
    deciding = Deciding()
    deciding._compile()
    assert given == [[sys.executable, "-P", "-m", "expertflow.cache.decisions"]]
    assert deciding.now is PLAIN
