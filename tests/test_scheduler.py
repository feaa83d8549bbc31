"""Which sequences step next: none is lost, passed over or served twice; and tokens do not depend on any of it."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from expertflow import LLM, SamplingParams
from expertflow.errors import CancelledError, ConfigError
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.models.families import FAMILIES
from expertflow.schedule.admission import ADMISSIONS, LONGEST_WAIT, WhenItPays, make_admission
from expertflow.schedule.cluster import in_order
from expertflow.schedule.cost import (
    LEAST_FIXED,
    Costs,
    StepPrices,
    best_guesses,
    cheapest,
    expected_loads,
    fixed_part,
    price,
)
from expertflow.schedule.scheduler import Decode, Part, Prefill, Scheduler
from helpers import DEVICES, MakeCheckpoint, MakePredictor

IN_ROWS = list(FAMILIES)
RATES = StepPrices(slots=4, load=1.0, step=0.1, expert=0.01)


def chances_of(numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """A route of its own for every sequence, of one in three kinds."""
    found = np.zeros((len(numbers), 2, 9))
    for place, number in enumerate(numbers):
        kind = number % 3
        found[place, :, 3 * kind : 3 * kind + 2] = 0.9
    return found


def check_pass(scheduler: Scheduler, turn: Prefill) -> None:
    """Each sequence once, no more tokens than a pass has; unequal parts leave no room, or as much as those of later passes."""
    assert len({part.sequence for part in turn.parts}) == len(turn.parts) <= max(scheduler.batch, 1)
    sizes = [part.end - part.begin for part in turn.parts]
    if scheduler.unequal:
        left = [one.prompt - one.read for one in scheduler._live.values() if one.read < one.prompt]
        share = ceil(sum(left) / ceil(sum(left) / scheduler.chunk))
        wanted = share if not scheduler.waiting and len(left) <= scheduler.batch else min(scheduler.chunk, sum(left))
        assert sum(sizes) <= scheduler.chunk
        assert sum(sizes) == wanted or len(sizes) == scheduler.batch
    else:
        assert not scheduler.joins or max(sizes) * len(sizes) <= max(scheduler.chunk, len(sizes))


def drive(scheduler: Scheduler, seed: int, requests: int) -> tuple[Counter[int], int]:
    """Requests of random lengths come, are cancelled and finish at random; tokens each finished one got, and steps made."""
    draw = random.Random(seed)
    wanted, got, finished = {}, Counter(), Counter()
    coming, cancelled, steps, stalled = list(range(requests)), set(), 0, Counter()
    while coming or scheduler.waiting or scheduler.live:
        for _ in range(draw.choice([0, 0, 1, 3])):
            if coming:
                number = coming.pop(0)
                wanted[number] = draw.randint(1, 9)
                scheduler.add(number, draw.randint(1, 30))
        if wanted and draw.random() < 0.05:
            victim = draw.choice(sorted(wanted))
            if scheduler.remove(victim):
                cancelled.add(victim)
        stepping = {number for number, known in scheduler._live.items() if known.read == known.prompt}
        turn = scheduler.next()
        steps += 1
        assert scheduler.live <= scheduler.rows
        assert steps < 10_000
        if turn is None:
            continue
        if isinstance(turn, Prefill):
            check_pass(scheduler, turn)
            stalled.update(stepping)
            assert all(stalled[number] <= 1 for number in stepping)  # one pass at most between two tokens of a sequence
            scheduler.done(turn)
            sampled = [part.sequence for part in turn.parts if part.last]
        else:
            assert isinstance(turn, Decode)
            assert 1 <= len(turn.sequences) <= scheduler.batch
            members = [number for group in turn.groups for number in group]
            assert len(set(members)) == len(members)
            sampled = list(turn.sequences)
        for number in sampled:
            assert number not in cancelled
            assert finished[number] == 0
            got[number] += 1
            stalled[number] = 0
            if got[number] == wanted[number]:
                finished[number] = 1
                assert scheduler.remove(number)
        rows = [known.row for known in scheduler._live.values()]
        assert len(set(rows)) == len(rows)
    assert all(got[number] == wanted[number] for number in finished)
    assert set(finished) | cancelled == set(range(requests))
    return got, steps


@given(
    rows=st.integers(1, 7), batch=st.integers(1, 7), chunk=st.integers(1, 40), seed=st.integers(0, 99),
    policy=st.sampled_from(["fifo", "group", "auto"]),
)  # fmt: skip
@settings(max_examples=60)
@pytest.mark.parametrize("unequal", [False, True])
def test_no_sequence_is_lost_or_served_twice(
    unequal: bool, rows: int, batch: int, chunk: int, seed: int, policy: str
) -> None:
    """Random arrivals, cancellations, lengths and limits: each request that is not cancelled gets its tokens, once."""
    scheduler = Scheduler(
        rows=rows,
        batch=batch,
        chunk=chunk,
        unequal=unequal,
        policy=policy,
        rates=RATES,
        top_k=2,
        expected=chances_of,
        preview=chances_of,
    )
    drive(scheduler, seed, 25)
    assert sorted(scheduler._free) == list(range(rows))


def test_cohorts_come_and_go_together() -> None:
    """Where sequences cannot join, the next ones wait until the last one is over."""
    drive(Scheduler(rows=3, batch=3, chunk=8, joins=False), 1, 20)
    scheduler = Scheduler(rows=2, batch=2, chunk=8, joins=False)
    for number in range(3):
        scheduler.add(number, 50)
    first = scheduler.next()
    assert isinstance(first, Prefill)
    assert [(part.sequence, part.end, part.last) for part in first.parts] == [(0, 50, True), (1, 50, True)]
    scheduler.done(first)
    scheduler.remove(0)
    assert scheduler.next().sequences == (1,)
    assert scheduler.next().sequences == (1,)
    scheduler.remove(1)
    assert [part.sequence for part in scheduler.next().parts] == [2]
    with pytest.raises(ConfigError, match="cohorts"):
        Scheduler(rows=4, batch=2, chunk=8, joins=False)


def test_whole_prompts_are_read_in_one_pass() -> None:
    """However long, as many as a step takes; who waits joins while others live."""
    scheduler = Scheduler(rows=5, batch=2, chunk=8, whole=True)
    for number in range(3):
        scheduler.add(number, 50 + number)
    first = scheduler.next()
    assert first.parts == (Part(0, 0, 50, True), Part(1, 0, 51, True))
    scheduler.done(first)
    second = scheduler.next()
    assert second.parts == (Part(2, 0, 52, True),)
    scheduler.done(second)
    scheduler.add(3, 9)
    happened = [scheduler.next() for _ in range(4)]
    assert Prefill((Part(3, 0, 9, True),)) in happened
    assert [turn.sequences for turn in happened if isinstance(turn, Decode)][:2] == [(0, 1), (2,)]


def test_prompts_are_read_between_rounds() -> None:
    """A long prompt is cut into passes, and between two of them every live sequence steps once."""
    scheduler = Scheduler(rows=4, batch=2, chunk=10)
    for number in range(3):
        scheduler.add(number, 4)
    happened = []
    for _ in range(18):
        turn = scheduler.next()
        if isinstance(turn, Prefill):
            scheduler.done(turn)
            happened.append("".join(f"p{part.sequence}" for part in turn.parts))
        else:
            happened.append("".join(str(number) for number in turn.sequences))
        if happened == ["p0p1", "p2", "01"]:
            scheduler.add(3, 35)
    assert happened[:4] == ["p0p1", "p2", "01", "2"]  # no sequence stepped when the second pass was chosen
    assert happened[4:] == [*["p3", "01", "2"] * 3, "p3", "01", "23", "01", "23"]


def test_turns_say_who_comes_next() -> None:
    """A turn names the others of its round, and behind them those that had theirs."""
    scheduler = Scheduler(rows=5, batch=2, chunk=100)
    for number in range(5):
        scheduler.add(number, 1)
    while not isinstance(turn := scheduler.next(), Decode):
        scheduler.done(turn)
    assert turn.groups == ((0, 1), (2, 3))  # the last one's prompt is still to be read
    assert scheduler.next().groups == ((2, 3), (0, 1))
    scheduler.done(scheduler.next())
    assert scheduler.next().groups == ((0, 1), (2, 3), (4,))
    scheduler.remove(3)
    assert scheduler.next().groups == ((2,), (4,), (0, 1))


def test_routes_decide_who_steps_together() -> None:
    """With routes of three kinds, three groups are made of one kind each; `auto` does the same where loads cost."""
    for policy in ("group", "auto"):
        scheduler = Scheduler(rows=9, batch=3, chunk=100, policy=policy, rates=RATES, top_k=2, expected=chances_of)
        for number in range(9):
            scheduler.add(number, 1)
        turns: list[tuple[int, ...]] = []
        while len(turns) < 3:
            turn = scheduler.next()
            if isinstance(turn, Prefill):
                scheduler.done(turn)
                turns = []
            elif len(turn.groups) == 3:
                turns.append(turn.sequences)
        assert sorted(turns) == [(0, 3, 6), (1, 4, 7), (2, 5, 8)]


def test_auto_stops_predicting_where_it_does_not_pay() -> None:
    """If everything is resident, turns are by arrival, and routes are predicted only now and then."""
    calls = []

    def predict(numbers: Sequence[int]) -> npt.NDArray[np.float64]:
        calls.append(len(numbers))
        return chances_of(numbers)

    rates = StepPrices(slots=100, load=1.0, step=0.1, expert=0.0, divide=0.1)
    scheduler = Scheduler(rows=4, batch=2, chunk=100, policy="auto", rates=rates, top_k=2, expected=predict)
    for number in range(4):
        scheduler.add(number, 1)
    for _ in range(260):  # two turns a round
        turn = scheduler.next()
        if isinstance(turn, Prefill):
            scheduler.done(turn)
    assert len(calls) == 8  # rounds 0, 2, 5, 10, 19, 36, 69, 102


def test_no_waiting_request_is_passed_over_for_ever() -> None:
    """Requests of a popular route overtake another one, but not more than `patience` times."""
    scheduler = Scheduler(
        rows=2, batch=2, chunk=100, policy="group", patience=3, expected=chances_of, preview=chances_of, top_k=2
    )
    for number in range(0, 36, 3):  # all of one kind, the live ones too
        scheduler.add(number, 1)
    scheduler.done(scheduler.next())
    scheduler.add(1, 1)  # of another kind; those behind it are of the first
    for number in range(36, 90, 3):
        scheduler.add(number, 1)
    order = [0, 3]
    while 1 not in order:
        scheduler.remove(order[-2])
        turn = scheduler.next()
        if isinstance(turn, Prefill):
            scheduler.done(turn)
            order += [part.sequence for part in turn.parts]
    passed_by = [number for number in order if number >= 36]
    assert 1 <= len(passed_by) <= 3
    assert order[: len(order) - 1 - len(passed_by)] == sorted(order[: len(order) - 1 - len(passed_by)])


def test_requests_are_let_in_when_empty_rows_have_cost_a_pass() -> None:
    """Three step, one waits: a pass that costs two rounds waits for eight, but for none where no sequence steps."""
    scheduler = Scheduler(rows=4, batch=4, chunk=10, admission=WhenItPays(lambda: Costs(2.0, 1.0, 1.0)))
    for number in range(4):
        scheduler.add(number, 2)
    assert [part.sequence for part in scheduler.next().parts] == [0, 1, 2, 3]
    scheduler.done(Prefill(tuple(Part(number, 0, 2, last=True) for number in range(4))))
    scheduler.remove(0)
    scheduler.add(4, 2)
    rounds = 0
    while isinstance(turn := scheduler.next(), Decode):
        rounds += 1
    assert rounds == 7  # the eighth is due
    scheduler.done(turn)
    assert [part.sequence for part in turn.parts] == [4]
    for number in range(5):
        scheduler.remove(number)
    scheduler.add(5, 2)
    assert [part.sequence for part in scheduler.next().parts] == [5]


def test_rounds_that_repeat_count_as_those_that_are_asked_for() -> None:
    """A request waits in vain and is cancelled; what that cost is forgotten, also where the rounds behind it only repeat."""
    waited = []
    for repeats in (False, True):
        scheduler = Scheduler(rows=2, batch=2, chunk=16, admission=WhenItPays(lambda: Costs(10.0, 1.0, 1.0)))
        scheduler.add(0, 4)
        scheduler.done(scheduler.next())
        scheduler.add(1, 4)
        assert all(isinstance(scheduler.next(), Decode) for _ in range(15))
        assert not scheduler.repeat([0]), "a row is free, and a request waits"
        scheduler.remove(1)
        for _ in range(50):
            assert not repeats or scheduler.repeat([0])
            assert repeats or isinstance(scheduler.next(), Decode)
        scheduler.add(2, 4)
        waited.append(0)
        while isinstance(scheduler.next(), Decode):
            waited[-1] += 1
    assert waited[0] == waited[1] > 10


def test_no_request_waits_longer_than_a_few_passes_take() -> None:
    """Seven step and lose next to nothing by an empty row: the eighth is let in all the same once it waited four passes."""
    scheduler = Scheduler(rows=8, batch=8, chunk=100, admission=WhenItPays(lambda: Costs(3.0, 0.01, 1.0)))
    for number in range(7):
        scheduler.add(number, 2)
    scheduler.done(scheduler.next())
    assert isinstance(scheduler.next(), Decode)
    scheduler.add(7, 2)
    rounds = 0
    while isinstance(scheduler.next(), Decode):
        rounds += 1
    assert rounds == LONGEST_WAIT * 3 - 1


def test_no_request_waits_beside_a_prompt_that_is_read() -> None:
    """A long prompt is read chunk by chunk between rounds: a new request is let in with its next pass; what was lost for one that left is forgotten."""
    scheduler = Scheduler(rows=4, batch=4, chunk=10, admission=WhenItPays(lambda: Costs(9.0, 0.01, 1.0)))
    scheduler.add(0, 2)
    scheduler.done(scheduler.next())
    scheduler.next()
    scheduler.add(1, 2)
    for _ in range(30):
        assert isinstance(scheduler.next(), Decode)
    scheduler.remove(1)
    scheduler.next()
    scheduler.add(2, 600)
    rounds = 0
    while isinstance(turn := scheduler.next(), Decode):
        rounds += 1
    assert rounds >= 30
    scheduler.done(turn)
    scheduler.add(3, 2)
    turns = [scheduler.next() for _ in range(2)]
    assert scheduler.live == 3
    assert any(isinstance(turn, Prefill) for turn in turns)


def test_rules_of_admission_differ_beside_live_sequences() -> None:
    """Beside a sequence that steps, `at once` reads the next prompt, `static` waits for its end, `pays` until it pays."""
    found = {}
    for name in ADMISSIONS:
        scheduler = Scheduler(rows=4, batch=4, chunk=10, admission=make_admission(name, lambda: Costs(4.0, 1.0, 1.0)))
        scheduler.add(0, 2)
        scheduler.done(scheduler.next())
        scheduler.next()
        scheduler.add(1, 2)
        found[name] = [isinstance(scheduler.next(), Prefill) for _ in range(20)].count(True)
        scheduler.remove(0)
        assert isinstance(scheduler.next(), Prefill)
    assert found == {"pays": found["pays"], "at once": found["at once"], "static": 0}
    assert found["at once"] > found["pays"] > 0
    with pytest.raises(ConfigError, match="admission='later'"):
        make_admission("later", lambda: Costs(0.0, 0.0, 0.0))
    with pytest.raises(ConfigError, match="admission='later'"):
        LLM("no/such/folder/at/all", admission="later")  # before the folder is looked for


def test_an_idle_engine_takes_other_rules(make_checkpoint: MakeCheckpoint) -> None:
    """Rules change between requests, not under them; unknown ones and those without a predictor are refused."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(
        make_checkpoint("qwen3_moe"), slots=5, device="cpu", max_length=32, max_batch=2, admission="static"
    ) as llm:
        engine, firsts = llm.engine, []
        for rule in ("static", "at once"):
            engine.reschedule(admission=rule)
            engine.add(llm.request([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True)))
            engine.step()
            engine.add(llm.request([8, 9], params, index=1))
            with pytest.raises(ConfigError, match="in the engine"):
                engine.reschedule()
            order = []
            while engine.unfinished:
                order += [output.index for _, output in engine.step()]
            firsts.append(order.index(1))
        assert firsts[0] == 8  # behind the other's last token
        assert firsts[1] < 3
        for wrong in ({"schedule": "sideways"}, {"schedule": "group"}, {"admission": "never"}):
            with pytest.raises(ConfigError):
                engine.reschedule(**wrong)


