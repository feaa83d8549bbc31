"""Twin of `kernels.sampling.reference.likely` for a GPU: one reading of the logits, by a kernel, in place of a dozen.

A program reads some blocks of one sequence's logits: of each block it leaves the most probable token, of all together what the sum of
chances and the token's rank are made of. The most probable tokens lie in as many blocks, which are read again. Must not know requests.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from expertflow.kernels.sampling.reference import BLOCK, in_order, token_of

_WIDTH = 16
"""Blocks that a program reads."""
_ROOM, _TAKEN = 40, 32
"""Bytes of memory for each token of the vocabulary, which a plan has, and what a logit takes that is read again."""
_NONE = tl.constexpr(-(2**63) + 1)
"""Below every token's key."""


@triton.jit(do_not_specialize=["blocks", "pieces"])
def _survey(
    logits, rows, tokens, peaks, parts, size, stride, blocks, pieces, width: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Of each block the largest key; of all blocks the largest logit, the chances relative to it, and how many tokens come before the own one."""
    piece, line = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = logits + tl.load(rows + line) * stride
    token = tl.load(tokens + line)
    own = tl.load(first + token).to(tl.float32)
    place = piece * width + tl.arange(0, width)
    cells = place[:, None] * block + tl.arange(0, block)[None, :]
    inside = cells < size
    x = tl.load(first + cells, mask=inside, other=float("-inf")).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (bits.to(tl.int64) << 32) + (0xFFFFFFFF - cells.to(tl.int64))
    tl.store(peaks + line * blocks + place, tl.max(tl.where(inside, key, _NONE), 1), mask=place < blocks)
    top = tl.max(tl.max(x, 1), 0)
    chance = tl.exp(x - tl.where(top > float("-inf"), top, 0.0))
    before = (x > own) | ((x == own) & (cells < token))
    at = parts + (line * pieces + piece) * 3
    tl.store(at, top)
    tl.store(at + 1, tl.sum(tl.sum(chance, 1), 0))
    tl.store(at + 2, tl.sum(tl.sum(before.to(tl.int32), 1), 0).to(tl.float32))


def likely(
    logits: Float[Tensor, "B V"], rows: Int[Tensor, " R"], tokens: Int[Tensor, " R"], count: int
) -> Float[Tensor, "R N"]:
    """See `reference.likely`. Logits have unit columns."""
    assert logits.stride(1) == 1
    size, lines, device, tokens = logits.shape[1], len(rows), logits.device, tokens.clamp_min(0)
    blocks = triton.cdiv(size, BLOCK)
    pieces = triton.cdiv(blocks, _WIDTH)
    peaks = torch.empty(lines, blocks, dtype=torch.int64, device=device)
    parts = torch.empty(lines, pieces, 3, device=device)
    sizes = size, logits.stride(0), blocks, pieces
    _survey[pieces, lines](logits, rows, tokens, peaks, parts, *sizes, width=_WIDTH, block=BLOCK, num_warps=8)
    norm = (parts[..., 0] + parts[..., 1].log()).logsumexp(1, keepdim=True)
    own, rank = logits[rows, tokens].float()[:, None] - norm, 1 + parts[..., 2].sum(1, keepdim=True)
    found = [own.double(), rank.double()]
    if count:
        at_once = max(1, _ROOM * size // (_TAKEN * min(size, BLOCK * count)))
        best = [_best(logits, *some, count) for some in zip(rows.split(at_once), peaks.split(at_once), strict=True)]
        ids = torch.cat(best)
        found += [ids.double(), (logits[rows[:, None], ids].float() - norm).double()]
    return torch.cat(found, dim=1)


def _best(
    logits: Float[Tensor, "B V"], rows: Int[Tensor, " R"], peaks: Int[Tensor, "R N"], count: int
) -> Int[Tensor, "R K"]:
    """The most probable tokens, which lie in the blocks of the most probable peaks."""
    size, blocks = logits.shape[1], peaks.topk(min(count, peaks.shape[1])).indices
    cells = (blocks[..., None] * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    keys = in_order(logits[rows[:, None], cells.clamp_max(size - 1)].float(), cells)
    return token_of(keys.masked_fill_(cells >= size, _NONE.value).topk(count).values)
