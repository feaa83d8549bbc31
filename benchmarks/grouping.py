"""What grouping by route gives on a recorded trace: experts activated, loads in the simulator, the cost model, time of a division.

Sequences step together in groups that take turns. Before every round they are divided by the paths they are going to
take or by the best guesses (top-k a layer) of a predictor that was not trained on them. Beside it are the paper's
method and one merged batch. Loads are of `next-use` on the simulator's tables, groups in turn. Then all sequences with
a cache: `plec` with the predictor, with the coming groups known or not (blind), beside `next-use` and Belady. Beside
them is the cost that `schedule.cost` expects from the predictor's chances of each round alone.

Usage: python benchmarks/grouping.py TRACE [--predictor FOLDER] [--out FILE]
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.cache.strategy import STRATEGIES
from expertflow.predict.artifact import load_artifact
from expertflow.predict.dataset import passages
from expertflow.predict.evaluation.score import score
from expertflow.schedule.cluster import METHODS, activated, group, in_order, pack
from expertflow.schedule.cost import StepPrices, best_guesses, price
from expertflow.sim.clock import Cost
from expertflow.sim.predicted import PredictedRows, RowScores
from expertflow.sim.replay import replay_sizes
from expertflow.sim.workload import Workload, live_sequences, regrouped
from expertflow.trace.format import Trace, load_trace

CASES = ((2, 4), (2, 8), (4, 4), (8, 2), (4, 6))
TURNS = ((4, 8), (2, 8), (4, 4), (2, 4))
ROUNDS, SHARES, SEED = 150, (0.25, 0.5), 0


def predict(trace: Trace, predictor: Path) -> RowScores:
    """The predictor's chances for every row."""
    artifact, items = load_artifact(predictor), passages(trace)
    parts = [part.astype(np.float16) for part in score(artifact, items)]
    return RowScores(rows=np.concatenate([item.rows for item in items]), probabilities=np.concatenate(parts))


def guesses(trace: Trace, scores: RowScores) -> npt.NDArray[np.bool_]:
    """`[rows, L, E]`, the predictor's top-k a layer of every row that it can predict."""
    found = np.zeros((len(trace), trace.header.layers, trace.header.experts), dtype=np.bool_)
    found[scores.rows] = best_guesses(scores.probabilities[:, 0].astype(np.float32), trace.header.top_k)
    return found


def in_turns(trace: Trace, scores: RowScores, groups: int, size: int) -> list[dict[str, Any]]:
    """Loads and tokens a second of the cache, for each way to divide and each strategy, beside what the cost model expects."""
    arrival = live_sequences(trace, groups * size, groups, SEED)
    arrival = replace(arrival, members=arrival.members[: ROUNDS * groups])
    merged = Workload(trace=trace, members=arrival.members.reshape(-1, arrival.batch), batch=arrival.batch)
    ways = {"arrival": arrival, "routes": regrouped(arrival, "swaps", guesses(trace, scores)), "merged": merged}
    slots = [int(trace.header.layers * trace.header.experts * share) for share in SHARES]
    found = []
    for way, workload in ways.items():
        expected = [model_loads(workload, scores, count) for count in slots]
        for name, known in (("next-use", True), ("plec", False), ("plec", True), ("oracle", True)):
            forecast = None
            if name == "plec":
                forecast = PredictedRows(workload if known else replace(workload, groups=1), scores)
            outcomes = replay_sizes(workload, STRATEGIES[name].on_device(), slots, Cost(), forecast=forecast)
            for share, outcome, model in zip(SHARES, outcomes, expected, strict=True):
                row = {
                    "groups": groups, "size": size, "way": way, "strategy": name, "known": known, "share": share,
                    "loads_per_token": outcome.loads / outcome.tokens, "model_loads_per_token": model,
                    "tokens_per_second": outcome.tokens_per_second,
                }  # fmt: skip
                found.append(row)
                print(f"{groups} x {size} {way:7s} {name:8s} {'known' if known else 'blind'} {share:.0%}: {row['loads_per_token']:.2f} loads a token "
                      f"(model {model:.2f}), {outcome.tokens_per_second:.1f} tok/s", flush=True)  # fmt: skip
    return found