def test_a_slow_first_pass_holds_no_request_back(make_checkpoint: MakeCheckpoint) -> None:
    """What passes take is known from the second one on, and is then the faster one's: the first one compiles and warms up."""
    with LLM(make_checkpoint("qwen3_moe"), slots=5, device="cpu", max_length=32) as llm:
        engine = llm.engine
        for _ in range(3):
            engine._durations.add_step(1, 0.5, steps_a_round=1)
        engine._durations.add_pass(9.0)
        assert engine._durations.costs() == Costs(0.0, 0.0, 0.0)
        engine._durations.add_pass(1.0)
        assert engine._durations.costs() == Costs(1.0, 0.5, 0.5)


@pytest.mark.parametrize(("alone", "each"), [(3.0, 0.5), (0.0, 2.0), (5.0, 0.0)])
def test_the_fixed_part_of_a_step(alone: float, each: float) -> None:
    """What does not grow with the sequences, however an odd step stands out; some of the step at least."""
    steps = [(size, alone + each * size) for size in (2, 4, 6, 8, 8, 8) for _ in range(3)] + [(8, 900.0)]
    assert fixed_part(steps) == pytest.approx(max(alone, LEAST_FIXED * (alone + each * 8)))
    assert fixed_part(steps[-9:]) == alone + each * 8
    once = [*steps, (5, 400.0)]  # a first captured step of its size
    assert fixed_part(once) == fixed_part(steps)
    assert fixed_part([]) == 0


