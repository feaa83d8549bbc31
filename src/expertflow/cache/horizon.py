"""Turn a predictor's chances for single sequences into demand for a step and for further steps.

A predictor gives for each sequence the chance that it uses an expert in its coming step, and within the next
`types.HORIZONS` steps after it. A policy needs the chance that any of the sequences of a step uses the expert, in this
step and in each further one if it was not used before. Must not know slots and predictors.
"""

import numpy as np
import numpy.typing as npt

from expertflow.types import HORIZONS

Chances = npt.NDArray[np.float64]
STEPS_KNOWN = 1 + HORIZONS[-1]
"""Steps that a demand covers at most: this one, and as many further ones as a predictor's longest horizon."""
LEAST_LEFT = 1e-9
"""The smallest divisor where a chance of no use is divided by the one before."""


def unite(each: npt.NDArray[np.floating]) -> Chances:
    """Return the chance that any of B sequences uses an expert, as if they chose independently.

    Args:
        each: `[B, ...]` chances of single sequences.

    Returns:
        float64 `[...]`.
    """
    none: Chances = np.prod(1 - each.astype(np.float64), axis=0)
    return 1 - none


def hazards(chances: Chances) -> Chances:
    """Turn chances of use within horizons into chances of use step by step, each if not used before.

    The chance is taken as equal in all steps between two horizons g < h. With S_h = 1 - P(within h), made monotone,
    each step from g + 1 to h has 1 - (S_h / S_g) ** (1 / (h - g)).

    Args:
        chances: `[O, L, E]` this step, then within the horizons; O = 1 or 1 + len(HORIZONS).

    Returns:
        `[1, L, E]` or `[STEPS_KNOWN, L, E]`: this step, then each further one.
    """
    planes = [chances[0]]
    before, begin = np.ones_like(chances[0]), 0
    for within, end in zip(chances[1:], HORIZONS, strict=False):
        left = np.minimum(before, np.clip(1 - within, 0, 1))
        steady = 1 - (left / np.maximum(before, LEAST_LEFT)) ** (1 / (end - begin))
        planes += [steady] * (end - begin)
        before, begin = left, end
    return np.stack(planes)


def take_turns(groups: list[Chances]) -> Chances:
    """Interleave the demand of groups that step alternately: A0 B0 A1 B1 ...

    The next steps are those of the other groups, whose tokens are sampled already.

    Args:
        groups: `[H, L, E]` each, in the order in which they step, the group of this step first.

    Returns:
        `[min(H * G, STEPS_KNOWN), L, E]`.
    """
    return np.stack(groups, axis=1).reshape(-1, *groups[0].shape[1:])[:STEPS_KNOWN]
