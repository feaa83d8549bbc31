"""Latent attention of one token a sequence, straight from pages: three launches a layer, and no key or value is made.

`absorb` brings each head's query to the latents. `attend` scores latents and adds them up: all heads of a sequence share them, so
each latent is read once for up to 64 of them. `finish` joins what the spans of a sequence gave, and makes
each head's values of it. How long a span is depends on the sequence's length alone, so neither the columns that a step is captured
for nor other sequences change a bit. Twin of `kernels.latent.reference`. Must not know models and caches.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from expertflow.kernels.latent.reference import LEAST_SPAN, spans_of

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
GRAIN = tl.constexpr(64)
"""Spans are multiples of so many columns."""
ROWS = tl.constexpr(16)
"""Sequences of a tile of `absorb`: the narrowest tensor-core product."""
AHEAD = tl.constexpr(16)
"""Spans that `finish` reads at once."""
_NARROWEST = 16
_LARGE = 160 << 10
"""Shared memory of a program on data-centre GPUs, at least."""


class Tiling(NamedTuple):
    """Heads and columns of a tile of `attend`, warps, blocks in flight, and whether columns are rows of its products, not heads."""

    block_h: int
    block_n: int
    warps: int
    stages: int
    columns_first: bool = False


@triton.jit
def product(left, right, acc):
    """`acc + left @ right`, added in float32."""
    if INTERPRETED:  # it multiplies no bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def vectors(pointers, width: tl.constexpr, padded: tl.constexpr, inside, whole: tl.constexpr):
    """Vectors `[N, padded]`: elements up to `width`, zeros behind them and where not `inside`; `whole`: all are inside."""
    cell = tl.arange(0, padded)
    if whole and padded == width:
        return tl.load(pointers[:, None] + cell[None, :])
    return tl.load(pointers[:, None] + cell[None, :], mask=inside[:, None] & (cell[None, :] < width), other=0.0)


@triton.jit
def _span(position, least: tl.constexpr, most: tl.constexpr):
    """Columns of a span of a sequence that ends at `position`."""
    return tl.maximum(tl.cdiv(tl.cdiv(position + 1, most), GRAIN) * GRAIN, least)


@triton.jit
def absorb(
    query, weight, out, count, query_row, query_head, heads: tl.constexpr, plain: tl.constexpr, padded: tl.constexpr, features: tl.constexpr,
    rank: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Queries of one head, without their rotary part, times what makes its keys: `block` elements of `[B, Q, rank]`."""
    head = tl.program_id(0)
    row, cell, lane = (
        tl.program_id(2) * ROWS + tl.arange(0, ROWS),
        tl.program_id(1) * block + tl.arange(0, block),
        tl.arange(0, padded),
    )
    inside = row < count
    mine = query + row.to(tl.int64) * query_row + head * query_head
    asked = vectors(mine, plain, padded, inside, False)
    there = weight + (head.to(tl.int64) * features + lane[:, None]) * rank + cell[None, :]
    matrix = tl.load(there, mask=(lane[:, None] < plain) & (cell[None, :] < rank), other=0.0)
    done = product(asked, matrix, tl.zeros([ROWS, block], tl.float32))
    place = out + (row.to(tl.int64)[:, None] * heads + head) * rank + cell[None, :]
    tl.store(place, done.to(out.dtype.element_ty), mask=inside[:, None] & (cell[None, :] < rank))


