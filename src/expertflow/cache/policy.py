"""Rank experts for eviction: pure functions from usage and outlook to ranks, one a policy.

A policy runs at the start of a step and returns ranks for all of it (`core.Planes`). So choosing a victim is a minimum
over arrays, on the host, in compiled code and in a GPU kernel alike. A policy has no state and never sees the tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import Planes

Plane = npt.NDArray[np.float64]
NEVER = 1e9
"""Steps until the next use of an expert that is not known to be used again."""


class Outlook(NamedTuple):
    """A forecast for the steps from this one on.

    Attributes:
        demand: float64 `[H, L, E]`, how likely each expert is used in this step, the next one, and so on.
        beyond: float64 `[L, E]`, expected further steps until first use if not used in those H; None: unknown.
    """

    demand: Plane
    beyond: Plane | None = None


@dataclass(kw_only=True)
class Usage:
    """How experts were used so far; `[L, E]` float64 each.

    Attributes:
        layers: MoE layers.
        experts: experts a layer.
        step: steps finished.
        last_use: step and layer of the last use, as `step * L + layer`; -1 if never used.
        count: uses.
        recent: uses, each step's weight fading by `FADE[0]` a step.
        steady: the same with `FADE[1]`.
        reached: for each layer, whether a decode step runs it (an encoder's are not run); None: all.
        waits: `[L, 1]`, expected steps until the layer runs again: `PROMPTS_APART` for an encoder's, else 0.
    """

    layers: int
    experts: int
    step: int = 0
    reached: Sequence[bool] | None = None
    last_use: Plane = field(init=False)
    count: Plane = field(init=False)
    recent: Plane = field(init=False)
    steady: Plane = field(init=False)

    def __post_init__(self) -> None:
        """Start with no use of any expert."""
        shape = (self.layers, self.experts)
        self.last_use = np.full(shape, -1.0)
        self.count, self.recent, self.steady = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.place = np.arange(self.layers, dtype=np.float64)[:, None]
        self.waits = np.zeros((self.layers, 1))
        if self.reached is not None:
            self.waits[~np.asarray(self.reached)] = PROMPTS_APART

    def learn(self, needed: npt.NDArray[np.bool_]) -> None:
        """Count a finished step that used the experts `needed`, bool `[L, E]`."""
        np.copyto(self.last_use, self.step * self.layers + self.place, where=needed)
        self.count += needed
        self.recent *= FADE[0]
        self.recent += needed
        self.steady *= FADE[1]
        self.steady += needed
        self.step += 1


PROMPTS_APART = 32.0
"""Expected steps until an encoder's experts are used again: their counts are high just after a prompt."""
FADE = (0.7, 0.97)
"""What a count is multiplied by each step in `Usage.recent` and `Usage.steady`; measured, see docs/lab-notes.md."""

Policy = Callable[[Usage, Outlook | None], Planes]
"""Usage and outlook at the start of a step in, ranks for the step out."""


def keep(planes: Planes, large: Sequence[int]) -> Planes:
    """Give every expert of the `large` layers an infinite rank, so that it is never evicted; in copies, if there are any."""
    if not large:
        return planes
    rows = np.isin(np.arange(len(planes.before)), large)[:, None]
    return Planes(*(np.where(rows, np.inf, plane) for plane in planes))


def spread(planes: Planes, share: int) -> Planes:
    """Let what a layer has beyond an equal share of the slots go a step earlier once the layer has run, its latest uses first.

    In a pass that needs every expert, experts that are expected alike would go by their layers, the last one first. So early layers would
    keep all of theirs and late ones none, pass after pass, and nothing would be loaded while the early ones run.

    Args:
        planes: ranks of such a pass.
        share: slots of a layer, if all have equally many.
    """
    places = np.argsort(np.argsort(-planes.used, axis=1, kind="stable"), axis=1)
    return planes._replace(used=planes.used - len(planes.used) * (places >= share))


def lru(usage: Usage, outlook: Outlook | None) -> Planes:
    """Evict the least recently used expert; all experts of a layer are used at the same time.

    An expert that a forecast names for this step counts as used in it; else no load ahead would be worth a slot.
    """
    now = np.ascontiguousarray(np.broadcast_to(usage.step * usage.layers + usage.place, usage.last_use.shape))
    before = usage.last_use if outlook is None else np.where(outlook.demand[0] > 0, now, usage.last_use)
    return Planes(before, now, usage.last_use, before)


def lfu(usage: Usage, outlook: Outlook | None) -> Planes:  # noqa: ARG001 - a policy's signature
    """Evict the expert least often used since the start."""
    return Planes(usage.count, usage.count + 1, usage.count, usage.count)


def layer_order(usage: Usage, outlook: Outlook | None) -> Planes:
    """Evict an expert of the layer that runs last: each is expected when its layer runs next."""
    before = np.zeros_like(usage.count)
    if outlook is not None:  # a layer that this step does not run, such as an encoder's while the decoder runs
        before[~outlook.demand[0].any(axis=1)] = 1
    return in_time(usage, before, np.zeros_like(usage.count), np.zeros_like(usage.count))


def in_time(usage: Usage, before: Plane, used: Plane, unused: Plane) -> Planes:
    """Rank by expected next uses; the latest next use has the smallest rank.

    Args:
        usage: for the step's number.
        before: `[L, E]` expected steps until the next use, 0 for this step.
        used: the same counted from the next step, if this one uses the expert.
        unused: the same if it does not.
    """
    now, following = usage.step * usage.layers + usage.place, (usage.step + 1) * usage.layers + usage.place
    rank = -(now + before * usage.layers)
    return Planes(rank, -(following + used * usage.layers), -(following + unused * usage.layers), rank)


def belady(usage: Usage, outlook: Outlook | None) -> Planes:
    """Evict the farthest known next use (Belady 1966); falls back to `next_use` where nothing is recorded."""
    if outlook is None or outlook.beyond is None:
        return next_use(usage, outlook)
    later = outlook.beyond
    return in_time(usage, np.where(outlook.demand[0] > 0, 0.0, later + 1), later, later)


def gap(rate: Plane) -> Plane:
    """Return the expected steps until the next use of an expert that a share `rate` of steps use."""
    return 1 / np.maximum(rate, LEAST_RATE) - 1


def rates(usage: Usage) -> tuple[Plane, Plane, Plane]:
    """Return the share of steps that use each expert: now, after this step if it is used in it, and if it is not."""
    recent, steady = usage.recent * (1 - FADE[0]), usage.steady * (1 - FADE[1])
    mean = MIX * recent + (1 - MIX) * steady
    gain = MIX * (1 - FADE[0]) + (1 - MIX) * (1 - FADE[1])
    faded = MIX * FADE[0] * recent + (1 - MIX) * FADE[1] * steady
    return mean, faded + gain, faded


def next_use(usage: Usage, outlook: Outlook | None) -> Planes:
    """Evict the latest expected next use, from demand as far as a forecast goes and from faded counts beyond.

    An expert used by a share r of the steps is expected after 1/r - 1 steps, at its layer's place in the step. An
    encoder's is not expected before `Usage.waits`. With demand p_0, p_1, ... for this step and further ones the
    expectation is p_0 * 0 + (1 - p_0) * (1 + ...).
    """
    mean, used_rate, unused_rate = rates(usage)
    before, used, unused = (np.maximum(gap(rate), usage.waits) for rate in (mean, used_rate, unused_rate))
    if outlook is not None:
        for demand in outlook.demand[:0:-1]:  # from the farthest step known to the next one
            used, unused = (1 - demand) * (1 + used), (1 - demand) * (1 + unused)
        before = (1 - outlook.demand[0]) * (1 + unused)
    return in_time(usage, before, used, unused)


def discounted_use(usage: Usage, outlook: Outlook | None) -> Planes:
    """Evict the smallest discounted next use: an expert is worth the mean of DISCOUNT ** steps until its next use.

    Demand p_0, p_1, ... is each step's chance of use if not used before, so the worth is p_0 + (1 - p_0) * DISCOUNT *
    (p_1 + ...). After the last known step an expert is used by a share r of the steps, from faded counts, and an
    encoder's not before `Usage.waits`. Unlike the gap of `next_use`, this stays finite for an expert used soon or
    never. The rank is that of a certain next use of equal worth.

    A load ahead hides the share HIDDEN of its time if the expert is used (p_0). If not, it is a wasted load. It costs
    the worth of its victim, so it pays where p_0 * HIDDEN - (1 - p_0) is larger.
    """
    most = DISCOUNT**usage.waits
    worth, used, unused = (np.minimum(rate / (1 - DISCOUNT * (1 - rate)), most) for rate in rates(usage))
    if outlook is None:
        return in_time(usage, _as_gap(worth), _as_gap(used), _as_gap(unused))
    for demand in outlook.demand[:0:-1]:
        used = demand + (1 - demand) * DISCOUNT * used
        unused = demand + (1 - demand) * DISCOUNT * unused
    chance = outlook.demand[0]
    worth = chance + (1 - chance) * DISCOUNT * unused
    planes = in_time(usage, _as_gap(worth), _as_gap(used), _as_gap(unused))
    gain = np.minimum(chance * HIDDEN - (1 - chance), worth)
    return planes._replace(limit=in_time(usage, _as_gap(gain), used, unused).before)


def _as_gap(worth: Plane) -> Plane:
    """Return the steps until a certain use of that worth, in multiples of 1 / GRAIN: logarithms differ in their last bits."""
    gaps: Plane = (
        np.floor(np.log(np.minimum(np.maximum(worth, LEAST_WORTH), 1)) / np.log(DISCOUNT) * GRAIN + 0.5) / GRAIN
    )
    return gaps


DISCOUNT = 0.7
"""Worth of a use one step later; .5 to .85 differ little, see docs/lab-notes.md."""
GRAIN = 2.0**20
"""Parts of a step that ranks from a logarithm are rounded to, so that NumPy and a GPU agree on them."""
HIDDEN = 0.3
"""Share of a load's time that a load ahead hides; measured, see docs/lab-notes.md."""
MIX = 0.3
"""Weight of `Usage.recent` beside `Usage.steady`; measured, see docs/lab-notes.md."""
LEAST_RATE = 1e-6
"""Smallest share of steps an expert is taken to be used in; keeps a gap finite."""
LEAST_WORTH = 1e-9
"""Smallest worth whose logarithm is taken."""
