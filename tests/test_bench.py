"""Measuring: one schema of results, the same tokens under every strategy, bounds that nothing passes."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from expertflow import LLM
from expertflow.bench.measure import measure
from expertflow.bench.presets import PRESETS, Settings, make_settings
from expertflow.bench.recorded import RecordedGate, RecordedLayers, Recording, belady, fewest_loads
from expertflow.bench.result import (
    BELADY,
    COLD,
    DECODE,
    HIT,
    KEPT,
    KEPT_ALL,
    LONG,
    MOVED,
    PEAK,
    RESIDENT,
    WARM,
    WHOLE,
    Result,
    read_result,
    write_result,
)
from expertflow.bench.shared_host import Contender, Run, SharedHost
from expertflow.bench.workload import OPENINGS, read_prompt_set
from expertflow.cache.forecast import Step
from expertflow.cache.policy import Usage, layer_order
from expertflow.cache.strategy import STRATEGIES
from expertflow.cli.main import app
from expertflow.errors import BudgetError, ConfigError, ExpertFlowError, PromptError, ResultError
from helpers import MakeCheckpoint

STATES = 3


def small(folder: Path, **options: Any) -> Settings:
    """A run of seconds."""
    given = {
        "model": str(folder), "strategies": ("lru", "next-use"), "slots": ("50%",), "batches": (1, 2), "tokens": 4, "repeats": 1,
        "device": "cpu", "long_prompt": 0, **options,
    }  # fmt: skip
    return make_settings("paper", given)


def quiet(what: str, done: int, total: int) -> None:
    """Report no progress."""
    assert what
    assert 0 <= done <= total


@pytest.fixture(scope="module")
def result(make_checkpoint: MakeCheckpoint) -> Result:
    """Every kind of strategy on a small model, with a long prompt."""
    strategies = ("on-demand", "lru", "ring", "pregated", "next-use")
    return measure(
        small(make_checkpoint("qwen3_moe"), strategies=strategies, long_prompt=12, repeats=2),
        "expertflow bench ...",
        quiet,
    )


def test_a_result_survives_the_file(result: Result, tmp_path: Path) -> None:
    """What is written is read back, to the last field."""
    write_result(result, tmp_path / "a.json")
    again = read_result(tmp_path / "a.json")
    assert again == replace(result, config=json.loads(json.dumps(dict(result.config))))
    assert again.to_json() == result.to_json()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda text: text[: len(text) // 2], "no result file or is truncated"),
        (lambda _: "[1, 2]", "does not say 'expertflow-bench'"),
        (lambda text: text.replace('"version": 1', '"version": 9', 1), "version 9, this program reads 1"),
        (lambda text: text.replace('"link_gbps"', '"link"', 1), "lacks 'link_gbps'"),
        (lambda text: text.replace('"strategy": "lru"', '"strategy": 7', 1), r"strategy is 7, not str"),
        (lambda text: text.replace('"values"', '"value"', 1), r"row 0 .*lacks 'values'"),
        (lambda text: json.dumps({**json.loads(text), "rows": []}), "has no rows"),
        (lambda text: json.dumps({**json.loads(text), "seed": True}), "seed is True, not int"),
    ],
)
def test_damaged_and_foreign_files_are_refused(
    result: Result, tmp_path: Path, damage: Callable[[str], str], match: str
) -> None:
    """Each kind of damage is one clear error that names file and field."""
    path = tmp_path / "damaged.json"
    path.write_text(damage(result.to_json(indent=1)))
    with pytest.raises(ResultError, match=match):
        read_result(path)
    with pytest.raises(ResultError, match="cannot be read"):
        read_result(tmp_path / "none.json")


def test_every_configuration_has_its_rows(result: Result) -> None:
    """All strategies, slots and batches warm; the smallest batch also cold and behind a long prompt; bounds beside them."""
    assert result.complete
    assert not result.left_out
    warm = {(row.strategy, row.slots, row.batch) for row in result.rows if row.state == WARM}
    named = ("on-demand", "lru", "ring", "pregated", "next-use", BELADY)
    total = result.model.layers * result.model.experts
    assert warm == {(name, total // 2, batch) for name in named for batch in (1, 2)} | {
        (RESIDENT, total, 1), (RESIDENT, total, 2),
    }  # fmt: skip
    for state in (COLD, LONG):
        rows = [row for row in result.rows if row.state == state]
        assert {row.batch for row in rows} == {1}
        assert len(rows) == 5


def test_tokens_are_exact_and_the_peak_is_planned(result: Result) -> None:
    """Every run gives the all-resident model's tokens within its plan (laws 1 and 3)."""
    ran = [row for row in result.rows if row.execution != "replay"]
    assert all(row.exact for row in ran if row.strategy != RESIDENT)
    assert all(0 < row.figures[PEAK].median <= row.figures[PEAK].bound for row in ran)
    assert all(len(row.figures[DECODE].values) == 2 for row in ran if row.state == WARM and row.strategy != RESIDENT)


