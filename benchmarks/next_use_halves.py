"""Whether the default policy is fitted to the part of the trace it was tuned on: `next-use` and `lru` on two halves of it.

Sequences of even and of odd number are replayed apart. The share kept should be the same on both, except for
differences of the sequences themselves. A policy without constants (`lru`, an equal share a layer) shows these.

usage: next_use_halves.py TRACE RESULT.json
"""

import argparse
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from expertflow.bench.about import about
from expertflow.cache.strategy import STRATEGIES
from expertflow.sim.clock import Cost
from expertflow.sim.replay import replay_sizes
from expertflow.sim.workload import live_sequences
from expertflow.trace.format import Trace, load_trace

BATCHES, SIZES = (1, 4, 8), (192, 384)
"""Live sequences; slots of 768."""


def half(trace: Trace, parity: int) -> Trace:
    """The sequences whose place among those left (in ascending number) is even (0) or odd (1)."""
    _, place = np.unique(trace.rows.sequence, return_inverse=True)
    chosen = place % 2 == parity
    return replace(trace, rows=trace.rows.take(chosen))


def main() -> None:
    """Replay both halves, write the result, print a line a batch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("result", type=Path)
    options = parser.parse_args()
    trace = load_trace(options.trace).without("repetition")
    cells = []
    for parity, name in enumerate(("even", "odd")):
        part = half(trace, parity)
        for batch in BATCHES:
            workload = live_sequences(part, batch)
            for row in ("lru", "next-use"):
                found = replay_sizes(workload, STRATEGIES[row], SIZES, Cost())
                for outcome in found:
                    cell = {"half": name, "strategy": row, "batch": batch, "slots": outcome.slots}
                    cells.append(cell | {"tokens": outcome.tokens, "kept_ratio": round(outcome.kept_ratio, 4)})
                    print(json.dumps(cells[-1]), flush=True)
    where = about()
    result = {
        **where._asdict(),
        "benchmark": "next_use_halves",
        "versions": {**where.versions, "numba": version("numba")},
        "config": {"trace": options.trace.name, "skip": "repetition", "seed": 0, "experts": 768},
        "cells": cells,
    }
    options.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
