"""A router in one launch: the norm before it, logits, scores, the best experts and their weights; and a shared expert's share.

Twin of `reference.route`. Programs of a token compute the logits of some experts each; the last one to end chooses. Must not know modules.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertflow.kernels.blocks.given import Norm, Places, Routed, Router
from expertflow.kernels.blocks.reference import LEAST_SUM
from expertflow.kernels.blocks.rows import dot_rows, halves, load_rows, load_states, scaled
from expertflow.kernels.device import starts_early

ROWS, WARPS = 4, 4
"""Experts whose logits a program computes, and its warps."""
_NARROW = 4096
"""Inputs beyond which a program has twice as many warps, so that its states stay in registers."""
MOST_AT_ONCE = tl.constexpr(128)
"""Experts up to which all are compared with all."""
_LEAST_SUM = tl.constexpr(LEAST_SUM)
_LOWEST = tl.constexpr(-3e38)
"""Score of experts outside the best groups; -inf is that of experts already chosen."""


@triton.jit
def _best(scores, lane):
    """Place of the highest score, the lowest place among equals."""
    return tl.min(tl.where(scores == tl.max(scores, 0), lane, 1 << 30), 0)


@triton.jit
def _within_best_groups(
    choice, experts: tl.constexpr, padded: tl.constexpr, groups: tl.constexpr, kept: tl.constexpr, top: tl.constexpr
):
    """Scores, lowered where an expert is of no group that is among the best; a group's score is the sum of its best experts'."""
    lane = tl.arange(0, padded)
    group, mine = lane // (experts // groups), tl.full([padded], float("-inf"), tl.float32)
    for number in tl.static_range(groups):
        rest = tl.where((group == number) & (lane < experts), choice, float("-inf"))
        total = tl.max(rest, 0) * 0
        for _ in tl.static_range(top):
            place = _best(rest, lane)
            total += tl.max(rest, 0)
            rest = tl.where(lane == place, float("-inf"), rest)
        mine = tl.where(group == number, total, mine)
    good = lane < 0
    rest = tl.where(lane < experts, mine, float("-inf"))
    for _ in tl.static_range(kept):
        chosen = _best(rest, lane) // (experts // groups)
        good = good | (group == chosen)
        rest = tl.where(group == chosen, float("-inf"), rest)
    return tl.where(good, choice, _LOWEST)


@triton.jit
def _first(choice, scores, lane, rank, top_k: tl.constexpr):
    """The experts with the highest `choice`, the lower one among equals, and their scores; 0 beyond `top_k`."""
    if choice.shape[0] <= MOST_AT_ONCE:  # all with all: few steps wait for one another
        before = (choice[None, :] > choice[:, None]) | (
            (choice[None, :] == choice[:, None]) & (lane[None, :] < lane[:, None])
        )
        place = tl.sum(before.to(tl.int32), axis=1)
        here = (place[None, :] == rank[:, None]) & (rank < top_k)[:, None]
        chosen = tl.sum(tl.where(here, lane[None, :], 0), axis=1)
        weight = tl.sum(tl.where(here, scores[None, :], 0.0), axis=1)
    else:
        chosen, weight = rank * 0, rank * 0.0
        for number in tl.static_range(top_k):
            place = _best(choice, lane)
            chosen = tl.where(rank == number, place, chosen)
            weight = tl.where(rank == number, tl.sum(tl.where(lane == place, scores, 0.0), 0), weight)
            choice = tl.where(lane == place, float("-inf"), choice)
    return chosen.to(tl.int64), weight


@triton.jit
def _choose(
    logits, correction, index, weights, recorded, places, slots, counted, replays: tl.constexpr, placed: tl.constexpr, experts: tl.constexpr, padded: tl.constexpr, top_k: tl.constexpr, ranks: tl.constexpr,
    kind: tl.constexpr, corrected: tl.constexpr, groups: tl.constexpr, kept_groups: tl.constexpr, group_top: tl.constexpr,
    over_chosen: tl.constexpr, normalised: tl.constexpr, scale: tl.constexpr,
):  # fmt: skip
    """One token's experts and weights from its logits."""
    lane, rank = tl.arange(0, padded), tl.arange(0, ranks)
    inside = lane < experts
    scores = tl.load(logits + lane, mask=inside, other=float("-inf"), cache_modifier=".cg")
    if kind == "softmax":
        share = tl.exp(scores - tl.max(scores, 0))
        scores = share / tl.sum(share, 0)
    elif kind == "sigmoid":
        scores = tl.sigmoid(scores)
    choice = scores
    if corrected:
        choice += tl.load(correction + lane, mask=inside, other=0.0).to(tl.float32)
    choice = tl.where(choice == choice, choice, 3e38)  # noqa: PLR0124 - NaN counts as the highest, and is chosen but once
    if groups > 1:
        choice = _within_best_groups(choice, experts, padded, groups, kept_groups, group_top)
    choice = tl.where(inside, choice, float("-inf"))
    chosen, weight = _first(choice, scores, lane, rank, top_k)
    if over_chosen:
        weight = tl.where(rank < top_k, weight, float("-inf"))
        share = tl.exp(weight - tl.max(weight, 0))
        weight = share / tl.sum(share, 0)
    if normalised:
        weight = weight / (tl.sum(weight, 0) + _LEAST_SUM)
    if replays:
        chosen = tl.load(recorded + rank, mask=rank < top_k, other=0)
    tl.store(index + rank, chosen, mask=rank < top_k)
    if placed:
        slot = tl.load(places + chosen, mask=(rank < top_k) & counted, other=-1)
        tl.store(slots + rank, slot, mask=rank < top_k)
    tl.store(weights + rank, (weight * scale).to(weights.dtype.element_ty), mask=rank < top_k)


