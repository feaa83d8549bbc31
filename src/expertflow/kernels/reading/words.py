"""How the expert kernels read the formats of four bits, see `formats.words`. Must not know experts and slots.

`load_words` is the tile loader: any code map, scaling and dtype, in float32. `multiply_words` is the same product with fewer
instructions, for models of bfloat16 and float16: it takes two codes out of a word at a time (`by_halves`).
"""

import triton
import triton.language as tl

from expertflow.kernels.reading.halves import STEP, by_halves, multiply_halves
from expertflow.kernels.reading.threads import in_record, number_type
from expertflow.kernels.reading.tiles import INTERPRETED, as_loaded, multiply_tiles, rounded


@triton.jit
def _code(word, pair, upper, e2m1: tl.constexpr):
    """The code of a word's pair 0 to 3, in its lower or upper half: for `e2m1` its number, else 0 to 15; float32."""
    half = upper * 16
    if e2m1:
        # where the word's half goes in a circle, its bits are in the other half
        turned = tl.where(pair == 2, (word >> 16) & 0xFFFF | (word << 16), word)
        low = tl.where(
            pair == 3,
            ((word >> half) & 3) | ((word >> (half + 10)) & 1) << 2,
            (turned >> (half + tl.where(pair == 2, 12, 6 - 4 * tl.minimum(pair, 1)))) & 7,
        )
        sign = (word >> (half + tl.where(pair == 3, 9, tl.where(pair == 2, 5, 15 - 4 * pair)))) & 1
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
    one: tl.constexpr = n // joined
    row = (outs // one * (one * (k // 8)))[:, None] + (outs % one)[:, None] * (4 * wide)[None, :]
    where = step * (STEP // 8 * one) + place // 2 % 4 * wide + place // 32
    word = tl.load(words + row + where[None, :], mask=inside, other=0)
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


@triton.jit
def multiply_words(
    inputs, valid, record, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr,
    transposed: tl.constexpr, exact: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr, part,
    ahead: tl.constexpr, waits: tl.constexpr,
):  # fmt: skip
    """As `multiply_tiles`, with the bits of `load_words`: two codes at a time where that gives them."""
    fitting: tl.constexpr = not INTERPRETED and block_k == STEP and outs.shape[0] % 64 == 0
    if fitting and by_halves(about, number_type(record.dtype.element_ty)):
        acc = multiply_halves(inputs, valid, record, at, about, outs, n, k, exact, chunk, alone, part, ahead, waits)
    else:
        acc = multiply_tiles(
            inputs,
            valid,
            record,
            load,
            at,
            about,
            outs,
            n,
            k,
            transposed,
            exact,
            block_k,
            chunk,
            alone,
            part,
            ahead,
            waits,
        )
    return acc
