"""Queries, keys and values between their product and attention: norms, rotation, and keys and values into their pages, in one launch.

Twin of `reference.rotate`. Must not know modules.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.blocks.given import Cells, Heads, Norm, Rotary
from expertflow.kernels.early import starts_early


@triton.jit
def _normed(x, root, gains, cell, wide: tl.constexpr, dtype: tl.constexpr):
    """Elements `cell` of a head divided by its root mean square, times the norm's weight, rounded as the norm rounds."""
    y = x * root
    if not wide:
        y = y.to(dtype).to(tl.float32)
    return (y * tl.load(gains + cell).to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["pages", "places"])
def _rotate(
    joined, cos, sin, query_gains, key_gains, out, keys, values, pages, places, angle_stride, page_stride, head_stride,
    eps: tl.constexpr, queries: tl.constexpr, kept: tl.constexpr, width: tl.constexpr, half: tl.constexpr, doubled: tl.constexpr,
    normed: tl.constexpr, wide: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """One head of one token."""
    token, head = tl.program_id(0), tl.program_id(1)
    cell = tl.arange(0, width)
    dtype: tl.constexpr = out.dtype.element_ty
    other = tl.where(cell < half, cell + half, tl.where(cell < 2 * half, cell - half, cell))
    if early:
        gdc_launch_dependents()
        gdc_wait()
    begin = joined + (token * (queries + 2 * kept) + head) * width
    x = tl.load(begin + cell).to(tl.float32)
    if head < queries + kept:
        y = tl.load(begin + other).to(tl.float32)
        if normed:
            root = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
            gains = query_gains if head < queries else key_gains
            x, y = _normed(x, root, gains, cell, wide, dtype), _normed(y, root, gains, other, wide, dtype)
        angle = token * angle_stride + (cell if doubled else cell % half)
        turned = cell < 2 * half
        c = tl.load(cos + angle, mask=turned, other=1.0).to(tl.float32)
        s = tl.load(sin + angle, mask=turned, other=0.0).to(tl.float32)
        x = x * c + tl.where(cell < half, -y, y) * s
    done = x.to(dtype)
    if head < queries:
        tl.store(out + (token * queries + head) * width + cell, done)
    else:
        page, place = tl.load(pages + token), tl.load(places + token)
        target = keys if head < queries + kept else values
        tl.store(target + page * page_stride + (head - queries) % kept * head_stride + place * width + cell, done)


def rotate(joined: Tensor, heads: Heads, rotary: Rotary, norms: tuple[Norm, Norm] | None, cells: Cells) -> Tensor:
    """Take queries, keys and values apart, norm and turn queries and keys, and keep keys and values. As `reference.rotate`."""
    tokens, early = len(joined), starts_early(joined)
    assert cells.keys.stride() == cells.values.stride()
    assert cells.keys.stride()[2:] == (heads.width, 1)
    assert rotary.cos.stride() == rotary.sin.stride()
    assert rotary.cos.stride(1) == 1
    query, key = norms or (None, None)
    assert query is None or key is None or query[1:] == key[1:], "norms of one kind"
    out = joined.new_empty(tokens, heads.queries, heads.width)
    _rotate[(tokens, heads.all)](
        joined, rotary.cos, rotary.sin, joined if query is None else query.weight, joined if key is None else key.weight, out, cells.keys,
        cells.values, cells.pages, cells.places, rotary.cos.stride(0), cells.keys.stride(0), cells.keys.stride(1),
        eps=0.0 if query is None else query.eps, queries=heads.queries, kept=heads.keys, width=heads.width, half=rotary.half,
        doubled=rotary.doubled, normed=query is not None, wide=query is not None and query.wide, early=early, num_warps=1,
        launch_pdl=early,
    )  # fmt: skip
    return out
