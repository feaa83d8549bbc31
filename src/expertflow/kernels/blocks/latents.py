"""Latent attention of one token a sequence, from the products of queries and latents on: four launches.

Twin of `reference.attend_latents`. The first one brings each head's query to the latents and turns its rotary part; programs of their own
norm the tokens' latents, turn the keys' rotary part, and write both into their pages. The others are those of `kernels.latent.decode`,
whose bits these are. Must not know modules.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.blocks.given import Cells, LatentHeads, Rotary, Seen
from expertflow.kernels.device import starts_early
from expertflow.kernels.latent.decode import ROWS, block_of, chunk_of, over_latents, padded_to, times


@triton.jit
def _turn(
    begin,
    target,
    cos,
    sin,
    step,
    inside,
    half: tl.constexpr,
    padded: tl.constexpr,
    woven: tl.constexpr,
    parted: tl.constexpr,
):
    """Turn the pairs of vectors `[N, 2 half]` that begin at `begin` `[N, 1]`, and store them from `target` `[N, 1]` on."""
    pair = tl.arange(0, padded)[None, :]
    mask = inside & (pair < half)
    away = 1 if woven else half
    one = 2 * pair if woven else pair
    x, y = tl.load(begin + one, mask=mask, other=0.0), tl.load(begin + one + away, mask=mask, other=0.0)
    x, y = x.to(tl.float32), y.to(tl.float32)
    c = tl.load(cos + pair * step, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + pair * step, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = target.dtype.element_ty
    there = pair if parted else one
    beside = half if parted else away
    tl.store(target + there, (x * c - y * s).to(dtype), mask=mask)
    tl.store(target + there + beside, (y * c + x * s).to(dtype), mask=mask)


# many parameters: a launch does the work of five
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["pages", "places"])
def _ask(
    queries, latents, weight, gains, cos, sin, keys, ropes, pages, places, asked, turned, count, query_row, latent_row, angle_row, angle_step,
    latent_page, rope_page, heads: tl.constexpr, features: tl.constexpr, rank: tl.constexpr, rank_padded: tl.constexpr, plain: tl.constexpr,
    chunk: tl.constexpr, block: tl.constexpr, half: tl.constexpr, padded: tl.constexpr, woven: tl.constexpr, parted: tl.constexpr,
    eps: tl.constexpr, wide: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Some elements of what one head's queries are at the latents; the programs behind the last head's have the latents of some tokens."""
    if early:
        gdc_launch_dependents()
    head, part, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ROWS
    rope: tl.constexpr = 2 * half
    dtype: tl.constexpr = keys.dtype.element_ty
    if head < heads:
        row, cell = first + tl.arange(0, ROWS), part * block + tl.arange(0, block)
        inside = (row < count)[:, None]
        line = row.to(tl.int64)[:, None]
        mine = queries + line * query_row + head * (plain + rope)
        matrix = weight + head.to(tl.int64) * features * rank + cell[None, :]
        acc = times(mine, inside, matrix, cell, rank, plain, rank, chunk, early)
        place = (line * heads + head) * rank + cell[None, :]
        tl.store(asked + place, acc.to(dtype), mask=inside & (cell[None, :] < rank))
        if part == 0:
            angle = line * angle_row
            there = turned + (line * heads + head) * rope
            _turn(mine + plain, there, cos + angle, sin + angle, angle_step, inside, half, padded, woven, parted)
    else:
        lane = tl.arange(0, rank_padded)
        gain = tl.load(gains + lane, mask=lane < rank, other=0.0).to(tl.float32)
        if early:
            gdc_wait()
        for number in range(part, ROWS, tl.num_programs(1)):
            token = first + number
            if token < count:
                begin = latents + token.to(tl.int64) * latent_row
                x = tl.load(begin + lane, mask=lane < rank, other=0.0).to(tl.float32)
                y = x * tl.rsqrt(tl.sum(x * x, 0) / rank + eps)
                if not wide:
                    y = y.to(dtype).to(tl.float32)
                page, at = tl.load(pages + token), tl.load(places + token)
                tl.store(keys + page * latent_page + at * rank + lane, (y * gain).to(dtype), mask=lane < rank)
                one = tl.zeros([1, 1], tl.int64)
                angle = one + token.to(tl.int64) * angle_row
                _turn(
                    begin + rank + one, ropes + page * rope_page + at * rope + one, cos + angle, sin + angle, angle_step, one == 0, half,
                    padded, woven, parted,
                )  # fmt: skip


def attend_latents(
    queries: Tensor, latents: Tensor, heads: LatentHeads, rotary: Rotary, cells: Cells, seen: Seen
) -> Tensor:
    """Attention of one token a sequence over latents. As `reference.attend_latents`."""
    tokens, norm, weight, early = len(queries), heads.norm, heads.weight, starts_early(queries)
    rank, cos, sin = len(norm.weight), rotary.cos, rotary.sin
    assert queries.stride(1) == latents.stride(1) == 1
    assert weight.is_contiguous()
    assert cos.stride() == sin.stride()
    assert heads.rope == 2 * rotary.half
    assert seen.window is None
    assert seen.sinks is None
    asked, turned = queries.new_empty(tokens, heads.queries, rank), queries.new_empty(tokens, heads.queries, heads.rope)
    block = block_of(heads.queries, rank)
    _ask[heads.queries + 1, triton.cdiv(rank, block), triton.cdiv(tokens, ROWS.value)](
        queries, latents, weight, norm.weight, cos, sin, cells.keys, cells.values, cells.pages, cells.places, asked, turned, tokens,
        queries.stride(0), latents.stride(0), *cos.stride(), cells.keys.stride(0), cells.values.stride(0), heads=heads.queries,
        features=len(weight) // heads.queries, rank=rank, rank_padded=padded_to(rank), plain=heads.plain, chunk=chunk_of(heads.plain),
        block=block, half=rotary.half, padded=int(triton.next_power_of_2(rotary.half)), woven=rotary.woven, parted=rotary.parted,
        eps=norm.eps, wide=norm.wide, early=early, num_warps=4, num_stages=3, launch_pdl=early,
    )  # fmt: skip
    where = seen.rows, seen.positions
    return over_latents((asked, turned), heads.plain, cells[:2], weight, where, seen.scale, seen.table)
