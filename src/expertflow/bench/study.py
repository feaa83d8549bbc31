"""A study of a predictor: its predictions and those of free baselines, measured and replayed on the same sequences.

The simulator replays `plec` with each source of predictions at equal slots, beside `next-use` (no forecast), the step's
true path, and Belady. Must not know the command line and the engine.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import STRATEGIES
from expertflow.errors import PredictorError, TraceError
from expertflow.files import processor
from expertflow.predict.artifact import Artifact
from expertflow.predict.dataset import Passage, leave_out, mark, passages, shape_of
from expertflow.predict.evaluation.baselines import BASELINES
from expertflow.predict.evaluation.evaluate import Evaluation, evaluate
from expertflow.predict.evaluation.options import StudyOptions
from expertflow.predict.evaluation.score import score
from expertflow.sim.clock import Cost
from expertflow.sim.predicted import PredictedRows, RowScores
from expertflow.sim.replay import Outcome, replay_sizes
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import Trace, load_trace
from expertflow.units import parse_slots

PREDICTOR = "predictor"
ENDS = (("nothing (next-use)", "next-use"), ("this step's truth", "oracle-step"), ("Belady", "oracle"))
"""What every forecast is compared with: its name here, and its entry of the strategy table."""
_AFTER_THE_FACT = {"previous layer"}
"""Sources that are known only while the step runs: measured, not replayed."""


class Case(NamedTuple):
    """A replayed workload, and its numbers of slots."""

    workload: Workload
    sizes: list[int]


class Findings(NamedTuple):
    """What a study found: the predictor's evaluation, then the baselines'; a cell a replay."""

    evaluations: list[Evaluation]
    cells: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sequences to predict, what the baselines learn from, and the workloads to replay.

    Attributes:
        predictor: measured.
        name: of the trace's file.
        trace: of the sequences.
        sequences: passages to predict, none of which the predictor was trained on.
        free: passages that the baselines learn from; None: each half of `sequences` from the other.
        cases: replayed.
        trained_on: passages left out because the predictor was trained on them.
        too_large: numbers of live sequences that are not replayed, because there are fewer passages.
    """

    predictor: Artifact
    name: str
    trace: Trace
    sequences: Sequence[Passage]
    free: Sequence[Passage] | None
    cases: Sequence[Case]
    trained_on: int
    too_large: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens to predict."""
        return sum(map(len, self.sequences))

    @property
    def replays(self) -> int:
        """Calls of `report` in a run."""
        return (len(BASELINES) + 2) * len(self.cases)

    @property
    def subject(self) -> str:
        """Model, machine and date, for a picture."""
        model = self.trace.header.model or self.predictor.made_for or "model unknown"
        return f"{model}; {processor()}, {time.strftime('%Y-%m-%d')}"

    def check_count(self) -> None:
        """Check that there are enough sequences to measure.

        Raises:
            TraceError: if there are not.
        """
        least = 2 if self.free is not None else 4
        if len(self.sequences) < least:
            raise TraceError(
                f"{self.name} has {len(self.sequences)} sequences to measure: with token ids the predictor knows, and not trained on",
                f"Give {least} at least"
                + (
                    "."
                    if self.free is not None
                    else ", or --baselines: without it each half teaches the baselines of the other."
                ),
            )

    def predict(self, report: Callable[[int], None]) -> list[npt.NDArray[np.float16]]:
        """The predictor's probabilities, `[n, O, L, E]` a passage.

        Args:
            report: called with the number of tokens done since the last call.
        """
        return score(self.predictor, self.sequences, report)

    def run(self, predicted: Sequence[npt.NDArray[np.float16]], cost: Cost, report: Callable[[], None]) -> Findings:
        """Measure every source, and replay every case with it.

        Args:
            predicted: what `predict` gave.
            cost: of the virtual clock.
            report: called `replays` times.
        """
        cells: list[dict[str, Any]] = []
        for workload, sizes in self.cases:
            for source, strategy in ENDS:
                cells += _replay(workload, sizes, cost, source, strategy)
            report()
        rows = np.concatenate([item.rows for item in self.sequences])
        evaluations = []
        for name in (PREDICTOR, *BASELINES):
            chances = list(predicted) if name == PREDICTOR else self._baseline(name)
            evaluations.append(evaluate(name, chances, self.sequences, self.predictor.shape))
            scores = RowScores(rows=rows, probabilities=np.concatenate(chances))
            for workload, sizes in self.cases:
                if name not in _AFTER_THE_FACT:
                    cells += _replay(workload, sizes, cost, name, "plec", PredictedRows(workload, scores))
                report()
        _add_closed(cells)
        return Findings(evaluations, sorted(cells, key=lambda cell: (cell["groups"], cell["batch"], cell["slots"])))

    def _baseline(self, name: str) -> list[npt.NDArray[Any]]:
        """A baseline's probabilities, `[n, 1, L, E]` a passage."""
        if self.free is not None:
            return self._fitted(name, self.free, self.sequences)
        chances: list[npt.NDArray[Any]] = [np.empty(0)] * len(self.sequences)
        for half in (0, 1):
            chances[half::2] = self._fitted(name, self.sequences[1 - half :: 2], self.sequences[half::2])
        return chances

    def _fitted(self, name: str, items: Sequence[Passage], chosen: Sequence[Passage]) -> list[npt.NDArray[Any]]:
        baseline = BASELINES[name]()
        baseline.fit(items, self.predictor.shape)
        return [baseline.scores(item)[:, None].astype(np.float16) for item in chosen]


