"""The device twin of `cache.core`: a layer's routing in; the slot of every pair and the layer's loads out.

One program decides a layer: a hit costs no loop, a load one iteration of a loop with a few reductions. Must not know
records and weights.
"""

import triton
import triton.language as tl

from expertflow.cache.core import EVICT, HIT, LAYER, MISS, NUDGE, WASTED
from expertflow.kernels.ledger import CALLED_OFF, CARRIED, DST, PRIOR, SRC, TAKEN
from expertflow.kernels.residency.state import BROKEN, EVICTIONS, FRESH, HITS, LOADS, PHASES, WASTES

_LAYER, _HIT, _MISS, _EVICT, _WASTED = (tl.constexpr(kind) for kind in (LAYER, HIT, MISS, EVICT, WASTED))
_HITS, _LOADS, _EVICTIONS, _PHASES, _BROKEN, _FRESH, _WASTES = (
    tl.constexpr(place) for place in (HITS, LOADS, EVICTIONS, PHASES, BROKEN, FRESH, WASTES)
)
_NUDGE = tl.constexpr(NUDGE)
_CALLED_OFF = tl.constexpr(CALLED_OFF)
_INFINITE = tl.constexpr(0x7FF00000)
"""The upper half of an infinite rank's key."""
_LAST = tl.constexpr(0x7FFFFFFF)
"""Larger than any half of a rank's key, and any index."""
_SRC, _DST, _TAKEN, _PRIOR, _CARRIED = (tl.constexpr(field) for field in (SRC, DST, TAKEN, PRIOR, CARRIED))


@triton.jit
def write_log(log, entry, kind, layer, expert, slot, detail, mask):
    """`core.write_log`, for one entry or a block of entries."""
    at = log + entry * 5
    tl.store(at, kind, mask=mask)
    tl.store(at + 1, layer, mask=mask)
    tl.store(at + 2, expert, mask=mask)
    tl.store(at + 3, slot, mask=mask)
    tl.store(at + 4, detail, mask=mask)


@triton.jit
def add_to(total, amount):
    """Add to a total in `CacheState.tally`."""
    tl.atomic_add(total, amount.to(tl.int64), sem="relaxed")


@triton.jit
def key_of(rank):
    """Two int32 that order float64 as they are; the second decides where the first are equal.

    A GPU finds the least int32 of a warp in one instruction, and the least float64 in five rounds.
    """
    bits = (rank + 0.0).to(tl.int64, bitcast=True)  # both zeros are one
    bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return (bits >> 32).to(tl.int32), (bits ^ 0x80000000).to(tl.int32)


@triton.jit
def rank_of(upper, lower):
    """The float64 of a key."""
    bits = (upper.to(tl.int64) << 32) | ((lower.to(tl.int64) & 0xFFFFFFFF) ^ 0x80000000)
    bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def smallest(uppers, lowers, index):
    """The smallest key, and the lowest index that has it."""
    upper = tl.min(uppers, 0)
    lower = tl.min(tl.where(uppers == upper, lowers, _LAST), 0)
    return upper, lower, tl.min(tl.where((uppers == upper) & (lowers == lower), index, _LAST), 0)


@triton.jit
def _positions(hit, position):
    """The places of a layer's accesses in their order, with those of its hits."""
    return tl.where(hit, tl.cumsum(hit.to(tl.int32), 0) - 1, position)


@triton.jit
def call_off(ledger, entries, entry, place):
    """Call off the load ahead into a slot: no program takes another block of it.

    Returns:
        The ledger entry that the slot's next load has to wait for, or -1.
    """
    prior = tl.load(entry + place)
    if prior >= 0:
        carried = tl.atomic_add(ledger + _TAKEN * entries + prior, _CALLED_OFF)
        tl.store(ledger + _CARRIED * entries + prior, carried)
        if carried == 0:  # never begun, so it may itself have had a load to wait for
            prior = tl.load(ledger + _PRIOR * entries + prior)
    return prior


