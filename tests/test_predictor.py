"""The routing path predictor: its two forms agree, it learns, it is stored, refused, and served row by row."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cli import eval_predictor, evaluation, train_predictor
from expertflow.errors import ConfigError, PredictorError, TraceError
from expertflow.predict.artifact import WEIGHTS_NAME, Artifact, load_artifact, save_artifact
from expertflow.predict.calibration import Scored, calibrate, weigh
from expertflow.predict.counts import SOURCES, Memory, remember
from expertflow.predict.dataset import Passage, Shape, leave_out, passages, split, windows
from expertflow.predict.evaluation.score import score
from expertflow.predict.kinds import KINDS, make
from expertflow.predict.model import TokenTable, multi_hot
from expertflow.predict.network import OUTPUTS, PredictorConfig
from expertflow.predict.online import OnlinePredictor
from expertflow.predict.options import ABOUT_NAME, TrainConfig
from expertflow.predict.state import Pieces
from expertflow.predict.train import Epoch, labels, train
from expertflow.trace.format import Header, Rows, Trace, load_trace
from expertflow.types import HORIZONS
from helpers import EXCERPT, PREDICTOR_SIZES, make_trace, random_artifact, random_predictor

CPU = torch.device("cpu")


def random_text(length: int, seed: int = 0, batch: int = 1, **sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T]` tokens, some unknown, and `[B, T, L, K]` routes."""
    given_sizes = {**PREDICTOR_SIZES, **sizes}
    random = np.random.default_rng(seed)
    tokens = random.integers(-1, given_sizes["vocabulary"], (batch, length))
    every = np.tile(np.arange(given_sizes["experts"]), (batch, length, given_sizes["layers"], 1))
    return torch.from_numpy(tokens), torch.from_numpy(random.permuted(every, axis=3)[..., : given_sizes["top_k"]])


@pytest.mark.parametrize("kind", KINDS)
@given(length=st.integers(1, 140), seed=st.integers(0, 99))
@settings(max_examples=5)
def test_step_by_step_is_the_whole_sequence(kind: str, length: int, seed: int) -> None:
    """`feed`, from its state, gives the logits that `forward` gives from the whole past; rings wrap on the way."""
    model = random_predictor(kind, seed)
    tokens, routes = random_text(length, seed, batch=2)
    with torch.inference_mode():
        whole = model(tokens, routes)
        state, rows = model.fresh(5, CPU), torch.tensor([3, 1])
        before = torch.full_like(routes[:, 0], 8)
        for place in range(length):
            predicted = model.feed(state, rows, tokens[:, place], before)
            torch.testing.assert_close(predicted, whole[:, place], atol=2e-3, rtol=2e-3)
            before = routes[:, place]


@pytest.mark.parametrize("kind", KINDS)
def test_noting_is_feeding_without_an_answer(kind: str) -> None:
    """Bit for bit the same state, also where the ring wraps."""
    model = random_predictor(kind)
    tokens, routes = random_text(80, batch=2)
    fed, noted, rows = model.fresh(5, CPU), model.fresh(5, CPU), torch.tensor([3, 1])
    with torch.inference_mode():
        for place in range(80):
            given = rows, tokens[:, place], routes[:, place - 1] if place else torch.full_like(routes[:, 0], 8)
            model.feed(fed, *given)
            model.update(noted, *given)
    assert fed.taken.any()
    assert all(torch.equal(*pair) for pair in zip(fed, noted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_is_not_seen(kind: str) -> None:
    """What a token's step uses, and everything later, changes nothing of what is predicted before it."""
    model = random_predictor(kind)
    tokens, routes = random_text(100)
    other_tokens, other_routes = random_text(100, seed=5)
    place = 60
    changed = torch.cat([tokens[:, : place + 1], other_tokens[:, place + 1 :]], dim=1)
    rerouted = torch.cat([routes[:, :place], other_routes[:, place:]], dim=1)
    with torch.inference_mode():
        first, second = model(tokens, routes), model(changed, rerouted)
    torch.testing.assert_close(first[:, : place + 1], second[:, : place + 1])
    assert not torch.allclose(first[:, place + 1 :], second[:, place + 1 :])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(1, 40), (3, 20, 40), (40,), (17, 33, 34, 40)])
