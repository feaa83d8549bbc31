"""Run a grid of replays, strategies x slots x batches, on the machine's cores, with the bounds beside them."""

import multiprocessing
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from expertflow.cache.strategy import GATE_RECALL, STRATEGIES, find_strategy
from expertflow.config import nearest
from expertflow.errors import ConfigError
from expertflow.files import processor
from expertflow.limits import usable_cpus
from expertflow.schedule.cluster import METHODS
from expertflow.sim.clock import Cost
from expertflow.sim.replay import Outcome, check_slots, replay_sizes
from expertflow.sim.workload import Workload, as_recorded, live_sequences, regrouped
from expertflow.trace.format import Header, load_trace
from expertflow.units import parse_slots

AS_RECORDED = 0
"""A batch of 0: the forward passes as they were recorded."""


class Advance(Protocol):
    """Called after every finished replay."""

    def __call__(self, outcome: Outcome) -> None:
        """Take in one more outcome."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to replay.

    Attributes:
        trace: the file.
        slots: counts or shares, as the user writes them.
        batches: live sequences; `AS_RECORDED` for the passes as they were.
        strategies: names of strategies.
        cost: link and computation.
        groups: groups that step alternately.
        grouping: how sequences are divided, a key of `schedule.cluster.METHODS`; empty: as they arrive.
        gate_recall: recall of the next-layer gate.
        skip: a flag of sequences to leave out, such as `repetition`; empty: none.
        seed: of the order of sequences.
    """

    trace: Path
    slots: tuple[str, ...]
    batches: tuple[int, ...]
    strategies: tuple[str, ...]
    cost: Cost
    groups: int = 1
    grouping: str = ""
    gate_recall: float = GATE_RECALL
    skip: str = "repetition"
    seed: int = 0


def strategy_names(text: str) -> tuple[str, ...]:
    """Read `all`, or names separated by commas.

    Raises:
        ConfigError: for an unknown name.
    """
    if text == "all":
        return tuple(STRATEGIES)
    return tuple(find_strategy(name.strip()).name for name in text.split(","))


def run_grid(grid: Grid, advance: Advance, workers: int | None = None) -> list[Outcome]:
    """Replay every cell.

    Raises:
        ExpertFlowError: for a bad trace, slots or batch; before anything long begins.
    """
    _check(grid)
    tasks = [(batch, name) for batch in grid.batches for name in grid.strategies]
    tasks.sort(key=lambda task: (task[0] or 1, STRATEGIES[task[1]].prefetch != "layer"))  # long ones first
    count = min(workers or usable_cpus(), len(tasks))
    outcomes: list[Outcome] = []
    if count == 1:
        for batch, name in tasks:
            outcomes += _report(_column(grid, batch, name), advance)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, mp_context=context) as pool:
            jobs = [pool.submit(_column, grid, batch, name) for batch, name in tasks]
            for job in as_completed(jobs):
                outcomes += _report(job.result(), advance)
    order = {name: place for place, name in enumerate(grid.strategies)}
    return sorted(outcomes, key=lambda o: (o.batch, o.slots, order[o.strategy]))


def _report(outcomes: list[Outcome], advance: Advance) -> list[Outcome]:
    for outcome in outcomes:
        advance(outcome)
    return outcomes


def _check(grid: Grid) -> None:
    if grid.seed < 0:
        raise ConfigError(f"seed={grid.seed} is negative", "Give 0 or more.")
    if not 0 <= grid.gate_recall <= 1:
        raise ConfigError(f"gate_recall={grid.gate_recall} is no share", "Give a number between 0 and 1.")
    trace = load_trace(grid.trace)
    trace = trace.without(grid.skip) if grid.skip else trace
    for batch in grid.batches:
        workload = live_sequences(trace, batch, grid.groups, grid.seed) if batch else as_recorded(trace)
        for text in grid.slots:
            check_slots(workload, _slots(text, grid, trace.header))
    if grid.grouping and grid.grouping not in METHODS:
        raise ConfigError(f"grouping {grid.grouping!r} is unknown", nearest(grid.grouping, METHODS))
    if grid.grouping and grid.groups < 2:
        raise ConfigError(f"grouping {grid.grouping!r} of a single group means nothing", "Give --groups 2 or more.")
    if not grid.slots or not grid.batches:
        raise ConfigError("there is nothing to simulate", "Give at least one slot count and one batch size.")


def _slots(text: str, grid: Grid, header: Header) -> int:
    """A number of slots, of the layers that are not always resident."""
    return parse_slots(text, header.layers - len(grid.cost.large), header.experts)


def _column(grid: Grid, batch: int, name: str) -> list[Outcome]:
    """Replay one strategy and batch with every number of slots."""
    workload = _workload(grid, batch)
    header = workload.trace.header
    sizes = sorted({_slots(text, grid, header) for text in grid.slots})
    return replay_sizes(workload, find_strategy(name), sizes, grid.cost, gate_recall=grid.gate_recall)


@lru_cache(maxsize=1)
def _workload(grid: Grid, batch: int) -> Workload:
    """Return the steps of a batch, cached because the process's next strategy mostly has the same batch."""
    trace = load_trace(grid.trace)
    trace = trace.without(grid.skip) if grid.skip else trace
    if not batch:
        return as_recorded(trace)
    workload = live_sequences(trace, batch, grid.groups, grid.seed)
    return regrouped(workload, grid.grouping) if grid.grouping else workload


def bound_tokens_per_second(outcome: Outcome, belady: Outcome) -> float:
    """Return a bound for every strategy with these slots: Belady's bytes over the link, or the computation, the longer."""
    return outcome.tokens / max(belady.link_seconds, outcome.compute_seconds)


def as_result(grid: Grid, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return the result file: configuration, machine and every cell."""
    belady = {(o.batch, o.slots): o for o in outcomes if o.strategy == "oracle"}
    cells = []
    for outcome in outcomes:
        best = belady.get((outcome.batch, outcome.slots))
        bound = None if best is None else bound_tokens_per_second(outcome, best)
        cells.append(
            {
                **asdict(outcome),
                "loads": outcome.loads,
                "hit_ratio": round(outcome.hit_ratio, 5),
                "kept_ratio": round(outcome.kept_ratio, 5),
                "bytes_per_token": round(outcome.bytes_per_token),
                "clean_share": round(outcome.clean_share, 5),
                "tokens_per_second": round(outcome.tokens_per_second, 3),
                "bound_tokens_per_second": None if bound is None else round(bound, 3),
            }
        )
    return {
        "benchmark": "simulate",
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "system": platform.system(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "numba")} | {"python": platform.python_version()},
        "config": {**asdict(grid), "trace": grid.trace.name},
        "seconds": round(seconds, 1),
        "cells": cells,
    }
