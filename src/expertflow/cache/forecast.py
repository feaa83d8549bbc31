"""What is expected of the coming steps, from nothing to the recorded truth. One class a source.

A forecast is asked once, at the start of a step, and told once, at its end. Its answer is an `Outlook`: demand
arrays `[H, L, E]` for this step and further ones, and what lies beyond. Knows no slots.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from expertflow.cache.policy import Outlook, Plane

_BUCKETS = 8192
"""Rows of the token table; token ids are folded onto them."""


class Step(NamedTuple):
    """The facts of one forward pass.

    Attributes:
        number: counted from 0.
        tokens: `[T]` token ids fed in, -1 unknown; None if nobody knows them.
        needed: `[L, E]` bool, what it used; None before it has run.
        routes: `[T, L, K]` the experts of each token, E means none; None before it has run, or if nobody asked.
        loads: rows it loaded, ahead or not; 0 before it has run, and where nobody counts.
        ahead: of these, rows loaded ahead.
        found: needs that were met by a row loaded ahead, its first use.
    """

    number: int
    tokens: npt.NDArray[np.int32] | None = None
    needed: npt.NDArray[np.bool_] | None = None
    routes: npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | None = None
    loads: int = 0
    ahead: int = 0
    found: int = 0


class Forecast(Protocol):
    """Says what is expected.

    Attributes:
        per_token: whether it learns from single tokens (`tokens`, `routes` of a step).
        foreknown: whether the number of a step is all it goes by: it learns nothing and looks at no token. So it can be asked
            about steps whose facts stay on the device. (There a step that an error broke off has no number of its own; on the
            host it has.)
    """

    per_token: bool
    foreknown: bool

    def outlook(self, step: Step) -> Outlook | None:
        """Before a step; None if nothing is known."""

    def learn(self, step: Step) -> None:
        """After it."""


class Nothing:
    """Knows nothing."""

    per_token = foreknown = False

    def outlook(self, step: Step) -> Outlook | None:  # noqa: ARG002 - the protocol's signature
        """Nothing."""
        return None

    def learn(self, step: Step) -> None:
        """Nothing to learn."""


class LayerOrder(Nothing):
    """Every expert of every layer, in the order of the layers."""

    foreknown = True

    def __init__(self, layers: int, experts: int) -> None:
        """For a model of this size."""
        self._all = Outlook(np.ones((1, layers, experts)))

    def outlook(self, step: Step) -> Outlook | None:  # noqa: ARG002 - the protocol's signature
        """All of them."""
        return self._all


class PreviousStep:
    """The step will use what the last one used."""

    per_token = foreknown = False

    def __init__(self, layers: int, experts: int) -> None:
        """Nothing seen yet."""
        self._last = np.zeros((1, layers, experts))

    def outlook(self, step: Step) -> Outlook | None:  # noqa: ARG002 - the protocol's signature
        """The last step's experts."""
        return Outlook(self._last)

    def learn(self, step: Step) -> None:
        """Remember the step."""
        assert step.needed is not None
        self._last = step.needed[None].astype(np.float64)


class Frequency:
    """How often an expert was used, recent steps weighing more."""

    per_token = foreknown = False

    def __init__(self, layers: int, experts: int, fade: float = 0.95) -> None:
        """Nothing seen yet; a step's weight falls to `fade` with each later one."""
        self._fade = fade
        self._sum, self._weight = np.zeros((1, layers, experts)), 0.0

    def outlook(self, step: Step) -> Outlook | None:  # noqa: ARG002 - the protocol's signature
        """The share of steps, faded."""
        return Outlook(self._sum / self._weight) if self._weight else None

    def learn(self, step: Step) -> None:
        """Count the step."""
        assert step.needed is not None
        self._sum = self._sum * self._fade + step.needed
        self._weight = self._weight * self._fade + 1