def test_absorbing_is_many_steps(kind: str, cuts: tuple[int, ...]) -> None:
    """Taking a prompt in at once, or in passes of any length, leaves the state that single steps leave."""
    model = random_predictor(kind)
    tokens, routes = random_text(40)
    before = torch.cat([torch.full_like(routes[0, :1], 8), routes[0, :-1]])
    one, many = model.fresh(2, CPU), model.fresh(2, CPU)
    with torch.inference_mode():
        for place in range(40):
            model.feed(one, torch.tensor([1]), tokens[0, place : place + 1], before[place : place + 1])
        for begin, end in zip((0, *cuts), cuts, strict=False):
            pieces = Pieces.of([1], [end - begin], many.tokens.shape[1], CPU)
            model.absorb(many, pieces, tokens[0, begin:end], before[begin:end])
        predicted = [model.feed(state, torch.tensor([1]), tokens[0, :1], routes[0, -1:]) for state in (one, many)]
    torch.testing.assert_close(*predicted)


@pytest.mark.parametrize("kind", KINDS)
def test_absorbing_many_sequences_is_absorbing_each(kind: str) -> None:
    """Pieces of unlike lengths, one longer than the ring, twice in a row: every row's state is what single steps leave."""
    window, lengths = 64, ((3, 1, 90), (2, 90, 1))
    model = random_predictor(kind, window=window)
    texts = [random_text(91, seed) for seed in range(3)]
    one, many = model.fresh(4, CPU), model.fresh(4, CPU)
    rows, done = [2, 0, 3], [0, 0, 0]
    with torch.inference_mode():
        for counts in lengths:
            parts = []
            for place, (tokens, routes) in enumerate(texts):
                begin, end = done[place], done[place] + counts[place]
                before = torch.cat([torch.full_like(routes[0, :1], 8), routes[0]])
                for at in range(begin, end):
                    model.feed(one, torch.tensor([rows[place]]), tokens[0, at : at + 1], before[at : at + 1])
                parts.append((tokens[0, begin:end], before[begin:end]))
                done[place] = end
            model.absorb(many, Pieces.of(rows, counts, window, CPU), *map(torch.cat, zip(*parts, strict=True)))
    for expected, found in zip(one, many, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_go_in_any_order_and_company() -> None:
    """Regrouped and beside freed rows, a sequence is predicted as if it were alone."""
    artifact = random_artifact()
    texts = [random_text(30, seed) for seed in range(3)]
    alone = []
    for tokens, routes in texts:
        single = OnlinePredictor(artifact, 1)
        alone.append([single.step(torch.tensor([0]), tokens[:, t], before(routes, t)) for t in range(30)])
    online = OnlinePredictor(artifact, 4)
    rows = {0: 3, 1: 0, 2: 2}
    random = np.random.default_rng(0)
    for place in range(30):
        if place == 12:  # another sequence comes and goes
            online.step(torch.tensor([1]), torch.tensor([7]), texts[0][1][:, 3])
            online.free([1])
        order = random.permutation(3).tolist()
        for group in (order[:2], order[2:]):
            predicted = online.step(
                torch.tensor([rows[n] for n in group]),
                torch.cat([texts[n][0][:, place] for n in group]),
                torch.cat([before(texts[n][1], place) for n in group]),
            )
            for number, name in enumerate(group):
                torch.testing.assert_close(predicted.demand[number], alone[name][place].demand[0])
                torch.testing.assert_close(predicted.within[number], alone[name][place].within[0])


def before(routes: torch.Tensor, place: int) -> torch.Tensor:
    """`[1, L, K]` the routing of the token before."""
    return routes[:, place - 1] if place else torch.full_like(routes[:, 0], 8)


def test_a_new_sequence_knows_nothing_of_the_one_before() -> None:
    """`free` forgets what a row held, and what prompts use is the mean of their tokens' chances without any routing."""
    artifact = random_artifact()
    tokens, routes = random_text(20)
    online = OnlinePredictor(artifact, 2)
    for place in range(20):
        online.step(torch.tensor([1]), tokens[:, place], routes[:, place])
    online.free([1])
    usual = online.usual(torch.tensor([4, 5, 6]))
    with torch.inference_mode():
        prompt, first = torch.tensor([[4, 5, 6]]), torch.tensor([[-1, 4, 5]])
        each = artifact.probabilities(artifact.model(prompt, torch.full((1, 3, 3, 2), 8)), prompt, first)[0, :, 0]
    torch.testing.assert_close(usual, each.mean(0), atol=1e-4, rtol=1e-4)
    fresh = OnlinePredictor(artifact, 1).step(torch.tensor([0]), tokens[:, 0], before(routes, 0))
    again = online.step(torch.tensor([1]), tokens[:, 0], before(routes, 0))
    torch.testing.assert_close(again.demand, fresh.demand)


def test_a_large_vocabulary_is_hashed() -> None:
    """Tokens beyond the table's entries still have embeddings of their own, and unknown ones share one."""
    table = TokenTable(5000, 256, 8)
    table.vocabulary.learn(torch.arange(4990))
    found = table(torch.arange(4990))
    assert len(torch.unique(found.round(decimals=4), dim=0)) > 4500
    assert torch.equal(table(torch.tensor([-1])), table(torch.tensor([4995]))), "never seen: unknown"
    assert torch.equal(table(torch.tensor([-1])), table(torch.tensor([9999]))), "out of range: unknown"


@pytest.mark.parametrize(("vocabulary", "most"), [(32_000, 8), (152_000, 12)])
def test_an_artifact_is_small(vocabulary: int, most: int, tmp_path: Path) -> None:
    """At most 8 MB at a 32k vocabulary, 12 MB at 152k, for 24 layers of 32 experts; loads with what it says."""
    config = PredictorConfig(layers=24, experts=32, top_k=4, vocabulary=vocabulary)
    memory = Memory(Shape(24, 32, 4), vocabulary, 1953, 1953)
    assert sum(rows.nbytes for rows in (memory.token_odds, memory.pair_odds)) >= config.memory
    weights = torch.ones(2 + SOURCES, OUTPUTS, 24, 1)
    size = save_artifact(Artifact(model=make(config), memory=memory, calibration=weights), tmp_path)
    assert size <= most * 1e6
    assert load_artifact(tmp_path).config == config


@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_read_back(kind: str, tmp_path: Path) -> None:
    """Predictions survive the file within what 8-bit weights cost, everything else exactly."""
    artifact = random_artifact(kind, width=64, vocabulary=300)
    save_artifact(artifact, tmp_path)
    again = load_artifact(tmp_path)
    tokens, routes = random_text(30, vocabulary=300)
    with torch.inference_mode():
        first, second = (a.probabilities(a.model(tokens, routes), tokens, tokens.roll(1)) for a in (artifact, again))
    assert (first - second).abs().mean() < 0.02
    assert again.fingerprint == "feed"
    assert torch.equal(again.calibration, artifact.calibration)
    assert torch.equal(again.memory(tokens, tokens.roll(1)), artifact.memory(tokens, tokens.roll(1)))


def test_bad_artifacts_are_refused(tmp_path: Path) -> None:
    """Missing, foreign, newer, damaged or of another model: each has its reason."""
    artifact, good = random_artifact(), tmp_path / "good"
    save_artifact(artifact, good)

    def spoil(name: str, change: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(good, folder)
        change(folder)
        return folder

    def edit(**fields: object) -> object:
        def change(folder: Path) -> None:
            about = json.loads((folder / ABOUT_NAME).read_text()) | fields
            (folder / ABOUT_NAME).write_text(json.dumps(about))

        return change

    def flip(folder: Path) -> None:
        content = bytearray((folder / WEIGHTS_NAME).read_bytes())
        content[-10] ^= 1
        (folder / WEIGHTS_NAME).write_bytes(bytes(content))

    cases = {
        "no": (shutil.rmtree, "cannot be read"),
        "weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), "cannot be read"),
        "flipped": (flip, "checksum"),
        "cut": (lambda folder: (folder / WEIGHTS_NAME).write_bytes(b"x"), "checksum"),
        "text": (lambda folder: (folder / ABOUT_NAME).write_text("{"), "is damaged"),
        "foreign": (edit(format="other"), "is no predictor"),
        "newer": (edit(version=2), "version 2"),
        "kind": (edit(config={**vars(artifact.config), "kind": "oracle"}), "unknown predictor kind"),
        "sizes": (edit(config={**vars(artifact.config), "width": 8}), "no usable predictor"),
        "window": (edit(config={**vars(artifact.config), "window": "a"}), "no usable predictor"),
        "matches": (edit(config={**vars(artifact.config), "matches": 1000}), "cannot be found"),
        "words": (edit(vocabulary=5), "no usable predictor"),
        "about": (edit(about=[]), "no usable predictor"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(PredictorError, match=message):
            load_artifact(spoil(name, change))
    with pytest.raises(PredictorError, match="made for made up with fingerprint feed, other has beef"):
        artifact.check_model("beef", Shape(3, 8, 2), "other")
    with pytest.raises(PredictorError, match=r"\(3, 8, 2\), other has \(4, 8, 2\)"):
        artifact.check_model("feed", Shape(4, 8, 2), "other")
    nameless = Artifact(model=artifact.model, memory=artifact.memory, calibration=artifact.calibration)
    with pytest.raises(PredictorError, match="does not say which checkpoint"):
        nameless.check_model("feed", Shape(3, 8, 2), "other")


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4))
@settings(max_examples=20)
def test_windows_count_every_token_once(lengths: list[int]) -> None:
    """Passages of any length: each token is counted in one window, with at least half a window of past."""
    items = [Passage(np.arange(n) + 1000 * i, np.full((n, 1, 1), i), np.arange(n), {}) for i, n in enumerate(lengths)]
    cut = windows(items, 64, 8)
    counted = sorted(cut.tokens[cut.counts].tolist())
    assert counted == sorted(token for item in items for token in item.tokens.tolist())
    for tokens, counts in zip(cut.tokens, cut.counts, strict=True):
        first = int(np.flatnonzero(counts)[0])
        assert first in {0, 32}
        assert tokens[0] % 1000 == 0 or first == 32, "a window that counts from its start begins its passage"


def test_labels_say_what_comes() -> None:
    """Brute force: used now, used within h further steps; unknown where the window ends before the horizon does."""
    _, routes = random_text(20, batch=2)
    routes[1, 15:] = 8  # padding
    counts = torch.ones(2, 20, dtype=torch.bool)
    counts[0, :4] = False
    truth, valid = labels(routes, counts, 8)
    used = multi_hot(routes, 8).bool()
    for row, end in ((0, 20), (1, 15)):
        for place in range(20):
            assert torch.equal(truth[row, place, 0].bool(), used[row, place])
            assert bool(valid[row, place, 0]) == (place < end and not (row == 0 and place < 4))
            for output, horizon in enumerate(HORIZONS, 1):
                known = place + horizon < end and not (row == 0 and place < 4)
                assert bool(valid[row, place, output]) == known
                if known:
                    expected = used[row, place + 1 : place + 1 + horizon].any(0)
                    assert torch.equal(truth[row, place, output].bool(), expected)


def test_calibration_finds_the_true_chances() -> None:
    """Scores that add up to the true log odds, each scaled and all shifted, are weighed so that they do again."""
    torch.manual_seed(0)
    predicted, rows = torch.randn(6000, OUTPUTS, 2, 8) * 1.5, torch.randn(6000, SOURCES, 2, 8)
    rows[:, 1] *= torch.rand(6000, 1, 1) < 0.2  # mostly there is none
    true = predicted + rows.sum(1, keepdim=True) - 1
    truth = (torch.rand_like(true) < torch.sigmoid(true)).float()
    factor, shift = torch.rand(OUTPUTS, 2, 1) + 1.5, torch.randn(OUTPUTS, 2, 1)
    valid = torch.ones(6000, OUTPUTS, dtype=torch.bool)
    piece = Scored(predicted * factor + shift, rows * 3, truth, valid)
    found = weigh(calibrate([piece]), piece.logits, piece.rows)
    assert (found - true).abs().mean() < 0.1
    halves = [Scored(*(column[part] for column in piece)) for part in (slice(0, 2000), slice(2000, None))]
    torch.testing.assert_close(calibrate(halves), calibrate([piece]), atol=1e-3, rtol=1e-3)
    nothing = calibrate([piece._replace(valid=torch.zeros_like(valid))])
    assert torch.equal(weigh(nothing, piece.logits, piece.rows), piece.logits)


def test_the_memory_counts() -> None:
    """A token's entry is the log odds of what it used, a pair's those beyond the token's; all other entries are zeros."""
    shape = Shape(1, 4, 1)
    tokens = np.array([1, 2, 1, 2, 3, 2, 1, 2, 9])
    routes = np.array([0, 1, 0, 1, 2, 3, 0, 1, 0])[:, None, None]
    memory = remember([Passage(tokens, routes, np.arange(9), {})], shape, 10, 4 * 8)

    def logit(p: float) -> float:
        return float(np.log(p / (1 - p)))

    used = np.array([4, 3, 1, 1])
    base = (used + 0.25) / 10
    found = memory(torch.tensor([1, 2, 2, 3, 9, -1, 11]), torch.tensor([2, 1, 3, 2, 2, 1, 1]))[:, :, 0].numpy()
    for expert in range(4):
        two = (np.array([0, 3, 0, 1])[expert] + base[expert]) / 5
        pair = (np.array([0, 3, 0, 0])[expert] + two) / 4
        assert abs(found[1, 0, expert] - (logit(two) - logit(base[expert]))) < 0.05
        assert abs(found[1, 1, expert] - (logit(pair) - logit(two))) < 0.05
    assert np.array_equal(found[2, 0], found[1, 0])
    assert not found[2, 1].any(), "the pair (3, 2) was met once"
    assert not found[3:].any(), "met once, unknown, out of range"
    nothing = remember([Passage(tokens, routes, np.arange(9), {})], shape, 10, 0)
    assert not nothing(torch.tensor([1, 2]), torch.tensor([2, 1])).any()


def rule_passages(count: int, length: int = 60, seed: int = 0) -> list[Passage]:
    """Texts whose routes follow a rule: layer 0 by the token, layer 1 by the token before, layer 2 as one step ago."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        tokens = random.integers(0, 12, length)
        previous = np.concatenate([[0], tokens[:-1]])
        routes = np.stack([tokens % 8, previous % 8, np.zeros(length, dtype=int)], axis=1)
        routes[:, 2] = random.integers(0, 8)
        found.append(Passage(tokens, np.stack([routes, (routes + 1) % 8], axis=2), np.arange(length), {}))
    return found


FAST = TrainConfig(epochs=12, batch=4, rate=1e-2, device="cpu", hide=0.0, blind=0.0, average=0.9)
RULE = PredictorConfig(layers=3, experts=8, top_k=2, vocabulary=12, embedding=16, width=32, key=4, dropout=0.0)


def test_training_learns_the_rule() -> None:
    """Token, predecessor and own habit are all found: nearly every expert is among the best guesses of unseen texts."""
    epochs: list[Epoch] = []
    training, held = rule_passages(40), rule_passages(8, seed=1)
    result = train(RULE, training, held, FAST, report=epochs.append)
    assert [epoch.number for epoch in epochs] == list(range(1, 13))
    assert result.curve == epochs
    assert epochs[-1].validation < epochs[0].validation / 2
    artifact = Artifact(model=result.model, memory=result.memory, calibration=result.calibration)
    chances = score(artifact, held)
    assert result.recall > 0.95
    for item, predicted in zip(held, chances, strict=True):
        best = np.argsort(-predicted[2:, 0].astype(np.float32), axis=2)[..., :2]
        hits = (best[..., None] == item.routes[2:, :, None]).any(2).mean()
        assert hits > 0.95


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Cut off after any epoch and started again, training ends with the same bits; another run's checkpoint is refused."""
    training, held = rule_passages(6), rule_passages(2, seed=1)
    options = TrainConfig(epochs=4, batch=4, device="cpu")
    config = PredictorConfig(**{**vars(RULE), "dropout": 0.2})
    whole = train(config, training, held, options)

    class Cut(Exception):  # noqa: N818 - stands for Ctrl-C
        pass

    def stop(epoch: Epoch) -> None:
        if epoch.number == 2:
            raise Cut

    with pytest.raises(Cut):
        train(config, training, held, options, tmp_path, report=stop)
    resumed = train(config, training, held, options, tmp_path)
    assert resumed.curve == whole.curve
    assert torch.equal(resumed.calibration, whole.calibration)
    for one, other in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(PredictorError, match="another training run"):
        train(config, training, held, TrainConfig(epochs=4, batch=4, device="cpu", seed=1), tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PredictorError, match="damaged"):
        train(config, training, held, options, tmp_path)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"batch": 0}, {"rate": 0.0}, {"device": "tpu"}, {"seed": -1}])
