"""Compiles the expert kernels of a decode step for GPUs that are not here, and prints what each program takes; run by `test_compile.py`.

A process of its own, because other tests run Triton's interpreter. The arguments of a launch are taken down in place of the launch.
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import PLAIN, plain
from expertflow.formats.published.awq import AWQ
from expertflow.formats.published.fp8 import FP8
from expertflow.formats.published.gguf import GGUF
from expertflow.formats.published.int4 import INT4, PackedInt4
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.published.nvfp4 import NVFP4
from expertflow.formats.records import RecordLayout
from expertflow.kernels import experts
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.kernels.tiling import Tiling, tilings
from registers import gpu, overwritten

POINTERS = {"hidden": "*bf16", "inner": "*bf16", "pool": "*bf16", "slots": "*i32", "parts": "*fp32",
    "sums": "*fp32", "counts": "*i32", "pairs": "i32",
}  # fmt: skip
ALIGNED = ("hidden", "inner", "pool", "parts", "sums", "counts")
TOKENS, MANY, TOP_K = 4, 16, 4
ROOM = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Shared memory of a program, by compute capability (CUDA C++ programming guide, table of technical specifications)."""
FORMATS: dict[str, tuple[Format, bool]] = {
    "plain": (PLAIN, False),
    "plain of gpt-oss": (PLAIN, True),
    "mxfp4": (MXFP4.quickened(), True),
    "mxfp4 of any scale": (MXFP4, True),
    "int4": (INT4.quickened(), False),
    "int4 of any scale": (INT4, False),
    "int4 with zeros": (PackedInt4(zeros=True), False),
    "fp8": (FP8.quickened(), False),
    "fp8 of any scale": (FP8, False),
    "nvfp4": (NVFP4.quickened(), False),
    "nvfp4 of any scale": (NVFP4, False),
    "awq": (AWQ, False),
    "q4_k": (GGUF["Q4_K"], False),
    "q6_k": (GGUF["Q6_K"], False),
}
"""Formats, and whether in the shape of gpt-oss-20b, or of Qwen3-30B-A3B."""
CASES = {
    80: ("plain up", "plain of gpt-oss up", "mxfp4 up", "int4 up", "int4 with zeros up", "fp8 up", "nvfp4 up", "nvfp4 of any scale up"),
    86: ("mxfp4 down", "fp8 down", "nvfp4 up", "awq down", "q4_k down"),
    89: ("fp8 up", "nvfp4 down", "q6_k up"),
    90: (
        "plain up", "plain of gpt-oss up", "mxfp4 up", "mxfp4 down", "int4 up", "int4 down", "int4 with zeros up", "fp8 up",
        "nvfp4 up", "awq down", "q4_k up", "mxfp4 up alone", "mxfp4 down alone", "int4 down alone", "fp8 down alone", "int4 up alone", "int4 with zeros up alone", "fp8 up alone",
        "nvfp4 down alone", "int4 down many", "fp8 down many", "fp8 of any scale down many", "nvfp4 of any scale down alone",
        "mxfp4 of any scale down alone", "int4 of any scale up",
    ),
}  # fmt: skip
"""What is compiled, for four tokens, for one `alone`, or for `many`: every format where it differs most, for Ampere and for Hopper; what needs most of the small ones' memory."""


def mlp_of(format_: Format, *, gpt_oss: bool) -> ExpertMlp:
    """The experts of a model."""
    hidden, width = (2880, 2880) if gpt_oss else (2048, 768)
    specs = []
    for name, shape in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
        joined = 2 if name == "gate_up_proj" and format_ is not PLAIN and not gpt_oss else 1
        shape_ = shape[::-1] if gpt_oss else shape
        specs.append(
            TensorSpec(name=name, shape=shape_, dtype="bfloat16", format=format_, transposed=gpt_oss, joined=joined)
        )
        if gpt_oss:
            specs.append(plain(f"{name}_bias", shape[:1], "bfloat16"))
    activation = CLAMPED_SWIGLU if gpt_oss else "silu"
    return ExpertMlp.of(RecordLayout.of(specs), activation, transposed=gpt_oss, interleaved=gpt_oss)


