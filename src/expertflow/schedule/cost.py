"""What a round costs: the model that decides which live sequences step together.

A round gives every live sequence one token, in one step or several. Bytes decide: an expert that is kept costs nothing,
any other one a load for every step that uses it. The experts that most steps of the round use are taken to be kept, as
many as there are slots, as if the forecast were right. `benchmarks/grouping.py` compares the model with the simulator.
Must not know requests and where chances come from.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.schedule.cluster import Groups, group, in_order

Chances = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class StepPrices:
    """What a step is made of, in seconds.

    Attributes:
        slots: experts that can be kept.
        load: one expert over the link, of all layers or of each.
        step: a step without its experts.
        expert: one expert computed, for any number of tokens.
        divide: a division of the live sequences by route.
        large: layers whose experts are always resident, outside the slots.
    """

    slots: int
    load: float | tuple[float, ...]
    step: float
    expert: float
    divide: float = 0.0
    large: tuple[int, ...] = ()


class Division(NamedTuple):
    """A way to divide live sequences.

    Attributes:
        groups: `[N]` the group of each sequence.
        loads: expected loads of a round.
        seconds: expected duration of a round.
    """

    groups: Groups
    loads: float
    seconds: float


def used(chances: Chances, groups: Groups, count: int) -> npt.NDArray[np.float64]:
    """`[G, L, E]` the chance that a group's step uses an expert.

    Args:
        chances: `[N, L, E]` of single sequences.
        groups: `[N]`.
        count: G.
    """
    none = 1.0 - chances.astype(np.float64)
    return np.stack([1.0 - none[groups == number].prod(axis=0) for number in range(count)])


def expected_loads(uses: npt.NDArray[np.float64], slots: int) -> float:
    """Loads of a round whose steps use experts with the chances `[G, L, E]`, if those used most are kept."""
    often = np.sort(uses.sum(axis=0), axis=None)
    return float(often[: max(0, len(often) - slots)].sum())


def loads_by_layer(uses: npt.NDArray[np.float64], slots: int, large: tuple[int, ...] = ()) -> npt.NDArray[np.float64]:
    """`expected_loads` of each layer, `[L]`; the `large` ones need none."""
    often = uses.sum(axis=0)
    often[list(large)] = 0
    order = np.argsort(-often, axis=None, kind="stable")
    often.reshape(-1)[order[:slots]] = 0
    return np.asarray(often.sum(axis=1))


def price(chances: Chances, groups: Groups, count: int, rates: StepPrices) -> Division:
    """What a division is expected to cost."""
    uses = used(chances, groups, count)
    if isinstance(rates.load, tuple):
        each = loads_by_layer(uses, rates.slots, rates.large)
        loads, moving = float(each.sum()), float(each @ rates.load)
    else:
        loads = expected_loads(uses, rates.slots)
        moving = loads * rates.load
    seconds = count * rates.step + float(uses.sum()) * rates.expert + moving
    return Division(groups, loads, seconds)


def cheapest(chances: Chances, batch: int, rates: StepPrices, top_k: int) -> Division:
    """The cheaper division into as few groups as the batch size allows: by arrival, or by route.

    More groups are never cheaper. To divide a group adds, expert by expert, to what the steps of a round use, and so to
    every term of the price.

    Args:
        chances: `[N, L, E]`, how likely each sequence's next token uses an expert.
        batch: sequences of a step at most.
        rates: what a step is made of.
        top_k: experts a token uses a layer.

    Returns:
        The division; by arrival if they cost the same.
    """
    count = -(-len(chances) // batch)
    arrival = price(chances, in_order(len(chances), count), count, rates)
    if count == 1:
        return arrival
    routes = price(chances, group(best_guesses(chances, top_k), count), count, rates)
    return min(arrival, routes._replace(seconds=routes.seconds + rates.divide), key=lambda division: division.seconds)


def best_guesses(chances: Chances, top_k: int) -> npt.NDArray[np.bool_]:
    """`[N, L, E]` the `top_k` most probable experts of each layer, as a path."""
    best = np.argsort(-chances, axis=-1, kind="stable")[..., :top_k]
    paths = np.zeros(chances.shape, dtype=np.bool_)
    np.put_along_axis(paths, best, values=True, axis=-1)
    return paths


class Costs(NamedTuple):
    """Durations by which admissions are weighed, seconds.

    Attributes:
        pass_: a pass over prompts.
        fixed: of a round, what does not grow with its sequences.
        round_: a round.
    """

    pass_: float
    fixed: float
    round_: float


LEAST_FIXED = 0.1
"""Share of a step that is taken to be fixed at least."""
_SURE = 3
"""Steps of a size from which on it counts: the first one of a captured step takes far longer than the others."""

_PASSES, _STEPS = 9, 64
"""Passes, and steps, whose durations predict those of the next ones."""


def fixed_part(steps: Sequence[tuple[int, float]]) -> float:
    """Seconds of a step that do not grow with its sequences: what is lost for good when a step has fewer than it could have.

    A line through the median duration of each size, weighed by how often it came. Where an expert out of its slot rules,
    steps grow with their sequences and half-empty ones are cheap; where everything is resident they do not.

    Args:
        steps: sequences and seconds of the last steps.

    Returns:
        Between `LEAST_FIXED` of the median step and all of it; all of it where nearly every step was as large. 0 without
        steps.
    """
    by_size: dict[int, list[float]] = {}
    for size, lasted in steps:
        by_size.setdefault(size, []).append(lasted)
    if not by_size:
        return 0.0
    whole = median(lasted for _, lasted in steps)
    by_size = {size: lasted for size, lasted in by_size.items() if len(lasted) >= _SURE}
    if len(by_size) < 2:
        return whole
    points = [(size, median(lasted), len(lasted)) for size, lasted in by_size.items()]  # this runs between two steps
    weight = sum(count for _, _, count in points)
    x = sum(size * count for size, _, count in points) / weight
    y = sum(lasted * count for _, lasted, count in points) / weight
    spread = sum((size - x) ** 2 * count for size, _, count in points)
    slope = sum((size - x) * (lasted - y) * count for size, lasted, count in points) / spread
    return min(max(y - slope * x, LEAST_FIXED * whole), whole)


class Durations:
    """How long the last prefill passes and decode steps took."""

    def __init__(self) -> None:
        """Start with no durations."""
        self._passes: deque[float] = deque(maxlen=_PASSES)
        self._steps: deque[tuple[int, float]] = deque(maxlen=_STEPS)
        self._steps_a_round = 1

    def add_pass(self, seconds: float) -> None:
        """Add a prefill pass."""
        self._passes.append(seconds)

    def add_step(self, sequences: int, seconds: float, steps_a_round: int) -> None:
        """Add a decode step of so many sequences, one of so many steps that give every live sequence a token."""
        self._steps.append((sequences, seconds))
        self._steps_a_round = steps_a_round

    @property
    def step_seconds(self) -> float:
        """Median time of the last decode steps, at most 64, in seconds; 0 without steps. First steps of a shape weigh little."""
        return median(seconds for _, seconds in self._steps) if self._steps else 0.0

    def costs(self) -> Costs:
        """What the next passes and rounds are expected to take; zeros until two passes ran, because the first one is slow."""
        if len(self._passes) < 2 or not self._steps:
            return Costs(0.0, 0.0, 0.0)
        steps = self._steps_a_round
        return Costs(median_low(self._passes), fixed_part(self._steps) * steps, self.step_seconds * steps)
