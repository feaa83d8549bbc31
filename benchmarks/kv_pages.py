"""Keys and values in pages beside rows: attention of steps and of prompts, copies to the host and back, pages that change hands.

Random numbers; pages lie in a drawn order. Bits in pages have to be those in rows. Each time is the median of several, in a loop behind
a warm-up. Attention is of one layer; copies are of all layers of the shape.

Usage: python benchmarks/kv_pages.py --out FILE [--tiny]
       --tiny: a few tokens, for a CPU and Triton's interpreter
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
from prompt_attention import seconds
from torch import Tensor

from expertflow.bench.about import about
from expertflow.engine.planning.prefix import BUFFER_BYTES
from expertflow.execution.kv.copies import Move, PageCopies
from expertflow.execution.kv.layout import PAGE, Layout, pages_of
from expertflow.execution.kv.paged import PagedCache, Span
from expertflow.execution.kv.pages import Beginning
from expertflow.kernels.dense import decode_attention
from expertflow.kernels.prompts.attention import prompt_attention, tiling
from expertflow.memory.arena import HostArena
from expertflow.models.context import ForwardContext

STEPS = ((1, 1024), (8, 1024), (1, 8192), (8, 8192), (1, 32768), (8, 32768), (1, 131072))
PASSES = (512, 2048, 8192, 32768)
KEPT = 16384
REPEATS, SEED = 7, 0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Shape(NamedTuple):
    """Query heads, key heads, width, layers, window or None."""

    heads: int
    kv_heads: int
    width: int
    layers: int
    window: int | None = None


SHAPES = {
    "gpt-oss, window 128": Shape(64, 8, 64, 12, 128),
    "gpt-oss, full": Shape(64, 8, 64, 12),
    "Qwen3-MoE": Shape(32, 4, 128, 12),
}


class Drawn:
    """Keys and values of some sequences of one length, in rows and in pages."""

    def __init__(self, shape: Shape, sequences: int, tokens: int) -> None:
        """Draw them."""
        torch.manual_seed(SEED)
        count = pages_of(tokens, PAGE)
        size = 2, sequences, shape.kv_heads, count * PAGE, shape.width
        self.keys, self.values = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
        order = torch.randperm(sequences * count, device=DEVICE)
        self.table = order.view(sequences, count).int()
        self.paged = tuple(self._scatter(kept, order, count) for kept in (self.keys, self.values))
        self.where = torch.arange(sequences, device=DEVICE), torch.full((sequences,), tokens - 1, device=DEVICE)

    @staticmethod
    def _scatter(kept: Tensor, order: Tensor, count: int) -> Tensor:
        rows, heads, _, width = kept.shape
        found = torch.empty(rows * count, heads, PAGE, width, device=DEVICE, dtype=kept.dtype)
        found[order] = kept.view(rows, heads, count, PAGE, width).transpose(1, 2).flatten(0, 1)
        return found


def step(name: str, sequences: int, tokens: int) -> dict[str, Any]:
    """Attention of a decode step."""
    shape = SHAPES[name]
    drawn = Drawn(shape, sequences, tokens)
    query = torch.randn(sequences, shape.heads, shape.width, device=DEVICE, dtype=torch.bfloat16)

    def rows() -> Tensor:
        return decode_attention(query, drawn.keys, drawn.values, drawn.where, 0.1, shape.window)

    def pages() -> Tensor:
        return decode_attention(query, *drawn.paged, drawn.where, 0.1, shape.window, table=drawn.table)

    seen = min(tokens, shape.window or tokens)
    nbytes = 4 * sequences * seen * shape.kv_heads * shape.width
    mine, theirs = seconds(pages), seconds(rows)
    return {
        "what": f"step of {sequences}", "shape": name, "tokens": tokens, "pages_us": mine * 1e6, "rows_us": theirs * 1e6,
        "gb_s": nbytes / mine / 1e9, "same_bits": torch.equal(rows(), pages()),
    }  # fmt: skip


def prompt(name: str, tokens: int) -> dict[str, Any]:
    """Attention of a pass over one prompt, with its tiling and with more blocks in flight."""
    shape = SHAPES[name]
    drawn = Drawn(shape, 1, tokens)
    query = torch.randn(1, tokens, shape.heads, shape.width, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    usual = tiling(shape.width, shape.width, torch.bfloat16, paged=True)

    def rows() -> Tensor:
        return prompt_attention(query, drawn.keys, drawn.values, drawn.where, 0.1, shape.window)

    def pages(stages: int = usual.stages) -> Tensor:
        cut = usual._replace(stages=stages)
        return prompt_attention(query, *drawn.paged, drawn.where, 0.1, shape.window, cut=cut, table=drawn.table)

    tried = {stages: seconds(lambda stages=stages: pages(stages), calls=3) * 1e6 for stages in (2, 3, 4, 5)}
    return {
        "what": "prompt", "shape": name, "tokens": tokens, "pages_us": seconds(pages, 3) * 1e6, "rows_us": seconds(rows, 3) * 1e6,
        "us_by_stages": tried, "same_bits": torch.equal(rows(), pages()),
    }  # fmt: skip


def moves(name: str, tokens: int) -> list[dict[str, Any]]:
    """Copies of a sequence to the host and back, a shared beginning, and what a page that changes hands costs a step."""
    shape = SHAPES[name]
    room = 2 * PAGE * pages_of(tokens, PAGE)
    layout = Layout.of([shape.window] * shape.layers, rows=2, length=tokens, tokens=room, chunk=512)
    cache = PagedCache(layout, ForwardContext(), DEVICE)
    states = torch.zeros(1, shape.kv_heads, 1, shape.width, device=DEVICE, dtype=torch.bfloat16)
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
    cache.open(0, tokens)
    cache.open(1, tokens)
    for row in (0, 1):
        with cache.passing([Span(row, tokens - 1, tokens)], np.array([[tokens - 1]])):
            pass
    book, kind = cache.books[0], 0
    size = 2 * cache.layers[0].keys[0].nbytes * shape.layers
    first = book.needed(tokens - 1) // PAGE
    places = range(first, pages_of(tokens, PAGE))
    arena = HostArena(len(places) * size, pin=DEVICE.type == "cuda")
    copies = PageCopies(cache.stacks, arena, DEVICE, max(BUFFER_BYTES, size))
    out, back = (
        [Move(kind, int(book.entries[row, place]), number * size) for number, place in enumerate(places)]
        for row in (0, 1)
    )

    def waited(copy: Callable[[list[Move]], None], given: list[Move]) -> Callable[[], None]:
        def run() -> None:
            copy(given)
            copies.before_writing(kind, [given[0].page])  # the main line waits for it

        return run

    found = [("copy to host", waited(copies.out, out)), ("copy from host", waited(copies.into, back))]
    rows = [
        {
            "what": what,
            "shape": name,
            "tokens": tokens,
            "us": (taken := seconds(work) * 1e6),
            "gb_s": len(places) * size / taken / 1e3,
        }
        for what, work in found
    ]

    def turn_over() -> None:
        """A row ends and another begins: tables, and pages that have to be cleared."""
        cache.open(1, tokens)
        with cache.passing([Span(1, tokens - 1, tokens)], np.array([[tokens - 1]])):
            pass

    rows.append({"what": "row begins anew", "shape": name, "tokens": tokens, "us": seconds(turn_over) * 1e6})
    rows.append(
        {"what": "beginning shared", "shape": name, "tokens": tokens, "us": seconds(lambda: share(cache, tokens)) * 1e6}
    )
    return rows


def share(cache: PagedCache, tokens: int) -> None:
    """Let row 1 begin as row 0 does, in all of its full pages."""
    cache.open(1, tokens, Beginning(0, tokens // PAGE))
    cache.synchronise()


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    rows = []
    with torch.inference_mode():
        for name in SHAPES:
            rows += [step(name, *case) for case in (((2, 300),) if given.tiny else STEPS)]
            rows += [prompt(name, tokens) for tokens in ((40,) if given.tiny else PASSES)]
            rows += moves(name, 200 if given.tiny else KEPT)
    config = {"dtype": "bfloat16", "page": PAGE, "repeats": REPEATS, "tiny": given.tiny}
    result = {**about(str(DEVICE))._asdict(), "benchmark": "kv_pages", "rows": rows, "seed": SEED, "config": config}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        line = f"{row['what']:18} {row['shape']:20} {row['tokens']:6} tokens"
        if "us" in row:
            print(f"{line} {row['us']:9.0f} us" + (f" {row['gb_s']:5.1f} GB/s" if "gb_s" in row else ""))
            continue
        bits = "bits kept" if row["same_bits"] else "BITS DIFFER"
        tried = " ".join(f"{stages}:{us:.0f}" for stages, us in row.get("us_by_stages", {}).items())
        print(f"{line} pages {row['pages_us']:9.0f} us, rows {row['rows_us']:9.0f} us, {bits} {tried}")


if __name__ == "__main__":
    main()
