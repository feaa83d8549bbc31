"""The predictor's knowledge apart from its loads: `plec` with the trained predictor, and with its chances on wrong experts.

The control's chances are the trained predictor's, moved to other experts of the same layer by a fixed draw. So loads
ahead, certainty and bytes of the predictor are the same, and its knowledge is gone. Recorded routing in the simulator;
sequences that the predictor has not seen. `next-use` needs no predictor; Belady has the whole recording.

Usage: python benchmarks/control.py TEST.trace --predictor FOLDER [--out FILE]
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from grouping import predict

from expertflow.cache.strategy import STRATEGIES
from expertflow.sim.clock import Cost
from expertflow.sim.predicted import PredictedRows, RowScores
from expertflow.sim.replay import replay_sizes
from expertflow.sim.workload import live_sequences
from expertflow.trace.format import Trace, load_trace

CASES = ((1, 1), (4, 1), (8, 1), (16, 1), (32, 4))
SHARES, STEPS, SEED = (0.25, 0.5), 600, 0


def shuffled(scores: RowScores) -> RowScores:
    """The same chances of other experts, layer by layer."""
    chances, random = scores.probabilities, np.random.default_rng(SEED)
    order = np.stack([random.permutation(chances.shape[3]) for _ in range(chances.shape[2])])
    return RowScores(rows=scores.rows, probabilities=np.take_along_axis(chances, order[None, None], axis=3))


def measure(trace: Trace, scores: dict[str, RowScores], batch: int, groups: int) -> list[dict[str, Any]]:
    """One case, every source."""
    workload = live_sequences(trace, batch, groups, SEED)
    workload = replace(workload, members=workload.members[:STEPS])
    slots = [int(trace.header.layers * trace.header.experts * share) for share in SHARES]
    rows = []
    for source in ("none", *scores, "future"):
        name = {"none": "next-use", "future": "oracle"}.get(source, "plec")
        forecast = PredictedRows(workload, scores[source]) if source in scores else None
        outcomes = replay_sizes(workload, STRATEGIES[name].on_device(), slots, Cost(), forecast=forecast)
        for share, found in zip(SHARES, outcomes, strict=True):
            row = {
                "batch": batch, "groups": groups, "share": share, "strategy": name, "predictor": source, "tokens_per_second": found.tokens_per_second,
                "loads_per_token": found.loads / found.tokens, "ahead_per_token": found.prefetched / found.tokens,
                "wasted_per_token": found.wasted / found.tokens, "kept": found.kept_ratio,
            }  # fmt: skip
            rows.append(row)
            print(f"{batch:2d} in {groups} {share:.0%} {name:8s} {source:8s} {row['tokens_per_second']:6.1f} tok/s, {row['loads_per_token']:.2f} loads a token, "
                  f"{row['ahead_per_token']:.2f} of them ahead, {row['wasted_per_token']:.2f} wasted", flush=True)  # fmt: skip
    return rows


def study(benchmark: str, about: str | None, cases: Callable[[Trace, RowScores], list[dict[str, Any]]]) -> None:
    """Read the command line and the trace, predict it; measure, write."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--predictor", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trace = load_trace(options.trace).without("repetition")
    result = {
        "benchmark": benchmark, "date": time.strftime("%Y-%m-%d"), "seed": SEED, "rows": cases(trace, predict(trace, options.predictor)),
        "config": {"trace": "gpt_oss_20b", "steps": STEPS, "shares": SHARES},
        "machine": {"device": "virtual clock", "cores": os.cpu_count()}, "versions": {"numpy": np.__version__},
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def every(trace: Trace, trained: RowScores) -> list[dict[str, Any]]:
    """All cases."""
    scores = {"trained": trained, "shuffled": shuffled(trained)}
    return [row for batch, groups in CASES for row in measure(trace, scores, batch, groups)]


if __name__ == "__main__":
    study("control", __doc__, every)
