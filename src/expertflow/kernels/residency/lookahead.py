"""The device twin of `cache.prefetch`: which experts to load ahead, into which slots, and after which layer.

`count_pins` and `pin_residents` run a program a layer and leave the sweep's copy of the tables. One program then sweeps
through the coming layers. It keeps the smallest rank of every layer in registers, so a planned load reads one layer's
ranks, and a layer that lacks nothing costs next to nothing. Then the loads whose slots are free after layer `now` are
bound and enter the ledger. Must not know records and weights.
"""

import triton
import triton.language as tl

from expertflow.cache.core import EVICT, PREFETCH, WASTED
from expertflow.kernels.ledger import DST, PRIOR, SRC
from expertflow.kernels.residency.access import add_to, call_off, write_log
from expertflow.kernels.residency.keys import key_of, rank_of, smallest
from expertflow.kernels.residency.state import AHEAD, BROKEN, EVICTIONS, WASTES

_PREFETCH, _EVICT, _WASTED = (tl.constexpr(kind) for kind in (PREFETCH, EVICT, WASTED))
_AHEAD, _EVICTIONS, _WASTES, _BROKEN = (tl.constexpr(place) for place in (AHEAD, EVICTIONS, WASTES, BROKEN))
_LAST = tl.constexpr(0x7FFFFFFF)
_NEVER = tl.constexpr(0x7FF0000080000000)
"""The key of an infinite rank, joined."""
_SRC, _DST, _PRIOR = (tl.constexpr(field) for field in (SRC, DST, PRIOR))
COUNTS = OLD, NEW, PINNED, LACKING, LOWEST = range(5)
"""Rows of `counts`, int32 `[5, L]`: experts pinned before, those to be pinned, those pinned, those demanded and absent; and the
expert of the smallest rank after the layer."""
_OLD, _NEW, _PINNED, _LACKING, _LOWEST = (tl.constexpr(row) for row in (OLD, NEW, PINNED, LACKING, LOWEST))


