"""Compiles the grouped kernels for GPUs that are not here, and prints what each program takes; run by `test_grouped.py`.

A process of its own, because others run Triton's interpreter.
"""

import json
import sys
from typing import Any

import triton
from triton.compiler import ASTSource

from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import PLAIN, plain
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.records import RecordLayout
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp
from expertflow.kernels.prompts import grouped
from registers import gpu

POINTERS = {"hidden": "*bf16", "inner": "*bf16", "pool": "*bf16", "order": "*i64", "tiles": "*i32", "parts": "*fp32",
            "edges": "*i32", "slots": "*i32"}  # fmt: skip
NUMBERS = {"begin": "i32", "end": "i32", "slot": "i32", "experts": "i32", "count": "i32"}
ROOM = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory of a program, by compute capability (CUDA C++ programming guide, table of technical specifications)."""


def gpt_oss(format_: Format, size: int = 2880) -> ExpertMlp:
    """The experts of gpt-oss-20b."""
    specs = []
    for name, outputs in (("gate_up_proj", 2 * size), ("down_proj", size)):
        specs.append(TensorSpec(name=name, shape=(size, outputs), dtype="bfloat16", format=format_, transposed=True))
        specs.append(plain(f"{name}_bias", (outputs,), "bfloat16"))
    return ExpertMlp.of(RecordLayout.of(specs), CLAMPED_SWIGLU, transposed=True, interleaved=True)


def compile_kernel(kernel: Any, given: dict[str, Any], arch: int) -> Any:
    """A kernel compiled for a compute capability."""
    names, options = kernel.arg_names, {name: given[name] for name in ("num_warps", "num_stages")}
    constants = {(names.index(name),): value for name, value in given.items() if name not in options}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in POINTERS}
    source = ASTSource(
        kernel, {name: (POINTERS | NUMBERS).get(name, "constexpr") for name in names}, constants, aligned
    )
    return triton.compile(source, target=gpu(arch), options=options)


def main() -> None:
    made = []
    for arch in map(int, sys.argv[1:]):
        for number, format_ in enumerate((MXFP4, PLAIN)):  # an up projection of the one, a down projection of the other
            mlp, tile = gpt_oss(format_), grouped.TILES[-1]
            launch = grouped.launches(mlp, tile, grouped.wider_tilings(mlp, tile, ROOM[arch]))[number]
            given = launch.arguments if number else {**launch.arguments, "top_k": 4}
            program = compile_kernel(grouped.KERNELS[number], given, arch)
            made.append((arch, program.metadata.shared, ROOM[arch], "wgmma" in program.asm["ptx"]))
        listing = {"tok": tile, "padded": 512, "block": 16, "num_warps": 4, "num_stages": 1}
        compile_kernel(grouped.LIST_KERNEL, listing, arch)
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