class Taken:
    """Stands in for a kernel, and keeps the named arguments of its launch."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        del grid
        return lambda *_, **names: self.names.update(names)


def launched(mlp: ExpertMlp, projection: str, cut: Tiling, tokens: int = TOKENS) -> tuple[Any, dict[str, Any]]:
    """A kernel, and the named arguments of its launch."""
    name = f"_{projection}_kernel"
    kernel, taken = getattr(experts, name), Taken()
    slots = torch.zeros(tokens, TOP_K, dtype=torch.int32)
    hidden = torch.zeros(tokens, mlp.hidden, dtype=mlp.torch_dtype)
    pool = torch.zeros(1, mlp.record_bytes, dtype=torch.uint8)
    work = Workspace.allocate(mlp, tokens, TOP_K, hidden.device)
    setattr(experts, name, taken)
    try:
        if projection == "up":
            experts.launch_up(mlp, hidden, slots, pool, work, cut)
        else:
            experts.launch_down(mlp, slots, pool, work, cut)
    finally:
        setattr(experts, name, kernel)
    return kernel, taken.names


def compiled(case: str, arch: int) -> Any:
    """The kernel of a case for a compute capability."""
    tokens = 1 if case.endswith(" alone") else MANY if case.endswith(" many") else TOKENS
    name, _, projection = case.removesuffix(" alone").removesuffix(" many").rpartition(" ")
    format_, gpt_oss = FORMATS[name]
    mlp = mlp_of(format_, gpt_oss=gpt_oss)
    cut = dict(zip(("up", "down"), tilings(mlp, tokens * TOP_K, ROOM[arch], early=arch >= 90), strict=True))[projection]
    kernel, given = launched(mlp, projection, cut, tokens)
    given["early"] = arch >= 90
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {one: POINTERS.get(one, "constexpr") for one in names},
        {(place,): given[one] for place, one in enumerate(names) if one not in POINTERS},
        {(place,): [["tt.divisibility", 16]] for place, one in enumerate(names) if one in ALIGNED},
    )
    options = {one: given[one] for one in ("num_warps", "num_stages", "maxnreg")}
    return triton.compile(source, target=gpu(arch), options=options)


def loops(ptx: str) -> list[list[str]]:
    """The lines of each loop that has tensor-core products."""
    lines, labels, found = ptx.splitlines(), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\d+_\d+):", line):
            labels[label[1]] = number
        elif (jump := re.search(r"\sbra(?:\.uni)?\s+(\$L__BB\d+_\d+);", line)) and jump[1] in labels:
            found.append(lines[labels[jump[1]] : number])
    return [loop for loop in found if any("mma" in line for line in loop)]


def steps(ptx: str) -> list[list[str]]:
    """The lines of each loop that has tensor-core products; where steps are written out, those from the first product to the last one."""
    lines = ptx.splitlines()
    products = [number for number, line in enumerate(lines) if "mma" in line]
    return loops(ptx) or [lines[products[0] : products[-1]]]


def stored_bytes(line: str) -> int:
    """Bytes that an instruction of a thread writes to shared memory."""
    if "stmatrix" in line:
        return 16
    found = re.search(r"st\.shared(?:\.v(\d))?\.\w(\d+)", line)
    return int(found[1] or 1) * int(found[2]) // 8 if found else 0


def requested(ptx: str) -> int:
    """Loads of 16 bytes a thread before the kernel waits for the one before it, if it does."""
    begin, _, _ = ptx.partition("mma")  # programs that have nothing to do wait elsewhere
    before, _, _ = begin.rpartition("griddepcontrol.wait")
    return before.count("ld.global.v4")


def main() -> None:
    made = []
    for arch, cases in CASES.items():
        for case in cases:
            program = compiled(case, arch)
            ptx = program.asm["ptx"]
            stored = max(sum(map(stored_bytes, lines)) for lines in steps(ptx))
            orders = sorted(set(re.findall(r"parent = #mma, kWidth = (\d)", program.asm["ttgir"])))
            writes, decoded = overwritten(program.asm["cubin"]) if arch >= 90 else (0, 0)
            made.append(
                (
                    arch,
                    case,
                    program.metadata.shared,
                    ROOM[arch],
                    "wgmma" in ptx,
                    stored,
                    orders,
                    requested(ptx),
                    writes,
                    decoded,
                )
            )
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main()