def test_long_prompts_do_not_crawl_beside_short_ones() -> None:
    """A pass reads as many tokens as it can, the first prompt's among them: 291 tokens in five passes of 64, not in 25."""
    scheduler = Scheduler(rows=8, batch=8, chunk=64)
    lengths = (60, 5, 5, 5, 6, 5, 5, 200)
    for number, prompt in enumerate(lengths):
        scheduler.add(number, prompt)
    passes, read = [], [0] * 8
    while min(left := [most - done for most, done in zip(lengths, read, strict=True)]) > 0 or max(left) > 0:
        turn = scheduler.next()
        if isinstance(turn, Prefill):
            first = next(number for number in range(8) if read[number] < lengths[number])
            assert first in [part.sequence for part in turn.parts]
            for part in turn.parts:
                assert part.begin == read[part.sequence]
                read[part.sequence] = part.end
            passes.append(sum(part.end - part.begin for part in turn.parts))
            scheduler.done(turn)
    assert len(passes) == 5
    assert sum(passes) == sum(lengths)


def test_unequal_parts_fill_a_pass() -> None:
    """In order of arrival; a prompt that does not end in the pass takes half of what is left, or what the others leave."""
    scheduler = Scheduler(rows=8, batch=8, chunk=64, unequal=True, even=False)
    for number, prompt in enumerate((200, 5, 5, 40, 30)):
        scheduler.add(number, prompt)
    passes = []
    while isinstance(turn := scheduler.next(), Prefill):
        passes.append([(part.sequence, part.end - part.begin, part.last) for part in turn.parts])
        scheduler.done(turn)
        for part in turn.parts:
            if part.last:
                scheduler.remove(part.sequence)
    assert passes == [
        [(0, 32, False), (1, 5, True), (2, 5, True), (3, 11, False), (4, 11, False)],
        [(0, 32, False), (3, 29, True), (4, 3, False)],
        [(0, 48, False), (4, 16, True)],
        [(0, 64, False)],
        [(0, 24, True)],
    ]


