"""Targets from the paper and of this project as entries of one table; met or missed, from measured rows only.

Every goal is looked up in the rows of a result of its model. Where one is missed its verdict has the figure, the bound
and the reason. Must not know how anything is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from expertflow.bench.result import DECODE, KEPT, MOVED, PEAK, SAVED, WARM, Figure, Result, Row

OURS = ("plec", "next-use")
"""Strategies of this project: the better one of a place counts."""


class Verdict(NamedTuple):
    """A goal compared with rows.

    Attributes:
        goal: in words, with the target.
        figure: what was measured.
        bound: what the rows' own bounds would allow.
        met: whether the target is reached.
        reason: what stands in between where it is not.
    """

    goal: str
    figure: str
    bound: str
    met: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A target for one kind of model.

    Attributes:
        model: what people call the model.
        model_type: family of the checkpoint.
        experts: experts a layer.
        layers: MoE layers.
        judge: rows to verdicts; empty if no row has its figures.
    """

    model: str
    model_type: str
    experts: int
    layers: int
    judge: Callable[[Sequence[Row], int], list[Verdict]]

    def fits(self, result: Result) -> bool:
        """Whether a result is of this model."""
        facts = result.model
        return (facts.model_type, facts.experts, facts.layers) == (self.model_type, self.experts, self.layers)


def verdicts(result: Result) -> list[Verdict]:
    """A verdict for every goal that the result's rows have figures for."""
    warm = [row for row in result.rows if row.state == WARM]
    return [verdict for goal in GOALS if goal.fits(result) for verdict in goal.judge(warm, result.model.layers)]


def _speed(row: Row) -> float:
    return row.figures[DECODE].median if DECODE in row.figures else 0.0


def _kept_share(row: Row) -> float:
    return row.figures[KEPT].median if KEPT in row.figures else 0.0


def _find(rows: Sequence[Row], strategy: str, like: Row, worth: Callable[[Row], float] = _speed) -> Row | None:
    same = (row for row in rows if row.strategy == strategy and (row.slots, row.batch) == (like.slots, like.batch))
    return max(same, key=worth, default=None)  # its best execution


def _ours(rows: Sequence[Row], worth: Callable[[Row], float] = _speed) -> list[Row]:
    """For every number of slots and batch the best row of our strategies, whatever its execution."""
    places: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        if row.strategy in OURS:
            places.setdefault((row.slots, row.batch), []).append(row)
    return [max(found, key=worth) for found in places.values()]


def times_faster(baseline: str, target: float, per_layer: int | None = None) -> Callable[..., list[Verdict]]:
    """Decoding speed over a baseline's, each with its fastest execution, at the best batch.

    Args:
        baseline: entry of the strategy table.
        target: how many times.
        per_layer: slots a layer; None: whatever was measured.
    """

    def judge(rows: Sequence[Row], layers: int) -> list[Verdict]:
        chosen = [row for row in _ours(rows) if per_layer is None or row.slots == per_layer * layers]
        pairs = [(row, other) for row in chosen if (other := _find(rows, baseline, row)) is not None]
        if not pairs:
            return []
        best, other = max(pairs, key=lambda pair: _speed(pair[0]) / _speed(pair[1]))
        ratio = _speed(best) / _speed(other)
        bound = best.figures[DECODE].bound
        most = None if bound is None else bound / _speed(other)
        every = ", ".join(
            f"{a.strategy} {a.slots} slots batch {a.batch}: {_speed(a) / _speed(b):.2f}x" for a, b in pairs
        )
        where = "" if per_layer is None else f" at {per_layer} slots a layer"
        return [
            Verdict(
                f"{' or '.join(OURS)} at least {target:g}x {baseline}{where}", f"{ratio:.2f}x at best ({every})",
                "" if most is None else f"{most:.2f}x ({best.figures[DECODE].bound_is})", ratio >= target,
                "" if ratio >= target else _why_slow(best, other, target, most),
            )
        ]  # fmt: skip

    return judge


def _why_slow(best: Row, other: Row, target: float, most: float | None) -> str:
    if most is not None and most < target:
        return (
            f"out of reach here: {best.figures[DECODE].bound_is} alone allows {most:.2f}x, because {other.strategy} "
            f"runs at {_speed(other):.1f} tokens/s; a faster link or step of the machine, or a slower baseline, would be needed"
        )
    moved = best.figures[MOVED]
    least = "" if moved.bound is None else f", Belady {moved.bound:.2f}"
    return f"{best.strategy} moves {moved.median:.2f} MB a token ({other.strategy} {other.figures[MOVED].median:.2f}{least})"


def saves(target: float) -> Callable[..., list[Verdict]]:
    """Share of the all-resident model's memory that is not needed, at best."""

    def judge(rows: Sequence[Row], layers: int) -> list[Verdict]:  # noqa: ARG001 - a judge's signature
        found = [(row, row.figures[SAVED]) for row in rows if SAVED in row.figures]
        if not found:
            return []
        row, figure = max(found, key=lambda item: item[1].median)
        shown = (
            f"{figure.median:.2%} ({row.strategy}, {row.slots} slots, batch {row.batch}, {_speed(row):.1f} tokens/s)"
        )
        met = figure.median >= target
        return [
            Verdict(
                f"at least {target:.2%} of device memory saved",
                shown,
                _bound(figure, ".2%"),
                met,
                "" if met else _dense(row),
            )
        ]

    return judge


