"""Predictions measured: guesses, unions, calibration, free baselines, and predictions as demand of the simulator."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertflow.cache.core import LOG, PREFETCH, fill_slot, make_tables
from expertflow.cache.forecast import Recorded, Step
from expertflow.cache.horizon import hazards, take_turns, unite
from expertflow.cache.policy import DISCOUNT, HIDDEN, Outlook, Usage, belady, discounted_use, next_use
from expertflow.cache.prefetch import open_step
from expertflow.cache.strategy import STRATEGIES
from expertflow.cli.eval_predictor import show as show_evaluation
from expertflow.cli.record_bytes import Record
from expertflow.errors import ConfigError, TraceError
from expertflow.predict.dataset import Passage, Shape, passages, shape_of, used
from expertflow.predict.evaluation import report
from expertflow.predict.evaluation.baselines import BASELINES, Recent
from expertflow.predict.evaluation.evaluate import WITHIN, Evaluation, evaluate, happens_within, take_places
from expertflow.predict.evaluation.report import draw
from expertflow.sim.clock import Cost
from expertflow.sim.predicted import PredictedRows, RowScores
from expertflow.sim.replay import Outcome, replay
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import Trace
from expertflow.types import HORIZONS

Scores = np.ndarray


@pytest.fixture(scope="module")
def items(real: Trace) -> list[Passage]:
    return passages(real)


@pytest.fixture(scope="module")
def shape(real: Trace) -> Shape:
    return shape_of(real)


def truth_of(item: Passage, experts: int) -> Scores:
    """`[n, 5, L, E]` the recording in the form of a prediction; behind the end nothing is used."""
    marks = used(item.routes, experts)
    padded = np.concatenate([marks, np.zeros((max(HORIZONS), *marks.shape[1:]), dtype=bool)])
    return np.stack([happens_within(padded, h)[: len(item)] for h in WITHIN], axis=1).astype(np.float32)


def small(count: int, seed: int, length: int = 30) -> tuple[list[Passage], list[Scores], Shape]:
    """Random passages of 3 layers x 6 experts, and random probabilities of 5 outputs for them."""
    random, shape = np.random.default_rng(seed), Shape(3, 6, 2)
    found = []
    for number in range(count):
        routes = random.permuted(np.tile(np.arange(6), (length + number, 3, 1)), axis=2)[..., :2]
        tokens = random.integers(-1, 9, length + number)
        found.append(Passage(tokens, routes, np.arange(length + number), {}))
    return found, [random.random((len(item), 5, 3, 6)).astype(np.float32) for item in found], shape


def test_recall_and_precision_are_those_of_a_plain_count() -> None:
    """At every m, recall and precision of tokens with a known id agree with counting guess by guess."""
    found, chances, shape = small(2, 1)
    result = evaluate("random", chances, found, shape, batches=(1,))
    for m in range(1, 7):
        right = total = needed = 0
        for item, scores in zip(found, chances, strict=True):
            for place in np.flatnonzero(item.tokens >= 0):
                for layer in range(3):
                    guess = set(np.argsort(-scores[place, 0, layer])[:m].tolist())
                    right += len(guess & set(item.routes[place, layer].tolist()))
                    total, needed = total + m, needed + 2
        assert result.guesses.recall[m - 1] == pytest.approx(right / needed)
        assert result.guesses.precision[m - 1] == pytest.approx(right / total)
    assert result.tokens == sum(int((item.tokens >= 0).sum()) for item in found)
    assert result.guesses.recall[-1] == 1
    assert np.mean(result.layer_recall) == pytest.approx(result.guesses.recall[1])


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_accuracy_is_that_of_plain_unions(batch: int) -> None:
    """Recall and precision of united guesses, by threshold and by guesses a token, agree with sets."""
    found, chances, shape = small(4, 2)
    united = evaluate("random", chances, found, shape, batches=(batch,)).batches[0]
    scores = np.concatenate([item[:, 0] for item in chances])
    routes = np.concatenate([item.routes for item in found])
    members = take_places([len(item) for item in found], batch)
    limit = united.thresholds.limit[600]
    sums = np.zeros((2, 3))
    for rows in members:
        for layer in range(3):
            truth = set(routes[rows, layer].ravel().tolist())
            loud = {e for e in range(6) if 1 - np.prod(1 - scores[rows, layer, e]) > limit}
            best = {e for row in rows for e in np.argsort(-scores[row, layer])[:2].tolist()}
            for line, guess in enumerate((loud, best)):
                sums[line] += len(truth & guess), len(truth), len(guess)
    for (right, needed, named), curve, point in zip(sums, (united.thresholds, united.guesses), (600, 1), strict=True):
        assert curve.recall[point] == pytest.approx(right / needed, abs=2e-3)
        assert curve.precision[point] == pytest.approx(right / named, abs=2e-3)


def test_the_corner_is_the_best_point_that_fulfils_it() -> None:
    """With the truth as prediction both corners are 1; a curve that misses the corner gives 0."""
    found, _, shape = small(2, 3)
    exact = evaluate("truth", [truth_of(item, 6) for item in found], found, shape, batches=(1, 2))
    for united in exact.batches:
        assert united.thresholds.precision_at(0.95) == united.thresholds.recall_at(0.7) == 1
    constant = evaluate("half", [np.full((len(i), 1, 3, 6), 0.5) for i in found], found, shape, batches=(1,))
    assert constant.batches[0].thresholds.recall_at(0.7) == 0
    assert constant.batches[0].thresholds.precision_at(0.95) == pytest.approx(1 / 3)


def test_exact_probabilities_are_calibrated_and_squared_ones_are_not() -> None:
    """Routes drawn with known chances: the error is near 0 for those chances and large for their squares."""
    random, shape = np.random.default_rng(0), Shape(2, 8, 8)
    chance = random.random((4000, 2, 8)).astype(np.float32)
    marks = random.random(chance.shape) < chance
    routes = np.where(marks, np.arange(8), 8)
    item = Passage(np.zeros(4000, dtype=np.int64), routes, np.arange(4000), {})
    exact, wrong = (evaluate("x", [p[:, None]], [item], shape, (1,)).calibration[0] for p in (chance, chance**2))
    assert exact.error < 0.01
    assert wrong.error == pytest.approx(1 / 6, abs=0.01)  # the mean of p - p^2
    assert sum(exact.weight) == pytest.approx(1)


def test_horizons_are_measured_against_what_followed(items: list[Passage], shape: Shape) -> None:
    """The truth as prediction is calibrated at every horizon; shifted by one step it is not."""
    right = [truth_of(item, shape.experts) for item in items]
    exact = evaluate("truth", right, items, shape, batches=(1, 4))
    assert [item.within for item in exact.calibration] == [0, 1, 2, 4, 8]
    assert all(item.error == 0 for item in exact.calibration)
    assert exact.next_guesses is not None
    assert exact.next_guesses.recall[shape.top_k - 1] == 1
    late = evaluate("late", [np.roll(scores, 1, axis=0) for scores in right], items, shape, batches=(1,))
    assert min(item.error for item in late.calibration) > 0.01


def test_results_turn_into_plain_json(items: list[Passage], shape: Shape) -> None:
    """What is written says the headline figures, and misfits are refused."""
    result: Evaluation = evaluate("truth", [truth_of(item, shape.experts) for item in items], items, shape, (1, 100))
    written = result.as_json()
    assert written["headline"]["recall@4"] == 1
    assert len(written["batches"][0]["thresholds"]["recall"]) == 100
    assert len(written["batches"]) == 1  # 100 places cannot be filled
    with pytest.raises(ConfigError, match="do not fit"):
        evaluate("short", [np.zeros((3, 1, 24, 32))] * len(items), items, shape)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    """A PNG of several sources; a name that is no picture is refused."""
    found, chances, shape = small(4, 4)
    results = [evaluate(name, chances, found, shape, batches=(1, 4)) for name in ("one", "two")]
    draw(results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(results, tmp_path / "x.nothing")


@pytest.mark.parametrize("sizes", [(), (1,), (1, 4, 16)])
def test_the_legend_lies_inside_the_picture(
    sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every source is named in full, whatever the number of panels; the line below says of what it is."""
    seen: list[tuple[Any, str]] = []
    monkeypatch.setattr(report, "save_picture", lambda figure, _, about, **__: seen.append((figure, about)))
    found, chances, shape = small(16, 4)
    draw(
        [evaluate(name, chances, found, shape, batches=sizes) for name in ("predictor", *BASELINES)],
        tmp_path / "x",
        "of what",
    )
    ((figure, about),) = seen
    figure.draw_without_rendering()
    (legend,), box = figure.legends, figure.bbox
    place = legend.get_window_extent()
    assert box.x0 <= place.x0 < place.x1 <= box.x1
    assert box.y0 <= place.y0 < place.y1 <= box.y1
    assert [text.get_text() for text in legend.get_texts()] == ["predictor", *BASELINES]
    assert about == "of what"


