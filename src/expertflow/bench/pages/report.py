"""Result files in, a page of Markdown with pictures out. Every table is headed by the command that makes its numbers again.

Every number on the page comes from the files.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from expertflow.bench.pages import figures
from expertflow.bench.pages.bounds import over_bounds
from expertflow.bench.pages.goals import verdicts
from expertflow.bench.result import (
    BELADY,
    COLD,
    DECODE,
    FIRST,
    HIT,
    KEPT,
    KEPT_ALL,
    LONG,
    MOVED,
    PEAK,
    RESIDENT,
    SAVED,
    WARM,
    WHOLE,
    Figure,
    Result,
    Row,
)
from expertflow.errors import ResultError
from expertflow.files import write_whole
from expertflow.units import format_bytes

_PAGE = "README.md"


def write_report(results: Sequence[tuple[str, Result]], folder: Path) -> list[Path]:
    """Write the page and the pictures.

    Args:
        results: name of each file, and what it holds.
        folder: is made if it is not there.

    Returns:
        What was written, the page first.

    Raises:
        ResultError: if the folder cannot be written.
    """
    page = folder / _PAGE
    pictures: list[Path] = []
    sections = ["# Measurements\n"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in results:
            stem = Path(name).stem
            drawn = [
                make(result, folder / f"{stem}_{make.__name__}.png")
                for make in (figures.speed, figures.kept, figures.budget)
            ]
            pictures += drawn
            sections.append(section(name, result, [path.name for path in drawn]))
        write_whole(page, "\n".join(sections))
    except OSError as error:
        raise ResultError(f"{folder} cannot be written: {error.strerror}", "Choose another place.") from error
    return [page, *pictures]


def section(name: str, result: Result, pictures: Iterable[str] = ()) -> str:
    """A result as Markdown: circumstances, goals, tables.

    Args:
        name: of its file.
        result: what it holds.
        pictures: paths to show, as the page will find them.
    """
    facts = result.model
    parts = [f"## {facts.name}, preset {result.preset}\n", _circumstances(name, result)]
    parts += [f"![{path}]({path})\n" for path in pictures]
    for title, body in (
        ("Goals", goals_table(result)),
        ("Decoded tokens a second, warm", speed_table(result) + _over_bounds(result)),
        ("Share of decoding needs for which nothing had to be loaded, warm", kept_table(result, KEPT)),
        ("The same with prompts", kept_table(result, KEPT_ALL)),
        ("What each strategy did, warm", detail_table(result)),
        ("Cold, warm, after a long prompt", states_table(result)),
    ):
        if body:
            parts += [f"### {title}\n", f"`{result.command}`\n", body]
    return "\n".join(parts)


def _circumstances(name: str, result: Result) -> str:
    facts, machine = result.model, result.machine
    ran = [row for row in result.rows if row.exact is not None]
    wrong = [row for row in ran if not row.exact]
    over = [row for row in result.rows if _over(row)]
    exact = (
        f"equal to the all-resident model's in all {len(ran)} rows"
        if not wrong
        else f"NOT equal in {len(wrong)} of {len(ran)} rows"
    )
    inside = "within the plan in every row" if not over else f"OVER the plan in {len(over)} rows"
    config = result.config
    commit = f" at commit {result.commit}" if result.commit else ""
    state = "Complete" if result.complete else "**Incomplete**"
    made = f"`{name}`, made by `{result.command}` on {result.date}{commit}, seed {result.seed}.\n"
    ran_on = (
        f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), "
        f"{', '.join(f'{key} {value}' for key, value in result.versions.items())}. {facts.model_type}: {facts.layers} MoE "
        f"layers x {facts.experts} experts, top-{facts.top_k}, {facts.dtype}, {format_bytes(facts.row_bytes)} an expert, "
        f"{format_bytes(facts.dense_bytes)} dense; copies of that size reach {result.link_gbps:.1f} GB/s. "
        f"Prompts: {config.get('prompts')}. {config.get('tokens')} new tokens a sequence, {config.get('repeats')} timed runs in "
        f"turns, medians (smallest-largest). Every greedy token is {exact}; the measured peak is {inside}. "
        f"{state}, {result.seconds:.0f} s.\n"
    )
    lines = [made, ran_on]
    lines += [f"Not measured: {item}.\n" for item in result.left_out]
    lines += [f"{note}\n" for note in _notes(result)]
    return "\n".join(lines)


def _over(row: Row) -> bool:
    peak = row.figures.get(PEAK)
    return peak is not None and peak.bound is not None and peak.median > peak.bound


def _notes(result: Result) -> list[str]:
    """Notes of the rows, each once."""
    notes: dict[str, list[str]] = {}
    for row in result.rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.strategy)
    return [f"{', '.join(dict.fromkeys(names))}: {note}." for note, names in notes.items()]


def _cell(figure: Figure | None, digits: int = 1) -> str:
    if figure is None:
        return ""
    if len(figure.values) == 1:
        return f"{figure.median:.{digits}f}"
    return f"{figure.median:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *body, ""]) if body else ""


def _grid(result: Result, name: str) -> tuple[list[str], dict[tuple[int, float, int], dict[str, Row]]]:
    """Columns (strategies, with their execution where there are several) and rows by slots and batch."""
    warm = [
        row
        for row in result.rows
        if row.state == WARM and row.strategy not in {RESIDENT, BELADY} and name in row.figures
    ]
    several = len({row.execution for row in warm}) > 1
    columns: list[str] = []
    grid: dict[tuple[int, float, int], dict[str, Row]] = {}
    for row in warm:
        column = f"{row.strategy} ({row.execution})" if several else row.strategy
        columns += [] if column in columns else [column]
        grid.setdefault((row.slots, row.share, row.batch), {})[column] = row
    return columns, grid


def speed_table(result: Result) -> str:
    """Tokens a second by slots and batch, beside all-resident and what the link allows."""
    columns, grid = _grid(result, DECODE)
    resident = {(row.batch, row.execution): row for row in result.rows if row.strategy == RESIDENT}
    lines = []
    for (slots, share, batch), cells in grid.items():
        bounds = {row.figures[DECODE].bound: row.figures[DECODE].bound_is for row in cells.values()}
        best = max((bound for bound in bounds if bound is not None), default=None)
        whole = [row for (size, _), row in resident.items() if size == batch]
        lines.append([
            f"{slots} ({share:.1%})", str(batch), *(_cell(cells[c].figures[DECODE]) if c in cells else "" for c in columns),
            " / ".join(f"{row.figures[DECODE].median:.1f}" for row in whole),
            "" if best is None else f"{best:.1f} ({bounds[best]})",
        ])  # fmt: skip
    return _table(["slots", "batch", *columns, "all resident", "bound"], lines)


def _over_bounds(result: Result) -> str:
    """What is faster than its bound, and why: a list under the table of speeds, or nothing."""
    lines = over_bounds(result)
    return "\n".join(["", "Above the bound:", "", *(f"- {line}." for line in lines), ""]) if lines else ""


def kept_table(result: Result, name: str) -> str:
    """Share kept by slots and batch, beside Belady."""
    columns, grid = _grid(result, name)
    belady = {(row.slots, row.batch): row.figures[name] for row in result.rows if row.strategy == BELADY}
    lines = [
        [
            f"{slots} ({share:.1%})", str(batch), *(_cell(cells[c].figures[name], 3) if c in cells else "" for c in columns),
            _cell(belady.get((slots, batch)), 3),
        ]
        for (slots, share, batch), cells in grid.items()
    ]  # fmt: skip
    return _table(["slots", "batch", *columns, "Belady"], lines)


def detail_table(result: Result) -> str:
    """Hits, bytes, first token, whole-run speed and memory, row by row."""
    heads = ["strategy", "execution", "slots", "batch", "found in time", "MB/token (Belady)", "first token s (resident)", "tokens/s with prompt", "peak (plan)", "saved", "tokens exact"]  # fmt: skip
    lines = []
    for row in result.rows:
        if row.state != WARM or row.strategy == BELADY:
            continue
        moved, first, peak, saved = (row.figures.get(name) for name in (MOVED, FIRST, PEAK, SAVED))
        lines.append([
            row.strategy, row.execution, str(row.slots), str(row.batch), _cell(row.figures.get(HIT), 3),
            _beside(moved, 2), _beside(first, 2), _cell(row.figures.get(WHOLE)),
            "" if peak is None else f"{format_bytes(peak.median)} ({format_bytes(peak.bound or 0)})",
            "" if saved is None else f"{saved.median:.1%}", "the reference" if row.strategy == RESIDENT else {True: "yes", False: "NO", None: "not compared"}[row.exact],
        ])  # fmt: skip
    return _table(heads, lines)


def _beside(figure: Figure | None, digits: int) -> str:
    if figure is None:
        return ""
    return f"{figure.median:.{digits}f}" + ("" if figure.bound is None else f" ({figure.bound:.{digits}f})")


def states_table(result: Result) -> str:
    """Decoding speed and share kept with an empty cache, with a warm one, behind one long prompt."""
    cold = [row for row in result.rows if row.state == COLD]
    lines = []
    for row in cold:
        same = {
            other.state: other for other in result.rows
            if (other.strategy, other.execution, other.slots, other.batch) == (row.strategy, row.execution, row.slots, row.batch)
        }  # fmt: skip
        states = [same.get(state) for state in (COLD, WARM, LONG)]
        cells = ["" if other is None else _cell(other.figures[DECODE]) for other in states]
        cells += ["" if other is None else f"{other.figures[KEPT].median:.3f}" for other in states]
        lines.append([row.strategy, row.execution, str(row.slots), str(row.batch), *cells])
    heads = [f"{what} {state}" for what in ("tokens/s", "kept") for state in (COLD, WARM, LONG)]
    return _table(["strategy", "execution", "slots", "batch", *heads], lines)


def goals_table(result: Result) -> str:
    """Every goal: figure, bound, and the reason where it is missed."""
    lines = [
        [item.goal, item.figure, item.bound, "met" if item.met else "**missed**", item.reason]
        for item in verdicts(result)
    ]
    return _table(["goal", "figure", "bound", "verdict", "what stands in between"], lines)
