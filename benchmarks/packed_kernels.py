"""Expert kernels by format: each projection's time beside the time that reading its bytes takes, and whether bits are the decoded weights'.

The shapes of gpt-oss-20b and Qwen3-30B-A3B, random codes and routing, every expert resident. A launch a layer, all layers in one CUDA
graph. The floor is the bytes of the distinct experts over the read rate of this run (a sum over 8 GB). With `--search` other
tilings are tried too, with `--splits` sums of K in chunks, by one program or by one a chunk; all formats' turns alternate there.
`--compile 3/12` only compiles, every twelfth kernel from the third on: so that twelve processes fill the cache at once.

Usage: python benchmarks/packed_kernels.py [--search] [--splits 2,4] [--out benchmarks/results/packed_kernels_h200.json]
"""

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from kernels_h100 import CUDA, captured, timed
from stand_ins import PACKED
from torch import Tensor

from expertflow.bench.about import about
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import PLAIN, plain
from expertflow.formats.records import RecordLayout
from expertflow.formats.table import FORMATS
from expertflow.kernels import experts
from expertflow.kernels.mlp import CLAMPED_SWIGLU, SHARED_PAIRS, ExpertMlp, Workspace
from expertflow.kernels.tiling import Tiling

SEED = 7
TOKENS = (1, 4, 16, 64)
REPLAYS = 11


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One model's expert layers."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    gpt_oss: bool = False

    def build(self, format_: Format) -> ExpertMlp:
        """The record of one expert."""
        shapes = {"gate_up_proj": (2 * self.width, self.hidden), "down_proj": (self.hidden, self.width)}
        specs = []
        for name, shape in shapes.items():
            joined = 2 if name == "gate_up_proj" and not self.gpt_oss and format_ is not PLAIN else 1
            specs.append(
                TensorSpec(
                    name=name, shape=shape[::-1] if self.gpt_oss else shape, dtype="bfloat16", format=format_, joined=joined,
                    transposed=self.gpt_oss,
                )
            )  # fmt: skip
            if self.gpt_oss:
                specs.append(plain(f"{name}_bias", shape[:1], "bfloat16"))
        activation = CLAMPED_SWIGLU if self.gpt_oss else "silu"
        return ExpertMlp.of(RecordLayout.of(specs), activation, transposed=self.gpt_oss, interleaved=self.gpt_oss)


SHAPES = {
    "gpt-oss-20b": Shape(layers=24, experts=32, top_k=4, hidden=2880, width=2880, gpt_oss=True),
    "qwen3-30b": Shape(layers=24, experts=128, top_k=8, hidden=2048, width=768),
}


def microseconds(work: Callable[[], None]) -> float:
    """Of the captured work, the median of some replays."""
    return statistics.median(timed(work, REPLAYS)) * 1e3


def read_rate() -> float:
    """Bytes a second of a sum over 8 GB."""
    data = torch.ones(1 << 30, dtype=torch.int64, device=CUDA)
    return data.nbytes / min(microseconds(data.sum), microseconds(data.amax)) * 1e6


