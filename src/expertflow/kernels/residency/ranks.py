"""The device twin of `cache.policy` and `cache.horizon`: usage and demand in, ranks out.

One program a layer. Ranks are float64 and bit-equal to NumPy's, so nothing may be fused into multiply-adds; logarithms
are rounded on both sides (`policy.GRAIN`). Twin of `kernels.residency.reference`. Must not know slots.
"""

import math

import triton
import triton.language as tl

from expertflow.cache.horizon import LEAST_LEFT, STEPS_KNOWN
from expertflow.cache.policy import (
    DISCOUNT,
    FADE,
    GRAIN,
    HIDDEN,
    LEAST_RATE,
    LEAST_WORTH,
    MIX,
    belady,
    discounted_use,
    layer_order,
    lfu,
    lru,
    next_use,
)
from expertflow.events import SURE
from expertflow.kernels.ledger import DONE, SRC, TAKEN
from expertflow.kernels.residency.access import BY_UNUSED, BY_USED, IF_UNUSED, IF_USED, add_to
from expertflow.kernels.residency.keys import key_of, rank_of, smallest
from expertflow.kernels.residency.state import (
    AHEAD,
    BEFORE,
    BLIND,
    BLOCKS,
    CONSTANT,
    FORECAST,
    FORESEEN,
    FRESH,
    LATE,
    LOADS,
    POLICIES,
    RECORDED,
    UNKNOWN,
)
from expertflow.types import HORIZONS

_NEW = tl.constexpr(1 - FADE[0])
_NEW_STEADY = tl.constexpr(1 - FADE[1])
_FADE = tl.constexpr(FADE[0])
_FADE_STEADY = tl.constexpr(FADE[1])
_MIX = tl.constexpr(MIX)
_MIX_STEADY = tl.constexpr(1 - MIX)
_GAIN = tl.constexpr(MIX * (1 - FADE[0]) + (1 - MIX) * (1 - FADE[1]))
_MIX_FADE = tl.constexpr(MIX * FADE[0])
_STEADY_FADE = tl.constexpr((1 - MIX) * FADE[1])
_LRU, _LFU, _NEXT_USE, _BELADY, _DISCOUNTED, _LAYER_ORDER = (
    tl.constexpr(POLICIES[policy]) for policy in (lru, lfu, next_use, belady, discounted_use, layer_order)
)
_UNKNOWN, _RECORDED, _CONSTANT = (tl.constexpr(code) for code in (UNKNOWN, RECORDED, CONSTANT))
_DISCOUNT = tl.constexpr(DISCOUNT)
_LOG_DISCOUNT = tl.constexpr(math.log(DISCOUNT))
_HIDDEN = tl.constexpr(HIDDEN)
_GRAIN = tl.constexpr(GRAIN)
_LEAST_RATE, _LEAST_WORTH, _LEAST_LEFT = (tl.constexpr(least) for least in (LEAST_RATE, LEAST_WORTH, LEAST_LEFT))
_IF_USED, _IF_UNUSED, _BY_USED, _BY_UNUSED = (tl.constexpr(plane) for plane in (IF_USED, IF_UNUSED, BY_USED, BY_UNUSED))
_SRC, _TAKEN, _DONE = tl.constexpr(SRC), tl.constexpr(TAKEN), tl.constexpr(DONE)
_FURTHER = tl.constexpr(STEPS_KNOWN - 1)
_STEPS_KNOWN = tl.constexpr(STEPS_KNOWN)
_BLIND, _BLOCKS, _LOADS, _AHEAD, _FRESH = (tl.constexpr(place) for place in (BLIND, BLOCKS, LOADS, AHEAD, FRESH))
_LATE, _BEFORE, _FORECAST, _FORESEEN = (tl.constexpr(place) for place in (LATE, BEFORE, FORECAST, FORESEEN))
_SURE = tl.constexpr(SURE)
_H1, _H2, _H3, _H4 = (tl.constexpr(horizon) for horizon in HORIZONS)


@triton.jit
def _gap(rate):
    """`policy.gap`."""
    return 1.0 / tl.maximum(rate, tl.full([1], _LEAST_RATE, tl.float64)) - 1.0


@triton.jit
def _worth(rate):
    """The discounted next use of an expert that a share `rate` of the steps use."""
    return rate / (1.0 - _DISCOUNT * (1.0 - rate))