@given(rows=st.integers(1, 5), seed=st.integers(0, 99), cost=st.floats(0, 30))
@settings(max_examples=30)
def test_economy_loses_no_request(rows: int, seed: int, cost: float) -> None:
    """Whatever a pass costs, every request is served in the end."""
    drive(
        Scheduler(rows=rows, batch=2 if rows > 1 else 1, chunk=10, admission=WhenItPays(lambda: Costs(cost, 1.0, 1.0))),
        seed,
        15,
    )


@given(seed=st.integers(0, 999), slots=st.integers(0, 40), count=st.integers(2, 9), batch=st.integers(1, 5))
@settings(max_examples=60)
def test_the_price_of_a_division(seed: int, slots: int, count: int, batch: int) -> None:
    """With certain routes loads are those of the best fixed set of experts; finer groups never cost less."""
    routes = np.random.default_rng(seed).random((count, 2, 12)) < 0.2
    rates = StepPrices(slots=slots, load=1.0, step=0.1, expert=0.01)
    groups = -(-count // batch)
    division = price(routes.astype(float), in_order(count, groups), groups, rates)
    uses = Counter(
        cell for number in range(groups)
        for cell in np.flatnonzero(routes[in_order(count, groups) == number].any(axis=0)).tolist()
    )  # fmt: skip
    kept = {cell for cell, _ in uses.most_common(slots)}
    assert division.loads == pytest.approx(sum(n for cell, n in uses.items() if cell not in kept))
    best = cheapest(routes.astype(float), batch, rates, 2)
    assert best.seconds <= division.seconds + 1e-9
    finer = price(routes.astype(float), np.arange(count), count, rates)
    merged = price(routes.astype(float), np.zeros(count, dtype=np.int64), 1, rates)
    assert merged.seconds <= division.seconds + 1e-9 <= finer.seconds + 2e-9
    assert expected_loads(np.ones((1, 2, 12)), slots) == max(0, 24 - slots)
    assert best_guesses(routes.astype(float), 2).sum(axis=2).max() == 2


PROMPTS = [[5, 9, 17, 30, 8, 21], [40, 41, 42], [7, 7, 7, 7, 7, 7, 7, 7, 12], [3, 4], [60, 61, 62, 63, 64], [33] * 12]
COUNTS = (7, 3, 9, 5, 1, 8)


@lru_cache
def alone(folder: Path) -> list[tuple[int, ...]]:
    """Each request by itself."""
    with LLM(folder, device=DEVICES[-1], max_batch=1, max_length=48) as llm:
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in COUNTS]
        return [llm.generate(p, s)[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]


@pytest.mark.parametrize("model_type", IN_ROWS)
def test_company_changes_no_token(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """Law 5, every family: prompts in passes, turns, joining and leaving give each request the tokens it has alone."""
    folder = make_checkpoint(model_type)
    expected = alone(folder)
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in COUNTS]
    for live, execution in ((2 + 2 * (list(FAMILIES).index(model_type) % 2), "host"), (4, "graph")):
        if execution == "graph" and FAMILIES[model_type].no_graph:
            continue
        options = {"max_batch": 2, "max_live": live, "max_length": 48, "slots": 6, "prefill_chunk": 9}
        with LLM(folder, device=DEVICES[-1], execution=execution, schedule="fifo", **options) as llm:
            assert [output.token_ids for output in llm.generate(PROMPTS, params)] == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("execution", ["host", "graph"])
def test_arrivals_cancellations_and_regroupings_change_no_token(
    make_checkpoint: MakeCheckpoint,
    make_predictor: MakePredictor,
    execution: str,
    seed: int,
) -> None:
    """Law 5: requests come and are cancelled at random, under every schedule; who is left has the tokens it has alone."""
    folder = make_checkpoint("qwen3_moe")
    expected, draw = alone(folder), random.Random(seed)
    batch = draw.randint(1, 3)
    options = {
        "max_batch": batch, "max_live": batch + draw.randint(0, 3), "max_length": 48, "slots": draw.choice([1, 6, 20]),
        "prefill_chunk": draw.choice([1, 5, 64]), "schedule": ("fifo", "group", "auto")[seed],
    }  # fmt: skip
    with LLM(folder, device=DEVICES[-1], execution=execution, predictor=str(make_predictor(folder)), **options) as llm:
        engine, which, got, over = llm.engine, {}, {}, set()
        to_come = [draw.randrange(len(PROMPTS)) for _ in range(14)]
        while to_come or engine.unfinished:
            if to_come and draw.random() < 0.5:
                kind = to_come.pop()
                params = SamplingParams(max_tokens=COUNTS[kind], ignore_eos=True)
                number = engine.add(llm.request(PROMPTS[kind], params))
                which[number], got[number] = kind, []
            if got and draw.random() < 0.1:
                victim = draw.choice(list(got))
                if engine.cancel(victim):
                    over.add(victim)
            for number, output in engine.step():
                assert number not in over
                got[number].append(output.token_id)
                over |= {number} if output.output is not None else set()
        assert llm.predictor_failure is None
        assert llm._offloaded.live_predictor._rows.rows == {}
    for number, tokens in got.items():
        assert tuple(tokens) == expected[which[number]][: len(tokens)]
        assert number in over


def test_streams_and_single_requests_share_the_engine(make_checkpoint: MakeCheckpoint) -> None:
    """A stream gets its own tokens, though `step` makes them; `step` gives the other requests' tokens, though a stream makes them."""
    folder = make_checkpoint("qwen3_moe")
    expected = alone(folder)
    with LLM(folder, device=DEVICES[-1], max_batch=3, max_length=48, slots=6) as llm:
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in COUNTS]
        own = llm.engine.add(llm.request(PROMPTS[0], params[0]))
        stream = llm.stream(PROMPTS[2], params[2])
        streamed = [next(stream).token_id]
        single = [output.token_id for number, output in llm.engine.step() if number == own]
        while llm.engine.unfinished:
            for number, output in llm.engine.step():
                assert number == own
                single.append(output.token_id)
        streamed += [output.token_id for output in stream]
        assert (tuple(single), tuple(streamed)) == (expected[0], expected[2])
        stream = llm.stream(PROMPTS[1:3], params[1:3])
        next(stream)
        for number in range(llm.engine.begun):
            llm.engine.cancel(number)
        with pytest.raises(CancelledError, match="2 of 2 requests were cancelled"):
            list(stream)