def test_impossible_training_options_are_refused(options: dict[str, object]) -> None:
    """Each with the value."""
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        TrainConfig(**options)


def test_scores_are_those_of_single_steps() -> None:
    """The offline twin says of a recorded passage, whole windows at a time, what the predictor says while serving."""
    artifact = random_artifact(window=32)
    tokens, routes = random_text(90)
    item = Passage(tokens[0].numpy(), routes[0].numpy(), np.arange(90), {})
    offline = score(artifact, [item])[0]
    online = OnlinePredictor(artifact, 1)
    for place in range(90):
        predicted = online.step(torch.tensor([0]), tokens[:, place], before(routes, place))
        both = torch.cat([predicted.demand[:, None], predicted.within], dim=1)[0].numpy()
        np.testing.assert_allclose(offline[place], both, atol=5e-3)


@pytest.fixture(scope="module")
def real() -> Trace:
    """The whole recorded excerpt, the condition of repetition included."""
    return load_trace(EXCERPT)


def test_splits_go_by_sequence(real: Trace) -> None:
    """No sequence is on both sides; the seed decides; too few, or a condition that fits none or all, are refused."""
    items = passages(real)
    training, held = split(items, 0.3, 0)
    assert {id(item) for item in training}.isdisjoint(id(item) for item in held)
    assert len(training) + len(held) == len(items)
    assert [len(item) for item in split(items, 0.3, 1)[1]] != [len(item) for item in held]
    others, chosen = leave_out(items, f"dataset={items[0].about['dataset']}")
    assert {item.about["dataset"] for item in chosen} == {items[0].about["dataset"]}
    assert items[0].about["dataset"] not in {item.about["dataset"] for item in others}
    with pytest.raises(TraceError, match="two at least"):
        split(items[:1], 0.1, 0)
    for condition, message in (("dataset=nothing", "fits 0 of"), ("dataset", "is no condition")):
        with pytest.raises(TraceError, match=message):
            leave_out(items, condition)


