"""`expertflow bench`: measure every strategy on this machine; a table, then the whole result as one line of JSON."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from expertflow.bench.measure import measure
from expertflow.bench.pages.bounds import over_bounds
from expertflow.bench.presets import make_settings
from expertflow.bench.result import BELADY, DECODE, HIT, KEPT, PEAK, RESIDENT, WARM, Result, Row, write_result
from expertflow.cli.outputs import check_outputs
from expertflow.cli.tables import figures_table
from expertflow.memory.devices import entered, resolve_device
from expertflow.progress import Progress
from expertflow.units import format_bytes


def main(*, preset: str, options: Mapping[str, Any], out: Path | None) -> None:
    """Measure, print, write."""
    check_outputs(None, out)
    settings = make_settings(preset, options)
    transformers_logging.set_verbosity_error()
    with Progress("runs") as bar, entered(resolve_device(settings.device)):
        result = measure(
            settings, command_of(preset, options, out), lambda what, done, total: bar.update(done, total, what)
        )
    if out is not None:
        write_result(result, out)
    show(result)
    print(result.to_json())  # noqa: T201 - the output


def command_of(preset: str, options: Mapping[str, Any], out: Path | None) -> str:
    """The command line that does it again; of paths only the last part, since folders differ from machine to machine."""
    words = ["expertflow", "bench", "--preset", preset]
    for name, value in options.items():
        if value is None:
            continue
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        text = Path(text).absolute().name if name in {"model", "predictor", "prompts_file"} else text
        words += ["--execution" if name == "executions" else f"--{name.replace('_', '-')}", text]
    words += [] if out is None else ["--out", out.name]
    return shlex.join(words)


def show(result: Result) -> None:
    """Print the warm rows, short: a table a batch."""
    console, facts = Console(), result.model
    console.print(
        f"{facts.name}: {facts.layers} x {facts.experts} experts, top-{facts.top_k}, on {result.machine['device']}",
        markup=False,
    )
    rows = [row for row in result.rows if row.state == WARM and row.strategy != BELADY]
    for batch in sorted({row.batch for row in rows}):
        heads = ("slots", "decoded\ntokens/s", "of the\nbound", "hit", "kept", "Belady\nkeeps", "peak", "exact")
        table = figures_table(f"batch {batch}", "strategy", *heads)
        for row in rows:
            if row.batch == batch:
                table.add_row(*_cells(row))
        console.print(table)
    for line in over_bounds(result):
        console.print(f"above the bound: {line}", markup=False, highlight=False)
    for line in result.left_out:
        console.print(f"not measured: {line}", markup=False)
    state = "complete" if result.complete else "INCOMPLETE"
    console.print(f"{state}, {result.seconds:.0f} s; link {result.link_gbps:.1f} GB/s")


def _cells(row: Row) -> tuple[str, ...]:
    speed, peak = row.figures[DECODE], row.figures[PEAK]
    share = "" if speed.bound is None else f"{speed.median / speed.bound:.0%}"
    cells = [f"{row.strategy} ({row.execution})", str(row.slots), f"{speed.median:.1f}", share]
    if row.strategy == RESIDENT:
        return (*cells, "", "", "", format_bytes(peak.median), "")
    kept = row.figures[KEPT]
    bound = "" if kept.bound is None else f"{kept.bound:.3f}"
    cells += [f"{row.figures[HIT].median:.3f}", f"{kept.median:.3f}", bound, format_bytes(peak.median)]
    return (*cells, {True: "yes", False: "NO", None: "?"}[row.exact])
