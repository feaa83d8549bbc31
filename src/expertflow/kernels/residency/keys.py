"""Ranks as pairs of integers, in which the tables' kernels look for the smallest. Must not know what a rank means."""

import triton
import triton.language as tl

_LAST = tl.constexpr(0x7FFFFFFF)
"""Larger than any half of a rank's key, and any index."""


@triton.jit
def key_of(rank):
    """Two int32 that order float64 as they are; the second decides where the first are equal.

    A GPU finds the least int32 of a warp in one instruction, and the least float64 in five rounds.
    """
    bits = (rank + 0.0).to(tl.int64, bitcast=True)  # both zeros are one
    bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return (bits >> 32).to(tl.int32), (bits ^ 0x80000000).to(tl.int32)


@triton.jit
def rank_of(upper, lower):
    """The float64 of a key."""
    bits = (upper.to(tl.int64) << 32) | ((lower.to(tl.int64) & 0xFFFFFFFF) ^ 0x80000000)
    bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def smallest(uppers, lowers, index):
    """The smallest key, and the lowest index that has it."""
    upper = tl.min(uppers, 0)
    lower = tl.min(tl.where(uppers == upper, lowers, _LAST), 0)
    return upper, lower, tl.min(tl.where((uppers == upper) & (lowers == lower), index, _LAST), 0)
