"""Parts of kernels that several stages share: embeddings, products with two of them, faded averages.

Must not know files and sequences.
"""

import triton
import triton.language as tl


@triton.jit
def embed(
    seen, table, token, cell, vocabulary: tl.constexpr, rows: tl.constexpr, hashed: tl.constexpr, emb: tl.constexpr
):
    """`TokenTable.forward` of one token."""
    inside = (token >= 0) & (token < vocabulary)
    known = inside & (tl.load(seen + tl.where(inside, token, vocabulary)) != 0)
    first = (token * 2654435761 >> 8) % rows if hashed else token
    first = tl.where(known, first, rows)
    result = tl.load(table + first * emb + cell, mask=cell < emb, other=0.0)
    if hashed:
        second = tl.where(known, (token * 40503 + 12345 >> 3) % rows, rows)
        result += tl.load(table + second * emb + cell, mask=cell < emb, other=0.0)
    return result


@triton.jit
def project(weight, line, inside, one, two, cell, emb: tl.constexpr):
    """Lines `line` of a weight `[*, 2 emb]` times two embeddings."""
    mask = inside[:, None] & (cell < emb)[None, :]
    at = weight + line[:, None] * (2 * emb) + cell[None, :]
    left = tl.load(at, mask=mask, other=0.0)
    right = tl.load(at + emb, mask=mask, other=0.0)
    return tl.sum(left * one[None, :] + right * two[None, :], axis=1)


@triton.jit
def fade(old, mark, rate):
    """`torch.lerp(mark, old, rate)`."""
    return tl.where(rate < 0.5, mark + rate * (old - mark), old - (old - mark) * (1.0 - rate))


def power_of_two(size: int) -> int:
    """The next power of two."""
    return int(triton.next_power_of_2(size))
