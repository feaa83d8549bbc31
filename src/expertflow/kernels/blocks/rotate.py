"""Norms and rotation of a pass over prompts, from the product of queries, keys and values on: keys and values go into their pages.

Twin of `reference.rotate`; one launch. A program has some tokens of one key head and its query heads. Must not know modules.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertflow.kernels.blocks.attend import head_root, turned
from expertflow.kernels.blocks.given import Cells, Heads, Norm, Rotary
from expertflow.kernels.launching import launch

ELEMENTS = 4096
"""Elements of a program's queries."""


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["pages", "places"])
def _rotate_joined(
    joined, cos, sin, query_gains, key_gains, keys, values, pages, places, out, tokens, angle_stride, angle_step, page_stride, head_stride,
    eps: tl.constexpr, groups: tl.constexpr, kv_heads: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, some: tl.constexpr,
    half: tl.constexpr, doubled: tl.constexpr, woven: tl.constexpr, normed: tl.constexpr, whole: tl.constexpr,
    query_padded: tl.constexpr, key_padded: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Some tokens, one key head with its query heads."""
    head, cell, size = tl.program_id(1), tl.arange(0, width)[None, :], (groups + 2) * kv_heads * width
    first, lane = tl.program_id(0) * some, tl.arange(0, some * padded)
    token, number = first + lane // padded, lane % padded
    inside = ((token < tokens) & (number < groups))[:, None]
    token = tl.minimum(token, tokens - 1).to(tl.int64)[:, None]
    mine = (head * groups + number)[:, None]
    query_root, key_root, own_gains, own_key_gains = 0.0, 0.0, query_gains, key_gains
    one = first + tl.arange(0, some)
    valid = (one < tokens)[:, None]
    one = tl.minimum(one, tokens - 1).to(tl.int64)[:, None]
    if whole:  # then a program has a single token
        begin = joined + first.to(tl.int64) * size
        query_root = head_root(begin, groups * kv_heads * width, query_padded, eps)
        key_root = head_root(begin + groups * kv_heads * width, kv_heads * width, key_padded, eps)
        own_gains, own_key_gains = query_gains + mine * width, key_gains + (head + one * 0) * width
    asked = turned(
        joined + token * size + mine * width, cell, inside, cos + token * angle_stride, sin + token * angle_stride, angle_step, own_gains, query_root,
        eps, width, half, doubled, woven, normed, whole, wide,
    )  # fmt: skip
    tl.store(out + (token * kv_heads * groups + mine) * width + cell, asked, mask=inside)
    begin = joined + one * size + (groups * kv_heads + head) * width
    key = turned(
        begin, cell, valid, cos + one * angle_stride, sin + one * angle_stride, angle_step, own_key_gains, key_root, eps, width, half, doubled, woven,
        normed, whole, wide,
    )  # fmt: skip
    place = tl.load(pages + one) * page_stride + head * head_stride + tl.load(places + one) * width + cell
    tl.store(keys + place, key, mask=valid)
    tl.store(values + place, tl.load(begin + kv_heads * width + cell), mask=valid)


def rotate(joined: Tensor, heads: Heads, rotary: Rotary, norms: tuple[Norm, Norm] | None, cells: Cells) -> Tensor:
    """Norm and turn queries and keys, and keep keys and values. As `reference.rotate`."""
    tokens, kv_heads, width = len(joined), heads.keys, heads.width
    query, key = norms or (None, None)
    assert joined.is_contiguous()
    assert cells.keys.stride() == cells.values.stride()
    assert cells.keys.stride()[2:] == (width, 1)
    assert rotary.cos.stride() == rotary.sin.stride()
    assert not rotary.parted
    whole = query is not None and len(query.weight) > width
    if query is not None and key is not None:
        assert query[1:] == key[1:], "norms of one kind"
        assert len(key.weight) == (kv_heads * width if whole else width)
    groups = heads.queries // kv_heads
    padded = int(triton.next_power_of_2(groups))
    some = 1 if whole else max(1, ELEMENTS // (padded * width))
    out = joined.new_empty(tokens, heads.queries, width)
    given = (
        joined, rotary.cos, rotary.sin, joined if query is None else query.weight, joined if key is None else key.weight, cells.keys,
        cells.values, cells.pages, cells.places, out, tokens, *rotary.cos.stride(), cells.keys.stride(0), cells.keys.stride(1),
    )  # fmt: skip
    launch(
        _rotate_joined, (triton.cdiv(tokens, some), kv_heads), given, eps=0.0 if query is None else query.eps, groups=groups, kv_heads=kv_heads, width=width, padded=padded, some=some, half=rotary.half,
        doubled=rotary.doubled, woven=rotary.woven, normed=query is not None, whole=whole,
        query_padded=int(triton.next_power_of_2(heads.queries * width)), key_padded=int(triton.next_power_of_2(kv_heads * width)),
        wide=query is not None and query.wide,
    )  # fmt: skip
    return out
