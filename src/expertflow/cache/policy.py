"""Who leaves when a slot is needed: pure functions over usage, one a policy.

A policy ranks slots; it owns no state and never touches the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class Usage:
    """What happened to each slot so far.

    Attributes:
        last_use: `[S]` int64, the clock (one tick an access) at which the slot's expert was last used.
    """

    last_use: npt.NDArray[np.int64]


Policy = Callable[[Slots, Usage], int]
"""Candidates (slot numbers, never empty) and usage in, the slot to evict out."""


def lru(candidates: Slots, usage: Usage) -> int:
    """Evict the least recently used expert; among equals the lowest slot."""
    return int(candidates[np.argmin(usage.last_use[candidates])])