def test_token_texts_are_translated(real: Trace) -> None:
    """Two imported traces number the same texts differently; a predictor's vocabulary decides, unknown texts are -1."""
    turned = tuple(reversed(real.vocabulary))
    plain, translated = passages(real), passages(real, turned[:-5])
    for one, other in zip(plain, translated, strict=True):
        for token, found in zip(one.tokens.tolist(), other.tokens.tolist(), strict=True):
            text = real.vocabulary[token] if token >= 0 else None
            assert found == (turned.index(text) if text is not None and text in turned[:-5] else -1)
    bare = Trace(header=real.header, rows=real.rows, sequences=real.sequences)
    with pytest.raises(TraceError, match="bare ids"):
        passages(bare, turned)


def test_a_trace_without_tokens_is_refused() -> None:
    """It says what is lacking and how to get it."""
    trace = make_trace(20)
    rows = trace.rows._replace(tokens=np.full(20, -1, dtype=np.int32))
    with pytest.raises(TraceError, match="no known token ids"):
        passages(Trace(header=trace.header, rows=rows, sequences=trace.sequences))


def test_padding_is_no_passage() -> None:
    """Rows of sequence -1 are left out, and steps put a sequence's rows in order."""
    rows = Rows(
        np.arange(4, dtype=np.uint8)[:, None, None] % 4, np.zeros((4, 1, 1), np.float16), np.arange(4, dtype=np.int32),
        np.zeros(4, np.uint8), np.array([0, -1, 0, 0], np.int32), np.array([2, 0, 0, 1], np.int32),
    )  # fmt: skip
    items = passages(Trace(header=Header(layers=1, experts=4, top_k=1), rows=rows))
    assert [item.tokens.tolist() for item in items] == [[2, 3, 0]]