def failing_now_and_then(work: Callable[..., torch.Tensor], often: int) -> Callable[..., torch.Tensor]:
    """Work whose every so many-th answer is lost."""
    calls = iter(range(100_000))

    def run(*args: object, **kwargs: object) -> torch.Tensor:
        answer = work(*args, **kwargs)
        if next(calls) % often == often - 1:
            raise RuntimeError("cosmic ray")
        return answer

    return run


def test_a_broken_turn_comes_again(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and steps that raise give no token and lose no request."""
    folder = make_checkpoint("qwen3_moe")
    expected, params = alone(folder), [SamplingParams(max_tokens=count, ignore_eos=True) for count in COUNTS]
    for execution in ("host", "graph"):
        options = {"max_batch": 2, "max_live": 3, "max_length": 48, "slots": 6, "execution": execution}
        with LLM(folder, device="cpu", **options) as llm:
            engine, got, rows = llm.engine, {}, llm._offloaded.handover.rows
            if execution == "graph":  # in the middle of a layer: slots are decided, and their records do not come
                experts = llm._offloaded.handover.make_decoder().experts
                monkeypatch.setattr(experts._twin, "run_layer", failing_now_and_then(experts._twin.run_layer, 8))
            else:
                monkeypatch.setattr(rows, "forward", failing_now_and_then(rows.forward, 4))
            numbers = [engine.add(llm.request(p, s)) for p, s in zip(PROMPTS, params, strict=True)]
            broken = 0
            while engine.unfinished:
                try:
                    for number, output in engine.step():
                        got.setdefault(number, []).append(output.token_id)
                except RuntimeError:
                    broken += 1
            assert broken > 5
            assert [tuple(got[number]) for number in numbers] == expected


def test_takers_and_choices_that_fail_harm_no_other_request(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A taker that raises loses its own request; a choice that fails uses nothing up; others get their tokens."""
    folder = make_checkpoint("qwen3_moe")
    params = [SamplingParams(max_tokens=6, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 1.0, 1.0)]
    with LLM(folder, device=DEVICES[-1], max_batch=3, max_length=48) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS[:3], params)]
        engine, got = llm.engine, {}

        def refuse(_: object) -> None:
            raise ValueError("no room")

        for way in ("choose", "begin"):  # where steps are begun ahead, tokens are chosen by the second
            monkeypatch.setattr(engine._sampler, way, failing_now_and_then(getattr(engine._sampler, way), 3))
        takers = [None, None, refuse]
        numbers = [engine.add(llm.request(*one), take) for *one, take in zip(PROMPTS[:3], params, takers, strict=True)]
        raised = []
        while engine.unfinished:
            try:
                for number, output in engine.step():
                    got.setdefault(number, []).append(output.token_id)
            except (ValueError, RuntimeError) as error:
                raised.append(str(error))
        assert raised.count("no room") == 1
        assert "cosmic ray" in raised
        assert [tuple(got[number]) for number in numbers[:2]] == expected[:2]
        assert numbers[2] not in got