class TokenCounts:
    """What each token id used so far, mixed with what its layer uses anyway.

    `P(expert | token) = (count + PRIOR * P(expert)) / (tokens seen + PRIOR)`; a step uses an expert unless none of its
    tokens does.
    """

    per_token, foreknown = True, False
    PRIOR = 1.0

    def __init__(self, layers: int, experts: int) -> None:
        """Nothing seen yet."""
        self._experts = experts
        self._counts = np.zeros((_BUCKETS, layers, experts), dtype=np.float32)
        self._seen = np.zeros(_BUCKETS, dtype=np.float32)
        self._base = np.zeros((layers, experts), dtype=np.float64)
        self._total = 0
        self._layer = np.arange(layers)[None, :, None]

    def outlook(self, step: Step) -> Outlook | None:
        """The chance that any of the step's tokens uses the expert."""
        if step.tokens is None or not self._total:
            return None
        rows = step.tokens % _BUCKETS
        base = self._base / self._total
        known = (step.tokens >= 0)[:, None, None]
        counts, seen = self._counts[rows] * known, self._seen[rows][:, None, None] * known
        each = (counts + self.PRIOR * base) / (seen + self.PRIOR)
        return Outlook(1 - np.prod(1 - np.minimum(each, 1), axis=0, keepdims=True, dtype=np.float64))

    def learn(self, step: Step) -> None:
        """Count the step's tokens."""
        if step.tokens is None or step.routes is None:
            return
        tokens, layers, _ = step.routes.shape
        hot = np.zeros((tokens, layers, self._experts + 1), dtype=np.float32)
        hot[np.arange(tokens)[:, None, None], self._layer, step.routes] = 1
        hot = hot[..., : self._experts]
        known = step.tokens >= 0
        rows = step.tokens[known] % _BUCKETS
        np.add.at(self._counts, rows, hot[known])
        np.add.at(self._seen, rows, 1)
        self._base += hot.sum(axis=0)
        self._total += tokens


class PredictedPath(Nothing):
    """Whatever a predictor says: any function from a step to demand `[H, L, E]`, such as the trained one."""

    def __init__(self, predict: Callable[[Step], Plane]) -> None:
        """Ask `predict` at every step."""
        self._predict = predict

    def outlook(self, step: Step) -> Outlook | None:
        """The prediction."""
        return Outlook(self._predict(step))


class Recorded(Nothing):
    """The truth, from a recording of the same run: this step, `horizon` further ones, or all of them.

    Args:
        needed: `[N, L, E]` bool, every step's experts.
        horizon: further steps known; None: all (what Belady's rule needs).
    """

    foreknown = True

    def __init__(self, needed: npt.NDArray[np.bool_], horizon: int | None = 0) -> None:
        """Keep the recording; with an endless horizon, look up every next use once."""
        self._needed, self._horizon = needed, horizon
        self._next = next_uses(needed) if horizon is None else None

    def outlook(self, step: Step) -> Outlook | None:
        """What is going to happen; None behind the recording's end."""
        if step.number >= len(self._needed):
            return None
        last = step.number + 1 + (self._horizon or 0)
        demand = self._needed[step.number : last].astype(np.float64)
        if self._next is None:
            return Outlook(demand)
        return Outlook(demand, self._next[step.number + 1] - float(step.number + 1))


class NextGate(Nothing):
    """The next layer's gate, applied one layer early, as recorded accuracy: a trace holds no hidden states.

    Each expert of the true path is foreseen with probability `recall`; each one missed is replaced by a wrong one.

    Args:
        needed: `[N, L, E]` bool, the true path.
        recall: share of the path foreseen.
        seed: of the mistakes.
    """

    foreknown = True

    def __init__(self, needed: npt.NDArray[np.bool_], recall: float, seed: int = 0) -> None:
        """Draw mistakes step by step, the same for the same step."""
        self._needed, self._recall, self._seed = needed, recall, seed

    def outlook(self, step: Step) -> Outlook | None:
        """The path with its mistakes; None behind the recording's end."""
        if step.number >= len(self._needed):
            return None
        random = np.random.default_rng((self._seed, step.number))
        return Outlook(blur(self._needed[step.number], self._recall, random)[None])


def blur(needed: npt.NDArray[np.bool_], recall: float, random: np.random.Generator) -> Plane:
    """A guess of the true path: an expert is known with probability `recall`, false alarms come as often as misses.

    Args:
        needed: `[L, E]` the truth.
        recall: see above; the guess's precision is the same.
        random: where chance comes from.

    Returns:
        `[L, E]` 1 for a guess, else 0.
    """
    draw = random.random(needed.shape)
    wrong = np.maximum((~needed).sum(axis=1, keepdims=True), 1)
    alarm = (1 - recall) * needed.sum(axis=1, keepdims=True) / wrong
    return np.where(needed, draw < recall, draw < alarm).astype(np.float64)


def next_uses(needed: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """For every step, and one behind the last, the number of the step that uses each expert next.

    Returns:
        `[N + 1, L, E]`; an expert not used again has a step far away.
    """
    result = np.empty((len(needed) + 1, *needed.shape[1:]), dtype=np.float32)
    upcoming = np.full(needed.shape[1:], 1e8, dtype=np.float32)
    result[-1] = upcoming
    for number in range(len(needed) - 1, -1, -1):
        upcoming[needed[number]] = number
        result[number] = upcoming
    return result
