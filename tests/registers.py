"""Registers of a compiled kernel: what does not fit into them, and those that Hopper's tensor cores still read.

The one is what the assembler says, the other is read off the machine code. A product takes its weights from registers and goes on by itself; a program waits for all but so many groups of products. What writes
such a register earlier makes a sum wrong, if the product is late. Triton 3.6 and 3.7 compile such loops
(github.com/triton-lang/triton/issues/9433).
"""

import io
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

_WRITES_NONE = (
    "ST", "HGMMA", "BRA", "BAR", "LDGSTS", "LDGDEP", "RED", "MEMBAR", "ISETP", "FSETP", "PLOP", "DEPBAR", "WARPGROUP", "R2UR", "UI",
    "US", "UL", "UM",
)  # fmt: skip
"""Beginnings of instructions that write no register of a thread."""


_PRODUCT = re.compile(r"HGMMA\S*\s+R\d+,\s*R(\d+)(?:\.reuse)?,\s*gdesc")
"""A product whose weights are in registers, from this one on."""


class _Absent:
    """Stands in for a GPU that is not here, of which kernels ask the compute capability while they are compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


def gpu(arch: int) -> GPUTarget:
    """A GPU of a compute capability, for which kernels are compiled from now on."""
    target = GPUTarget("cuda", arch, 32)
    driver.set_active(_Absent(target))
    return target


def compiled(source: ASTSource, arch: int, options: dict[str, Any]) -> tuple[Any, str]:
    """A program for a compute capability, and what the assembler says of it; that is empty if Triton's cache had it already."""
    knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(io.StringIO()) as said:
        program = triton.compile(source, target=gpu(arch), options=options)
    return program, said.getvalue()


def spilled(said: str) -> int:
    """Bytes a thread keeps outside of its registers, by what the assembler says of a program."""
    found = re.search(r"(\d+) bytes spill stores", said)
    assert found is not None, said
    return int(found[1])


def overwritten(cubin: bytes) -> tuple[int, int]:
    """Count writes of registers that a product under way may still read, in order and in a loop's next turn; and such products."""
    code = list(_instructions(cubin))
    writes = sum(count_writes(lines) for lines in [code, *(loop * 2 for loop in _loops(code))])
    return writes, sum(bool(_PRODUCT.match(line)) for line in code)


def _instructions(cubin: bytes) -> Iterator[str]:
    """Labels and instructions, in order."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            yield label[1]
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?(.*?)\s*;", line):
            yield instruction[1]


def _loops(code: Sequence[str]) -> list[list[str]]:
    """Bodies of loops with products."""
    labels, found = {line: number for number, line in enumerate(code) if line.startswith(".L_x_")}, []
    for number, line in enumerate(code):
        jump = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], number) < number:
            found.append(list(code[labels[jump[1]] : number]))
    return [lines for lines in found if any(line.startswith("HGMMA") for line in lines)]


def count_writes(lines: Sequence[str]) -> int:
    """How many instructions write a register that a product before them may still read."""
    groups: list[set[int]] = []
    group, count = set[int](), 0
    for line in lines:
        if line.startswith("HGMMA"):
            if weights := _PRODUCT.match(line):
                group |= set(range(int(weights[1]), int(weights[1]) + 4))
            if "gsb0" in line:
                groups, group = [*groups, group], set()
        elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)", line):
            groups = groups[max(0, len(groups) - int(wait[1], 16)) :]
        else:
            count += sum(bool(_written(line) & one) for one in [*groups, group])
    return count


def _written(line: str) -> set[int]:
    """Registers that an instruction writes."""
    target = re.match(r"(\S+)\s+(?:U?P\d+,\s*)?R(\d+)\b", line)
    if target is None or target[1].startswith(_WRITES_NONE):
        return set()
    wide = 4 if ".128" in target[1] else 2 if ".64" in target[1] or "WIDE" in target[1] else 1
    return set(range(int(target[2]), int(target[2]) + wide))
