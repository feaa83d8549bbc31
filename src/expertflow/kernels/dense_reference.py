"""The references of `kernels.dense` and `kernels.prompts.attention`, in plain torch: for reading, for a CPU, and for tests of the kernels."""

import torch
from torch import Tensor

SPAN = 256
"""Columns a program of the kernel attends to; fixed, because it enters the arithmetic."""
LEAST_HEADS = 16
"""Rows of its narrowest tensor-core product."""


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
    """Attention of one token a sequence over the columns up to its position. See the twin; float32 inside."""
    (rows, heads, width), kv_heads = query.shape, keys.shape[1]
    row, positions = where
    keys, values = (kept[row] if table is None else _joined(kept, table[row]) for kept in (keys, values))
    length = keys.shape[2]
    grouped = query.float().view(rows, kv_heads, heads // kv_heads, width)
    scores = grouped @ keys.float().transpose(2, 3) * scale
    distance = positions[:, None] - torch.arange(length, device=query.device)
    seen = (distance >= 0) & ((distance < window) if window else (distance >= 0))
    scores = scores.masked_fill(~seen[:, None, None], float("-inf")).view(rows, heads, length)
    if bias is not None:
        assert bias.stride(1) == 1, "the kernel reads it as rows"
        scores = scores + bias.float()[:, distance.clamp(min=0)].transpose(0, 1)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, heads, 1).expand(rows, heads, 1)], dim=2)
    shares = scores.softmax(dim=2)[..., :length].view(rows, kv_heads, heads // kv_heads, length)
    return (shares @ values.float()).view(rows, heads, width).to(query.dtype)


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
    table: Tensor | None = None,
    pieces: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention of the last C tokens of each of B sequences. See the twin; float32 inside.

    Token by token, so that the shapes of the products, on which their bits depend, depend on a token's position alone.
    """
    if pieces is not None:
        found = []
        for place, (begin, count) in enumerate(pieces[0].T.tolist()):
            mine = where[0][place : place + 1], where[1][place : place + 1]
            asked = query[:, :, begin : begin + count]
            found.append(
                prompt_attention(asked, keys, values, mine, scale, window, sinks=sinks, softcap=softcap, table=table)
            )
        return torch.cat(found, dim=1)
    count = query.shape[2]
    out = query.new_zeros(query.shape[0], count, query.shape[1], values.shape[3])
    for place, (row, last) in enumerate(zip(where[0].tolist(), where[1].tolist(), strict=True)):
        for token in range(max(0, count - 1 - last), count):
            end = last + 2 - count + token
            seen = slice(max(0, end - window) if window else 0, end)
            asked = query[place, :, token].float().view(keys.shape[1], -1, query.shape[3])
            key, value = (_columns(kept, row, seen, table) for kept in (keys, values))
            scores = asked @ _copy(key).transpose(1, 2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.float().view(*scores.shape[:2], 1)], dim=2)
            shares = scores.softmax(dim=2)[..., : end - seen.start]
            out[place, token] = (shares @ _copy(value)).flatten(0, 1).to(query.dtype)
    return out


def _joined(kept: Tensor, pages: Tensor) -> Tensor:
    """Pages `[B, m]` of `[P, G, N, D]` as rows `[B, G, m * N, D]`."""
    return kept[pages.long()].transpose(1, 2).flatten(2, 3)


def _columns(kept: Tensor, row: int, seen: slice, table: Tensor | None) -> Tensor:
    """Columns of a row, `[G, n, D]`, in rows or in pages."""
    if table is None:
        return kept[row, :, seen]
    page = kept.shape[2]
    first = seen.start // page
    joined = _joined(kept, table[row, first : -(-seen.stop // page)][None])[0]
    return joined[:, seen.start - first * page : seen.stop - first * page]


def _copy(tensor: Tensor) -> Tensor:
    """In float32 and in memory of its own: how numbers lie enters the bits of a product."""
    return tensor.clone(memory_format=torch.contiguous_format).float()


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, wide: bool) -> Tensor:
    """`states / rms(states) * weight` over the last dimension. See the twin."""
    x = states.float()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * y).to(states.dtype) if wide else weight * y.to(states.dtype)