def test_the_tables_of_an_evaluation_fit_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three sizes of batches and the longest names, no line is longer and no cell is cut off."""
    monkeypatch.setenv("COLUMNS", "80")
    random, shape = np.random.default_rng(0), Shape(1, 16, 2)
    routes = random.permuted(np.tile(np.arange(16), (10, 1, 1)), axis=2)[..., :2]
    found = [Passage(np.arange(10), routes, np.arange(10), {})] * 16
    chances = [random.random((10, 5, 1, 16)).astype(np.float32)] * 16
    show_evaluation([evaluate(name, chances, found, shape) for name in BASELINES], [], Record(1, "assumed"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "\u2026" not in out
    assert all(name in out for name in BASELINES)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_knows_only_the_past(name: str, items: list[Passage], shape: Shape) -> None:
    """Scores are probabilities, better than chance, and blind to everything after the token (or its layer)."""
    baseline = BASELINES[name]()
    baseline.fit(items[1:], shape)
    item, half = items[0], len(items[0]) // 2
    scores = baseline.scores(item)
    assert scores.shape == (len(item), shape.layers, shape.experts)
    assert scores.dtype == np.float32
    assert scores.min() >= 0
    assert scores.max() <= 1
    other = Passage(item.tokens.copy(), item.routes.copy(), item.rows, item.about)
    other.tokens[half + 1 :] = -1
    other.routes[half:] = (other.routes[half:] + 5) % shape.experts
    last = 1 if name == "previous layer" else shape.layers  # the one source that sees this step's layer below
    np.testing.assert_array_equal(baseline.scores(other)[: half + 1, :last], scores[: half + 1, :last])
    recall = evaluate(name, [scores[:, None]], [item], shape, (1,)).guesses.recall[shape.top_k - 1]
    assert recall > shape.top_k / shape.experts * 1.5


def test_the_mix_is_the_strongest_free_baseline(items: list[Passage], shape: Shape) -> None:
    """On unseen sequences the mix finds more than any single source, and the passage's own past helps it."""
    recall = {}
    for name, make in BASELINES.items():
        baseline = make()
        baseline.fit(items[3:], shape)
        scores = [baseline.scores(item)[:, None] for item in items[:3]]
        recall[name] = evaluate(name, scores, items[:3], shape, (1,)).guesses.recall[shape.top_k - 1]
    single = [value for name, value in recall.items() if "mix" not in name and name != "previous layer"]
    assert recall["mix with context"] > recall["mix"] > max(single)