@triton.jit(do_not_specialize=["layer", "pairs", "top_k", "layers", "experts", "slots", "wave", "entries"])
# many parameters: 47; every table is a pointer of its own, because Triton takes no structures, and joining tables into one
# buffer would change their addresses and loads
def run_layer(  # noqa: C901, PLR0912, PLR0915 - one program's whole decision: splitting it would split its registers
    ids, live, pair_slots, todo, bounds, state_rows, routes,
    slot_of, owner, rank, used, unused, low, lowest, per_layer, share, newer, older, pinned, fresh, resident, needed,
    ledger, filled, entry, expert_slot, expert_table, tally, log, log_count,
    layer, pairs, top_k, layers, experts, slots, wave, entries,
    NP: tl.constexpr, EP: tl.constexpr, LP: tl.constexpr, PHASES: tl.constexpr,  # noqa: N803
    JOINT: tl.constexpr, RETAIN: tl.constexpr, PREFETCH: tl.constexpr, ROUTES: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`core.access`: the running layer's experts are in registers, those of the other layers in memory."""
    infinite = tl.full([1], float("inf"), tl.float64)
    nothing = tl.full([1], -1, tl.int32)
    column, other, pair = tl.arange(0, EP), tl.arange(0, LP), tl.arange(0, NP)
    base = layer * experts
    # read first what does not depend on the needed experts: reads after writes would wait for one another
    mine = column < experts
    count = tl.load(live)
    choice = tl.load(ids + pair, mask=pair < pairs, other=experts).to(tl.int32)
    slot = tl.load(slot_of + base + column, mask=mine, other=-1)
    rank_used = tl.load(used + base + column, mask=mine, other=0.0)
    rank_unused = tl.load(unused + base + column, mask=mine, other=0.0)
    new = tl.load(fresh + base + column, mask=mine, other=0) != 0
    lows = tl.load(low + other, mask=other < layers, other=float("inf"))
    at_low = tl.load(lowest + other, mask=other < layers, other=0)
    holding, first, allowed = tl.load(per_layer + layer), tl.load(filled), tl.load(share + layer)
    # the needed experts
    alive = (pair < pairs) & (pair // top_k < count) & (choice >= 0) & (choice < experts)
    count = tl.load(resident)
    if ROUTES:
        state_row = tl.load(state_rows + pair // top_k, mask=pair < pairs, other=0)
        routed = tl.where(alive, choice, experts)
        tl.store(routes + (state_row * layers + layer) * top_k + pair % top_k, routed, mask=pair < pairs)
    tl.store(needed + base + choice, tl.full([NP], 1, tl.uint8), mask=alive)
    tl.debug_barrier()
    need = tl.load(needed + base + column, mask=mine, other=0) != 0
    hit = need & (slot >= 0)
    missing = need & (slot < 0)
    hits = tl.sum(hit.to(tl.int32), 0)
    loads = tl.sum(missing.to(tl.int32), 0)
    slot_at = tl.where(hit, slot, -1)  # the slot of each needed expert when it is computed
    phase_at = tl.where(hit, 0, -1)
    table_at = phase_at  # hits that wait for no copy are in a table of their own, before the phases
    awaited = 0
    if PREFETCH:
        tl.store(pinned + base + column, tl.zeros([EP], tl.uint8), mask=mine)
        under_way = tl.load(entry + slot, mask=hit & new, other=-1)
        late = under_way >= 0
        awaited = tl.sum(late.to(tl.int32), 0)
        if awaited > 0:
            tl.store(todo + tl.cumsum(late.to(tl.int32), 0) - 1, under_way, mask=late)
        table_at = tl.where(late, 1, table_at)
    after = tl.where(need, rank_used, rank_unused)
    logged = 0
    if LOG:
        logged = tl.load(log_count)
        position = tl.cumsum(hit.to(tl.int32), 0) - 1
        write_log(log, logged, _LAYER, layer, -1, -1, hits + loads, None)
        write_log(log, logged + 1 + position, _HIT, layer, column, slot, new.to(tl.int32), hit)
        logged += 1 + hits
    found = tl.sum((new & hit).to(tl.int32), 0)
    new = new & (need == 0)
    phase = hits * 0
    evictions, wasted, broken = phase, phase, phase
    tl.store(bounds, 0)
    if loads > 0:
        lows_upper, lows_lower = key_of(lows)
        position = tl.where(hit, 0, nothing)  # found where it is needed: rarely
        if LOG or not JOINT:
            position = _positions(hit, position)
        order = position  # `Tables.order`
        uses_upper, uses_lower = key_of(tl.where(missing, rank_used, infinite))
        if JOINT:
            uppers, lowers = key_of(tl.where((slot >= 0) & (need == 0), after, infinite))
        else:
            uppers, lowers = key_of(tl.where(slot >= 0, after - _NUDGE * (order + 1).to(tl.float64), infinite))
        own_upper, own_lower, own_at = smallest(uppers, lowers, column)
        number = 0
        while number < loads:  # the interpreter has no `range` over values of the device
            _, _, expert = smallest(uses_upper, uses_lower, column)
            chosen = column == expert
            uses_upper = tl.where(chosen, _LAST, uses_upper)
            if (number > 0) & (number % wave == 0):
                order = _positions(hit, order)
                uppers, lowers = key_of(tl.where(slot >= 0, after - _NUDGE * (order + 1).to(tl.float64), infinite))
                own_upper, own_lower, own_at = smallest(uppers, lowers, column)
            before, behind = -1, -1  # position and phase of the last access that uses the slot
            prior = -1
            if (count < slots) & (holding < allowed):
                place = tl.load(newer + slots)
                follower = tl.load(newer + place)
                tl.store(newer + slots, follower)
                tl.store(older + follower, slots)
                count += 1
                holding += 1
            else:
                lows_upper = tl.where(other == layer, own_upper, lows_upper)
                lows_lower = tl.where(other == layer, own_lower, lows_lower)
                low_upper, _, low_at = smallest(lows_upper, lows_lower, other)
                if tl.where(allowed < slots, own_upper, low_upper) >= _INFINITE:  # the wave has to end here
                    order = _positions(hit, order)
                    uppers, lowers = key_of(tl.where(slot >= 0, after - _NUDGE * (order + 1).to(tl.float64), infinite))
                    own_upper, own_lower, own_at = smallest(uppers, lowers, column)
                    lows_upper = tl.where(other == layer, own_upper, lows_upper)
                    lows_lower = tl.where(other == layer, own_lower, lows_lower)
                    low_upper, _, low_at = smallest(lows_upper, lows_lower, other)
                    if tl.where(allowed < slots, own_upper, low_upper) >= _INFINITE:
                        broken = 1  # cannot happen: the plan keeps slots free for corrections
                victim_layer = tl.where(allowed < slots, layer, low_at)
                was_fresh = 0
                if victim_layer == layer:
                    victim = own_at
                    leaves = column == victim
                    place = tl.sum(tl.where(leaves, slot, 0), 0)
                    if LOG:
                        before = tl.sum(tl.where(leaves, position, 0), 0)
                    behind = tl.sum(tl.where(leaves, phase_at, 0), 0)
                    was_fresh = tl.sum((leaves & new).to(tl.int32), 0)
                    new = new & (column != victim)
                    slot = tl.where(leaves, -1, slot)
                    uppers = tl.where(leaves, _INFINITE, uppers)
                    lowers = tl.where(leaves, -1 - _LAST, lowers)
                    own_upper, own_lower, own_at = smallest(uppers, lowers, column)
                else:
                    victim = tl.sum(tl.where(other == victim_layer, at_low, 0), 0)
                    theirs = victim_layer * experts
                    place = tl.load(slot_of + theirs + victim)
                    if PREFETCH:
                        was_fresh = tl.load(fresh + theirs + victim).to(tl.int32)
                    their_ranks = tl.load(rank + theirs + column, mask=mine, other=float("inf"))
                    upper, lower, at = smallest(*key_of(tl.where(column == victim, infinite, their_ranks)), column)
                    lows_upper = tl.where(other == victim_layer, upper, lows_upper)
                    lows_lower = tl.where(other == victim_layer, lower, lows_lower)
                    at_low = tl.where(other == victim_layer, at, at_low)
                    tl.store(slot_of + theirs + victim, -1)
                    tl.store(rank + theirs + victim, float("inf"))
                    tl.atomic_add(per_layer + victim_layer, -1, sem="relaxed")
                    holding += 1
                    if PREFETCH:
                        tl.store(fresh + theirs + victim, tl.full([], 0, tl.uint8))
                evictions += 1
                if PREFETCH:  # noqa: SIM102 - one is known to the compiler, the other to the device
                    if was_fresh > 0:
                        wasted += 1
                        prior = call_off(ledger, entries, entry, place)
                        if LOG:
                            write_log(log, logged, _WASTED, victim_layer, victim, place, 0, None)
                            logged += 1
                if LOG:
                    write_log(log, logged, _EVICT, victim_layer, victim, place, 0, None)
                    logged += 1
            if behind >= phase:
                phase = behind + 1
                tl.store(bounds + phase, awaited + number, mask=phase <= PHASES)
            slot = tl.where(chosen, place, slot)
            position = tl.where(chosen, hits + number, position)
            order = tl.where(chosen, hits + number - 2 * (number % wave) + wave - 1, order)
            slot_at = tl.where(chosen, place, slot_at)
            phase_at = tl.where(chosen, phase, phase_at)
            table_at = tl.where(chosen, 1 + phase, table_at)
            tl.store(owner + place, base + expert)
            load = first + number
            tl.store(todo + awaited + number, load)
            tl.store(ledger + _SRC * entries + load, base + expert)
            tl.store(ledger + _DST * entries + load, place)
            tl.store(ledger + _PRIOR * entries + load, prior)
            if LOG:
                write_log(log, logged, _MISS, layer, expert, place, before, None)
                logged += 1
            number += 1
            tl.debug_barrier()
        tl.store(low + other, rank_of(lows_upper, lows_lower), mask=other < layers)
        tl.store(lowest + other, at_low, mask=other < layers)
        tl.store(filled, first + loads)
        tl.debug_barrier()
    ends = phase + 1 + tl.arange(0, NP)
    tl.store(bounds + ends, tl.zeros([NP], tl.int32) + awaited + loads, mask=ends <= PHASES)
    # after the layer all residents may be evicted
    if RETAIN:
        ranks = tl.where(slot >= 0, after, infinite)
    else:
        last = tl.load(older + slots)
        leaving = tl.sum(((slot >= 0) & (allowed > 0)).to(tl.int32), 0)  # those of a large layer stay
        left = leaving
        while left > 0:
            victim = tl.argmax((slot >= 0).to(tl.int32), 0).to(tl.int32)
            place = tl.sum(tl.where(column == victim, slot, 0), 0)
            slot = tl.where(column == victim, -1, slot)
            tl.store(owner + place, -1)
            tl.store(newer + last, place)
            tl.store(older + place, last)
            tl.store(newer + place, slots)
            tl.debug_barrier()
            last = place
            left -= 1
            if LOG:
                write_log(log, logged, _EVICT, layer, victim, place, 0, None)
                logged += 1
        tl.store(older + slots, last)
        count -= leaving
        holding -= leaving
        evictions += leaving
        ranks = tl.where(slot >= 0, after, infinite)
    tl.store(slot_of + base + column, slot, mask=mine)
    tl.store(rank + base + column, ranks, mask=mine)
    uppers, lowers = key_of(ranks)
    own_upper, own_lower, own_at = smallest(uppers, lowers, column)
    tl.store(low + layer, rank_of(own_upper, own_lower))
    tl.store(lowest + layer, own_at)
    tl.store(per_layer + layer, holding)
    tl.store(resident, count)
    add_to(tally + _HITS, hits)
    add_to(tally + _LOADS, loads)
    add_to(tally + _EVICTIONS, evictions)
    add_to(tally + _PHASES, phase)
    if PREFETCH:
        tl.store(fresh + base + column, new.to(tl.uint8), mask=mine)
        add_to(tally + _FRESH, found)
        add_to(tally + _WASTES, wasted)
    if (phase >= PHASES) | (
        broken > 0
    ):  # cannot happen, by `phase_bound`; if it does, the host raises, because an expert would be skipped
        tl.store(tally + _BROKEN, 1)
    if LOG:
        tl.store(log_count, logged)
    # every pair's slot, in the table of the phase that computes it
    tl.store(expert_slot + column, slot_at, mask=mine)
    tl.store(expert_table + column, table_at, mask=mine)
    tl.debug_barrier()
    place_of = tl.load(expert_slot + choice, mask=alive, other=-1)
    table_of = tl.load(expert_table + choice, mask=alive, other=-1)
    for number in tl.static_range(PHASES + 1):
        tl.store(pair_slots + number * pairs + pair, tl.where(table_of == number, place_of, -1), mask=pair < pairs)
