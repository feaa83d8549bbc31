"""Factors as two bfloat16 numbers each, with which products come out as float32 arithmetic rounds them.

A kernel wants `bfloat16(t * factor)`, computed in float32. For two numbers at a time that takes two conversions, two products and a
third conversion. With a pair it takes two fused multiply-adds of bfloat16: `rn(t * high + rn(t * low))`, where `high` is the factor
cut off and `low` is what that leaves. Codes have few significands, so whether the result is right can be tried for all of them, and
where it is not, a neighbour of `low` gives it. Tried for all 2 ** 23 mantissas of a factor: for numbers of E4M3 codes there is always
such a pair; for their products with E2M1 codes there is none for 68 of them, and for 155 where scales are divided.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MISSING = -1
"""In place of a pair where there is none: as two numbers, NaN."""
OCTAVES = np.arange(8, 16) / 8
"""The significands of E4M3 numbers."""
_LEAST, _MOST = 2.0**-90, 2.0**7
"""Sizes between which nothing underflows or overflows, with codes as they lie in bits: `SHIFT` less in the exponent."""
SHIFT = 120
"""The exponent that a pair has more than its factor: E4M3 codes, shifted to where bfloat16 has them, have it less."""
_CUT = 45
"""Bits of a float64 below the last one of bfloat16."""
_NEIGHBOURS = np.array([-1, 1, -2, 2])[:, None] << _CUT
"""What is added to the bits of a number to get its neighbours of bfloat16, the nearest ones first."""


def _rounded(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """To the nearest number of bfloat16's eight bits, half to even."""
    bits = numbers.view(np.int64)
    nearest: npt.NDArray[np.float64] = (bits + (1 << (_CUT - 1)) - 1 + (bits >> _CUT & 1) >> _CUT << _CUT).view(
        np.float64
    )
    return nearest


def find_pairs(
    factors: npt.NDArray[np.float64], significands: Sequence[float], wanted: Tensor, shift: int = SHIFT
) -> Tensor:
    """Pairs of factors, each the first half of an int32 and the second.

    Args:
        factors: `[N]`.
        significands: `[M]`, those of the numbers that are to be multiplied, of six bits at most.
        wanted: `[M, N]`, bfloat16, their products as they are to be rounded.
        shift: the exponent that pairs have more.

    Returns:
        int32 `[N]`, `MISSING` where there is no pair, or where a factor is so large or small that other numbers would not be rounded alike.
    """
    signs, sizes = np.signbit(factors), np.abs(factors)
    numbers = np.array(significands, np.float64)[:, None]
    right = np.abs(wanted.to(torch.float64).numpy())
    high = (sizes.view(np.int64) >> _CUT << _CUT).view(np.float64)
    low = _rounded(sizes - high)
    found = _gives(numbers, high, low, right)
    if not found.all():
        rest = np.flatnonzero(~found)
        near = np.where(low[rest] > 0, (low[rest].view(np.int64) + _NEIGHBOURS).view(np.float64), 0)
        good = _gives(numbers, high[rest], near[:, None], right[:, rest])
        found[rest], low[rest] = good.any(0), np.take_along_axis(near, good.argmax(0)[None], 0)[0]
    found = np.where(sizes == 0, True, found & (sizes >= _LEAST) & (sizes < _MOST))
    halves = [_half(np.where(found, np.where(signs, -one, one), 0) * 2.0**shift) for one in (high, low)]
    pairs = np.where(found, halves[0] << 16 | halves[1], 0xFFFF_FFFF).astype(np.uint32)
    return torch.from_numpy(pairs.view(np.int32))


def _gives(
    numbers: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
    low: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:
    """Whether pairs `[..., N]` give the products `[M, N]` of all numbers `[M, 1]` as they are to be: `[..., N]`."""
    good: npt.NDArray[np.bool_] = (_rounded(numbers * high + _rounded(numbers * low)) == right).all(-2)
    return good


def _half(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bits of bfloat16 numbers."""
    bits: npt.NDArray[np.int64] = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
    return bits