def test_the_previous_tokens_experts_come_first() -> None:
    """By hand: the last token's experts, then the others by frequency; before the first token only frequency."""
    routes = np.array([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]]])
    item = Passage(np.zeros(4, dtype=np.int64), routes, np.arange(4), {})
    baseline = Recent(1)
    baseline.fit([item, item], Shape(1, 4, 2))
    scores = baseline.scores(item)[:, 0]
    assert np.argmax(scores[0]) == 0
    assert [set(np.argsort(-row)[:2].tolist()) for row in scores[1:]] == [{0, 1}, {0, 1}, {0, 2}]
    # used by the token before and used again: 10 of 12 chances; not used before: 6 of 20; one chance more at the mean
    assert scores[1, 0] == pytest.approx(0.999 * (10 + 0.5) / (12 + 1) + 0.001 * 1, abs=1e-6)
    assert scores[1, 3] == pytest.approx(0.999 * (6 + 0.5) / (20 + 1), abs=1e-6)


def test_hazards_are_chances_given_no_use_before() -> None:
    """By hand: 1 - S1, 1 - S2/S1, twice 1 - sqrt(S4/S2), four times 1 - (S8/S4)^(1/4); falling chances are levelled."""
    chances = np.array([0.3, 0.2, 0.5, 0.6, 0.9]).reshape(5, 1, 1)
    third, fifth = 1 - np.sqrt(0.4 / 0.5), 1 - (0.1 / 0.4) ** 0.25
    expected = [0.3, 0.2, 1 - 0.5 / 0.8, third, third, fifth, fifth, fifth, fifth]
    np.testing.assert_allclose(hazards(chances).ravel(), expected)
    falling = hazards(np.array([0.3, 0.5, 0.4, 0.4, 0.4]).reshape(5, 1, 1)).ravel()
    np.testing.assert_allclose(falling, [0.3, 0.5, *[0] * 7])
    assert hazards(chances[:1]).shape == (1, 1, 1)
    np.testing.assert_allclose(unite(np.array([[0.5], [0.2], [0.0]])), [0.6])


