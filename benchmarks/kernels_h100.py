"""The kernels at full size against what memory and link allow: experts of two shapes at batch 1-64, fetch, both at once.

Shape Q: Qwen3-MoE, 12 layers x 128 experts top-8, hidden 2048, expert width 768. Shape G: gpt-oss-20b, 24 layers x 32
experts top-4, hidden 2880, expert width 2880. Random bf16 weights and routing, all experts resident; a step's expert
layers are captured in one CUDA graph and replayed. There are two floors. One is the bytes of the step's distinct
experts over 3.0 TB/s (a device copy, read and written, measured on this machine). The other is the bytes of the records
over the copy engine's speed.

Usage: python benchmarks/kernels_h100.py [--out benchmarks/results/kernels_h100.json]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from expertflow.bench.about import about
from expertflow.formats.plain import plain
from expertflow.formats.records import RecordLayout, StoreLayout
from expertflow.kernels import experts, fetch, reference
from expertflow.kernels.ledger import Ledger
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.memory.store import HostStore

SEED = 7
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PROGRAMS = (1, 2, 4, 8, 16)
FETCH_ROWS = (1, 4, 32)
REPLAYS = 15
HBM_BYTES_PER_SECOND = 3.0e12
STORE_BYTES = 1_600_000_000
CUDA = torch.device("cuda")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model's expert layers."""

    layers: int
    experts: int
    top_k: int
    tensors: dict[str, tuple[int, ...]]
    options: dict[str, Any]

    def build(self) -> ExpertMlp:
        """The record of one expert."""
        layout = RecordLayout.of([plain(n, s, "bfloat16") for n, s in self.tensors.items()])
        return ExpertMlp.of(layout, **self.options)


SHAPES = {
    "Q": Shape(
        layers=12, experts=128, top_k=8, options={"activation": "silu"},
        tensors={"gate_up_proj": (1536, 2048), "down_proj": (2048, 768)},
    ),
    "G": Shape(
        layers=24, experts=32, top_k=4, options={"activation": CLAMPED_SWIGLU, "transposed": True, "interleaved": True},
        tensors={
            "gate_up_proj": (2880, 5760), "gate_up_proj_bias": (5760,), "down_proj": (2880, 2880),
            "down_proj_bias": (2880,),
        },
    ),
}  # fmt: skip


def captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Compile what has to be compiled, then capture the work in a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def timed(work: Callable[[], None], replays: int = REPLAYS) -> list[float]:
    """Milliseconds of each replay of the captured work, sorted."""
    graph, times = captured(work), []
    graph.replay()
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)


@dataclass
class Step:
    """The expert layers of one decode step, with random routing and every expert resident in slot layer * E + e."""

    shape: Shape
    mlp: ExpertMlp
    pool: Tensor
    tokens: int

    def __post_init__(self) -> None:
        """Draw routing and inputs."""
        shape, tokens = self.shape, self.tokens
        scores = torch.rand(shape.layers, tokens, shape.experts, device=CUDA)
        self.index = scores.topk(shape.top_k).indices.contiguous()
        first = torch.arange(shape.layers, device=CUDA)[:, None, None] * shape.experts
        self.slots = (self.index + first).to(torch.int32)
        self.weights = torch.rand(tokens, shape.top_k, device=CUDA)
        self.hidden = torch.randn(tokens, self.mlp.hidden, device=CUDA, dtype=torch.bfloat16)
        self.out = torch.empty_like(self.hidden)
        self.work = Workspace.allocate(self.mlp, tokens, shape.top_k, CUDA)

    @property
    def distinct(self) -> int:
        """Distinct experts over all layers."""
        return sum(len(layer.unique()) for layer in self.slots)

    def pairs(self) -> None:
        """Every layer's up and down projections."""
        for slots in self.slots:
            experts.expert_pairs(self.mlp, self.hidden, slots, self.pool, self.work)

    def whole(self) -> None:
        """Every layer, summed."""
        for slots, index in zip(self.slots, self.index, strict=True):
            experts.expert_pairs(self.mlp, self.hidden, slots, self.pool, self.work)
            experts.combine(self.work.parts, index, self.weights, self.shape.experts, self.out)

    def error(self) -> float:
        """Relative distance of a token's results from float64, first layer."""
        experts.expert_pairs(self.mlp, self.hidden, self.slots[0], self.pool, self.work)
        parts = self.work.parts[:1].double()
        exact = Workspace(self.work.inner[: self.shape.top_k].double(), torch.full_like(parts, torch.nan))
        reference.expert_pairs(self.mlp, self.hidden[:1], self.slots[0, :1], self.pool, exact)
        return float((parts - exact.parts).norm() / exact.parts.norm())

    def same_alone(self) -> bool:
        """Whether the last token gets, to the bit, what it gets in a batch of its own."""
        experts.expert_pairs(self.mlp, self.hidden, self.slots[0], self.pool, self.work)
        single = Workspace.allocate(self.mlp, 1, self.shape.top_k, CUDA)
        experts.expert_pairs(self.mlp, self.hidden[-1:], self.slots[0, -1:], self.pool, single)
        return torch.equal(single.parts[0], self.work.parts[self.tokens - 1])