def test_a_broken_cohort_is_given_up(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cohort keeps cannot be trusted behind an error: its requests are cancelled, the next ones are right."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
             "max_position_embeddings": 128, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}  # fmt: skip
    no_row = make_checkpoint("flex_olmo", "float32", **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with LLM(no_row, device=DEVICES[-1], max_batch=2, max_length=48, slots=3) as llm:
        assert not llm.engine._executor.joins
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        expected = [output.token_ids for output in llm.generate(PROMPTS[:4], params)]
        executor, stream = llm.engine._executor, llm.stream(PROMPTS[1], params)
        own = llm.engine.add(llm.request(PROMPTS[0], params))
        next(stream)
        monkeypatch.setattr(executor, "decode", failing_now_and_then(executor.decode, 1))
        with pytest.raises(RuntimeError, match="cosmic"):
            llm.engine.step()
        monkeypatch.undo()
        assert not llm.engine.knows(own)
        with pytest.raises(CancelledError, match="1 of 1 requests"):
            list(stream)
        assert [output.token_ids for output in llm.generate(PROMPTS[:4], params)] == expected


def test_rows_do_what_copies_would(make_checkpoint: MakeCheckpoint) -> None:
    """Regrouping by row numbers gives the logits of caches that are really merged, split and reindexed (paper, 3.3)."""
    folder = make_checkpoint("qwen3_moe")
    with LLM(folder, device="cpu", max_batch=4, max_length=48) as llm:
        model, executor = llm._offloaded.model, llm.engine._executor
        draw = random.Random(4)
        caches, lengths = [], [len(prompt) for prompt in PROMPTS[:4]]
        for place, prompt in enumerate(PROMPTS[:4]):
            from_rows = executor.prefill([PromptChunk(place, prompt, 3 - place, 0)])
            with torch.inference_mode():
                out = model(torch.tensor([prompt]), past_key_values=DynamicCache(config=model.config))
            torch.testing.assert_close(from_rows[0], out.logits[0, -1])
            caches.append(out.past_key_values)
        for step in range(8):
            members = draw.sample(range(4), draw.randint(1, 4))
            tokens = [draw.randrange(3, 90) for _ in members]
            fed = [
                DecodeInput(place, token, 3 - place, lengths[place])
                for place, token in zip(members, tokens, strict=True)
            ]
            mine = executor.decode(fed)
            theirs = merged(model, [caches[place] for place in members], [lengths[place] for place in members], tokens)
            for place, (logits, cache) in zip(members, theirs, strict=True):
                caches[place] = cache
                torch.testing.assert_close(mine[members.index(place)], logits, msg=f"step {step}")
                lengths[place] += 1


def merged(
    model: Callable[..., object], caches: list[DynamicCache], lengths: list[int], tokens: list[int]
) -> list[tuple[torch.Tensor, DynamicCache]]:
    """One step of sequences whose caches are copied into one, padded on the left, and copied out again."""
    width, together = max(lengths), DynamicCache(config=model.config)
    for layer in range(len(caches[0].layers)):
        columns = []
        for kind in ("keys", "values"):
            each = [getattr(cache.layers[layer], kind) for cache in caches]
            padded = [torch.nn.functional.pad(one, (0, 0, width - one.shape[2], 0)) for one in each]
            columns.append(torch.cat(padded))
        together.update(*columns, layer)
    mask = torch.tensor([[0] * (width - length) + [1] * (length + 1) for length in lengths])
    with torch.inference_mode():
        out = model(
            torch.tensor(tokens)[:, None], attention_mask=mask, position_ids=torch.tensor(lengths)[:, None],
            past_key_values=together,
        )  # fmt: skip
    found = []
    for row, length in enumerate(lengths):
        own = DynamicCache(config=model.config)
        for layer, held in enumerate(out.past_key_values.layers):
            own.update(
                held.keys[row : row + 1, :, width - length :].clone(),
                held.values[row : row + 1, :, width - length :].clone(),
                layer,
            )
        found.append((out.logits[row, -1], own))
    return found


def test_padding_uses_no_expert(make_checkpoint: MakeCheckpoint) -> None:
    """In a pass over prompts of unequal length padding is routed nowhere, and tokens as alone."""
    seen: list[npt.NDArray[np.int64]] = []

    class Watch:
        def begin(self, tokens: npt.NDArray[np.int32] | None) -> None: ...

        def observe(self, layer: int, routes: npt.NDArray[np.int64], _: object) -> None:
            if layer == 0:
                seen.append(routes)

    options: dict = {"device": DEVICES[-1], "execution": "host", "max_batch": 2, "max_length": 48}
    with LLM(make_checkpoint("qwen3_moe"), **options) as llm:  # graph execution pads nothing
        llm._offloaded.watch(Watch())
        executor = llm.engine._executor
        executor.prefill([PromptChunk(0, PROMPTS[0], 0, 0), PromptChunk(1, PROMPTS[1], 1, 0)])
        executor.prefill([PromptChunk(0, PROMPTS[0], 0, 0)])
        executor.prefill([PromptChunk(1, PROMPTS[1], 1, 0)])
    together, first, second = seen
    assert (together[6:9] == 8).all()  # three tokens of padding before a prompt of three
    assert np.array_equal(np.sort(together[:6]), np.sort(first))
    assert np.array_equal(np.sort(together[9:]), np.sort(second))


def test_two_thousand_requests(make_checkpoint: MakeCheckpoint) -> None:
    """Overload: a long queue, random cancellations, one slot; every request gets tokens or was cancelled, nothing is left."""
    folder, draw = make_checkpoint("mixtral"), random.Random(0)
    with LLM(folder, device="cpu", max_batch=16, max_live=40, max_length=16, slots=1, prefill_chunk=64) as llm:
        engine = llm.engine
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        left = {engine.add(llm.request([3 + n % 80, 4], params)) for n in range(2000)}
        got: Counter[int] = Counter()
        while engine.unfinished:
            for victim in draw.sample(sorted(left), min(len(left), 12)):
                if engine.cancel(victim):
                    left.discard(victim)
            for number, output in engine.step():
                got[number] += 1
                if output.output is not None:
                    left.discard(number)
        assert not left
        assert engine._scheduler.live == engine._scheduler.waiting == 0
        assert max(got.values()) == 2
        assert 0 < len(got) < 2000
        llm._offloaded.controller.table.check_integrity()
