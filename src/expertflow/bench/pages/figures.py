"""The pictures of a report: speed by strategy, what is kept beside Belady, speed and memory over the budget."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Picture

from expertflow.bench.result import BELADY, DECODE, KEPT, PEAK, RESIDENT, WARM, Result, Row
from expertflow.errors import ResultError
from expertflow.files import save_picture

_DPI = 90
_MARKS = "osv^D<>pXh"
MIB = 2**20
_FAR = 3.0
"""Times as high as everything else: a line there would flatten the bars."""


def _warm(result: Result) -> list[Row]:
    return [row for row in result.rows if row.state == WARM]


def _label(row: Row, rows: Sequence[Row]) -> str:
    """The strategy, with its execution where rows differ in it."""
    several = len({other.execution for other in rows if other.strategy == row.strategy}) > 1
    return f"{row.strategy} ({row.execution})" if several else row.strategy


def _save(picture: Picture, path: Path, result: Result) -> Path:
    facts, machine = result.model, result.machine
    device = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    try:
        save_picture(picture, path, f"{facts.name}; {device}, {result.date}", dpi=_DPI)
    except OSError as error:
        raise ResultError(f"{path} cannot be written: {error.strerror}", "Choose another place.") from error
    return path


def speed(result: Result, path: Path) -> Path:
    """Bars of tokens a second by strategy (colour), execution (hatched: eager) and slots, one panel a batch, each with its bound.

    The all-resident model is a line, or a number where it is so far above that other lines would merge.
    """
    rows = [row for row in _warm(result) if DECODE in row.figures]
    batches = sorted({row.batch for row in rows})
    picture = Picture(figsize=(3.6 * len(batches) + 1.6, 3.6), layout="constrained")
    panels = picture.subplots(1, len(batches), squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        here = [row for row in rows if row.batch == batch]
        bars = [row for row in here if row.strategy != RESIDENT]
        slots = sorted({row.slots for row in bars})
        labels = list(dict.fromkeys(_label(row, bars) for row in bars))
        names = list(dict.fromkeys(row.strategy for row in bars))
        for place, label in enumerate(labels):
            mine = sorted((row for row in bars if _label(row, bars) == label), key=lambda row: row.slots)
            at = [slots.index(row.slots) + (place - (len(labels) - 1) / 2) * 0.8 / len(labels) for row in mine]
            figures = [row.figures[DECODE] for row in mine]
            spread = [[f.median - f.low for f in figures], [f.high - f.median for f in figures]]
            eager = mine[0].execution == "host" and any(row.execution != "host" for row in bars)
            panel.bar(
                at, [f.median for f in figures], 0.8 / len(labels), yerr=spread, label=label, error_kw={"lw": 0.7},
                color=f"C{names.index(mine[0].strategy)}", hatch="////" if eager else "", edgecolor="white", linewidth=0,
            )  # fmt: skip
            bounds = [(x, f.bound) for x, f in zip(at, figures, strict=True) if f.bound is not None]
            for x, bound in bounds:
                panel.hlines(bound, x - 0.4 / len(labels), x + 0.4 / len(labels), color="black", lw=1.2)
        top = panel.get_ylim()[1]
        for place, (row, style) in enumerate(
            zip((row for row in here if row.strategy == RESIDENT), ("--", ":"), strict=False)
        ):
            whole, name = row.figures[DECODE].median, f"all resident ({row.execution})"
            if whole <= _FAR * top:
                panel.axhline(whole, color="black", ls=style, lw=1, label=name)
            else:
                at_top = {"transform": panel.transAxes, "va": "top", "fontsize": "small"}
                panel.text(0.02, 0.97 - 0.07 * place, f"{name}: {whole:.0f}", **at_top)
        panel.set_xticks(range(len(slots)), [str(count) for count in slots])
        panel.set_xlabel("slots")
        panel.set_title(f"batch {batch}")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("decoded tokens/s")
    panels[-1].plot([], [], "_", color="black", ms=10, mew=1.2, label="bound")
    picture.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return _save(picture, path, result)


def kept(result: Result, path: Path) -> Path:
    """Share of needs for which nothing was loaded against slots, Belady's beside it."""
    rows = [row for row in _warm(result) if KEPT in row.figures]
    batches = sorted({row.batch for row in rows})
    picture = Picture(figsize=(3.6 * len(batches) + 1.6, 3.6), layout="constrained")
    panels = picture.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    for panel, batch in zip(panels, batches, strict=True):
        here = [row for row in rows if row.batch == batch]
        labels = list(dict.fromkeys(_label(row, here) for row in here if row.strategy != BELADY))
        for label, mark in zip([*labels, BELADY], _MARKS * 3, strict=False):
            mine = sorted((row for row in here if _label(row, here) == label), key=lambda row: row.share)
            style = {"color": "black", "ls": "--"} if label == BELADY else {}
            shown = "Belady" if label == BELADY else label
            shares, values = [100 * row.share for row in mine], [row.figures[KEPT].median for row in mine]
            panel.plot(shares, values, marker=mark, label=shown, clip_on=False, **style)
        panel.set_title(f"batch {batch}")
        panel.set_xlabel("slots, % of experts")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of needs kept (no load)")
    picture.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return _save(picture, path, result)


def budget(result: Result, path: Path) -> Path:
    """Speed and peak memory over the share of experts that have a slot, of the largest batch.

    A line joins the slot counts of one strategy; the all-resident model is a point of its own.
    """
    rows = [row for row in _warm(result) if DECODE in row.figures]
    batch = max(row.batch for row in rows)
    rows = [row for row in rows if row.batch == batch]
    whole = [row for row in rows if row.strategy == RESIDENT]
    picture = Picture(figsize=(8.5, 3.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    labels = list(dict.fromkeys(_label(row, rows) for row in rows if row.strategy != RESIDENT))
    for label, mark in zip(labels, _MARKS * len(labels), strict=False):
        mine = sorted((row for row in rows if _label(row, rows) == label), key=lambda row: row.share)
        shares = [100 * row.share for row in mine]
        left.plot(shares, [row.figures[DECODE].median for row in mine], marker=mark, label=label)
        right.plot(shares, [row.figures[PEAK].median / MIB for row in mine], marker=mark, label=label)
    for row, mark in zip(whole, "*P", strict=False):  # another thing than any strategy: points of their own, no line
        name = f"{RESIDENT} ({row.execution})" if len(whole) > 1 else RESIDENT
        for panel, value in ((left, row.figures[DECODE].median), (right, row.figures[PEAK].median / MIB)):
            panel.plot([100 * row.share], [value], marker=mark, ms=9, color="black", ls="", label=name)
    for panel, name in ((left, "decoded tokens/s"), (right, "peak device memory, MiB")):
        panel.set_xlabel("slots, % of experts (100: all resident)")
        panel.set_ylabel(name)
        panel.set_xlim(0, 104)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    picture.suptitle(f"batch {batch}", fontsize="medium")
    picture.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return _save(picture, path, result)
