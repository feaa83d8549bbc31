"""`expertflow simulate`: a recorded trace through strategies, slots and batches; table, picture, JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertflow.cli.arguments import parse_batches
from expertflow.cli.outputs import check_outputs
from expertflow.cli.record_bytes import Record, find_record
from expertflow.cli.tables import figures_table, megabytes
from expertflow.errors import ConfigError
from expertflow.files import processor, write_whole
from expertflow.progress import Progress
from expertflow.sim.clock import Cost
from expertflow.sim.replay import Outcome
from expertflow.sim.sweep import Grid, as_result, bound_tokens_per_second, run_grid, strategy_names
from expertflow.trace.format import open_trace


def main(
    *,
    trace: Path,
    slots: str,
    batch: str,
    strategy: str,
    model: str | None,
    record_mb: float | None,
    cost: dict[str, Any],
    options: dict[str, Any],
    plot: Path | None,
    json_file: Path | None,
) -> None:
    """Replay, print, draw, write."""
    check_outputs(plot, json_file)
    grid = Grid(
        trace=trace,
        slots=tuple(part.strip() for part in slots.split(",")),
        batches=parse_batches(batch),
        strategies=strategy_names(strategy),
        cost=Cost(**cost),
        **options,
    )
    record = find_record(trace, model, record_mb)  # last, because with a model it imports torch
    grid = replace(grid, cost=replace(grid.cost, row_bytes=record.size, layer_bytes=record.layer_bytes))
    started = time.perf_counter()
    console = Console(stderr=True)
    total = len(grid.batches) * len(set(grid.slots)) * len(grid.strategies)
    with Progress("replays", total) as bar:
        outcomes = run_grid(grid, lambda outcome: bar.advance(note=outcome.strategy))
    seconds = time.perf_counter() - started
    show(grid, outcomes, record)
    if json_file is not None:
        result = as_result(grid, outcomes, seconds)
        result["config"] |= record.as_json()
        _write(json_file, result)
    if plot is not None:
        about = f"{open_trace(trace).header.model or 'model unknown'}, {record} an expert; replayed at {grid.cost.link_gbps:g} GB/s"
        about += f" on a virtual clock; {processor()}, {time.strftime('%Y-%m-%d')}"
        import_module("expertflow.sim.plot").draw(outcomes, plot, about)
    console.print(f"{len(outcomes)} replays in {seconds:.1f} s")


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "Choose another place.") from error


def show(grid: Grid, outcomes: Sequence[Outcome], record: Record) -> None:
    """Print a table a batch and number of slots."""
    console = Console()
    for batch, slots in dict.fromkeys((outcome.batch, outcome.slots) for outcome in outcomes):
        cells = [outcome for outcome in outcomes if (outcome.batch, outcome.slots) == (batch, slots)]
        console.print(_table(cells, grid.grouping))
        belady = next((cell for cell in cells if cell.strategy == "oracle"), None)
        if belady is not None:
            bound = bound_tokens_per_second(belady, belady)
            console.print(
                f"bound: {bound:.1f} tokens/s (Belady's bytes at {grid.cost.link_gbps:g} GB/s, or computation)"
            )
    console.print(
        "hit: needs in their slot when their layer ran; kept: of all needs, those no load was made for; clean: steps "
        f"without a miss; times are of the virtual clock. An expert has {record}."
    )


def _table(cells: Sequence[Outcome], grouping: str) -> Table:
    first = cells[0]
    turns = f" in {first.groups} groups" if first.groups > 1 else ""
    turns += f" by route ({grouping})" if turns and grouping else ""
    title = f"{first.batch} live sequences{turns}, {first.slots} slots ({first.share:.1%}), {first.tokens} tokens"
    heads = ("hit", "kept", "loads/\ntoken", "MB/\ntoken", "wasted", "late", "clean", "stall", "tokens\n/s")
    table = figures_table(title, "strategy", *heads)
    for cell in cells:
        table.add_row(
            cell.strategy, f"{cell.hit_ratio:.3f}", f"{cell.kept_ratio:.3f}", f"{cell.loads / cell.tokens:.2f}",
            megabytes(cell.bytes_per_token), f"{cell.wasted / cell.tokens:.2f}", f"{cell.late / cell.tokens:.2f}",
            f"{cell.clean_share:.1%}", f"{cell.stall_seconds / cell.seconds:.0%}", f"{cell.tokens_per_second:.1f}",
        )  # fmt: skip
    return table
