"""`expertflow eval-predictor`: a predictor beside the free baselines, on sequences it was not trained on.

Measures the predictions themselves, then replays them in the simulator (`bench.study`).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertflow.bench.study import Study, prepare_study, result_of
from expertflow.cli.evaluation import Test
from expertflow.cli.outputs import check_outputs
from expertflow.cli.record_bytes import Record, find_record
from expertflow.cli.tables import figures_table, megabytes
from expertflow.engine.stepping.threads import limit_threads
from expertflow.errors import ConfigError
from expertflow.files import write_whole
from expertflow.predict.artifact import load_artifact
from expertflow.predict.evaluation.evaluate import GUESSES, PRECISION, RECALL, Evaluation
from expertflow.progress import Progress
from expertflow.sim.clock import Cost


def main(*, artifact: Path, test: Test, plot: Path | None, json_file: Path | None) -> None:
    """Run the study; print, draw and write what it found."""
    started, console = time.perf_counter(), Console(stderr=True)
    limit_threads()
    check_outputs(plot, json_file)
    test.check()
    record = find_record(test.trace, test.model, test.record_mb)
    study = prepare_study(load_artifact(artifact), test)
    _warn(console, study)
    study.check_count()
    with Progress("predicting tokens", study.tokens) as bar:
        predicted = study.predict(bar.advance)
    cost = Cost(row_bytes=record.size, layer_bytes=record.layer_bytes)
    with Progress("replays", study.replays) as bar:
        findings = study.run(predicted, cost, bar.advance)
    show(findings.evaluations, findings.cells, record)
    seconds = time.perf_counter() - started
    if json_file is not None:
        result = result_of(study, test, artifact, findings) | {"seconds": round(seconds, 1)}
        result["config"] |= {"cost": asdict(cost), **record.as_json()}
        try:
            write_whole(json_file, json.dumps(result, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{json_file} cannot be written: {error.strerror}", "Choose another place.") from error
    if plot is not None:
        import_module("expertflow.predict.evaluation.report").draw(findings.evaluations, plot, study.subject)
    console.print(f"{len(study.sequences)} sequences, {study.tokens} tokens, {seconds:.0f} s")


def _warn(console: Console, study: Study) -> None:
    """Print which sequences and cases are left out."""
    if study.trained_on:
        console.print(f"[yellow]left out: {study.trained_on} sequences that the predictor was trained on[/]")
    if study.too_large:
        sizes = ", ".join(map(str, study.too_large))
        console.print(f"[yellow]not replayed: {sizes} live sequences; there are {len(study.sequences)}[/]")


def show(evaluations: Sequence[Evaluation], cells: Sequence[dict[str, Any]], record: Record) -> None:
    """Print tables: guesses, unions, and a table a replayed case.

    Args:
        evaluations: at least one; the first is the predictor's.
        cells: of the replays.
        record: what an expert's record was taken to have.
    """
    console = Console()
    console.print(_guess_table(evaluations))
    console.print(_union_table(evaluations))
    first = evaluations[0]
    errors = ", ".join(f"within {item.within}: {item.error:.3f}" for item in first.calibration)
    console.print(f"expected calibration error of the predictor (0: the token's own step): {errors}")
    for case in dict.fromkeys((c["batch"], c["groups"], c["slots"]) for c in cells):
        console.print(_replay_table([c for c in cells if (c["batch"], c["groups"], c["slots"]) == case]))
    if cells:
        console.print(f"times are of the virtual clock; an expert has {record}.")


def _guess_table(evaluations: Sequence[Evaluation]) -> Table:
    title = f"recall: experts of {evaluations[0].tokens} tokens found among the m best guesses a layer"
    count = len(evaluations[0].guesses.recall)
    wanted = [m for m in GUESSES if m <= count]
    kinds = ("own step", "next step")
    table = figures_table(title, "source", *(f"{kind}\n@{m}" for kind in kinds for m in wanted))
    for item in evaluations:
        later = item.next_guesses
        row = [f"{item.guesses.recall[m - 1]:.3f}" for m in wanted]
        row += ["" if later is None else f"{later.recall[m - 1]:.3f}" for m in wanted]
        table.add_row(item.name, *row)
    return table


def _union_table(evaluations: Sequence[Evaluation]) -> Table:
    title = (
        f"batch accuracy, of the union of B sequences. p: precision at {RECALL:.0%} recall, r: recall at {PRECISION:.0%} "
        "precision"
    )
    sizes = [union.batch for union in evaluations[0].batches]
    table = figures_table(title, "source", *(f"{what}\nB={b}" for b in sizes for what in "pr"))
    for item in evaluations:
        figures = [(u.thresholds.precision_at(RECALL), u.thresholds.recall_at(PRECISION)) for u in item.batches]
        table.add_row(item.name, *(f"{value:.3f}" for pair in figures for value in pair))
    return table


def _replay_table(cells: Sequence[dict[str, Any]]) -> Table:
    first = cells[0]
    turns = f" in {first['groups']} groups that take turns" if first["groups"] > 1 else ""
    title = f"{first['batch']} live sequences{turns}, {first['slots']} slots ({first['share']:.1%}), {first['tokens']} tokens"
    heads = ("loads/\ntoken", "MB/\ntoken", "kept", "hit", "wasted", "clean", "tokens\n/s", "to\nBelady")
    table = figures_table(title, "forecast", *heads)
    for c in cells:
        table.add_row(
            c["source"], f"{c['loads_per_token']:.2f}", megabytes(c["bytes_per_token"]), f"{c['kept']:.3f}",
            f"{c['hit']:.3f}", f"{c['wasted_per_token']:.2f}", f"{c['clean']:.1%}", f"{c['tokens_per_second']:.1f}",
            f"{c['closed']:.0%}",
        )  # fmt: skip
    return table
