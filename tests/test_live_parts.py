"""Parts of the live predictor that are pure: when it pauses, which tokens it lacks, whose state row is whose."""

import pytest

from expertflow.live.pacing import FIRST_BACKOFF, IDLE_STEPS, JUDGED_PREFETCHES, LONGEST_BACKOFF, NEEDED_SHARE, Pacing
from expertflow.live.state_rows import StateRows
from expertflow.live.tokens import NewestTokens
from expertflow.trace.owners import NO_SEQUENCE


def test_steps_without_a_load_pause_it_until_the_next_load() -> None:
    """Exactly `IDLE_STEPS` of them, counted one by one or together."""
    pacing = Pacing()
    for _ in range(IDLE_STEPS - 1):
        pacing.count(0)
    assert not pacing.paused
    pacing.count(0)
    assert pacing.paused
    pacing.count(3)
    assert not pacing.paused
    pacing.count(0, steps=IDLE_STEPS)
    assert pacing.paused
    pacing.resume()
    assert not pacing.paused


def test_prefetches_that_nothing_needs_pause_it_longer_each_time() -> None:
    """64, 128, ... 4,096 steps; needed ones, a share of two thirds of them, start over."""
    pacing, expected = Pacing(), FIRST_BACKOFF
    for _ in range(9):
        pacing.count(1, 1, JUDGED_PREFETCHES, int(NEEDED_SHARE * JUDGED_PREFETCHES))  # rounded down: one too few
        assert pacing.backoff == expected
        pacing.count(1, expected)
        assert not pacing.paused
        expected = min(2 * expected, LONGEST_BACKOFF)
    pacing.count(1, 1, JUDGED_PREFETCHES, JUDGED_PREFETCHES - 10)
    assert not pacing.paused
    assert pacing.last_backoff == 0


def test_a_token_is_taken_in_once() -> None:
    """The step's own first, then the others in the order of sampling; a new token is pending again."""
    tokens = NewestTokens()
    tokens.sampled({7: 70, 3: 30, 5: 50})
    assert tokens.take([5, 4, 3], predicted=True) == ([5, 3, 7], [50, 30, 70])
    assert tokens.take([5, 4, 3], predicted=False) == ([], [])
    assert tokens.predicted(7)
    tokens.sampled({7: 71, 3: 31})
    assert not tokens.updated(7)
    assert not tokens.predicted(7)
    assert tokens.take_only([7, 5], predicted=False) == ([7], [71])
    assert tokens.updated(7)
    assert not tokens.predicted(7)
    assert tokens.pending == {3: 31}
    tokens.sampled({9: 90, 3: 32})
    assert tokens.take_all(predicted=True) == ([3, 9], [32, 90])
    assert tokens.predicted(3)
    tokens.sampled({3: 33})
    tokens.forget(3)
    tokens.forget(7)
    assert not tokens.pending
    assert not tokens.updated(7)


def test_a_row_is_cleared_when_its_next_sequence_comes() -> None:
    """Not for its first sequence, not for one that has it already, and once."""
    rows = StateRows(4)
    assert rows.add([10, 11, NO_SEQUENCE], [2, 0, 1]) == []
    assert rows.add([11, 10], [0, 2]) == []
    assert rows.of([11, 12, 10]) == [0, rows.spare, 2]
    assert rows.remove(10) == 2
    assert 10 not in rows
    assert rows.add([12, 13], [2, 3]) == [2]
    assert rows.remove(11) == 0
    assert rows.add([14], [0]) == [0]
    assert rows.rows == {12: 2, 13: 3, 14: 0}


def test_rows_that_are_not_there_are_refused() -> None:
    """The spare row is no sequence's, and every sequence needs a row."""
    rows = StateRows(2)
    for row in (-1, 2):
        with pytest.raises(ValueError, match="not among the 2 state rows"):
            rows.add([1], [row])
    with pytest.raises(ValueError, match="shorter"):
        rows.add([1, 2], [0])
    assert rows.rows == {}
