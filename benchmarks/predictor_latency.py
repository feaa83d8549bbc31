"""What a prediction costs: one step of a predictor, on the CPU and, where there is a GPU, inside a CUDA graph.

Run: ``python benchmarks/predictor_latency.py ARTIFACT [--out FILE]``. Prints a table, writes JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from expertflow.bench.about import about
from expertflow.predict.artifact import load_artifact
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor

_BATCHES = (1, 4, 16, 64)
_REPEATS = 5


def cpu_ms(online: OnlinePredictor, batch: int, steps: int = 60) -> list[float]:
    """Median milliseconds of a step, repeat by repeat."""
    run = stepper(online, batch)
    for _ in range(10):
        run()
    medians = []
    for _ in range(_REPEATS):
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
        medians.append(statistics.median(times))
    return medians


def graph_ms(online: OnlinePredictor, batch: int, replays: int = 200) -> list[float]:
    """Milliseconds of a replayed step, repeat by repeat."""
    run, side = stepper(online, batch), torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    result = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        result.append(begin.elapsed_time(end) / replays)
    return result


def stepper(online: OnlinePredictor, batch: int) -> Callable[[], object]:
    """One step on random tokens and routes, its inputs static."""
    shape, random = online.artifact.shape, torch.Generator().manual_seed(0)
    rows = torch.arange(batch, device=online.device)
    tokens = torch.randint(0, online.artifact.config.vocabulary, (batch,), generator=random).to(online.device)
    scores = torch.rand(batch, shape.layers, shape.experts, generator=random)
    routes = scores.topk(shape.top_k, dim=-1).indices.to(online.device)
    return lambda: online.step(rows, tokens, routes)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    cells = []
    for batch in _BATCHES:
        cell: dict[str, object] = {"batch": batch}
        cell["cpu_ms"] = cpu_ms(OnlinePredictor(load_artifact(options.artifact), batch), batch)
        if cuda:
            device = torch.device("cuda")
            online = OnlinePredictor(load_artifact(options.artifact), batch, device, step_kernels(device))
            cell["graph_ms"] = graph_ms(online, batch)
        cells.append(cell)
        print(batch, {name: round(statistics.median(v), 4) for name, v in cell.items() if isinstance(v, list)})
    artifact = load_artifact(options.artifact)
    where = about("cuda" if cuda else "cpu")
    result = {
        **where._asdict(),
        "benchmark": "predictor_latency",
        "machine": {**where.machine, "gpu": torch.cuda.get_device_name() if cuda else None},
        "config": {
            "made_for": artifact.made_for, "shape": artifact.shape._asdict(), "bytes": sum(p.stat().st_size for p in options.artifact.iterdir()),
            "seed": 0, "repeats": _REPEATS,
        },
        "cells": cells,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
