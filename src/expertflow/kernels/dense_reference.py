"""The references of `kernels.dense`, in plain torch: for reading, for a CPU, and for tests of the kernels."""

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


def rms_norm(states: Tensor, weight: Tensor, eps: float, *, wide: bool) -> Tensor:
    """`states / rms(states) * weight` over the last dimension. See the twin."""
    x = states.float()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * y).to(states.dtype) if wide else weight * y.to(states.dtype)
