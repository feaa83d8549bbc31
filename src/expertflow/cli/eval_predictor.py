"""`expertflow eval-predictor`: a predictor beside the free baselines, on sequences it was not trained on.

Metrics of the predictions themselves, then PLEC in the simulator with each source at equal slots, beside `next-use`
(no forecast), the step's true path, and Belady.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import STRATEGIES
from expertflow.cli.evaluation import Test
from expertflow.cli.outputs import check_outputs
from expertflow.cli.record_bytes import Record, find_record
from expertflow.cli.tables import figures_table, megabytes
from expertflow.engine.threads import limit_threads
from expertflow.errors import ConfigError, PredictorError, TraceError
from expertflow.files import processor, write_whole
from expertflow.predict.artifact import Artifact, load_artifact
from expertflow.predict.dataset import Passage, Shape, leave_out, mark, passages, shape_of
from expertflow.predict.evaluation.baselines import BASELINES
from expertflow.predict.evaluation.evaluate import GUESSES, PRECISION, RECALL, Evaluation, evaluate
from expertflow.predict.evaluation.score import score
from expertflow.progress import Progress
from expertflow.sim.clock import Cost
from expertflow.sim.predicted import PredictedRows, RowScores
from expertflow.sim.replay import Outcome, replay_sizes
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import Trace, load_trace
from expertflow.units import parse_slots

PREDICTOR = "predictor"
ENDS = (("nothing (next-use)", "next-use"), ("this step's truth", "oracle-step"), ("Belady", "oracle"))
"""What every forecast is compared with: name here, row of the strategy table."""
_AFTER_THE_FACT = {"previous layer"}
"""Sources that are known only while the step runs: measured, not replayed."""


def main(*, artifact: Path, test: Test, plot: Path | None, json_file: Path | None) -> None:
    """Measure, replay, print, draw, write."""
    started, console = time.perf_counter(), Console(stderr=True)
    limit_threads()
    check_outputs(plot, json_file)
    test.check()
    record = find_record(test.trace, test.model, test.record_mb)
    predictor = load_artifact(artifact)
    trace, held = _load(test.trace, test, predictor)
    seen = set(predictor.about.get("seen", ()))
    unseen = [item for item in held if mark(item) not in seen]
    if len(unseen) < len(held):
        console.print(f"[yellow]left out: {len(held) - len(unseen)} sequences that the predictor was trained on[/]")
    held = unseen
    _check_count(held, test)
    free = None if test.free is None else _load(test.free, replace(test, only=""), predictor)[1]
    if free is not None and test.leave_out:
        free = leave_out(free, test.leave_out)[0]
    too_large = sorted({batch for batch, _ in test.cases if batch > len(held)})
    if too_large:
        console.print(
            f"[yellow]not replayed: {', '.join(map(str, too_large))} live sequences; there are {len(held)}[/]"
        )
    cases = [_workload(trace, held, case, test) for case in test.cases if case[0] <= len(held)]
    with Progress("predicting tokens", sum(map(len, held))) as bar:
        said = score(predictor, held, bar.advance)
    with Progress("replays", (len(BASELINES) + 2) * len(cases)) as bar:
        sources = _Sources(predictor.shape, held, free, said)
        evaluations, cells = _study(sources, cases, Cost(row_bytes=record.size), bar.advance)
    show(evaluations, cells, record)
    seconds = time.perf_counter() - started
    if json_file is not None:
        result = _result(artifact, test, predictor, evaluations, cells) | {"seconds": round(seconds, 1)}
        result["config"] |= {"cost": asdict(Cost(row_bytes=record.size)), **record.as_json()}
        try:
            write_whole(json_file, json.dumps(result, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{json_file} cannot be written: {error.strerror}", "Choose another place.") from error
    if plot is not None:
        import_module("expertflow.predict.evaluation.report").draw(evaluations, plot, _about(trace, predictor))
    console.print(f"{len(held)} sequences, {sum(map(len, held))} tokens, {seconds:.0f} s")


def _about(trace: Trace, predictor: Artifact) -> str:
    """What the picture is of: model, machine, date."""
    model = trace.header.model or predictor.made_for or "model unknown"
    return f"{model}; {processor()}, {time.strftime('%Y-%m-%d')}"


def _load(path: Path, test: Test, predictor: Artifact) -> tuple[Trace, list[Passage]]:
    """A trace and its passages, in the predictor's token ids.

    Raises:
        PredictorError: if the trace is of another model.
    """
    trace = load_trace(path)
    predictor.check_shape(shape_of(trace), path.name)
    if trace.header.fingerprint and predictor.fingerprint not in {"", trace.header.fingerprint}:
        raise PredictorError(
            f"{path} was recorded from a checkpoint with fingerprint {trace.header.fingerprint}, the predictor was made "
            f"for {predictor.fingerprint}",
            "Give a trace of the predictor's model.",
        )
    if test.skip:
        trace = trace.without(test.skip)
    items = passages(trace, predictor.vocabulary)
    if test.only:
        items = leave_out(items, test.only)[1]
    return trace, [item for item in items if np.any(item.tokens >= 0)]  # a server always knows its tokens


def _check_count(held: Sequence[Passage], test: Test) -> None:
    """Refuse to measure on too few sequences.

    Raises:
        TraceError: then.
    """
    least = 2 if test.free is not None else 4
    if len(held) < least:
        raise TraceError(
            f"{test.trace.name} has {len(held)} sequences to measure: with token ids the predictor knows, and not trained on",
            f"Give {least} at least"
            + (
                "."
                if test.free is not None
                else ", or --baselines: without it each half teaches the baselines of the other."
            ),
        )


def _workload(trace: Trace, held: Sequence[Passage], case: tuple[int, int], test: Test) -> tuple[Workload, list[int]]:
    """The replay of a case, and its numbers of slots; rows keep their numbers in the trace."""
    rows = np.sort(np.concatenate([item.rows for item in held]))
    part = Trace(header=trace.header, rows=trace.rows.take(rows))
    members = rows[live_sequences(part, *case).members[: test.steps]]
    sizes = sorted({parse_slots(text, trace.header.layers, trace.header.experts) for text in test.slots})
    return Workload(trace=trace, members=members, batch=case[0], groups=case[1]), sizes


@dataclass(frozen=True)
class _Sources:
    """Where predictions for the held passages come from: the predictor, and the free baselines.

    Attributes:
        shape: of the routes.
        held: passages to predict.
        free: what the baselines learn from; None: each half of `held` from the other.
        said: the predictor's `[n, O, L, E]` a passage.
    """

    shape: Shape
    held: Sequence[Passage]
    free: Sequence[Passage] | None
    said: list[npt.NDArray[np.float16]]

    def of(self, name: str) -> list[npt.NDArray[Any]]:
        """`[n, O, L, E]` a passage."""
        if name == PREDICTOR:
            return list(self.said)
        if self.free is not None:
            return self._fitted(name, self.free, self.held)
        chances: list[npt.NDArray[Any]] = [np.empty(0)] * len(self.held)
        for half in (0, 1):
            chances[half::2] = self._fitted(name, self.held[1 - half :: 2], self.held[half::2])
        return chances

    def _fitted(self, name: str, items: Sequence[Passage], held: Sequence[Passage]) -> list[npt.NDArray[Any]]:
        baseline = BASELINES[name]()
        baseline.fit(items, self.shape)
        return [baseline.scores(item)[:, None].astype(np.float16) for item in held]


def _study(
    sources: _Sources, cases: Sequence[tuple[Workload, list[int]]], cost: Cost, tell: Callable[[], None]
) -> tuple[list[Evaluation], list[dict[str, Any]]]:
    cells: list[dict[str, Any]] = []
    for workload, sizes in cases:
        for source, row in ENDS:
            cells += _replay(workload, sizes, cost, source, row)
        tell()
    rows = np.concatenate([item.rows for item in sources.held])
    evaluations = []
    for name in (PREDICTOR, *BASELINES):
        chances = sources.of(name)
        evaluations.append(evaluate(name, chances, sources.held, sources.shape))
        scores = RowScores(rows=rows, probabilities=np.concatenate(chances))
        for workload, sizes in cases:
            if name not in _AFTER_THE_FACT:
                cells += _replay(workload, sizes, cost, name, "plec", PredictedRows(workload, scores))
            tell()
    _add_closed(cells)
    return evaluations, sorted(cells, key=lambda cell: (cell["groups"], cell["batch"], cell["slots"]))


def _replay(
    workload: Workload, sizes: list[int], cost: Cost, source: str, row: str, forecast: Forecast | None = None
) -> list[dict[str, Any]]:
    outcomes = replay_sizes(workload, STRATEGIES[row], sizes, cost, forecast=forecast)
    return [_cell(source, outcome) for outcome in outcomes]


def _cell(source: str, outcome: Outcome) -> dict[str, Any]:
    tokens = outcome.tokens
    return {
        "source": source, "strategy": outcome.strategy, "batch": outcome.batch, "groups": outcome.groups,
        "slots": outcome.slots, "share": round(outcome.share, 4), "tokens": tokens,
        "loads_per_token": round(outcome.loads / tokens, 4), "kept": round(outcome.kept_ratio, 4),
        "hit": round(outcome.hit_ratio, 4), "prefetched_per_token": round(outcome.prefetched / tokens, 4),
        "wasted_per_token": round(outcome.wasted / tokens, 4), "clean": round(outcome.clean_share, 4),
        "bytes_per_token": round(outcome.bytes_per_token), "tokens_per_second": round(outcome.tokens_per_second, 2),
    }  # fmt: skip


def _add_closed(cells: list[dict[str, Any]]) -> None:
    """The share of the distance in loads from `next-use` to Belady."""
    ends = {(c["source"], c["batch"], c["groups"], c["slots"]): c["loads_per_token"] for c in cells}
    for cell in cells:
        case = cell["batch"], cell["groups"], cell["slots"]
        blind, best = ends[ENDS[0][0], *case], ends[ENDS[-1][0], *case]
        cell["closed"] = round((blind - cell["loads_per_token"]) / max(blind - best, 1e-9), 4)


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
    said = ", ".join(f"within {item.within}: {item.error:.3f}" for item in first.calibration)
    console.print(f"expected calibration error of the predictor (0: the token's own step): {said}")
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


def _result(
    artifact: Path, test: Test, predictor: Artifact, evaluations: Sequence[Evaluation], cells: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "benchmark": "eval_predictor",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "system": platform.system(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "torch")} | {"python": platform.python_version()},
        "config": {
            "trace": test.trace.name, "baselines": None if test.free is None else test.free.name, "only": test.only,
            "leave_out": test.leave_out, "skip": test.skip, "steps": test.steps,
            "predictor": {
                "folder": artifact.name, "kind": predictor.config.kind, "made_for": predictor.made_for,
                "fingerprint": predictor.fingerprint, "bytes": sum(path.stat().st_size for path in artifact.iterdir()),
                "about": {key: value for key, value in predictor.about.items() if key not in {"curve", "seen"}},
            },
        },
        "evaluations": [item.as_json() for item in evaluations],
        "cells": list(cells),
    }  # fmt: skip
