"""Attention of passes over prompts: memory linear in length, one launch.

The query heads that share a key head are rows of one tile, so keys and values are read once for all of them. Columns are read in blocks
that begin at multiples of one size, and which tokens are in a tile enters no sum. So the bits of a token depend on its sequence
alone, not on how a prompt is cut into passes. Twin of `kernels.dense_reference.prompt_attention`. Must not know models and caches; how
keys and values lie is known to `at` alone.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertflow.kernels.launching import launch_within

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_NARROWEST = 16
"""Width of the narrowest tensor-core product."""
_LOG2E = tl.constexpr(1 / math.log(2))


class Tiling(NamedTuple):
    """Rows of queries and columns of a tile, warps, and blocks in flight. Only `block_n` enters the arithmetic."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@triton.jit
def at(rows, table, table_stride, sequence, column, here, row_stride, column_stride, page: tl.constexpr):
    """Elements from a head's first one in row or page 0 to columns `here` of a sequence, a block that begins at `column`.

    With pages a block lies in one of them.
    """
    row = tl.load(rows + sequence).to(tl.int64)
    if page > 0:
        row = tl.load(table + row * table_stride + column // page).to(tl.int64)
        here -= column // page * page
    return row * row_stride + here.to(tl.int64) * column_stride


@triton.jit
def _tile(pointers, begin: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, inside, whole: tl.constexpr):
    """Part of some vectors, `[N, padded]`: elements from `begin` to `width`, zeros behind them and where not `inside`."""
    cell = begin + tl.arange(0, padded)
    if whole and begin + padded == width:
        return tl.load(pointers[:, None] + cell[None, :])
    return tl.load(pointers[:, None] + cell[None, :], mask=inside[:, None] & (cell[None, :] < width), other=0.0)


@triton.jit
def _product(left, right, acc):
    """`acc + left @ right`, added in float32."""
    if INTERPRETED:  # it multiplies no bfloat16
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _block(
    query, query_end, keys, values, rows, table, table_stride, sequence, column, end, position, most, total, acc, key_row, key_column, value_row, value_column,
    page: tl.constexpr, scale: tl.constexpr, cap: tl.constexpr, window: tl.constexpr, key_width: tl.constexpr, wide: tl.constexpr,
    tail: tl.constexpr, value_width: tl.constexpr, padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Take in one block of columns: a tile's maximum, sum and weighted values. `masked`: not every row sees every column."""
    here = column + tl.arange(0, block_n)
    inside = here < end
    pointers = keys + at(rows, table, table_stride, sequence, column, here, key_row, key_column, page)
    key = _tile(pointers, 0, key_width, wide, inside, not masked)
    score = _product(query, tl.trans(key), tl.zeros([block_m, block_n], tl.float32))
    if tail > 0:
        key_end = _tile(pointers, wide, key_width, tail, inside, not masked)
        score = _product(query_end, tl.trans(key_end), score)
    if cap > 0:
        score = 1 - 2 / (tl.exp(score * (2 * scale / cap)) + 1)  # tanh
    if masked:
        seen = here[None, :] <= position[:, None]
        if window > 0:
            seen &= here[None, :] > position[:, None] - window
        score = tl.where(seen, score, float("-inf"))
    factor: tl.constexpr = (cap if cap > 0 else scale) * _LOG2E
    higher = tl.maximum(most, tl.max(score, 1) * factor)
    base = higher
    if masked:  # a row that has seen nothing yet
        base = tl.where(higher == float("-inf"), 0.0, higher)
    share = tl.exp2(score * factor - base[:, None])
    fade = tl.exp2(most - base)
    total = total * fade + tl.sum(share, 1)
    pointers = values + at(rows, table, table_stride, sequence, column, here, value_row, value_column, page)
    value = _tile(pointers, 0, value_width, padded, inside, not masked)
    acc = _product(share.to(value.dtype), value, acc * fade[:, None])
    return higher, total, acc


# many parameters: three strides a tensor, and a width in parts
@triton.jit(do_not_specialize=["tokens", "lasts_stride"], do_not_specialize_on_alignment=["rows", "lasts", "pieces"])
def attend(
    query, keys, values, rows, lasts, pieces, table, sinks, out, tokens, query_batch, query_head, query_token, key_row, key_head, key_column, value_row,
    value_head, value_column, lasts_stride, table_stride, page: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, scale: tl.constexpr, cap: tl.constexpr,
    window: tl.constexpr, sink: tl.constexpr, key_width: tl.constexpr, wide: tl.constexpr, tail: tl.constexpr, value_width: tl.constexpr,
    padded: tl.constexpr, block_m: tl.constexpr, block_n: tl.constexpr, joined: tl.constexpr,
):  # fmt: skip
    """Some tokens of a sequence, all query heads of one key head. Programs with the most columns come first."""
    head, sequence = tl.program_id(0), tl.program_id(2)
    block, start = tl.num_programs(1) - 1 - tl.program_id(1), sequence.to(tl.int64) * tokens
    if joined:
        start = tl.load(pieces + sequence).to(tl.int64)
        tokens = tl.load(pieces + tl.num_programs(2) + sequence).to(tl.int32)
        block = tl.cdiv(tokens * groups, block_m) - 1 - tl.program_id(1)
        query += start * query_token
        if block < 0:  # a shorter piece than the longest has fewer blocks
            return
    begin = block * block_m
    place = begin + tl.arange(0, block_m)
    token, lane = place // groups, head * groups + place % groups
    valid = token < tokens
    first = tl.load(lasts + sequence * lasts_stride).to(tl.int32) - (tokens - 1)
    position = first + token
    earliest = first + begin // groups
    latest = first + tl.minimum(tokens - 1, (begin + block_m - 1) // groups)
    asked = query + token.to(tl.int64) * query_token + lane.to(tl.int64) * query_head
    if not joined:
        asked += sequence.to(tl.int64) * query_batch
    mine = _tile(asked, 0, key_width, wide, valid, False)
    mine_end = mine
    if tail > 0:
        mine_end = _tile(asked, wide, key_width, tail, valid, False)
    most = tl.full([block_m], float("-inf"), tl.float32)
    total = tl.zeros([block_m], tl.float32)
    acc = tl.zeros([block_m, padded], tl.float32)
    if sink:
        most = tl.load(sinks + lane, mask=valid, other=0.0).to(tl.float32) * _LOG2E
        total += 1.0
    keys += head.to(tl.int64) * key_head
    values += head.to(tl.int64) * value_head
    end = latest + 1
    cut = 0
    if window > 0:
        cut = tl.maximum(earliest - window + 1, 0) // block_n * block_n
    else:
        full = tl.maximum(earliest + 1, 0) // block_n * block_n
        for column in tl.range(0, full, block_n):
            most, total, acc = _block(
                mine, mine_end, keys, values, rows, table, table_stride, sequence, column, end, position, most, total, acc, key_row, key_column, value_row,
                value_column, page, scale, cap, window, key_width, wide, tail, value_width, padded, block_m, block_n, False,
            )  # fmt: skip
        cut = full
    for column in tl.range(cut, end, block_n):
        most, total, acc = _block(
            mine, mine_end, keys, values, rows, table, table_stride, sequence, column, end, position, most, total, acc, key_row, key_column, value_row,
            value_column, page, scale, cap, window, key_width, wide, tail, value_width, padded, block_m, block_n, True,
        )  # fmt: skip
    done = acc / tl.where(total == 0, 1.0, total)[:, None]
    cell = tl.arange(0, padded)
    result = out + ((start + token) * heads + lane) * value_width
    inside = valid[:, None] & (cell[None, :] < value_width)
    tl.store(result[:, None] + cell[None, :], done.to(out.dtype.element_ty), mask=inside)


def tiling(key_width: int, value_width: int, dtype: torch.dtype, *, paged: bool = False) -> Tiling:
    """How a pass is cut. `block_n` depends on the model alone, because it enters the arithmetic."""
    cut = _tiling(max(key_width, value_width), dtype)
    # Triton counts the look-up of a page as a stage before each stage of its block: so as many blocks are in flight as without
    return cut._replace(stages=2 * cut.stages - 1) if paged else cut


def _tiling(widest: int, dtype: torch.dtype) -> Tiling:
    if dtype == torch.float32:  # no tensor cores: tiles live in registers
        return Tiling(32 if widest <= 64 else 16, 32, 4, 1)
    if widest <= 64:
        return Tiling(128, 64, 8, 3)
    return Tiling(128, 64, 8, 2) if widest <= 256 else Tiling(64, 32, 8, 1)


def parts(key_width: int, value_width: int) -> dict[str, int]:
    """Widths as the kernel takes them: keys in two parts, because its vectors are powers of two; values in one."""
    wide = max(_NARROWEST, 1 << key_width.bit_length() - 1)
    tail = max(_NARROWEST, triton.next_power_of_2(key_width - wide)) if key_width > wide else 0
    padded = max(_NARROWEST, triton.next_power_of_2(value_width))
    return {"key_width": key_width, "wide": wide, "tail": tail, "value_width": value_width, "padded": padded}


def prompt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    window: int | None = None,
    *,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    cut: Tiling | None = None,
    table: Tensor | None = None,
    pieces: tuple[Tensor, int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the last C tokens of each of B sequences over the columns up to each token's position.

    Args:
        query: `[B, Q, C, D]`, any strides but unit columns. A token's position is its sequence's last one's minus the tokens between
            them; tokens before position 0 are padding and get zeros.
        keys: `[R, G, N, D]`, any strides but unit columns; Q a multiple of G.
        values: `[R, G, N, V]`, likewise.
        where: integer `[B]` each: which of the R rows, and the position there of the sequence's last token, less than N.
        scale: of the scores, more than 0.
        window: columns seen, the token's own included; None: all.
        sinks: `[Q]`, a score a head gives to nothing; None: no such.
        softcap: scores are `softcap * tanh(score / softcap)`; None: as they are.
        cut: None: as `tiling` says.
        table: int32 `[R, m]` with unit columns, the pages of each row: keys and values are `[P, G, N, D]`, pages of N columns, N a multiple
            of 64; None: they lie in rows.
        pieces: int64 `[2, B]`, contiguous, first token and number of tokens of each sequence, and the longest's number: their tokens
            follow one another in a query of `[1, Q, T, D]`; None: all have C.
        out: heads of a contiguous tensor to write and return; None: a new one.

    Returns:
        `[B, C, Q, V]`; with pieces `[1, T, Q, V]`.
    """
    (batch, heads, tokens, width), (kv_heads, value_width) = query.shape, (keys.shape[1], values.shape[3])
    (rows, lasts), (bounds, longest), groups = where, pieces or (where[0], tokens), heads // kv_heads
    assert query.stride(3) == keys.stride(3) == values.stride(3) == 1
    assert rows.is_contiguous() and bounds.is_contiguous() and scale > 0  # noqa: PT018
    cut = cut or tiling(width, value_width, query.dtype, paged=table is not None)
    assert table is None or keys.shape[2] % cut.block_n == 0
    out = query.new_empty(batch, tokens, heads, value_width) if out is None else out
    given = (
        query, keys, values, rows, lasts, bounds, rows if table is None else table, query if sinks is None else sinks, out, tokens,
        *query.stride()[:3], *keys.stride()[:3], *values.stride()[:3], lasts.stride(0), 0 if table is None else table.stride(0),
    )  # fmt: skip
    launch_within(
        attend, (kv_heads, triton.cdiv(longest * groups, cut.block_m), len(rows)), given, cut.stages, page=0 if table is None else keys.shape[2],
        heads=out.stride(1) // value_width, groups=groups, scale=scale, cap=softcap or 0.0, window=window or 0, sink=sinks is not None,
        joined=pieces is not None, block_m=cut.block_m, block_n=cut.block_n, num_warps=cut.warps, **parts(width, value_width),
    )  # fmt: skip
    return out
