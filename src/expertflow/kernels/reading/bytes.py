"""How the expert kernels read formats of one byte a weight: `formats.published.fp8` in Triton.

`load_bytes` is the tile loader, see `kernels.reading.tiles`. `multiply_bytes` is the product: where `by_words` says so, a thread reads just the
codes that a tensor core takes from it, four in a word; else tile by tile, where the first input of a step is known.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait, num_warps

from expertflow.kernels.reading.assembly import E4M3, E4M3_BY_PAIR, INT8
from expertflow.kernels.reading.threads import both_halves, by_threads, in_record, load_four, number_type, warps_of
from expertflow.kernels.reading.tiles import (
    INTERPRETED,
    add_product,
    as_loaded,
    begin_of_chunk,
    first_of,
    last_of,
    load_tokens,
    rounded,
    tokens_of_chunk,
    touched,
    with_last_chunk,
)

STEP = tl.constexpr(64)
"""Inputs whose codes a record has thread by thread, as in `formats.published.fp8`."""


@triton.jit
def widened(values):
    """bfloat16 or float16 to float32, subnormal numbers too."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def _values(codes, about: tl.constexpr):
    """The numbers of codes: int32, their sign extended, to float32; exact."""
    if about[5]:
        values = codes.to(tl.float32)
    else:  # the sign stays, the other bits go where float32 has exponent and mantissa; 127 - 7 is missing in the exponent
        values = ((codes << 20) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return values


@triton.jit
def _places(rows, cols, each: tl.constexpr, k: tl.constexpr):
    """Where the codes of rows `[R]` and inputs `[C]` are in a record, `[R, C]`; `each` rows are a tensor's. See `formats.published.fp8`."""
    if k % 16 == 0:
        step, place = cols // STEP, cols % STEP
        wide = tl.minimum(4, k // 16 - step * 4)
        cols = step * (STEP * each) + place % 8 // 2 * (4 * wide) + place // 16 * 4 + place // 8 % 2 * 2 + place % 2
        where = (rows // each * (each * k))[:, None] + rows[:, None] % each * (16 * wide)[None, :] + cols[None, :]
    else:
        where = rows[:, None] * k + cols[None, :]
    return where


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
    rows = in_record(outs, n, joined, about[9])
    where = start + at[0] + _places(rows, cols, one, k)
    codes = (tl.load(where) if whole else tl.load(where, mask=inside, other=0)).to(tl.int32)
    values = _values(codes, about)
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
    return as_loaded(rounded(values, record.dtype.element_ty))


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
    transposed: tl.constexpr, exact: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr, part,  # noqa: ARG001
    ahead: tl.constexpr, waits: tl.constexpr,
):  # fmt: skip
    """As `multiply_tiles` with `load_bytes`, which would look for the first input in every step: by words where that gives its bits."""
    # the interpreter's sums go by the size of a step, and a short last one is of 64 inputs in words
    fitting: tl.constexpr = outs.shape[0] % 64 == 0 and (not INTERPRETED or block_k == STEP or k % block_k == 0)
    if fitting and by_words(about, number_type(record.dtype.element_ty), k, block_k):
        acc = _multiply_words(
            inputs, valid, record, at, about, outs, n, k, exact, block_k, chunk, alone, part, ahead, waits
        )
    else:
        if waits:
            gdc_wait()
        acc = tl.zeros([outs.shape[0], inputs.shape[0]], tl.float32)
        total = acc
        for begin in range(first_of(part, chunk, alone), last_of(part, k, chunk, alone), block_k):
            tokens = load_tokens(inputs, valid, begin, k, block_k)
            cols = begin + tl.arange(0, block_k)
            tile = _tile(record, at, about, outs, cols, begin, n, k, exact and k % block_k == 0)
            total, acc = begin_of_chunk(total, acc, begin, k, chunk, alone, True)
            acc = add_product(acc, tile, tokens)
        acc = with_last_chunk(total, acc, k, chunk, alone)
    return acc


@triton.constexpr_function
def by_words(about, dtype, k, block_k):
    """Whether codes are decoded a word at a time: where all scales of a step's output are one, and a number is rounded but once.

    Args:
        about: the format's constants.
        dtype: of the model, as torch names it.
        k: inputs of the weight.
        block_k: those of a step of the loop.
    """
    grid_cols, scale_dtype, rounds, divides = about[4], about[6], about[7], about[10]
    fitting = dtype in ("bfloat16", "float16") and k % 16 == 0 and block_k in (64, 128)
    shared = grid_cols == 1 or (divides >= 64 and scale_dtype in ("float32", "bfloat16"))
    return fitting and shared and (not rounds or scale_dtype in ("float32", dtype))


@triton.constexpr_function
def ahead_fits(about, k):
    """Whether codes that are decoded by words can be requested some steps of 128 inputs ahead: each such step's outputs have one scale.

    Args:
        about: the format's constants.
        k: inputs of the weight.
    """
    grid_cols, divides = about[4], about[10]
    return k % 64 == 0 and (grid_cols == 1 or divides >= 128)


@triton.constexpr_function
def _program(int8, dtype):
    """What makes four numbers of a word of codes."""
    text = INT8 if int8 else E4M3
    return text if dtype == "bfloat16" else text.replace("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32")


@triton.constexpr_function
def by_pairs(about, dtype):
    """Whether numbers are made with pairs of bfloat16 numbers in place of scales, see `formats.pairs`.

    Args:
        about: the format's constants.
        dtype: of the model, as torch names it.
    """
    return about[11] and dtype == "bfloat16" and not INTERPRETED.value


@triton.jit
def _multiply_words(  # noqa: C901, PLR0912 - most branches are known when compiling
    inputs, valid, record, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr, exact: tl.constexpr,
    block_k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr, part, ahead: tl.constexpr, waits: tl.constexpr,
):  # fmt: skip
    """The product by words: a tile is made in the registers of the threads that multiply it, see `kernels.reading.words`."""
    each: tl.constexpr = about[0]
    block_rows: tl.constexpr = about[1]
    grid_rows: tl.constexpr = about[3]
    grid_cols: tl.constexpr = about[4]
    joined: tl.constexpr = about[8]
    dtype: tl.constexpr = record.dtype.element_ty
    mine = by_threads(outs)
    inside = mine < n
    rows = in_record(mine, n, joined, about[9])
    start = record.to(tl.pointer_type(tl.int8), bitcast=True)
    codes = start + at[0] + rows // each * (each * k) + rows % each * STEP
    of_row = rows // each * grid_rows + rows % each // block_rows if joined > 1 else rows // block_rows
    place = of_row * grid_cols
    acc = tl.zeros([outs.shape[0], inputs.shape[0]], tl.float32)
    if grid_cols == 1:
        scale = _scale_of_all(start, at, about, place, inside, dtype)
    total = acc
    if ahead > 0 and (alone or chunk >= k):
        tl.static_assert(ahead_fits(about, k), "such steps are not requested ahead")
        return _chunk_ahead(
            inputs, valid, start, codes, place, scale if grid_cols == 1 else inside, inside, acc, at, about, k, exact, chunk, part, ahead,
            waits, dtype,
        )  # fmt: skip
    if waits:
        gdc_wait()
    full: tl.constexpr = k // block_k * block_k
    for begin in range(first_of(part, chunk, alone), last_of(part, full, chunk, alone), block_k):
        if grid_cols > 1:
            scale = _scales(start, at, about, place, begin, inside, exact, dtype)
        tile = _numbers(codes + begin * each, scale, inside, about, exact, 4, dtype)
        if block_k > STEP:
            if grid_cols > 1 and about[10] < block_k:
                scale = _scales(start, at, about, place, begin + STEP, inside, exact, dtype)
            tile = _side_by_side(tile, _numbers(codes + (begin + STEP) * each, scale, inside, about, exact, 4, dtype))
        total, acc = begin_of_chunk(total, acc, begin, k, chunk, alone, True)
        acc = add_product(acc, tile, load_tokens(inputs, valid, begin, k, block_k))
    if full < k:  # noqa: SIM102 - known when compiling
        if not alone or part * chunk + chunk >= k:
            total, acc = begin_of_chunk(total, acc, full, k, chunk, alone, True)
            acc = touched(acc)
            if k % block_k >= 64:  # a step of 64 inputs of a larger one
                if grid_cols > 1:
                    scale = _scales(start, at, about, place, full, inside, exact, dtype)
                tile = _numbers(codes + full * each, scale, inside, about, exact, 4, dtype)
                acc = add_product(acc, tile, load_tokens(inputs, valid, full, k, 64))
            if k % 64 != 0:
                last: tl.constexpr = k // 64 * 64
                wide: tl.constexpr = k % 64 // 16
                if grid_cols > 1:
                    scale = _scales(start, at, about, place, last, inside, exact, dtype)
                tile = _numbers(
                    codes + last * each - rows % each * (STEP - 16 * wide), scale, inside, about, exact, wide, dtype
                )
                acc = add_product(touched(acc), tile, load_tokens(inputs, valid, last, k, 64))
    return with_last_chunk(total, acc, k, chunk, alone)


@triton.jit
def _chunk_ahead(
    inputs, valid, start, codes, place, scale, inside, acc, at: tl.constexpr, about: tl.constexpr, k: tl.constexpr, exact: tl.constexpr,
    chunk: tl.constexpr, part, ahead: tl.constexpr, waits: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The sum of chunk `part`, by written out steps of 128 inputs, each one's codes requested `ahead` steps before they are decoded."""
    length: tl.constexpr = chunk if chunk < k else (k + 127) // 128 * 128
    steps: tl.constexpr = length // 128
    first = part * length
    codes += first * about[0]
    requested = ()
    for step in tl.static_range(min(ahead, steps)):
        requested += (_request(start, codes, place, scale, inside, at, about, k, exact, length, first, step, dtype),)  # type: ignore[assignment]
    if waits:
        gdc_wait()
    tokens = ()
    for step in tl.static_range(steps):
        tokens += (tokens_of_chunk(inputs, valid, first, step, k, length, 128),)  # type: ignore[assignment]
    for step in tl.static_range(steps):
        if step + ahead < steps:
            requested += (  # type: ignore[assignment]
                _request(start, codes, place, scale, inside, at, about, k, exact, length, first, step + ahead, dtype),
            )
        left, right, factor = requested[step]  # type: ignore[var-annotated]
        tile = _side_by_side(_decoded(left, factor, about, dtype), _decoded(right, factor, about, dtype))
        acc = add_product(acc, tile, tokens[step])
    return acc


@triton.jit
def _request(
    start, codes, place, scale, inside, at: tl.constexpr, about: tl.constexpr, k: tl.constexpr, exact: tl.constexpr,
    length: tl.constexpr, first, step: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Codes `[R, 64]` of both halves of a step of the chunk that begins at input `first`, where `codes` point to, and their scale.

    They are 0 behind the last input.
    """
    last: tl.constexpr = (k - 1) // length * length + step * 128  # where this step of the last chunk begins
    whole: tl.constexpr = last + 128 <= k and exact
    begin = first + step * 128
    each: tl.constexpr = about[0]
    where = codes[:, None] + (step * 128 * each + tl.arange(0, 64))[None, :]  # offsets that are known when compiling
    here = inside & (begin < k)
    if whole:
        left, right = tl.load(where), tl.load(where + 64 * each)
    else:
        left = tl.load(where, mask=here[:, None], other=0)
        right = tl.load(where + 64 * each, mask=(inside & (begin + 64 < k))[:, None], other=0)
    if about[4] > 1:
        scale = _scales(start, at, about, place, begin, here, whole, dtype)
    return left, right, scale


@triton.jit
def _scale_of_all(start, at: tl.constexpr, about: tl.constexpr, place, inside, dtype: tl.constexpr):
    """The scale of all inputs of an output, for rows of scales that begin at `place` `[R]`: float32 `[R]`; or its pair, int32."""
    if by_pairs(about, number_type(dtype)):
        scale = tl.load((start + at[2]).to(tl.pointer_type(tl.int32), bitcast=True) + place, mask=inside, other=0)
    else:
        scales = (start + at[1]).to(tl.pointer_type(_dtype(about[6])), bitcast=True)
        scale = widened(tl.load(scales + place, mask=inside, other=0))
    return scale


@triton.jit
def _scales(
    start, at: tl.constexpr, about: tl.constexpr, place, first, inside, exact: tl.constexpr, dtype: tl.constexpr
):
    """Scales of the step from input `first` on, for rows of scales that begin at `place` `[R]`: float32 `[R]`; or their pairs, int32.

    They are read four bytes at a time, because copies of fewer cannot be in flight while others are computed with.
    """
    place += first // about[2]
    words = (start + at[1]).to(tl.pointer_type(tl.int32), bitcast=True)
    if by_pairs(about, number_type(dtype)):
        found = load_four((start + at[2]).to(tl.pointer_type(tl.int32), bitcast=True) + place, inside, exact)
    elif about[6] == "float32":
        found = load_four(words + place, inside, exact).to(tl.float32, bitcast=True)
    else:  # two bfloat16 in four bytes; that part of a record ends with whole ones
        bits = (load_four(words + place // 2, inside, exact) >> (place % 2 * 16)) << 16
        found = bits.to(tl.float32, bitcast=True)
    return found


@triton.jit
def _numbers(codes, scale, inside, about: tl.constexpr, exact: tl.constexpr, wide: tl.constexpr, dtype: tl.constexpr):
    """The tile `[R, 64]` of a step: `codes` are pointers `[R]` to its first bytes, `scale` is `[R]`.

    The step has `wide` words for each thread, and four are read; the tokens are 0 where one is missing. A row's 64 bytes are loaded by
    themselves: of more, compilers would give a thread others than it multiplies.
    """
    i = tl.arange(0, 64)
    if exact and wide == 4:
        code = tl.load(codes[:, None] + i[None, :])
    else:
        mask = inside[:, None] & (i % 16 < 4 * wide)[None, :]
        code = tl.load(codes[:, None] + (i // 16 * (4 * wide) + i % 16)[None, :], mask=mask, other=0)
    return _decoded(code, scale, about, dtype)


@triton.jit
def _decoded(code, scale, about: tl.constexpr, dtype: tl.constexpr):
    """The tile `[R, 64]` of codes and a scale, or its pair, `[R]`."""
    rows: tl.constexpr = code.shape[0]
    if by_pairs(about, number_type(dtype)):
        high, low = both_halves(scale)
        high, low = tl.broadcast_to(high[:, None], code.shape), tl.broadcast_to(low[:, None], code.shape)
        tile = tl.inline_asm_elementwise(
            E4M3_BY_PAIR, "=&r,=&r,r,r,r,r,r,r,r,r,r", [code, high, low], dtype=tl.int16, is_pure=False, pack=4
        ).to(dtype, bitcast=True)
    elif INTERPRETED:
        tile = rounded(_values(code.to(tl.int32), about) * tl.broadcast_to(scale[:, None], code.shape), dtype)
    else:
        scale = tl.broadcast_to(scale[:, None], code.shape)
        # not pure: a pure one would move behind the tile's rearrangement, and words would be taken apart for it
        tile = tl.inline_asm_elementwise(
            _program(about[5], number_type(dtype)), "=&r,=&r,r,f,f,f,f", [code, scale],
            dtype=tl.int16, is_pure=False, pack=4,
        ).to(dtype, bitcast=True)  # fmt: skip
    warps: tl.constexpr = 1 if INTERPRETED else warps_of(rows, num_warps())
    tile = tl.reshape(tile, [rows // (16 * warps), 2, warps, 8, 4, 4, 2, 2])
    return tl.reshape(tl.permute(tile, (0, 2, 1, 3, 5, 6, 4, 7)), [rows, 64])


@triton.jit
def _side_by_side(first, second):
    """Two tiles `[R, 64]` as one `[R, 128]`."""
    return as_loaded(tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [first.shape[0], 128]))


@triton.constexpr_function
def _dtype(name):
    """Triton's name of a number type."""
    return {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}[name]
