"""Who leaves when a slot is needed: pure functions from what is known to ranks, one a policy.

A policy sees the step's beginning and gives planes of ranks (`core.Planes`): they cover the whole step, so
that who leaves is an extremum over arrays, on the host, in compiled code and in a GPU kernel alike. A policy owns no
state and never touches the tables.
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
    """What a forecast says at the start of a step.

    Attributes:
        demand: `[H, L, E]` float64, how likely each expert is used in this step, the next one, and so on.
        beyond: `[L, E]` float64, expected further steps until first use if not used in those H; None: unknown.
    """

    demand: Plane
    beyond: Plane | None = None


@dataclass(kw_only=True)
class Usage:
    """What has been observed, one number an expert; `[L, E]` float64 each.

    Attributes:
        layers: MoE layers.
        experts: experts a layer.
        step: steps finished.
        last_use: step and layer of the last use in layer times (`step * L + layer`), before all if never.
        count: uses.
        recent: uses, each step's weight fading by `FADE[0]` a step.
        steady: the same with `FADE[1]`.
        reached: the layers that a decode step runs; None: all. An encoder's are not.
        waits: `[L, 1]`, steps until a layer is taken to come again: `PROMPTS_APART` for an encoder's, else 0.
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
        """Nothing observed."""
        shape = (self.layers, self.experts)
        self.last_use = np.full(shape, -1.0)
        self.count, self.recent, self.steady = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.place = np.arange(self.layers, dtype=np.float64)[:, None]
        self.waits = np.zeros((self.layers, 1))
        if self.reached is not None:
            self.waits[~np.asarray(self.reached)] = PROMPTS_APART

    def learn(self, needed: npt.NDArray[np.bool_]) -> None:
        """A step is over; `needed` `[L, E]` is what it used."""
        np.copyto(self.last_use, self.step * self.layers + self.place, where=needed)
        self.count += needed
        self.recent *= FADE[0]
        self.recent += needed
        self.steady *= FADE[1]
        self.steady += needed
        self.step += 1


PROMPTS_APART = 32.0
"""Steps that an encoder's experts are taken to wait for the next prompt: their counts are high just when it is far."""
FADE = (0.7, 0.97)
"""How fast `Usage.recent` and `Usage.steady` forget; measured, see docs/lab-notes.md."""

Policy = Callable[[Usage, Outlook | None], Planes]
"""What is known at the start of a step in, ranks for the step out."""


def lru(usage: Usage, outlook: Outlook | None) -> Planes:
    """Least recently used leaves; a layer's experts are used at one time.

    An expert that a forecast names for this step counts as used then, or a load ahead would never be worth a slot.
    """
    now = np.ascontiguousarray(np.broadcast_to(usage.step * usage.layers + usage.place, usage.last_use.shape))
    before = usage.last_use if outlook is None else np.where(outlook.demand[0] > 0, now, usage.last_use)
    return Planes(before, now, usage.last_use, before)


def lfu(usage: Usage, outlook: Outlook | None) -> Planes:  # noqa: ARG001 - a policy's signature
    """Least often used since the start leaves."""
    return Planes(usage.count, usage.count + 1, usage.count, usage.count)


def layer_order(usage: Usage, outlook: Outlook | None) -> Planes:
    """The layer that comes last leaves: every expert is expected at its layer's next turn."""
    before = np.zeros_like(usage.count)
    if outlook is not None:  # a layer that the pass is known not to reach, an encoder's while the decoder runs
        before[~outlook.demand[0].any(axis=1)] = 1
    return in_time(usage, before, np.zeros_like(usage.count), np.zeros_like(usage.count))


def in_time(usage: Usage, before: Plane, used: Plane, unused: Plane) -> Planes:
    """Ranks from expected next uses: the later, the sooner it leaves.

    Args:
        usage: says which step it is.
        before: `[L, E]` expected steps until the next use, 0 for this step.
        used: the same counted from the next step, if this one uses the expert.
        unused: the same if it does not.
    """
    now, following = usage.step * usage.layers + usage.place, (usage.step + 1) * usage.layers + usage.place
    rank = -(now + before * usage.layers)
    return Planes(rank, -(following + used * usage.layers), -(following + unused * usage.layers), rank)


