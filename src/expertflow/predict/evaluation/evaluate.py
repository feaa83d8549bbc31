"""How good predictions are: recall and precision of guesses, batch accuracy, calibration. Pure NumPy.

Takes probabilities from any source and the passages they are for. A token whose id is unknown is not measured, because
nothing could be predicted from it. Sums are over tokens and layers (micro averages). Must not know predictors.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.errors import ConfigError
from expertflow.predict.dataset import Passage, Shape, used
from expertflow.types import HORIZONS

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
GUESSES = (4, 8, 12)
"""Guesses a layer that are reported."""
BATCHES = (1, 4, 16)
RECALL, PRECISION = 0.95, 0.70
"""Where batch accuracy is reported: precision at this recall, recall at this precision."""
WITHIN = (0, *HORIZONS)
"""What each output means: used by this token, within the next 1, 2, 4, 8 steps."""
_BINS = 2000
_THIN = 20
_CALIBRATION_BINS = 20
_STEPS = 256


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Recall and precision as guesses become fewer.

    Attributes:
        limit: guesses a token and layer, or the lowest probability that counts as a guess.
        recall: share of what was used that was guessed.
        precision: share of guesses that were used; 1 where there is no guess.
    """

    limit: tuple[float, ...]
    recall: tuple[float, ...]
    precision: tuple[float, ...]

    def precision_at(self, recall: float) -> float:
        """The highest precision among points of at least this recall, 0 if there is none."""
        return max((p for r, p in zip(self.recall, self.precision, strict=True) if r >= recall), default=0.0)

    def recall_at(self, precision: float) -> float:
        """The highest recall among points of at least this precision, 0 if there is none."""
        return max((r for r, p in zip(self.recall, self.precision, strict=True) if p >= precision), default=0.0)


@dataclass(frozen=True, kw_only=True)
class BatchAccuracy:
    """The paper's B_acc: recall of the union over the live sequences of a step, beside its precision.

    Attributes:
        batch: live sequences.
        steps: steps united.
        used: mean share of a layer's experts that a step uses.
        thresholds: over the united probability 1 - prod(1 - p).
        guesses: the best m of each token, united; m = 1..E.
    """

    batch: int
    steps: int
    used: float
    thresholds: Curve
    guesses: Curve


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether experts predicted with probability p are used p of the time.

    Attributes:
        within: 0 for the token's own step, else further steps.
        said: mean probability of each bin; bins are equal parts of [0, 1], empty ones left out.
        happened: share of the bin that was used.
        weight: share of all predictions in the bin.
        error: expected calibration error, the weighted mean distance of `said` and `happened`.
    """

    within: int
    said: tuple[float, ...]
    happened: tuple[float, ...]
    weight: tuple[float, ...]
    error: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured of one source.

    Attributes:
        name: of the source.
        tokens: measured.
        guesses: recall and precision of single tokens at m = 1..E guesses a layer.
        next_guesses: the same for the next step's experts by output 1 (within 1 step); None without a horizon.
        layer_recall: `[L]` at top-k guesses.
        batches: batch accuracy by batch size; sizes with too few passages are left out.
        calibration: one an output.
    """

    name: str
    tokens: int
    guesses: Curve
    next_guesses: Curve | None
    layer_recall: tuple[float, ...]
    batches: tuple[BatchAccuracy, ...]
    calibration: tuple[Calibration, ...]

    def headline(self) -> dict[str, Any]:
        """The figures of a line of a table."""
        wanted = [m for m in GUESSES if m <= len(self.guesses.recall)]
        row: dict[str, Any] = {f"recall@{m}": self.guesses.recall[m - 1] for m in wanted}
        row |= {f"precision@{m}": self.guesses.precision[m - 1] for m in wanted}
        if self.next_guesses is not None:
            row |= {f"next recall@{m}": self.next_guesses.recall[m - 1] for m in wanted}
        for item in self.batches:
            row[f"B={item.batch} precision at recall {RECALL}"] = item.thresholds.precision_at(RECALL)
            row[f"B={item.batch} recall at precision {PRECISION}"] = item.thresholds.recall_at(PRECISION)
        row |= {f"calibration error within {item.within}": item.error for item in self.calibration}
        return row

    def as_json(self) -> dict[str, Any]:
        """As plain lists and rounded numbers, the headline first; threshold curves are thinned to every `_THIN`th point."""
        plain = asdict(self)
        for item in plain["batches"]:
            item["thresholds"] = {key: points[_THIN - 1 :: _THIN] for key, points in item["thresholds"].items()}
        rounded: dict[str, Any] = _rounded({"headline": self.headline(), **plain})
        return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def evaluate(
    name: str,
    probabilities: Sequence[Floats],
    passages: Sequence[Passage],
    shape: Shape,
    batches: Sequence[int] = BATCHES,
) -> Evaluation:
    """Measure a source.

    Args:
        name: of it.
        probabilities: `[n, O, L, E]` a passage, float16 is enough; O = 1 or 5 (`WITHIN`).
        passages: the truth, in the same order.
        shape: of the routes.
        batches: live sequences to unite.

    Raises:
        ConfigError: if the probabilities do not fit the passages.
    """
    _check(probabilities, passages, shape)
    outputs = probabilities[0].shape[1]
    own, following = _Ranks(shape), _Ranks(shape)
    bins = np.zeros((outputs, 3, _CALIBRATION_BINS))
    marks, ranks = [], []
    for chances, item in zip(probabilities, passages, strict=True):
        mark, known = used(item.routes, shape.experts), item.tokens >= 0
        marks.append(mark)
        ranks.append(own.add(chances[:, 0], mark, known))
        if outputs > 1:
            following.add(chances[:-1, 1], mark[1:], known[:-1])
        for output in range(outputs):
            happened = happens_within(mark, WITHIN[output])
            bins[output] += _bin(
                chances[: len(happened), output][known[: len(happened)]], happened[known[: len(happened)]]
            )
    united = [
        _batch_accuracy(members, probabilities, np.concatenate(ranks), np.concatenate(marks))
        for members in (take_places([len(item) for item in passages], batch) for batch in batches)
        if len(members)
    ]
    return Evaluation(
        name=name,
        tokens=own.tokens,
        guesses=own.curve(),
        next_guesses=following.curve() if outputs > 1 else None,
        layer_recall=tuple(own.recall[:, shape.top_k - 1].tolist()),
        batches=tuple(united),
        calibration=tuple(_calibration(WITHIN[output], bins[output]) for output in range(outputs)),
    )


