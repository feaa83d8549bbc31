"""The attention of a pass over a prompt: our kernel at the shapes of gpt-oss-20b, Qwen3-30B-A3B and DeepSeek-V2-Lite, beside torch's own.

One layer, one prompt, random numbers in KV rows longer than it. torch's `scaled_dot_product_attention` has neither sinks nor windows, so
it is measured without sinks, and not where there is a window. Each time is the median of several. A piece of 512 tokens behind the others
has to have the bits that it has in the whole pass. With `--search SHAPE` only that shape is measured, of 8,192 tokens, and other
tilings are tried.

Usage: python benchmarks/prompt_attention.py --out FILE [--search SHAPE] [--tiny]
       --tiny: a few tokens, for a CPU and Triton's interpreter
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel is imported
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from expertflow.bench.about import about
from expertflow.kernels.prompts.attention import Tiling, prompt_attention, tiling

TOKENS, TINY_TOKENS = (512, 2048, 8192, 32768), (40,)
REPEATS, PIECE, SEED, SEARCHED = 7, 512, 0, 8192
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Shape(NamedTuple):
    """Query heads, key heads, widths of keys and values, window or None, and whether there are sinks."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    window: int | None = None
    sinks: bool = False


SHAPES = {
    "gpt-oss, window 128": Shape(64, 8, 64, 64, 128, sinks=True),
    "gpt-oss, full": Shape(64, 8, 64, 64, sinks=True),
    "Qwen3-MoE": Shape(32, 4, 128, 128),
    "DeepSeek-V2-Lite": Shape(16, 16, 192, 128),
}


class Case:
    """A shape's tensors for a prompt of some tokens."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        """Draw them."""
        torch.manual_seed(SEED)
        self.shape, self.tokens = shape, tokens
        draw = {"device": DEVICE, "dtype": torch.bfloat16}
        self.query = torch.randn(1, tokens, shape.heads, shape.width, **draw).transpose(1, 2)
        self.keys = torch.randn(2, shape.kv_heads, tokens + 65, shape.width, **draw)
        self.values = torch.randn(2, shape.kv_heads, tokens + 65, shape.value_width, **draw)
        self.sinks = torch.randn(shape.heads, **draw) if shape.sinks else None
        self.row = torch.ones(1, dtype=torch.long, device=DEVICE)
        self.last = torch.full((1,), tokens - 1, device=DEVICE)
        self.scale = shape.width**-0.5

    def kernel(self, cut: Tiling | None = None, piece: int | None = None) -> Tensor:
        """Ours, of the whole prompt or of the last tokens."""
        query = self.query if piece is None else self.query[:, :, -piece:]
        where, window = (self.row, self.last), self.shape.window
        return prompt_attention(query, self.keys, self.values, where, self.scale, window, sinks=self.sinks, cut=cut)

    def torch(self) -> Tensor:
        """torch's, without sinks."""
        keys, values = (kept[1:, :, : self.tokens] for kept in (self.keys, self.values))
        return functional.scaled_dot_product_attention(
            self.query,
            keys,
            values,
            is_causal=True,
            scale=self.scale,
            enable_gqa=self.shape.heads > self.shape.kv_heads,
        )

    @property
    def operations(self) -> int:
        """Floating-point operations of what is attended to, no more."""
        count, window = self.tokens, min(self.shape.window or self.tokens, self.tokens)
        pairs = window * (window + 1) // 2 + (count - window) * window
        return 2 * pairs * self.shape.heads * (self.shape.width + self.shape.value_width)


def seconds(work: Callable[[], Any], calls: int = 3) -> float:
    """The median time of a call on the device; so many are timed together."""
    if DEVICE == "cpu":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    for _ in range(2):
        work()
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls / 1e3)
    return statistics.median(times)


def search(case: Case) -> list[dict[str, Any]]:
    """Other tilings, the fastest first."""
    rows = []
    for cut in itertools.starmap(Tiling, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))):
        try:
            taken = seconds(lambda cut=cut: case.kernel(cut))
        except OutOfResources:
            continue
        rows.append({"cut": str(tuple(cut)), "tflops": case.operations / taken / 1e12})
    return sorted(rows, key=lambda row: -float(row["tflops"]))


def measure(name: str, tokens: int, *, tune: bool) -> dict[str, Any]:
    """One line of the table."""
    case = Case(SHAPES[name], tokens)
    shape, piece = case.shape, min(PIECE, tokens // 2)
    ours = seconds(case.kernel)
    try:
        theirs = None if shape.window else seconds(case.torch)
    except torch.OutOfMemoryError:  # it has kernels without scores in memory for some shapes only
        theirs = None
    same = torch.equal(case.kernel()[:, -piece:], case.kernel(piece=piece))
    far = None  # sinks and windows are none of torch's: near it where there are none
    if theirs is not None and not shape.sinks:
        far = float((case.kernel().float() - case.torch().transpose(1, 2).float()).abs().max())
    return {
        "shape": name, "tokens": tokens, "us": ours * 1e6, "tflops": case.operations / ours / 1e12,
        "torch_us": None if theirs is None else theirs * 1e6,
        "torch_tflops": None if theirs is None else case.operations / theirs / 1e12,
        "same_bits_in_pieces": same, "farthest_from_torch": far, "cut": str(tuple(tiling(shape.width, shape.value_width, torch.bfloat16))),
        "tried": search(case)[:8] if tune else [],
    }  # fmt: skip


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--search", choices=SHAPES)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    counts = TINY_TOKENS if given.tiny else (SEARCHED,) if given.search else TOKENS
    rows = []
    for name in (given.search,) if given.search else SHAPES:
        for tokens in counts:
            rows.append(measure(name, tokens, tune=given.search is not None))
            for tried in rows[-1]["tried"]:
                print(f"  {name}: {tried['cut']} {tried['tflops']:.0f} TFLOP/s", flush=True)
    config = {"dtype": "bfloat16", "repeats": REPEATS, "tiny": given.tiny, "piece": PIECE}
    result = {**about(DEVICE)._asdict(), "benchmark": "prompt_attention", "rows": rows, "seed": SEED, "config": config}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        beside = "" if row["torch_us"] is None else f", torch {row['torch_us']:9.0f} us {row['torch_tflops']:4.0f}"
        bits = "bits kept" if row["same_bits_in_pieces"] else "BITS DIFFER in pieces"
        print(
            f"{row['shape']:20} {row['tokens']:6} tokens {row['us']:9.0f} us {row['tflops']:4.0f} TFLOP/s{beside}, {bits}"
        )


if __name__ == "__main__":
    main()
