"""The tile loader of the format in `four_bit`."""

import triton
import triton.language as tl


@triton.jit
def load_four_bit(
    record, at: tl.constexpr, about: tl.constexpr, rows, cols, n: tl.constexpr, k: tl.constexpr, transposed: tl.constexpr,  # noqa: ARG001
    whole: tl.constexpr,  # noqa: ARG001
):  # fmt: skip
    """Bits of exponent and sign are put together: nothing is rounded."""
    start = record.to(tl.pointer_type(tl.uint8), bitcast=True)
    inside = (rows < n)[:, None] & (cols < k)[None, :]
    group = cols // 32
    byte = tl.load(start + at[0] + rows[:, None] * (k // 2) + (group * 16 + cols % 16)[None, :], mask=inside, other=0)
    scale = tl.load(start + at[1] + rows[:, None] * (k // 32) + group[None, :], mask=inside, other=0)
    code = (byte.to(tl.int32) >> (cols % 32 // 16 * 4)[None, :]) & 15
    unit = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return tl.where(inside, (code - 8).to(tl.float32) * unit, 0.0).to(record.dtype.element_ty)
