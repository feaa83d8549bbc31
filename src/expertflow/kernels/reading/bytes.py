"""How the expert kernels read formats of one byte a weight: `formats.published.fp8` in Triton.

`load_bytes` is the tile loader, see `kernels.reading.tiles`; `multiply_bytes` is the product with it, where the first input of a step is known.
"""

import triton
import triton.language as tl

from expertflow.kernels.reading.tiles import add_product, load_tokens, rounded


@triton.jit
def widened(values):
    """bfloat16 or float16 to float32, subnormal numbers too."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _tile(
    record,
    at: tl.constexpr,
    about: tl.constexpr,
    outs,
    cols,
    first,
    n: tl.constexpr,
    k: tl.constexpr,
    whole: tl.constexpr,
):
    """Codes `[N, K]` times scales; `about` is `constants` of the format, `first` the first of `cols`."""
    one: tl.constexpr = about[0]
    block_rows: tl.constexpr = about[1]
    block_cols: tl.constexpr = about[2]
    grid_rows: tl.constexpr = about[3]
    grid_cols: tl.constexpr = about[4]
    joined: tl.constexpr = about[8]
    step: tl.constexpr = cols.shape[0]
    start = record.to(tl.pointer_type(tl.int8), bitcast=True)
    inside = (outs < n)[:, None] & (cols < k)[None, :]
    rows = outs % joined * one + outs // joined if about[9] else outs
    where = start + at[0] + rows[:, None] * k + cols[None, :]
    codes = (tl.load(where) if whole else tl.load(where, mask=inside, other=0)).to(tl.int32)
    if about[5]:
        values = codes.to(tl.float32)
    else:  # the sign stays, the other bits go where float32 has exponent and mantissa; 127 - 7 is missing in the exponent
        values = ((codes << 20) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
    scales = (start + at[1]).to(tl.pointer_type(_dtype(about[6])), bitcast=True)
    of_row = rows // one * grid_rows + rows % one // block_rows if joined > 1 else rows // block_rows
    scales += of_row * grid_cols
    if grid_cols == 1:
        scale = tl.load(scales, mask=outs < n, other=0)[:, None]
    elif step <= about[10]:  # a step of inputs lies in one block
        scale = tl.load(scales + first // block_cols, mask=outs < n, other=0)[:, None]
    elif block_cols == about[10]:  # a step has whole blocks
        of_col = first // block_cols + tl.arange(0, step // block_cols)
        scale = tl.load(
            scales[:, None] + of_col[None, :], mask=(outs < n)[:, None] & (of_col < grid_cols)[None, :], other=0
        )
        scale = tl.broadcast_to(scale[:, :, None], [outs.shape[0], step // block_cols, block_cols])
        scale = tl.reshape(scale, [outs.shape[0], step])
    else:
        scale = tl.load(scales[:, None] + (cols // block_cols)[None, :], mask=inside, other=0)
    values = values * widened(scale)
    if about[7] and _dtype(about[6]) != tl.float32:
        values = widened(rounded(values, _dtype(about[6])))
    return rounded(values, record.dtype.element_ty)


@triton.jit
def load_bytes(
    record, at: tl.constexpr, about: tl.constexpr, outs, cols, n: tl.constexpr, k: tl.constexpr,
    transposed: tl.constexpr, whole: tl.constexpr,  # noqa: ARG001
):  # fmt: skip
    """The tile loader of `formats.published.fp8.Bytes`."""
    return _tile(record, at, about, outs, cols, tl.min(cols), n, k, whole)


@triton.jit
def multiply_bytes(
    inputs, valid, record, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr,  # noqa: ARG001
    transposed: tl.constexpr, exact: tl.constexpr, block_k: tl.constexpr,  # noqa: ARG001
):  # fmt: skip
    """As `multiply_tiles` with `load_bytes`, which would look for the first input in every step."""
    acc = tl.zeros([outs.shape[0], inputs.shape[0]], tl.float32)
    for begin in range(0, k, block_k):
        tokens = load_tokens(inputs, valid, begin, k, block_k)
        cols = begin + tl.arange(0, block_k)
        tile = _tile(record, at, about, outs, cols, begin, n, k, exact and k % block_k == 0)
        acc = add_product(acc, tile, tokens)
    return acc


@triton.constexpr_function
def _dtype(name):
    """Triton's name of a number type."""
    return {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}[name]
