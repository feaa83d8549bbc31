"""The predictor at work in the engine: whose tokens, which rows, and what happens when it is wrong, foreign or broken."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.cache.forecast import Step
from expertflow.cache.horizon import unite
from expertflow.config import EngineConfig
from expertflow.engine.llm import shipped_model
from expertflow.engine.prepare import SHIPPED_PREDICTOR, prepare
from expertflow.errors import ConfigError, PredictorError
from expertflow.events import Event, EventKind
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.live.batch import PredictorBatch, PredictorInputs
from expertflow.live.pacing import FIRST_BACKOFF, IDLE_STEPS, JUDGED_PREFETCHES, LONGEST_BACKOFF
from expertflow.live.prompts import group_by_row, take_in
from expertflow.memory.meter import CpuMeter
from expertflow.models.files.checkpoint import walk
from expertflow.models.files.fingerprint import fingerprint
from expertflow.predict.artifact import Artifact, load_artifact
from expertflow.predict.counts import SOURCES, remember
from expertflow.predict.dataset import Shape, passages
from expertflow.predict.evaluation.score import score
from expertflow.predict.kinds import KINDS, make
from expertflow.predict.network import OUTPUTS, PredictorConfig
from expertflow.predict.online import OnlinePredictor, Prediction
from expertflow.trace.format import DECODE, load_trace
from expertflow.trace.owners import NO_SEQUENCE, BatchOwners, NextBatch
from expertflow.types import HORIZONS
from helpers import MakeCheckpoint, MakePredictor

PROMPTS = [[5, 9, 17, 30, 8, 21], [40, 41, 42], [7, 7, 7, 7, 7, 7, 7, 7, 12]]


def host_demands(llm: LLM) -> list[npt.NDArray[np.float64]]:
    """Collect the demand that the predictor gives the host, decode step by decode step, as they run."""
    demands: list[npt.NDArray[np.float64]] = []
    live_predictor = llm._offloaded.live_predictor
    predict = live_predictor.outlook

    def outlook(step: Step) -> object:
        answer = predict(step)
        if answer is not None and len(answer.demand) > 1:
            demands.append(answer.demand)
        return answer

    live_predictor.outlook = outlook
    return demands


def generate(model: Path, **options: object) -> list[tuple[int, ...]]:
    """Three prompts of unlike lengths, unlike numbers of tokens."""
    with LLM(model, device="cpu", max_batch=4, max_length=48, **options) as llm:
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (12, 5, 9)]
        return [tuple(output.token_ids) for output in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("chunk", [4, 512])
def test_what_is_said_is_what_the_recording_gives(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, tmp_path: Path, chunk: int
) -> None:
    """Every decode step's demand, through batches that shrink and prompts in passes, is that of the recorded sequences.

    The offline scores know the sequences one by one; the engine has to find owners, rows and last routes for that.
    """
    model = make_checkpoint("qwen3_moe")
    predictor = make_predictor(model)
    path = tmp_path / "run.trace"
    with LLM(
        model, device="cpu", max_batch=4, max_length=48, slots=6, predictor=str(predictor), prefill_chunk=chunk
    ) as llm:
        demands = host_demands(llm)
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (12, 5, 9)]
        for _ in range(2):  # a second batch takes the rows of the first
            with llm.record(path):
                llm.generate(PROMPTS, params)
        assert llm.predictor_failure is None
    trace = load_trace(path)
    items = passages(trace)
    artifact = load_artifact(predictor)
    chances = {int(row): each for item, part in zip(items, score(artifact, items), strict=True)
               for row, each in zip(item.rows, part, strict=True)}  # fmt: skip
    steps = [np.flatnonzero(trace.rows.step == step) for step in np.unique(trace.rows.step[trace.rows.phase == DECODE])]
    assert len(steps) == len(demands) // 2
    for rows, demand in zip(steps, demands[-len(steps) :], strict=True):
        expected = unite(np.stack([chances[row] for row in rows]).astype(np.float64))
        np.testing.assert_allclose(demand[0], expected[0], atol=5e-3)
        within = 1 - np.cumprod(1 - demand[1:], axis=0)[[horizon - 1 for horizon in HORIZONS]]
        np.testing.assert_allclose(within, np.maximum.accumulate(expected[1:], axis=0), atol=5e-3)


def test_streams_in_turns_keep_their_sequences(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, tmp_path: Path
) -> None:
    """Two streams of one model, advanced in turns: the recording has each sequence whole, the predictor remembers both."""
    model, path = make_checkpoint("qwen3_moe"), tmp_path / "run.trace"
    with LLM(model, device="cpu", max_batch=2, max_length=48, slots=6, predictor=str(make_predictor(model))) as llm:
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        llm.generate(PROMPTS[2], params)  # numbers go on, and the recording lists those it has
        with llm.record(path):
            streams = [llm.stream(PROMPTS[:2], params), llm.stream(PROMPTS[2], params)]
            outputs = {0: [], 1: []}
            while streams:
                for number, stream in enumerate(list(streams)):
                    item = next(stream, None)
                    if item is None:
                        streams.remove(stream)
                    else:
                        outputs[number].append(item)
        assert llm.predictor_failure is None
        assert llm._offloaded.live_predictor._rows.rows == {}
    trace = load_trace(path)
    assert [entry["sequence"] for entry in trace.sequences] == [1, 2, 3]
    for item, prompt in zip(passages(trace), PROMPTS, strict=True):
        assert item.tokens[: len(prompt)].tolist() == prompt
        assert len(item) == len(prompt) + 5


@pytest.mark.parametrize(
    ("model_type", "execution"),
    [(name, way) for name in ("qwen3_moe", "switch_transformers") for way in ("host", "graph")],
)
@pytest.mark.parametrize("slots", [1, 5])
def test_predictions_change_no_token(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, model_type: str, execution: str, slots: int
) -> None:
    """A predictor that knows nothing of the model costs loads, never a token; encoder-decoder models too."""
    model = make_checkpoint(model_type)
    wild = generate(model, slots=slots, predictor=str(make_predictor(model)), execution=execution)
    assert wild == generate(model, slots="100%")


def graph_demands(llm: LLM) -> list[npt.NDArray[np.float64]]:
    """Collect the demand that a graph's steps expect, step by step, as they run."""
    demands: list[npt.NDArray[np.float64]] = []
    twin = llm._offloaded.handover.next_decoder().experts._twin
    expect = twin.expect

    def listen(*given: torch.Tensor) -> None:
        expect(*given)
        if int(twin.state.known):
            demands.append(twin.state.demand.cpu().numpy().copy())

    twin.expect = listen
    return demands


