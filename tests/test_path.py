"""A predictor's step in kernels is its step in torch, row by row, and depends on nothing it should not.

Without a CUDA device the kernels run in Triton's interpreter on CPU tensors.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertflow import LLM
from expertflow.engine import build
from expertflow.memory.meter import CpuMeter
from expertflow.predict.artifact import Artifact
from expertflow.predict.counts import remember
from expertflow.predict.dataset import Shape
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor, Prediction
from expertflow.predict.state import Pieces, State
from helpers import DEVICE, MakeCheckpoint, MakePredictor, random_artifact

pytest.importorskip("triton", reason="kernels need triton")
from expertflow.predict.kernels import path
from expertflow.predict.kernels.take_in import recall

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
SMALL = {"layers": 2, "heads": 2, "matches": 2, "window": 5, "key": 3, "embedding": 6, "width": 12}
VOCABULARY = 20


def random_texts(steps: int, experts: int, layers: int = 2, seed: int = 3) -> tuple[Tensor, Tensor]:
    """`[3, T]` tokens that repeat themselves, some unknown or out of range, and `[3, T, L, K]` routes, some without experts."""
    random = np.random.default_rng(seed)
    tokens = random.integers(-1, VOCABULARY + 2, (3, steps))
    for place in range(2, steps):
        again = np.where(random.random(3) < 0.5, tokens[:, place - 2], (tokens[:, place - 1] + 1) % VOCABULARY)
        tokens[:, place] = np.where(random.random(3) < 0.8, again, tokens[:, place])
    every = np.tile(np.arange(experts), (3, steps, layers, 1))
    routes = random.permuted(every, axis=3)[..., :2]
    routes[random.random((3, steps)) < 0.2] = experts
    return torch.from_numpy(tokens).to(DEVICE), torch.from_numpy(routes).to(DEVICE)


def pair_of(artifact: Artifact, rows: int = 3) -> tuple[OnlinePredictor, OnlinePredictor]:
    """The same predictor in torch and in kernels."""
    return OnlinePredictor(artifact, rows, DEVICE), OnlinePredictor(artifact, rows, DEVICE, path.path_step)


def assert_same(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    """Chances are close, and so are states, whole numbers equal."""
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def tell(online: OnlinePredictor, texts: tuple[Tensor, Tensor], lengths: tuple[int, ...]) -> None:
    """Take the first tokens of texts in, each in the row of its number."""
    tokens, routes = texts
    before = functional.pad(routes, (0, 0, 0, 0, 1, 0), value=online.artifact.config.experts)
    rows = [row for row, length in enumerate(lengths) if length]
    online.observe(
        online.pieces(rows, [lengths[row] for row in rows]),
        *(torch.cat([part[row, : lengths[row]] for row in rows]) for part in (tokens, before)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "sizes"),
    [
        (9, {"experts": 60, "table": 7}),
        (6, {"experts": 8, "layers": 1, "decays": (0.3, 0.9), "heads": 1, "matches": 3, "window": 4}),
        (2, {"experts": 300, "layers": 1, "heads": 3, "key": 4, "width": 16}),
    ],
    ids=["hashed", "no memory", "int16 routes"],
)
def test_steps_are_those_of_torch(steps: int, sizes: dict[str, int]) -> None:
    """Rows in any order and subset, empty or full, rings that wrap, unknown tokens."""
    artifact = random_artifact(**{**SMALL, **sizes})
    experts = artifact.config.experts
    if experts == 8:
        shape = Shape(artifact.config.layers, experts, artifact.config.top_k)
        artifact = replace(artifact, memory=remember([], shape, VOCABULARY, 0))
    plain, twin = pair_of(artifact)
    lengths = (0, 2, 7)
    tokens, routes = random_texts(steps + 7, experts, artifact.config.layers)
    for online in (plain, twin):
        tell(online, (tokens, routes), lengths)
    routes = routes.int() if experts == 60 else routes
    random = np.random.default_rng(1)
    taken, last = list(lengths), torch.full_like(routes[:, 0], experts)
    last[1], last[2] = routes[1, 1], routes[2, 6]
    for _ in range(steps):
        rows = random.permutation(3)[: random.integers(1, 3)].tolist()
        index = torch.tensor(rows, device=DEVICE)
        now = torch.stack([tokens[row, taken[row]] for row in rows])
        assert_same(twin.step(index, now, last[index]), plain.step(index, now, last[index]))
        for row in rows:
            last[row], taken[row] = routes[row, taken[row]], taken[row] + 1
    assert_same(twin.state, plain.state)


@pytest.mark.parametrize("pairs", [0, 1, 256, 700])
def test_a_pair_is_found_among_many(pairs: int) -> None:
    """The first, the last, some between, and some that are not there, in rounds of 256 keys."""
    random = np.random.default_rng(pairs)
    every = random.permutation([before * 40 + token for before in range(2, 40) for token in range(2, 40)])
    keys = np.sort(every[:pairs])
    line = torch.tensor([*keys, torch.iinfo(torch.int64).max], device=DEVICE)
    token_row = torch.arange(41, dtype=torch.int32, device=DEVICE)
    found = torch.empty(1, 2, dtype=torch.int32, device=DEVICE)
    for key in [*keys[:2], *keys[-2:], *every[: min(pairs, 8)], *every[pairs : pairs + 4]]:
        before, token = divmod(int(key), 40)
        recall[(1,)](token_row, line, found, 0, token, before, vocabulary=40, pairs=pairs + 1)
        place = int(np.searchsorted(keys, key))
        assert found.tolist() == [[token, place if key in keys else pairs]]


def test_bits_of_a_row_are_its_own() -> None:
    """Alone, or among others and padding that names the spare row three times: the same bits, and no other sequence changes."""
    artifact = random_artifact(**{**SMALL, "experts": 20})
    alone, among = (OnlinePredictor(artifact, 4, DEVICE, path.path_step) for _ in range(2))
    tokens, routes = random_texts(8, 20)
    for online in (alone, among):
        tell(online, (tokens, routes), (7, 7, 7))
    bystander = [column[3].clone() for column in among.state]
    rows = torch.tensor([2, among.spare, among.spare, 0, among.spare, 1], device=DEVICE)
    text = torch.tensor([2, 0, 0, 0, 1, 1], device=DEVICE)
    predicted = among.step(rows, tokens[text, 7], routes[text, 6])
    for number in (0, 3, 5):
        one = slice(number, number + 1)
        own = alone.step(rows[one], tokens[text[one], 7], routes[text[one], 6])
        assert torch.equal(own.demand, predicted.demand[one])
        assert torch.equal(own.within, predicted.within[one])
    for mine, other, before in zip(among.state, alone.state, bystander, strict=True):
        assert torch.equal(mine[:3], other[:3])
        assert torch.equal(mine[3], before)


def test_noting_is_a_step_without_an_answer() -> None:
    """The same state, bit for bit, among others and padding; the spare row's is no sequence's."""
    artifact = random_artifact(**{**SMALL, "experts": 20})
    stepped, noted = (OnlinePredictor(artifact, 4, DEVICE, path.path_step) for _ in range(2))
    tokens, routes = random_texts(8, 20)
    for online in (stepped, noted):
        tell(online, (tokens, routes), (7, 6, 7))
    rows = torch.tensor([2, noted.spare, noted.spare, 0], device=DEVICE)
    text = torch.tensor([2, 0, 0, 0], device=DEVICE)
    before = [column.clone() for column in noted.state]
    stepped.step(rows, tokens[text, 7], routes[text, 6])
    noted.update(rows, tokens[text, 7], routes[text, 6])
    assert (noted.state.taken - before[0]).tolist()[:4] == [1, 0, 1, 0]
    assert all(torch.equal(mine[:4], other[:4]) for mine, other in zip(noted.state, stepped.state, strict=True))


def test_prompts_are_taken_in_as_by_notes() -> None:
    """Pieces shorter and longer than the ring, behind others and first, unknown tokens: as in torch, and bit for bit as token by token."""
    artifact = random_artifact(**{**SMALL, "experts": 20, "table": 7})
    plain, twin = pair_of(artifact)
    noted = OnlinePredictor(artifact, 3, DEVICE, path.path_step)
    tokens, routes = random_texts(24, 20)
    before = functional.pad(routes, (0, 0, 0, 0, 1, 0), value=20)
    done = [0, 0, 0]
    for rows, counts in ([2, 0], [3, 11]), ([1], [1]), ([0, 1, 2], [9, 5, 6]), ([1, 0], [17, 2]):
        spans = [slice(done[row], done[row] + count) for row, count in zip(rows, counts, strict=True)]
        given = [
            torch.cat([part[row, span] for row, span in zip(rows, spans, strict=True)]) for part in (tokens, before)
        ]
        bystander = [column[3].clone() for column in twin.state]
        for online in (plain, twin):
            online.observe(online.pieces(rows, counts), *given)
        for row, span in zip(rows, spans, strict=True):
            for at in range(span.start, span.stop):
                noted.update(torch.tensor([row], device=DEVICE), tokens[row, at : at + 1], before[row, at : at + 1])
            done[row] = span.stop
        assert_same(twin.state, plain.state)
        assert all(torch.equal(mine, other) for mine, other in zip(twin.state, noted.state, strict=True))
        assert all(torch.equal(column[3], was) for column, was in zip(twin.state, bystander, strict=True))


def test_taking_prompts_in_needs_little_room() -> None:
    """A pass of 512 tokens, as the engine tells it, takes no more than is planned; in torch every token's marks take ten times that."""
    artifact, peaks = random_artifact(**{**SMALL, "experts": 128}), []
    for online in pair_of(artifact):
        meter = CpuMeter([])
        with torch.inference_mode(), meter.watch():
            used = torch.full((512, 2, 2), 128, dtype=torch.int32, device=DEVICE)
            before = used.roll(1, 0)
            online.observe(online.pieces([0, 2], [500, 12]), torch.zeros(512, dtype=torch.long, device=DEVICE), before)
        peaks.append(meter.peak_bytes)
    none, planned = (OnlinePredictor.nbytes(artifact, 3, 1, chunk, twin=True) for chunk in (0, 512))
    assert 10 * peaks[1] <= peaks[0]
    assert peaks[1] <= planned - none


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # NumPy's, in the interpreter
def test_broken_weights_break_chances_alone() -> None:
    """Weights that are no numbers give chances that are none, which a step refuses, and no access out of bounds."""
    artifact = random_artifact(**{**SMALL, "experts": 8, "layers": 1})
    artifact.model.query.weight.data.fill_(torch.nan)
    artifact.model.base.data.fill_(torch.nan)
    online = OnlinePredictor(artifact, 1, DEVICE, path.path_step)
    predicted = online.step(
        torch.tensor([0], device=DEVICE), torch.tensor([3], device=DEVICE), torch.full((1, 1, 2), 8, device=DEVICE)
    )
    assert predicted.demand.isnan().all()
    assert predicted.within.isnan().all()


