"""Forecast which experts the coming steps use, one class a source, from nothing to the recorded truth.

`outlook` is called once at the start of a step, `learn` once at its end. An `Outlook` is demand `[H, L, E]` for this
step and further ones, and expected next uses beyond them. Must not know slots.
"""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from expertflow.cache.policy import Outlook, Plane

_BUCKETS = 8192
"""Entries of the token table; token ids are folded onto them."""


class Step(NamedTuple):
    """The facts of one forward pass.

    Attributes:
        number: counted from 0.
        tokens: `[T]` token ids fed in, -1 unknown; None if all are unknown.
        needed: `[L, E]` bool, the experts it used; None before it has run.
        routes: `[T, L, K]` the experts of each token, E means none; None before it has run, or if not observed.
        loads: records it loaded, ahead or not; 0 before it has run, and where loads are not counted.
        ahead: of these, records loaded ahead.
        found: accesses whose record a prefetch had loaded, counted at its first use.
    """

    number: int
    tokens: npt.NDArray[np.int32] | None = None
    needed: npt.NDArray[np.bool_] | None = None
    routes: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None
    loads: int = 0
    ahead: int = 0
    found: int = 0


class Forecast(Protocol):
    """Forecasts the experts of coming steps.

    Attributes:
        per_token: whether it learns from single tokens (`tokens`, `routes` of a step).
        foreknown: whether the outlook depends on the number of a step alone, not on tokens or past steps. Then it can
            forecast steps whose routing stays on the device. A step that an error broke off has no number of its own
            there; on the host it has.
    """

    per_token: bool
    foreknown: bool

    def outlook(self, step: Step) -> Outlook | None:
        """Return what is expected of a coming step; None if nothing is known."""

    def learn(self, step: Step) -> None:
        """Take in a finished step."""


class NoForecast:
    """A forecast without knowledge, and the base of forecasts that learn nothing."""

    per_token = foreknown = False

    def outlook(self, step: Step) -> Outlook | None:  # noqa: ARG002 - the protocol's signature
        """Return None."""
        return None

    def learn(self, step: Step) -> None:
        """Do nothing."""


class LayerOrder(NoForecast):
    """Forecasts every expert of every layer."""

    foreknown = True

    def __init__(self, layers: int, experts: int) -> None:
        """Forecast for a model of `layers` MoE layers with `experts` experts each."""
        self._all = Outlook(np.ones((1, layers, experts)))

    def outlook(self, step: Step) -> Outlook | None:  # noqa: ARG002 - the protocol's signature
        """Return demand 1 for every expert of this step."""
        return self._all


class CountsByToken:
    """Forecasts from the experts that each token id used so far, mixed with the layer's average.

    `P(expert | token) = (count + PRIOR * P(expert)) / (tokens seen + PRIOR)`. A step uses an expert if any of its
    tokens does.
    """

    per_token, foreknown = True, False
    PRIOR = 1.0

    def __init__(self, layers: int, experts: int) -> None:
        """Start with no counts."""
        self._experts = experts
        self._counts = np.zeros((_BUCKETS, layers, experts), dtype=np.float32)
        self._seen = np.zeros(_BUCKETS, dtype=np.float32)
        self._base = np.zeros((layers, experts), dtype=np.float64)
        self._total = 0
        self._layer = np.arange(layers)[None, :, None]

    def outlook(self, step: Step) -> Outlook | None:
        """Return the chance that any of the step's tokens uses an expert; None before the first step."""
        if step.tokens is None or not self._total:
            return None
        entries = step.tokens % _BUCKETS
        base = self._base / self._total
        known = (step.tokens >= 0)[:, None, None]
        counts, seen = self._counts[entries] * known, self._seen[entries][:, None, None] * known
        each = (counts + self.PRIOR * base) / (seen + self.PRIOR)
        return Outlook(1 - np.prod(1 - np.minimum(each, 1), axis=0, keepdims=True, dtype=np.float64))

    def learn(self, step: Step) -> None:
        """Count the experts of the step's tokens."""
        if step.tokens is None or step.routes is None:
            return
        tokens, layers, _ = step.routes.shape
        hot = np.zeros((tokens, layers, self._experts + 1), dtype=np.float32)
        hot[np.arange(tokens)[:, None, None], self._layer, step.routes] = 1
        hot = hot[..., : self._experts]
        known = step.tokens >= 0
        entries = step.tokens[known] % _BUCKETS
        np.add.at(self._counts, entries, hot[known])
        np.add.at(self._seen, entries, 1)
        self._base += hot.sum(axis=0)
        self._total += tokens


