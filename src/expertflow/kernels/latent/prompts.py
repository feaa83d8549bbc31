"""Latent attention of passes over prompts: keys and values are made of latents in pages, for some heads at a time.

Scoring latents themselves, as decode steps do, would cost a long piece several times as many operations. `expand` makes keys and values of
as many heads as fit into a fixed number of bytes, and `kernels.prompts.attention` reads them. Tiles lie at fixed places of a sequence,
so the bits of a token depend on its sequence alone. Twin of `kernels.latent.reference`. Must not know models and caches.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from expertflow.kernels.latent.decode import padded_to, product, vectors
from expertflow.kernels.latent.reference import EXPANDED
from expertflow.kernels.prompts.attention import prompt_attention as attend


class Tiles(NamedTuple):
    """Columns and features of a tile of `expand`, elements of latents that it takes in at once, warps, and blocks in flight."""

    columns: int
    features: int
    depth: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["total"], do_not_specialize_on_alignment=["rows", "lasts", "begins"])
def expand(
    latents, ropes, weight, rows, lasts, begins, table, keys, values, total, latent_page, rope_page, table_stride, page: tl.constexpr,
    plain: tl.constexpr, width: tl.constexpr, rank: tl.constexpr, rope: tl.constexpr, rope_padded: tl.constexpr, block_m: tl.constexpr,
    block_f: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """Some features of one head, keys' first and then values', for some columns of one sequence."""
    features: tl.constexpr = plain + width
    count: tl.constexpr = (features + block_f - 1) // block_f
    head, tile, sequence = tl.program_id(0) // count, tl.program_id(0) % count, tl.program_id(2)
    last, column = tl.load(lasts + sequence).to(tl.int32), tl.program_id(1) * block_m
    if column > last:
        return
    here, feature, some = column + tl.arange(0, block_m), tile * block_f + tl.arange(0, block_f), tl.arange(0, depth)
    inside = here <= last
    table += tl.load(rows + sequence).to(tl.int64) * table_stride
    where = tl.load(table + here // page, mask=inside, other=0).to(tl.int64)
    left = latents + where * latent_page + here % page * rank
    right = weight + (head.to(tl.int64) * features + feature) * rank
    acc = tl.zeros([block_m, block_f], tl.float32)
    whole: tl.constexpr = rank % depth == 0 and features % block_f == 0
    for begin in tl.range(0, rank, depth):
        cell = begin + some
        if whole:  # columns behind the last are read in a page of no sequence, and not written
            latent = tl.load(left[:, None] + cell[None, :])
            matrix = tl.load(right[:, None] + cell[None, :])
        else:
            latent = tl.load(left[:, None] + cell[None, :], mask=cell[None, :] < rank, other=0.0)
            matrix = tl.load(
                right[:, None] + cell[None, :], mask=(feature[:, None] < features) & (cell[None, :] < rank), other=0.0
            )
        acc = product(latent, tl.trans(matrix), acc)
    done = acc.to(keys.dtype.element_ty)
    at = head.to(tl.int64) * total + tl.load(begins + sequence).to(tl.int64) + here
    key = keys + at * (plain + rope)
    tl.store(key[:, None] + feature[None, :], done, mask=inside[:, None] & (feature[None, :] < plain))
    value = values + at * width
    of_values = (feature[None, :] >= plain) & (feature[None, :] < features)
    tl.store(value[:, None] + (feature[None, :] - plain), done, mask=inside[:, None] & of_values)
    if tile == 0:
        turned = vectors(ropes + where * rope_page + here % page * rope, rope, rope_padded, inside, False)
        part = tl.arange(0, rope_padded)
        tl.store(key[:, None] + plain + part[None, :], turned, mask=inside[:, None] & (part[None, :] < rope))


def heads_at_once(heads: int, columns: int, nbytes: int) -> int:
    """Heads whose keys and values are made together.

    Args:
        heads: there are.
        columns: of all sequences of a pass.
        nbytes: of a column's key and value of one head.
    """
    return min(heads, max(1, EXPANDED // (columns * nbytes)))


def prompt_attention(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    table: Tensor,
    *,
    pieces: tuple[Tensor, int],
    room: tuple[Tensor, int],
) -> Tensor:
    """Attention of the last tokens of each of S sequences over the columns up to each token's position.

    Args:
        query: `[1, Q, T, plain + rope]`, unit columns: the sequences' tokens follow one another.
        kept: latents `[P, 1, N, rank]` and the keys' rotary parts `[P, 1, N, rope]`, pages of N columns; contiguous.
        weight: `[Q * (plain + V), rank]`, contiguous: of each head what makes keys of latents, then what makes values.
        where: int64 `[S]` each: which row of the table, and the position of each sequence's last token.
        scale: of the scores, more than 0.
        table: int32 `[R, m]` with unit columns, the pages of each row.
        pieces: int64 `[2, S]`, contiguous, first token and number of tokens of each sequence, and the longest's number.
        room: int64 `[S]`, where each sequence's columns begin if those of all follow one another, and how many there are in all.

    Returns:
        `[1, T, Q, V]`.
    """
    (heads, tokens, asked_width), (latents, ropes), (begins, total) = query.shape[1:], kept, room
    rank, page, rope, features = weight.shape[1], latents.shape[2], ropes.shape[3], weight.shape[0] // query.shape[1]
    plain, (rows, lasts) = asked_width - rope, where
    width, longest = features - plain, min(total, table.shape[1] * page)
    assert latents.is_contiguous() and ropes.is_contiguous() and weight.is_contiguous()  # noqa: PT018
    together = heads_at_once(heads, total, (asked_width + width) * query.element_size())
    out = query.new_empty(1, tokens, heads, width)
    cut = tiles(query, features, rank)
    for first in range(0, heads, together):
        mine = slice(first, min(first + together, heads))
        count = mine.stop - first
        keys, values = query.new_empty(count, total, asked_width), query.new_empty(count, total, width)
        expand[count * triton.cdiv(features, cut.features), triton.cdiv(longest, cut.columns), len(rows)](
            latents, ropes, weight[first * features :], rows, lasts, begins, table, keys, values, total, latents.stride(0), ropes.stride(0),
            table.stride(0), page=page, plain=plain, width=width, rank=rank, rope=rope, rope_padded=padded_to(rope), block_m=cut.columns,
            block_f=cut.features, depth=cut.depth, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
        made = [part.as_strided((1, *part.shape), (part.stride(1), *part.stride())) for part in (keys, values)]
        attend(
            query[:, mine], made[0], made[1], (begins, lasts), scale, pieces=pieces, out=out[:, :, mine]
        )  # a row begins at its column
        del keys, values, made
    return out


def tiles(query: Tensor, features: int, rank: int) -> Tiles:
    """How `expand` is cut. `depth` enters the arithmetic: it depends on the model alone."""
    if query.element_size() > 2:  # no tensor cores
        return Tiles(32, min(32, padded_to(features)), min(32, padded_to(rank)), 4, 2)
    return Tiles(128, min(128, padded_to(features)), min(64, padded_to(rank)), 8, 3)