@pytest.mark.parametrize(
    "turns", [{"max_batch": 4}, {"max_batch": 1, "max_live": 3}, {"max_batch": 2, "max_live": 4, "schedule": "group"}]
)
def test_a_graph_expects_what_the_host_expects(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, turns: dict[str, object]
) -> None:
    """Step by step the same demand in both executions: prompts, sequences that end, padding, groups that take turns."""
    model = make_checkpoint("qwen3_moe")
    options = {"device": "cpu", "max_length": 48, "slots": 6, "predictor": str(make_predictor(model)), **turns}
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (12, 5, 9)]
    with LLM(model, **options, execution="host") as llm:
        demands = host_demands(llm)
        for _ in range(2):
            llm.generate(PROMPTS, params)
    with LLM(model, **options, execution="graph") as llm:
        again = graph_demands(llm)
        for _ in range(2):
            llm.generate(PROMPTS, params)
        assert llm.predictor_failure is None
    assert len(demands) == len(again) >= 22
    for place, (mine, theirs) in enumerate(zip(again, demands, strict=True)):
        np.testing.assert_allclose(mine, theirs, atol=5e-5, err_msg=f"step {place}")


def test_recall_is_what_demand_and_accesses_say(make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor) -> None:
    """Of the experts that steps with a forecast needed, those with a chance of half or more; on the GPU too, with and without a log."""
    model, params = make_checkpoint("qwen3_moe"), SamplingParams(max_tokens=12, ignore_eos=True)
    options = {"device": "cpu", "max_length": 48, "slots": "95%", "predictor": str(make_predictor(model))}
    known, events = {}, []
    with LLM(model, **options, execution="host") as llm:
        predict = llm._offloaded.live_predictor.outlook

        def outlook(step: Step) -> object:
            answer = predict(step)
            known[step.number] = None if answer is None else answer.demand[0]
            return answer

        llm._offloaded.live_predictor.outlook = outlook
        llm.events.subscribe(events.append)
        llm.generate(PROMPTS, params)
        llm._offloaded.controller.end_step()
        found = llm.stats.cache
    needed = [event for event in events if event.kind in (EventKind.HIT, EventKind.MISS)]
    chances = [known[one.step][one.layer, one.expert] for one in needed if known.get(one.step) is not None]
    assert (found.forecast, found.foreseen) == (len(chances), sum(chance >= 0.5 for chance in chances))
    assert 0 < found.foreseen < found.forecast < found.accesses
    assert found.late_steps == len({event.step for event in events if event.kind is EventKind.MISS})
    counted = None
    for listens in (False, True):
        with LLM(model, **options, execution="graph") as llm:
            if listens:
                llm.events.subscribe(events.append)
            for _ in llm.stream(PROMPTS, params):
                pass
            again = llm.stats.cache
            assert (again.forecast, again.foreseen) == (found.forecast, found.foreseen)
            assert again == (counted := counted or again), "events say what the GPU's totals say"
            assert 0 < again.late_steps < again.steps
            assert llm.look().result()[0].cache.recall == again.recall


