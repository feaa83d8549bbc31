"""Attention of one token and RMS norm, one launch each: what the dense part of a decode step spends its time on.

Attention reads keys and values where they lie, in rows or in pages (no repetition over grouped heads), and no further than a
sequence is long. It is cut into spans of fixed size, so its bits depend neither on the columns a step is captured for nor on other
sequences. Twins of `kernels.dense_reference`. Must not know models and caches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.dense_reference import LEAST_HEADS, SPAN
from expertflow.kernels.device import starts_early
from expertflow.kernels.launching import launch

BLOCK = tl.constexpr(64)
AHEAD = tl.constexpr(64)
"""Spans that are read at once when they are joined."""
PIECE = 32
"""Elements of a head that a program joins."""
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _begin(table, sequence, column, row_stride, table_stride, page: tl.constexpr, width: tl.constexpr):
    """Elements from row or page 0 to where column 0 of a sequence would be, for a block that begins at `column` and lies in one page."""
    begin = sequence * row_stride
    if page > 0:
        begin = (
            tl.load(table + sequence * table_stride + column // page, cache_modifier=".cg").to(tl.int64) * row_stride
        )
        begin -= column // page * page * width
    return begin


@triton.jit
def keep(place, cell, most, total, acc, kept):
    """Store what a span gave."""
    tl.store(place, most, mask=kept)
    tl.store(place + 1, total, mask=kept)
    tl.store(place[:, None] + 2 + cell[None, :], acc, mask=kept[:, None])


@triton.jit
def _block(keys, values, begin, here, first, last, width: tl.constexpr):
    """Keys and values of columns `here`, `[BLOCK, width]`; 0 before column `first` and behind column `last`."""
    where = begin + here[:, None] * width + tl.arange(0, width)[None, :]
    mask = ((here >= first) & (here <= last))[:, None]
    key = tl.load(keys + where, mask=mask, other=0.0, cache_modifier=".cg")
    return key, tl.load(values + where, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def look(
    keys,
    values,
    table,
    sequence,
    column,
    first,
    position,
    end,
    row_stride,
    table_stride,
    page: tl.constexpr,
    width: tl.constexpr,
):
    """Keys and values of the first block that `walk` takes in, and where its second one begins."""
    begin = _begin(table, sequence, tl.minimum(column, position), row_stride, table_stride, page, width)
    key, value = _block(keys, values, begin, column + tl.arange(0, BLOCK), first, tl.minimum(end - 1, position), width)
    return (
        key,
        value,
        _begin(table, sequence, tl.minimum(column + BLOCK, position), row_stride, table_stride, page, width),
    )


@triton.jit
def walk(
    asked, keys, values, table, bias, own_key, own_value, ahead, most, total, acc, sequence, position, first, column, end, row_stride,
    table_stride, bias_stride, page: tl.constexpr, scale: tl.constexpr, groups: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    biased: tl.constexpr, fresh: tl.constexpr,
):  # fmt: skip
    """Take in the columns of one key head from `column` to `end - 1`, block by block: maximum, sum and weighted values.

    Queries are `[padded, width]`. Keys and values are the head's, from where column 0 of row or page 0 is; `bias` has a line a query.
    The token's own key and value are taken in place of what is kept, if they are `fresh`. `ahead` is what `look` gives.
    """
    lane, line = tl.arange(0, padded), tl.arange(0, BLOCK)
    next_key, next_value, begin = ahead
    while column < end:
        here, key, value = column + line, next_key, next_value
        seen = (here <= position) & (here >= first)
        # fetched a block ahead, and where that block lies two ahead, so that nothing need wait for it
        next_key, next_value = _block(keys, values, begin, here + BLOCK, first, tl.minimum(end - 1, position), width)
        begin = _begin(table, sequence, tl.minimum(column + 2 * BLOCK, position), row_stride, table_stride, page, width)
        if fresh:
            mine = (here == position)[:, None]
            key, value = tl.where(mine, own_key[None, :], key), tl.where(mine, own_value[None, :], value)
        left = asked
        if INTERPRETED:
            left, key, value = left.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
        score = tl.dot(left, tl.trans(key), input_precision="ieee") * scale
        if biased:
            far = bias + lane[:, None] * bias_stride + (position - here)[None, :]
            score += tl.load(far, mask=(lane[:, None] < groups) & seen[None, :], other=0.0).to(tl.float32)
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        share, fade = tl.exp(score - higher[:, None]), tl.exp(most - higher)
        total = total * fade + tl.sum(share, 1)
        acc = tl.dot(share.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
        most = higher
        column += BLOCK
    return most, total, acc


@triton.jit
def _attend(
    query, keys, values, rows, positions, table, sinks, bias, out, part, row_stride, head_stride, table_stride, bias_stride, splits,
    page: tl.constexpr, scale: tl.constexpr, groups: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
    span: tl.constexpr, window: tl.constexpr, sink: tl.constexpr, biased: tl.constexpr, single: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One sequence, one key head with its query heads, one span of columns: maximum, sum and weighted values."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    split = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    lane, cell = tl.arange(0, padded), tl.arange(0, width)
    mine = (row * kv_heads + head) * groups + lane
    asked = tl.load(query + mine[:, None] * width + cell[None, :], mask=lane[:, None] < groups, other=0.0)
    most = tl.full([padded], float("-inf"), tl.float32)
    total = tl.zeros([padded], tl.float32)
    acc = tl.zeros([padded, width], tl.float32)
    if sink:  # noqa: SIM102 - one is known to the compiler, the other to the device
        if split == 0:
            most = tl.load(sinks + head * groups + lane, mask=lane < groups, other=0.0).to(tl.float32)
            total += 1.0
    first = tl.maximum(position - window + 1, 0) if window > 0 else position * 0
    behind = (first // span + split) * span
    column = tl.maximum(behind, first // BLOCK * BLOCK)
    end = tl.minimum(behind + span, position + 1)
    kept = keys + head * head_stride, values + head * head_stride, table
    where = tl.load(rows + row).to(tl.int64), column, first, position, end
    ahead = look(*kept, *where, row_stride, table_stride, page, width)
    most, total, acc = walk(
        asked, *kept, bias + head * groups * bias_stride, asked, asked, ahead, most, total, acc, where[0], position, first, column, end,
        row_stride, table_stride, bias_stride, page, scale, groups, width, padded, biased, fresh=False,
    )  # fmt: skip
    if single:
        done = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + mine[:, None] * width + cell[None, :], done, mask=lane[:, None] < groups)
    else:
        place = part + ((tl.program_id(0).to(tl.int64) * splits + split) * padded + lane) * (width + 2)
        keep(place, cell, most, total, acc, (lane < groups) & (behind <= position))


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions"])
def join_spans(
    part, positions, out, splits, groups: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, piece: tl.constexpr,
    padded: tl.constexpr, span: tl.constexpr, window: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Add the spans of one query head of a sequence; a piece of the width. Every `AHEAD`-th span is summed first, then these sums.

    `splits` must not choose how a sum is shared among threads, because it goes by the columns that a step is captured for.
    """
    if early:
        gdc_launch_dependents()
        gdc_wait()
    pair, lane = tl.program_id(0) // groups, tl.program_id(0) % groups
    some, cell = tl.arange(0, AHEAD), tl.program_id(1) * piece + tl.arange(0, piece)
    position = tl.load(positions + pair // kv_heads).to(tl.int32)
    first = tl.maximum(position - window + 1, 0) if window > 0 else position * 0
    count = position // span - first // span + 1
    begin = part + (pair.to(tl.int64) * splits * padded + lane) * (width + 2)
    step: tl.constexpr = padded * (width + 2)
    highest = tl.full([AHEAD], float("-inf"), tl.float32)
    split = 0
    while split < count:
        here = split + some
        highest = tl.maximum(highest, tl.load(begin + here * step, mask=here < count, other=float("-inf")))
        split += AHEAD
    most = tl.max(highest, 0)
    total, acc = tl.zeros([AHEAD], tl.float32), tl.zeros([AHEAD, piece], tl.float32)
    split = 0
    while split < count:
        seen = split + some < count
        place = begin + (split + some) * step
        fade = tl.exp(tl.load(place, mask=seen, other=float("-inf")) - most)
        total += tl.load(place + 1, mask=seen, other=0.0) * fade
        acc += tl.load(place[:, None] + 2 + cell[None, :], mask=seen[:, None], other=0.0) * fade[:, None]
        split += AHEAD
    done = (tl.sum(acc, 0) / tl.sum(total, 0)).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(0) * width + cell, done)