@triton.jit
def _as_gap(worth):
    """`policy._as_gap`."""
    inside = tl.minimum(tl.maximum(worth, tl.full([1], _LEAST_WORTH, tl.float64)), tl.full([1], 1.0, tl.float64))
    return tl.floor(tl.log(inside) / _LOG_DISCOUNT * _GRAIN + 0.5) / _GRAIN


@triton.jit(do_not_specialize=["layers", "experts", "steps", "entries", "slots"])
# many parameters: 38; as `access.run_layer`
def open_step(  # noqa: C901, PLR0912, PLR0915 - a branch a policy, and the compiler keeps one
    slot_of, last_use, count, recent, steady, waits, used, unused, limit, demand, known, pinned, fresh, rank, low, lowest,
    clock, future, following, ledger, filled, entry, ahead, waiting, tally, share, lines,
    layers, experts, steps, entries, slots,
    POLICY: tl.constexpr, SOURCE: tl.constexpr, PREFETCH: tl.constexpr, LARGE: tl.constexpr, UNEQUAL: tl.constexpr,  # noqa: N803
    EP: tl.constexpr,  # noqa: N803
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
    blocks = tl.zeros([EP], tl.int64)
    begin = layer * tl.cdiv(entries, layers)
    end = tl.minimum(begin + tl.cdiv(entries, layers), entries)
    while begin < end:  # reset the counts of blocks taken and done of all loads
        done = ledger + _DONE * entries + begin + column
        carried = tl.load(done, mask=begin + column < end, other=0)
        if UNEQUAL:
            carried *= tl.load(lines + tl.load(ledger + _SRC * entries + begin + column, mask=carried > 0, other=0))
        blocks += carried
        tl.store(done, zero, mask=begin + column < end)
        tl.store(ledger + _TAKEN * entries + begin + column, zero, mask=begin + column < end)
        begin += EP
    tl.atomic_add(tally + _BLOCKS, tl.sum(blocks, 0), sem="relaxed")
    if PREFETCH:
        begin = layer * tl.cdiv(slots, layers)
        end = tl.minimum(begin + tl.cdiv(slots, layers), slots)
        while begin < end:
            tl.store(entry + begin + column, zero - 1, mask=begin + column < end)
            begin += EP
    # this step's demand
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
    # ranks before and after the layer
    behind = layer.to(tl.float64)
    scale = layers.to(tl.float64)
    now = (step * layers).to(tl.float64) + behind
    coming = ((step + 1) * layers).to(tl.float64) + behind
    chance = tl.load(demand + at, mask=mask & (planes > 0), other=0.0)
    if POLICY == _LRU:
        after_unused = tl.load(last_use + at, mask=mask, other=0.0)
        after_used = tl.zeros([EP], tl.float64) + now
        before = tl.where(chance > 0.0, after_used, after_unused)
        most = before
    elif POLICY == _LFU:
        before = tl.load(count + at, mask=mask, other=0.0)
        after_used, after_unused, most = before + 1.0, before, before
    elif POLICY == _LAYER_ORDER:
        reached = (planes == 0) | (tl.max(chance, 0) > 0.0)  # else the step is known not to run this layer
        before = tl.zeros([EP], tl.float64) - tl.where(reached, now, coming)
        after_used = tl.zeros([EP], tl.float64) - coming
        after_unused, most = after_used, before
    else:
        fast = tl.load(recent + at, mask=mask, other=0.0) * _NEW
        slow = tl.load(steady + at, mask=mask, other=0.0) * _NEW_STEADY
        faded = _MIX_FADE * fast + _STEADY_FADE * slow
        mean = _MIX * fast + _MIX_STEADY * slow
        if POLICY == _DISCOUNTED:
            top = tl.load(waits + layers + layer)
            worth, if_used = tl.minimum(_worth(mean), top), tl.minimum(_worth(faded + _GAIN), top)
            if_unused = tl.minimum(_worth(faded), top)
            for less in tl.static_range(_FURTHER):
                further = _FURTHER - less
                then = tl.load(demand + further * layers * experts + at, mask=mask & (further < planes), other=0.0)
                if_used = tl.where(further < planes, then + (1.0 - then) * _DISCOUNT * if_used, if_used)
                if_unused = tl.where(further < planes, then + (1.0 - then) * _DISCOUNT * if_unused, if_unused)
            gain = worth
            if planes > 0:
                worth = chance + (1.0 - chance) * _DISCOUNT * if_unused
                gain = tl.minimum(chance * _HIDDEN - (1.0 - chance), worth)
            wait, if_used, if_unused, gain = _as_gap(worth), _as_gap(if_used), _as_gap(if_unused), _as_gap(gain)
        else:
            least = tl.load(waits + layer)
            wait, if_used = tl.maximum(_gap(mean), least), tl.maximum(_gap(faded + _GAIN), least)
            if_unused = tl.maximum(_gap(faded), least)
            for less in tl.static_range(_FURTHER):
                further = _FURTHER - less
                then = tl.load(demand + further * layers * experts + at, mask=mask & (further < planes), other=0.0)
                if_used = tl.where(further < planes, (1.0 - then) * (1.0 + if_used), if_used)
                if_unused = tl.where(further < planes, (1.0 - then) * (1.0 + if_unused), if_unused)
            if planes > 0:
                wait = (1.0 - chance) * (1.0 + if_unused)
            gain = wait
        before = -(now + wait * scale)
        most = -(now + gain * scale)
        after_used = -(coming + if_used * scale)
        after_unused = -(coming + if_unused * scale)
        if POLICY == _BELADY:  # noqa: SIM102 - one is known to the compiler, the other to the device
            if planes > 0:  # the recorded next uses are float32 on the host, up to the sum
                where = (step + 1) * layers * experts + at
                later = tl.load(following + where, mask=mask, other=0.0) - (step + 1).to(tl.float32)
                wait_known = tl.where(chance > 0.0, 0.0, later + 1.0)
                before = -(now + (wait_known * layers.to(tl.float32)).to(tl.float64))
                after_used = -(coming + (later * layers.to(tl.float32)).to(tl.float64))
                after_unused, most = after_used, before
    if LARGE:  # `policy.keep`, and no demand for slots
        apart = (tl.load(share + layer) == 0) & mask
        before, most = tl.where(apart, float("inf"), before), tl.where(apart, float("inf"), most)
        after_used, after_unused = (
            tl.where(apart, float("inf"), after_used),
            tl.where(apart, float("inf"), after_unused),
        )
        tl.store(demand + at, tl.zeros([EP], tl.float64), mask=apart)
    tl.store(used + at, after_used, mask=mask)
    tl.store(unused + at, after_unused, mask=mask)
    present = tl.load(slot_of + at, mask=mask, other=-1) >= 0
    if PREFETCH:
        tl.store(limit + at, most, mask=mask)
        pin = tl.load(pinned + at, mask=mask, other=0) & tl.load(fresh + at, mask=mask, other=0)
        pin = tl.where(tl.max(chance, 0) > 0.0, pin, 0).to(tl.uint8)
        tl.store(pinned + at, pin, mask=mask)
        present = present & (pin == 0)
    ranks = tl.where(present, before, float("inf"))
    tl.store(rank + at, ranks, mask=mask)
    upper, lower, place = smallest(*key_of(ranks), column)
    tl.store(low + layer, rank_of(upper, lower))
    tl.store(lowest + layer, place)


@triton.jit(do_not_specialize=["layers", "experts"])
def line_up(
    rank, used, unused, lines, layers, experts, EP: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The planes of `access.LINES` for a layer and `BLOCK` of its experts, by counting the smaller ranks of all."""
    layer, row, chunk = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    base, mask = layer * experts, row < experts
    now = tl.load(rank + base + row, mask=mask, other=0.0)[:, None]
    if_used = tl.load(used + base + row, mask=mask, other=0.0)[:, None]
    if_unused = tl.load(unused + base + row, mask=mask, other=0.0)[:, None]
    below = tl.zeros([BLOCK, BLOCK], tl.int32)
    below_used, below_unused, turn_used, turn_unused = below, below, below, below
    for begin in tl.static_range(0, EP, BLOCK):
        other = begin + chunk
        inside = other < experts
        ranks = tl.load(rank + base + other, mask=inside, other=float("inf"))[None, :]
        uses = tl.load(used + base + other, mask=inside, other=float("inf"))[None, :]
        leaves = tl.load(unused + base + other, mask=inside, other=float("inf"))[None, :]
        earlier, sooner, first = uses < if_used, leaves < if_unused, other[None, :] < row[:, None]
        below += (ranks < now).to(tl.int32)
        below_used += earlier.to(tl.int32) + (leaves < if_used).to(tl.int32)
        below_unused += (uses < if_unused).to(tl.int32) + sooner.to(tl.int32)
        turn_used += (earlier | ((uses == if_used) & first)).to(tl.int32)
        turn_unused += (sooner | ((leaves == if_unused) & first)).to(tl.int32)
    at, cells = base + row, layers * experts
    tl.store(lines + at, tl.sum(below, 1), mask=mask)
    tl.store(lines + _IF_USED * cells + at, tl.sum(below_used, 1), mask=mask)
    tl.store(lines + _IF_UNUSED * cells + at, tl.sum(below_unused, 1), mask=mask)
    tl.store(lines + _BY_USED * cells + base + tl.sum(turn_used, 1), row, mask=mask)
    tl.store(lines + _BY_UNUSED * cells + base + tl.sum(turn_unused, 1), row, mask=mask)


@triton.jit(do_not_specialize=["layers", "experts"])
def close_step(
    needed, last_use, count, recent, steady, clock, tally, made, demand, known,
    layers, experts,
    EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`Usage.learn` and `CacheCounters.judge`; writes for the host the numbers of loads, of loads ahead, and of those that were needed."""
    layer = tl.program_id(0)
    step = tl.load(clock)
    if layer == 0:
        tl.store(clock + 1, step + 1)
        ahead, loads = tl.load(tally + _AHEAD), tl.load(tally + _LOADS)
        add_to(tally + _LATE, loads > tl.load(tally + _BEFORE))
        tl.store(tally + _BEFORE, loads)
        tl.store(made, loads + ahead)
        tl.store(made + 1, step + 1)
        tl.store(made + 2, ahead)
        tl.store(made + 3, tl.load(tally + _FRESH))
    column = tl.arange(0, EP)
    mask = column < experts
    at = layer * experts + column
    use = tl.load(needed + at, mask=mask, other=0)
    chance = tl.load(demand + at, mask=mask & (tl.load(known) > 0), other=0.0)
    if tl.max(chance, 0) > 0.0:
        add_to(tally + _FORECAST, tl.sum((use != 0).to(tl.int32), 0))
        add_to(tally + _FORESEEN, tl.sum(((use != 0) & (chance >= _SURE)).to(tl.int32), 0))
    one = use.to(tl.float64)
    now = (step * layers).to(tl.float64) + layer.to(tl.float64)
    tl.store(last_use + at, tl.zeros([EP], tl.float64) + now, mask=mask & (use != 0))
    tl.store(count + at, tl.load(count + at, mask=mask, other=0.0) + one, mask=mask)
    tl.store(recent + at, tl.load(recent + at, mask=mask, other=0.0) * _FADE + one, mask=mask)
    tl.store(steady + at, tl.load(steady + at, mask=mask, other=0.0) * _FADE_STEADY + one, mask=mask)
    tl.store(needed + at, tl.zeros([EP], tl.uint8), mask=mask)


@triton.jit
def _spread(demand, at, mask, before, left, first, span: tl.constexpr, plane, group, groups):
    """Store the chance of use in each of `span` steps from `first` on; chance of no use falls from `before` to `left`."""
    share = left / tl.maximum(before, tl.full([1], _LEAST_LEFT, tl.float64))
    if span == 1:
        steady = 1.0 - share
    else:
        steady = 1.0 - tl.exp(tl.log(tl.maximum(share, tl.full([1], 1e-300, tl.float64))) / span)
    for number in tl.static_range(span):
        step = (first + number) * groups + group
        tl.store(demand + step * plane + at, steady, mask=mask & (step < _STEPS_KNOWN))


@triton.jit(do_not_specialize=["layers", "experts"])
def expect(
    probabilities, members, group_bounds, demand, known, tally, layers, experts, EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`horizon.unite`, `hazards` and `take_turns` of each group's probabilities, float32 `[C, 5, L, E]`.

    With a NaN among them the step gets no forecast, and the NaN is counted. Without groups it gets none either,
    uncounted.
    """
    layer = tl.program_id(0)
    column = tl.arange(0, EP)
    mask = column < experts
    plane = layers * experts
    at = layer * experts + column
    one = tl.full([EP], 1.0, tl.float64)
    zero = tl.zeros([EP], tl.float64)
    groups = tl.load(group_bounds).to(tl.int32)
    broken, group = 0, 0
    while group < groups:
        none0, none1, none2, none3, none4 = one, one, one, one, one
        place, end = tl.load(group_bounds + 1 + group).to(tl.int32), tl.load(group_bounds + 2 + group).to(tl.int32)
        while place < end:
            mine = probabilities + tl.load(members + place) * 5 * plane + at
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