def belady(usage: Usage, outlook: Outlook | None) -> Planes:
    """The farthest known next use leaves (Belady 1966); falls back to `next_use` where nothing is recorded."""
    if outlook is None or outlook.beyond is None:
        return next_use(usage, outlook)
    later = outlook.beyond
    return in_time(usage, np.where(outlook.demand[0] > 0, 0.0, later + 1), later, later)


def gap(rate: Plane) -> Plane:
    """Expected steps until the next use of an expert that a share `rate` of steps use."""
    return 1 / np.maximum(rate, 1e-6) - 1


def rates(usage: Usage) -> tuple[Plane, Plane, Plane]:
    """Share of steps that use each expert, by faded counts: now, after this step if it uses it, and if it does not."""
    recent, steady = usage.recent * (1 - FADE[0]), usage.steady * (1 - FADE[1])
    mean = MIX * recent + (1 - MIX) * steady
    gain = MIX * (1 - FADE[0]) + (1 - MIX) * (1 - FADE[1])
    faded = MIX * FADE[0] * recent + (1 - MIX) * FADE[1] * steady
    return mean, faded + gain, faded


def next_use(usage: Usage, outlook: Outlook | None) -> Planes:
    """The latest expected next use leaves: demand as far as a forecast goes, faded counts behind it.

    An expert used by a share r of the steps is expected after 1/r - 1 steps, at its layer's place in the step; an
    encoder's not before `Usage.waits`. With
    demand p_0, p_1, ... for this step and further ones the expectation is p_0 * 0 + (1 - p_0) * (1 + ...).
    """
    mean, used_rate, unused_rate = rates(usage)
    before, used, unused = (np.maximum(gap(rate), usage.waits) for rate in (mean, used_rate, unused_rate))
    if outlook is not None:
        for demand in outlook.demand[:0:-1]:  # from the farthest step known to the next one
            used, unused = (1 - demand) * (1 + used), (1 - demand) * (1 + unused)
        before = (1 - outlook.demand[0]) * (1 + unused)
    return in_time(usage, before, used, unused)


def discounted_use(usage: Usage, outlook: Outlook | None) -> Planes:
    """The least discounted next use leaves: an expert is worth the mean of DISCOUNT ** steps until its next use.

    Demand p_0, p_1, ... is each step's chance of use if not used before, so the worth is p_0 + (1 - p_0) * DISCOUNT *
    (p_1 + ...); behind the last known step an expert is used by a share r of the steps, as faded counts say, an encoder's
    not before `Usage.waits`. Unlike
    the expected gap of `next_use`, that of an expert used soon or never is not ruled by the never. Ranks are those of
    the certain next use that is worth as much.

    A load ahead hides the share HIDDEN of its time if the expert is used (p_0), is a load wasted if not, and costs
    what its victim is worth: it pays where p_0 * HIDDEN - (1 - p_0) is above that.
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
    """Steps until a certain use that is worth as much, in multiples of 1 / GRAIN: logarithms differ in their last bits."""
    gaps: Plane = np.floor(np.log(np.minimum(np.maximum(worth, 1e-9), 1)) / np.log(DISCOUNT) * GRAIN + 0.5) / GRAIN
    return gaps


DISCOUNT = 0.7
"""What a use one step later is worth; .5 to .85 differ little, see docs/lab-notes.md."""
GRAIN = 2.0**20
"""Fineness of ranks that come from a logarithm, so that NumPy and a GPU agree on them."""
HIDDEN = 0.3
"""Share of a load's time that running ahead is taken to hide; measured, see docs/lab-notes.md."""
MIX = 0.3
"""Weight of `Usage.recent` beside `Usage.steady`; measured, see docs/lab-notes.md."""
