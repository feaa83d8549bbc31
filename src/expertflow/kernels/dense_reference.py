"""The references of `kernels.dense` and `kernels.prompts.attention`, in plain torch: for reading, for a CPU, and for tests of the kernels."""

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one token a sequence over the columns up to its position. See the twin; float32 inside."""
    (rows, heads, width), (kv_heads, length) = query.shape, keys.shape[1:3]
    row, positions = where
    keys, values = keys[row], values[row]
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
) -> Tensor:
    """Attention of the last C tokens of each of B sequences. See the twin; float32 inside.

    Token by token, so that the shapes of the products, on which their bits depend, depend on a token's position alone.
    """
    count = query.shape[2]
    out = query.new_zeros(query.shape[0], count, query.shape[1], values.shape[3])
    for place, (row, last) in enumerate(zip(where[0].tolist(), where[1].tolist(), strict=True)):
        for token in range(max(0, count - 1 - last), count):
            end = last + 2 - count + token
            seen = slice(max(0, end - window) if window else 0, end)
            asked = query[place, :, token].float().view(keys.shape[1], -1, query.shape[3])
            scores = asked @ _copy(keys[row, :, seen]).transpose(1, 2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.float().view(*scores.shape[:2], 1)], dim=2)
            shares = scores.softmax(dim=2)[..., : end - seen.start]
            out[place, token] = (shares @ _copy(values[row, :, seen])).flatten(0, 1).to(query.dtype)
    return out


def _copy(tensor: Tensor) -> Tensor:
    """In float32 and in memory of its own: how numbers lie enters the bits of a product."""
    return tensor.clone(memory_format=torch.contiguous_format).float()


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, wide: bool) -> Tensor:
    """`states / rms(states) * weight` over the last dimension. See the twin."""
    x = states.float()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * y).to(states.dtype) if wide else weight * y.to(states.dtype)
