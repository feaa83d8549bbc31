"""How the expert kernels read blocks of GGUF, see `formats.published.gguf`. Must not know experts and slots.

Every product of a scale and a code is exact in float32, so that it is the same whether or not a compiler fuses it with the sum
behind it: two numbers of 11 and 7 bits at most, times one of 5.
"""

import triton
import triton.language as tl

from expertflow.kernels.reading.threads import in_record
from expertflow.kernels.reading.tiles import as_loaded, rounded


@triton.jit
def _byte(start, where, inside):
    """Bytes as int32."""
    return tl.load(start + where, mask=inside, other=0).to(tl.int32)


@triton.jit
def _half(start, where, inside):
    """float16 numbers at even bytes, in float32."""
    halves = start.to(tl.pointer_type(tl.float16), bitcast=True)
    return tl.load(halves + where // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _nibble(start, codes, i, width: tl.constexpr, inside):
    """Code `i` of those that begin at byte `codes`: of every `width` bytes first the low halves, then the high ones."""
    byte = _byte(start, codes + i // (2 * width) * width + i % width, inside)
    return (byte >> (i // width % 2 * 4)) & 15


@triton.jit
def _scale_and_minimum(start, block, i, inside):
    """Scale and minimum of the group of 32 that number `i` of a block of Q4_K or Q5_K is in."""
    group = i // 32
    low = _byte(start, block + 4 + group % 4, inside)
    high = _byte(start, block + 8 + group % 4, inside)
    rest = _byte(start, block + 12 + group % 4, inside)
    scale = tl.where(group < 4, low & 63, (rest & 15) | ((low >> 2) & 48))
    minimum = tl.where(group < 4, high & 63, (rest >> 4) | ((high >> 2) & 48))
    d, least = _half(start, block, inside), _half(start, block + 2, inside)
    return d * scale.to(tl.float32), least * minimum.to(tl.float32)


@triton.jit
def _value(start, block, i, inside, type: tl.constexpr):  # noqa: A002, C901 - as the format names it; a branch a type
    """Number `i` of the block at byte `block`, in float32."""
    if type == "F32":
        value = tl.load(start.to(tl.pointer_type(tl.float32), bitcast=True) + block // 4, mask=inside, other=0.0)
    elif type == "F16":
        value = _half(start, block, inside)
    elif type == "BF16":
        bits = _byte(start, block, inside) << 16 | _byte(start, block + 1, inside) << 24
        value = bits.to(tl.float32, bitcast=True)
    elif type == "Q4_0":
        value = _half(start, block, inside) * (_nibble(start, block + 2, i, 16, inside).to(tl.float32) - 8.0)
    elif type == "Q4_1":
        code = _nibble(start, block + 4, i, 16, inside).to(tl.float32)
        value = _half(start, block, inside) * code + _half(start, block + 2, inside)
    elif type == "Q5_0":
        fifth = (_byte(start, block + 2 + i // 8, inside) >> (i % 8)) & 1
        code = _nibble(start, block + 6, i, 16, inside) | fifth << 4
        value = _half(start, block, inside) * (code.to(tl.float32) - 16.0)
    elif type == "Q5_1":
        fifth = (_byte(start, block + 4 + i // 8, inside) >> (i % 8)) & 1
        code = _nibble(start, block + 8, i, 16, inside) | fifth << 4
        value = _half(start, block, inside) * code.to(tl.float32) + _half(start, block + 2, inside)
    elif type == "Q8_0":
        code = _byte(start, block + 2 + i, inside)
        value = _half(start, block, inside) * tl.where(code > 127, code - 256, code).to(tl.float32)
    elif type == "Q4_K":
        scale, minimum = _scale_and_minimum(start, block, i, inside)
        value = scale * _nibble(start, block + 16, i, 32, inside).to(tl.float32) - minimum
    elif type == "Q5_K":
        scale, minimum = _scale_and_minimum(start, block, i, inside)
        fifth = (_byte(start, block + 16 + i % 32, inside) >> (i // 32)) & 1
        code = _nibble(start, block + 48, i, 32, inside) | fifth << 4
        value = scale * code.to(tl.float32) - minimum
    else:
        tl.static_assert(type == "Q6_K", "this type has no branch here")
        scale = _byte(start, block + 192 + i // 16, inside)
        scale = tl.where(scale > 127, scale - 256, scale).to(tl.float32)
        upper = (_byte(start, block + 128 + i // 128 * 32 + i % 32, inside) >> (i // 32 % 4 * 2)) & 3
        code = _nibble(start, block, i, 64, inside) | upper << 4
        value = _half(start, block + 208, inside) * scale * (code.to(tl.float32) - 32.0)
    return value


@triton.jit
def load_gguf(
    record, at: tl.constexpr, about: tl.constexpr, outs, cols, n: tl.constexpr, k: tl.constexpr,
    transposed: tl.constexpr, whole: tl.constexpr,  # noqa: ARG001
):  # fmt: skip
    """The tile loader of `formats.published.gguf.GgufBlocks`."""
    type: tl.constexpr = about[0]  # noqa: A001 - Triton 3.6 takes no string out of a tuple as an argument
    per: tl.constexpr = about[1]
    size: tl.constexpr = about[2]
    inside = (outs < n)[:, None] & (cols < k)[None, :]
    outs = in_record(outs, n, about[3], about[4])
    start = record.to(tl.pointer_type(tl.uint8), bitcast=True) + at[0]
    block = outs[:, None] * (k // per * size) + (cols // per * size)[None, :]
    value = _value(start, block, (cols % per)[None, :], inside, type)
    return as_loaded(rounded(tl.where(inside, value, 0.0), record.dtype.element_ty))
