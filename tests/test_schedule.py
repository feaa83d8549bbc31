"""Grouping by route: what every method must keep, and what the better one has to find."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertflow.cache.strategy import STRATEGIES
from expertflow.errors import ConfigError
from expertflow.schedule.cluster import METHODS, Paths, activated, group, in_order, pack
from expertflow.sim.clock import Cost
from expertflow.sim.replay import replay
from expertflow.sim.sweep import Grid, run_grid
from expertflow.sim.workload import live_sequences, regrouped
from expertflow.trace.format import load_trace
from helpers import EXCERPT


def draw(seed: int, count: int, layers: int = 3, experts: int = 30, share: float = 0.2) -> Paths:
    return np.random.default_rng(seed).random((count, layers, experts)) < share


def distinct(paths: Paths, found: np.ndarray) -> int:
    """Eq. 2 of the paper, as it is written."""
    return sum(int(paths[found == number].any(axis=0).sum()) for number in np.unique(found))


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 14), data=st.data(), method=st.sampled_from(sorted(METHODS)))
def test_groups_are_balanced_and_never_worse_than_arrival(
    seed: int, count: int, data: st.DataObject, method: str
) -> None:
    """Every sequence is in one group, sizes differ by one at most, the count is no worse, and the answer is always the same."""
    groups, paths = data.draw(st.integers(1, count)), draw(seed, count)
    found = group(paths, groups, method)
    sizes = np.bincount(found, minlength=groups)
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1
    assert distinct(paths, found) <= distinct(paths, in_order(count, groups))
    assert np.array_equal(found, group(paths, groups, method))
    assert [int(np.flatnonzero(found == number)[0]) for number in range(groups)] == sorted(
        int(np.flatnonzero(found == number)[0]) for number in range(groups)
    )


@given(seed=st.integers(0, 10_000), count=st.integers(1, 9), groups=st.integers(1, 4))
@settings(max_examples=30)
def test_counting_bits_is_counting_experts(seed: int, count: int, groups: int) -> None:
    """Packed paths give the number of distinct experts that the paths give."""
    paths, found = draw(seed, count), np.random.default_rng(seed).integers(0, groups, count)
    assert activated(pack(paths), found, groups) == distinct(paths, found)


@pytest.mark.parametrize("seed", range(8))
def test_swaps_find_the_best_of_few(seed: int) -> None:
    """With eight sequences in two groups the best division there is, or at most one in a hundred experts more."""
    paths = draw(seed, 8)
    best = min(
        distinct(paths, np.isin(np.arange(8), (0, *others)).astype(int)) for others in combinations(range(1, 8), 3)
    )
    assert best <= distinct(paths, group(paths, 2)) <= 1.01 * best


@pytest.mark.parametrize("method", METHODS)
def test_what_belongs_together_is_found(method: str) -> None:
    """Three kinds of sequences with experts of their own, mixed: swaps separate them, the paper's method improves."""
    paths = np.zeros((12, 2, 60), dtype=bool)
    for number in range(12):
        own = 20 * (number % 3)
        paths[number, :, own : own + 20] = draw(number, 1, 2, 20, 0.5)[0]
    found, kinds = group(paths, 3, method), np.arange(12) % 3
    if method == "swaps":
        assert np.array_equal(found, kinds)
    assert distinct(paths, found) < 0.8 * distinct(paths, in_order(12, 3))


def test_bad_divisions_are_refused() -> None:
    """An unknown method, no group, more groups than sequences."""
    for groups, method, message in (
        (2, "swap", "Did you mean 'swaps'"),
        (0, "swaps", "0 groups"),
        (9, "swaps", "9 groups"),
    ):
        with pytest.raises(ConfigError, match=message):
            group(draw(0, 5), groups, method)


def test_the_simulator_groups_by_route() -> None:
    """`simulate` with a grouping loads fewer; without groups, or with a method that is none, it says what is wrong."""
    grid = Grid(trace=EXCERPT, slots=("25%",), batches=(4,), strategies=("lru",), cost=Cost(), groups=2)
    loads = [run_grid(g, lambda _: None, 1)[0].loads for g in (grid, replace(grid, grouping="swaps"))]
    assert loads[1] < loads[0]
    for changes, message in (({"groups": 1}, "single group"), ({"grouping": "swap"}, "Did you mean 'swaps'")):
        with pytest.raises(ConfigError, match=message):
            run_grid(replace(grid, **{"grouping": "swaps", **changes}), lambda _: None, 1)


def test_real_routes_overlap() -> None:
    """On real routing, two groups of four that take turns activate fewer experts, and load fewer, than as they arrive."""
    trace = load_trace(EXCERPT).without("repetition")
    arrival = live_sequences(trace, 8, groups=2)
    arrival = replace(arrival, members=arrival.members[:60])
    found = {method: regrouped(arrival, method) for method in METHODS}
    for workload in found.values():
        assert np.array_equal(np.sort(workload.members.reshape(-1, 8)), np.sort(arrival.members.reshape(-1, 8))), (
            "the same tokens in every round"
        )
    needed = {method: workload.needed.sum() / arrival.needed.sum() for method, workload in found.items()}
    assert needed["swaps"] <= needed["similar"] < 1
    assert needed["swaps"] < 0.93
    strategy, cost = STRATEGIES["next-use"], Cost()
    assert replay(found["swaps"], strategy, 192, cost).loads < replay(arrival, strategy, 192, cost).loads