def prepare_study(predictor: Artifact, options: StudyOptions) -> Study:
    """Load the traces, and choose sequences and workloads.

    Raises:
        PredictorError: if a trace is of another model than the predictor.
        TraceError: if a trace is damaged.
    """
    trace, items = _load(options.trace, options, predictor)
    seen = set(predictor.about.get("seen", ()))
    chosen = [item for item in items if mark(item) not in seen]
    free = None if options.free is None else _load(options.free, replace(options, only=""), predictor)[1]
    if free is not None and options.leave_out:
        free = leave_out(free, options.leave_out)[0]
    return Study(
        predictor=predictor, name=options.trace.name, trace=trace, sequences=chosen, free=free,
        cases=[_case(trace, chosen, case, options) for case in options.cases if case[0] <= len(chosen)],
        trained_on=len(items) - len(chosen),
        too_large=tuple(sorted({batch for batch, _ in options.cases if batch > len(chosen)})),
    )  # fmt: skip


def result_of(study: Study, options: StudyOptions, folder: Path, findings: Findings) -> dict[str, Any]:
    """The result file's contents: what was measured, where, and what was found.

    Args:
        study: that ran.
        options: of the study.
        folder: the predictor's.
        findings: of the run.
    """
    predictor = study.predictor
    return {
        "benchmark": "eval_predictor",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "system": platform.system(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "torch")} | {"python": platform.python_version()},
        "config": {
            "trace": options.trace.name, "baselines": None if options.free is None else options.free.name,
            "only": options.only, "leave_out": options.leave_out, "skip": options.skip, "steps": options.steps,
            "predictor": {
                "folder": folder.name, "kind": predictor.config.kind, "made_for": predictor.made_for,
                "fingerprint": predictor.fingerprint, "bytes": sum(path.stat().st_size for path in folder.iterdir()),
                "about": {key: value for key, value in predictor.about.items() if key not in {"curve", "seen"}},
            },
        },
        "evaluations": [item.as_json() for item in findings.evaluations],
        "cells": list(findings.cells),
    }  # fmt: skip


def _load(path: Path, options: StudyOptions, predictor: Artifact) -> tuple[Trace, list[Passage]]:
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
    if options.skip:
        trace = trace.without(options.skip)
    items = passages(trace, predictor.vocabulary)
    if options.only:
        items = leave_out(items, options.only)[1]
    return trace, [item for item in items if np.any(item.tokens >= 0)]  # an engine always knows its tokens


def _case(trace: Trace, chosen: Sequence[Passage], case: tuple[int, int], options: StudyOptions) -> Case:
    """The replay of a case, and its numbers of slots; rows keep their numbers in the trace."""
    rows = np.sort(np.concatenate([item.rows for item in chosen]))
    part = Trace(header=trace.header, rows=trace.rows.take(rows))
    members = rows[live_sequences(part, *case).members[: options.steps]]
    sizes = sorted({parse_slots(text, trace.header.layers, trace.header.experts) for text in options.slots})
    return Case(Workload(trace=trace, members=members, batch=case[0], groups=case[1]), sizes)


def _replay(
    workload: Workload, sizes: list[int], cost: Cost, source: str, strategy: str, forecast: Forecast | None = None
) -> list[dict[str, Any]]:
    outcomes = replay_sizes(workload, STRATEGIES[strategy], sizes, cost, forecast=forecast)
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
    """Add to each cell the share of the distance in loads from `next-use` to Belady that it closes."""
    ends = {(c["source"], c["batch"], c["groups"], c["slots"]): c["loads_per_token"] for c in cells}
    for cell in cells:
        case = cell["batch"], cell["groups"], cell["slots"]
        blind, best = ends[ENDS[0][0], *case], ends[ENDS[-1][0], *case]
        cell["closed"] = round((blind - cell["loads_per_token"]) / max(blind - best, 1e-9), 4)
