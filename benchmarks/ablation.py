"""What each part of the cache and the scheduler adds, one at a time, on recorded routing: from nothing kept to groups by route.

Every stage has all that the one before it has. The simulator's decisions are the device's (`Strategy.on_device`), its clock is
virtual; graphs and fetching by kernels are compared on a GPU (docs/benchmarks.md, Switch-128). A missing expert is always
loaded, so correction cannot be taken away from an exact engine: it is in all rows.

Usage: python benchmarks/ablation.py TEST.trace --predictor FOLDER [--out FILE]
"""

from dataclasses import replace
from typing import Any, NamedTuple

from control import SEED, SHARES, STEPS, study
from grouping import guesses

from expertflow.cache.strategy import STRATEGIES, Strategy
from expertflow.sim.clock import Cost
from expertflow.sim.predicted import PredictedRows, RowScores
from expertflow.sim.replay import replay_sizes
from expertflow.sim.workload import Workload, live_sequences, regrouped
from expertflow.trace.format import Trace

CASES = ((1, 1), (4, 1), (16, 1), (32, 4))
KEEP_ONLY = replace(STRATEGIES["plec"], prefetch="none")


class Stage(NamedTuple):
    """A row: its name, how it caches, whether the coming groups are known, and how those are made."""

    name: str
    strategy: Strategy
    predicted: bool = False
    known: bool = False
    routes: bool = False


STAGES = (
    Stage("nothing kept", STRATEGIES["on-demand"]),
    Stage("+ kept by recency, a share a layer (Cache-MoE)", STRATEGIES["lru"]),
    Stage("+ kept by next use, one pool", STRATEGIES["next-use"]),
    Stage("+ the predictor says what to keep", KEEP_ONLY, predicted=True),
    Stage("+ loads ahead (`plec`)", STRATEGIES["plec"], predicted=True),
    Stage("+ told of the turns that come", STRATEGIES["plec"], predicted=True, known=True),
    Stage("+ groups by predicted route", STRATEGIES["plec"], predicted=True, known=True, routes=True),
    Stage("Belady, the same groups", STRATEGIES["oracle"], routes=True),
)


def measure(trace: Trace, scores: RowScores, batch: int, groups: int) -> list[dict[str, Any]]:
    """One case, every stage; stages of groups only where there are groups."""
    arrival = live_sequences(trace, batch, groups, SEED)
    arrival = replace(arrival, members=arrival.members[: STEPS * groups])
    divided = regrouped(arrival, "swaps", guesses(trace, scores)) if groups > 1 else arrival
    slots = [int(trace.header.layers * trace.header.experts * share) for share in SHARES]
    rows = []
    for stage in STAGES:
        if groups == 1 and (stage.known or (stage.routes and stage.predicted)):
            continue
        workload: Workload = divided if stage.routes else arrival
        known = workload if stage.known else replace(workload, groups=1)
        forecast = PredictedRows(known, scores) if stage.predicted else None
        outcomes = replay_sizes(workload, stage.strategy.on_device(), slots, Cost(), forecast=forecast)
        for share, found in zip(SHARES, outcomes, strict=True):
            row = {
                "batch": batch, "groups": groups, "share": share, "stage": stage.name, "tokens_per_second": found.tokens_per_second,
                "loads_per_token": found.loads / found.tokens, "ahead_per_token": found.prefetched / found.tokens, "kept": found.kept_ratio,
            }  # fmt: skip
            rows.append(row)
            print(f"{batch:2d} in {groups} {share:.0%} {stage.name:48s} {row['tokens_per_second']:6.1f} tok/s, {row['loads_per_token']:.2f} loads a token", flush=True)  # fmt: skip
    return rows


def every(trace: Trace, scores: RowScores) -> list[dict[str, Any]]:
    """All cases."""
    return [row for batch, groups in CASES for row in measure(trace, scores, batch, groups)]


if __name__ == "__main__":
    study("ablation", __doc__, every)
