"""Latent attention of one token a sequence, straight from pages: four launches a layer, and no key or value is made.

`multiply` brings each head's query to the latents. `attend` scores latents and adds them up: all heads of a sequence share them, so
each latent is read once for up to 64 of them. `join` joins what the spans of a sequence gave, and `multiply` makes each head's values of
it. How long a span is depends on the sequence's length alone, so neither the columns that a step is captured for nor other
sequences change a bit. Twin of `kernels.latent.reference`. Must not know models and caches.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.errors import OutOfResources

from expertflow.kernels.device import starts_early
from expertflow.kernels.latent.reference import spans_of

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
GRAIN = tl.constexpr(64)
"""Spans are multiples of so many columns."""
ROWS = tl.constexpr(16)
"""Sequences of a tile of `multiply`: the narrowest tensor-core product."""
AHEAD = tl.constexpr(16)
"""Spans that `join` reads at once."""
_NARROWEST, _WIDEST, _DEPTH = 16, 64, 128
"""Elements of a tile of `multiply` and `join` at least and at most, and of heads' vectors that `multiply` takes in at once."""
_PROGRAMS = 128
"""Programs that it has at least, where there is work for them."""
_LARGE = 160 << 10
"""Shared memory of a program on data-centre GPUs, at least."""


class Tiling(NamedTuple):
    """Heads and columns of a tile of `attend`, warps, and blocks in flight."""

    block_h: int
    block_n: int
    warps: int
    stages: int


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
def times(
    mine, inside, matrix, cell, across: tl.constexpr, depth: tl.constexpr, width: tl.constexpr, chunk: tl.constexpr, early: tl.constexpr
):  # fmt: skip
    """Vectors that begin at `mine`, `[ROWS, depth]`, times columns `cell` of a matrix, where they are `inside`.

    The first lines of the matrix are asked for before the kernel that makes the vectors has ended.
    """
    some = tl.arange(0, chunk)
    ahead = tl.load(matrix + some[:, None] * across, mask=(some[:, None] < depth) & (cell[None, :] < width), other=0.0)
    if early:
        gdc_wait()
    vector = tl.load(mine + some[None, :], mask=inside & (some[None, :] < depth), other=0.0)
    acc = product(vector, ahead, tl.zeros([ROWS, cell.shape[0]], tl.float32))
    for begin in tl.range(chunk, depth, chunk):
        lane = begin + some
        vector = tl.load(mine + lane[None, :], mask=inside & (lane[None, :] < depth), other=0.0)
        part = tl.load(
            matrix + lane[:, None] * across, mask=(lane[:, None] < depth) & (cell[None, :] < width), other=0.0
        )
        acc = product(vector, part, acc)
    return acc