def warps_of(width: int) -> int:
    """Warps of a program that attends: blocks of wide heads fill the registers of more."""
    return 4 if width <= 64 else 8 if width <= 128 else 16


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    table: Tensor | None = None,
) -> Tensor:
    """Attention of one token a sequence over the columns up to its position.

    Args:
        query: `[B, Q, D]` contiguous, D a power of two from 16 on.
        keys: `[R, G, N, D]`, any strides but unit columns; Q a multiple of G. With a table `[P, G, N, D]`, pages of N columns, N a
            multiple of 64.
        values: the same shape and strides.
        where: integer `[B]` each: which of the R rows, and the token's position there, less than N.
        scale: of the scores.
        window: columns seen, the token's own included; None: all.
        sinks: `[Q]`, a score a head gives to nothing; None: no such.
        bias: `[Q, M]` with unit columns, what is added to a score by how far back its column is, each less than M; None: nothing.
        table: int32 `[R, m]` with unit columns, the pages of each row; None: keys and values lie in rows.

    Returns:
        `[B, Q, D]`.
    """
    (rows, heads, width), (kv_heads, length) = query.shape, keys.shape[1:3]
    page = 0
    if table is not None:
        assert length % BLOCK.value == 0
        page, length = length, length * table.shape[1]
    row, position = where
    assert query.is_contiguous()
    assert keys.stride() == values.stride()
    assert keys.stride()[2:] == (width, 1)
    assert bias is None or bias.stride(1) == 1
    groups, splits = heads // kv_heads, triton.cdiv(length, SPAN)
    if window:  # spans that one token's window reaches into
        splits = min(splits, (window - 2) // SPAN + 2)
    padded, early = max(LEAST_HEADS, int(triton.next_power_of_2(groups))), starts_early(query)
    out = torch.empty_like(query)
    part = query.new_empty((rows * kv_heads, splits, padded, width + 2) if splits > 1 else (1,), dtype=torch.float32)
    _attend[(rows * kv_heads, splits)](
        query, keys, values, row, position, row if table is None else table, query if sinks is None else sinks,
        query if bias is None else bias, out, part, keys.stride(0), keys.stride(1), 0 if table is None else table.stride(0),
        0 if bias is None else bias.stride(0), splits, page=page, scale=scale, groups=groups, kv_heads=kv_heads, width=width, padded=padded, span=SPAN, window=window or 0, sink=sinks is not None,
        biased=bias is not None, single=splits == 1, early=early, num_warps=warps_of(width), launch_pdl=early,
    )  # fmt: skip
    if splits > 1:
        piece = min(width, PIECE)
        join_spans[(rows * heads, width // piece)](
            part, position, out, splits, groups=groups, kv_heads=kv_heads, width=width, piece=piece, padded=padded, span=SPAN,
            window=window or 0, early=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out


@triton.jit
def _rms_norm(
    states, weight, out, width, stride, eps: tl.constexpr, padded: tl.constexpr, wide: tl.constexpr, early: tl.constexpr
):
    """One row."""
    cell, row = tl.arange(0, padded), tl.program_id(0).to(tl.int64)
    if early:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(states + row * stride + cell, mask=cell < width, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    w = tl.load(weight + cell, mask=cell < width, other=0.0).to(tl.float32)
    if not wide:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + cell, (y * w).to(out.dtype.element_ty), mask=cell < width)


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, wide: bool) -> Tensor:
    """`states / rms(states) * weight` over the last dimension, the norm in float32.

    Args:
        states: `[..., H]`.
        weight: `[H]`.
        eps: added to the mean square.
        wide: multiply by the weight before rounding (GPT-OSS) instead of after (Llama and most others).
    """
    width = states.shape[-1]
    if states.ndim > 2 or states.stride(-1) != 1:
        states = states.contiguous()
    stride, out = width if states.ndim != 2 else states.stride(0), states.new_empty(states.shape)
    padded, early = int(triton.next_power_of_2(width)), starts_early(states)
    launch(
        _rms_norm, (states.numel() // width,), (states, weight, out, width, stride), eps=eps, padded=padded, wide=wide, early=early, num_warps=max(1, min(8, padded // 256)),
        launch_pdl=early,
    )  # fmt: skip
    return out
