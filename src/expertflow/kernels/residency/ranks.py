"""The device twin of `cache.policy` and `cache.horizon`: what is observed and expected, and the ranks that follow.

One program a layer. Ranks are float64 and bit-equal to NumPy's, so nothing may be fused into multiply-adds; logarithms
are rounded on both sides (`policy.GRAIN`). Twin of `kernels.residency.reference`. Knows usage and demand; refuses to
know slots.
"""

import math

import triton
import triton.language as tl

from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.cache.policy import DISCOUNT, FADE, GRAIN, HIDDEN, MIX
from expertflow.kernels.residency.state import AHEAD, BLIND, BLOCKS, CONSTANT, FRESH, LOADS, RECORDED, UNKNOWN
from expertflow.types import HORIZONS

_NEW = tl.constexpr(1 - FADE[0])
_NEW_STEADY = tl.constexpr(1 - FADE[1])
_FADE = tl.constexpr(FADE[0])
_FADE_STEADY = tl.constexpr(FADE[1])
_MIX = tl.constexpr(MIX)
_REST = tl.constexpr(1 - MIX)
_GAIN = tl.constexpr(MIX * (1 - FADE[0]) + (1 - MIX) * (1 - FADE[1]))
_MIX_FADE = tl.constexpr(MIX * FADE[0])
_REST_FADE = tl.constexpr((1 - MIX) * FADE[1])
_LRU, _LFU, _NEXT_USE, _BELADY, _DISCOUNTED, _LAYER_ORDER = (tl.constexpr(code) for code in range(6))
_UNKNOWN, _RECORDED, _CONSTANT = (tl.constexpr(code) for code in (UNKNOWN, RECORDED, CONSTANT))
_DISCOUNT = tl.constexpr(DISCOUNT)
_LOG_DISCOUNT = tl.constexpr(math.log(DISCOUNT))
_HIDDEN = tl.constexpr(HIDDEN)
_GRAIN = tl.constexpr(GRAIN)
_FURTHER = tl.constexpr(STEPS_KNOWN - 1)
_STEPS_KNOWN = tl.constexpr(STEPS_KNOWN)
_BLIND, _BLOCKS, _LOADS, _AHEAD, _FRESH = (tl.constexpr(place) for place in (BLIND, BLOCKS, LOADS, AHEAD, FRESH))
_H1, _H2, _H3, _H4 = (tl.constexpr(horizon) for horizon in HORIZONS)


@triton.jit
def _gap(rate):
    """`policy.gap`."""
    return 1.0 / tl.maximum(rate, tl.full([1], 1e-6, tl.float64)) - 1.0


@triton.jit
def _worth(rate):
    """The discounted next use of an expert that a share `rate` of the steps use."""
    return rate / (1.0 - _DISCOUNT * (1.0 - rate))


@triton.jit
def _as_gap(worth):
    """`policy._as_gap`."""
    inside = tl.minimum(tl.maximum(worth, tl.full([1], 1e-9, tl.float64)), tl.full([1], 1.0, tl.float64))
    return tl.floor(tl.log(inside) / _LOG_DISCOUNT * _GRAIN + 0.5) / _GRAIN