@pytest.mark.parametrize(("model_type", "passes"), [("qwen3_moe", 1), ("switch_transformers", 2)])
@pytest.mark.parametrize("execution", ["host", "graph"])
def test_a_pass_is_learned_when_it_is_queued(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, model_type: str, passes: int, execution: str
) -> None:
    """On the device before anybody waits for the pass, an encoder's before the decoder's; in host memory once the tokens are out."""
    model = make_checkpoint(model_type)
    predictor = str(make_predictor(model))
    options = {
        "device": "cpu",
        "max_length": 48,
        "max_batch": 3,
        "slots": 6,
        "predictor": predictor,
        "execution": execution,
    }
    with LLM(model, **options) as llm:
        executor, live_predictor, seen = llm._engine._executor, llm._offloaded.live_predictor, []
        prefill, learn = executor.prefill, live_predictor.learn

        def learned(step: Step) -> None:
            seen.append(len(step.tokens))
            learn(step)

        def watched(pieces: Sequence[PromptChunk], *more: object) -> Tensor:
            logits = prefill(pieces, *more)
            seen.append("queued")
            return logits

        live_predictor.learn, executor.prefill = learned, watched
        llm.generate(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True))
        assert llm.predictor_failure is None
    unpadded = execution == "graph" and model_type == "qwen3_moe"
    width = sum(map(len, PROMPTS)) if unpadded else len(PROMPTS) * max(map(len, PROMPTS))
    both = [width, len(PROMPTS)][:passes]
    assert seen[: passes + 1] == ([*both, "queued"] if execution == "graph" else [*both[:-1], "queued", both[-1]])


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("turns", [{"max_batch": 4}, {"max_batch": 1, "max_live": 3}])
def test_a_pause_forgets_nothing(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, execution: str, turns: dict[str, int]
) -> None:
    """Nothing is predicted in a pause; after it the demand is what it would have been, once each sequence was updated."""
    model = make_checkpoint("qwen3_moe")
    options = {"device": "cpu", "max_length": 48, "slots": 6, "predictor": str(make_predictor(model)), **turns}
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (12, 5, 9)]

    def run(pauses: range) -> tuple[dict[int, npt.NDArray[np.float64]], object]:
        with LLM(model, **options, execution=execution) as llm:
            live_predictor, begins = llm._offloaded.live_predictor, [0]
            demands = host_demands(llm) if execution == "host" else graph_demands(llm)

            def loaded(*_: int) -> None:
                live_predictor.pacing.idle_steps = IDLE_STEPS if len(begins) in pauses else 0
                begins.append(len(demands))

            live_predictor.pacing.count = loaded
            tokens = [(output.index, output.token_id) for output in llm.stream(PROMPTS, params)]
            assert llm.predictor_failure is None
        ends = [*begins[1:], len(demands)]
        return {
            step: demands[begin] for step, (begin, end) in enumerate(zip(begins, ends, strict=True)) if end > begin
        }, tokens

    always, expected = run(range(0))
    paused, tokens = run(range(3, 7))
    assert tokens == expected
    lives = turns.get("max_live", 1)
    assert set(always) - set(paused) == set(range(3, 6 + lives))  # what came while paused is not predicted
    for step, demand in paused.items():
        np.testing.assert_allclose(demand[0], always[step][0], atol=5e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_it_counts_what_came_of_its_loads(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, monkeypatch: pytest.MonkeyPatch, execution: str
) -> None:
    """Loads, loads ahead and the needs those met, over all decode steps: what the events say."""
    monkeypatch.setattr("expertflow.live.pacing.IDLE_STEPS", 1 << 30)
    monkeypatch.setattr("expertflow.live.pacing.JUDGED_PREFETCHES", 1 << 30)
    model, counted, events = make_checkpoint("qwen3_moe"), [], []
    options = {"device": "cpu", "max_batch": 4, "max_length": 48, "slots": 12, "predictor": str(make_predictor(model))}
    with LLM(model, **options, execution=execution) as llm:
        live_predictor = llm._offloaded.live_predictor
        step = live_predictor._online.step

        def sure(*args: torch.Tensor) -> Prediction:
            """Three experts of every layer, whatever comes."""
            return Prediction(*(torch.arange(part.shape[-1]).lt(3).expand_as(part) * 0.95 for part in step(*args)))

        monkeypatch.setattr(live_predictor._online, "step", sure)
        llm._offloaded.events.subscribe(events.append)
        monkeypatch.setattr(live_predictor.pacing, "count", lambda *counts: counted.append(counts))
        llm.generate(PROMPTS, SamplingParams(max_tokens=24, ignore_eos=True))
        llm._offloaded.settle()
        llm._offloaded.controller.end_step()
    counted = [counts for counts in counted if len(counts) == 4]  # the device execution resumes it when it is made
    decoding = [event for event in events if event.step > 0]
    ahead = sum(event.kind is EventKind.PREFETCH for event in decoding)
    assert ahead > 0
    assert tuple(map(sum, zip(*counted, strict=True))) == (
        ahead + sum(event.kind is EventKind.MISS for event in decoding),
        23,
        ahead,
        sum(event.value for event in decoding if event.kind is EventKind.HIT),
    )


def test_a_predictor_whose_prefetches_are_not_needed_pauses(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor
) -> None:
    """Longer every time it fails again, and as at first once it has been right."""
    model = make_checkpoint("qwen3_moe")
    with LLM(model, device="cpu", slots=12, max_length=48, predictor=str(make_predictor(model))) as llm:
        live_predictor = llm._offloaded.live_predictor
        for wanted in (FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF, FIRST_BACKOFF, LONGEST_BACKOFF):
            if wanted == LONGEST_BACKOFF:
                live_predictor.pacing.last_backoff = LONGEST_BACKOFF
            live_predictor.pacing.count(9, 1, JUDGED_PREFETCHES - 1, 0)
            assert not live_predictor.pacing.paused
            live_predictor.pacing.count(9, 1, 1, 0)
            assert live_predictor.pacing.paused
            live_predictor.pacing.count(
                9, wanted - 1, 0, JUDGED_PREFETCHES
            )  # what was judged in vain and is found after all counts for nothing
            assert live_predictor.pacing.paused
            live_predictor.pacing.count(9)
            assert not live_predictor.pacing.paused
            if wanted == 4 * FIRST_BACKOFF:
                live_predictor.pacing.count(9, 1, JUDGED_PREFETCHES, JUDGED_PREFETCHES - 1)
                assert not live_predictor.pacing.paused


def test_new_captured_steps_begin_unpaused(make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor) -> None:
    """A new listener makes captured steps anew: their first step is not a paused one, which would leave kernels uncompiled."""
    model, pauses = make_checkpoint("qwen3_moe"), []
    options = {"device": "cpu", "execution": "graph", "max_length": 48, "predictor": str(make_predictor(model))}
    with LLM(model, slots=6, **options) as llm:
        for _ in range(2):
            llm.generate([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))
            pauses.append(llm._offloaded.handover.decoder.experts.paused)
            llm._offloaded.live_predictor.pacing.backoff = FIRST_BACKOFF
            llm._offloaded.events.subscribe(lambda _: None)
    assert pauses == [False, False]


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_a_misled_predictor_is_found_out(monkeypatch: pytest.MonkeyPatch, execution: str) -> None:
    """The shipped model's predictor, each layer's experts exchanged: it is paused, and loads far less than if it were not; the right one never is."""
    loads: dict[str, int] = {}
    for name in ("unnoticed", "found out", "right"):
        with monkeypatch.context() as patched:
            if name == "unnoticed":
                patched.setattr("expertflow.live.pacing.JUDGED_PREFETCHES", 1 << 30)
            options = {"slots": "25%", "device": "cpu", "max_batch": 1, "max_length": 96, "execution": execution}
            with LLM(**options) as llm:
                live_predictor = llm._offloaded.live_predictor
                if name != "right":
                    step = live_predictor._online.step
                    patched.setattr(
                        live_predictor._online,
                        "step",
                        lambda *args, step=step: type(right := step(*args))(*(part.flip(-1) for part in right)),
                    )
                output = llm.generate("The old house stood at the end of the lane, and", SamplingParams(max_tokens=40))
                loads[name] = llm.stats.cache.loads + llm.stats.cache.prefetched
                assert (live_predictor.pacing.last_backoff > 0) == (name == "found out")
                assert output[0].token_ids
    assert loads["right"] < loads["found out"] < 0.9 * loads["unnoticed"]


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_it_pauses_where_everything_is_resident(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, execution: str
) -> None:
    """A few steps without a load, and nothing is predicted until the next one; the scheduler goes by arrival."""
    model = make_checkpoint("qwen3_moe")
    options = {"max_batch": 2, "max_live": 4, "max_length": 48, "schedule": "group"}
    few, many = (
        LLM(model, device="cpu", slots=slots, predictor=str(make_predictor(model)), execution=execution, **options)
        for slots in (6, "95%")
    )
    for llm, pauses in ((few, False), (many, True)):
        with llm:
            demands = host_demands(llm) if execution == "host" else graph_demands(llm)
            for _ in range(2):
                before = len(demands)
                llm.generate(PROMPTS[2:], SamplingParams(max_tokens=16, ignore_eos=True))
            assert llm._offloaded.live_predictor.pacing.paused == pauses
            assert (len(demands) - before < 6) == pauses
            assert (llm._offloaded.live_predictor.paths([]) is None) == pauses


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_the_next_turns_are_known(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, execution: str
) -> None:
    """Where groups take turns, a step expects of the coming ones what those expect of themselves."""
    model = make_checkpoint("qwen3_moe")
    options = {"device": "cpu", "max_batch": 1, "max_live": 3, "max_length": 48, "slots": 6, "schedule": "fifo"}
    with LLM(model, **options, predictor=str(make_predictor(model)), execution=execution) as llm:
        demands = host_demands(llm) if execution == "host" else graph_demands(llm)
        llm.generate(PROMPTS, SamplingParams(max_tokens=9, ignore_eos=True))
        assert llm.predictor_failure is None
    assert len(demands) == 24
    for place in range(2, 20):  # two steps while the third prompt was read, one when it is alone
        for turn in (1, 2):
            np.testing.assert_allclose(demands[place][turn], demands[place + turn][0], atol=1e-5)
        assert np.abs(demands[place][3] - demands[place + 3][0]).max() > 1e-3  # its token is not known yet


@pytest.mark.parametrize("fails", [False, True])
def test_more_sequences_than_the_predictor_has_rows(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """Two full batches in turns, one of which loses a sequence, so that there is padding; also once it is switched off."""
    model = make_checkpoint("qwen3_moe")
    prompts = [*PROMPTS, [4, 5]]
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (9, 3, 7, 9)]
    options = {"device": "cpu", "max_batch": 4, "max_length": 48, "slots": 6, "execution": "graph"}
    with LLM(model, **options, predictor=str(make_predictor(model))) as llm:
        expected = [output.token_ids for output in llm.generate(prompts, params)]
        if fails:
            monkeypatch.setattr(llm._offloaded.live_predictor._online, "step", lambda *_: 1 / 0)
        streams, found = {number: llm.stream(prompts, params) for number in range(2)}, {0: {}, 1: {}}
        while streams:
            for number, stream in list(streams.items()):
                item = next(stream, None)
                if item is None:
                    del streams[number]
                elif item.output is not None:
                    found[number][item.index] = item.output.token_ids
        assert [[outputs[index] for index in range(4)] for outputs in found.values()] == [expected, expected]
        assert [output.token_ids for output in llm.generate(prompts, params)] == expected
        assert (llm.predictor_failure is not None) == fails


@pytest.mark.parametrize(
    ("room", "parts"),
    [(100, [[0, 2, 5]]), (4, [[0, 2], [5]]), (2, [[0], [2], [5], [5]]), (1, [[0]] * 2 + [[2]] * 2 + [[5]] * 3)],
)
def test_prompts_are_taken_in_parts_that_fit(room: int, parts: list[list[int]]) -> None:
    """Rows in as few parts as there is room for, each token once and in its order; as many rows together as there is room for."""
    owners = np.array([5, 0, NO_SEQUENCE, 2, 5, 2, NO_SEQUENCE, 5, 0])
    found = list(group_by_row(owners, room))
    assert [rows.tolist() for _, rows, _ in found] == parts
    for order, rows, counts in found:
        assert owners[order].tolist() == np.repeat(rows, counts).tolist()
    assert np.concatenate([order for order, _, _ in found]).tolist() == [1, 8, 3, 5, 0, 4, 7]
    assert not list(group_by_row(np.full(3, NO_SEQUENCE), room))


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_may_be_taken_in_in_parts(kind: str) -> None:
    """Three rows of 23, 9 and 1 tokens and padding, at once and 4 tokens at a time: state and last routes are the same."""
    artifact = _small(kind)
    generator = np.random.default_rng(3)
    rows = generator.permutation([0] * 23 + [2] * 9 + [1] + [NO_SEQUENCE] * 3)
    tokens, routes = generator.integers(0, 500, 36), generator.integers(0, 32, (36, 6, 4))
    found = []
    for room in (1 << 30, 4):
        online = OnlinePredictor(artifact, 3)
        last = torch.full((4, 6, 4), 32, dtype=torch.int32)
        take_in(online, last, rows, tokens, routes, room)
        found.append([*online.state, last])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts[:3], whole[:3])


