"""Drafts: the look-up is the brute-force one, and supposing a token changes nothing and says what sampling it would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from expertflow.predict.draft import look_up
from expertflow.predict.model import PredictorConfig, empty_state
from expertflow.predict.online import OnlinePredictor
from test_predictor import SMALL, before_both, random_artifact, random_text

CPU = torch.device("cpu")
RING = 8


def brute_force(line: list[int]) -> tuple[int, int]:
    """From the newest position back: first for the pair, then for the token; only what the ring still holds."""
    line, newest = [-1, *line], len(line)
    for match in (2, 1):
        for place in range(newest - 1, max(newest - RING, 0), -1):
            pair = line[place - 1] == line[newest - 1] != -1
            if line[place] == line[newest] != -1 != line[place + 1] and (pair or match == 1):
                return line[place + 1], match
    return -1, 0


@given(lines=st.lists(st.lists(st.integers(-1, 3), min_size=1, max_size=30), min_size=1, max_size=4))
@settings(max_examples=200)
def test_the_look_up_is_the_brute_force_one(lines: list[list[int]]) -> None:
    """Rings that wrap, unknown tokens, rows in any order: the same token and the same kind of match."""
    state = empty_state(PredictorConfig(**SMALL, window=RING), len(lines), CPU)
    for row, line in enumerate(lines):
        for place, token in enumerate(line):
            state.tokens[row, place % RING], state.before[row, place % RING] = token, [-1, *line][place]
        state.taken[row] = len(line)
    rows = torch.arange(len(lines)).flip(0)
    found = look_up(state, rows)
    expected = [brute_force(line) for line in reversed(lines)]
    assert list(zip(found.tokens.tolist(), found.match.tolist(), strict=True)) == expected


@pytest.mark.parametrize("known", [False, True])
def test_a_draft_is_supposed_and_not_taken_in(known: bool) -> None:
    """The state stays as it was to the bit, and the next `step` with that token and routing says the same."""
    tokens, routes = random_text(40, batch=2, vocabulary=4)
    online, rows = OnlinePredictor(random_artifact(), 4), torch.tensor([3, 1])
    matches = set()
    for place in range(40):
        online.step(rows, tokens[:, place], before_both(routes, place))
        supposed = routes[:, place] if known else torch.full_like(routes[:, place], 8)
        kept = [column.clone() for column in online.state]
        draft, said = online.draft(rows, supposed)
        assert all(torch.equal(*pair) for pair in zip(kept, online.state, strict=True))
        matches |= set(draft.match.tolist())
        sampled = OnlinePredictor(online.artifact, 4)
        sampled.join([0, 1, 2, 3], type(online.state)(*(column[:4] for column in kept)))
        for one, other in zip(said, sampled.step(rows, draft.tokens, supposed), strict=True):
            assert torch.equal(one, other)
    assert matches == {0, 1, 2}


def test_a_draft_can_be_captured() -> None:
    """It runs on tensors without data, so no shape and no branch hangs on data."""
    online = OnlinePredictor(random_artifact(), 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rows, routes = mode.from_tensor(torch.tensor([3, 1])), mode.from_tensor(torch.zeros(2, 3, 2, dtype=torch.int64))
        online.state = type(online.state)(*(mode.from_tensor(column) for column in online.state))
        draft, said = online.draft(rows, routes)
    assert (draft.tokens.shape, said.demand.shape) == ((2,), (2, 3, 8))
