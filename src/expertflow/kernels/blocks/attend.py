"""Attention of one token a sequence, from the product of queries, keys and values on: norms, rotation, keys and values into their pages.

Twin of `reference.attend`; one launch, and one more where a sequence may be longer than a span of columns. A program norms and turns the
queries of one key head, and the token's key and value, which it takes from its registers: only the one whose span they are in keeps them.
So nothing waits for them. Bits are those of `decode_attention` behind `rotate`. Must not know modules.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.blocks.given import Cells, Heads, Norm, Rotary, Seen
from expertflow.kernels.dense import BLOCK, PIECE, join_spans, keep, look, walk, warps_of
from expertflow.kernels.dense_reference import LEAST_HEADS, SPAN
from expertflow.kernels.device import starts_early


@triton.jit
def head_root(begin, count: tl.constexpr, padded: tl.constexpr, eps: tl.constexpr):
    """One by the root mean square of `count` elements from `begin` on."""
    cell = tl.arange(0, padded)
    x = tl.load(begin + cell, mask=cell < count, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / count + eps)


@triton.jit
def turned(
    begin, cell, inside, cos, sin, step, gains, root, eps: tl.constexpr, width: tl.constexpr, half: tl.constexpr, doubled: tl.constexpr,
    woven: tl.constexpr, normed: tl.constexpr, whole: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Heads that begin at `begin` `[N, 1]`, elements `cell` `[1, width]`, normed and turned by angles that begin at `cos` and `sin`, and are `step` apart.

    `gains` begin at each head's, `[N, 1]` or one for all. `whole`: all heads together have the norm, whose `root` is given.
    """
    dtype: tl.constexpr = begin.dtype.element_ty
    leads = cell % 2 == 0 if woven else cell < half
    away = 1 if woven else half
    other = tl.where(cell < 2 * half, tl.where(leads, cell + away, cell - away), cell)
    x = tl.load(begin + cell, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(begin + other, mask=inside, other=0.0).to(tl.float32)
    if normed:
        if not whole:
            root = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        x, y = x * root, y * root
        if not wide:
            x, y = x.to(dtype).to(tl.float32), y.to(dtype).to(tl.float32)
        if whole:
            x_gains, y_gains = (
                tl.load(gains + cell, mask=inside, other=0.0),
                tl.load(gains + other, mask=inside, other=0.0),
            )
        else:
            x_gains, y_gains = tl.load(gains + cell), tl.load(gains + other)
        x = (x * x_gains.to(tl.float32)).to(dtype).to(tl.float32)
        y = (y * y_gains.to(tl.float32)).to(dtype).to(tl.float32)
    angle = cell // 2 if woven else cell if doubled else cell % half
    c = tl.load(cos + angle * step, mask=cell < 2 * half, other=1.0).to(tl.float32)
    s = tl.load(sin + angle * step, mask=cell < 2 * half, other=0.0).to(tl.float32)
    return (x * c + tl.where(leads, -y, y) * s).to(dtype)


# many parameters: a launch does the work of four
@triton.jit(do_not_specialize_on_alignment=["pages", "places", "rows", "positions", "table"])
def _attend_joined(
    joined, cos, sin, query_gains, key_gains, keys, values, pages, places, rows, positions, table, sinks, out, part, angle_stride,
    page_stride, head_stride, table_stride, splits, page: tl.constexpr, scale: tl.constexpr, eps: tl.constexpr, groups: tl.constexpr,
    kv_heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, half: tl.constexpr, doubled: tl.constexpr, woven: tl.constexpr,
    normed: tl.constexpr, whole: tl.constexpr, query_padded: tl.constexpr, key_padded: tl.constexpr, wide: tl.constexpr, span: tl.constexpr, window: tl.constexpr, sink: tl.constexpr, single: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One sequence, one key head with its query heads, one span of columns: maximum, sum and weighted values."""
    if early:
        gdc_launch_dependents()
    row, head, split = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads, tl.program_id(1)
    lane, one, cell = tl.arange(0, padded), tl.arange(0, 1), tl.arange(0, width)
    # what was there before this step began is read before the kernel that makes the queries has ended; past the L1, which may be older
    position = tl.load(positions + row, cache_modifier=".cg").to(tl.int32)
    sequence = tl.load(rows + row, cache_modifier=".cg").to(tl.int64)
    first = tl.maximum(position - window + 1, 0) if window > 0 else position * 0
    behind = (first // span + split) * span
    column, end = tl.maximum(behind, first // BLOCK * BLOCK), tl.minimum(behind + span, position + 1)
    kept = keys + head * head_stride, values + head * head_stride, table
    ahead = look(*kept, sequence, column, first, position, end, page_stride, table_stride, page, width)
    if early:
        gdc_wait()
    begin = joined + row * (groups + 2) * kv_heads * width
    cos, sin = cos + row * angle_stride, sin + row * angle_stride
    query_root, key_root, own_gains, own_key_gains = 0.0, 0.0, query_gains, key_gains
    if whole:  # every program norms by all heads: that is cheaper than to wait for one that does
        query_root = head_root(begin, groups * kv_heads * width, query_padded, eps)
        key_root = head_root(begin + groups * kv_heads * width, kv_heads * width, key_padded, eps)
        own_gains = query_gains + (head * groups + lane[:, None]) * width
        own_key_gains = key_gains + (head + one[:, None]) * width
    asked = turned(
        begin + (head * groups + lane[:, None]) * width, cell[None, :], (lane < groups)[:, None], cos, sin, 1, own_gains, query_root, eps,
        width, half, doubled, woven, normed, whole, wide,
    )  # fmt: skip
    key = tl.sum(turned(
        begin + (groups * kv_heads + head + one[:, None]) * width, cell[None, :], (one < 1)[:, None], cos, sin, 1, own_key_gains, key_root, eps,
        width, half, doubled, woven, normed, whole, wide,
    ), 0)  # fmt: skip
    value = tl.load(begin + ((groups + 1) * kv_heads + head) * width + cell)
    most = tl.full([padded], float("-inf"), tl.float32)
    total = tl.zeros([padded], tl.float32)
    if sink:  # noqa: SIM102 - one is known to the compiler, the other to the device
        if split == 0:
            most = tl.load(sinks + head * groups + lane, mask=lane < groups, other=0.0).to(tl.float32)
            total += 1.0
    if (behind <= position) & (position < behind + span):
        place = tl.load(pages + row) * page_stride + head * head_stride + tl.load(places + row) * width
        tl.store(keys + place + cell, key)
        tl.store(values + place + cell, value)
    most, total, acc = walk(
        asked, *kept, sinks, key, value, ahead, most, total, tl.zeros([padded, width], tl.float32), sequence, position, first, column, end,
        page_stride, table_stride, 0, page, scale, groups, width, padded, biased=False, fresh=True,
    )  # fmt: skip
    if single:
        done = (acc / total[:, None]).to(out.dtype.element_ty)
        target = out + ((row * kv_heads + head) * groups + lane[:, None]) * width + cell[None, :]
        tl.store(target, done, mask=lane[:, None] < groups)
    else:
        target = part + ((tl.program_id(0).to(tl.int64) * splits + split) * padded + lane) * (width + 2)
        keep(target, cell, most, total, acc, (lane < groups) & (behind <= position))


def attend(
    joined: Tensor, heads: Heads, rotary: Rotary, norms: tuple[Norm, Norm] | None, cells: Cells, seen: Seen
) -> Tensor:
    """Attention of one token a sequence, from the product of queries, keys and values on. As `reference.attend`."""
    tokens, early, page, kv_heads, width = (
        len(joined),
        starts_early(joined),
        cells.keys.shape[2],
        heads.keys,
        heads.width,
    )
    query, key = norms or (None, None)
    assert joined.is_contiguous()
    assert page % BLOCK.value == 0
    assert cells.keys.stride() == cells.values.stride()
    assert cells.keys.stride()[2:] == (width, 1)
    assert rotary.cos.stride() == rotary.sin.stride()
    assert rotary.cos.stride(1) == 1
    assert not rotary.parted
    whole = query is not None and len(query.weight) > width
    if query is not None and key is not None:
        assert query[1:] == key[1:], "norms of one kind"
        assert len(key.weight) == (kv_heads * width if whole else width)
    groups, splits = heads.queries // kv_heads, triton.cdiv(page * seen.table.shape[1], SPAN)
    if seen.window:  # spans that one token's window reaches into
        splits = min(splits, (seen.window - 2) // SPAN + 2)
    padded = max(LEAST_HEADS, int(triton.next_power_of_2(groups)))
    out = joined.new_empty(tokens, heads.queries, width)
    part = joined.new_empty((tokens * kv_heads, splits, padded, width + 2) if splits > 1 else (1,), dtype=torch.float32)
    _attend_joined[(tokens * kv_heads, splits)](
        joined, rotary.cos, rotary.sin, joined if query is None else query.weight, joined if key is None else key.weight, cells.keys,
        cells.values, cells.pages, cells.places, seen.rows, seen.positions, seen.table, joined if seen.sinks is None else seen.sinks, out,
        part, rotary.cos.stride(0), cells.keys.stride(0), cells.keys.stride(1), seen.table.stride(0), splits, page=page, scale=seen.scale,
        eps=0.0 if query is None else query.eps, groups=groups, kv_heads=kv_heads, width=width, padded=padded, half=rotary.half,
        doubled=rotary.doubled, woven=rotary.woven, normed=query is not None, whole=whole,
        query_padded=int(triton.next_power_of_2(heads.queries * width)), key_padded=int(triton.next_power_of_2(kv_heads * width)), wide=query is not None and query.wide, span=SPAN, window=seen.window or 0,
        sink=seen.sinks is not None, single=splits == 1, early=early, num_warps=warps_of(width), launch_pdl=early,
    )  # fmt: skip
    if splits > 1:
        piece = min(width, PIECE)
        join_spans[(tokens * heads.queries, width // piece)](
            part, seen.positions, out, splits, groups=groups, kv_heads=kv_heads, width=width, piece=piece, padded=padded, span=SPAN,
            window=seen.window or 0, early=early, num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out