def recorded_scores(trace: Trace) -> RowScores:
    found = passages(trace)
    rows = np.concatenate([item.rows for item in found])
    return RowScores(rows=rows, probabilities=np.concatenate([truth_of(item, 32) for item in found]).astype(np.float16))


@pytest.mark.parametrize("batch", [1, 4])
def test_predicting_the_truth_is_knowing_it(batch: int, real: Trace) -> None:
    """Hazards of the true future name the steps that the recording names, as far as it lies in the same sequences."""
    workload = live_sequences(real, batch)
    forecast, known = PredictedRows(workload, recorded_scores(real)), Recorded(workload.needed, 2)
    ends = np.flatnonzero(np.diff(real.rows.sequence[workload.members], axis=0).any(axis=1))
    compared = 0
    for number in range(0, len(workload) - 10, 7):
        if np.any((ends >= number) & (ends < number + 8)):
            continue
        predicted, true = forecast.outlook(Step(number)), known.outlook(Step(number))
        assert predicted is not None
        assert true is not None
        assert predicted.demand.shape[0] == 9
        np.testing.assert_array_equal(predicted.demand[:2], true.demand[:2])
        new = true.demand[1] == 0
        np.testing.assert_array_equal(predicted.demand[2][new], true.demand[2][new])
        within = (predicted.demand[1:] > 0.5).any(axis=0)
        np.testing.assert_array_equal(within, workload.needed[number + 1 : number + 9].any(axis=0))
        compared += 1
    assert compared > 5


def test_the_truth_as_prediction_keeps_what_the_recording_keeps(real: Trace) -> None:
    """For one sequence, retention with the true horizon lies within a point of that with 8 recorded steps."""
    workload = live_sequences(real, 1)
    strategy = replace(STRATEGIES["next-use"], policy=discounted_use)
    predicted = replay(workload, strategy, 192, Cost(), forecast=PredictedRows(workload, recorded_scores(real)))
    known = replay(workload, strategy, 192, Cost(), forecast=Recorded(workload.needed, 8))
    assert predicted.kept_ratio == pytest.approx(known.kept_ratio, abs=0.01)


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_know_each_others_next_step(groups: int, real: Trace) -> None:
    """The planes of groups that take turns are the steps that come: own, the others', then own again."""
    workload = live_sequences(real, 6, groups)
    forecast = PredictedRows(workload, recorded_scores(real))
    outlook = forecast.outlook(Step(12))
    assert outlook is not None
    assert outlook.demand.shape[0] == 9
    for ahead in range(2 * groups):
        np.testing.assert_array_equal(outlook.demand[ahead] > 0.5, workload.needed[12 + ahead], err_msg=str(ahead))
    last = forecast.outlook(Step(len(workload) - 1))
    assert last is not None
    assert last.demand.shape[0] == 9  # no turn comes after
    assert forecast.outlook(Step(len(workload))) is None
    planes = take_turns([np.full((2, 1, 1), 1.0), np.full((2, 1, 1), 2.0)])
    assert planes.ravel().tolist() == [1, 2, 1, 2]


def test_predictions_that_do_not_fit_are_refused(real: Trace) -> None:
    """Missing rows, another model's shape, a malformed array: errors that say so."""
    workload, scores = live_sequences(real, 2), recorded_scores(real)
    part = RowScores(rows=scores.rows[:-5], probabilities=scores.probabilities[:-5])
    with pytest.raises(TraceError, match=r"5 of the .* rows to replay have no prediction"):
        PredictedRows(live_sequences(real, 1), part)
    with pytest.raises(TraceError, match=r"\[24, 16\] layers and experts"):
        PredictedRows(workload, RowScores(rows=scores.rows, probabilities=scores.probabilities[..., :16]))
    with pytest.raises(TraceError, match="unusable"):
        RowScores(rows=scores.rows[:4], probabilities=scores.probabilities)


