"""The product of four-bit codes that are taken out of a word two at a time, see `formats.words`; where `by_halves` says so.

A program takes a chunk's words step by step, as the compiler's pipeline has them; or it requests those of some steps `ahead`, before it waits
for the kernel that makes the tokens, and keeps them in registers. Must not know experts and slots.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait, num_warps

from expertflow.kernels.reading.assembly import (
    E2M1,
    E2M1_BY_PAIR,
    E2M1_F32,
    E2M1_ONCE,
    INT4,
    INT4_F16,
    INT4_FACTORS,
    INT4_ONCE,
)
from expertflow.kernels.reading.threads import both_halves, by_threads, in_record, load_four, warps_of
from expertflow.kernels.reading.tiles import (
    add_product,
    as_loaded,
    begin_of_chunk,
    first_of,
    last_of,
    load_tokens,
    tokens_of_chunk,
    touched,
    with_last_chunk,
)

STEP = tl.constexpr(128)
"""Inputs whose scales lie side by side, as in `formats.words`."""


@triton.constexpr_function
def by_halves(about, dtype):
    """Whether numbers of two bytes are made two at a time; with the arithmetic that is used for them that gives the library's bits.

    Args:
        about: the format's constants.
        dtype: of the model, as torch names it.
    """
    code_map, group, scaling, scale_dtype = about[:4]
    if code_map == "e2m1":
        return dtype == "bfloat16" and (scaling, group) in (("e8m0", 32), ("e4m3*", 16), ("e4m3/", 16))
    return dtype in ("bfloat16", "float16") and scale_dtype == dtype and (group in (32, 64) or group % 128 == 0)


@triton.jit
def _split(pairs, dtype: tl.constexpr):
    """The two numbers that each int32 holds."""
    lower, upper = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return lower.to(dtype, bitcast=True), upper.to(dtype, bitcast=True)


@triton.jit
def _unfold(one, two, three, four, dtype: tl.constexpr):
    """Four times two numbers of each word `[R, W]` as a tile `[R, 8 W]`.

    Rows come as `by_threads` orders them, and words by threads. In both orders a thread has decoded just what a tensor core takes from
    it, so that the tile stays in its registers.
    """
    a0, a1 = _split(one, dtype)
    b0, b1 = _split(two, dtype)
    c0, c1 = _split(three, dtype)
    d0, d1 = _split(four, dtype)
    even = tl.join(tl.join(a0, c0), tl.join(b0, d0))
    odd = tl.join(tl.join(a1, c1), tl.join(b1, d1))
    rows: tl.constexpr = one.shape[0]
    words: tl.constexpr = one.shape[1] // 4
    warps: tl.constexpr = warps_of(rows, num_warps())
    tile = tl.reshape(tl.join(even, odd), [rows // (16 * warps), 2, warps, 8, 4, words, 2, 2, 2])
    return tl.reshape(tl.permute(tile, (0, 2, 1, 3, 5, 6, 7, 4, 8)), [rows, words * 32])


@triton.jit
def multiply_halves(
    inputs, valid, record, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr, exact: tl.constexpr,
    chunk: tl.constexpr, alone: tl.constexpr, part, ahead: tl.constexpr, waits: tl.constexpr,
):  # fmt: skip
    """`multiply_words` where `by_halves` holds."""
    joined: tl.constexpr = about[5]
    one: tl.constexpr = n // joined
    steps: tl.constexpr = (k + STEP - 1) // STEP
    dtype: tl.constexpr = record.dtype.element_ty
    mine = by_threads(outs)
    inside = mine < n
    mine = in_record(mine, n, joined, about[6])
    start = record.to(tl.pointer_type(tl.uint8), bitcast=True)
    words = (
        (start + at[0]).to(tl.pointer_type(tl.int32), bitcast=True) + mine // one * (one * (k // 8)) + mine % one * 16
    )
    row = (mine // one) * (steps * one) + mine % one if joined > 1 else mine
    whole = inside
    inverse = inside
    if about[0] == "e2m1" and about[2] != "e8m0" and about[7]:
        pairs = (start + at[3]).to(tl.pointer_type(tl.int32), bitcast=True)
        pair = tl.load(pairs + mine // one, mask=inside, other=0)
        whole, inverse = both_halves(pair)
    elif about[2] != "e8m0" and about[2] != "number":
        globals_at = (start + at[2]).to(tl.pointer_type(tl.float32), bitcast=True)
        whole = tl.load(globals_at + mine // one, mask=inside, other=1.0)
        inverse = tl.div_rn(tl.full(whole.shape, 1.0, tl.float32), whole)
    acc = tl.zeros([outs.shape[0], inputs.shape[0]], tl.float32)
    if ahead > 0 and (alone or chunk >= k):
        return _chunk_ahead(
            inputs, valid, start, words, row, one, inside, whole, inverse, acc, at, about, k, exact, chunk, part, ahead, waits, dtype,
        )  # fmt: skip
    if waits:
        gdc_wait()
    total = acc
    full: tl.constexpr = k // STEP * STEP
    for begin in range(first_of(part, chunk, alone), last_of(part, full, chunk, alone), STEP):
        tokens = load_tokens(inputs, valid, begin, k, STEP)
        place = row + begin // STEP * one
        tile = _tile(
            start, words + begin // STEP * (one * 16), place, inside, whole, inverse, at, about, exact, 4, dtype
        )
        total, acc = begin_of_chunk(total, acc, begin, k, chunk, alone, True)
        acc = add_product(acc, tile, tokens)
    if full < k:  # noqa: SIM102 - known when compiling
        if not alone or part * chunk + chunk >= k:
            tokens = load_tokens(inputs, valid, full, k, STEP)
            wide: tl.constexpr = k % STEP // 32
            place = row + full // STEP * one
            words += full // STEP * (one * 16) - mine % one * (16 - 4 * wide)
            tile = _tile(start, words, place, inside, whole, inverse, at, about, exact, wide, dtype)
            total, acc = begin_of_chunk(total, acc, full, k, chunk, alone, True)
            acc = add_product(touched(acc), tile, tokens)
    return with_last_chunk(total, acc, k, chunk, alone)


@triton.jit
def _chunk_ahead(
    inputs, valid, start, words, row, one: tl.constexpr, inside, whole, inverse, acc, at: tl.constexpr, about: tl.constexpr,
    k: tl.constexpr, exact: tl.constexpr, chunk: tl.constexpr, part, ahead: tl.constexpr, waits: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The sum of chunk `part`, by steps that are written out, each one's words requested `ahead` steps before they are decoded."""
    length: tl.constexpr = chunk if chunk < k else (k + STEP - 1) // STEP * STEP
    steps: tl.constexpr = length // STEP
    first = part * length
    words += first // STEP * (one * 16)
    requested = ()
    for step in tl.static_range(min(ahead, steps)):
        requested += (_request(start, words, row, one, inside, at, about, k, exact, length, first, step),)  # type: ignore[assignment]
    if waits:
        gdc_wait()
    tokens = ()
    for step in tl.static_range(steps):
        tokens += (tokens_of_chunk(inputs, valid, first, step, k, length, STEP),)  # type: ignore[assignment]
    for step in tl.static_range(steps):
        if step + ahead < steps:
            requested += (_request(start, words, row, one, inside, at, about, k, exact, length, first, step + ahead),)  # type: ignore[assignment]
        word, scales, zeros = requested[step]  # type: ignore[var-annotated]
        place = row + (first // STEP + step) * one
        acc = add_product(acc, _decoded(word, scales, zeros, place, whole, inverse, about, dtype), tokens[step])
    return acc


@triton.jit
def _request(
    start, words, row, one: tl.constexpr, inside, at: tl.constexpr, about: tl.constexpr, k: tl.constexpr, exact: tl.constexpr,
    length: tl.constexpr, first, step: tl.constexpr,
):  # fmt: skip
    """Words `[R, 16]`, scales and zeros of a step of the chunk that begins at input `first`, where `words` point to: 0 behind the last input."""
    full: tl.constexpr = k // STEP * STEP
    last: tl.constexpr = (k - 1) // length * length + step * STEP  # where this step of the last chunk begins
    begin = first + step * STEP
    place = row + begin // STEP * one
    i = tl.arange(0, 16)
    at_step: tl.constexpr = step * one * 16
    where = words[:, None] + (at_step + i)[None, :]
    if last + STEP <= k and exact:
        word = tl.load(where)
        scales, zeros = _scales(start, at, about, place, inside, True)
    else:
        word = tl.load(where, mask=(inside & (begin < full))[:, None], other=0)
        if last == full and full < k:  # noqa: SIM102 - known when compiling
            if begin == full:  # a step of fewer words lies by threads, too
                wide: tl.constexpr = k % STEP // 32
                narrow = words - row % one * (16 - 4 * wide)
                fewer = narrow[:, None] + (at_step + i // 4 * wide + i % 4)[None, :]
                word = tl.load(fewer, mask=inside[:, None] & (i % 4 < wide)[None, :], other=0)
        scales, zeros = _scales(start, at, about, place, inside & (begin < k), False)
    return word, scales, zeros


@triton.jit
def _tile(
    start, words, place, inside, whole, inverse, at: tl.constexpr, about: tl.constexpr, exact: tl.constexpr, wide: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The tile `[R, 128]` of a step.

    `words` are pointers `[R]` to its first words, `place` `[R]` is where its scales are, `whole` `[R]` what NVFP4 has for a tensor,
    and `inverse` `[R]` its reciprocal.
    The step has `wide` words for each thread, the tile four; the tokens are 0 where one is missing.
    """
    i = tl.arange(0, 16)
    if exact and wide == 4:
        word = tl.load(words[:, None] + i[None, :])
    else:
        where = words[:, None] + (i // 4 * wide + i % 4)[None, :]
        word = tl.load(where, mask=inside[:, None] & (i % 4 < wide)[None, :], other=0)
    scales, zeros = _scales(start, at, about, place, inside, exact)
    return _decoded(word, scales, zeros, place, whole, inverse, about, dtype)


@triton.jit
def _scales(start, at: tl.constexpr, about: tl.constexpr, place, inside, exact: tl.constexpr):
    """Scales and zeros of a step as `_bytes_around` has them; zeros are nothing where there are none."""
    none = place, place
    if about[2] == "e8m0":
        found = _bytes_around(start + at[1], place, inside, 4, exact), none
    elif about[0] == "e2m1":
        found = _bytes_around(start + at[1], place, inside, 8, exact), none
    else:
        per: tl.constexpr = STEP // about[1] if about[1] < STEP else 1
        scales = _bytes_around(start + at[1], place, inside, 2 * per, exact)
        found = scales, _bytes_around(start + at[2], place, inside, per, exact) if about[4] else none
    return found


@triton.jit
def _bytes_around(start, place, inside, each: tl.constexpr, exact: tl.constexpr):
    """Two int32 `[R]`: the four bytes around the `each` bytes that a record has at `place` `[R]`, twice; or those eight.

    Four bytes are read, because copies of fewer cannot be in flight while others are computed with.
    """
    words = start.to(tl.pointer_type(tl.int32), bitcast=True)
    if each == 8:
        found = load_four(words + place * 2, inside, exact), load_four(words + place * 2 + 1, inside, exact)
    else:
        around: tl.constexpr = 4 // each
        both = load_four(words + place // around, inside, exact)
        found = both, both
    return found


@triton.jit
def _field(around, place, which, size: tl.constexpr, per: tl.constexpr):
    """Number `which` `[W]` of the `per` numbers of `size` bytes at `place` `[R]`, of `_bytes_around`: int32 `[R, W]`."""
    bits: tl.constexpr = 8 * size
    each: tl.constexpr = per * size
    if each == 8:
        many: tl.constexpr = 4 // size
        found = tl.where((which < many)[None, :], around[0][:, None], around[1][:, None])
        found = found >> (which % many * bits)[None, :]
    elif each == 4:
        found = around[0][:, None] >> (which * bits)[None, :]
    else:
        found = around[0] >> (place % (4 // each) * (8 * each))
        found = found[:, None] >> (which * bits)[None, :]
    return found & ((1 << bits) - 1)


@triton.jit
def _decoded(word, scales, zeros, place, whole, inverse, about: tl.constexpr, dtype: tl.constexpr):
    """The tile `[R, 128]` of a step's words, scales and zeros."""
    i = tl.arange(0, 16)
    if about[2] == "e8m0" and about[7]:
        selected = (i % 4 * 0x0101 + 0x4040)[None, :]
        a, b, c, d = tl.inline_asm_elementwise(
            E2M1_ONCE, "=&r,=&r,=&r,=&r,r,r,r", [word, scales[0][:, None], selected], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )  # fmt: skip
    elif about[2] == "e8m0":
        scale = tl.maximum(
            _field(scales, place, i % 4, 1, 4) * 0x00800080, 0x00400040
        )  # 0 is 2 ** -127, a subnormal number
        a, b, c, d = tl.inline_asm_elementwise(
            E2M1, "=&r,=&r,=&r,=&r,r,r", [word, scale], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    elif about[0] == "e2m1" and about[7]:
        around = tl.where((i % 4 < 2)[None, :], scales[0][:, None], scales[1][:, None])
        selected = (i % 2 * 0x0202 + 0x4040)[None, :]
        a, b, c, d = tl.inline_asm_elementwise(
            E2M1_BY_PAIR, "=&r,=&r,=&r,=&r,r,r,r,r,r", [word, around, selected, whole[:, None], inverse[:, None]],
            dtype=(tl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
    elif about[0] == "e2m1":
        times: tl.constexpr = about[2] == "e4m3*"
        first = _nvfp4_scale(scales, i % 4 * 2, whole, inverse, times)
        second = _nvfp4_scale(scales, i % 4 * 2 + 1, whole, inverse, times)
        a, b, c, d = tl.inline_asm_elementwise(
            E2M1_F32, "=&r,=&r,=&r,=&r,r,f,f", [word, first, second], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    else:
        per: tl.constexpr = STEP // about[1] if about[1] < STEP else 1
        scale = _field(scales, place, i % 4 * per // 4, 2, per)
        scale = scale | (scale << 16)
        if dtype == tl.bfloat16 and about[7]:
            factor, less = tl.inline_asm_elementwise(
                INT4_FACTORS, "=&r,=&r,r", [scale], dtype=(tl.int32,) * 2, is_pure=True, pack=1
            )
            a, b, c, d = tl.inline_asm_elementwise(
                INT4_ONCE, "=&r,=&r,=&r,=&r,r,r,r", [word, factor, less], dtype=(tl.int32,) * 4, is_pure=True, pack=1
            )
        else:
            eight = tl.full([place.shape[0], 1], 8, tl.int32)
            zero = _field(zeros, place, i % 4 * per // 4, 1, per) if about[4] else eight
            a, b, c, d = _less_zero(word, scale, zero, dtype)
    return as_loaded(_unfold(a, b, c, d, dtype))


@triton.jit
def _less_zero(word, scale, zero, dtype: tl.constexpr):
    """Codes of words less a zero point, times a scale twice in 32 bits: four times two numbers."""
    above: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400  # 128, or 1024
    zero = (zero | above) | ((zero | above) << 16)
    return tl.inline_asm_elementwise(
        INT4 if dtype == tl.bfloat16 else INT4_F16,
        "=&r,=&r,=&r,=&r,r,r,r",
        [word, scale, zero],
        dtype=(tl.int32,) * 4,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _nvfp4_scale(around, which, whole, inverse, times: tl.constexpr):
    """Scale `which` `[W]` of eight in `_bytes_around` `[R]`, float32 `[R, W]`: its FP8 code's number times the tensor's own `[R]`, or divided by it.

    The quotient of the reciprocal is mended by what it leaves. For each number of a code and each mantissa of the divisor, tried one by
    one, this is the division's own result; records hold no divisor whose reciprocal or quotients would be subnormal.
    """
    code = tl.where((which < 4)[None, :], around[0][:, None], around[1][:, None]) << (24 - which % 4 * 8)[None, :]
    # of the upper eight bits the sign stays, the others go where float32 has exponent and mantissa; 127 - 7 is missing in the exponent
    scale = ((code >> 4) & -2014314496).to(tl.float32, bitcast=True) * 1.329227995784916e36
    if times:
        result = scale * whole[:, None]
    else:
        first = scale * inverse[:, None]
        left = tl.fma(-first, tl.broadcast_to(whole[:, None], scale.shape), scale)
        result = tl.fma(left, tl.broadcast_to(inverse[:, None], scale.shape), first)
    return result
