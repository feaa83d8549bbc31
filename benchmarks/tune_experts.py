"""Tilings of the expert kernels at few tokens: each one's time and share of the read rate, alone and in a whole layer, and its bits.

The shape of gpt-oss-20b, every expert resident, a launch a layer in one CUDA graph, as in `packed_kernels.py`. `used` is the tiling in use,
`loop` one in which the compiler's pipeline requests the codes, others differ from `used` as their label says. Bits have to be those of
`used`, and those of `used` the decoded weights'. Kernels are compiled by processes of their own first.

Usage: python benchmarks/tune_experts.py [--formats mxfp4,fp8] [--deadline 60] [--out benchmarks/results/tune_experts_h200.json]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from kernels_h100 import CUDA, captured
from packed_kernels import SHAPES, Step, filled, format_of, read_rate, replayed, weight_bytes
from torch import Tensor

from expertflow.bench.about import about
from expertflow.formats.plain import PLAIN
from expertflow.kernels import experts
from expertflow.kernels.mlp import SHARED_PAIRS, ExpertMlp, Workspace
from expertflow.kernels.tiling import Tiling

SHAPE = SHAPES["gpt-oss-20b"]
TOKENS = (1, 4, 16, 64)
_FEW = 4
"""Tokens up to which `OTHERS` are tried; of more, `OF_MANY`."""
REPLAYS = 15
PROCESSES = 14
_SPLIT: dict[str, Any] = {"split": True, "ahead": 1}
_OTHER_BLOCKS = {"down": ({"block_n": 128, "registers": 128},), "up": ({"block_n": 32, "registers": 96},)}
OTHERS: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {
    "mxfp4": {"down": ({"ahead": 1},), "up": ({"registers": 96}, *_OTHER_BLOCKS["up"])},
    "fp8": {
        "down": ({"stages": 4}, {**_SPLIT, "registers": 80}),
        "up": ({"stages": 5},),
    },
    "nvfp4": {
        "down": ({"ahead": 2}, {"block_n": 128, "split": True, "ahead": 0, "registers": 128}),
        "up": ({"block_n": 32, "split": True, "ahead": 1, "registers": 80}, *_OTHER_BLOCKS["up"]),
    },
    "int4": {"down": ({"ahead": 1},), "up": ({"block_n": 32, "registers": 80}, *_OTHER_BLOCKS["up"])},
}  # fmt: skip
"""What is changed of the tiling in use, to be tried beside it, by format and projection."""
OF_MANY: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {
    "mxfp4": _OTHER_BLOCKS,
    "nvfp4": _OTHER_BLOCKS,
    "int4": _OTHER_BLOCKS,
}
"""Likewise for more tokens. Tilings with 128 registers keep 100 to 144 bytes a thread outside of them, those with 96 none."""


def cuts(name: str, projection: str, tokens: int) -> dict[str, Tiling]:
    """Tilings to compare by their labels, the one in use first."""
    mlp = SHAPE.build(format_of(name))
    pairs, outputs = tokens * SHAPE.top_k, 2 if projection == "up" else 1
    used = experts.tilings(mlp, pairs)[0 if projection == "up" else 1]
    if name == "bf16":
        return {"used": used}
    if tokens > _FEW:
        return {"used": used} | _changed(used, OF_MANY.get(name, {}).get(projection, ()))
    if name == "fp8":
        loop = replace(
            used,
            block_n=64 // outputs,
            split=pairs < 16 and outputs == 1,
            stages=4 if outputs > 1 else 3,
            registers=None,
            ahead=0,
        )
    else:
        block = 64 if pairs < 16 or outputs > 1 else 128
        loop = replace(used, block_n=block, split=True, registers=None if name == "nvfp4" else 128, ahead=0)
    fitting = [one for one in OTHERS[name][projection] if pairs <= SHARED_PAIRS or not (one.get("split") or used.split)]
    return {"used": used, "loop": loop} | _changed(used, fitting)


def _changed(used: Tiling, others: Sequence[dict[str, Any]]) -> dict[str, Tiling]:
    """Tilings that differ from the one in use, by what differs."""
    return {" ".join(f"{what} {value}" for what, value in one.items()): replace(used, **one) for one in others}


def launched(mlp: ExpertMlp, tokens: int, projection: str, cut: Tiling) -> None:
    """Launch a kernel whose programs end at once."""
    pool = torch.zeros(1, mlp.record_bytes, dtype=torch.uint8, device=CUDA)
    hidden = torch.zeros(tokens, mlp.hidden, dtype=torch.bfloat16, device=CUDA)
    slots = torch.full((tokens, SHAPE.top_k), -1, dtype=torch.int32, device=CUDA)
    work = Workspace.allocate(mlp, tokens, SHAPE.top_k, CUDA)
    if projection == "up":
        experts.launch_up(mlp, hidden, slots, pool, work, cut)
    else:
        experts.launch_down(mlp, slots, pool, work, cut)


def compile_some(names: list[str], which: str) -> None:
    """Compile every so many of the kernels."""
    first, every = map(int, which.split("/"))
    tasks = [
        (f"{name} {projection} {tokens} {label}", SHAPE.build(format_of(name)), tokens, projection, cut)
        for name in names
        for tokens in TOKENS
        for projection in ("down", "up")
        for label, cut in cuts(name, projection, tokens).items()
    ]
    for label, mlp, tokens, projection, cut in tasks[first::every]:
        begin = time.perf_counter()
        try:
            launched(mlp, tokens, projection, cut)
        except Exception as error:  # noqa: BLE001 - a tiling that does not compile is a result
            print(f"{label}: {type(error).__name__} {str(error)[:120]}", flush=True)
        if (spent := time.perf_counter() - begin) > 10:
            print(f"{label}: {spent:.0f} s to compile", flush=True)
    torch.cuda.synchronize()


def bits_of(mlp: ExpertMlp, records: Tensor, tokens: int) -> Tensor:
    """What some pairs give with four records, cut as usual."""
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, mlp.hidden, device=CUDA, dtype=torch.bfloat16)
    slots = torch.stack([torch.arange(4, device=CUDA).roll(one) for one in range(tokens)]).to(torch.int32)
    work = Workspace.allocate(mlp, tokens, SHAPE.top_k, CUDA)
    work.parts.fill_(torch.nan)
    experts.expert_pairs(mlp, hidden, slots, records, work)
    return work.parts


def check_decoded(name: str, mlp: ExpertMlp, pool: Tensor) -> list[bool]:
    """For each number of tokens, whether records give what the same kernels give with the numbers they stand for."""
    plain = SHAPE.build(PLAIN)
    decoded = torch.zeros(4, plain.record_bytes, dtype=torch.uint8, device=CUDA)
    for ours, theirs in zip(pool[:4], decoded, strict=True):
        for tensor, value in mlp.layout.weights(ours).items():
            plain.layout.tensor(theirs, tensor).copy_(value)
    same = []
    for tokens in TOKENS:
        found, expected = bits_of(mlp, pool[:4], tokens), bits_of(plain, decoded, tokens)
        same.append(torch.equal(found, expected) and bool(found.isfinite().all()))
    print(f"{name}: bits of decoded weights at {TOKENS} tokens: {same}", flush=True)
    return same


@dataclass
class Row:
    """A tiling's captured work, and what came of it."""

    projection: str
    label: str
    cut: Tiling
    alone: Any
    layer: Any
    same: bool
    times: list[tuple[float, float]] = field(default_factory=list)


