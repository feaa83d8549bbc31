"""How far and how well the future must be known: retention with perfect and with imperfect knowledge.

Replays a trace with the default policy (`next-use`, no prefetch), which gets this step's true path and further steps.
These are perfect (0, 1, 2, 4, 8 steps, all of them: Belady), or the next step only. Then each expert is known with
probability q, with false alarms at the same rate. Merged batches and two groups taking turns.

usage: horizon_study.py TRACE RESULT.json [--steps N]
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from expertflow.bench.about import about
from expertflow.cache.forecast import NoForecast, Recorded, Step, blur
from expertflow.cache.policy import Outlook
from expertflow.cache.strategy import STRATEGIES
from expertflow.sim.clock import Cost
from expertflow.sim.replay import replay
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import load_trace

HORIZONS = (0, 1, 2, 4, 8, None)
QUALITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CASES = ((4, 1, 192), (4, 1, 384), (8, 2, 192), (8, 2, 384), (8, 1, 384), (8, 1, 192), (4, 2, 192), (1, 1, 192))
"""Live sequences, groups, slots of 768."""


class Imperfect(NoForecast):
    """Forecasts this step's truth, and the next step as a calibrated guess of the given recall and precision."""

    def __init__(self, workload: Workload, quality: float) -> None:
        """Guess the steps of `workload`."""
        self._needed, self._quality = workload.needed, quality

    def outlook(self, step: Step) -> Outlook:
        """Return demand `[2, L, E]`, or `[1, L, E]` for the last step."""
        now = self._needed[step.number].astype(np.float64)
        if step.number + 1 >= len(self._needed):
            return Outlook(now[None])
        truth, quality = self._needed[step.number + 1], self._quality
        guess = blur(truth, quality, np.random.default_rng((7, step.number)))
        count = truth.sum(axis=1, keepdims=True)
        missed = (1 - quality) * count / np.maximum(truth.shape[1] - count, 1)
        return Outlook(np.stack([now, np.where(guess > 0, quality, np.minimum(missed, quality))]))


def run_case(path: Path, case: tuple[int, int, int], steps: int) -> dict[str, object]:
    """One workload and number of slots, every amount of knowledge."""
    batch, groups, slots = case
    trace = load_trace(path).without("repetition")
    drawn = live_sequences(trace, batch, groups)
    workload = Workload(trace=trace, members=drawn.members[:steps], batch=batch, groups=groups)
    row, cost = STRATEGIES["next-use"], Cost()
    forecasts = {"nothing": None}
    forecasts |= {"all" if h is None else f"+{h}": Recorded(workload.needed, h or 0) for h in HORIZONS if h is not None}
    forecasts |= {f"q={quality}": Imperfect(workload, quality) for quality in QUALITIES}
    found: dict[str, object] = {"batch": batch, "groups": groups, "slots": slots, "steps": len(workload)}
    for name, forecast in forecasts.items():
        outcome = replay(workload, row, slots, cost, forecast=forecast)
        found[name] = {
            "kept_ratio": round(outcome.kept_ratio, 4),
            "loads_per_token": round(outcome.loads / outcome.tokens, 3),
        }
    best = replay(workload, STRATEGIES["oracle"], slots, cost)
    found["all"] = {"kept_ratio": round(best.kept_ratio, 4), "loads_per_token": round(best.loads / best.tokens, 3)}
    return found


def main() -> None:
    """Run every case, write the result, print a line a case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    cases = []
    with ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(run_case, options.trace, case, options.steps) for case in CASES]
        for job in jobs:
            cases.append(job.result())
            print(json.dumps(cases[-1]), flush=True)
            result = {
                **about()._asdict(),
                "benchmark": "horizon_study",
                "config": {"trace": options.trace.name, "steps": options.steps, "policy": "next-use", "seed": 0},
                "cases": cases,
            }
            options.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