def measure_experts(name: str, shape: Shape) -> list[dict[str, Any]]:
    """Time a step's expert layers at every batch."""
    mlp = shape.build()
    pool = torch.empty(shape.layers * shape.experts, mlp.record_bytes, dtype=torch.uint8, device=CUDA)
    pool.view(torch.bfloat16).normal_(0, 0.02)
    rows: list[dict[str, Any]] = []
    for tokens in BATCHES:
        step = Step(shape, mlp, pool, tokens)
        floor = step.distinct * mlp.record_bytes / HBM_BYTES_PER_SECOND * 1e3
        rows.append({
            "shape": name, "batch": tokens, "distinct_experts_per_layer": step.distinct / shape.layers,
            "floor_ms": floor, "pairs_ms": timed(step.pairs), "step_ms": timed(step.whole),
            "error": step.error(), "same_alone": step.same_alone(),
        })  # fmt: skip
        print(rows[-1]["shape"], tokens, round(statistics.median(rows[-1]["step_ms"]), 3), flush=True)
    return rows


def filled_store(record_bytes: int) -> HostStore:
    """A page-locked store whose words are all different."""
    layout = StoreLayout.uniform([plain("words", (record_bytes // 4,), "float32")])
    store = HostStore(layout, STORE_BYTES // record_bytes, pin=True)
    words = store.buffer.view(torch.int64)
    words.copy_(torch.arange(words.shape[1])[None] * 2654435761 + torch.arange(len(words))[:, None])
    store.lock()
    return store


class FetchBench:
    """Copies of randomly chosen records of a store into randomly chosen slots."""

    def __init__(self, store: HostStore) -> None:
        """Choose records of the store."""
        self.store = store  # which unlocks its memory when it goes
        self.host = store.buffer
        records, self.record_bytes = self.host.shape
        self.pool = torch.zeros(records, self.record_bytes, dtype=torch.uint8, device=CUDA)
        self.src, self.dst = (torch.randperm(records, device=CUDA).to(torch.int32) for _ in range(2))

    def copy(self, records: int, programs: int) -> Callable[[], None]:
        """A fetch of the first records of the list."""
        bounds = torch.tensor([0, records], dtype=torch.int32, device=CUDA)
        ledger, order = Ledger.of(self.src, self.dst), torch.arange(len(self.src), dtype=torch.int32, device=CUDA)

        def copies() -> None:
            ledger.renew()
            fetch.fetch_records(self.host, self.pool, ledger, order, bounds, programs)

        return copies

    def engine(self, records: int) -> Callable[[], None]:
        """The same through the copy engine."""
        chosen = list(zip(self.src[:records].tolist(), self.dst[:records].tolist(), strict=True))

        def copies() -> None:
            for source, slot in chosen:
                self.pool[slot].copy_(self.host[source], non_blocking=True)

        return copies

    def correct(self, records: int) -> bool:
        """Whether a fetch into a wiped pool brings every byte."""
        self.pool.zero_()
        self.copy(records, 8)()
        return torch.equal(self.pool[self.dst[:records].long()].cpu(), self.host[self.src[:records].long().cpu()])

    def measure(self) -> list[dict[str, Any]]:
        """Time every number of records and programs."""
        rows = []
        for number in (n for n in FETCH_ROWS if n <= len(self.host)):
            moved = number * self.record_bytes / 1e6
            engine = [moved / ms for ms in timed(self.engine(number), 7)]
            for programs in PROGRAMS:
                speeds = [moved / ms for ms in timed(self.copy(number, programs), 7)]
                rows.append({
                    "row_bytes": self.record_bytes, "rows": number, "programs": programs, "gb_per_second": speeds,
                    "copy_engine_gb_per_second": engine,
                })  # fmt: skip
        return rows


def measure_beside(bench: FetchBench, tokens: int) -> dict[str, Any]:
    """Four steps of shape Q's expert layers with a fetch of about the same length on a second stream."""
    shape = SHAPES["Q"]
    mlp = shape.build()
    pool = torch.empty(shape.layers * shape.experts, mlp.record_bytes, dtype=torch.uint8, device=CUDA)
    pool.view(torch.bfloat16).normal_(0, 0.02)
    step, side = Step(shape, mlp, pool, tokens), torch.cuda.Stream()

    def compute() -> None:
        for _ in range(4):
            step.whole()

    alone = timed(compute)
    copy = bench.copy(min(len(bench.host), int(statistics.median(alone) * 50e6 / bench.record_bytes)), 8)

    def both() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy()
        compute()
        torch.cuda.current_stream().wait_stream(side)

    return {"batch": tokens, "compute_ms": alone, "fetch_ms": timed(copy), "both_ms": timed(both)}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    found = about("cuda")
    return {**found.machine, **found.versions, "date": found.date, "commit": found.commit}


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(title: str, columns: str, rows: list[list[str]]) -> Table:
    """A table of ready-made cells."""
    made = Table(*columns.split("|"), title=title)
    for row in rows:
        made.add_row(*row)
    return made


def show(result: dict[str, Any]) -> None:
    """Print each figure beside its floor."""
    console = Console(width=130)
    rows = [
        [row["shape"], str(row["batch"]), f"{row['distinct_experts_per_layer']:.1f}", spread(row["step_ms"], 3),
         f"{row['floor_ms']:.3f}", f"{row['floor_ms'] / statistics.median(row['step_ms']):.2f}",
         f"{row['error']:.1e}", str(row["same_alone"])]
        for row in result["experts"]
    ]  # fmt: skip
    console.print(table("experts of one step", "shape|batch|distinct|ms|floor|share|error|same alone", rows))
    rows = [
        [f"{row['row_bytes'] / 1e6:.1f}", str(row["rows"]), str(row["programs"]), spread(row["gb_per_second"], 1),
         f"{statistics.median(row['copy_engine_gb_per_second']):.1f}"]
        for row in result["fetch"]
    ]  # fmt: skip
    console.print(
        table(f"fetch, correct: {result['fetch_correct']}", "record MB|records|programs|GB/s|copy engine", rows)
    )
    rows = [
        [str(row["batch"]), *(spread(row[f"{k}_ms"], 3) for k in ("compute", "fetch", "both"))]
        for row in result["beside"]
    ]
    console.print(table("fetch beside compute, ms", "batch|compute|fetch|both", rows))


def main() -> None:
    """Check, time, write, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels_h100.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device.")
    torch.manual_seed(SEED)
    result: dict[str, Any] = {"environment": environment(), "seed": SEED, "replays": REPLAYS}
    result["tilings"] = {name: [str(cut) for cut in experts.tilings(s.build(), s.top_k)] for name, s in SHAPES.items()}
    result["hbm_bytes_per_second"] = HBM_BYTES_PER_SECOND
    result["experts"] = [row for name, shape in SHAPES.items() for row in measure_experts(name, shape)]
    benches = [
        FetchBench(filled_store(n))
        for n in (5 * 2**20, SHAPES["Q"].build().record_bytes, SHAPES["G"].build().record_bytes)
    ]
    result["fetch_correct"] = all(bench.correct(16) for bench in benches)
    result["fetch"] = [row for bench in benches for row in bench.measure()]
    result["beside"] = [measure_beside(benches[1], tokens) for tokens in (4, 16)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1))
    show(result)


if __name__ == "__main__":
    main()