def test_no_strategy_passes_belady(result: Result) -> None:
    """Kept and moved stay on their side of the bound, whatever the slots held before."""
    rows = [row for row in result.rows if row.state == WARM and row.strategy not in {RESIDENT, BELADY}]
    assert len(rows) == 2 * 5
    for row in rows:
        for name in (KEPT, KEPT_ALL):
            assert np.mean(row.figures[name].values) <= row.figures[name].bound + 1e-6
        assert np.mean(row.figures[MOVED].values) >= row.figures[MOVED].bound - 1e-6


def test_a_strategy_with_other_tokens_is_noticed(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One wrong token of one strategy makes its rows, and no others, inexact."""
    run = Contender.run

    def wrong(self: Contender, prompts: Any, tokens: int) -> Run:
        right = run(self, prompts, tokens)
        if self.plan.strategy != "lru":
            return right
        first, *others = right.tokens
        return right._replace(tokens=((*first[:-1], first[-1] ^ 1), *others))

    monkeypatch.setattr(Contender, "run", wrong)
    made = measure(small(make_checkpoint("qwen3_moe"), batches=(1,)), "", quiet)
    judged = {row.strategy: row.exact for row in made.rows if row.state == WARM}
    assert judged == {"lru": False, "next-use": True, BELADY: None, RESIDENT: None}


def test_a_deadline_leaves_out_and_says_so(make_checkpoint: MakeCheckpoint) -> None:
    """Nothing new is begun behind the deadline; the result is incomplete and names what is missing."""
    made = measure(small(make_checkpoint("qwen3_moe"), deadline=1e-3), "", quiet)
    assert not made.complete
    assert made.left_out == ("slots 50%: the deadline",)


def test_a_full_device_is_measured_without_the_whole_model(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all experts do not fit, the result says so, on-demand loading gives the tokens, and the link alone bounds the speed."""
    contender = SharedHost.contender

    def full(self: SharedHost, strategy: str, slots: str, execution: str) -> Contender:
        if slots == "100%":
            raise BudgetError("the device is full", "Use less.", 1)
        return contender(self, strategy, slots, execution)

    monkeypatch.setattr(SharedHost, "contender", full)
    made = measure(small(make_checkpoint("qwen3_moe"), batches=(1,), repeats=2), "", quiet)
    assert made.left_out == ("resident: the device is full",)
    rows = [row for row in made.rows if row.strategy != BELADY]
    assert {row.strategy for row in rows} == {"lru", "next-use"}
    assert all(row.exact and row.figures[WHOLE].bound is None for row in rows)
    least = next(row for row in made.rows if row.strategy == BELADY).figures[MOVED].median
    for row in rows:
        figure = row.figures[DECODE]
        if row.state == WARM:
            assert figure.bound == pytest.approx(made.link_gbps * 1e3 / least, rel=1e-4)
            assert figure.bound_is == "Belady's bytes at the link's speed"
        else:
            assert figure.bound is None


def test_a_recorded_gate_answers_captured_steps(make_checkpoint: MakeCheckpoint) -> None:
    """A baseline that reads a recording runs in captured steps too, predicts the stated share of experts, and is exact."""
    settings = small(
        make_checkpoint("qwen3_moe"),
        strategies=("pregated", "lru"),
        batches=(1,),
        executions=("graph",),
        long_prompt=12,
    )
    made = measure(settings, "", quiet)
    warm = {row.strategy: row for row in made.rows if row.state == WARM}
    for name in ("pregated", "lru"):
        assert warm[name].execution == "graph"
        assert warm[name].exact
        assert warm[name].figures[DECODE].bound is not None
    assert "the same in 100% of the sequences" in warm["pregated"].note  # float32
    assert warm["pregated"].figures[HIT].median > max(0.6, warm["lru"].figures[HIT].median)


def test_a_model_without_predictor_has_no_plec_rows(make_checkpoint: MakeCheckpoint) -> None:
    """The strategy that a predictor serves is left out, with the reason, where there is none."""
    made = measure(small(make_checkpoint("qwen3_moe"), strategies=("plec", "lru"), batches=(1,)), "", quiet)
    assert "plec: the model has no predictor" in made.left_out
    assert {row.strategy for row in made.rows} == {"lru", BELADY, RESIDENT}


def test_encoder_decoders_are_measured(make_checkpoint: MakeCheckpoint) -> None:
    """Prompts that an encoder reads are no decoding steps: the recorded gate and the bounds still fit the runs."""
    executions, strategies = ("host", "graph"), ("pregated", "ring")
    settings = small(
        make_checkpoint("switch_transformers"), strategies=strategies, slots=("2/layer",), executions=executions
    )
    made = measure(settings, "", quiet)
    rows = [row for row in made.rows if row.strategy in strategies]
    assert len(rows) == 2 * STATES * 2
    assert all(row.exact for row in rows)
    warm = [row for row in rows if row.state == WARM and row.batch == 1]
    gates = {row.execution: row.figures[HIT].median for row in warm if row.strategy == "pregated"}
    assert gates["graph"] >= 0.6  # 85 % of what a layer uses is predicted
    assert gates["host"] >= 0.6


def test_models_beside_one_another_share_their_experts(make_checkpoint: MakeCheckpoint) -> None:
    """The second model reads the first one's rows, gives the same tokens, and leaves them there; other weights are refused."""
    folder = make_checkpoint("qwen3_moe")
    options = {"device": "cpu", "max_length": 32}
    with LLM(folder, slots=3, **options) as first:
        alone = first.generate("abc")[0].token_ids
        with LLM(folder, slots=5, strategy="lru", beside=first, **options) as second:
            assert second.generate("abc")[0].token_ids == alone
            assert second._offloaded.store is first._offloaded.store
        assert first.generate("abc")[0].token_ids == alone
        with pytest.raises(ConfigError, match="cannot share the experts"):
            LLM(make_checkpoint("mixtral"), beside=first, **options)


def test_fewest_loads_is_what_no_start_can_beat() -> None:
    """By hand: two slots, one expert a pass, a b a c a b; with a and b there at the start one load is left for c, one for b."""
    needed = np.zeros((6, 1, 3), dtype=bool)
    needed[np.arange(6), 0, [0, 1, 0, 2, 0, 1]] = True
    assert fewest_loads(needed, 2) == 2
    assert fewest_loads(needed, 3) == 0
    decode = np.array([False, True, True, False, True, True])
    recording = Recording(needed=needed, decode=decode)
    assert recording.runs == [slice(0, 3), slice(3, 6)]
    least = belady(recording, 1, 1)  # run 1: c, then a, b decoding: one of the three can be there at the start
    assert (least.kept, least.loads, least.kept_all) == (0.5, 0.5, pytest.approx(1 / 3))


def test_a_recorded_gate_follows_its_run() -> None:
    """It answers from the run's own passes wherever the engine's step numbers are, and knows nothing between runs."""
    needed = np.eye(3, dtype=bool)[:, None, :]
    gate = RecordedGate(recall=1.0, seed=0)
    assert gate.outlook(Step(4)) is None
    gate.follow(needed)
    for number in range(3):
        seen = gate.outlook(Step(10 + number))
        assert seen is not None
        np.testing.assert_array_equal(seen.demand[0], needed[number])
    assert gate.outlook(Step(13)) is None
    gate.follow(None)
    assert gate.outlook(Step(14)) is None


def test_a_ring_goes_round_the_layers_of_the_half_that_runs() -> None:
    """While the decoder's two layers run, all their experts are expected and none of the encoder's."""
    needed = np.zeros((2, 4, 3), dtype=bool)
    needed[0, :2, 1] = needed[1, 2:, 0] = True
    ring = RecordedLayers()
    ring.follow(needed)
    encoder, decoder = ring.outlook(Step(7)), ring.outlook(Step(8))
    assert encoder is not None
    assert decoder is not None
    np.testing.assert_array_equal(encoder.demand[0], np.array([[1.0] * 3] * 2 + [[0.0] * 3] * 2))
    np.testing.assert_array_equal(decoder.demand[0], np.array([[0.0] * 3] * 2 + [[1.0] * 3] * 2))
    ranks = layer_order(Usage(layers=4, experts=3), decoder)
    assert ranks.before[0].max() < ranks.before[3].min()  # the encoder's leave first


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"strategies": ("lrv",)}, "unknown strategy 'lrv'"),
        ({"strategies": (RESIDENT,)}, "is no strategy"),
        ({"strategies": ("oracle",)}, "is counted, not run"),
        ({"executions": ("eager",)}, "execution='eager' is unknown"),
        ({"batches": (0,)}, "batches=0 is too small"),
        ({"tokens": 1}, "tokens=1 is too small"),
        ({"slots": ()}, "nothing to measure"),
        ({"deadline": 0.0}, "is no time"),
        ({"token": 4}, "unknown option 'token'.*'tokens'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], match: str) -> None:
    """Each is one error that names option and value."""
    with pytest.raises(ConfigError, match=match):
        make_settings("quick", options)


def test_presets_are_possible() -> None:
    """Every preset stands for itself, and an unknown one names the nearest."""
    assert all(make_settings(name, {}) == preset for name, preset in PRESETS.items())
    with pytest.raises(ConfigError, match="'quick'"):
        make_settings("quik", {})


def test_prompts_come_from_texts_and_ids(tmp_path: Path) -> None:
    """JSON lines may hold ids; runs take other prompts as long as there are enough; damage names the line."""
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": [number, number]}) for number in range(1, 7)))
    workload = read_prompt_set(path, None, long_prompt=5, seed=0)
    seen = [prompt for run in range(3) for prompt in workload.batch(2, run)]
    assert sorted(seen) == [(number, number) for number in range(1, 7)]
    assert len(workload.long) == 5
    path.write_text('{"text": "a"}')
    with pytest.raises(PromptError, match="line 1 has neither"):
        read_prompt_set(path, None, long_prompt=0, seed=0)
    with pytest.raises(PromptError, match="no tokenizer"):
        read_prompt_set(None, None, long_prompt=0, seed=0)
    assert len(set(OPENINGS)) == len(OPENINGS) >= 32


def test_the_command_ends_with_one_line_of_json(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A table for people, then the whole result as the last line, the same as in the file; no path of this machine in it."""
    out, began = tmp_path / "r.json", time.perf_counter()
    arguments = [
        "bench", "--preset", "quick", "--model", make_checkpoint("qwen3_moe"), "--strategies", "lru,next-use", "--slots", "50%",
        "--batches", "1", "--tokens", "3", "--repeats", "1", "--deadline", "60", "--device", "cpu", "--out", out,
    ]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    *table, last = done.stdout.strip().splitlines()
    document = json.loads(last)
    assert document == json.loads(out.read_text())
    assert str(tmp_path.parent) not in last
    assert document["command"].endswith("--deadline 60.0 --device cpu --out r.json")
    assert any("next-use" in line for line in table)
    assert document["seconds"] < time.perf_counter() - began


def test_bad_options_end_before_anything_is_loaded(tmp_path: Path) -> None:
    """A wrong number, an impossible folder, too few slots."""
    for words, match in (
        (["--batches", "two"], "batches='two'"),
        (["--out", tmp_path / "none" / "r.json"], "does not exist"),
        (["--model", tmp_path / "none"], "is not a folder"),
    ):
        with pytest.raises(ExpertFlowError, match=match):
            CliRunner().invoke(app, ["bench", *map(str, words)], catch_exceptions=False)


def test_too_few_slots_are_refused(make_checkpoint: MakeCheckpoint) -> None:
    """A token's own experts have to fit."""
    with pytest.raises(ConfigError, match="a token uses 2 experts a layer"):
        measure(small(make_checkpoint("qwen3_moe"), slots=("1",)), "", quiet)


def test_strategies_of_the_presets_are_in_the_table() -> None:
    """A renamed entry is noticed."""
    assert {name for preset in PRESETS.values() for name in preset.strategies} <= set(STRATEGIES)