def model_loads(workload: Workload, scores: RowScores, slots: int) -> float:
    """Loads a token as `schedule.cost` expects them, round by round."""
    turns = workload.groups
    rounds = workload.members[: len(workload) // turns * turns].reshape(-1, turns, workload.members.shape[1])
    total = 0.0
    for members in rounds:
        chances = scores.of(members.reshape(-1))[:, 0].astype(np.float64)
        groups = np.repeat(np.arange(turns), members.shape[1])
        total += price(chances, groups, turns, StepPrices(slots=slots, load=0, step=0, expert=0)).loads
    return total / rounds.size


def measure(trace: Trace, guessed: npt.NDArray[np.bool_] | None, groups: int, size: int) -> dict[str, Any]:
    """One case."""
    arrival = live_sequences(trace, groups * size, groups, SEED)
    arrival = replace(arrival, members=arrival.members[: ROUNDS * groups])
    merged = Workload(trace=trace, members=arrival.members.reshape(-1, arrival.batch), batch=arrival.batch)
    ways = {"arrival": arrival, "merged": merged, **{f"true, {m}": regrouped(arrival, m) for m in METHODS}}
    if guessed is not None:
        ways |= {f"predicted, {m}": regrouped(arrival, m, guessed) for m in METHODS}
    slots = [int(trace.header.layers * trace.header.experts * share) for share in SHARES]
    row: dict[str, Any] = {
        "groups": groups,
        "size": size,
        "rounds": len(merged),
        "activated": {},
        "loads_per_token": {},
    }
    for name, workload in ways.items():
        row["activated"][name] = float(workload.needed.sum() / arrival.needed.sum())
        replays = replay_sizes(workload, STRATEGIES["next-use"], slots, Cost())
        row["loads_per_token"][name] = {str(s): o.loads / o.tokens for s, o in zip(SHARES, replays, strict=True)}
    print(
        f"{groups} x {size}: " + "  ".join(f"{name} {value:.3f}" for name, value in row["activated"].items()),
        flush=True,
    )
    return row


def timed(count: int, groups: int, layers: int, experts: int) -> dict[str, Any]:
    """Milliseconds of a division of random paths of four experts in 32, and its count against arrival."""
    paths = np.random.default_rng(SEED).random((count, layers, experts)) < 0.125
    row: dict[str, Any] = {"sequences": count, "groups": groups, "layers": layers, "experts": experts}
    for method in METHODS:
        group(paths, groups, method)
        times = []
        for _ in range(7):
            began = time.perf_counter()
            found = group(paths, groups, method)
            times.append((time.perf_counter() - began) * 1e3)
        words = pack(paths)
        row[method] = {
            "ms": times,
            "activated": activated(words, found, groups) / activated(words, in_order(count, groups), groups),
        }
    print(
        f"{count} sequences of {layers} x {experts} in {groups}: "
        + ", ".join(f"{m} {statistics.median(row[m]['ms']):.2f} ms" for m in METHODS),
        flush=True,
    )
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    every = trace = load_trace(options.trace).without("repetition")
    known = trace.rows.tokens >= 0
    trace = replace(trace, rows=trace.rows.take(np.isin(trace.rows.sequence, np.unique(trace.rows.sequence[known]))))
    guessed = None if options.predictor is None else guesses(trace, predict(trace, options.predictor))
    scores = None if options.predictor is None else predict(every, options.predictor)
    result = {
        "benchmark": "grouping", "date": time.strftime("%Y-%m-%d"), "seed": SEED,
        "config": {"trace": trace.header.model, "rows": len(trace), "rounds": ROUNDS, "strategy": "next-use", "predicted": guessed is not None},
        "machine": {"cores": os.cpu_count()}, "versions": {"numpy": np.__version__},
        "cases": [measure(trace, guessed, *case) for case in CASES],
        "turns": [] if scores is None else [row for case in TURNS for row in in_turns(every, scores, *case)],
        "times": [timed(64, groups, 24, 60) for groups in (2, 8)],
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