def capture(step: Step, name: str) -> Iterator[Row]:
    """Every tiling's work for some tokens: a projection alone, and layers in which the other one is cut as usual."""
    used_up, used_down = experts.tilings(step.mlp, step.tokens * SHAPE.top_k)
    step.up(used_up)
    inner = step.work.inner.clone()
    for projection in ("down", "up"):
        expected: Tensor | None = None
        target = step.work.inner if projection == "up" else step.work.parts
        for label, cut in cuts(name, projection, step.tokens).items():
            run: Callable[[], None]
            if projection == "up":
                run, whole = partial(step.up, cut), partial(step.layer, cut, used_down)
            else:
                step.work.inner.copy_(inner)
                run, whole = partial(step.down, cut), partial(step.layer, used_up, cut)
            try:
                target.fill_(torch.nan)
                run()
                torch.cuda.synchronize()
                found = target.clone()
                expected = found if expected is None else expected
                same = torch.equal(found, expected) and bool(found.isfinite().all())
                yield Row(projection, label, cut, captured(run), captured(whole), same)
            except Exception as error:  # noqa: BLE001 - a tiling that does not run is a result
                print(
                    f"{name} {projection} {step.tokens} {label}: {type(error).__name__} {str(error)[:120]}", flush=True
                )


def measure(name: str, rate: float) -> Iterator[dict[str, Any]]:
    """Rows of a format."""
    mlp = SHAPE.build(format_of(name))
    pool = filled(mlp, SHAPE.layers * SHAPE.experts)
    decoded = [True] * len(TOKENS) if name == "bf16" else check_decoded(name, mlp, pool)
    sizes = dict(zip(("up", "down"), weight_bytes(mlp), strict=True))
    for tokens, as_decoded in zip(TOKENS, decoded, strict=True):
        step = Step(SHAPE, mlp, pool, tokens)
        rows = list(capture(step, name))
        for _ in range(REPLAYS):
            for row in rows:
                row.times.append(tuple(replayed(graph) * 1e3 / SHAPE.layers for graph in (row.alone, row.layer)))
        for row in rows:
            us, layer_us = (median(one) for one in zip(*row.times, strict=True))
            share = step.distinct * sizes[row.projection] / rate * 1e6 / SHAPE.layers / us
            print(
                f"{name:6} {row.projection:4} {tokens} {us:6.2f} us {share:.3f}  layer {layer_us:6.2f} us  {row.label}"
                f"{'' if row.same else ' OTHER BITS'}",
                flush=True,
            )
            yield {
                "format": name, "tokens": tokens, "projection": row.projection, "label": row.label, "cut": str(row.cut), "us": us,
                "share": share, "layer_us": layer_us, "same_bits": row.same, "bits_of_decoded": as_decoded,
            }  # fmt: skip


def main() -> None:
    """Compile, measure, and write the result after each row."""
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "tune_experts.json")
    parser.add_argument("--formats", default="mxfp4,fp8,nvfp4,bf16,int4")
    parser.add_argument("--compile", default="", help="only compile, such as 3/12")
    parser.add_argument("--deadline", type=float, default=60, help="seconds after which no other format is begun")
    options = parser.parse_args()
    names = options.formats.split(",")
    if options.compile:
        compile_some(names, options.compile)
        return
    command = [sys.executable, __file__, "--formats", options.formats, "--compile"]
    children = [subprocess.Popen([*command, f"{one}/{PROCESSES}"]) for one in range(PROCESSES)]
    for child in children:
        child.wait()
    rate = read_rate()
    print(f"compiled in {time.perf_counter() - begin:.0f} s; reads {rate / 1e12:.2f} TB/s", flush=True)
    result: dict[str, Any] = {"about": about("cuda")._asdict(), "read_bytes_per_second": rate, "rows": []}
    for name in names:
        if time.perf_counter() - begin > options.deadline:
            print(f"no time for {name}", flush=True)
            continue
        for row in measure(name, rate):
            result["rows"].append(row)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(f"{time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
