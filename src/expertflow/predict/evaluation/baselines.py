"""Guesses that cost no training, one class a source; a trained predictor is compared with them.

For every token t of a passage each gives the probability that it uses each expert. It uses what is known before the
step of t: tokens up to t and the true routes before t. Counting and a regression of a few weights; NumPy only. The
paper's third rival, the next layer's gate applied early, is missing because it needs hidden states, which a trace has
not.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from expertflow.predict.dataset import Passage, Shape, split, used

Scores = npt.NDArray[np.float32]
Marks = npt.NDArray[np.bool_]


class Baseline(Protocol):
    """A source of guesses."""

    def fit(self, passages: Sequence[Passage], shape: Shape) -> None:
        """Learn from training passages, at least two."""

    def scores(self, passage: Passage) -> Scores:
        """`[n, L, E]` probabilities for each token's own step."""


class Frequency:
    """How often each expert is used, whatever the token."""

    def fit(self, passages: Sequence[Passage], shape: Shape) -> None:
        """Count."""
        self.shape = shape
        tokens = sum(len(item) for item in passages)
        total = sum(used(item.routes, shape.experts).sum(axis=0, dtype=np.float64) for item in passages)
        self.rate = (total / max(tokens, 1)).astype(np.float32)

    def scores(self, passage: Passage) -> Scores:
        """The same for all tokens."""
        return np.repeat(self.rate[None], len(passage), axis=0)


class Recent:
    """How many of the last tokens used the expert; among equals the more frequent one. One token: the paper's TLP.

    P(use | c of the last `window` tokens used it), a table a layer; ties are broken by a trace of the frequency.
    """

    def __init__(self, window: int) -> None:
        """Look back `window` tokens."""
        self.window = window

    def fit(self, passages: Sequence[Passage], shape: Shape) -> None:
        """Count uses by layer and by uses among the last tokens."""
        self._frequency = Frequency()
        self._frequency.fit(passages, shape)
        seen, hits = np.zeros((2, shape.layers, self.window + 1))
        for item in passages:
            marks = used(item.routes, shape.experts)
            among = self._among(marks)
            for count in range(self.window + 1):
                seen[:, count] += (among == count).sum(axis=(0, 2))
                hits[:, count] += ((among == count) & marks).sum(axis=(0, 2))
        self._rate = ((hits + shape.top_k / shape.experts) / (seen + 1)).astype(np.float32)

    def scores(self, passage: Passage) -> Scores:
        """Chances from recent uses; before the first token there are none."""
        shape = self._frequency.shape
        among = self._among(used(passage.routes, shape.experts))
        rate = self._rate[np.arange(shape.layers)[None, :, None], among]
        scores: Scores = rate * np.float32(0.999) + self._frequency.rate * np.float32(0.001)
        return scores

    def _among(self, marks: Marks) -> npt.NDArray[np.int8]:
        """`[n, L, E]` how many of the last tokens used each expert."""
        count = np.zeros(marks.shape, dtype=np.int8)
        for back in range(1, self.window + 1):
            count[back:] += marks[: len(marks) - back] if back < len(marks) else 0
        return count


class PreviousLayer:
    """What tokens that used these experts in the layer below use here: the paper's SLP.

    Not known before the step: it needs this step's truth of layer l - 1, so it is a guess one layer ahead, as the
    next gate is. The mean of P(expert | expert below) over the token's experts below; layer 0 has the frequency.
    """

    def fit(self, passages: Sequence[Passage], shape: Shape) -> None:
        """Count pairs."""
        self._frequency = Frequency()
        self._frequency.fit(passages, shape)
        pairs = np.zeros((shape.layers - 1, shape.experts, shape.experts), dtype=np.float32)
        seen = np.zeros((shape.layers - 1, shape.experts, 1), dtype=np.float32)
        for item in passages:
            marks = used(item.routes, shape.experts).astype(np.float32)
            below, here = marks[:, :-1].transpose(1, 2, 0), marks[:, 1:].transpose(1, 0, 2)
            pairs += below @ here
            seen += below.sum(axis=2, keepdims=True)
        self._given = (pairs + self._frequency.rate[1:, None]) / (seen + 1)

    def scores(self, passage: Passage) -> Scores:
        """Chances from this step's truth of the layer below."""
        shape = self._frequency.shape
        marks = used(passage.routes, shape.experts).astype(np.float32)
        found = self._frequency.scores(passage)
        below = marks[:, :-1].transpose(1, 0, 2)
        mean = (below @ self._given) / np.maximum(below.sum(axis=2, keepdims=True), 1)
        found[:, 1:] = mean.transpose(1, 0, 2)
        return found


