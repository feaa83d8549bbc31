"""How the expert kernels read the formats of four bits, see `formats.words`. Must not know experts and slots.

`load_words` is the tile loader: any code map, scaling and dtype, in float32. `multiply_words` is the same product with fewer
instructions, for models of bfloat16 and float16: it takes two codes out of a word at a time (`by_halves`).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import num_warps

from expertflow.kernels.reading.tiles import (
    INTERPRETED,
    add_product,
    as_loaded,
    begin_of_chunk,
    first_of,
    last_of,
    load_tokens,
    multiply_tiles,
    rounded,
    with_last_chunk,
)

STEP = tl.constexpr(128)
"""Inputs whose scales lie side by side, as in `formats.words`."""


@triton.jit
def _code(word, pair, upper, e2m1: tl.constexpr):
    """The code of a word's pair 0 to 3, in its lower or upper half: for `e2m1` its number, else 0 to 15; float32."""
    half = upper * 16
    if e2m1:
        last = pair == 3
        low = tl.where(
            last,
            ((word >> (half + 10)) & 3) | ((word >> (half + 13)) & 1) << 2,
            (word >> (half + tl.maximum(6 - 3 * pair, 0))) & 7,
        )
        sign = (word >> (half + tl.where(last, 14, 15 - 3 * pair))) & 1
        exponent, mantissa = low >> 1, low & 1
        doubled = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
        size = doubled.to(tl.float32) * 0.5
        return tl.where(sign == 1, -size, size)
    return ((word >> (half + 4 * pair)) & 15).to(tl.float32)