# many parameters: a launch does the work of eight
@triton.jit(do_not_specialize_on_alignment=["counts", "recorded", "places", "live"])
def _route(
    states, weight, bias, gains, correction, out, logits, index, weights, counts, recorded, places, live, slots, share,
    replays: tl.constexpr, placed: tl.constexpr,
    gated: tl.constexpr, eps: tl.constexpr, experts: tl.constexpr, k: tl.constexpr, rows: tl.constexpr, first: tl.constexpr, second: tl.constexpr, biased: tl.constexpr, wide: tl.constexpr,
    wide_logits: tl.constexpr, padded: tl.constexpr, top_k: tl.constexpr, ranks: tl.constexpr, kind: tl.constexpr,
    corrected: tl.constexpr, groups: tl.constexpr, kept_groups: tl.constexpr, group_top: tl.constexpr, over_chosen: tl.constexpr,
    normalised: tl.constexpr, scale: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Logits of some experts of one token; the last program of a token chooses."""
    block, token = tl.program_id(0), tl.program_id(1)
    outs = block * rows + tl.arange(0, rows)
    dtype: tl.constexpr = out.dtype.element_ty
    if early:
        gdc_launch_dependents()
    left = load_rows(weight, outs, experts + gated, k, 0, first)
    right = load_rows(weight, outs, experts + gated, k, first, second)
    left_gains, right_gains = load_states(gains, k, 0, first), load_states(gains, k, first, second)
    if early:  # a weight was there before the kernel that makes the states began
        gdc_wait()
    x, y = load_states(states + token * k, k, 0, first), load_states(states + token * k, k, first, second)
    root = tl.rsqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / k + eps)
    x, y = scaled(x, root, left_gains, wide, dtype), scaled(y, root, right_gains, wide, dtype)
    if block == 0:
        cell, rest = tl.arange(0, first), first + tl.arange(0, second)
        tl.store(out + token * k + cell, x.to(dtype), mask=cell < k)
        tl.store(out + token * k + rest, y.to(dtype), mask=rest < k)
    total = dot_rows(left, x) + dot_rows(right, y)
    if gated:
        mine = tl.sigmoid(total.to(dtype).to(tl.float32)).to(dtype)
        tl.store(share + token + outs * 0, mine, mask=outs == experts)
    if biased:
        total += tl.load(bias + outs, mask=outs < experts, other=0.0).to(tl.float32)
    if not wide_logits:
        total = total.to(dtype).to(tl.float32)
    tl.store(logits + token * experts + outs, total, mask=outs < experts)
    tl.debug_barrier()  # before one thread makes it known, all have written
    if tl.atomic_add(counts + token, 1) == tl.num_programs(0) - 1:
        tl.store(counts + token, 0)
        _choose(
            logits + token * experts, correction, index + token * top_k, weights + token * top_k, recorded + token * top_k, places,
            slots + token * top_k, token < tl.load(live), replays, placed, experts, padded, top_k, ranks, kind,
            corrected, groups, kept_groups, group_top, over_chosen, normalised, scale,
        )  # fmt: skip


def route(
    states: Tensor,
    norm: Norm,
    router: Router,
    counts: Tensor,
    places: Places | None = None,
    recorded: Tensor | None = None,
) -> Routed:
    """Norm states and choose their experts. As `reference.route`."""
    (tokens, inputs), experts, rule = states.shape, router.experts, router.rule
    early, (first, second) = starts_early(states), halves(inputs)
    assert states.is_contiguous()
    assert router.weight.is_contiguous()
    assert recorded is None or recorded.is_contiguous()
    normed, logits = torch.empty_like(states), states.new_empty(tokens, experts, dtype=torch.float32)
    index = states.new_empty(tokens, rule.top_k, dtype=torch.int64)
    weights = states.new_empty(tokens, rule.top_k, dtype=torch.float32 if rule.wide_weights else states.dtype)
    slots = None if places is None else torch.empty_like(index, dtype=torch.int32)
    known = (index, index, index) if places is None else (*places, slots)
    share = states.new_empty(tokens, 1) if router.gated else None
    _route[(triton.cdiv(len(router.weight), ROWS), tokens)](
        states, router.weight, states if router.bias is None else router.bias, norm.weight,
        states if router.correction is None else router.correction, normed, logits, index, weights, counts,
        index if recorded is None else recorded, *known, states if share is None else share, replays=recorded is not None, placed=places is not None, gated=router.gated, eps=norm.eps, experts=experts, k=inputs, rows=ROWS, first=first, second=second, biased=router.bias is not None, wide=norm.wide,
        wide_logits=rule.wide_logits, padded=int(triton.next_power_of_2(experts)), top_k=rule.top_k,
        ranks=int(triton.next_power_of_2(rule.top_k)), kind=rule.scores, corrected=router.correction is not None, groups=rule.groups,
        kept_groups=rule.kept_groups, group_top=rule.group_top, over_chosen=rule.over_chosen, normalised=rule.normalised,
        scale=rule.scale, early=early, num_warps=WARPS if inputs <= _NARROW else 2 * WARPS, launch_pdl=early,
        enable_fp_fusion=False,  # scores are computed once for each side of a comparison, and have to be the same number
    )  # fmt: skip
    return Routed(normed, index, weights, slots, share)