@triton.jit(do_not_specialize=["layers", "experts", "steps", "entries", "slots"])
def open_step(  # noqa: C901, PLR0912, PLR0915 - a branch a policy, and the compiler keeps one
    slot_of, last_use, count, recent, steady, waits, used, unused, limit, demand, known, pinned, fresh, rank, low, lowest,
    clock, future, following, ledger, filled, entry, ahead, waiting, tally,
    layers, experts, steps, entries, slots,
    POLICY: tl.constexpr, SOURCE: tl.constexpr, PREFETCH: tl.constexpr, EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Planes as `policy` makes them, ranks as `core.begin_step` does; an empty ledger."""
    layer = tl.program_id(0)
    step = tl.load(clock + 1)
    if layer == 0:
        tl.store(clock, step)
        tl.store(filled, 0)
        tl.store(waiting, 0)
        tl.store(ahead, 0)
        tl.store(ahead + 1, 0)
    tl.store(ahead + 2 * (layer + 1), 0)
    tl.store(ahead + 2 * (layer + 1) + 1, 0)
    column = tl.arange(0, EP)
    mask = column < experts
    at = layer * experts + column
    zero = tl.zeros([EP], tl.int32)
    begin = layer * tl.cdiv(entries, layers)
    end = tl.minimum(begin + tl.cdiv(entries, layers), entries)
    blocks = zero
    while begin < end:  # nothing of any load is taken, or there
        done = ledger + 3 * entries + begin + column
        blocks += tl.load(done, mask=begin + column < end, other=0)
        tl.store(done, zero, mask=begin + column < end)
        tl.store(ledger + 2 * entries + begin + column, zero, mask=begin + column < end)
        begin += EP
    tl.atomic_add(tally + _BLOCKS, tl.sum(blocks, 0).to(tl.int64), sem="relaxed")
    if PREFETCH:
        begin = layer * tl.cdiv(slots, layers)
        end = tl.minimum(begin + tl.cdiv(slots, layers), slots)
        while begin < end:
            tl.store(entry + begin + column, zero - 1, mask=begin + column < end)
            begin += EP
    # what is expected
    planes = 0
    if SOURCE == _CONSTANT:
        planes = 1
        tl.store(demand + at, tl.load(future + at, mask=mask, other=0).to(tl.float64), mask=mask)
    elif SOURCE == _RECORDED:
        where = step * layers * experts + at
        sure = tl.load(future + where, mask=mask & (step < steps), other=0)
        planes = (step < steps).to(tl.int32)
        tl.store(demand + at, sure.to(tl.float64), mask=mask)
    elif SOURCE != _UNKNOWN:
        planes = tl.load(known)
    if SOURCE == _CONSTANT or SOURCE == _RECORDED:  # noqa: PLR1714, SIM109 - Triton knows no `in`
        if layer == 0:
            tl.store(known, planes)
        tl.debug_barrier()
    # who is worth keeping
    place = layer.to(tl.float64)
    turns = layers.to(tl.float64)
    now = (step * layers).to(tl.float64) + place
    coming = ((step + 1) * layers).to(tl.float64) + place
    chance = tl.load(demand + at, mask=mask & (planes > 0), other=0.0)
    if POLICY == _LRU:
        after_rest = tl.load(last_use + at, mask=mask, other=0.0)
        after_use = tl.zeros([EP], tl.float64) + now
        before = tl.where(chance > 0.0, after_use, after_rest)
        most = before
    elif POLICY == _LFU:
        before = tl.load(count + at, mask=mask, other=0.0)
        after_use, after_rest, most = before + 1.0, before, before
    elif POLICY == _LAYER_ORDER:
        reached = (planes == 0) | (tl.max(chance, 0) > 0.0)  # or the step is known to leave this layer alone
        before = tl.zeros([EP], tl.float64) - tl.where(reached, now, coming)
        after_use = tl.zeros([EP], tl.float64) - coming
        after_rest, most = after_use, before
    else:
        fast = tl.load(recent + at, mask=mask, other=0.0) * _NEW
        slow = tl.load(steady + at, mask=mask, other=0.0) * _NEW_STEADY
        faded = _MIX_FADE * fast + _REST_FADE * slow
        mean = _MIX * fast + _REST * slow
        if POLICY == _DISCOUNTED:
            top = tl.load(waits + layers + layer)
            worth, using = tl.minimum(_worth(mean), top), tl.minimum(_worth(faded + _GAIN), top)
            resting = tl.minimum(_worth(faded), top)
            for less in tl.static_range(_FURTHER):
                further = _FURTHER - less
                then = tl.load(demand + further * layers * experts + at, mask=mask & (further < planes), other=0.0)
                using = tl.where(further < planes, then + (1.0 - then) * _DISCOUNT * using, using)
                resting = tl.where(further < planes, then + (1.0 - then) * _DISCOUNT * resting, resting)
            gain = worth
            if planes > 0:
                worth = chance + (1.0 - chance) * _DISCOUNT * resting
                gain = tl.minimum(chance * _HIDDEN - (1.0 - chance), worth)
            wait, using, resting, gain = _as_gap(worth), _as_gap(using), _as_gap(resting), _as_gap(gain)
        else:
            least = tl.load(waits + layer)
            wait, using = tl.maximum(_gap(mean), least), tl.maximum(_gap(faded + _GAIN), least)
            resting = tl.maximum(_gap(faded), least)
            for less in tl.static_range(_FURTHER):
                further = _FURTHER - less
                then = tl.load(demand + further * layers * experts + at, mask=mask & (further < planes), other=0.0)
                using = tl.where(further < planes, (1.0 - then) * (1.0 + using), using)
                resting = tl.where(further < planes, (1.0 - then) * (1.0 + resting), resting)
            if planes > 0:
                wait = (1.0 - chance) * (1.0 + resting)
            gain = wait
        before = -(now + wait * turns)
        most = -(now + gain * turns)
        after_use = -(coming + using * turns)
        after_rest = -(coming + resting * turns)
        if POLICY == _BELADY:  # noqa: SIM102 - one is known to the compiler, the other to the device
            if planes > 0:  # what is recorded is float32 on the host, up to the sum
                where = (step + 1) * layers * experts + at
                later = tl.load(following + where, mask=mask, other=0.0) - (step + 1).to(tl.float32)
                wait_known = tl.where(chance > 0.0, 0.0, later + 1.0)
                before = -(now + (wait_known * layers.to(tl.float32)).to(tl.float64))
                after_use = -(coming + (later * layers.to(tl.float32)).to(tl.float64))
                after_rest, most = after_use, before
    tl.store(used + at, after_use, mask=mask)
    tl.store(unused + at, after_rest, mask=mask)
    present = tl.load(slot_of + at, mask=mask, other=-1) >= 0
    if PREFETCH:
        tl.store(limit + at, most, mask=mask)
        pin = tl.load(pinned + at, mask=mask, other=0) & tl.load(fresh + at, mask=mask, other=0)
        pin = tl.where(tl.max(chance, 0) > 0.0, pin, 0).to(tl.uint8)
        tl.store(pinned + at, pin, mask=mask)
        present = present & (pin == 0)
    ranks = tl.where(present, before, float("inf"))
    tl.store(rank + at, ranks, mask=mask)
    tl.store(low + layer, tl.min(ranks, 0))
    tl.store(lowest + layer, tl.argmin(ranks, 0).to(tl.int32))


@triton.jit(do_not_specialize=["layers", "experts"])
def close_step(
    needed, last_use, count, recent, steady, clock, tally, made,
    layers, experts,
    EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`Usage.learn`; the host may read how many loads were made so far, ahead or not, and what came of those ahead."""
    layer = tl.program_id(0)
    step = tl.load(clock)
    if layer == 0:
        tl.store(clock + 1, step + 1)
        ahead = tl.load(tally + _AHEAD)
        tl.store(made, tl.load(tally + _LOADS) + ahead)
        tl.store(made + 1, step + 1)
        tl.store(made + 2, ahead)
        tl.store(made + 3, tl.load(tally + _FRESH))
    column = tl.arange(0, EP)
    mask = column < experts
    at = layer * experts + column
    use = tl.load(needed + at, mask=mask, other=0)
    one = use.to(tl.float64)
    now = (step * layers).to(tl.float64) + layer.to(tl.float64)
    tl.store(last_use + at, tl.zeros([EP], tl.float64) + now, mask=mask & (use != 0))
    tl.store(count + at, tl.load(count + at, mask=mask, other=0.0) + one, mask=mask)
    tl.store(recent + at, tl.load(recent + at, mask=mask, other=0.0) * _FADE + one, mask=mask)
    tl.store(steady + at, tl.load(steady + at, mask=mask, other=0.0) * _FADE_STEADY + one, mask=mask)
    tl.store(needed + at, tl.zeros([EP], tl.uint8), mask=mask)


@triton.jit
def _spread(demand, at, mask, before, left, first, span: tl.constexpr, plane, group, groups):
    """The chance of use in each of `span` turns from `first` on, if it was `before` of no use before, and `left` after."""
    share = left / tl.maximum(before, tl.full([1], 1e-9, tl.float64))
    if span == 1:
        steady = 1.0 - share
    else:
        steady = 1.0 - tl.exp(tl.log(tl.maximum(share, tl.full([1], 1e-300, tl.float64))) / span)
    for turn in tl.static_range(span):
        step = (first + turn) * groups + group
        tl.store(demand + step * plane + at, steady, mask=mask & (step < _STEPS_KNOWN))


@triton.jit(do_not_specialize=["layers", "experts"])
def expect(
    said, members, turns, demand, known, tally, layers, experts, EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`horizon.unite`, `hazards` and `take_turns` of what was said of each group's rows, float32 `[C, 5, L, E]`.

    A chance that is no number makes the step one without forecast, and is counted; so does, uncounted, no group.
    """
    layer = tl.program_id(0)
    column = tl.arange(0, EP)
    mask = column < experts
    plane = layers * experts
    at = layer * experts + column
    one = tl.full([EP], 1.0, tl.float64)
    zero = tl.zeros([EP], tl.float64)
    groups = tl.load(turns).to(tl.int32)
    broken, group = 0, 0
    while group < groups:
        none0, none1, none2, none3, none4 = one, one, one, one, one
        place, end = tl.load(turns + 1 + group).to(tl.int32), tl.load(turns + 2 + group).to(tl.int32)
        while place < end:
            mine = said + tl.load(members + place) * 5 * plane + at
            none0 *= 1.0 - tl.load(mine, mask=mask, other=0.0).to(tl.float64)
            none1 *= 1.0 - tl.load(mine + plane, mask=mask, other=0.0).to(tl.float64)
            none2 *= 1.0 - tl.load(mine + 2 * plane, mask=mask, other=0.0).to(tl.float64)
            none3 *= 1.0 - tl.load(mine + 3 * plane, mask=mask, other=0.0).to(tl.float64)
            none4 *= 1.0 - tl.load(mine + 4 * plane, mask=mask, other=0.0).to(tl.float64)
            place += 1
        whole = none0 + none1 + none2 + none3 + none4
        broken += tl.sum((mask & ~((whole >= 0.0) & (whole <= 5.0))).to(tl.int32), 0)
        tl.store(demand + group * plane + at, 1.0 - none0, mask=mask)
        left1 = tl.minimum(one, tl.maximum(none1, zero))
        left2 = tl.minimum(left1, tl.maximum(none2, zero))
        left3 = tl.minimum(left2, tl.maximum(none3, zero))
        left4 = tl.minimum(left3, tl.maximum(none4, zero))
        _spread(demand, at, mask, one, left1, 1, _H1, plane, group, groups)
        _spread(demand, at, mask, left1, left2, 1 + _H1, _H2 - _H1, plane, group, groups)
        _spread(demand, at, mask, left2, left3, 1 + _H2, _H3 - _H2, plane, group, groups)
        _spread(demand, at, mask, left3, left4, 1 + _H3, _H4 - _H3, plane, group, groups)
        group += 1
    if groups == 0:
        tl.store(known, 0)
    if broken > 0:
        tl.store(known, 0)
        tl.atomic_add(tally + _BLIND, tl.full([], 1, tl.int64))