@pytest.mark.cuda
def test_a_step_is_captured(cuda: torch.device) -> None:
    """In a CUDA graph the step does what it does outside, again and again, and as on the CPU."""
    artifact = random_artifact()
    tokens, routes = random_text(40, batch=2)
    plain = OnlinePredictor(artifact, 2)
    expected = [plain.step(torch.arange(2), tokens[:, t], before_both(routes, t)) for t in range(40)]
    online = OnlinePredictor(artifact, 2, cuda)
    rows, token, route = torch.arange(2, device=cuda), tokens[:, 0].to(cuda), before_both(routes, 0).to(cuda)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        online.step(rows, token, route)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predicted = online.step(rows, token, route)
    online.free([0, 1])
    for place in range(40):
        token.copy_(tokens[:, place])
        route.copy_(before_both(routes, place))
        graph.replay()
        torch.testing.assert_close(predicted.demand.cpu(), expected[place].demand, atol=2e-3, rtol=2e-3)
    artifact.model.cpu()


def before_both(routes: torch.Tensor, place: int) -> torch.Tensor:
    return routes[:, place - 1] if place else torch.full_like(routes[:, 0], 8)


def test_the_commands_train_and_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A predictor is trained from the excerpt and measured on it: tables on stdout, JSON and picture in files."""
    out, result, picture = tmp_path / "p", tmp_path / "r.json", tmp_path / "r.png"
    source = train_predictor.Source(trace=EXCERPT, model=None, skip="repetition", leave_out="", validation=0.2)
    train_predictor.main(source=source, out=out, kind="path", options={"epochs": 2, "device": "cpu"})
    assert sorted(path.name for path in out.iterdir()) == [ABOUT_NAME, WEIGHTS_NAME]
    test = evaluation.Test(
        trace=EXCERPT, free=None, only="", leave_out="", skip="repetition", cases=((1, 1), (4, 2), (64, 1)),
        slots=("25%",), steps=40,
    )  # fmt: skip
    with pytest.raises(TraceError, match="0 sequences to measure"):
        eval_predictor.main(artifact=out, test=test, plot=picture, json_file=result)
    assert "left out: 11 sequences that the predictor was trained on" in capsys.readouterr().err
    about = json.loads((out / ABOUT_NAME).read_text())
    about["about"]["seen"] = []
    (out / ABOUT_NAME).write_text(json.dumps(about))
    eval_predictor.main(artifact=out, test=test, plot=picture, json_file=result)
    found = json.loads(result.read_text())
    printed = capsys.readouterr()
    assert "4 live sequences in 2 groups that take turns" in printed.out
    assert "not replayed: 64 live sequences" in printed.err
    assert [item["name"] for item in found["evaluations"]][:2] == ["predictor", "frequency"]
    cells = {(c["batch"], c["source"]): c for c in found["cells"]}
    assert cells[1, "Belady"]["closed"] == 1
    assert cells[1, "nothing (next-use)"]["closed"] == 0
    assert picture.stat().st_size > 10_000


def test_the_commands_refuse_before_they_work(tmp_path: Path) -> None:
    """Impossible shares, places and batches cost no training."""
    source = train_predictor.Source(trace=EXCERPT, model=None, skip="", leave_out="", validation=1.5)
    with pytest.raises(ConfigError, match=r"validation=1\.5"):
        train_predictor.main(source=source, out=tmp_path, kind="path", options={})
    file = tmp_path / "file"
    file.write_text("")
    source = train_predictor.Source(trace=EXCERPT, model=None, skip="", leave_out="", validation=0.2)
    with pytest.raises(PredictorError, match="cannot be written"):
        train_predictor.main(source=source, out=file / "p", kind="path", options={"device": "cpu"})
    for text in ("4x3", "4x0", "0", "²", "4y", "-1"):
        with pytest.raises(ConfigError, match=f"batch='{text}'"):
            evaluation.parse_cases(f"1,{text}")
    test = evaluation.Test(trace=EXCERPT, free=None, only="", leave_out="", skip="", cases=(), slots=("25%",), steps=0)
    for plot, result, message in (
        (None, None, "steps=0"),
        (None, tmp_path, "cannot be written"),
        (file, None, "no picture"),
    ):
        with pytest.raises(ConfigError, match=message):
            eval_predictor.main(artifact=tmp_path, test=test, plot=plot, json_file=result)


def test_training_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    """Other files in the output folder are still there afterwards."""
    kept = tmp_path / ".unfinished-training" / "mine.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    source = train_predictor.Source(trace=EXCERPT, model=None, skip="repetition", leave_out="", validation=0.2)
    train_predictor.main(source=source, out=tmp_path, kind="path", options={"epochs": 1, "device": "cpu"})
    assert kept.read_text() == "mine"
    assert [path.name for path in kept.parent.iterdir()] == ["mine.txt"]
    assert evaluation.parse_cases("1, 4x2,") == ((1, 1), (4, 2))
