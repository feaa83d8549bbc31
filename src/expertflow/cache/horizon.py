"""From a predictor's numbers to demand: the chances of single sequences become those of a step and of further steps.

A predictor says for each sequence how likely it uses an expert in its own step, and within the next 1, 2, 4, 8 steps
after it. A policy wants, for all sequences that step together, the chance of use in this step and in each further one
if the expert was not used before. Knows no slots and no predictor.
"""

import numpy as np
import numpy.typing as npt

from expertflow.types import HORIZONS

Chances = npt.NDArray[np.float64]
STEPS_KNOWN = 1 + HORIZONS[-1]
"""Steps a demand can speak of: this one, and as many further ones as a predictor's longest horizon."""


def unite(each: npt.NDArray[np.floating]) -> Chances:
    """The chance that any of B sequences uses an expert, as if they chose independently.

    Args:
        each: `[B, ...]` chances of single sequences.
    """
    none: Chances = np.prod(1 - each.astype(np.float64), axis=0)
    return 1 - none


def hazards(chances: Chances) -> Chances:
    """Chances of use step by step, each if not used before, from chances of use within so many steps.

    Within a horizon's new steps the chance is taken to be the same: with S_h = 1 - P(within h), made monotone, the
    steps from g + 1 to h have 1 - (S_h / S_g) ** (1 / (h - g)).

    Args:
        chances: `[O, L, E]` this step, then within the horizons; O = 1 or 1 + len(HORIZONS).

    Returns:
        `[1, L, E]` or `[1 + 8, L, E]`: this step, then each further one.
    """
    planes = [chances[0]]
    before, begin = np.ones_like(chances[0]), 0
    for within, end in zip(chances[1:], HORIZONS, strict=False):
        left = np.minimum(before, np.clip(1 - within, 0, 1))
        steady = 1 - (left / np.maximum(before, 1e-9)) ** (1 / (end - begin))
        planes += [steady] * (end - begin)
        before, begin = left, end
    return np.stack(planes)


def take_turns(groups: list[Chances]) -> Chances:
    """Step by step demand for groups that take turns, from each one's own.

    The next steps belong to the other groups, whose tokens are sampled and whose last step is done: A0 B0 A1 B1 ...

    Args:
        groups: `[H, L, E]` each, in the order of their turns, the one that steps now first.

    Returns:
        `[min(H * G, STEPS_KNOWN), L, E]`.
    """
    return np.stack(groups, axis=1).reshape(-1, *groups[0].shape[1:])[:STEPS_KNOWN]
