"""The few instructions of PTX that decode packed weights, on arrays: so that the text that a GPU assembles is tried without one."""

import re

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def halves(words: Words) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The bfloat16 numbers in the lower and upper halves of words."""
    lower, upper = words << np.uint32(16), words & np.uint32(0xFFFF0000)
    return tuple(half.view(np.float32).astype(np.float64) for half in (lower, upper))  # type: ignore[return-value]


def bfloat16_bits(numbers: npt.NDArray[np.float64]) -> Words:
    """The bits of the nearest bfloat16 numbers, half to even, subnormal ones too."""
    _, exponent = np.frexp(numbers)
    step = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    return (np.rint(numbers / step) * step).astype(np.float32).view(np.uint32) >> np.uint32(16)


def _fma(a: Words, b: Words, c: Words) -> Words:
    made = [bfloat16_bits(x * y + z) for x, y, z in zip(*map(halves, (a, b, c)), strict=True)]
    return made[0] | made[1] << np.uint32(16)


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    both = [(word >> np.uint32(8 * byte)) & np.uint32(0xFF) for word in (a, b) for byte in range(4)]
    found = np.zeros_like(a)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = np.choose(chosen & np.uint32(7), np.broadcast_arrays(*both))
        sign = np.where(byte >> np.uint32(7), 0xFF, 0).astype(np.uint32)
        found = found | np.where(chosen >> np.uint32(3), sign, byte) << np.uint32(8 * place)
    return found


def _turned(a: Words, b: Words, count: Words) -> Words:
    assert np.array_equal(a, b)
    return a << count | a >> (np.uint32(32) - count)


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "add.u32": lambda a, b: a + b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "shl.b32": lambda a, count: a << count,
    "shr.b32": lambda a, count: a >> count,
    "shf.l.wrap.b32": _turned,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _fma,
    "lop3.b32": lambda a, b, c, _: a & b | c,  # the one table that is used
}


def run(program: str, outputs: int, *inputs: npt.NDArray[np.integer] | int) -> list[Words]:
    """What a program leaves in its first operands, given the others: arrays that are broadcast together."""
    named = np.broadcast_arrays(*(np.asarray(one).astype(np.int64).astype(np.uint32) for one in inputs))
    known = {f"${outputs + place}": one for place, one in enumerate(named)}
    for line in re.split(r"[;\n]+", program.strip("{}\n")):
        if not line or line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        target, *operands = (one.strip() for one in rest.split(","))
        assert name != "lop3.b32" or operands[-1] == "0xEA"
        known[target] = INSTRUCTIONS[name](
            *(known[one] if one in known else np.full_like(named[0], int(one, 0)) for one in operands)
        )
    return [known[f"${place}"] for place in range(outputs)]
