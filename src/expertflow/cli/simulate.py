"""`expertflow simulate`: a recorded trace through strategies, slots and batches; table, picture, JSON."""

import json
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertflow.cli.arguments import parse_batches
from expertflow.cli.outputs import check_outputs
from expertflow.sim.clock import Cost
from expertflow.sim.replay import Outcome
from expertflow.sim.sweep import Grid, as_result, bound_tokens_per_second, run_grid, strategy_names

_PIPED_WIDTH = 120
"""Columns of the tables where there is no terminal to ask."""


def main(
    *,
    trace: Path,
    slots: str,
    batch: str,
    strategy: str,
    cost: dict[str, Any],
    options: dict[str, Any],
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """Replay, print, draw, write."""
    grid = Grid(
        trace=trace,
        slots=tuple(part.strip() for part in slots.split(",")),
        batches=parse_batches(batch),
        strategies=strategy_names(strategy),
        cost=Cost(**cost),
        **options,
    )
    check_outputs(plot, json_file)
    started = time.perf_counter()
    console = Console(stderr=True)
    total = len(grid.batches) * len(set(grid.slots)) * len(grid.strategies)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying", total=total)
        outcomes = run_grid(grid, lambda outcome: bar.advance(task))  # noqa: ARG005 - only counted
    seconds = time.perf_counter() - started
    show(grid, outcomes)
    if json_file is not None:
        json_file.write_text(json.dumps(as_result(grid, outcomes, seconds), indent=1, default=str) + "\n")
    if plot is not None:
        import_module("expertflow.sim.plot").draw(outcomes, plot)
    console.print(f"{len(outcomes)} replays in {seconds:.1f} s")


def show(grid: Grid, outcomes: Sequence[Outcome]) -> None:
    """Print a table a batch and number of slots."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    for batch, slots in dict.fromkeys((outcome.batch, outcome.slots) for outcome in outcomes):
        cells = [outcome for outcome in outcomes if (outcome.batch, outcome.slots) == (batch, slots)]
        console.print(_table(cells, grid.grouping))
        belady = next((cell for cell in cells if cell.strategy == "oracle"), None)
        if belady is not None:
            bound = bound_tokens_per_second(belady, belady, grid.cost)
            console.print(
                f"bound: {bound:.1f} tokens/s (Belady's bytes at {grid.cost.link_gbps:g} GB/s, or computation)"
            )
    console.print(
        "hit: needs in their slot when their layer ran; kept: of all needs, those no load was made for; clean: steps "
        "without a miss; times are of the virtual clock."
    )


def _table(cells: Sequence[Outcome], grouping: str) -> Table:
    first = cells[0]
    turns = f" in {first.groups} groups" if first.groups > 1 else ""
    turns += f" by route ({grouping})" if turns and grouping else ""
    title = f"{first.batch} live sequences{turns}, {first.slots} slots ({first.share:.1%}), {first.tokens} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("strategy", no_wrap=True)
    for name in ("hit", "kept", "loads/token", "MB/token", "wasted", "late", "clean", "stall", "tokens/s"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            cell.strategy, f"{cell.hit_ratio:.3f}", f"{cell.kept_ratio:.3f}", f"{cell.loads / cell.tokens:.2f}",
            f"{cell.bytes_per_token / 1e6:.0f}", f"{cell.wasted / cell.tokens:.2f}", f"{cell.late / cell.tokens:.2f}",
            f"{cell.clean_share:.1%}", f"{cell.stall_seconds / cell.seconds:.0%}", f"{cell.tokens_per_second:.1f}",
        )  # fmt: skip
    return table