def filled(mlp: ExpertMlp, count: int) -> Tensor:
    """Records of random numbers; four different ones, over and over."""
    random = torch.Generator(CUDA).manual_seed(SEED)
    pool = torch.zeros(count, mlp.record_bytes, dtype=torch.uint8, device=CUDA)
    for record in pool[:4]:
        for spec in mlp.layout.specs:
            for name, part in spec.format.draw(spec, random, 0.02).items():
                mlp.layout.part(record, spec.name, name).copy_(part)
            if spec.format is not PLAIN:
                assert spec.format.in_range(spec, mlp.layout.parts(record.cpu(), spec.name))
    pool[4:] = pool[:4].repeat(count // 4, 1)[: count - 4]
    return pool


@dataclass
class Step:
    """Routing, inputs and buffers of some tokens."""

    shape: Shape
    mlp: ExpertMlp
    pool: Tensor
    tokens: int
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Draw routing and inputs."""
        torch.manual_seed(SEED)
        shape = self.shape
        index = torch.rand(shape.layers, self.tokens, shape.experts, device=CUDA).topk(shape.top_k).indices
        first = torch.arange(shape.layers, device=CUDA)[:, None, None] * shape.experts
        self.slots = (index + first).to(torch.int32)
        self.hidden = torch.randn(self.tokens, self.mlp.hidden, device=CUDA, dtype=torch.bfloat16)
        self.work = Workspace.allocate(self.mlp, self.tokens, shape.top_k, CUDA)
        self.index, self.out = index[0].contiguous(), torch.empty_like(self.hidden)
        self.weights = torch.rand(self.tokens, shape.top_k, device=CUDA)

    @property
    def distinct(self) -> int:
        """Distinct experts over all layers."""
        return sum(len(layer.unique()) for layer in self.slots)

    def up(self, cut: Tiling) -> None:
        """Every layer's up projection."""
        for slots in self.slots:
            experts.launch_up(self.mlp, self.hidden, slots, self.pool, self.work, cut)

    def down(self, cut: Tiling) -> None:
        """Every layer's down projection."""
        for slots in self.slots:
            experts.launch_down(self.mlp, slots, self.pool, self.work, cut)

    def layer(self, up: Tiling, down: Tiling) -> None:
        """Every layer: both projections, and the sum over experts."""
        for slots in self.slots:
            experts.launch_up(self.mlp, self.hidden, slots, self.pool, self.work, up)
            experts.launch_down(self.mlp, slots, self.pool, self.work, down)
            experts.combine(self.work.parts, self.index, self.weights, self.shape.experts, self.out)


def weight_bytes(mlp: ExpertMlp) -> tuple[int, int]:
    """Bytes of an expert's up and down projections."""
    return mlp.up.spec.nbytes, mlp.down.spec.nbytes


def candidates(chosen: Tiling, format_: Format, *, search: bool) -> Iterator[Tiling]:
    """The tiling in use, and others to try."""
    yield chosen
    if search and format_ is not PLAIN:
        for block_n in (32, 64, 128):
            for stages in (3, 4):
                yield Tiling(block_n, 128, 4, stages)


def same_bits(shape: Shape, mlp: ExpertMlp, pool: Tensor) -> bool:
    """Whether packed records give what the same engine gives with the numbers they stand for."""
    if mlp.layout.is_plain:
        return True
    plain_mlp = shape.build(PLAIN)
    decoded = torch.zeros(4, plain_mlp.record_bytes, dtype=torch.uint8, device=CUDA)
    for ours, theirs in zip(pool[:4], decoded, strict=True):
        for name, value in mlp.layout.weights(ours).items():
            plain_mlp.layout.tensor(theirs, name).copy_(value)
    hidden = torch.randn(8, mlp.hidden, device=CUDA, dtype=torch.bfloat16)
    slots = torch.tensor([[n % 4, (n + 1) % 4] for n in range(8)], dtype=torch.int32, device=CUDA)
    found = []
    for one, records in ((mlp, pool), (plain_mlp, decoded)):
        work = Workspace.allocate(one, 8, 2, CUDA)
        experts.expert_pairs(one, hidden, slots, records, work)
        found.append(work.parts)
    return torch.equal(*found)


def chunked(cut: Tiling, inputs: int, chunks: int, *, split: bool) -> Tiling:
    """A tiling with sums of so many chunks at most, of whole steps of 128."""
    return replace(cut, chunk=-(-inputs // (128 * chunks)) * 128, split=split and chunks > 1)


def variants(mlp: ExpertMlp, tokens: int, top_k: int, splits: list[int]) -> dict[str, tuple[str, Tiling]]:
    """Tilings to compare by a name, each with its projection."""
    found: dict[str, tuple[str, Tiling]] = {}
    for projection, used, inputs in zip(
        ("up", "down"), experts.tilings(mlp, tokens * top_k), (mlp.hidden, mlp.width), strict=True
    ):
        base = replace(used, chunk=1 << 20, split=False)
        found[f"{projection} one"] = (projection, base)
        found[f"{projection} used"] = (projection, used)
        shared = (False, True) if tokens * top_k <= SHARED_PAIRS else (False,)
        for chunks, split in itertools.product(splits, shared):
            cut, name = (
                chunked(base, inputs, chunks, split=split),
                f"{projection} {'split' if split else 'fold'} {chunks}",
            )
            found[name] = (projection, cut)
            blocks = (
                {64, 128} - {cut.block_n} if projection == "down" and not mlp.layout.is_plain and not split else set()
            )
            for block in blocks:
                found[f"{name} block {block}"] = (projection, replace(cut, block_n=block))
    return found


@dataclass
class Side:
    """Captured work of one format, each with its floor in microseconds a layer."""

    step: Step
    graphs: dict[str, Any] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)

    def capture(self, rate: float, splits: list[int]) -> None:
        """Every variant of both projections, and layers made of them; checks that programs that share products give the same bits."""
        step, shape = self.step, self.step.shape
        tried = variants(step.mlp, step.tokens, shape.top_k, splits)
        sizes = dict(zip(("up", "down"), weight_bytes(step.mlp), strict=True))
        works = {label: (partial(getattr(step, kind), cut), sizes[kind]) for label, (kind, cut) in tried.items()}
        for label in [label for label in tried if label.startswith("down ") and f"up{label[4:]}" in tried]:
            cuts = tried[f"up{label[4:]}"][1], tried[label][1]
            works[f"layer{label[4:]}"] = partial(step.layer, *cuts), sum(sizes.values())
        for label, (work, size) in works.items():
            try:
                self.graphs[label] = captured(work)
            except triton.runtime.errors.OutOfResources:
                continue
            self.floors[label] = step.distinct * size / rate * 1e6 / shape.layers
        for chunks in splits:
            found = [
                self.parts(f"{way} {chunks}") for way in ("fold", "split") if f"layer {way} {chunks}" in self.graphs
            ]
            equal = all(torch.equal(one, found[0]) and bool(one.isfinite().all()) for one in found)
            print(f"{step.tokens:3} tokens, {chunks} chunks: {'same' if equal else 'OTHER'} bits", flush=True)

    def parts(self, way: str) -> Tensor:
        """What the pairs of the last layer give."""
        self.step.work.parts.fill_(torch.nan)
        self.graphs[f"layer {way}"].replay()
        return self.step.work.parts.clone()


def compare(name: str, columns: list[str], rate: float, splits: list[int]) -> list[dict[str, Any]]:
    """Times of `variants`, and of whole layers made of them, for all formats side by side."""
    shape, rows = SHAPES[name], []
    mlps = {column: shape.build(format_of(column)) for column in columns}
    pools = {column: filled(mlp, shape.layers * shape.experts) for column, mlp in mlps.items()}
    for tokens in TOKENS:
        sides = {column: Side(Step(shape, mlp, pools[column], tokens)) for column, mlp in mlps.items()}
        for side in sides.values():
            side.capture(rate, splits)
        keys = sorted((label, column) for column, side in sides.items() for label in side.graphs)
        times: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
        for _ in range(REPLAYS):
            for label, column in keys:
                times[label, column].append(replayed(sides[column].graphs[label]) * 1e3 / shape.layers)
        for (label, column), found in times.items():
            us = statistics.median(found)
            share = sides[column].floors[label] / us
            rows.append({"shape": name, "tokens": tokens, "format": column, "variant": label, "us": us, "share": share})
            print(f"{name:12} {tokens:3} {column:6} {label:24} {us:7.1f} us {share:.3f}", flush=True)
    return rows


def replayed(graph: Any) -> float:
    """Milliseconds of a graph."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def compile_some(name: str, columns: list[str], splits: list[int], which: str) -> None:
    """Compile every so many of the kernels of `compare`."""
    first, every = map(int, which.split("/"))
    shape, number = SHAPES[name], 0
    for column in columns:
        mlp = shape.build(format_of(column))
        pool = torch.zeros(1, mlp.record_bytes, dtype=torch.uint8, device=CUDA)
        for tokens in TOKENS:
            hidden = torch.zeros(tokens, mlp.hidden, dtype=torch.bfloat16, device=CUDA)
            slots = torch.zeros(tokens, shape.top_k, dtype=torch.int32, device=CUDA)
            work = Workspace.allocate(mlp, tokens, shape.top_k, CUDA)
            for projection, cut in variants(mlp, tokens, shape.top_k, splits).values():
                number += 1
                if number % every != first:
                    continue
                try:
                    if projection == "up":
                        experts.launch_up(mlp, hidden, slots, pool, work, cut)
                    else:
                        experts.launch_down(mlp, slots, pool, work, cut)
                except triton.runtime.errors.OutOfResources:
                    continue
    torch.cuda.synchronize()


def format_of(column: str) -> Format:
    """The format of a column of the results, with scales as `filled` draws them: in range."""
    if column == "bf16":
        return PLAIN
    return next(f[0] for one in FORMATS.values() if (f := one.claim(PACKED[column]))).quickened()


def measure(name: str, column: str, rate: float, *, search: bool) -> list[dict[str, Any]]:
    """Time both projections of a shape in a format."""
    shape = SHAPES[name]
    format_ = format_of(column)
    mlp = shape.build(format_)
    pool, rows = filled(mlp, shape.layers * shape.experts), []
    equal = same_bits(shape, mlp, pool)
    for tokens in TOKENS:
        cuts = experts.tilings(mlp, tokens * shape.top_k)
        step = Step(shape, mlp, pool, tokens)
        for number, projection in enumerate(("up", "down")):
            launch = (step.up, step.down)[number]
            floor = step.distinct * weight_bytes(mlp)[number] / rate * 1e6
            tried = {}
            for cut in candidates(cuts[number], format_, search=search):
                try:
                    tried[cut] = microseconds(partial(launch, cut))
                except triton.runtime.errors.OutOfResources:
                    continue
            used, best = tried[cuts[number]], min(tried, key=tried.__getitem__)
            rows.append({
                "shape": name, "format": column, "projection": projection, "tokens": tokens, "experts": step.distinct / shape.layers,
                "us": used / shape.layers, "share": floor / used, "same_bits": equal, "cut": str(cuts[number]),
                "best_us": tried[best] / shape.layers, "best_share": floor / tried[best], "best_cut": str(best),
            })  # fmt: skip
            row = rows[-1]
            print(
                f"{name:12} {column:6} {projection:5} {tokens:3} {row['us']:7.1f} us {row['share']:.3f}  best {row['best_us']:7.1f} "
                f"{row['best_share']:.3f} {best if search else ''} {'' if equal else 'OTHER BITS'}",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "packed_kernels.json")
    parser.add_argument("--search", action="store_true", help="try other tilings")
    parser.add_argument("--formats", default="bf16,mxfp4,int4,fp8,nvfp4")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--splits", default="", help="chunks of K to compare, such as 2,4")
    parser.add_argument("--compile", default="", help="only compile, such as 3/12")
    options = parser.parse_args()
    splits, columns = [int(one) for one in options.splits.split(",") if one], options.formats.split(",")
    if options.compile:
        for name in options.shapes.split(","):
            compile_some(name, columns, splits, options.compile)
        return
    rate = read_rate()
    print(f"reads {rate / 1e12:.2f} TB/s")
    rows = []
    for name in options.shapes.split(","):
        if splits:
            rows += compare(name, columns, rate, splits)
            continue
        for column in columns:
            rows += measure(name, column, rate, search=options.search)
            torch.cuda.empty_cache()
    result = {"about": about("cuda")._asdict(), "seed": SEED, "read_bytes_per_second": rate, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