@triton.jit
def _block(
    asked, turned, latents, ropes, table, column, position, most, total, acc, latent_page, rope_page, page: tl.constexpr, scale: tl.constexpr,
    rank: tl.constexpr, padded: tl.constexpr, rope: tl.constexpr, rope_padded: tl.constexpr, block_n: tl.constexpr, columns_first: tl.constexpr,
    masked: tl.constexpr,
):  # fmt: skip
    """Take in one block of columns, which lies in one page. `masked`: some lie behind the token."""
    here = column + tl.arange(0, block_n)
    seen = here <= position
    where = tl.load(table + column // page).to(tl.int64)
    inside = here - column // page * page
    key = vectors(latents + where * latent_page + inside * rank, rank, padded, seen, not masked)
    key_end = vectors(ropes + where * rope_page + inside * rope, rope, rope_padded, seen, not masked)
    factor: tl.constexpr = scale * 1.4426950408889634  # log2(e)
    if columns_first:
        score = product(key, tl.trans(asked), tl.zeros([block_n, asked.shape[0]], tl.float32))
        score = product(key_end, tl.trans(turned), score) * factor
        if masked:
            score = tl.where(seen[:, None], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 0))
        share = tl.exp2(score - higher[None, :])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(share, 0)
        acc = product(tl.trans(key), share.to(key.dtype), acc * fade[None, :])
    else:
        score = product(asked, tl.trans(key), tl.zeros([asked.shape[0], block_n], tl.float32))
        score = product(turned, tl.trans(key_end), score) * factor
        if masked:
            score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        share = tl.exp2(score - higher[:, None])
        fade = tl.exp2(most - higher)
        total = total * fade + tl.sum(share, 1)
        acc = product(share.to(key.dtype), key, acc * fade[:, None])
    return higher, total, acc


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["rows", "positions"])
def attend(
    asked, query, latents, ropes, rows, positions, table, part, sums, splits, query_row, query_head, latent_page, rope_page, table_stride,
    heads: tl.constexpr, plain: tl.constexpr, page: tl.constexpr, scale: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr,
    rope: tl.constexpr, rope_padded: tl.constexpr, least: tl.constexpr, spans: tl.constexpr, block_h: tl.constexpr, block_n: tl.constexpr,
    columns_first: tl.constexpr,
):  # fmt: skip
    """Some heads of one sequence over one span of columns: maximum, sum and weighted latents."""
    blocks: tl.constexpr = (heads + block_h - 1) // block_h
    sequence, split = tl.program_id(0) // blocks, tl.program_id(1)
    lane = tl.program_id(0) % blocks * block_h + tl.arange(0, block_h)
    position = tl.load(positions + sequence).to(tl.int32)
    span = _span(position, least, spans)
    begin = split * span
    if begin > position:
        return
    valid = lane < heads
    mine = asked + (sequence.to(tl.int64) * heads + lane) * rank
    left = vectors(mine, rank, padded, valid, heads % block_h == 0)
    turned = vectors(
        query + sequence.to(tl.int64) * query_row + lane * query_head + plain,
        rope,
        rope_padded,
        valid,
        heads % block_h == 0,
    )
    table += tl.load(rows + sequence).to(tl.int64) * table_stride
    most = tl.full([block_h], float("-inf"), tl.float32)
    total = tl.zeros([block_h], tl.float32)
    acc = tl.zeros([padded, block_h] if columns_first else [block_h, padded], tl.float32)
    end = tl.minimum(begin + span, position + 1)
    full = end // block_n * block_n
    for column in tl.range(begin, full, block_n):
        most, total, acc = _block(
            left, turned, latents, ropes, table, column, position, most, total, acc, latent_page, rope_page, page, scale, rank, padded, rope,
            rope_padded, block_n, columns_first, False,
        )  # fmt: skip
    if full < end:
        most, total, acc = _block(
            left, turned, latents, ropes, table, full, position, most, total, acc, latent_page, rope_page, page, scale, rank, padded, rope,
            rope_padded, block_n, columns_first, True,
        )  # fmt: skip
    cell = tl.arange(0, padded)
    if columns_first:
        acc = tl.trans(acc)
    place = (sequence.to(tl.int64) * splits + split) * heads + lane
    tl.store(sums + place * 2, most, mask=valid)
    tl.store(sums + place * 2 + 1, total, mask=valid)
    tl.store(part + place[:, None] * rank + cell[None, :], acc, mask=valid[:, None] & (cell[None, :] < rank))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions"])
