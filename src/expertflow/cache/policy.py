"""Who leaves when a slot is needed: pure functions from what is known to ranks, one a policy.

A policy sees the step's beginning and gives three planes of ranks (`core.Planes`): they cover the whole step, so
that who leaves is an extremum over arrays, on the host, in compiled code and in a GPU kernel alike. A policy owns no
state and never touches the tables.
"""

from collections.abc import Callable
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
    """

    layers: int
    experts: int
    step: int = 0
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

    def learn(self, needed: npt.NDArray[np.bool_]) -> None:
        """A step is over; `needed` `[L, E]` is what it used."""
        np.copyto(self.last_use, self.step * self.layers + self.place, where=needed)
        self.count += needed
        self.recent *= FADE[0]
        self.recent += needed
        self.steady *= FADE[1]
        self.steady += needed
        self.step += 1


FADE = (0.8, 0.98)
"""How fast `Usage.recent` and `Usage.steady` forget; measured, see docs/lab-notes.md."""

Policy = Callable[[Usage, Outlook | None], Planes]
"""What is known at the start of a step in, ranks for the step out."""


def lru(usage: Usage, outlook: Outlook | None) -> Planes:  # noqa: ARG001 - a policy's signature
    """Least recently used leaves; a layer's experts are used at one time."""
    now = np.broadcast_to(usage.step * usage.layers + usage.place, usage.last_use.shape)
    return Planes(usage.last_use, np.ascontiguousarray(now), usage.last_use)


def lfu(usage: Usage, outlook: Outlook | None) -> Planes:  # noqa: ARG001 - a policy's signature
    """Least often used since the start leaves."""
    return Planes(usage.count, usage.count + 1, usage.count)


def layer_order(usage: Usage, outlook: Outlook | None) -> Planes:  # noqa: ARG001 - a policy's signature
    """The layer that comes last leaves: every expert is expected at its layer's next turn."""
    return in_time(usage, np.zeros_like(usage.count), np.zeros_like(usage.count), np.zeros_like(usage.count))


def in_time(usage: Usage, before: Plane, used: Plane, unused: Plane) -> Planes:
    """Ranks from expected next uses: the later, the sooner it leaves.

    Args:
        usage: says which step it is.
        before: `[L, E]` expected steps until the next use, 0 for this step.
        used: the same counted from the next step, if this one uses the expert.
        unused: the same if it does not.
    """
    now, following = usage.step * usage.layers + usage.place, (usage.step + 1) * usage.layers + usage.place
    return Planes(
        -(now + before * usage.layers), -(following + used * usage.layers), -(following + unused * usage.layers)
    )
