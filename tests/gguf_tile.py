"""A kernel that does nothing but load one tile of a weight in a format of GGUF."""

import triton
import triton.language as tl

from expertflow.kernels.reading.gguf import load_gguf


@triton.jit
def copy_tile(
    record, out, first, at: tl.constexpr, about: tl.constexpr, n: tl.constexpr, k: tl.constexpr, rows: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """The tile of `rows` outputs and `block` inputs from input `first` on, contiguous to `out`."""
    row, col = tl.arange(0, rows), tl.arange(0, block)
    tile = load_gguf(record, at, about, row, first + col, n, k, False, False)
    tl.store(out + row[:, None] * block + col[None, :], tile)
