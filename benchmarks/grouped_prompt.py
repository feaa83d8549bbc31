"""The experts of a pass over prompts: the grouped kernel beside torch's product an expert, at the shapes of gpt-oss-20b and Qwen3-30B-A3B.

One layer, every expert resident, random routing and weights. Columns: all experts in one launch, an expert a launch (as they arrive over
the link), and torch on decoded weights. `host` is the time in which the host queues a layer. With `--search` other tiles and tilings are
tried for the largest pass.

Usage: python benchmarks/grouped_prompt.py [--search] [--formats bf16,mxfp4] [--out grouped_prompt.json]
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from packed_kernels import CUDA, SEED, SHAPES, Shape, filled
from stand_ins import PACKED
from torch import Tensor
from torch.nn import functional

from expertflow.bench.about import about
from expertflow.formats.plain import PLAIN
from expertflow.formats.table import FORMATS
from expertflow.kernels import experts
from expertflow.kernels.mlp import ExpertMlp, Workspace
from expertflow.kernels.prompts import grouped
from expertflow.kernels.prompts.pairs import sort_pairs
from expertflow.kernels.tiling import Tiling

TOKENS = (1, 16, 64, 256, 512, 1024, 2048)
CALLS = 10
AHEAD = 12288
"""Size of a product that keeps the device busy while calls are queued, so that only they are timed."""


def timed(work: Callable[[], None], busy: Tensor) -> tuple[float, float]:
    """Microseconds of a call on the device, and in which the host queues it."""
    work()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(4):
        torch.mm(busy, busy)
    begin.record()
    started = time.perf_counter()
    for _ in range(CALLS):
        work()
    queued = time.perf_counter() - started
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / CALLS, queued * 1e6 / CALLS


class Pass:
    """Routing, inputs and buffers of a pass of some tokens."""

    def __init__(self, shape: Shape, mlp: ExpertMlp, pool: Tensor, tokens: int) -> None:
        """Draw routing and inputs."""
        torch.manual_seed(SEED)
        self.mlp, self.pool = mlp, pool
        self.index = torch.rand(tokens, shape.experts, device=CUDA).topk(shape.top_k).indices
        self.pairs = sort_pairs(self.index, shape.experts).counted(self.index.cpu().numpy())
        self.hidden = torch.randn(tokens, mlp.hidden, device=CUDA, dtype=torch.bfloat16)
        self.work = Workspace.allocate(mlp, tokens, shape.top_k, CUDA)
        self.run = grouped.GroupedMlp(mlp, CUDA)
        self.decoded = [mlp.layout.weights(record) for record in pool[:4]]

    def together(self, **cut: Any) -> None:
        """All experts in one launch."""
        group = [(expert, expert) for expert in self.pairs.needed]
        if cut:
            self.run.launch(self.hidden, self.pairs, group, self.pool, self.work, **cut)
        else:
            self.run(self.hidden, self.pairs, group, self.pool, self.work)

    def one_by_one(self) -> None:
        """A launch an expert."""
        for expert in self.pairs.needed:
            self.run(self.hidden, self.pairs, [(expert, expert)], self.pool, self.work)

    def with_torch(self) -> None:
        """The products alone, an expert at a time, of decoded weights and gathered tokens."""
        mine = self.hidden[self.pairs.order // self.pairs.top_k]
        for expert in self.pairs.needed:
            weights = self.decoded[expert % 4]
            tokens = mine[self.pairs.bounds[expert] : self.pairs.bounds[expert + 1]]
            if self.mlp.transposed:
                (tokens @ weights["gate_up_proj"])[:, : self.mlp.width].contiguous() @ weights["down_proj"]
            else:
                inner = functional.linear(tokens, weights["gate_up_proj"])[:, : self.mlp.width].contiguous()
                functional.linear(inner, weights["down_proj"])

    def same_as_steps(self) -> bool:
        """Whether 64 tokens have the bits that decode steps give them."""
        count, found = min(64, len(self.hidden)), self.work.parts.clone()
        slots = self.index[:count].to(torch.int32)
        step = Workspace.allocate(self.mlp, count, self.pairs.top_k, CUDA)
        experts.expert_pairs(self.mlp, self.hidden[:count], slots, self.pool, step)
        return torch.equal(found[:count], step.parts)

    @property
    def operations(self) -> int:
        """Floating-point operations of a layer."""
        return self.pairs.bounds[-1] * 2 * self.mlp.hidden * (self.mlp.inner + self.mlp.width)


def candidates(mlp: ExpertMlp) -> Iterator[tuple[int, tuple[Tiling, Tiling]]]:
    """Tiles and tilings to try; both projections are cut alike."""
    steps = [cut.block_k for cut in experts.tilings(mlp, 1024)]
    outputs = 2 if mlp.gated else 1
    for tile, rows, warps, stages in itertools.product((32, 64, 128), (64, 128), (4, 8), (2, 3, 4)):
        yield tile, (Tiling(rows // outputs, steps[0], warps, stages), Tiling(rows, steps[1], warps, stages))


def search(one: Pass, busy: Tensor) -> list[dict[str, Any]]:
    """Time every candidate, the fastest first."""
    rows = []
    for tile, cuts in candidates(one.mlp):
        try:
            device, _ = timed(partial(one.together, tile=tile, cuts=cuts), busy)
        except triton.runtime.errors.OutOfResources:
            continue
        rows.append({"tile": tile, "cut": str(cuts[1]), "us": device})
    return sorted(rows, key=lambda row: float(row["us"]))


def measure(name: str, column: str, busy: Tensor, *, tune: bool) -> list[dict[str, Any]]:
    """Time a shape in a format."""
    shape, rows = SHAPES[name], []
    format_ = PLAIN if column == "bf16" else next(f[0] for one in FORMATS.values() if (f := one.claim(PACKED[column])))
    mlp = shape.build(format_)
    pool = filled(mlp, shape.experts)
    for tokens in TOKENS:
        one = Pass(shape, mlp, pool, tokens)
        together, host = timed(one.together, busy)
        equal = one.same_as_steps()
        single, host_single = timed(one.one_by_one, busy)
        stock, _ = timed(one.with_torch, busy)
        rows.append({
            "shape": name, "format": column, "tokens": tokens, "experts": len(one.pairs.needed), "us": together, "host_us": host,
            "single_us": single, "single_host_us": host_single, "torch_us": stock, "same_bits": equal,
            "tflops": one.operations / together / 1e6, "tile": grouped.tile_for(mlp, one.pairs.mean),
            "tried": search(one, busy)[:8] if tune and tokens in {TOKENS[-1], 512} else [],
        })  # fmt: skip
        row = rows[-1]
        print(
            f"{name:12} {column:6} {tokens:5} tokens  tile {row['tile']:3}  together {together:8.0f} us ({row['tflops']:4.0f} TFLOP/s, "
            f"host {host:5.0f})  one by one {single:8.0f} (host {host_single:6.0f})  torch {stock:8.0f}  {'' if equal else 'OTHER BITS'}",
            flush=True,
        )
        for tried in row["tried"]:
            print(f"    {tried['us']:8.0f} us  tile {tried['tile']:3} {tried['cut']}", flush=True)
    return rows


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "grouped_prompt.json")
    parser.add_argument("--search", action="store_true", help="try other tiles and tilings")
    parser.add_argument("--formats", default="bf16,mxfp4")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    options = parser.parse_args()
    busy = torch.randn(AHEAD, AHEAD, device=CUDA, dtype=torch.bfloat16)
    rows = []
    for name, column in itertools.product(options.shapes.split(","), options.formats.split(",")):
        rows += measure(name, column, busy, tune=options.search)
        torch.cuda.empty_cache()
    result = {"about": about("cuda")._asdict(), "seed": SEED, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
