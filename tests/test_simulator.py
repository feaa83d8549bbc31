"""The simulator: parity with the engine, laws on real routing, the virtual clock, its inputs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow import LLM, SamplingParams
from expertflow.cache.forecast import CountsByToken, Forecast, NoForecast, Recorded, Step, blur, next_uses
from expertflow.cache.policy import Outlook
from expertflow.cache.strategy import STRATEGIES, Setting
from expertflow.cli.strategies import page
from expertflow.errors import ConfigError, TraceError
from expertflow.events import Event
from expertflow.sim.clock import Cost
from expertflow.sim.replay import Outcome, replay, replay_events, setting_of
from expertflow.sim.sweep import Grid, run_grid
from expertflow.sim.workload import Workload, as_recorded, live_sequences
from expertflow.trace.format import Trace, load_trace, save_trace
from helpers import EXCERPT, ROOT, MakeCheckpoint, make_trace

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def outcomes(real: Trace) -> dict[tuple[str, int, int], Outcome]:
    """Every strategy on the excerpt, at 25 % and 50 % slots, 1 and 4 sequences."""
    found = {}
    for batch in (1, 4):
        workload = live_sequences(real, batch)
        for slots in (192, 384):
            for name, strategy in STRATEGIES.items():
                found[name, batch, slots] = replay(workload, strategy, slots, Cost())
    return found


@pytest.mark.parametrize(("model_type", "slots"), [("mixtral", 2), ("gpt_oss", 5), ("mixtral", 12)])
def test_engine_and_simulator_tell_the_same_events(
    model_type: str, slots: int, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Law 2: on the same routing, the running engine and the compiled replay decide alike, for every strategy."""
    folder, prompts = make_checkpoint(model_type), [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with LLM(folder, slots=slots, device="cpu", strategy="on-demand") as llm, llm.record(tmp_path / "t.trace"):
        llm.generate(prompts, params)
    workload = as_recorded(load_trace(tmp_path / "t.trace"))
    for name, strategy in STRATEGIES.items():
        happened: list[Event] = []
        forecast = strategy.make_forecast(setting_of(workload))
        llm = LLM(folder, slots=slots, device="cpu", strategy=name, forecast=forecast)
        llm._offloaded.events.subscribe(happened.append)
        llm.generate(prompts, params)
        llm.close()
        assert happened == replay_events(workload, strategy, slots, llm.plan.record_bytes), name


@pytest.mark.parametrize("name", STRATEGIES)
def test_plain_and_compiled_decisions_agree_on_real_routing(name: str, real: Trace) -> None:
    """The replay's totals are the counts of its event sequence: same source, compiled whole or step by step."""
    workload = _first_steps(live_sequences(real, 2), 25)
    events = replay_events(workload, STRATEGIES[name], 100)
    totals = replay(workload, STRATEGIES[name], 100, Cost())
    count = {kind: sum(event.kind == kind for event in events) for kind in ("hit", "miss", "prefetch", "wasted")}
    assert list(count.values()) == [totals.hits, totals.misses, totals.prefetched, totals.wasted]
    assert totals.hits + totals.misses == totals.needed == int(workload.needed.sum())


def _first_steps(workload: Workload, steps: int) -> Workload:
    return Workload(trace=workload.trace, members=workload.members[:steps], batch=workload.batch)


def test_belady_loads_least_on_real_routing(outcomes: dict[tuple[str, int, int], Outcome]) -> None:
    """No strategy moves fewer records than the oracle, and every prefetched record was used or wasted."""
    for (_, batch, slots), outcome in outcomes.items():
        assert outcomes["oracle", batch, slots].loads <= outcome.loads
        assert outcome.prefetched >= outcome.wasted
        assert outcome.kept == outcome.hits - (outcome.prefetched - outcome.wasted)


def test_the_default_beats_recency_on_real_routing(outcomes: dict[tuple[str, int, int], Outcome]) -> None:
    """The no-future policy keeps more than both LRUs and LFU, at every size and batch of the excerpt."""
    for batch in (1, 4):
        for slots in (192, 384):
            best = max(outcomes[name, batch, slots].kept_ratio for name in ("lru", "lru-global", "lfu"))
            assert outcomes["next-use", batch, slots].kept_ratio > best


def test_global_lru_collapses_when_a_step_exceeds_the_slots(outcomes: dict[tuple[str, int, int], Outcome]) -> None:
    """Layers are visited in a cycle: with 4 sequences on a quarter of the slots, LRU throws out what comes next."""
    assert outcomes["lru-global", 4, 192].kept_ratio < 0.02


def test_more_slots_load_less(outcomes: dict[tuple[str, int, int], Outcome]) -> None:
    """On real routing every strategy but on-demand moves fewer records with twice the slots."""
    for name in STRATEGIES:
        for batch in (1, 4):
            few, many = outcomes[name, batch, 192].loads, outcomes[name, batch, 384].loads
            assert many < few or (name == "on-demand" and many == few)


def test_the_clock_adds_up() -> None:
    """One layer, two experts, on demand: router, load, compute, load overlapped with nothing but the first compute."""
    trace = _trace_of([[[0, 1]]], experts=4)
    cost = Cost(row_bytes=1_000_000, link_gbps=10.0, copy_us=0.0, layer_us=5.0, expert_us=30.0)
    outcome = replay(live_sequences(trace, 1), STRATEGIES["on-demand"], 4, cost)
    assert outcome.seconds * 1e6 == pytest.approx(5 + 100 + 100 + 30)
    assert outcome.link_seconds * 1e6 == pytest.approx(200)
    assert outcome.stall_seconds * 1e6 == pytest.approx(170)
    assert outcome.compute_seconds * 1e6 == pytest.approx(65)


def test_a_layer_in_waves_waits_for_the_slot() -> None:
    """With slots for one token only, a third expert's copy starts after the expert before it in the slot computed."""
    trace = _trace_of([[[0, 1]], [[2, 3]]], experts=4, sequences=[0, 1])
    cost = Cost(row_bytes=1_000_000, link_gbps=10.0, copy_us=0.0, layer_us=0.0, expert_us=30.0)
    outcome = replay(live_sequences(trace, 2), STRATEGIES["on-demand"], 2, cost)
    assert outcome.misses == 4
    assert outcome.seconds * 1e6 > 4 * 100 + 30


@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_two_slots_keep_the_link_busy(slots: int) -> None:
    """With waves of two an expert is computed while the next one is copied: all copies back to back, then the last computation."""
    trace = _trace_of([[[2 * token, 2 * token + 1]] for token in range(4)], experts=8, sequences=[0, 1, 2, 3])
    cost = Cost(row_bytes=1_000_000, link_gbps=10.0, copy_us=0.0, layer_us=0.0, expert_us=30.0)
    outcome = replay(live_sequences(trace, 4), STRATEGIES["lru"].double_buffered(), slots, cost)
    assert outcome.misses == 8
    assert outcome.seconds * 1e6 == pytest.approx(8 * 100 + 30)


def test_a_predicted_load_overlaps_and_a_late_one_is_counted() -> None:
    """With the path known, layer 1's records travel while layer 0 computes; what has not arrived is late, not missed."""
    steps = [[[0], [number % 4]] for number in range(12)]
    slow = Cost(row_bytes=1_000_000, link_gbps=10.0, copy_us=0.0, layer_us=10.0, expert_us=10.0)
    fast = replace(slow, layer_us=500.0)
    workload = live_sequences(_trace_of(steps, experts=4, top_k=1), 1)
    late, hidden = (replay(workload, STRATEGIES["oracle-step"], 3, cost) for cost in (slow, fast))
    assert late.misses == hidden.misses == 0
    assert late.late > 0
    assert hidden.late <= 1
    assert hidden.stall_seconds < 0.1 * late.stall_seconds + 1e-9
    demand = replay(workload, STRATEGIES["next-use"], 3, slow)
    assert late.seconds < demand.seconds


def _trace_of(steps: list[list[list[int]]], experts: int, top_k: int = 2, sequences: list[int] | None = None) -> Trace:
    ids = np.array(steps, dtype=np.uint8)
    made = make_trace(len(steps), ids.shape[1], experts, top_k)
    number = np.array(sequences if sequences is not None else [0] * len(steps), dtype=np.int32)
    place = np.arange(len(steps), dtype=np.int32) if sequences is None else np.zeros(len(steps), dtype=np.int32)
    return replace(made, rows=made.rows._replace(experts=ids, sequence=number, step=place))


@given(batch=st.integers(1, 6), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_live_sequences_follow_one_another(batch: int, seed: int) -> None:
    """Every step has `batch` rows of different sequences, and a place runs a sequence from its start without a gap."""
    trace = load_trace(EXCERPT).without("repetition")
    members = live_sequences(trace, batch, seed=seed).members
    sequence, step = trace.rows.sequence[members], trace.rows.step[members]
    assert all(len(set(row)) == batch for row in sequence.tolist())
    for place in range(batch):
        changed = np.diff(sequence[:, place], prepend=-1) != 0
        assert (step[changed, place] == 0).all()
        assert (np.diff(step[:, place])[~changed[1:]] == 1).all()


def test_groups_take_turns(real: Trace) -> None:
    """Two groups of two are the merged batch of four, taken in halves."""
    merged, turns = live_sequences(real, 4), live_sequences(real, 4, groups=2)
    np.testing.assert_array_equal(turns.members.reshape(-1, 4), merged.members)
    assert turns.tokens == merged.tokens


def test_next_uses_are_those_of_a_plain_search() -> None:
    """The table of next uses agrees with looking ahead expert by expert."""
    needed = np.random.default_rng(3).random((9, 2, 4)) < 0.3
    found = next_uses(needed)
    for step in range(10):
        for layer, expert in np.ndindex(2, 4):
            later = np.flatnonzero(needed[step:, layer, expert])
            assert found[step, layer, expert] == (step + later[0] if len(later) else 1e8)


def test_forecasts_learn(real: Trace) -> None:
    """The learning forecast ranks a step's true experts above the others far better than chance (1/8)."""
    workload = live_sequences(real, 1)
    forecast: Forecast = CountsByToken(24, 32)
    found = []
    for number in range(len(workload)):
        outlook = forecast.outlook(workload.before(number))
        if outlook is not None and number > 200:
            best = np.argsort(-outlook.demand[0], axis=1, kind="stable")[:, :4]
            found.append(np.take_along_axis(workload.needed[number], best, axis=1).mean())
        forecast.learn(workload.after(number))
    assert np.mean(found) > 0.25


class PredictedPath(NoForecast):
    """Demand `[H, L, E]` from any function of the step."""

    def __init__(self, predict: Callable[[Step], np.ndarray]) -> None:
        self._predict = predict

    def outlook(self, step: Step) -> Outlook:
        return Outlook(self._predict(step))


def test_a_predicted_path_is_any_function_of_the_step(real: Trace) -> None:
    """With the true path handed in as a prediction, plec loads what it loads with a recording."""
    workload = _first_steps(live_sequences(real, 4), 40)
    handed = PredictedPath(lambda step: workload.needed[step.number][None].astype(float))
    plec = replay(workload, STRATEGIES["plec"], 192, Cost(), forecast=handed)
    oracle = replay(workload, STRATEGIES["plec"], 192, Cost(), forecast=Recorded(workload.needed))
    assert (plec.misses, plec.prefetched, plec.wasted) == (oracle.misses, oracle.prefetched, oracle.wasted)


def test_knowing_further_steps_helps_retention(real: Trace) -> None:
    """Perfect knowledge of 0, 1, 4 further steps keeps more and more, Belady most."""
    workload = live_sequences(real, 4)
    strategy = STRATEGIES["next-use"]
    kept = [
        replay(workload, strategy, 192, Cost(), forecast=Recorded(workload.needed, horizon)).kept_ratio
        for horizon in (0, 1, 4)
    ]
    assert kept[0] < kept[1] <= kept[2] + 0.01
    assert kept[2] <= replay(workload, STRATEGIES["oracle"], 192, Cost()).kept_ratio


def test_a_blurred_path_has_the_stated_recall_and_precision() -> None:
    """Experts are known with probability q, and a share 1 - q of what is named is wrong."""
    random = np.random.default_rng(0)
    needed = random.random((200, 64)) < 0.2
    guess = blur(needed, 0.7, random) > 0
    assert (guess & needed).sum() / needed.sum() == pytest.approx(0.7, abs=0.03)
    assert (guess & needed).sum() / guess.sum() == pytest.approx(0.7, abs=0.03)


def test_bad_wishes_are_refused(real: Trace, tmp_path: Path) -> None:
    """Slots below one token's need, too many sequences, unknown passes, too uneven groups: errors that say so."""
    with pytest.raises(ConfigError, match="slots=3 is less than one layer's need"):
        replay(live_sequences(real, 1), STRATEGIES["lru"], 3, Cost())
    with pytest.raises(TraceError, match=r"has 11 sequences.*batch 500"):
        live_sequences(real, 500)
    with pytest.raises(TraceError, match="which tokens ran together"):
        as_recorded(real)
    with pytest.raises(TraceError, match="cannot be divided into 2 groups"):
        live_sequences(real, 3, groups=2)
    with pytest.raises(ConfigError, match="link_gbps=0"):
        Cost(link_gbps=0)
    with pytest.raises(ConfigError, match="'oracle'"):
        STRATEGIES["oracle"].make_forecast(Setting(layers=2, experts=4))
    save_trace(make_trace(20), tmp_path / "t.trace")
    grid = Grid(trace=tmp_path / "t.trace", slots=("1",), batches=(1,), strategies=("lru",), cost=Cost(), skip="")
    with pytest.raises(ConfigError, match="slots=1 is less"):
        run_grid(grid, lambda _: None)


def test_the_strategies_page_is_the_live_table() -> None:
    """The table in docs/how-it-works.md is what `expertflow strategies --markdown` prints."""
    shown = (DOCS / "how-it-works.md").read_text(encoding="utf-8").split("<!-- strategies -->\n")[1]
    assert shown.split("\n<!-- /strategies -->")[0] == page().split("\n\n")[-1].rstrip("\n")


def test_a_step_knows_only_its_past(real: Trace) -> None:
    """Before a step a forecast sees its tokens, not its routing."""
    step: Step = live_sequences(real, 2).before(3)
    assert step.needed is None
    assert step.routes is None
    assert len(step.tokens) == 2