@triton.jit
def joined(upper, lower):
    """A key as one int64."""
    return (upper.to(tl.int64) << 32) | (lower.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def halves(key):
    """The two int32 of a key: the registers that hold it."""
    return (key >> 32).to(tl.int32), key.to(tl.int32)


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit(do_not_specialize=["layers", "experts"])
def count_pins(
    demand, known, slot_of, pinned, counts, layers, experts, THRESHOLD: tl.constexpr, EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """How many experts of each layer are pinned, and how many residents `prefetch.pin_residents` would add."""
    layer, column = tl.program_id(0), tl.arange(0, EP)
    mask = column < experts
    at = layer * experts + column
    want = mask & (tl.load(demand + at, mask=mask, other=0.0) >= THRESHOLD) & (tl.load(known) > 0)
    there = tl.load(slot_of + at, mask=mask, other=-1) >= 0
    old = tl.load(pinned + at, mask=mask, other=0) != 0
    tl.store(counts + _OLD * layers + layer, _count(old))
    tl.store(counts + _NEW * layers + layer, _count(want & there & ~old))


@triton.jit(do_not_specialize=["now", "layers", "experts", "room"])
def pin_residents(
    demand, known, slot_of, pinned, rank, low, lowest, used, unused, counts, sweep_low, sweep_rank, sweep_slot,
    now, layers, experts, room, THRESHOLD: tl.constexpr, EP: tl.constexpr, LP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`prefetch.pin_residents`, and the sweep's copy of the tables.

    `sweep_low` int64 `[L]` gets the smallest ranks after the layers have run, `sweep_rank` int64 `[2, L, E]` ranks before
    and after, both as keys; `sweep_slot` int32 `[L, E]` slots.
    """
    layer, column, order = tl.program_id(0), tl.arange(0, EP), tl.arange(0, LP)
    mask = column < experts
    at = layer * experts + column
    # experts pinned by the layers that run earlier; the first layer for which there is not room enough gets a part
    coming = now + 1 + order
    old_counts = tl.load(counts + _OLD * layers + coming % layers, mask=order < layers, other=0)
    new_counts = tl.load(counts + _NEW * layers + coming % layers, mask=(order < layers) & (coming < layers), other=0)
    both = old_counts + new_counts
    before = tl.cumsum(both, 0) - both
    partial = tl.min(tl.where((new_counts > 0) & (before + both > room), order, LP), 0)
    number = (layer + layers - now - 1) % layers
    begin = tl.sum(tl.where(order == number, before, 0), 0)
    want = mask & (tl.load(demand + at, mask=mask, other=0.0) >= THRESHOLD) & (tl.load(known) > 0)
    slot = tl.load(slot_of + at, mask=mask, other=-1)
    old = tl.load(pinned + at, mask=mask, other=0) != 0
    ranks = tl.load(rank + at, mask=mask, other=float("inf"))
    then = tl.load(unused + at, mask=mask, other=0.0)
    then = tl.where(want, tl.load(used + at, mask=mask, other=0.0), then)
    add = want & (slot >= 0) & ~old & (layer > now)
    pin = (old | add).to(tl.int32)
    add = add & ((number < partial) | ((number == partial) & (begin + tl.cumsum(pin, 0) - pin < room)))
    pinned_now = old | add
    ranks = tl.where(add, float("inf"), ranks)
    then = tl.where(slot >= 0, then, float("inf"))
    tl.store(pinned + at, pinned_now.to(tl.uint8), mask=mask)
    tl.store(rank + at, ranks, mask=mask)
    uppers, lowers = key_of(ranks)
    upper, lower, place = smallest(uppers, lowers, column)
    tl.store(low + layer, rank_of(upper, lower))
    tl.store(lowest + layer, place)
    tl.store(sweep_rank + at, joined(uppers, lowers), mask=mask)
    uppers, lowers = key_of(then)
    upper, lower, place = smallest(uppers, lowers, column)
    tl.store(sweep_low + layer, joined(upper, lower))
    tl.store(counts + _LOWEST * layers + layer, place)
    tl.store(sweep_rank + layers * experts + at, joined(uppers, lowers), mask=mask)
    tl.store(sweep_slot + at, slot, mask=mask)
    tl.store(counts + _PINNED * layers + layer, _count(pinned_now))
    tl.store(counts + _LACKING * layers + layer, _count(want & (slot < 0)))


@triton.jit
def _sweep(  # noqa: PLR0915 - as `look_ahead`
    low, lowest, newer, pinned, resident, demand, limit, used, pending, waiting, counts, sweep_low, sweep_rank, sweep_slot,
    now, last, layers, experts, slots, room, reach,
    THRESHOLD: tl.constexpr, ROLLING: tl.constexpr, EP: tl.constexpr, LP: tl.constexpr, PLACES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`prefetch.plan` after `pin_residents`."""
    column, other, place_of = tl.arange(0, EP), tl.arange(0, LP), tl.arange(0, PLACES)
    inside, cells = column < experts, layers * experts
    lows_upper, lows_lower = key_of(tl.load(low + other, mask=other < layers, other=float("inf")))
    at_low = tl.load(lowest + other, mask=other < layers, other=0)
    then_upper, then_lower = halves(tl.load(sweep_low + other, mask=other < layers, other=_NEVER))
    then_at = tl.load(counts + _LOWEST * layers + other, mask=other < layers, other=0)
    changed = tl.load(counts + _LACKING * layers + other, mask=other < layers, other=0)
    coming = (place_of > now) & (place_of <= now + layers)
    pinned_there = tl.load(counts + _PINNED * layers + place_of % layers, mask=coming, other=0)
    pins = tl.where(coming, tl.sum(pinned_there, 0) - tl.cumsum(pinned_there, 0) + pinned_there, 0)
    left, empty = slots - tl.load(resident), tl.load(newer + slots)
    count = tl.load(waiting)
    place, going = now + 1, 1
    while (place < last) & (going > 0):
        layer = place % layers
        base = layer * experts
        here = other == layer
        differs = tl.sum(tl.where(here, changed, 0), 0)
        served = 1
        if differs > 0:  # demanded experts are absent, or a planned load took a slot of the layer
            chance = tl.load(demand + base + column, mask=inside, other=0.0)
            at = tl.load(sweep_slot + base + column, mask=inside, other=-1)
            value = tl.load(used + base + column, mask=inside, other=0.0)
            then_uppers, then_lowers = key_of(value)
            if place < layers:
                value = tl.load(limit + base + column, mask=inside, other=0.0)
            value_uppers, value_lowers = key_of(value)
            lacking = inside & (chance >= THRESHOLD) & (at < 0)
            todo = _count(lacking)
            uppers, lowers = key_of(-chance)  # the largest chance first
            while (todo > 0) & (served > 0):
                _, _, best = smallest(tl.where(lacking, uppers, _LAST), lowers, column)
                chosen = column == best
                low_upper, low_lower, victim_layer = smallest(lows_upper, lows_lower, other)
                victim = tl.sum(tl.where(other == victim_layer, at_low, 0), 0)
                theirs = victim_layer * experts
                swept = (victim_layer > now) & (victim_layer < place)
                slot = tl.load(sweep_slot + theirs + victim)
                wanted = tl.load(demand + theirs + victim) >= THRESHOLD
                from_row = sweep_rank + tl.where(swept, cells, 0) + theirs
                their_ranks = tl.load(from_row + column, mask=inside, other=_NEVER)
                worth_upper = tl.sum(tl.where(chosen, value_uppers, 0), 0)
                worth_lower = tl.sum(tl.where(chosen, value_lowers, 0), 0)
                worse = (low_upper < worth_upper) | ((low_upper == worth_upper) & (low_lower < worth_lower))
                slot = tl.where(worse, slot, -1)
                after = tl.where(swept & wanted, victim_layer, now)
                if left > 0:
                    slot, after = empty, now
                after = tl.maximum(after, place - 1 - reach)
                full = (place_of > after) & (place_of <= place) & (pins >= room)
                after = tl.maximum(after, tl.max(tl.where(full, place_of, -1), 0))
                served = ((slot >= 0) & (after < place)).to(tl.int32)
                if ROLLING:
                    served = served * (after <= now).to(tl.int32)
                # the layer that loses an expert, if one has to leave
                robbed = (other == victim_layer) & (served > 0) & (left <= 0)
                their_ranks = tl.where(column == victim, _NEVER, their_ranks)
                low_upper, low_lower, found = smallest(*halves(their_ranks), column)
                lows_upper = tl.where(robbed, low_upper, lows_upper)
                lows_lower = tl.where(robbed, low_lower, lows_lower)
                at_low = tl.where(robbed, found, at_low)
                changed = tl.where(robbed, 1, changed)
                pins += ((place_of > after) & (place_of <= place) & (served > 0)).to(tl.int32)
                lacking = lacking & (column != best)
                if served > 0:
                    if left > 0:
                        left -= 1
                        empty = tl.load(newer + slot)
                    else:
                        tl.store(sweep_slot + theirs + victim, -1)
                        tl.store(sweep_rank + theirs + victim, _NEVER)
                        tl.store(sweep_rank + cells + theirs + victim, _NEVER)
                    tl.store(sweep_slot + base + best, slot)
                    tl.store(sweep_rank + cells + base + column, joined(then_uppers, then_lowers), mask=chosen)
                    tl.store(pinned + base + best, tl.full([], 1, tl.uint8))
                    tl.store(pending + 3 * count, base + best)
                    tl.store(pending + 3 * count + 1, slot)
                    tl.store(pending + 3 * count + 2, after)
                    count += 1
                    todo -= 1
                    tl.debug_barrier()
            ranks = tl.load(sweep_rank + cells + base + column, mask=inside, other=_NEVER)
            low_upper, low_lower, found = smallest(*halves(ranks), column)
            then_upper = tl.where(here, low_upper, then_upper)
            then_lower = tl.where(here, low_lower, then_lower)
            then_at = tl.where(here, found, then_at)
        if ROLLING:
            going = served
        passed = (
            here & (place < layers) & (going > 0)
        )  # after the layer its experts may be evicted, ranked by their next use
        lows_upper = tl.where(passed, then_upper, lows_upper)
        lows_lower = tl.where(passed, then_lower, lows_lower)
        at_low = tl.where(passed, then_at, at_low)
        place += 1
    tl.store(waiting, count)


@triton.jit
def _bind(  # noqa: C901, PLR0912, PLR0915 - as `look_ahead`
    slot_of, owner, rank, low, lowest, per_layer, newer, older, fresh, resident, pending, waiting, ledger, filled, entry,
    tally, log, logged, now, layers, experts, entries, EP: tl.constexpr, LP: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`prefetch.carry_out`: the planned loads whose slots are free after `now`; returns the log's next entry."""
    count, kept, index = tl.load(waiting), 0, 0
    load = tl.load(filled)
    begin = load
    column, other = tl.arange(0, EP), tl.arange(0, LP)
    inside = column < experts
    evictions, wasted, occupied = load * 0, load * 0, load * 0
    robbed = other < 0
    while index < count:
        here = index + column < count
        flats = tl.load(pending + 3 * (index + column), mask=here, other=0)
        places = tl.load(pending + 3 * (index + column) + 1, mask=here, other=0)
        afters = tl.load(pending + 3 * (index + column) + 2, mask=here, other=0)
        due, stays = here & (afters <= now), here & (afters > now)
        todo = _count(due)
        shifts = (kept < index) | (todo > 0)
        while todo > 0:
            first = tl.min(tl.where(due, column, _LAST), 0)
            flat = tl.sum(tl.where(column == first, flats, 0), 0)
            slot = tl.sum(tl.where(column == first, places, 0), 0)
            due = due & (column != first)
            # everything that decides is read before anything is written: reads after writes would wait for one another
            present, theirs = tl.load(slot_of + flat) >= 0, tl.load(owner + slot)
            before, behind = tl.load(older + slot), tl.load(newer + slot)
            was_fresh = tl.load(fresh + theirs, mask=theirs >= 0, other=0) != 0
            if not present:
                prior = -1
                if theirs >= 0:
                    layer = theirs // experts
                    if was_fresh:
                        wasted += 1
                        prior = call_off(ledger, entries, entry, slot)
                        if LOG:
                            write_log(log, logged, _WASTED, layer, theirs % experts, slot, 0, None)
                            logged += 1
                    tl.store(fresh + theirs, tl.full([], 0, tl.uint8))
                    tl.store(slot_of + theirs, -1)
                    tl.store(rank + theirs, float("inf"))
                    tl.atomic_add(per_layer + layer, -1, sem="relaxed")
                    robbed = robbed | (other == layer)
                    evictions += 1
                    if LOG:
                        write_log(log, logged, _EVICT, layer, theirs % experts, slot, 0, None)
                        logged += 1
                else:
                    tl.store(newer + before, behind)
                    tl.store(older + behind, before)
                    occupied += 1
                tl.store(slot_of + flat, slot)
                tl.store(owner + slot, flat)
                tl.atomic_add(per_layer + flat // experts, 1, sem="relaxed")
                tl.store(fresh + flat, tl.full([], 1, tl.uint8))
                if load < entries - layers * experts:  # the other entries are for what the layers need
                    tl.store(ledger + _SRC * entries + load, flat)
                    tl.store(ledger + _DST * entries + load, slot)
                    tl.store(ledger + _PRIOR * entries + load, prior)
                    tl.store(entry + slot, load)
                    load += 1
                else:  # cannot happen: the ledger has room for every expert three times
                    tl.store(tally + _BROKEN, 1)
                if LOG:
                    write_log(log, logged, _PREFETCH, flat // experts, flat % experts, slot, now, None)
                    logged += 1
            todo -= 1
            tl.debug_barrier()
        target = pending + 3 * (kept + tl.cumsum(stays.to(tl.int32), 0) - 1)
        tl.store(target, flats, mask=stays & shifts)
        tl.store(target + 1, places, mask=stays & shifts)
        tl.store(target + 2, afters, mask=stays & shifts)
        kept += _count(stays)
        index += EP
    layer = tl.min(tl.where(robbed, other, _LAST), 0)
    while layer < layers:
        ranks = tl.load(rank + layer * experts + column, mask=inside, other=float("inf"))
        upper, lower, place = smallest(*key_of(ranks), column)
        tl.store(low + layer, rank_of(upper, lower))
        tl.store(lowest + layer, place)
        robbed = robbed & (other != layer)
        layer = tl.min(tl.where(robbed, other, _LAST), 0)
    if load > begin:
        tl.store(resident, tl.load(resident) + occupied)
        tl.store(filled, load)
        add_to(tally + _AHEAD, load - begin)
        add_to(tally + _EVICTIONS, evictions)
        add_to(tally + _WASTES, wasted)
    if count > kept:
        tl.store(waiting, kept)
    return begin, load, logged


@triton.jit(do_not_specialize=["now", "last", "layers", "experts", "slots", "room", "reach", "entries"])
# many parameters: 43; as `access.run_layer`
def look_ahead(
    slot_of, owner, rank, low, lowest, per_layer, newer, older, pinned, fresh, resident,
    demand, limit, used, pending, waiting, counts, sweep_low, sweep_rank, sweep_slot,
    ledger, filled, entry, ahead, tally, log, log_count,
    now, last, layers, experts, slots, room, reach, entries,
    THRESHOLD: tl.constexpr, PLAN: tl.constexpr, ROLLING: tl.constexpr,  # noqa: N803
    PLACES: tl.constexpr, LP: tl.constexpr, EP: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`prefetch.plan` for places `now + 1 .. last - 1`, then `prefetch.carry_out`."""
    if PLAN:
        _sweep(
            low, lowest, newer, pinned, resident, demand, limit, used, pending, waiting, counts, sweep_low, sweep_rank,
            sweep_slot, now, last, layers, experts, slots, room, reach, THRESHOLD, ROLLING, EP, LP, PLACES,
        )  # fmt: skip
        tl.debug_barrier()
    logged = 0
    if LOG:
        logged = tl.load(log_count)
    begin, end, logged = _bind(
        slot_of, owner, rank, low, lowest, per_layer, newer, older, fresh, resident, pending, waiting, ledger, filled, entry,
        tally, log, logged, now, layers, experts, entries, EP, LP, LOG,
    )  # fmt: skip
    if LOG:
        tl.store(log_count, logged)
    tl.store(ahead + 2 * (now + 1), begin)
    tl.store(ahead + 2 * (now + 1) + 1, end)