@triton.jit(do_not_specialize=["count"])
def multiply(
    left, weight, out, count, left_row, left_head, heads: tl.constexpr, across: tl.constexpr, along: tl.constexpr, features: tl.constexpr,
    rank: tl.constexpr, first: tl.constexpr, depth: tl.constexpr, width: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """Vectors of one head, `[B, depth]`, times its part of the weight from row `first` on, to `block` elements of `[B, Q, width]`.

    `across` and `along` are the strides of the weight by elements of the vectors and of what is made.
    """
    if early:
        gdc_launch_dependents()
    head = tl.program_id(0)
    row, cell = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * block + tl.arange(0, block)
    inside = (row < count)[:, None]
    mine = left + row.to(tl.int64)[:, None] * left_row + head * left_head
    matrix = weight + (head.to(tl.int64) * features + first) * rank + cell[None, :] * along
    acc = times(mine, inside, matrix, cell, across, depth, width, chunk, early)
    place = out + (row.to(tl.int64)[:, None] * heads + head) * width + cell[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside & (cell[None, :] < width))


@triton.jit
def _block(
    asked, turned, latents, ropes, table, column, position, most, total, acc, latent_page, rope_page, page: tl.constexpr, scale: tl.constexpr,
    rank: tl.constexpr, padded: tl.constexpr, rope: tl.constexpr, rope_padded: tl.constexpr, block_n: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Take in one block of columns, which lies in one page. `masked`: some lie behind the token."""
    here = column + tl.arange(0, block_n)
    seen = here <= position
    where = tl.load(table + column // page).to(tl.int64)
    inside = here - column // page * page
    key = vectors(latents + where * latent_page + inside * rank, rank, padded, seen, not masked)
    key_end = vectors(ropes + where * rope_page + inside * rope, rope, rope_padded, seen, not masked)
    score = product(asked, tl.trans(key), tl.zeros([asked.shape[0], block_n], tl.float32))
    score = product(turned, tl.trans(key_end), score) * (scale * 1.4426950408889634)  # log2(e)
    if masked:
        score = tl.where(seen[None, :], score, float("-inf"))
    higher = tl.maximum(most, tl.max(score, 1))
    share = tl.exp2(score - higher[:, None])
    fade = tl.exp2(most - higher)
    total = total * fade + tl.sum(share, 1)
    return higher, total, product(share.to(key.dtype), key, acc * fade[:, None])


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["rows", "positions"])
def attend(
    asked, query, latents, ropes, rows, positions, table, part, sums, splits, query_row, query_head, latent_page, rope_page, table_stride,
    heads: tl.constexpr, plain: tl.constexpr, page: tl.constexpr, scale: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr,
    rope: tl.constexpr, rope_padded: tl.constexpr, least: tl.constexpr, spans: tl.constexpr, block_h: tl.constexpr, block_n: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """Some heads of one sequence over one span of columns: maximum, sum and weighted latents."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
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
    acc = tl.zeros([block_h, padded], tl.float32)
    end = tl.minimum(begin + span, position + 1)
    full = end // block_n * block_n
    for column in tl.range(begin, full, block_n):
        most, total, acc = _block(
            left, turned, latents, ropes, table, column, position, most, total, acc, latent_page, rope_page, page, scale, rank, padded, rope,
            rope_padded, block_n, False,
        )  # fmt: skip
    if full < end:
        most, total, acc = _block(
            left, turned, latents, ropes, table, full, position, most, total, acc, latent_page, rope_page, page, scale, rank, padded, rope,
            rope_padded, block_n, True,
        )  # fmt: skip
    cell = tl.arange(0, padded)
    place = (sequence.to(tl.int64) * splits + split) * heads + lane
    tl.store(sums + place, most + tl.log2(total), mask=valid)
    done = (acc / total[:, None]).to(part.dtype.element_ty)
    tl.store(part + place[:, None] * rank + cell[None, :], done, mask=valid[:, None] & (cell[None, :] < rank))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions"])
def join(
    part, sums, positions, out, splits, heads: tl.constexpr, rank: tl.constexpr, least: tl.constexpr, spans: tl.constexpr, block: tl.constexpr,
    early: tl.constexpr,
):  # fmt: skip
    """Add the spans of one sequence and head by their weights, in their order: `block` elements."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    sequence, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    position = tl.load(positions + sequence).to(tl.int32)
    count = position // _span(position, least, spans) + 1
    first = sequence.to(tl.int64) * splits * heads + head
    some, cell = tl.arange(0, AHEAD), tl.program_id(1) * block + tl.arange(0, block)
    highest = tl.full([AHEAD], float("-inf"), tl.float32)
    for split in range(0, count, AHEAD):
        here = split + some
        highest = tl.maximum(highest, tl.load(sums + first + here * heads, mask=here < count, other=float("-inf")))
    most = tl.max(highest, 0)
    total = tl.zeros([AHEAD], tl.float32)
    acc = tl.zeros([block], tl.float32)
    for split in range(0, count, AHEAD):
        here = split + some
        place = first + here * heads
        share = tl.exp2(tl.load(sums + place, mask=here < count, other=float("-inf")) - most)
        total += share
        inside = (here < count)[:, None] & (cell[None, :] < rank)
        parts = tl.load(part + place[:, None] * rank + cell[None, :], mask=inside, other=0.0)
        acc += tl.sum(parts.to(tl.float32) * share[:, None], 0)
    done = (acc / tl.sum(total, 0)).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(0).to(tl.int64) * rank + cell, done, mask=cell < rank)


def tiling(heads: int, dtype: torch.dtype, *, hopper: bool, large: bool) -> Tiling:
    """How a sequence's heads and columns are cut, by what a device has: Hopper's own products, much shared memory.

    Other products keep queries in registers, which hold 16 heads. Triton counts the look-up of a page as a stage before each stage of
    its block, and asks for a block behind the products of an iteration: with fewer than five stages nothing is under way meanwhile.
    """
    if dtype == torch.float32:  # no tensor cores: tiles live in registers
        return Tiling(16, 16, 4, 1)
    if hopper:
        return Tiling(64, 32, 8, 5) if heads > 32 else Tiling(16, 64, 8, 5)
    return Tiling(16, 32, 8, 7 if large else 5)


def padded_to(width: int) -> int:
    """Elements of the vector that holds so many: a power of two, wide enough for tensor cores."""
    return max(_NARROWEST, int(triton.next_power_of_2(width)))


def chunk_of(depth: int) -> int:
    """Elements of heads' vectors that `times` takes in at once."""
    return min(_DEPTH, padded_to(depth))


def block_of(heads: int, width: int) -> int:
    """Elements of a head's vector that a program makes: few, where there are few heads. Depends on the model alone."""
    block = min(_WIDEST, padded_to(width))
    while block > _NARROWEST and heads * triton.cdiv(width, block) < _PROGRAMS:
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
    spans: tuple[int, int] | None = None,
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
        spans: columns of a span at least, a multiple of 64, and spans of a sequence at most; None: as `spans_of` says.

    Returns:
        `[B, Q, V]`.
    """
    (rows, heads, asked_width), rank = query.shape, weight.shape[1]
    assert query.stride(2) == 1
    plain, asked = asked_width - kept[1].shape[3], query.new_empty(rows, heads, rank)
    _multiply(query, weight, asked, (0, plain), (rank, 1))
    return over_latents((asked, query), plain, kept, weight, where, scale, table, cut=cut, spans=spans)


def over_latents(
    queries: tuple[Tensor, Tensor],
    plain: int,
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    table: Tensor,
    *,
    cut: Tiling | None = None,
    spans: tuple[int, int] | None = None,
) -> Tensor:
    """What follows in `decode_attention` once queries were brought to the latents.

    Args:
        queries: that, `[B, Q, rank]`, which is overwritten; and queries whose last elements are the rotary part.
        plain: elements of a head that are made of latents for its keys.
        kept: as of `decode_attention`, and so are all others.
        weight: likewise.
        where: likewise.
        scale: likewise.
        table: likewise.
        cut: likewise.
        spans: likewise.
    """
    (asked, query), (rows, heads, rank), features = queries, queries[0].shape, len(weight) // queries[0].shape[1]
    assert table.stride(1) == 1
    assert all(one.is_contiguous() for one in (asked, *kept, weight))
    cut, (least, most) = cut or _tiling_on(query, heads), spans or spans_of(heads)
    splits, out = (
        min(most, triton.cdiv(table.shape[1] * kept[0].shape[2], least)),
        query.new_empty(rows, heads, features - plain),
    )
    part = query.new_empty(rows, splits, heads, rank)
    sums, early = query.new_empty(rows, splits, heads, dtype=torch.float32), starts_early(query)
    spread = {"heads": heads, "rank": rank, "least": least, "spans": most}
    before = query.shape[2] - kept[1].shape[3]
    _attend((asked, query, *kept, *where, table, part, sums), cut, {**spread, "plain": before, "scale": scale})
    block = block_of(heads, rank)
    join[rows * heads, triton.cdiv(rank, block)](
        part, sums, where[1], asked, splits, **spread, block=block, early=early, num_warps=4, launch_pdl=early
    )
    _multiply(asked, weight, out, (plain, rank), (1, rank))
    return out


def _multiply(left: Tensor, weight: Tensor, out: Tensor, part: tuple[int, int], strides: tuple[int, int]) -> None:
    """Launch `multiply`: from which row of a head's weight on, how many elements of `left`, and the weight's strides."""
    (rows, heads, width), rank, block = out.shape, weight.shape[1], block_of(out.shape[1], out.shape[2])
    early = starts_early(left)
    multiply[heads, triton.cdiv(width, block), triton.cdiv(rows, ROWS.value)](
        left, weight, out, rows, *left.stride()[:2], heads=heads, across=strides[0], along=strides[1], features=weight.shape[0] // heads,
        rank=rank, first=part[0], depth=part[1], width=width, chunk=chunk_of(part[1]), block=block, early=early, num_warps=4, num_stages=3,
        launch_pdl=early,
    )  # fmt: skip


def _attend(given: tuple[Tensor, ...], cut: Tiling, options: dict[str, Any]) -> None:
    """Launch `attend` with as many blocks in flight as the device has room for, which changes no bit."""
    _, query, latents, ropes, _, _, table, part, _ = given
    (rows, splits, heads, rank), page, rope, stages = part.shape, latents.shape[2], ropes.shape[3], cut.stages
    assert page % GRAIN.value == GRAIN.value % cut.block_n == 0
    strides, early = (*query.stride()[:2], latents.stride(0), ropes.stride(0), table.stride(0)), starts_early(query)
    while True:
        try:
            attend[rows * triton.cdiv(heads, cut.block_h), splits](
                *given, splits, *strides, **options, page=page, padded=padded_to(rank), rope=rope, rope_padded=padded_to(rope), block_h=cut.block_h,
                block_n=cut.block_n, early=early, num_warps=cut.warps, num_stages=stages, launch_pdl=early,
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