def _dense(row: Row) -> str:
    return f"dense weights, keys and values, workspace and {row.slots} slots take the rest; fewer slots or shorter sequences would save more"


def peak_below(target: float) -> Callable[..., list[Verdict]]:
    """Measured peak, in 10^9 bytes, of our strategy at the fewest slots."""

    def judge(rows: Sequence[Row], layers: int) -> list[Verdict]:  # noqa: ARG001 - a judge's signature
        found = [row for row in rows if row.strategy in OURS and PEAK in row.figures]
        if not found:
            return []
        row = min(found, key=lambda item: item.figures[PEAK].median)
        size = row.figures[PEAK].median / 1e9
        shown = f"{size:.2f} GB ({row.slots} slots, batch {row.batch}, {_speed(row):.1f} tokens/s)"
        met = size <= target
        plan = f"{(row.figures[PEAK].bound or 0) / 1e9:.2f} GB ({row.figures[PEAK].bound_is})"
        return [Verdict(f"peak at most {target:g} GB", shown, plan, met, "" if met else _dense(row))]

    return judge


def keeps(target: float, per_layer: int, batch: int) -> Callable[..., list[Verdict]]:
    """Share of needs for which nothing had to be loaded."""

    def judge(rows: Sequence[Row], layers: int) -> list[Verdict]:
        found = [row for row in _ours(rows, _kept_share) if (row.slots, row.batch) == (per_layer * layers, batch)]
        return [
            _kept(row, target, f"hit ratio at least {target:.2%} with {per_layer} slots a layer, batch {batch}")
            for row in found
        ]

    return judge


def _kept(row: Row, target: float, goal: str) -> Verdict:
    figure = row.figures[KEPT]
    met = figure.median >= target
    reason = "" if met else f"{row.strategy} would have to see further ahead"
    if not met and figure.bound is not None and figure.bound < target:
        reason = f"out of reach on this routing: Belady, who knows every later use, keeps {figure.bound:.2%}"
    return Verdict(goal, f"{figure.median:.2%} ({row.strategy})", _bound(figure, ".2%"), met, reason)


def points_over(baseline: str, points: float) -> Callable[..., list[Verdict]]:
    """Share of needs kept above a baseline's, everywhere: the worst place counts."""

    def judge(rows: Sequence[Row], layers: int) -> list[Verdict]:  # noqa: ARG001 - a judge's signature
        pairs = [
            (row, other)
            for row in _ours(rows, _kept_share)
            if (other := _find(rows, baseline, row, _kept_share)) is not None
        ]
        if not pairs:
            return []
        row, other = min(pairs, key=lambda pair: pair[0].figures[KEPT].median - pair[1].figures[KEPT].median)
        mine, theirs = row.figures[KEPT], other.figures[KEPT].median
        gain = 100 * (mine.median - theirs)
        most = None if mine.bound is None else 100 * (mine.bound - theirs)
        met = gain >= points
        reason = "" if met else f"{row.strategy} would have to see further ahead"
        if not met and most is not None and most < points:
            reason = f"out of reach there: Belady is {most:.1f} points above {baseline}"
        where = f"{gain:.1f} points ({row.strategy}, {row.slots} slots, batch {row.batch}: the least of {len(pairs)} places)"
        bound = "" if most is None else f"{most:.1f} points (Belady)"
        return [
            Verdict(
                f"{' or '.join(OURS)} at least {points:g} points over {baseline} everywhere", where, bound, met, reason
            )
        ]

    return judge


def _bound(figure: Figure, form: str) -> str:
    return "" if figure.bound is None else f"{figure.bound:{form}} ({figure.bound_is})"


def _goals(model: str, model_type: str, experts: int, layers: int, *judges: Callable[..., list[Verdict]]) -> list[Goal]:
    return [Goal(model=model, model_type=model_type, experts=experts, layers=layers, judge=judge) for judge in judges]


GOALS = (
    *_goals("Switch-128", "switch_transformers", 128, 12, times_faster("ring", 10, 4), times_faster("ring", 5.9, 16), saves(0.9372)),
    *_goals("Switch-32", "switch_transformers", 32, 12, keeps(0.9196, 16, 4), points_over("lru", 15)),
    *_goals("Mixtral-8x7B", "mixtral", 8, 32, times_faster("lru", 2.2), peak_below(15.99)),
    *_goals("Qwen1.5-MoE-A2.7B", "qwen2_moe", 60, 24, times_faster("lru", 2.2), peak_below(6.52)),
    *_goals("DeepSeek-V2-Lite, for DeepSeek-MoE-16B", "deepseek_v2", 64, 26, times_faster("lru", 2.2), peak_below(6.38)),
)  # fmt: skip