def finish(
    part, sums, weight, positions, out, splits, heads: tl.constexpr, plain: tl.constexpr, width: tl.constexpr, features: tl.constexpr,
    rank: tl.constexpr, padded: tl.constexpr, least: tl.constexpr, spans: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Join the spans of one sequence and head, in their order, and make `block` elements of its values."""
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    position = tl.load(positions + sequence).to(tl.int32)
    count = position // _span(position, least, spans) + 1
    first = sequence.to(tl.int64) * splits * heads + head
    some, cell = tl.arange(0, AHEAD), tl.arange(0, padded)
    highest = tl.full([AHEAD], float("-inf"), tl.float32)
    for split in range(0, count, AHEAD):
        here = split + some
        highest = tl.maximum(
            highest, tl.load(sums + (first + here * heads) * 2, mask=here < count, other=float("-inf"))
        )
    most = tl.max(highest, 0)
    total = tl.zeros([AHEAD], tl.float32)
    acc = tl.zeros([padded], tl.float32)
    for split in range(0, count, AHEAD):
        here = split + some
        place = first + here * heads
        fade = tl.exp2(tl.load(sums + place * 2, mask=here < count, other=float("-inf")) - most)
        total += tl.load(sums + place * 2 + 1, mask=here < count, other=0.0) * fade
        inside = (here < count)[:, None] & (cell[None, :] < rank)
        parts = tl.load(part + place[:, None] * rank + cell[None, :], mask=inside, other=0.0)
        acc += tl.sum(parts * fade[:, None], 0)
    acc /= tl.sum(total, 0)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    there = weight + (head.to(tl.int64) * features + plain + feature[:, None]) * rank + cell[None, :]
    matrix = tl.load(there, mask=(feature[:, None] < width) & (cell[None, :] < rank), other=0.0).to(tl.float32)
    done = tl.sum(matrix * acc[None, :], 1)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + feature, done.to(out.dtype.element_ty), mask=feature < width)


def tiling(heads: int, dtype: torch.dtype, *, hopper: bool, large: bool) -> Tiling:
    """How a sequence's heads and columns are cut, by what a device has: Hopper's own products, much shared memory.

    Hopper's take 64 rows: heads, or columns where there are few heads. Others keep queries in registers, which hold 16 heads. Triton
    counts the look-up of a page as a stage before each stage of its block.
    """
    if dtype == torch.float32:  # no tensor cores: tiles live in registers
        return Tiling(16, 16, 4, 1)
    if hopper and heads > 32:
        return Tiling(64, 64, 8, 3)
    if hopper:
        return Tiling(16 if heads <= 16 else 32, 64, 4, 3, columns_first=True)
    return Tiling(16, 32, 8, 7 if large else 5)


def padded_to(width: int) -> int:
    """Elements of the vector that holds so many: a power of two, wide enough for tensor cores."""
    return max(_NARROWEST, int(triton.next_power_of_2(width)))


def value_block(heads: int, width: int) -> int:
    """Elements of a head's values that a program of `finish` makes: all, unless that leaves a GPU idle."""
    block = padded_to(width)
    while block > _NARROWEST and heads * padded_to(width) // block < 64:
        block //= 2
    return block


def decode_attention(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    table: Tensor,
    *,
    cut: Tiling | None = None,
    least: int = LEAST_SPAN,
    spans: int | None = None,
) -> Tensor:
    """Attention of one token a sequence over the columns up to its position.

    Args:
        query: `[B, Q, plain + rope]`, unit columns: of each head the part without positions, then the rotary one.
        kept: latents `[P, 1, N, rank]` and the keys' rotary parts `[P, 1, N, rope]`, pages of N columns, N a multiple of 64; contiguous.
        weight: `[Q * (plain + V), rank]`, contiguous: of each head what makes keys of latents, then what makes values.
        where: integer `[B]` each: which row of the table, and the token's position.
        scale: of the scores, more than 0.
        table: int32 `[R, m]` with unit columns, the pages of each row.
        cut: None: as `tiling` says.
        least: columns of a span at least, a multiple of 64.
        spans: of a sequence at most; None: as `spans_of` says.

    Returns:
        `[B, Q, V]`.
    """
    (rows, heads, asked_width), rank, features = query.shape, weight.shape[1], weight.shape[0] // query.shape[1]
    assert query.stride(2) == table.stride(1) == 1
    assert all(one.is_contiguous() for one in (*kept, weight))
    cut = cut or _tiling_on(query, heads)
    plain, positions = asked_width - kept[1].shape[3], where[1]
    padded, width = padded_to(rank), features - plain
    sizes = {"heads": heads, "plain": plain, "rank": rank}
    spread = {"padded": padded, "least": least, "spans": spans or spans_of(heads)}
    splits = min(spread["spans"], triton.cdiv(table.shape[1] * kept[0].shape[2], least))
    asked, out = query.new_empty(rows, heads, rank), query.new_empty(rows, heads, width)
    part = query.new_empty(rows, splits, heads, rank, dtype=torch.float32)
    sums = query.new_empty(rows, splits, heads, 2, dtype=torch.float32)
    block = min(64, padded)
    absorb[heads, triton.cdiv(rank, block), triton.cdiv(rows, ROWS.value)](
        query, weight, asked, rows, *query.stride()[:2], **sizes, padded=padded_to(plain), features=features, block=block, num_warps=4
    )  # fmt: skip
    _attend((asked, query, *kept, *where, table, part, sums), cut, {**sizes, **spread, "scale": scale})
    block = value_block(heads, width)
    finish[rows * heads, triton.cdiv(width, block)](
        part, sums, weight, positions, out, splits, **sizes, **spread, width=width, features=features, block=block,
        num_warps=8 if block > 32 else 4,
    )  # fmt: skip
    return out


def _attend(given: tuple[Tensor, ...], cut: Tiling, options: dict[str, Any]) -> None:
    """Launch `attend` with as many blocks in flight as the device has room for, which changes no bit."""
    _, query, latents, ropes, _, _, table, part, _ = given
    (rows, splits, heads, _), page, rope, stages = part.shape, latents.shape[2], ropes.shape[3], cut.stages
    assert page % GRAIN.value == GRAIN.value % cut.block_n == 0
    strides = *query.stride()[:2], latents.stride(0), ropes.stride(0), table.stride(0)
    while True:
        try:
            attend[rows * triton.cdiv(heads, cut.block_h), splits](
                *given, splits, *strides, **options, page=page, rope=rope, rope_padded=padded_to(rope), block_h=cut.block_h,
                block_n=cut.block_n, columns_first=cut.columns_first, num_warps=cut.warps, num_stages=stages,
            )  # fmt: skip
        except OutOfResources:
            if stages == 1:
                raise
            stages -= 1
        else:
            return


def _tiling_on(tensor: Tensor, heads: int) -> Tiling:
    """The tiling on a tensor's device."""
    if not tensor.is_cuda:
        return tiling(heads, tensor.dtype, hopper=False, large=True)
    properties: Any = torch.cuda.get_device_properties(tensor.device)  # torch's stubs lack the attribute
    large = int(properties.shared_memory_per_block_optin) >= _LARGE
    return tiling(heads, tensor.dtype, hopper=properties.major >= 9, large=large)
