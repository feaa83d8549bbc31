"""The two halves of a trace behind the predictor's results: what it learns from, and 40 sequences it never sees.

Run: ``python benchmarks/predictor_split.py TRACE TRAIN.trace TEST.trace``; then ``expertflow train-predictor TRAIN.trace`` and
``expertflow eval-predictor PREDICTOR TEST.trace --baselines TRAIN.trace --batch 1,4,8,16,4x2,8x2 --steps 4000``. For another
domain: ``train-predictor --leave-out dataset=mmlu_pro``, ``eval-predictor --only`` and ``--leave-out dataset=mmlu_pro``.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from expertflow.trace.format import load_trace, save_trace

TEST = 40
SEED = 0


def main(source: Path, train: Path, test: Path) -> None:
    """Divide by sequence; looping text is left out."""
    trace = load_trace(source).without("repetition")
    numbers = np.unique(trace.rows.sequence[trace.rows.sequence >= 0])
    np.random.default_rng(SEED).shuffle(numbers)
    for path, kept in ((train, numbers[TEST:]), (test, numbers[:TEST])):
        entries = tuple(entry for entry in trace.sequences if entry["sequence"] in kept)
        rows = trace.rows.take(np.isin(trace.rows.sequence, kept))
        save_trace(replace(trace, rows=rows, sequences=entries), path)


if __name__ == "__main__":
    main(*(Path(name) for name in sys.argv[1:4]))