def test_what_is_not_served_steps_in_torch() -> None:
    """Other kinds, sizes that fit no tile, and weights in other dtypes; the serving predictor then does without."""
    small = {**SMALL, "experts": 8}
    assert path.path_step(random_artifact(**small)) is not None
    for sizes in (
        {"window": 1025},
        {"matches": 33, "window": 64},
        {"experts": 513},
        {"key": 33},
        {"matches": 17, "window": 64, "top_k": 8, "experts": 60},
    ):
        assert path.path_step(random_artifact(**{**small, **sizes})) is None
    doubled = random_artifact(**small)
    doubled.model.double()
    assert path.path_step(doubled) is None
    other = random_artifact("t5")
    assert not path.serves(other)
    plain, twin = OnlinePredictor(other, 1), OnlinePredictor(other, 1, None, path.path_step)
    given = torch.tensor([0]), torch.tensor([5]), torch.full((1, 3, 2), 8)
    assert_same(twin.step(*given), plain.step(*given))


def test_the_engine_uses_the_kernels(
    make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded model's predictor steps through what the backend of its device gives; on a CPU there is nothing."""
    checkpoint = make_checkpoint()
    predictions, taken_in = [], []

    class Plain:
        def __init__(self, artifact: Artifact) -> None:
            self._artifact, self.update = artifact, artifact.model.update

        def absorb(self, state: State, pieces: Pieces, tokens: Tensor, routes: Tensor) -> None:
            taken_in.append(len(tokens))
            self._artifact.model.absorb(state, pieces, tokens, routes)

        def __call__(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> Tensor:
            predictions.append(len(rows))
            before = state.tokens[rows, (state.taken[rows] - 1) % self._artifact.config.window]
            return self._artifact.probabilities(self._artifact.model.feed(state, rows, tokens, routes), tokens, before)

    assert step_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(build, "step_kernels", lambda _: Plain)
    with LLM(checkpoint, device="cpu", max_length=48, slots=6, predictor=str(make_predictor(checkpoint))) as llm:
        llm.generate([[5, 6, 7]])
        assert llm.predictor_failure is None
    assert predictions
    assert taken_in == [3]


@pytest.mark.cuda
def test_a_step_is_captured(cuda: torch.device) -> None:
    """Replayed as a CUDA graph, the step goes on from state to state as it does outside."""
    artifact = random_artifact(**{**SMALL, "experts": 60})
    plain, twin = pair_of(artifact)
    tokens, routes = random_texts(40, 60)
    rows, token = torch.arange(3, device=cuda), tokens[:, 0].clone()
    route = torch.full_like(routes[:, 0], 60)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        twin.step(rows, token, route)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        predicted: Prediction = twin.step(rows, token, route)
    twin.free([0, 1, 2])
    for place in range(40):
        token.copy_(tokens[:, place])
        graph.replay()
        assert_same(predicted, plain.step(rows, token, route))
        route.copy_(routes[:, place])
    assert_same(twin.state, plain.state)