def rank_of(policy: Callable[..., object], demand: Scores) -> Scores:
    """Ranks of one layer's experts before and after a step, nothing observed."""
    usage = Usage(layers=1, experts=demand.shape[-1])
    return np.stack(policy(usage, Outlook(demand[:, None])))[:, 0]


def test_discounted_use_prefers_soon_or_never_to_later() -> None:
    """Used next step with chance .5 and else never is worth more than a certain use in four steps; expected gaps differ."""
    demand = np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    before, *_ = rank_of(discounted_use, demand)
    assert before[0] > before[1]
    assert before[0] == pytest.approx(-np.log(0.5 * DISCOUNT) / np.log(DISCOUNT), rel=1e-2)
    assert before[1] == pytest.approx(-4)
    assert rank_of(next_use, demand)[0, 0] < rank_of(next_use, demand)[0, 1]


def test_with_the_whole_future_the_least_discounted_is_beladys() -> None:
    """On certain demand the order of ranks is that of next uses."""
    random = np.random.default_rng(5)
    demand = (random.random((9, 12)) < 0.3).astype(float)
    demand[-1] = 1
    usage = Usage(layers=1, experts=12)
    later = np.argmax(demand[1:] > 0, axis=0).astype(float)[None]
    known = belady(usage, Outlook(demand[:1, None], later))
    found = discounted_use(usage, Outlook(demand[:, None]))
    np.testing.assert_allclose(found.before, known.before, atol=1e-9)
    np.testing.assert_allclose(found.used, known.used, atol=1e-9)


def test_a_load_ahead_pays_only_above_its_victims_worth() -> None:
    """The limit is the rank of a certain use worth p * HIDDEN - (1 - p), and no victim may be worth more than the load."""
    demand = np.array([[1.0, 0.9, 1 / (1 + HIDDEN), 0.2]])
    planes = rank_of(discounted_use, demand)
    before, limit = planes[0], planes[3]
    assert (limit <= before).all()
    assert DISCOUNT ** -limit[0] == pytest.approx(HIDDEN)
    assert DISCOUNT ** -limit[1] == pytest.approx(0.9 * HIDDEN - 0.1)
    assert (limit[2:] < -40).all()  # worth nothing: no expert leaves for it


def test_a_horizon_moves_fewer_bytes(real: Trace) -> None:
    """With the true horizon plec loads a tenth less than with this step alone or token counts, and wastes nothing."""
    scores = recorded_scores(real)
    step = RowScores(rows=scores.rows, probabilities=scores.probabilities[:, :1])
    for batch in (1, 4):
        workload: Workload = live_sequences(real, batch)
        forecasts = (PredictedRows(workload, scores), PredictedRows(workload, step), None)
        found: list[Outcome] = [replay(workload, STRATEGIES["plec"], 192, Cost(), forecast=f) for f in forecasts]
        assert found[0].loads < 0.9 * min(found[1].loads, found[2].loads)
        assert found[0].wasted == 0


@pytest.mark.parametrize("worth", [0.05, 0.5])
def test_the_plan_asks_for_its_victims_worth(worth: float) -> None:
    """With every slot taken, a certain expert is loaded ahead if the least worthy resident is worth less than it hides."""
    tables = make_tables(2, 3, 3, divided=False)
    for slot in range(3):
        fill_slot(tables, 0, slot, slot)
    demand = np.full((2, 2, 3), 0.0)
    demand[0, 1, 0] = 1  # layer 1's first expert is sure to be used
    demand[:, 0] = 1, 0.5, 0
    demand[1, 0, 2] = worth / DISCOUNT  # layer 0's last one is not, and worth that much
    planes = discounted_use(Usage(layers=2, experts=3), Outlook(demand))
    rules = STRATEGIES["plec"].rules(2, 3)._replace(reserve=1)
    open_step(tables, planes, demand[0], rules)
    loaded = tables.log[: tables.cursor[LOG]]
    assert [row[1:3].tolist() for row in loaded if row[0] == PREFETCH] == ([[1, 0]] if worth < HIDDEN else [])
