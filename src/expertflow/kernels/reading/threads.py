"""Tiles that are made in the registers of the threads that multiply them: which thread has which outputs, and what it reads.

Must not know formats.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

from expertflow.kernels.reading.tiles import INTERPRETED


@triton.jit
def in_record(outs, n: tl.constexpr, joined: tl.constexpr, interleaved: tl.constexpr):
    """Where outputs are in a record, in which joined tensors lie one after another, if those alternate in the module."""
    return outs % joined * (n // joined) + outs // joined if interleaved else outs


@triton.constexpr_function
def warps_of(rows, warps):
    """Warps among which the rows of a tile are divided, sixteen each."""
    return min(warps, rows // 16)


@triton.constexpr_function
def number_type(dtype):
    """A number type as torch names it."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(str(dtype), str(dtype))


@triton.jit
def by_threads(outs):
    """Outputs `[R]` in the order in which `_unfold` takes their rows."""
    rows: tl.constexpr = outs.shape[0]
    warps: tl.constexpr = 1 if INTERPRETED else warps_of(rows, num_warps())
    return tl.reshape(tl.permute(tl.reshape(outs, [rows // (16 * warps), warps, 2, 8]), (0, 2, 1, 3)), [rows])


@triton.jit
def load_four(pointers, inside, exact: tl.constexpr):
    """Four bytes each, `[R]`; 0 outside."""
    return tl.load(pointers) if exact else tl.load(pointers, mask=inside, other=0)


@triton.jit
def both_halves(pairs):
    """The upper halves of int32 numbers, each twice in 32 bits, and the lower halves likewise."""
    upper, lower = pairs & -65536, pairs & 0xFFFF
    return upper | ((upper >> 16) & 0xFFFF), lower | (lower << 16)
