"""When waiting requests get free KV rows: one entry a rule in one table.

A pass over prompts needs nearly every expert, however few its tokens. So it can pay to keep requests waiting until
several share a pass. Must not know requests, tokens and models.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from expertflow.errors import ConfigError
from expertflow.schedule.cost import Costs

LONGEST_WAIT = 4
"""Passes that a request waits at most, in time of rounds, for others to come with it; measured, see docs/lab-notes.md."""


class Moment(NamedTuple):
    """The scheduler's state between two rounds.

    Attributes:
        free: KV rows without a sequence.
        waiting: requests without a KV row; where pages are short, those that fit.
        live: sequences with a KV row.
        stepping: of these, the ones whose prompts are read.
    """

    free: int
    waiting: int
    live: int
    stepping: int


class Admission(Protocol):
    """Decides when waiting requests are admitted."""

    def admits(self, now: Moment) -> bool:
        """Whether free rows are given to waiting requests now. Called once a round, or once a pass where no sequence steps."""


class AtOnce:
    """Admits a request as soon as there is a free row."""

    def admits(self, now: Moment) -> bool:
        """Whether a request waits and a row is free."""
        return min(now.free, now.waiting) > 0


class StaticBatches:
    """Admits requests when the last sequence of the batch before has ended."""

    def admits(self, now: Moment) -> bool:
        """Whether no sequence lives."""
        return min(now.free, now.waiting) > 0 and not now.live


class WhenItPays:
    """Admits requests once the rows that stood empty have cost as much as a pass.

    Admitted one by one, each request pays for a pass; admitted together, rows stand empty for the first ones. The sum
    is least where both are equal. What a round with empty rows costs is its fixed part, times the share that the
    waiting requests would have had of it. A request is also admitted once the rounds beside free rows took
    `LONGEST_WAIT` passes.

    Args:
        costs: what passes and rounds take at the moment, seconds.
    """

    def __init__(self, costs: Callable[[], Costs]) -> None:
        """Start with nothing lost."""
        self._costs = costs
        self._lost = self._waited = 0.0

    def admits(self, now: Moment) -> bool:
        """Whether a pass is due. Where prompts are being read anyway, or no sequence steps, it is due at once."""
        wanted = min(now.free, now.waiting)
        if not wanted:
            if not now.waiting:
                self._lost = self._waited = 0.0
            return False
        if not now.stepping or now.stepping < now.live:
            self._lost = self._waited = 0.0  # no step is held up
            return True
        costs = self._costs()
        self._lost += costs.fixed * wanted / (now.stepping + wanted)
        self._waited += costs.round_
        if self._lost < costs.pass_ and self._waited < LONGEST_WAIT * costs.pass_:
            return False
        self._lost = self._waited = 0.0
        return True


ADMISSIONS: Mapping[str, Callable[[Callable[[], Costs]], Admission]] = MappingProxyType(
    {"pays": WhenItPays, "at once": lambda _: AtOnce(), "static": lambda _: StaticBatches()}
)
"""Rules by name; each entry makes a rule from a function that returns what passes and rounds take."""


def check_admission(name: str) -> None:
    """Refuse an unknown rule.

    Raises:
        ConfigError: then.
    """
    if name not in ADMISSIONS:
        raise ConfigError(f"admission={name!r} is unknown", f"Use one of {', '.join(map(repr, ADMISSIONS))}.")


def make_admission(name: str, costs: Callable[[], Costs]) -> Admission:
    """The rule with this name.

    Args:
        name: key of `ADMISSIONS`.
        costs: what passes and rounds take at the moment, seconds.

    Raises:
        ConfigError: if there is no such rule.
    """
    check_admission(name)
    return ADMISSIONS[name](costs)
