"""Runs and bounds in, rows of a result out. Arithmetic only: nothing is run here."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from expertflow.bench.recorded import BeladyBound
from expertflow.bench.result import (
    BELADY,
    DECODE,
    FIRST,
    HIT,
    KEPT,
    KEPT_ALL,
    MOVED,
    PEAK,
    RESIDENT,
    SAVED,
    WARM,
    WHOLE,
    Figure,
    Row,
)
from expertflow.bench.shared_host import Run
from expertflow.engine.plan import Plan


class Bounds(NamedTuple):
    """What limits a strategy.

    Attributes:
        resident: the row with every expert in a slot; None: not measured.
        least: Belady's loads, or None.
        link_gbps: of the link.
    """

    resident: Row | None
    least: BeladyBound | None
    link_gbps: float


def _each(runs: Sequence[Run], value: Callable[[Run], float]) -> tuple[float, ...]:
    return tuple(round(value(run), 6) for run in runs)


def _common(batch: int, runs: Sequence[Run]) -> dict[str, Figure]:
    """Speed, cold or warm."""
    return {
        DECODE: Figure(values=_each(runs, lambda run: run.decoded / run.decode_seconds), unit="tokens/s"),
        WHOLE: Figure(
            values=_each(runs, lambda run: (run.decoded + batch) / (run.first_seconds + run.decode_seconds)),
            unit="tokens/s",
        ),
        FIRST: Figure(values=_each(runs, lambda run: run.first_seconds), unit="s"),
    }


def resident_row(plan: Plan, batch: int, runs: Sequence[Run], peak: int) -> Row:
    """The model with every expert in a slot: the bound of the others."""
    figures = {
        **_common(batch, runs),
        PEAK: Figure(values=(float(peak),), unit="bytes", bound=float(plan.total), bound_is="the plan"),
    }
    return Row(
        strategy=RESIDENT, slots=plan.slots, share=1.0, batch=batch, state=WARM, execution=plan.execution, exact=None,
        figures=figures,
    )  # fmt: skip


def belady_row(plan: Plan, batch: int, least: BeladyBound) -> Row:
    """What Belady would have kept and moved."""
    figures = {
        KEPT: Figure(values=(round(least.kept, 6),), unit="share"),
        KEPT_ALL: Figure(values=(round(least.kept_all, 6),), unit="share"),
        MOVED: Figure(values=(round(least.loads * plan.least_load / batch / 1e6, 6),), unit="MB/token"),
    }
    return Row(
        strategy=BELADY, slots=plan.slots, share=plan.share, batch=batch, state=WARM, execution="replay", exact=None,
        figures=figures, note="every later use is known, and the slots held the best when a run began; counted over the recorded routing, nothing is run",
    )  # fmt: skip


def strategy_row(  # noqa: PLR0913 - what a row is made of
    plan: Plan,
    batch: int,
    state: str,
    runs: Sequence[Run],
    peak: int,
    bounds: Bounds,
    *,
    exact: bool | None,
    note: str = "",
) -> Row:
    """A strategy's numbers, each beside its bound."""
    resident, least = bounds.resident, bounds.least
    whole = _common(batch, runs)
    if (limit := _speed_bound(plan, batch, bounds)) is not None:
        whole[DECODE] = _bounded(whole[DECODE], *limit)
    if resident is not None:
        whole[WHOLE] = _bounded(whole[WHOLE], resident.figures[WHOLE].median, "all experts resident")
        whole[FIRST] = _bounded(whole[FIRST], resident.figures[FIRST].median, "all experts resident")
    figures = {
        **whole,
        HIT: Figure(values=_each(runs, lambda run: run.hits / max(run.needed, 1)), unit="share"),
        KEPT: Figure(values=_each(runs, lambda run: run.kept / max(run.needed, 1)), unit="share"),
        KEPT_ALL: Figure(values=_each(runs, lambda run: run.kept_all / max(run.needed_all, 1)), unit="share"),
        MOVED: Figure(values=_each(runs, lambda run: run.moved / max(run.decoded, 1) / 1e6), unit="MB/token"),
        PEAK: Figure(values=(float(peak),), unit="bytes", bound=float(plan.total), bound_is="the plan"),
    }
    if least is not None:
        figures[KEPT] = _bounded(figures[KEPT], round(least.kept, 6), "Belady")
        figures[KEPT_ALL] = _bounded(figures[KEPT_ALL], round(least.kept_all, 6), "Belady")
        figures[MOVED] = _bounded(figures[MOVED], round(least.loads * plan.least_load / batch / 1e6, 6), "Belady")
    if resident is not None:
        total = resident.figures[PEAK].median
        figures[SAVED] = Figure(
            values=(round(1 - peak / total, 6),), unit="share", bound=round(1 - plan.least / total, 6), bound_is="one slot"
        )  # fmt: skip
    return Row(
        strategy=plan.strategy, slots=plan.slots, share=plan.share, batch=batch, state=state, execution=plan.execution,
        exact=exact, figures=figures, note=note,
    )  # fmt: skip


def _speed_bound(plan: Plan, batch: int, bounds: Bounds) -> tuple[float, str] | None:
    """No slower link and no computation saved: the all-resident step, or Belady's bytes over the link, whichever is longer.

    If one is unknown, the other; None if both are.
    """
    step = 0.0 if bounds.resident is None else batch / bounds.resident.figures[DECODE].median
    link = 0.0 if bounds.least is None else bounds.least.loads * plan.least_load / bounds.link_gbps / 1e9
    if link > step:
        return round(batch / link, 6), "Belady's bytes at the link's speed"
    if bounds.resident is None:
        return None
    return round(batch / step, 6), "all experts resident"


def _bounded(figure: Figure, bound: float, name: str) -> Figure:
    return Figure(values=figure.values, unit=figure.unit, bound=bound, bound_is=name)
