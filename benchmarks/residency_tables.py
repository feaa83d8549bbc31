"""Time the cache's tables on the device, kernel by kernel, and the fetch of few small records.

Shapes: gpt-oss-20b (`g`), Qwen3-MoE of 12 layers (`q`), Qwen3-30B-A3B (`q30`), and 48 layers x 512 experts top-10 as in Qwen3-Next (`next`).
The slots hold the experts most often used. Routing is drawn by Zipf's law, anew for every step, or the same in all steps: then nothing is
loaded. A step's decisions are one CUDA graph, replayed; records are not moved. The profiler gives the time of each kernel. `plec` gets a
forecast that names most of the truth and some experts besides. Fetches are timed apart, ten in one graph.

Rows are printed and written at once; none begins after `--seconds` from the start of the process. Kernels are compiled once a tree:
`--compile NUMBER/PROCESSES` only runs every so many of the cases once, so that several processes share that work beforehand.

Usage: python benchmarks/residency_tables.py --out FILE [--seconds 20] [--only next,q30] [--cases next:8:plec:0.5,...] [--compile 0/8]
    [--without-fetch] [--tiny]
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from expertflow.bench.about import about
from expertflow.cache.core import fill_slot, make_tables
from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.cache.policy import FADE, Usage
from expertflow.cache.strategy import STRATEGIES
from expertflow.kernels import fetch
from expertflow.kernels.backend import backend
from expertflow.kernels.ledger import Ledger
from expertflow.kernels.residency.state import AHEAD, LOADS, CacheState, Schedule

SEED = 7
STEPS = 6
"""Replays whose kernels are counted."""
RECALL, FALSE_ALARMS = 0.8, 0.05
"""Of the stand-in for a forecast: the share of needed experts it names, and wrong names over right ones."""
FETCHES = 10
"""Fetches in a row in one graph."""
FETCH_RECORDS = (0, 1, 2, 4, 8, 32)
FETCH_BYTES = (1_638_400, 9_437_184, 3_407_872)
CUTS = ((16, 1 << 15), (16, 1 << 14), (32, 1 << 14), (8, 1 << 16))
"""Further programs and bytes of a block, for records of the first size."""
HOST_BYTES = 1 << 29


class Shape(NamedTuple):
    """The size of a model's tables."""

    layers: int
    experts: int
    top_k: int


class Case(NamedTuple):
    """One row of the result."""

    shape: str
    batch: int
    strategy: str
    share: float


SHAPES = {"g": Shape(24, 32, 4), "q": Shape(12, 128, 8), "q30": Shape(48, 128, 8), "next": Shape(48, 512, 10)}
TINY = {"tiny": Shape(3, 16, 2)}


def cases(names: list[str]) -> Iterator[Case]:
    """What is measured, the most interesting first: plans for the first shape, then the same for the others, then other strategies."""
    for strategy in ("plec", "next-use"):
        yield from (Case(name, batch, strategy, 0.5) for name in names for batch in (1, 8))
    yield from (Case(names[0], batch, strategy, 0.5) for batch in (4, 16) for strategy in ("plec", "next-use"))
    for strategy in ("plec", "next-use", "lru"):
        yield from (Case(name, batch, strategy, 0.25) for name in names for batch in (1, 8))


