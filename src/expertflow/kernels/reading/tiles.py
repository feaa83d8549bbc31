"""The product of a weight and some tokens, tile by tile, and the tile loader of plain numbers.

A tile loader is a Triton function of

    record: pointer to the record's first byte, as a pointer to the model's dtype
    at: byte offsets of the format's parts in the record, `Part` by `Part`
    about: the format's `constants`
    outs, cols: the outputs `[R]` and inputs `[C]` wanted
    n, k: outputs and inputs of the weight
    transposed: whether plain numbers are input-major
    whole: no output or input lies outside

that gives the tile `[R, C]` in the model's dtype, zero outside, with the numbers that the format's `decode` gives. What is computed
from a tile is the same for every format, so packed weights give the bits of the decoded ones. Must not know experts and slots.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait
from triton.language.target_info import cuda_capability_geq

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies the bit patterns of bfloat16; it has to be given float32, which is as exact."""


@triton.jit
def load_plain(
    record, at: tl.constexpr, about: tl.constexpr, outs, cols, n: tl.constexpr, k: tl.constexpr,  # noqa: ARG001
    transposed: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """Plain numbers."""
    weight = record + at[0] // (record.dtype.element_ty.primitive_bitwidth // 8)
    if transposed:
        where, inside = weight + cols[:, None] * n + outs[None, :], (cols[:, None] < k) & (outs[None, :] < n)
    else:
        where, inside = weight + outs[:, None] * k + cols[None, :], (outs[:, None] < n) & (cols[None, :] < k)
    tile = tl.load(where) if whole else tl.load(where, mask=inside, other=0.0)
    return tl.trans(tile) if transposed else tile


@triton.jit
def load_tokens(inputs, valid, begin, k: tl.constexpr, block_k: tl.constexpr):
    """Inputs `begin` to `begin + block_k - 1` of the tokens whose numbers begin at `inputs`, `[TOK, block_k]`; 0 where there are none."""
    cols = begin + tl.arange(0, block_k)
    if k % block_k == 0:
        tokens = tl.load(inputs[:, None] + cols[None, :], mask=valid[:, None], other=0.0)
    else:
        tokens = tl.load(inputs[:, None] + cols[None, :], mask=valid[:, None] & (cols[None, :] < k), other=0.0)
    return tokens


@triton.jit
def tokens_of_chunk(
    inputs, valid, first, step: tl.constexpr, k: tl.constexpr, length: tl.constexpr, block_k: tl.constexpr
):
    """`load_tokens` of a step of the chunk of `length` inputs that begins at `first`; 0 too where the last chunk has fewer steps."""
    begin = first + step * block_k
    if k % block_k == 0 and (k - 1) // length * length + step * block_k >= k:  # else `load_tokens` looks at each input
        valid = valid & (begin < k)
    return load_tokens(inputs, valid, begin, k, block_k)


@triton.jit
def add_product(acc, tile, tokens):
    """Add a tile `[R, C]` times tokens `[TOK, C]` to `[R, TOK]`, in float32."""
    if INTERPRETED:
        tile, tokens = tile.to(tl.float32), tokens.to(tl.float32)
    return tl.dot(tile, tl.trans(tokens), acc, input_precision="ieee")


@triton.jit
def first_of(part, chunk: tl.constexpr, alone: tl.constexpr):
    """The first input of a product that is of chunk `part` alone, or of all."""
    return part * chunk if alone else 0


@triton.jit
def last_of(part, k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr):
    """Where the inputs of the same product end, of `k`."""
    return tl.minimum(part * chunk + chunk, k) if alone else k


@triton.jit
def begin_of_chunk(total, acc, begin, k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr, decoded: tl.constexpr):
    """The chunks' sum and the sum within a chunk, before the products of the step from input `begin` on are added.

    It has to come before the step's product: behind it, Triton 3.6 would read sums that Hopper's tensor cores are still at. Where the
    tile was `decoded` in registers, the sum is touched in every step. Else Triton leaves products in flight, and the next step's
    numbers go into registers that these still read (github.com/triton-lang/triton/issues/9433).
    """
    if chunk < k and not alone:
        if begin % chunk == 0:
            total += acc
            acc = tl.zeros_like(acc)
    elif decoded:
        acc = touched(acc)
    return total, acc


@triton.jit
def touched(acc):
    """The same numbers, of which the compiler knows nothing.

    A product that is added to zeros, and then to another sum, it would add to that sum at once: other bits.
    """
    if INTERPRETED:
        return acc
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def with_last_chunk(total, acc, k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr):
    """The sum of all chunks. Before the first one, zeros were added to zeros."""
    return total + acc if chunk < k and not alone else acc


@triton.jit
def multiply_tiles(
    inputs, valid, record, load: tl.constexpr, at: tl.constexpr, about: tl.constexpr, outs, n: tl.constexpr, k: tl.constexpr,
    transposed: tl.constexpr, exact: tl.constexpr, block_k: tl.constexpr, chunk: tl.constexpr, alone: tl.constexpr, part,
    ahead: tl.constexpr, waits: tl.constexpr,  # noqa: ARG001
):  # fmt: skip
    """Outputs `[R]` of a weight of `n` outputs and `k` inputs times tokens: `[R, TOK]` in float32, `block_k` inputs a step.

    `inputs` are pointers `[TOK]` to each token's first number, `valid` says where there is a token, others give 0. `exact`: no output
    lies outside. Every `chunk` inputs are summed by themselves, and then the chunks' sums in their order; or, `alone`, chunk `part` is
    all there is. `ahead` is how many steps of a chunk a reader requests at once, if it can. `waits`: the tokens are there only when the
    kernel before has ended; a weight was there before. The others are as a tile loader has them.
    """
    if waits:
        gdc_wait()
    acc = tl.zeros([outs.shape[0], inputs.shape[0]], tl.float32)
    total = acc
    for begin in range(first_of(part, chunk, alone), last_of(part, k, chunk, alone), block_k):
        tokens = load_tokens(inputs, valid, begin, k, block_k)
        cols = begin + tl.arange(0, block_k)
        tile = load(record, at, about, outs, cols, n, k, transposed, exact and k % block_k == 0)
        total, acc = begin_of_chunk(total, acc, begin, k, chunk, alone, load is not load_plain)
        acc = add_product(acc, tile, tokens)
    return with_last_chunk(total, acc, k, chunk, alone)


@triton.jit
def as_loaded(tile):
    """A tile as it is, whose history the compiler does not see, in numbers of two bytes.

    Before sm_90 Triton orders the inputs of a product by the smallest number in the history of a tile, and the order decides about bits.
    """
    if not INTERPRETED and tile.dtype.primitive_bitwidth == 16 and not cuda_capability_geq(9, 0):
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tile.dtype, is_pure=False, pack=2)
    return tile


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 numbers rounded to nearest in `dtype`, ties to even; the interpreter cuts bfloat16 off by itself."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