def _check(probabilities: Sequence[Floats], passages: Sequence[Passage], shape: Shape) -> None:
    lengths = [(len(chances), *chances.shape[2:]) for chances in probabilities]
    outputs = {chances.shape[1] for chances in probabilities}
    if lengths != [(len(item), shape.layers, shape.experts) for item in passages] or outputs not in (
        {1},
        {len(WITHIN)},
    ):
        raise ConfigError(
            f"the probabilities do not fit {len(passages)} passages of {shape.layers} layers x {shape.experts} experts",
            f"Give [tokens, 1 or {len(WITHIN)}, layers, experts] for each passage, in the same order.",
        )


def happens_within(marks: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    """Whether a token's successors use each expert within so many steps; 0: whether it does itself.

    Args:
        marks: `[n, L, E]` a passage's uses.
        steps: h.

    Returns:
        `[n - h, L, E]`, or fewer: the tokens whose next h are in the passage.
    """
    count = max(len(marks) - steps, 0)
    if not steps:
        return marks
    result = np.zeros((count, *marks.shape[1:]), dtype=np.bool_)
    for ahead in range(1, steps + 1):
        result |= marks[ahead : ahead + count]
    return result


class _Ranks:
    """Sums over the places of the used experts in each token's order of guesses."""

    def __init__(self, shape: Shape) -> None:
        self.tokens = 0
        self._found = np.zeros((shape.layers, shape.experts))

    def add(
        self, chances: Floats, marks: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.uint16]:
        """Count a passage; `[n, L, E]` each expert's place among its layer's guesses, equal ones by number."""
        order = np.argsort(-chances.astype(np.float32), axis=2, kind="stable")
        self.tokens += int(known.sum())
        self._found += np.take_along_axis(marks, order, axis=2)[known].sum(axis=0)
        ranks = np.empty(order.shape, dtype=np.uint16)
        np.put_along_axis(ranks, order, np.arange(order.shape[2], dtype=np.uint16), axis=2)
        return ranks

    @property
    def recall(self) -> Floats:
        """`[L, E]` at 1..E guesses."""
        found = np.cumsum(self._found, axis=1)
        recall: Floats = found / np.maximum(found[:, -1:], 1)
        return recall

    def curve(self) -> Curve:
        """All layers together."""
        layers, experts = self._found.shape
        every = np.full(experts, self.tokens * layers, dtype=np.float64)
        return _curve(np.arange(1, experts + 1), self._found.sum(axis=0), every)


def _curve(limit: Floats | Ints, right: Floats | Ints, every: Floats | Ints) -> Curve:
    """A curve from counts of right and of all guesses added at each limit."""
    found, named = np.cumsum(right), np.cumsum(every)
    precision = np.where(named > 0, found / np.maximum(named, 1), 1.0)
    recall = found / max(found[-1], 1)
    return Curve(limit=tuple(limit.tolist()), recall=tuple(recall.tolist()), precision=tuple(precision.tolist()))


def take_places(lengths: Sequence[int], batch: int) -> Ints:
    """Which tokens step together: `batch` places; when a passage ends, the next one takes its place.

    Args:
        lengths: tokens of each passage.
        batch: places.

    Returns:
        `[N, batch]` token numbers of all passages one after another; N = 0 with fewer passages than places.
    """
    starts = np.cumsum([0, *lengths])
    places: list[list[int]] = [[] for _ in range(batch)]
    for number, length in enumerate(lengths):
        free = min(range(batch), key=lambda place: len(places[place]))
        places[free] += range(int(starts[number]), int(starts[number]) + length)
    steps = min(len(place) for place in places)
    return np.array([place[:steps] for place in places], dtype=np.int64).T


def _batch_accuracy(
    members: Ints, probabilities: Sequence[Floats], ranks: npt.NDArray[np.uint16], marks: npt.NDArray[np.bool_]
) -> BatchAccuracy:
    chances = np.concatenate([item[:, 0] for item in probabilities])
    experts = marks.shape[2]
    bins, places = np.zeros((2, _BINS)), np.zeros((2, experts))
    for begin in range(0, len(members), _STEPS):
        rows = members[begin : begin + _STEPS]
        truth, lowest, missed = marks[rows[:, 0]], ranks[rows[:, 0]], 1 - chances[rows[:, 0]].astype(np.float32)
        for column in rows.T[1:]:
            truth = truth | marks[column]
            lowest = np.minimum(lowest, ranks[column])
            missed *= 1 - chances[column].astype(np.float32)
        place = np.minimum((missed * _BINS).astype(np.int32), _BINS - 1).reshape(-1)  # the most probable first
        for total, value in ((bins, place), (places, lowest.reshape(-1))):
            total[0] += np.bincount(value[truth.reshape(-1)], minlength=total.shape[1])
            total[1] += np.bincount(value, minlength=total.shape[1])
    return BatchAccuracy(
        batch=members.shape[1],
        steps=len(members),
        used=float(bins[0].sum() / bins[1].sum()),
        thresholds=_curve(1 - np.arange(1, _BINS + 1) / _BINS, bins[0], bins[1]),
        guesses=_curve(np.arange(1, experts + 1), places[0], places[1]),
    )


def _bin(chances: Floats, happened: npt.NDArray[np.bool_]) -> Floats:
    """`[3, bins]` count, sum of probabilities, uses."""
    flat, truth = chances.astype(np.float32).reshape(-1), happened.reshape(-1)
    place = np.minimum((flat * _CALIBRATION_BINS).astype(np.int32), _CALIBRATION_BINS - 1)
    size = _CALIBRATION_BINS
    return np.stack(
        [
            np.bincount(place, minlength=size),
            np.bincount(place, weights=flat, minlength=size),
            np.bincount(place[truth], minlength=size),
        ]
    ).astype(np.float64)


def _calibration(within: int, bins: Floats) -> Calibration:
    count, said, happened = bins[:, bins[0] > 0]
    weight = count / max(count.sum(), 1)
    error = float((weight * np.abs(said - happened) / np.maximum(count, 1)).sum())
    return Calibration(
        within=within,
        said=tuple((said / count).tolist()),
        happened=tuple((happened / count).tolist()),
        weight=tuple(weight.tolist()),
        error=error,
    )
