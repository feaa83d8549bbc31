"""What building blocks compute, in plain torch.

`product`, `attend` and `route` each have a twin of the same name and signature in the file of that name. Read these first; they run without
Triton, and tests compare the twins with them. Rounding is the modules' own: states are of the model's dtype wherever a module hands
them on. Must not know modules.
"""

import torch
from torch import Tensor
from torch.nn import functional

from expertflow.kernels.blocks.given import Cells, Heads, Norm, Places, Rotary, Router, Seen
from expertflow.kernels.dense_reference import decode_attention, rms_norm
from expertflow.kernels.reference import find_slots

LEAST_SUM = 1e-20
"""Added to a sum that weights are divided by, as DeepSeek-V3 does; other sums do not notice it."""
_LOWEST = -3e38
"""Score of experts outside the best groups."""


def product(
    states: Tensor, weight: Tensor, bias: Tensor | None = None, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """Multiply states, perhaps normed before, and add to the residual.

    Args:
        states: `[T, H]`.
        weight: `[N, H]`.
        bias: `[N]`, or None.
        norm: of the states; None: they are taken as they are.
        residual: `[T, N]`, what the product is added to; None: nothing.

    Returns:
        `[T, N]`.
    """
    normed = states if norm is None else rms_norm(states, norm.weight, norm.eps, wide=norm.wide)
    out = functional.linear(normed, weight, bias)
    return out if residual is None else residual + out


def rotate(joined: Tensor, heads: Heads, rotary: Rotary, norms: tuple[Norm, Norm] | None, cells: Cells) -> Tensor:
    """Take queries, keys and values apart, norm and turn queries and keys, and keep keys and values.

    Args:
        joined: `[T, (Q + 2G) D]`, queries, then keys, then values.
        heads: of them.
        rotary: how far each token is turned.
        norms: of a query's and a key's head, `[D]` each; None: there are none.
        cells: where keys and values go; overwritten there.

    Returns:
        Queries `[T, Q, D]`.
    """
    parts = joined.view(len(joined), heads.all, heads.width).split([heads.queries, heads.keys, heads.keys], dim=1)
    queries, keys, values = parts
    if norms is not None:
        queries, keys = (
            rms_norm(part, norm.weight, norm.eps, wide=norm.wide)
            for part, norm in zip((queries, keys), norms, strict=True)
        )
    cells.keys[cells.pages, :, cells.places] = _turned(keys, rotary)
    cells.values[cells.pages, :, cells.places] = values
    return _turned(queries, rotary)


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


def _turned(states: Tensor, rotary: Rotary) -> Tensor:
    """Heads `[T, N, D]`, whose first pairs are turned."""
    half = rotary.half
    first, second, still = states.split([half, half, states.shape[2] - 2 * half], dim=2)
    cos, sin = (table.float()[:, None] for table in (rotary.cos, rotary.sin))
    turned = torch.cat(
        [
            first.float() * cos[..., :half] - second.float() * sin[..., :half],
            second.float() * cos[..., -half:] + first.float() * sin[..., -half:],
        ],
        dim=2,
    )
    return torch.cat([turned.to(states.dtype), still], dim=2)


def route(
    states: Tensor, norm: Norm, router: Router, counts: Tensor, places: Places | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Norm states and choose their experts.

    Args:
        states: `[T, H]`.
        norm: of the states.
        router: what chooses.
        counts: int32 `[>= T]` for the twin, 0 between launches; here nothing.
        places: where the experts lie; None: that is decided later.

    Returns:
        Normed states `[T, H]`, experts int64 `[T, K]` from the best one on, the lower one among equals, their weights `[T, K]`, and
        their slots int32 `[T, K]`, -1 where there is none, if `places` are known.
    """
    del counts
    normed, rule = rms_norm(states, norm.weight, norm.eps, wide=norm.wide), router.rule
    if rule.wide_logits:
        logits = functional.linear(
            normed.float(), router.weight.float(), None if router.bias is None else router.bias.float()
        )
    else:
        logits = functional.linear(normed, router.weight, router.bias)
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
    slots = None if places is None else find_slots(places.slots, index, places.live)
    return normed, index, weights if rule.wide_weights else weights.to(states.dtype), slots