def popularity(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """`[L, E]`, the logarithm of each expert's weight: Zipf's law over the experts in a random order."""
    ranks = np.stack([rng.permutation(shape.experts) for _ in range(shape.layers)])
    return -np.log(1.0 + ranks)


def drawn(weights: np.ndarray, tokens: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Experts `[L, T, K]`, different within a token."""
    layers, experts = weights.shape
    keys = weights[:, None] + rng.gumbel(size=(layers, tokens, experts))
    return np.argpartition(-keys, top_k, axis=2)[:, :, :top_k].astype(np.int64)


@dataclass
class Tables:
    """A step's decisions over a pool whose slots hold the most popular experts.

    Attributes:
        ids: int64 `[L, T, K]`, the routing of the coming step.
    """

    case: Case
    shape: Shape
    device: torch.device

    def __post_init__(self) -> None:
        """Fill tables and usage as a long run would."""
        shape, case = self.shape, self.case
        self.rng = np.random.default_rng(SEED)
        self.weights = popularity(shape, self.rng)
        strategy = STRATEGIES[case.strategy].on_device()
        slots = int(shape.layers * shape.experts * case.share)
        tables = make_tables(shape.layers, shape.experts, slots, divided=strategy.partition == "layer")
        best = np.argsort(-self.weights, axis=1)
        for number in range(slots):
            fill_slot(tables, number % shape.layers, int(best[number % shape.layers, number // shape.layers]), number)
        usage = Usage(layers=shape.layers, experts=shape.experts)
        chance = 1 - (1 - np.exp(self.weights) / np.exp(self.weights).sum(1, keepdims=True)) ** (
            shape.top_k * case.batch
        )
        usage.recent[:], usage.steady[:] = chance / (1 - FADE[0]), chance / (1 - FADE[1])
        usage.count[:], usage.step = chance * 100, 100
        usage.last_use[:] = np.floor(100 - 1 / np.maximum(chance, 0.01)) * shape.layers + usage.place
        self.given = strategy.predicted
        self.state = CacheState.allocate(strategy, tables, self.device, given=self.given)
        self.state.copy_from(tables, usage)
        self.schedule = Schedule.allocate(self.state, case.batch, shape.top_k)
        self.twin = backend(self.device).residency(self.state)
        self.ids = torch.zeros(shape.layers, case.batch, shape.top_k, dtype=torch.int64, device=self.device)
        self.chance = chance
        if self.given:
            self.state.known.fill_(STEPS_KNOWN)
            self.state.demand.copy_(torch.from_numpy(np.broadcast_to(chance, self.state.demand.shape).copy()))

    def route(self) -> np.ndarray:
        """Draw the coming step's routing and give it to the device, with its forecast."""
        routing = drawn(self.weights, self.case.batch, self.shape.top_k, self.rng)
        self.ids.copy_(torch.from_numpy(routing))
        if self.given:
            needed = np.zeros((self.shape.layers, self.shape.experts), dtype=bool)
            np.put_along_axis(needed, routing.reshape(self.shape.layers, -1), values=True, axis=1)
            named = needed & (self.rng.random(needed.shape) < RECALL)
            named |= ~needed & (self.rng.random(needed.shape) < FALSE_ALARMS * needed.mean())
            sure = np.where(named, 0.9 + 0.1 * self.rng.random(needed.shape), np.minimum(self.chance, 0.5))
            self.state.demand[0].copy_(torch.from_numpy(sure))
        return routing

    def step(self) -> None:
        """All of a step's decisions."""
        self.twin.open_step()
        for layer in range(self.shape.layers):
            self.twin.run_layer(layer, self.ids[layer], self.schedule)
            self.twin.bind(layer)
        self.twin.close_step()


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work as a graph to replay; on a CPU, the work itself."""
    work()
    if device.type != "cuda":
        return work
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Microseconds of a call."""
    if device.type != "cuda":
        begin = time.perf_counter()
        work()
        return (time.perf_counter() - begin) * 1e6
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def profiled(work: list[Callable[[], None]], device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every launch, by the kernel's name, in the order of time."""
    with profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as record:
        for each in work:
            each()
        torch.cuda.synchronize() if device.type == "cuda" else None
    found = defaultdict(list)
    for event in sorted(record.events(), key=lambda event: event.time_range.start):
        if event.device_type == DeviceType.CUDA and "at::" not in event.name and "Mem" not in event.name:
            found[event.name].append(event.time_range.elapsed_us())
    return found


def measure(case: Case, shape: Shape, device: torch.device) -> dict[str, Any]:
    """One row: steps with their loads, and repeated steps, which load nothing."""
    begin = time.perf_counter()
    tables = Tables(case, shape, device)
    tables.route()
    replay = captured(tables.step, device)
    row = {**case._asdict(), **shape._asdict(), "slots": tables.state.slots, "phases": tables.schedule.phases}
    row["ready_seconds"] = time.perf_counter() - begin
    for kind in ("loads", "hits"):
        tables.route()
        replay()
        replay()  # what the first one had to load is resident now
        tables.state.take_tally()
        steps, needed = [], []
        for _ in range(STEPS):
            if kind == "loads":
                needed += [len(np.unique(layer)) for layer in tables.route()]
            steps.append(timed(replay, device))
        tally = tables.state.take_tally()
        row[kind] = {
            "step_us": sorted(steps), "needed_a_layer": float(np.mean(needed)) if needed else None,
            "loads_a_layer": tally[LOADS] / STEPS / shape.layers, "ahead_a_layer": tally[AHEAD] / STEPS / shape.layers,
        }  # fmt: skip

    def routed() -> None:
        tables.route()
        replay()

    found = profiled([routed] * STEPS + [replay] * (1 + STEPS), device)
    tables.state.take_tally()
    for kind in ("loads", "hits"):
        row[kind]["kernels"] = {}
        for name, times in ((name, times) for name, times in found.items() if len(times) > 2 * STEPS):
            launches = len(times) // (2 * STEPS + 1)
            those = times[: launches * STEPS] if kind == "loads" else times[-launches * STEPS :]
            row[kind]["kernels"][name] = {
                "launches_a_step": launches, "us_a_step": sum(those) / STEPS, "us": statistics.median(those)
            }  # fmt: skip
    return row


def measure_fetch(device: torch.device, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Time fetches of few records, and the same bytes over the copy engine."""
    cuda = device.type == "cuda"
    host = torch.empty(HOST_BYTES if not tiny else 1 << 20, dtype=torch.uint8, pin_memory=cuda)
    pool, rng = torch.empty_like(host, device=device, pin_memory=False), np.random.default_rng(SEED)
    for size in FETCH_BYTES if not tiny else (4096,):
        records = len(host) // size
        store, slots = (whole[: records * size].view(records, size) for whole in (host, pool))
        for number in (n for n in FETCH_RECORDS if n * FETCHES <= 4 * records):
            chosen = [rng.permutation(records)[: max(number, 1)] for _ in range(FETCHES)]
            fetches = Fetches(store, slots, number, chosen)
            row = {"record_bytes": size, "records": number, "us": fetches.us(fetches.run)}
            if number:
                row["copy_engine_us"] = timed(captured(fetches.engine, device), device) / FETCHES
            if cuda and size == FETCH_BYTES[0]:
                row["cuts_us"] = {str(cut): fetches.us(partial(fetches.cut, *cut)) for cut in CUTS}
            yield row


class Fetches:
    """Fetches in a row of the records `chosen`, each into the slot of its number."""

    def __init__(self, store: Tensor, slots: Tensor, number: int, chosen: list[np.ndarray]) -> None:
        """Make a ledger a fetch."""
        self.store, self.slots, self.chosen, device = store, slots, chosen, slots.device
        self.ledgers = [Ledger.of(*(torch.from_numpy(c).to(device, torch.int32) for _ in range(2))) for c in chosen]
        self.todo = torch.arange(len(chosen[0]), dtype=torch.int32, device=device)
        self.bounds = torch.tensor([0, number], dtype=torch.int32, device=device)

    def run(self) -> None:
        """As the engine does."""
        for ledger in self.ledgers:
            backend(self.slots.device).fetch_records(self.store, self.slots, ledger, self.todo, self.bounds)

    def cut(self, programs: int, block_bytes: int) -> None:
        """By other programs or blocks."""
        for ledger in self.ledgers:
            fetch.launch_fetch(
                self.store, self.slots, (ledger, self.todo, self.bounds), programs, block_bytes, fetch.WARPS
            )

    def engine(self) -> None:
        """By the copy engine."""
        for record in (int(one) for c in self.chosen for one in c):
            self.slots[record].copy_(self.store[record], non_blocking=True)

    def us(self, work: Callable[[], None]) -> float:
        """Microseconds of a fetch, the median of some replays."""
        replay, times = captured(work, self.slots.device), []
        for _ in range(5):
            for ledger in self.ledgers:
                ledger.renew()
            times.append(timed(replay, self.slots.device) / FETCHES)
        return statistics.median(times)


def show_fetch(row: dict[str, Any]) -> None:
    """Print a line."""
    moved = row["records"] * row["record_bytes"] / 1e3
    found = {"ours": row["us"], "copy engine": row.get("copy_engine_us"), **row.get("cuts_us", {})}
    speeds = ", ".join(f"{name} {us:.1f} us {moved / us:.1f} GB/s" for name, us in found.items() if us)
    print(f"fetch {row['record_bytes'] / 1e6:5.2f} MB x {row['records']:2d}: {speeds}", flush=True)


def show_tables(row: dict[str, Any]) -> None:
    """Print two lines: microseconds a step; needed, loads, loads ahead a layer; microseconds a step and a launch of each kernel."""
    for kind in ("loads", "hits"):
        found = row[kind]
        kernels = ", ".join(f"{name} {k['us_a_step']:.0f} ({k['us']:.1f})" for name, k in found["kernels"].items())
        print(
            f"{row['shape']:5s} {row['batch']:2d} {row['strategy']:8s} {row['share']:.2f} {kind}: {statistics.median(found['step_us']):8.0f} us a step"
            f" | {found['needed_a_layer'] or 0:5.1f} {found['loads_a_layer']:5.2f} {found['ahead_a_layer']:5.2f} | {kernels}",
            flush=True,
        )


def rows(
    chosen: list[Case], shapes: dict[str, Shape], device: torch.device, fetches: Iterator[dict[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All rows: two cases, fetches of the smallest records, the other cases, the other fetches."""
    for case in chosen[:2]:
        yield "tables", measure(case, shapes[case.shape], device)
    yield from (("fetch", row) for row in islice(fetches, len(FETCH_RECORDS)))
    for case in chosen[2:]:
        yield "tables", measure(case, shapes[case.shape], device)
    yield from (("fetch", row) for row in fetches)


def main() -> None:
    """Measure until time is over; write and print every row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("residency_tables.json"))
    parser.add_argument("--seconds", type=float, default=20, help="no row begins later than this after the process")
    parser.add_argument("--only", default="next,q30,g,q", help="shapes, the first one in most detail")
    parser.add_argument("--cases", help="instead: SHAPE:BATCH:STRATEGY:SHARE,...")
    parser.add_argument("--rows", type=int, help="so many cases at most")
    parser.add_argument(
        "--compile", help="NUMBER/PROCESSES: run every PROCESSES-th case from NUMBER on, once, unmeasured"
    )
    parser.add_argument("--without-fetch", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape, for a CPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = TINY if options.tiny else SHAPES
    chosen = list(cases(list(TINY) if options.tiny else options.only.split(",")))[: options.rows]
    if options.cases:
        parts = (case.split(":") for case in options.cases.split(","))
        chosen = [Case(shape, int(batch), strategy, float(share)) for shape, batch, strategy, share in parts]
    fetches = iter(()) if options.without_fetch else measure_fetch(device, tiny=options.tiny)
    if options.compile:
        number, processes = map(int, options.compile.split("/"))
        for case in chosen[number::processes]:
            tables = Tables(case, shapes[case.shape], device)
            tables.route()
            tables.step()
        list(islice(fetches, 2 * (number == 0)))
        return
    result: dict[str, Any] = {**about(device.type)._asdict(), "seed": SEED, "steps": STEPS, "fetch": [], "tables": []}
    result |= {"recall": RECALL, "false_alarms": FALSE_ALARMS, "left_out": [case._asdict() for case in chosen]}
    options.out.parent.mkdir(parents=True, exist_ok=True)

    begun = psutil.Process().create_time()
    with torch.inference_mode():
        for kind, row in rows(chosen, shapes, device, fetches):
            (show_tables if kind == "tables" else show_fetch)(row)
            result[kind].append(row)
            result["left_out"] = [case._asdict() for case in chosen[len(result["tables"]) :]]
            options.out.write_text(json.dumps(result, indent=1))
            if time.time() - begun > options.seconds:
                break


if __name__ == "__main__":
    main()