class Counts:
    """Uses given a key: `(uses + PRIOR * what is expected without the key) / (seen + PRIOR)`."""

    def __init__(self, keys: npt.NDArray[np.int64], marks: Marks, prior: float) -> None:
        """Count `[n, L, E]` uses by `[n]` key; negative keys are unknown and not counted."""
        known = keys >= 0
        self._keys, place = np.unique(keys[known], return_inverse=True)
        self._seen = np.bincount(place, minlength=len(self._keys) + 1).astype(np.float32)
        kind = np.uint16 if self._seen.max() < 1 << 16 else np.uint32
        self._uses = np.zeros((len(self._keys) + 1, *marks.shape[1:]), dtype=kind)  # the last entry: never seen
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(self._keys)))
        if len(starts):
            self._uses[:-1] = np.add.reduceat(marks[known][order], starts, axis=0, dtype=kind)
        self._prior = np.float32(prior)

    def given(self, keys: npt.NDArray[np.int64], otherwise: Scores) -> Scores:
        """`[n, L, E]` chances given the keys, `otherwise` where a key was never seen."""
        entry = np.minimum(np.searchsorted(self._keys, keys), max(len(self._keys) - 1, 0))
        entry = np.where(self._keys[entry] == keys, entry, len(self._keys)) if len(self._keys) else entry
        seen = self._seen[entry][:, None, None]
        chances: Scores = (self._uses[entry] + self._prior * otherwise) / (seen + self._prior)
        return chances


