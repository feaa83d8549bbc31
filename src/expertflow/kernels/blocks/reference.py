"""What building blocks compute, in plain torch.

`product`, `gated`, `rotate`, `attend`, `attend_latents` and `route` each have a twin of the same name and signature in the file of that
name, or in `latents`. Read these first; they run without Triton, and tests compare the twins with them. Rounding is the
modules' own: states are of the model's dtype wherever a module hands them on. Must not know modules.
"""

import torch
from torch import Tensor
from torch.nn import functional

from expertflow.kernels.blocks.given import (
    Cells,
    Heads,
    LatentHeads,
    Norm,
    Places,
    Rotary,
    Routed,
    Router,
    Seen,
)
from expertflow.kernels.dense_reference import decode_attention, rms_norm
from expertflow.kernels.latent import reference as latent_reference
from expertflow.kernels.mlp import ACTIVATIONS
from expertflow.kernels.reference import find_slots

LEAST_SUM = 1e-20
"""Added to a sum that weights are divided by, as DeepSeek-V3 does; other sums do not notice it."""
PART = 256
"""Tokens that are turned at once."""
_LOWEST = -3e38
"""Score of experts outside the best groups."""


def product(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Multiply states, perhaps normed before, scale the product and add it to the residual.

    Args:
        states: `[T, H]`, unit columns.
        weight: `[N, H]`.
        bias: `[N]`, or None.
        norm: of the states; None: they are taken as they are.
        residual: `[T, N]`, what the product is added to; None: nothing.
        share: `[T, 1]`, what the product is multiplied by; None: nothing.

    Returns:
        `[T, N]`.
    """
    normed = states if norm is None else rms_norm(states, norm.weight, norm.eps, wide=norm.wide)
    out = functional.linear(normed, weight, bias)
    out = out if share is None else share * out
    return out if residual is None else residual + out


def gated(states: Tensor, weight: Tensor, activation: str, norm: Norm | None = None) -> Tensor:
    """The first half of a gated feed-forward block: the activation of one product times another.

    Args:
        states: `[T, H]`.
        weight: `[2I, H]`, of the one product and then of the other.
        activation: a key of `ACTIVATIONS`.
        norm: of the states; None: they are taken as they are.

    Returns:
        `[T, I]`.
    """
    gate, up = product(states, weight, norm=norm).chunk(2, dim=1)
    return ACTIVATIONS[activation](gate) * up


def rotate(joined: Tensor, heads: Heads, rotary: Rotary, norms: tuple[Norm, Norm] | None, cells: Cells) -> Tensor:
    """Take queries, keys and values apart, norm and turn queries and keys, and keep keys and values.

    Args:
        joined: `[T, (Q + 2G) D]`, queries, then keys, then values.
        heads: of them.
        rotary: how far each token is turned.
        norms: of a query's and a key's head, `[D]` each, or of all of them together, `[Q D]` and `[G D]`; None: there are none.
        cells: where keys and values go; overwritten there.

    Returns:
        Queries `[T, Q, D]`.
    """
    split, asked = [heads.queries, heads.keys, heads.keys], joined.new_empty(len(joined), heads.queries, heads.width)
    for begin in range(0, len(joined), PART):  # what is made in float32 on the way is little
        some = slice(begin, begin + PART)
        queries, keys, values = joined[some].view(-1, heads.all, heads.width).split(split, dim=1)
        if norms is not None:
            queries, keys = (
                rms_norm(part.reshape(len(part), -1, len(norm.weight)), norm.weight, norm.eps, wide=norm.wide).view(
                    part.shape
                )
                for part, norm in zip((queries, keys), norms, strict=True)
            )
        angles = rotary._replace(cos=rotary.cos[some], sin=rotary.sin[some])
        cells.keys[cells.pages[some], :, cells.places[some]] = _turned(keys, angles)
        cells.values[cells.pages[some], :, cells.places[some]] = values
        asked[some] = _turned(queries, angles)
    return asked


def attend(
    joined: Tensor, heads: Heads, rotary: Rotary, norms: tuple[Norm, Norm] | None, cells: Cells, seen: Seen
) -> Tensor:
    """Attention of one token a sequence, from the product of queries, keys and values on.

    Args:
        joined: as of `rotate`.
        heads: as of `rotate`.
        rotary: as of `rotate`.
        norms: as of `rotate`.
        cells: as of `rotate`.
        seen: what the tokens attend to.

    Returns:
        `[T, Q, D]`.
    """
    queries, where = rotate(joined, heads, rotary, norms, cells), (seen.rows, seen.positions)
    return decode_attention(
        queries, cells.keys, cells.values, where, seen.scale, seen.window, seen.sinks, table=seen.table
    )


def turn_latents(queries: Tensor, latents: Tensor, heads: LatentHeads, rotary: Rotary, cells: Cells) -> Tensor:
    """Norm latents, turn the rotary parts of queries and keys, and keep latents and the keys' part.

    Args:
        queries: `[T, Q (plain + R)]`.
        latents: `[T, rank + R]`, latents, then what of a key has positions.
        heads: of them.
        rotary: how far each token is turned.
        cells: where latents and the keys' rotary part go; overwritten there.

    Returns:
        Queries `[T, Q, plain + R]`.
    """
    norm = heads.norm
    plain, asked = queries.reshape(len(queries), heads.queries, -1).split([heads.plain, heads.rope], dim=2)
    latent, key = latents.split([len(norm.weight), heads.rope], dim=1)
    cells.keys[cells.pages, :, cells.places] = rms_norm(latent, norm.weight, norm.eps, wide=norm.wide)[:, None]
    cells.values[cells.pages, :, cells.places] = _turned(key[:, None], rotary)
    return torch.cat([plain, _turned(asked, rotary)], dim=2)


def attend_latents(
    queries: Tensor, latents: Tensor, heads: LatentHeads, rotary: Rotary, cells: Cells, seen: Seen
) -> Tensor:
    """Attention of one token a sequence over latents, from the products of queries and latents on.

    Args:
        queries: as of `turn_latents`.
        latents: as of `turn_latents`.
        heads: as of `turn_latents`.
        rotary: as of `turn_latents`.
        cells: as of `turn_latents`.
        seen: what the tokens attend to; no window and no sinks.

    Returns:
        `[T, Q, V]`.
    """
    asked, where = turn_latents(queries, latents, heads, rotary, cells), (seen.rows, seen.positions)
    return latent_reference.decode_attention(asked, cells[:2], heads.weight, where, seen.scale, seen.table)


def _turned(states: Tensor, rotary: Rotary) -> Tensor:
    """Heads `[T, N, D]`, whose first pairs are turned."""
    half = rotary.half
    turning, still = states.float().split([2 * half, states.shape[2] - 2 * half], dim=2)
    first, second = (turning[..., 0::2], turning[..., 1::2]) if rotary.woven else turning.chunk(2, dim=2)
    cos, sin = (table.float()[:, None] for table in (rotary.cos, rotary.sin))
    pairs = [
        first * cos[..., :half] - second * sin[..., :half],
        second * cos[..., -half:] + first * sin[..., -half:],
    ]
    together = rotary.woven and not rotary.parted
    turned = torch.stack(pairs, dim=3).flatten(2) if together else torch.cat(pairs, dim=2)
    return torch.cat([turned, still], dim=2).to(states.dtype)


def route(
    states: Tensor,
    norm: Norm,
    router: Router,
    counts: Tensor,
    places: Places | None = None,
    recorded: Tensor | None = None,
) -> Routed:
    """Norm states and choose their experts.

    Args:
        states: `[T, H]`.
        norm: of the states.
        router: what chooses.
        counts: int32 `[>= T]` for the twin, 0 between launches; here nothing.
        places: where the experts lie; None: that is decided later.
        recorded: experts int64 `[T, K]` that the router's weights go to, rank by rank, in place of its own choice.
    """
    del counts
    normed, rule = rms_norm(states, norm.weight, norm.eps, wide=norm.wide), router.rule
    weight, bias = router.weight[: router.experts], router.bias
    if rule.wide_logits:
        logits = functional.linear(normed.float(), weight.float(), None if bias is None else bias.float())
    else:
        logits = functional.linear(normed, weight, bias)
    scores = logits.float()
    if rule.scores == "softmax":
        scores = scores.softmax(dim=1)
    elif rule.scores == "sigmoid":
        scores = scores.sigmoid()
    choice = scores if router.correction is None else scores + router.correction.float()
    if rule.groups > 1:
        grouped = choice.view(len(choice), rule.groups, -1)
        best = grouped.topk(rule.group_top, dim=2).values.sum(dim=2).topk(rule.kept_groups, dim=1).indices
        kept = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1).bool()
        choice = grouped.masked_fill(~kept[..., None], _LOWEST).flatten(1)
    index = choice.sort(dim=1, descending=True, stable=True).indices[:, : rule.top_k]
    weights = scores.gather(1, index)
    if rule.over_chosen:
        weights = weights.softmax(dim=1)
    if rule.normalised:
        weights = weights / (weights.sum(dim=1, keepdim=True) + LEAST_SUM)
    weights = weights * rule.scale
    index = index if recorded is None else recorded
    slots = None if places is None else find_slots(places.slots, index, places.live)
    share = functional.linear(normed, router.weight[router.experts :]).sigmoid() if router.gated else None
    return Routed(normed, index, weights if rule.wide_weights else weights.to(states.dtype), slots, share)