@triton.jit
def e8m0(scale):
    """The power of two of an E8M0 scale: integer to float32."""
    return tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3(code):
    """The number of an FP8 code (E4M3): integer 0 to 255 to float32; exact, NaN codes excepted."""
    # its exponent and mantissa where float32 has them: less 120 in the exponent, small codes as subnormal numbers
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _by_group(start, outs, cols, n: tl.constexpr, k: tl.constexpr, group: tl.constexpr, joined: tl.constexpr):
    """Where what lies by steps, such as scales, is for outputs `[R]` and inputs `[C]`: pointers `[R, C]`."""
    per: tl.constexpr = STEP // group if group < STEP else 1
    steps: tl.constexpr = (k + STEP - 1) // STEP
    one: tl.constexpr = n // joined
    step, place = cols // STEP, cols % STEP // (STEP // per)
    row = (outs // one) * (steps * one) + outs % one
    return start + (row[:, None] + (step * one)[None, :]) * per + place[None, :]


@triton.jit
def in_record(outs, n: tl.constexpr, joined: tl.constexpr, interleaved: tl.constexpr):
    """Where outputs are in a record, in which joined tensors lie one after another, if those alternate in the module."""
    return outs % joined * (n // joined) + outs // joined if interleaved else outs


@triton.jit
def load_words(
    record, at: tl.constexpr, about: tl.constexpr, outs, cols, n: tl.constexpr, k: tl.constexpr,
    transposed: tl.constexpr, whole: tl.constexpr,  # noqa: ARG001
):  # fmt: skip
    """The tile loader of `formats.words.Words`."""
    code_map: tl.constexpr = about[0]
    group: tl.constexpr = about[1]
    scaling: tl.constexpr = about[2]
    scale_dtype: tl.constexpr = about[3]
    zeros: tl.constexpr = about[4]
    joined: tl.constexpr = about[5]
    inside = (outs < n)[:, None] & (cols < k)[None, :]
    outs = in_record(outs, n, joined, about[6])
    start = record.to(tl.pointer_type(tl.uint8), bitcast=True)
    words = (start + at[0]).to(tl.pointer_type(tl.int32), bitcast=True)
    step, place = cols // STEP, cols % STEP
    wide = tl.minimum(4, (k - step * STEP) // 32)  # words of a step for each of its four threads
    where = step * (STEP // 8) + place // 2 % 4 * wide + place // 32
    word = tl.load(words + outs[:, None] * (k // 8) + where[None, :], mask=inside, other=0)
    code = _code(word, (place // 8 % 4)[None, :], (place % 2)[None, :], code_map == "e2m1")
    if zeros:
        zero = tl.load(_by_group(start + at[2], outs, cols, n, k, group, joined), mask=inside, other=0)
        code -= zero.to(tl.float32)
    elif code_map == "int4":
        code -= 8.0
    if scaling == "number":
        kind: tl.constexpr = (
            tl.bfloat16 if scale_dtype == "bfloat16" else tl.float16 if scale_dtype == "float16" else tl.float32
        )
        scales = (start + at[1]).to(tl.pointer_type(kind), bitcast=True)
        scale = tl.load(_by_group(scales, outs, cols, n, k, group, joined), mask=inside, other=0.0).to(tl.float32)
        value = rounded(code * scale, kind)
        value = value.to(tl.float32)
    else:
        raw = tl.load(_by_group(start + at[1], outs, cols, n, k, group, joined), mask=inside, other=0).to(tl.int32)
        if scaling == "e8m0":
            value = code * e8m0(raw)
        else:
            whole_scales = (start + at[2]).to(tl.pointer_type(tl.float32), bitcast=True)
            whole_scale = tl.load(whole_scales + outs // (n // joined), mask=outs < n, other=1.0)[:, None]
            scale = e4m3(raw) * whole_scale if scaling == "e4m3*" else tl.div_rn(e4m3(raw), whole_scale)
            value = code * scale
    return as_loaded(rounded(tl.where(inside, value, 0.0), record.dtype.element_ty))


_E2M1_PAIRS = (
    "and.b32 t, $4, 0x81C081C0;",
    "shl.b32 t, $4, 3;\nand.b32 t, t, 0x81C081C0;",
    "shl.b32 t, $4, 6;\nand.b32 t, t, 0x81C081C0;",
    (
        "shr.b32 t, $4, 4;\nand.b32 t, t, 0x00C000C0;\nshr.b32 u, $4, 5;\nlop3.b32 t, u, 0x01000100, t, 0xEA;\n"
        "shl.b32 u, $4, 1;\nlop3.b32 t, u, z, t, 0xEA;"
    ),
)
"""Each pair of E2M1 codes of a word, as two bfloat16 numbers of 2 ** -126."""
_INT4_PAIRS = (
    "lop3.b32 t, $4, m, b, 0xEA;",
    *(f"shr.b32 t, $4, {shift};\nlop3.b32 t, t, m, b, 0xEA;" for shift in (4, 8, 12)),
)
"""Each pair of codes of 0 to 15, with the bits of `b` above them."""


def _program(head: str, pairs: tuple[str, ...], makes: tuple[str, ...]) -> tl.constexpr:
    """Assembly that takes each pair out of a word and makes a result of it, `$0` to `$3`."""
    body = [f"{pair}\n{make.format(place)}" for place, (pair, make) in enumerate(zip(pairs, makes, strict=True))]
    return tl.constexpr("\n".join(["{", head, *body, "}"]))


_POWER = ".reg .b32 t, u, k, z;\nmov.b32 k, 0x7E807E80;\nmov.b32 z, 0x80008000;"
_E2M1 = _program(_POWER, _E2M1_PAIRS, ("fma.rn.bf16x2 t, t, k, z;\nfma.rn.bf16x2 ${}, t, $5, z;",) * 4)
"""Eight E2M1 codes of a word times a scale: four times two bfloat16 numbers. Adding -0 makes a product of a fused multiply-add, which
devices before sm_90 have too."""

_TIMES_F32 = """fma.rn.bf16x2 t, t, k, z;
shl.b32 u, t, 16;
and.b32 t, t, 0xFFFF0000;
mov.b32 a, u;
mov.b32 b, t;
mul.rn.f32 a, a, SCALE;
mul.rn.f32 b, b, SCALE;
cvt.rn.bf16x2.f32 ${}, b, a;"""
_E2M1_F32 = _program(
    _POWER.replace("\nmov.b32 k", "\n.reg .f32 a, b;\nmov.b32 k"),
    _E2M1_PAIRS,
    tuple(_TIMES_F32.replace("SCALE", scale) for scale in ("$5", "$5", "$6", "$6")),
)
"""The same times two scales in float32, one for the first and one for the second 16 inputs, rounded to bfloat16."""

_INT4 = _program(
    ".reg .b32 t, u, m, b, z;\nmov.b32 z, 0x80008000;\nmov.b32 m, 0x000F000F;\nmov.b32 b, 0x43004300;\nmov.b32 u, 0xBF80BF80;",
    _INT4_PAIRS,
    ("fma.rn.bf16x2 t, $6, u, t;\nfma.rn.bf16x2 ${}, t, $5, z;",) * 4,
)
"""Eight codes of a word less 128 plus a zero point (`$6`), times a scale: `0x4300 | q` is 128 + q in bfloat16, and the difference is exact."""
_INT4_F16 = _program(
    ".reg .b32 t, m, b;\nmov.b32 m, 0x000F000F;\nmov.b32 b, 0x64006400;",
    _INT4_PAIRS,
    ("sub.rn.f16x2 t, t, $6;\nmul.rn.f16x2 ${}, t, $5;",) * 4,
)
"""The same in float16, where `0x6400 | q` is 1024 + q."""


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


@triton.constexpr_function
def warps_of(rows, warps):
    """Warps among which the rows of a tile are divided, sixteen each."""
    return min(warps, rows // 16)


@triton.constexpr_function
def number_type(dtype):
    """A number type as torch names it."""
    return {"bf16": "bfloat16", "fp16": "float16"}.get(str(dtype), str(dtype))


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
def by_threads(outs):
    """Outputs `[R]` in the order in which `_unfold` takes their rows."""
    rows: tl.constexpr = outs.shape[0]
    warps: tl.constexpr = 1 if INTERPRETED else warps_of(rows, num_warps())
    return tl.reshape(tl.permute(tl.reshape(outs, [rows // (16 * warps), warps, 2, 8]), (0, 2, 1, 3)), [rows])


@triton.jit
def multiply_words(
    inputs, valid, record, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr,
    transposed: tl.constexpr, exact: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr, part,
):  # fmt: skip
    """As `multiply_tiles`, with the bits of `load_words`: two codes at a time where that gives them."""
    fitting: tl.constexpr = not INTERPRETED and block_k == STEP and outs.shape[0] % 64 == 0
    if fitting and by_halves(about, number_type(record.dtype.element_ty)):
        acc = _multiply_halves(inputs, valid, record, at, about, outs, n, k, exact, chunk, alone, part)
    else:
        acc = multiply_tiles(
            inputs, valid, record, load, at, about, outs, n, k, transposed, exact, block_k, chunk, alone, part
        )
    return acc


@triton.jit
def _multiply_halves(
    inputs, valid, record, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr, exact: tl.constexpr,
    chunk: tl.constexpr, alone: tl.constexpr, part,
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
    words = (start + at[0]).to(tl.pointer_type(tl.int32), bitcast=True) + mine * (k // 8)
    row = (mine // one) * (steps * one) + mine % one if joined > 1 else mine
    whole = inside
    inverse = inside
    if about[2] != "e8m0" and about[2] != "number":
        globals_at = (start + at[2]).to(tl.pointer_type(tl.float32), bitcast=True)
        whole = tl.load(globals_at + mine // one, mask=inside, other=1.0)
        inverse = tl.div_rn(tl.full(whole.shape, 1.0, tl.float32), whole)
    acc = tl.zeros([outs.shape[0], inputs.shape[0]], tl.float32)
    total = acc
    full: tl.constexpr = k // STEP * STEP
    for begin in range(first_of(part, chunk, alone), last_of(part, full, chunk, alone), STEP):
        tokens = load_tokens(inputs, valid, begin, k, STEP)
        tile = _tile(
            start, words + begin // 8, row + begin // STEP * one, inside, whole, inverse, at, about, exact, 4, dtype
        )
        total, acc = begin_of_chunk(total, acc, begin, k, chunk, alone)
        acc = add_product(acc, tile, tokens)
    if full < k:  # noqa: SIM102 - known when compiling
        if not alone or part * chunk + chunk >= k:
            tokens = load_tokens(inputs, valid, full, k, STEP)
            tile = _tile(
                start,
                words + full // 8,
                row + full // STEP * one,
                inside,
                whole,
                inverse,
                at,
                about,
                exact,
                k % STEP // 32,
                dtype,
            )
            total, acc = begin_of_chunk(total, acc, full, k, chunk, alone)
            acc = add_product(acc, tile, tokens)
    return with_last_chunk(total, acc, k, chunk, alone)


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
    if about[2] == "e8m0":
        scale = _field(start + at[1], place, inside, i % 4, 1, 4, exact)
        scale = tl.where(scale == 0, 0x00400040, scale * 0x00800080)
        a, b, c, d = tl.inline_asm_elementwise(
            _E2M1, "=&r,=&r,=&r,=&r,r,r", [word, scale], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    elif about[0] == "e2m1":
        times: tl.constexpr = about[2] == "e4m3*"
        first = _nvfp4_scale(_field(start + at[1], place, inside, i % 4 * 2, 1, 8, exact), whole, inverse, times)
        second = _nvfp4_scale(_field(start + at[1], place, inside, i % 4 * 2 + 1, 1, 8, exact), whole, inverse, times)
        a, b, c, d = tl.inline_asm_elementwise(
            _E2M1_F32, "=&r,=&r,=&r,=&r,r,f,f", [word, first, second], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
    else:
        per: tl.constexpr = STEP // about[1] if about[1] < STEP else 1
        scale = _field(start + at[1], place, inside, i % 4 * per // 4, 2, per, exact)
        scale = scale | (scale << 16)
        if about[4]:
            zero = _field(start + at[2], place, inside, i % 4 * per // 4, 1, per, exact)
        else:
            zero = tl.full([place.shape[0], 1], 8, tl.int32)
        if dtype == tl.bfloat16:
            zero = (zero | 0x4300) | ((zero | 0x4300) << 16)  # 128 + zero
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4, "=&r,=&r,=&r,=&r,r,r,r", [word, scale, zero], dtype=(tl.int32,) * 4, is_pure=True, pack=1
            )
        else:
            zero = (zero | 0x6400) | ((zero | 0x6400) << 16)  # 1024 + zero
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4_F16, "=&r,=&r,=&r,=&r,r,r,r", [word, scale, zero], dtype=(tl.int32,) * 4, is_pure=True, pack=1
            )
    return as_loaded(_unfold(a, b, c, d, dtype))


@triton.jit
def _nvfp4_scale(code, whole, inverse, times: tl.constexpr):
    """A group's scale of NVFP4, float32 `[R, W]`: its FP8 code's number times the tensor's own `[R]`, or divided by it.

    The quotient of the reciprocal is mended by what it leaves. For each number of a code and each mantissa of the divisor, tried one by
    one, this is the division's own result; records hold no divisor whose reciprocal or quotients would be subnormal.
    """
    scale = e4m3(code)
    if times:
        result = scale * whole[:, None]
    else:
        first = scale * inverse[:, None]
        left = tl.fma(-first, tl.broadcast_to(whole[:, None], scale.shape), scale)
        result = tl.fma(left, tl.broadcast_to(inverse[:, None], scale.shape), first)
    return result


@triton.jit
def _field(start, place, inside, which, size: tl.constexpr, per: tl.constexpr, exact: tl.constexpr):
    """Number `which` `[W]` of the `per` numbers of `size` bytes that a record has at `place` `[R]`: int32 `[R, W]`.

    It is read as part of four bytes, because copies of fewer cannot be in flight while others are computed with.
    """
    words = start.to(tl.pointer_type(tl.int32), bitcast=True)
    bits: tl.constexpr = 8 * size
    each: tl.constexpr = per * size
    if each == 8:
        first, second = load_four(words + place * 2, inside, exact), load_four(words + place * 2 + 1, inside, exact)
        many: tl.constexpr = 4 // size
        found = tl.where((which < many)[None, :], first[:, None], second[:, None]) >> (which % many * bits)[None, :]
    elif each == 4:
        found = load_four(words + place, inside, exact)[:, None] >> (which * bits)[None, :]
    else:
        around: tl.constexpr = 4 // each
        found = load_four(words + place // around, inside, exact) >> (place % around * (8 * each))
        found = found[:, None] >> (which * bits)[None, :]
    return found & ((1 << bits) - 1)


@triton.jit
def load_four(pointers, inside, exact: tl.constexpr):
    """Four bytes each, `[R]`; 0 outside."""
    return tl.load(pointers) if exact else tl.load(pointers, mask=inside, other=0)