def _small(kind: str) -> Artifact:
    config = PredictorConfig(kind=kind, layers=6, experts=32, top_k=4, vocabulary=500, width=32, embedding=16)
    shape = Shape(config.layers, config.experts, config.top_k)
    return Artifact(
        model=make(config).eval(), memory=remember((), shape, 500, 0),
        calibration=torch.ones(2 + SOURCES, OUTPUTS, config.layers, 1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_takes_no_more_than_is_planned(kind: str) -> None:
    """State and working memory of steps and prompts stay within what a planner counts beside the weights."""
    artifact = _small(kind)
    weights = [*artifact.model.state_dict().values(), *artifact.memory.state_dict().values(), artifact.calibration]
    meter = CpuMeter([])
    with torch.inference_mode(), meter.watch():
        online = OnlinePredictor(artifact, 8)
        rows, routes = torch.arange(4), torch.zeros(4, 6, 4, dtype=torch.long)
        for _ in range(3):
            online.step(rows, torch.arange(4), routes)
        online.observe(
            online.pieces([0, 3, 1], [40, 20, 4]),
            torch.arange(64),
            torch.zeros(64, *routes.shape[1:], dtype=torch.int32),
        )
    planned = OnlinePredictor.nbytes(artifact, 8, 4, 64) - sum(tensor.nbytes for tensor in weights)
    assert 0.2 * planned <= meter.peak_bytes <= planned


def test_chances_that_are_no_numbers_switch_the_predictor_off(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor
) -> None:
    """In a captured step nothing can raise: not-a-number is seen on the device, and the step goes on without a forecast."""
    model = make_checkpoint("qwen3_moe")
    expected, events = generate(model, slots="100%"), []
    options = {"device": "cpu", "max_batch": 4, "max_length": 48, "slots": 5, "predictor": str(make_predictor(model))}
    with LLM(model, **options, execution="graph") as llm:
        llm._offloaded.events.subscribe(events.append)
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (12, 5, 9)]
        llm._offloaded.live_predictor.artifact.calibration[:, 2] = torch.nan
        for _ in range(2):
            assert [tuple(output.token_ids) for output in llm.generate(PROMPTS, params)] == expected
        assert llm.predictor_failure == "its chances are no numbers"
    assert [event.kind for event in events].count(EventKind.PREDICTOR_OFF) == 1


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("method", ["step", "update", "observe"])
def test_a_predictor_that_raises_is_switched_off(
    make_checkpoint: MakeCheckpoint,
    make_predictor: MakePredictor,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
    execution: str,
) -> None:
    """One warning event, the reason in the summary's reach, and the same tokens."""
    model = make_checkpoint("qwen3_moe")
    expected = generate(model, slots="100%")
    events: list[Event] = []
    options = {"device": "cpu", "max_batch": 4, "max_length": 48, "slots": 5, "predictor": str(make_predictor(model))}
    with LLM(model, **options, execution=execution) as llm:
        online, count = llm._offloaded.live_predictor._online, [0]
        real = getattr(online, method)

        def broken(*args: object, **options: object) -> object:
            count[0] += 1
            if count[0] == call:
                raise RuntimeError("out of luck")
            return real(*args, **options)

        if method == "update":
            monkeypatch.setattr("expertflow.live.pacing.IDLE_STEPS", 0)  # it is always paused
        monkeypatch.setattr(online, method, broken)
        llm._offloaded.events.subscribe(events.append)
        params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (12, 5, 9)]
        outputs = [llm.generate(PROMPTS, params) for _ in range(3)][-1]
        assert [tuple(output.token_ids) for output in outputs] == expected
        assert llm._offloaded.live_predictor.failure == "RuntimeError: out of luck"
    assert [event.kind for event in events].count(EventKind.PREDICTOR_OFF) == 1
    assert [event.reason for event in events if event.reason] == ["RuntimeError: out of luck"]


