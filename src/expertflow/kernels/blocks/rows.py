"""What the kernels of products share: rows of a weight in registers, and states normed there. Must not know products."""

import triton
import triton.language as tl


@triton.jit
def load_rows(weight, outs, n: tl.constexpr, k: tl.constexpr, begin: tl.constexpr, size: tl.constexpr):
    """Rows `outs` of a weight `[n, k]`, elements `begin` to `begin + size - 1`."""
    cell = begin + tl.arange(0, size)
    mask = (outs < n)[:, None] & (cell < k)[None, :]
    return tl.load(weight + outs.to(tl.int64)[:, None] * k + cell[None, :], mask=mask, other=0.0)


@triton.jit
def load_states(states, k: tl.constexpr, begin: tl.constexpr, size: tl.constexpr):
    """Elements `begin` to `begin + size - 1` of a token's states, float32."""
    cell = begin + tl.arange(0, size)
    return tl.load(states + cell, mask=cell < k, other=0.0).to(tl.float32)


@triton.jit
def scaled(x, root, gains, wide: tl.constexpr, dtype: tl.constexpr):
    """States divided by their root mean square (`root` is one by it), times the norm's weight, rounded as the norm rounds."""
    y = x * root
    if not wide:
        y = y.to(dtype).to(tl.float32)
    return (y * gains).to(dtype).to(tl.float32)


@triton.jit
def dot_rows(rows, x):
    """Sums of the products of rows `[R, size]` and states `[size]`, float32 `[R]`."""
    return tl.sum(rows.to(tl.float32) * x[None, :], axis=1)


def halves(inputs: int) -> tuple[int, int]:
    """Powers of two that cover so many inputs with little left over: one, or two of which the second is the smaller one or the same."""
    whole = int(triton.next_power_of_2(inputs))
    if whole == inputs:
        return whole // 2, whole // 2
    first = whole // 2
    return first, int(triton.next_power_of_2(inputs - first))