def _pairs(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`[n]` a key for the token and the one before it, -1 where one of them is unknown."""
    before = np.concatenate([[-1], tokens[:-1]])
    return np.where((tokens >= 0) & (before >= 0), before << 32 | tokens, -1)


class TokenCounts:
    """What each token id used, where it was seen; the frequency where not."""

    PRIOR = 1.0

    def fit(self, passages: Sequence[Passage], shape: Shape) -> None:
        """Count by token id."""
        self._frequency = Frequency()
        self._frequency.fit(passages, shape)
        tokens = np.concatenate([item.tokens for item in passages])
        marks = np.concatenate([used(item.routes, shape.experts) for item in passages])
        self._counts = Counts(tokens, marks, self.PRIOR)

    def scores(self, passage: Passage) -> Scores:
        """Chances by token id."""
        return self._counts.given(passage.tokens, self._frequency.scores(passage))


class Mix:
    """Counts by token and by token pair, and recent usage.

    Each source is a feature `log(p + FLOOR)`. One logistic regression a layer weighs them; it is fitted on a fifth of
    the training passages with counts of the others. Then the counts are made of all. With `context` there are two
    sources
    more: what the same token, and the same pair, used last in this very passage. The strongest guess we know that
    trains no network.
    """

    PRIORS = (1.0, 1.0)
    FLOOR = 0.02
    FADES = (0.5, 0.8, 0.95)
    SHARE, MOST = 0.2, 6000

    def __init__(self, *, context: bool) -> None:
        """Choose whether to use the passage's own past."""
        self._context = context

    def fit(self, passages: Sequence[Passage], shape: Shape) -> None:
        """Weigh, then count everything."""
        counted, weighed = split(passages, self.SHARE, seed=0)
        self._count(counted, shape)
        kept, tokens = [], 0
        for item in weighed:
            if tokens < self.MOST:
                kept.append(item)
                tokens += len(item)
        features = np.concatenate([self._features(item) for item in kept])
        marks = np.concatenate([used(item.routes, shape.experts) for item in kept])
        self._weights = np.stack([_logistic(features[:, layer], marks[:, layer]) for layer in range(shape.layers)])
        self._count(passages, shape)

    def scores(self, passage: Passage) -> Scores:
        """The weighed sources."""
        logits = np.einsum("nlef,lf->nle", self._features(passage), self._weights, optimize=True)
        scores: Scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
        return scores

    def _count(self, passages: Sequence[Passage], shape: Shape) -> None:
        self._frequency = Frequency()
        self._frequency.fit(passages, shape)
        marks = np.concatenate([used(item.routes, shape.experts) for item in passages])
        self._token = Counts(np.concatenate([item.tokens for item in passages]), marks, self.PRIORS[0])
        self._pair = Counts(np.concatenate([_pairs(item.tokens) for item in passages]), marks, self.PRIORS[1])

    def _features(self, passage: Passage) -> Scores:
        """`[n, L, E, F]` the sources and a one."""
        rate = self._frequency.scores(passage)
        token = self._token.given(passage.tokens, rate)
        pair = self._pair.given(_pairs(passage.tokens), token)
        marks = used(passage.routes, self._frequency.shape.experts)
        sources = [rate, token, pair, *(_faded(marks, fade, self._frequency.rate) for fade in self.FADES)]
        if self._context:
            earlier = _last_time(passage.tokens, marks, token)
            sources += [earlier, _last_time(_pairs(passage.tokens), marks, earlier)]
        stacked = np.stack(sources, axis=-1)
        return np.concatenate([np.log(stacked + np.float32(self.FLOOR)), np.ones_like(stacked[..., :1])], axis=-1)


def _last_time(keys: npt.NDArray[np.int64], marks: Marks, otherwise: Scores) -> Scores:
    """`[n, L, E]` what the last token of the same key used in this passage; `otherwise` if there was none."""
    found = otherwise.copy()
    last: dict[int, int] = {}
    for place, key in enumerate(keys.tolist()):
        if key >= 0:
            if key in last:
                found[place] = marks[last[key]]
            last[key] = place
    return found


def _faded(marks: Marks, fade: float, start: Scores) -> Scores:
    """`[n, L, E]` the share of earlier tokens that used each expert, a token's weight falling to `fade` a step."""
    found = np.empty(marks.shape, dtype=np.float32)
    state = start.copy()
    for place in range(len(marks)):
        found[place] = state
        state = state * np.float32(fade) + marks[place] * np.float32(1 - fade)
    return found


def _logistic(features: Scores, marks: Marks, rounds: int = 8, ridge: float = 1.0) -> Scores:
    """`[F]` weights of a logistic regression by Newton's method.

    Args:
        features: `[n, E, F]`.
        marks: `[n, E]`.
        rounds: steps.
        ridge: of the weights.
    """
    x, y = features.reshape(-1, features.shape[-1]).astype(np.float64), marks.reshape(-1).astype(np.float64)
    weights = np.zeros(x.shape[1])
    for _ in range(rounds):
        chance = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        slope = x.T @ (chance - y) + ridge * weights
        curve = (x * (chance * (1 - chance))[:, None]).T @ x + ridge * np.eye(x.shape[1])
        weights -= np.linalg.solve(curve, slope)
    return weights.astype(np.float32)


BASELINES: dict[str, Callable[[], Baseline]] = {
    "frequency": Frequency,
    "previous token": lambda: Recent(1),
    "previous layer": PreviousLayer,
    "last 4 tokens": lambda: Recent(4),
    "token counts": TokenCounts,
    "mix": lambda: Mix(context=False),
    "mix with context": lambda: Mix(context=True),
}
"""The free sources by name; a new one is an entry here."""
