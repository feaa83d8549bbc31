"""Compiles the attention of prompts for GPUs that are not here, and prints what each program takes; run by `test_prompt_attention.py`.

A process of its own, because others run Triton's interpreter.
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from expertflow.kernels.prompts import attention
from registers import gpu

ROOM = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory of a program, by compute capability (CUDA C++ programming guide, table of technical specifications)."""
CASES = {
    "gpt-oss, window": (64, 64, 8, {"window": 128, "sink": True, "joined": True}),
    "deepseek": (192, 128, 1, {}),
}
FLOATS, WHOLE = ("query", "keys", "values", "sinks", "out"), ("rows", "lasts", "pieces")
ALIGNED = {
    "table_stride",
    "query_batch",
    "query_head",
    "query_token",
    "key_row",
    "key_head",
    "key_column",
    "value_row",
    "value_head",
    "value_column",
}
OPTIONS = {"page": 64, "window": 0, "sink": False, "joined": False, "cap": 0.0, "scale": 0.125}


def compile_case(case: str, dtype: torch.dtype, arch: int, stages: int | None = None) -> Any:
    """The kernel of a case, compiled for a compute capability."""
    width, value_width, groups, more = CASES[case]
    cut, parts = attention.tiling(width, value_width, dtype, paged=True), attention.parts(width, value_width)
    given = {
        **OPTIONS, **more, **parts, "heads": 8 * groups, "groups": groups, "block_m": cut.block_m, "block_n": cut.block_n,
    }  # fmt: skip
    kernel = attention.attend
    names = kernel.arg_names
    number = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    kinds = (
        dict.fromkeys(FLOATS, number)
        | dict.fromkeys(WHOLE, "*i64")
        | {"table": "*i32"}
        | dict.fromkeys(given, "constexpr")
    )
    constants = {(names.index(name),): value for name, value in given.items()}
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in {*FLOATS, *WHOLE, *ALIGNED}
    }
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in names}, constants, aligned)
    options = {"num_warps": cut.warps, "num_stages": cut.stages if stages is None else stages}
    return triton.compile(source, target=gpu(arch), options=options)


def main() -> None:
    """Print architecture, case, shared memory, room, and whether Hopper's own products are used."""
    made = []
    for arch in map(int, sys.argv[1:]):
        for case in CASES:
            stages = None
            program = compile_case(case, torch.bfloat16, arch)
            while program.metadata.shared > ROOM[arch] and stages != 1:  # as a launch does
                stages = (stages or program.metadata.num_stages) - 1
                program = compile_case(case, torch.bfloat16, arch, stages)
            made.append((arch, case, program.metadata.shared, ROOM[arch], "wgmma" in program.asm["ptx"]))
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
