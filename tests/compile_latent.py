"""Compiles the kernels of latent attention for GPUs that are not here, and prints what each program takes; run by `test_latent.py`.

A process of its own, because others run Triton's interpreter. With `all` every kernel is compiled for every GPU.
"""

import itertools
import json
import sys
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from compile_attention import ROOM
from expertflow.kernels.latent import decode, prompts
from expertflow.kernels.latent.reference import spans_of
from registers import gpu

HEADS = {"DeepSeek-V2-Lite": 16, "DeepSeek-V3": 128}
PLAIN, ROPE, WIDTH, RANK, PAGE = 128, 64, 128, 512, 64
PLACES = {"rows", "positions", "lasts", "begins"}
INTEGERS = {
    "count",
    "splits",
    "total",
    "query_row",
    "query_head",
    "left_row",
    "left_head",
    "latent_page",
    "rope_page",
    "table_stride",
}
SUMS = {"sums"}


def compiled(kernel: Any, given: dict[str, Any], dtype: torch.dtype, arch: int, warps: int, stages: int) -> Any:
    """A kernel for a compute capability, as its first launch compiles it."""
    if "early" in kernel.arg_names:
        given = {**given, "early": arch >= 90}
    names, number = kernel.arg_names, {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]

    def kind(name: str) -> str:
        if name in given:
            return "constexpr"
        if name in PLACES:
            return "*i64"
        if name in INTEGERS:
            return "i32"
        return "*i32" if name == "table" else "*fp32" if name in SUMS else number

    aligned = [name for name in names if name not in {*given, *PLACES, "count", "splits", "total"}]
    source = ASTSource(
        kernel, {name: kind(name) for name in names}, {(names.index(name),): value for name, value in given.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=gpu(arch), options=options)


def cases(heads: int, dtype: torch.dtype, arch: int) -> dict[str, tuple[Any, dict[str, Any], int, int]]:
    """Each kernel, its constants, warps and stages."""
    cut = decode.tiling(heads, dtype, hopper=arch >= 90, large=ROOM[arch] > 150 << 10)
    least, most = spans_of(heads)
    spread = {"heads": heads, "rank": RANK, "least": least, "spans": most}
    more = {"rope": ROPE, "rope_padded": ROPE, "page": PAGE}
    tiles = prompts.tiles(torch.empty(0, dtype=dtype), PLAIN + WIDTH, RANK)
    cuts = {
        "block_h": cut.block_h,
        "block_n": cut.block_n,
        "plain": PLAIN,
        "padded": RANK,
        "scale": 0.1,
    }
    expanded = {
        "plain": PLAIN,
        "width": WIDTH,
        "rank": RANK,
        "block_m": tiles.columns,
        "block_f": tiles.features,
        "depth": tiles.depth,
    }
    made = {"heads": heads, "features": PLAIN + WIDTH, "rank": RANK, "chunk": 128}
    asked = {
        "first": 0,
        "depth": PLAIN,
        "width": RANK,
        "across": RANK,
        "along": 1,
        "block": decode.block_of(heads, RANK),
    }
    values = {
        "first": PLAIN,
        "depth": RANK,
        "width": WIDTH,
        "across": 1,
        "along": RANK,
        "block": decode.block_of(heads, WIDTH),
    }
    return {
        "multiply queries": (decode.multiply, {**made, **asked}, 4, 3),
        "attend": (decode.attend, {**spread, **more, **cuts}, cut.warps, cut.stages),
        "join": (decode.join, {**spread, "block": decode.block_of(heads, RANK)}, 4, 3),
        "multiply values": (decode.multiply, {**made, **values}, 4, 3),
        "expand": (prompts.expand, {**more, **expanded}, tiles.warps, tiles.stages),
    }  # fmt: skip


WANTED = [
    (86, "DeepSeek-V2-Lite", "attend"), (90, "DeepSeek-V2-Lite", "attend"), (90, "DeepSeek-V3", "attend"), (90, "DeepSeek-V3", "expand"),
]  # fmt: skip
"""What a test compiles. Before Hopper `attend` of DeepSeek-V3 is DeepSeek-V2-Lite's with more programs."""
EVERYTHING = list(itertools.product(ROOM, HEADS, ("multiply queries", "attend", "join", "multiply values", "expand")))


def main() -> None:
    """Print architecture, case, shared memory, room, and whether Hopper's own products are used."""
    made = []
    for arch, name, kernel in EVERYTHING if "all" in sys.argv else WANTED:
        function, given, warps, stages = cases(HEADS[name], torch.bfloat16, arch)[kernel]
        program = compiled(function, given, torch.bfloat16, arch, warps, stages)
        hopper = "wgmma" in program.asm["ptx"]
        made.append((arch, f"{name} {kernel}", program.metadata.shared, ROOM[arch], hopper))
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