class Recorded(NoForecast):
    """Forecasts the truth from a recording of the same run: this step, `horizon` further ones, or all of them.

    Args:
        needed: `[N, L, E]` bool, every step's experts.
        horizon: further steps known; None: all (Belady's rule needs them).
    """

    foreknown = True

    def __init__(self, needed: npt.NDArray[np.bool_], horizon: int | None = 0) -> None:
        """Keep the recording; without a horizon, compute every next use once."""
        self._needed, self._horizon = needed, horizon
        self._next = next_uses(needed) if horizon is None else None

    def outlook(self, step: Step) -> Outlook | None:
        """Return the recorded demand; None after the recording's end."""
        if step.number >= len(self._needed):
            return None
        last = step.number + 1 + (self._horizon or 0)
        demand = self._needed[step.number : last].astype(np.float64)
        if self._next is None:
            return Outlook(demand)
        return Outlook(demand, self._next[step.number + 1] - float(step.number + 1))


class NextGate(NoForecast):
    """Forecasts as the next layer's gate does one layer early, with its recorded recall: a trace has no hidden states.

    Each expert of the true path is predicted with probability `recall`; each one missed is replaced by a wrong one.

    Args:
        needed: `[N, L, E]` bool, the true path.
        recall: share of the path predicted.
        seed: of the mistakes.
    """

    foreknown = True

    def __init__(self, needed: npt.NDArray[np.bool_], recall: float, seed: int = 0) -> None:
        """Draw mistakes step by step, the same for the same step."""
        self._needed, self._recall, self._seed = needed, recall, seed

    def outlook(self, step: Step) -> Outlook | None:
        """Return the path with its mistakes; None after the recording's end."""
        if step.number >= len(self._needed):
            return None
        random = np.random.default_rng((self._seed, step.number))
        return Outlook(blur(self._needed[step.number], self._recall, random)[None])


def blur(needed: npt.NDArray[np.bool_], recall: float, random: np.random.Generator) -> Plane:
    """Guess the true path: each expert is found with probability `recall`, and false alarms are as many as misses.

    Args:
        needed: bool `[L, E]`, the truth.
        recall: see above; the guess's precision is the same.
        random: source of the mistakes.

    Returns:
        float64 `[L, E]`, 1 for a guess, else 0.
    """
    draw = random.random(needed.shape)
    wrong = np.maximum((~needed).sum(axis=1, keepdims=True), 1)
    alarm = (1 - recall) * needed.sum(axis=1, keepdims=True) / wrong
    return np.where(needed, draw < recall, draw < alarm).astype(np.float64)


def next_uses(needed: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return, for every step and one after the last, the number of the step that uses each expert next.

    Args:
        needed: bool `[N, L, E]`, every step's experts.

    Returns:
        float32 `[N + 1, L, E]`; 1e8 for an expert that is not used again.
    """
    result = np.empty((len(needed) + 1, *needed.shape[1:]), dtype=np.float32)
    upcoming = np.full(needed.shape[1:], 1e8, dtype=np.float32)
    result[-1] = upcoming
    for number in range(len(needed) - 1, -1, -1):
        upcoming[needed[number]] = number
        result[number] = upcoming
    return result
