"""The table of named strategies. A baseline is a row here; the engine, the CLI and the tests read the live table."""

from dataclasses import dataclass
from typing import Literal

from expertflow.cache.policy import Policy, lru
from expertflow.config import nearest
from expertflow.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the slots are used.

    Attributes:
        name: as the user writes it.
        summary: one line for tables and docs.
        policy: who leaves when a slot is needed.
        partition: `layer` gives each layer an equal share of the slots, `global` lets all layers compete.
        retain: whether experts stay in their slots after their layer is done.
    """

    name: str
    summary: str
    policy: Policy
    partition: Literal["layer", "global"]
    retain: bool = True


_ROWS = (
    Strategy(
        name="on-demand",
        summary="keeps nothing between layers: every needed expert is loaded when its layer runs",
        policy=lru,
        partition="global",
        retain=False,
    ),
    Strategy(
        name="lru",
        summary="an equal share of the slots for each layer, least recently used leaves (the paper's Cache-MoE)",
        policy=lru,
        partition="layer",
    ),
    Strategy(
        name="lru-global",
        summary="one pool for all layers, least recently used leaves",
        policy=lru,
        partition="global",
    ),
)
STRATEGIES = {row.name: row for row in _ROWS}


def find_strategy(name: str) -> Strategy:
    """Look a strategy up.

    Raises:
        ConfigError: if there is no such row; names the nearest.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"unknown strategy {name!r}", nearest(name, STRATEGIES))
    return STRATEGIES[name]