def test_nothing_is_loaded_ahead_in_passes_over_prompts(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forecast is made for them; what certainty loads ahead in decode steps shows that one could have."""
    model = make_checkpoint("qwen3_moe")
    events: list[Event] = []
    with LLM(
        model,
        device="cpu",
        max_batch=4,
        max_length=48,
        slots=12,
        predictor=str(make_predictor(model)),
        execution="host",
    ) as llm:
        online = llm._offloaded.live_predictor._online
        layers, experts, _ = online.artifact.shape
        sure = torch.zeros(layers, experts)
        sure[:, :3] = 1.0
        monkeypatch.setattr(
            online,
            "step",
            lambda rows, *_: Prediction(sure.expand(len(rows), -1, -1), sure.expand(len(rows), 4, -1, -1)),
        )
        llm._offloaded.events.subscribe(events.append)
        llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True))
        assert llm.predictor_failure is None
    begins = [place for place, event in enumerate(events) if event.kind is EventKind.STEP]
    assert len(begins) == 4  # one pass, and three steps behind it
    ahead = [place for place, event in enumerate(events) if event.kind is EventKind.PREFETCH]
    assert ahead
    assert min(ahead) > begins[1]


def test_a_predictor_of_another_model_is_refused(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, tmp_path: Path
) -> None:
    """Other weights, other sizes, no fingerprint, a strategy without predictions, a folder that is none: refused before loading."""
    model = make_checkpoint("qwen3_moe")
    cases = [
        (make_predictor(model, fingerprint="0" * 16), None, PredictorError, "was made for tiny with fingerprint 0000"),
        (make_predictor(model, fingerprint=""), None, PredictorError, "does not say which checkpoint"),
        (SHIPPED_PREDICTOR, None, PredictorError, r"is for \(layers, experts, top-k\) = \(8, 32, 4\)"),
        (make_predictor(model), "lru", ConfigError, "'lru' does not use a predictor"),
        (tmp_path, None, PredictorError, "cannot be read"),
    ]
    for folder, strategy, error, message in cases:
        with pytest.raises(error, match=message):
            LLM(model, device="cpu", predictor=str(folder), strategy=strategy)


def test_the_models_own_predictor_is_used(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, tmp_path: Path
) -> None:
    """Found in the folder `predictor` of the checkpoint and used with plec, unless another strategy or no predictor is chosen."""
    model = make_checkpoint("qwen3_moe")
    own = tmp_path / "model"
    own.mkdir()
    for file in model.iterdir():
        (own / file.name).symlink_to(file)
    (own / "predictor").symlink_to(make_predictor(model))
    for options, strategy, used in (
        ({}, "plec", True),
        ({"strategy": "lru"}, "lru", False),
        ({"predictor": "none"}, "next-use", False),
    ):
        with LLM(own, device="cpu", **options) as llm:
            assert llm.plan.strategy == strategy
            assert (llm._offloaded.live_predictor is not None) == used


def test_the_shipped_model_comes_with_its_predictor() -> None:
    """It fits the shipped weights, and is what `prepare` chooses."""
    prepared = prepare(shipped_model(), EngineConfig(device="cpu"))
    assert prepared.predictor is not None
    assert prepared.plan.strategy == "plec"
    assert prepared.predictor.about["recall"] > 0.7


def test_a_fingerprint_is_of_the_weights(make_checkpoint: MakeCheckpoint) -> None:
    """The same weights in other shards have the same one; other weights of the same shape another."""
    model = make_checkpoint("qwen3_moe")
    sharded = make_checkpoint("qwen3_moe", shard="20KB")
    assert len({tensor.file for tensor in walk(sharded).values()}) > 1
    assert fingerprint(walk(model)) != fingerprint(walk(sharded)), "made with another seed"
    one = walk(model)
    assert fingerprint(dict(reversed(one.items()))) == fingerprint(one)
    assert fingerprint({**one, "more": next(iter(one.values()))}) != fingerprint(one)


def test_inputs_written_over_earlier_ones_equal_new_ones() -> None:
    """After any earlier step: other tokens of the same rows, more rows, fewer, groups, nothing."""
    batches = [
        PredictorBatch([3, 1], [7, 8], [[3, 1]]), PredictorBatch([3, 1], [9, 6], [[3, 1]]), PredictorBatch([3, 1], [5, 5], []),
        PredictorBatch([3, 1, 0], [4, 3, 2], [[3, 1], [0, 2]]), PredictorBatch([2], [1], [[2]]), None,
        PredictorBatch([3, 1], [7, 8], [[3, 1]]),
    ]  # fmt: skip
    inputs = PredictorInputs(3, 4, 4, torch.device("cpu"))
    for batch in batches:
        state_rows = [0] if batch is None else batch.updated
        fresh = PredictorInputs(3, 4, 4, torch.device("cpu"))
        for one in (inputs, fresh):
            one.write(state_rows, batch)
        count_updated = 0 if batch is None else len(batch.updated)
        count = int(fresh.turns[0])
        assert torch.equal(inputs.turns[: 2 + count], fresh.turns[: 2 + count])
        assert torch.equal(inputs.members[: fresh.turns[1 + count]], fresh.members[: fresh.turns[1 + count]])
        assert torch.equal(inputs.state_rows, fresh.state_rows)
        assert torch.equal(inputs.updated_rows, fresh.updated_rows)
        assert torch.equal(inputs.updated_tokens[:count_updated], fresh.updated_tokens[:count_updated])


def test_owners_of_joined_prompts() -> None:
    """Prompts of one pass, one behind the other: no padding."""
    owners = BatchOwners()
    owners.expect(NextBatch([8, 3, 5], [2, 3, 1], joined=True))
    assert owners.take(6).tolist() == [8, 8, 3, 3, 3, 5]


def test_owners_of_rows() -> None:
    """Left and right padding, passes of a prompt, decoding, and the decoder's first token behind an encoder."""
    owners = BatchOwners()
    owners.expect(NextBatch([4, 9], [2, 5]))
    assert owners.take(6).tolist() == [NO_SEQUENCE, NO_SEQUENCE, NO_SEQUENCE, 9, 9, 9]
    assert owners.take(4).tolist() == [4, 4, 9, 9]
    owners.expect(NextBatch([9]))
    assert owners.take(1).tolist() == [9]
    owners.expect(NextBatch([1, 2], [3, 1], padded_left=False))
    assert owners.take(6).tolist() == [1, 1, 1, 2, NO_SEQUENCE, NO_SEQUENCE]
    assert owners.take(2).tolist() == [1, 2]


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize(
    ("turns", "seed"), [({"max_batch": 3}, 0), ({"max_batch": 2, "max_live": 5, "schedule": "group"}, 1)]
)
def test_every_token_is_taken_in_once(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, execution: str, turns: dict[str, object], seed: int
) -> None:
    """Sequences come, leave and take turns, paused or not: the predictor's state holds each one's tokens, all but pending ones."""
    model = make_checkpoint("qwen3_moe")
    options = {"device": "cpu", "max_length": 48, "slots": 8, "prefill_chunk": 7, "execution": execution, **turns}
    random = np.random.default_rng(seed)
    with LLM(model, **options, predictor=str(make_predictor(model))) as llm:
        live_predictor, engine = llm._offloaded.live_predictor, llm.engine
        state, window, looked = live_predictor._online.state, live_predictor._online.artifact.config.window, 0

        def loaded(*_: int) -> None:
            live_predictor.pacing.idle_steps = IDLE_STEPS if random.random() < 0.5 else 0

        live_predictor.pacing.count = loaded
        for _ in range(120):
            if engine.unfinished < 6 and random.random() < 0.4:
                prompt = random.integers(3, 90, random.integers(1, 12)).tolist()
                engine.add(llm.request(prompt, SamplingParams(max_tokens=int(random.integers(1, 15)), ignore_eos=True)))
            if engine.unfinished and random.random() < 0.05:
                engine.cancel(int(random.integers(engine.begun)))
            engine.step()
            llm._offloaded.controller.end_step()  # a pass by the host is learned from behind it
            for number, row in live_predictor._rows.rows.items():
                request = engine._running[number].request
                tokens = [*request.prompt_token_ids, *request.token_ids]
                taken = int(state.taken[row])
                if request.token_ids:  # all of its prompt is read
                    looked += 1
                    assert taken in {len(tokens) - 1, len(tokens)}
                held = [int(state.tokens[row, place % window]) for place in range(max(0, taken - window), taken)]
                assert held == tokens[max(0, taken - window) : taken]
        assert llm.predictor_failure is None
    assert looked > 100


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_a_step_that_runs_again_takes_its_tokens_in_once(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, execution: str
) -> None:
    """A step breaks behind its last layer; its sequences step again, and the predictor has each token once."""
    model = make_checkpoint("qwen3_moe")
    options = {"device": "cpu", "max_length": 48, "slots": 8, "max_batch": 2, "execution": execution}
    with LLM(model, **options, predictor=str(make_predictor(model))) as llm:
        live_predictor, engine = llm._offloaded.live_predictor, llm.engine
        executor, steps = engine._executor, [0]
        decode = executor.decode

        def broken(fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> Tensor:
            steps[0] += 1
            logits = decode(fed, tokens)
            if steps[0] == 3:
                raise RuntimeError("out of luck")
            return logits

        executor.decode = broken
        numbers = [
            engine.add(llm.request(prompt, SamplingParams(max_tokens=9, ignore_eos=True))) for prompt in PROMPTS[:2]
        ]
        for _ in range(7):
            try:
                engine.step()
            except RuntimeError:
                assert steps[0] == 3
        assert steps[0] > 4
        assert llm.predictor_failure is None
        state = live_predictor._online.state
        for number, row in zip(numbers, live_predictor.state_rows(numbers), strict=True):
            request = engine._running[number].request
            tokens = [*request.prompt_token_ids, *request.token_ids]
            assert (engine.ahead.begun is not None) == (execution == "graph")
            tokens = tokens if execution == "graph" else tokens[:-1]  # the step that has begun took the newest one in
            assert state.tokens[row, : int(state.taken[row])].tolist() == tokens
