"""The references of `kernels.latent.decode` and `kernels.latent.prompts`, in plain torch: for reading, for a CPU, and for tests of the kernels.

Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a key is its head's matrix times the token's latent, followed by a part
with rotary positions that all heads share; a value is another matrix times the same latent. The matrices move to the other side of
the products: queries are brought to the latents once, and what was attended to becomes values once. So no key and no value is made.
"""

import torch
from torch import Tensor

EXPANDED = 512 << 20
"""Bytes of keys and values that a pass over prompts makes at once; of one head at least."""


def spans_of(heads: int) -> tuple[int, int]:
    """Columns of a span of a sequence at least, and spans of one at most: longer sequences have longer spans, not more.

    Enough programs for a GPU, and few bytes to join beside those of latents: each span gives as many for each head. Enters the
    arithmetic.
    """
    blocks = -(-heads // 64)
    return 128 * blocks, max(16, 128 // blocks)


def decode_attention(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    table: Tensor,
) -> Tensor:
    """Attention of one token a sequence over the columns up to its position. See the twin; float32 inside.

    Sequence by sequence, so that the shapes of the products, on which their bits depend, depend on a token's position alone.
    """
    halves = _halves(weight, query, kept)
    out = query.new_empty(*query.shape[:2], halves[1].shape[1])
    for place, (row, position) in enumerate(zip(where[0].tolist(), where[1].tolist(), strict=True)):
        seen = [_columns(part, table[row], position + 1) for part in kept]
        out[place] = _attended(query[place], seen, halves, scale).to(query.dtype)
    return out


def prompt_attention(
    query: Tensor,
    kept: tuple[Tensor, Tensor],
    weight: Tensor,
    where: tuple[Tensor, Tensor],
    scale: float,
    table: Tensor,
    *,
    pieces: tuple[Tensor, int],
    room: tuple[Tensor, int],
) -> Tensor:
    """Attention of the last tokens of each of S sequences. See the twin; each token as `decode_attention` has it."""
    del room
    halves, found = _halves(weight, query, kept), list[Tensor]()
    for row, last, count in zip(where[0].tolist(), where[1].tolist(), pieces[0][1].tolist(), strict=True):
        seen = [_columns(part, table[row], last + 1) for part in kept]
        for end in range(last + 2 - count, last + 2):
            mine = _attended(query[0, :, len(found)], [part[:end] for part in seen], halves, scale)
            found.append(mine.to(query.dtype))
    return torch.stack(found)[None]


def _attended(query: Tensor, seen: list[Tensor], halves: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """`[Q, D]` over latents `[n, rank]` and rotary parts `[n, rope]` to `[Q, V]`."""
    (to_keys, to_values), (latents, turned) = halves, seen
    plain, rotary = query.float().split([to_keys.shape[1], turned.shape[1]], dim=1)
    asked = (plain[:, None] @ to_keys)[:, 0]
    shares = ((asked @ latents.T + rotary @ turned.T) * scale).softmax(dim=1)
    joined: Tensor = shares @ latents
    return (joined[:, None] @ to_values.transpose(1, 2))[:, 0]


def _halves(weight: Tensor, query: Tensor, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What makes keys of latents, and what makes values, `[Q, ., rank]` each."""
    matrices, plain = weight.float().view(query.shape[1], -1, weight.shape[1]), query.shape[-1] - kept[1].shape[3]
    return matrices[:, :plain], matrices[:, plain:]


def _columns(kept: Tensor, pages: Tensor, count: int) -> Tensor:
    """The first columns of a row in pages `[P, 1, N, D]`, `[count, D]`, in float32 and memory of their own."""
    used = pages[: -(-count // kept.shape[2])].long()
    return kept[used].flatten(0, 2)[:count].clone().float()
