"""Factors as two bfloat16 numbers each, with which products come out as float32 arithmetic rounds them.

A kernel wants `bfloat16(t * factor)`, computed in float32. For two numbers at a time that takes two conversions, two products and a
third conversion. With a pair it takes two fused multiply-adds of bfloat16: `rn(t * high + rn(t * low))`, where `high` is the factor
cut off and `low` is what that leaves. Codes have few significands, so whether the result is right can be tried for all of them, and
where it is not, a neighbour of `low` gives it. Tried for all 2 ** 23 mantissas of a factor: for numbers of E4M3 codes there is always
such a pair; for their products with E2M1 codes there is none for 68 of them, and for 129 where scales are divided.
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
_NEIGHBOURS = (0, -1, 1, -2, 2)


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
    highs, lows = np.zeros_like(sizes), np.zeros_like(sizes)
    open_ = np.flatnonzero((sizes >= _LEAST) & (sizes < _MOST))
    found = sizes == 0
    for step in _NEIGHBOURS:
        if not open_.size:
            break
        high = (sizes[open_].view(np.int64) >> _CUT << _CUT).view(np.float64)
        low = _rounded(sizes[open_] - high)
        if step:
            low = np.where(low > 0, (low.view(np.int64) + (step << _CUT)).view(np.float64), 0)
        good = (_rounded(numbers * high + _rounded(numbers * low)) == right[:, open_]).all(0)
        mine = open_[good]
        highs[mine], lows[mine], found[mine] = high[good], low[good], True
        open_ = open_[~good]
    halves = [_half(np.where(signs, -one, one) * 2.0**shift) for one in (highs, lows)]
    pairs = np.where(found, halves[0] << 16 | halves[1], 0xFFFF_FFFF).astype(np.uint32)
    return torch.from_numpy(pairs.view(np.int32))


def _half(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The bits of bfloat16 numbers."""
    bits: npt.NDArray[np.int64] = (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
    return bits
