"""The device twin of `cache.core`: a layer's routing in, the slot of every pair and the loads it takes out.

One program decides a layer: a hit costs no loop, a load one turn of a loop of a few reductions. Knows slots; refuses to
know rows and weights.
"""

import triton
import triton.language as tl

from expertflow.cache.core import EVICT, HIT, LAYER, MISS, WASTED
from expertflow.kernels.ledger import CALLED_OFF
from expertflow.kernels.residency.state import BROKEN, EVICTIONS, FRESH, HITS, LOADS, PHASES, WASTES

_LAYER, _HIT, _MISS, _EVICT, _WASTED = (tl.constexpr(kind) for kind in (LAYER, HIT, MISS, EVICT, WASTED))
_HITS, _LOADS, _EVICTIONS, _PHASES, _BROKEN, _FRESH, _WASTES = (
    tl.constexpr(place) for place in (HITS, LOADS, EVICTIONS, PHASES, BROKEN, FRESH, WASTES)
)
_NUDGE = tl.constexpr(1e-6)
_CALLED_OFF = tl.constexpr(CALLED_OFF)


@triton.jit
def tell(log, row, kind, layer, expert, slot, detail, mask):
    """`core.tell`, for one row or a block of rows."""
    at = log + row * 5
    tl.store(at, kind, mask=mask)
    tl.store(at + 1, layer, mask=mask)
    tl.store(at + 2, expert, mask=mask)
    tl.store(at + 3, slot, mask=mask)
    tl.store(at + 4, detail, mask=mask)


@triton.jit
def add_to(total, amount):
    """Raise a total; nobody waits for what it was."""
    tl.atomic_add(total, amount.to(tl.int64), sem="relaxed")


@triton.jit
def call_off(ledger, entries, entry, place):
    """The load ahead into a slot is not wanted any more: nobody takes on more of it.

    Returns:
        The load that the slot's next one has to wait for, or -1.
    """
    prior = tl.load(entry + place)
    if prior >= 0:
        carried = tl.atomic_add(ledger + 2 * entries + prior, _CALLED_OFF)
        tl.store(ledger + 5 * entries + prior, carried)
        if carried == 0:  # never begun, so it may have had one to wait for itself
            prior = tl.load(ledger + 4 * entries + prior)
    return prior


@triton.jit(do_not_specialize=["layer", "pairs", "top_k", "layers", "experts", "slots", "wave", "entries"])
def run_layer(  # noqa: C901, PLR0912, PLR0915 - one program's whole decision: splitting it would split its registers
    ids, live, pair_slots, todo, bounds, seats, routes,
    slot_of, owner, rank, used, unused, low, lowest, held, share, newer, older, pinned, fresh, resident, needed,
    ledger, filled, entry, turn_slot, turn_table, tally, log, told,
    layer, pairs, top_k, layers, experts, slots, wave, entries,
    NP: tl.constexpr, EP: tl.constexpr, LP: tl.constexpr, PHASES: tl.constexpr,  # noqa: N803
    JOINT: tl.constexpr, RETAIN: tl.constexpr, PREFETCH: tl.constexpr, NOTE: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`core.access`: the running layer's row lives in registers, the other layers' rows in memory."""
    infinite = tl.full([1], float("inf"), tl.float64)
    column, other, pair = tl.arange(0, EP), tl.arange(0, LP), tl.arange(0, NP)
    base = layer * experts
    # whatever is read without knowing who is needed, at once: reads behind writes would wait for one another
    mine = column < experts
    count = tl.load(live)
    choice = tl.load(ids + pair, mask=pair < pairs, other=experts).to(tl.int32)
    slot = tl.load(slot_of + base + column, mask=mine, other=-1)
    wanted = tl.load(used + base + column, mask=mine, other=0.0)
    resting = tl.load(unused + base + column, mask=mine, other=0.0)
    new = tl.load(fresh + base + column, mask=mine, other=0) != 0
    holding, first, allowed = tl.load(held + layer), tl.load(filled), tl.load(share + layer)
    # who is needed
    alive = (pair < pairs) & (pair // top_k < count) & (choice >= 0) & (choice < experts)
    count = tl.load(resident)
    if NOTE:
        seat = tl.load(seats + pair // top_k, mask=pair < pairs, other=0)
        noted = tl.where(alive, choice, experts)
        tl.store(routes + (seat * layers + layer) * top_k + pair % top_k, noted, mask=pair < pairs)
    tl.store(needed + base + choice, tl.full([NP], 1, tl.uint8), mask=alive)
    tl.debug_barrier()
    need = tl.load(needed + base + column, mask=mine, other=0) != 0
    hit = need & (slot >= 0)
    missing = need & (slot < 0)
    hits = tl.sum(hit.to(tl.int32), 0)
    loads = tl.sum(missing.to(tl.int32), 0)
    turn = tl.where(hit, tl.cumsum(hit.to(tl.int32), 0) - 1, -1)
    turn_at = tl.where(hit, slot, -1)  # where each needed expert is when its turn comes
    phase_at = tl.where(hit, 0, -1)
    table_at = phase_at  # hits that wait for nothing are in a table of their own, before the phases
    awaited = 0
    if PREFETCH:
        tl.store(pinned + base + column, tl.zeros([EP], tl.uint8), mask=mine)
        under_way = tl.load(entry + slot, mask=hit & new, other=-1)
        late = under_way >= 0
        awaited = tl.sum(late.to(tl.int32), 0)
        tl.store(todo + tl.cumsum(late.to(tl.int32), 0) - 1, under_way, mask=late)
        table_at = tl.where(late, 1, table_at)
    after = tl.where(need, wanted, resting)
    row = 0
    if LOG:
        row = tl.load(told)
        tell(log, row, _LAYER, layer, -1, -1, hits + loads, None)
        tell(log, row + 1 + turn, _HIT, layer, column, slot, new.to(tl.int32), hit)
        row += 1 + hits
    found = tl.sum((new & hit).to(tl.int32), 0)
    new = new & (need == 0)
    phase = hits * 0
    evictions, wasted, broken = phase, phase, phase
    tl.store(bounds, 0)
    if loads > 0:
        lows = tl.load(low + other, mask=other < layers, other=float("inf"))
        at_low = tl.load(lowest + other, mask=other < layers, other=0)
        if JOINT:
            ranks = tl.where((slot >= 0) & (need == 0), after, infinite)
        else:
            ranks = tl.where(slot >= 0, after - _NUDGE * (turn + 1).to(tl.float64), infinite)
        number = 0
        while number < loads:  # the interpreter has no `range` over values of the device
            expert = tl.argmin(tl.where(missing, wanted, infinite), 0).to(tl.int32)
            chosen = column == expert
            missing = missing & (column != expert)
            if (number > 0) & (number % wave == 0):
                ranks = tl.where(slot >= 0, after - _NUDGE * (turn + 1).to(tl.float64), infinite)
            before, behind = -1, -1  # turn and phase of the last access that uses the slot
            prior = -1
            if (count < slots) & (holding < allowed):
                place = tl.load(newer + slots)
                follower = tl.load(newer + place)
                tl.store(newer + slots, follower)
                tl.store(older + follower, slots)
                count += 1
                holding += 1
            else:
                own = tl.min(ranks, 0)
                lows = tl.where(other == layer, own, lows)
                if tl.where(allowed < slots, own, tl.min(lows, 0)) == float("inf"):  # the wave has to end here
                    ranks = tl.where(slot >= 0, after - _NUDGE * (turn + 1).to(tl.float64), infinite)
                    own = tl.min(ranks, 0)
                    lows = tl.where(other == layer, own, lows)
                    if tl.where(allowed < slots, own, tl.min(lows, 0)) == float("inf"):
                        broken = 1  # never: the plan leaves slots to corrections
                victim_layer = tl.where(allowed < slots, layer, tl.argmin(lows, 0).to(tl.int32))
                vain = 0
                if victim_layer == layer:
                    victim = tl.argmin(ranks, 0).to(tl.int32)
                    leaves = column == victim
                    place = tl.sum(tl.where(leaves, slot, 0), 0)
                    before = tl.sum(tl.where(leaves, turn, 0), 0)
                    behind = tl.sum(tl.where(leaves, phase_at, 0), 0)
                    vain = tl.sum((leaves & new).to(tl.int32), 0)
                    new = new & (column != victim)
                    slot = tl.where(leaves, -1, slot)
                    ranks = tl.where(leaves, infinite, ranks)
                else:
                    victim = tl.sum(tl.where(other == victim_layer, at_low, 0), 0)
                    theirs = victim_layer * experts
                    place = tl.load(slot_of + theirs + victim)
                    their_ranks = tl.load(rank + theirs + column, mask=mine, other=float("inf"))
                    their_ranks = tl.where(column == victim, infinite, their_ranks)
                    lows = tl.where(other == victim_layer, tl.min(their_ranks, 0), lows)
                    at_low = tl.where(other == victim_layer, tl.argmin(their_ranks, 0).to(tl.int32), at_low)
                    tl.store(slot_of + theirs + victim, -1)
                    tl.store(rank + theirs + victim, float("inf"))
                    tl.store(held + victim_layer, tl.load(held + victim_layer) - 1)
                    holding += 1
                    if PREFETCH:
                        vain = tl.load(fresh + theirs + victim).to(tl.int32)
                        tl.store(fresh + theirs + victim, tl.full([], 0, tl.uint8))
                evictions += 1
                if PREFETCH:  # noqa: SIM102 - one is known to the compiler, the other to the device
                    if vain > 0:
                        wasted += 1
                        prior = call_off(ledger, entries, entry, place)
                        if LOG:
                            tell(log, row, _WASTED, victim_layer, victim, place, 0, None)
                            row += 1
                if LOG:
                    tell(log, row, _EVICT, victim_layer, victim, place, 0, None)
                    row += 1
            if behind >= phase:
                phase = behind + 1
                tl.store(bounds + phase, awaited + number, mask=phase <= PHASES)
            slot = tl.where(chosen, place, slot)
            turn = tl.where(chosen, hits + number, turn)
            turn_at = tl.where(chosen, place, turn_at)
            phase_at = tl.where(chosen, phase, phase_at)
            table_at = tl.where(chosen, 1 + phase, table_at)
            tl.store(owner + place, base + expert)
            load = first + number
            tl.store(todo + awaited + number, load)
            tl.store(ledger + load, base + expert)
            tl.store(ledger + entries + load, place)
            tl.store(ledger + 4 * entries + load, prior)
            if LOG:
                tell(log, row, _MISS, layer, expert, place, before, None)
                row += 1
            number += 1
            tl.debug_barrier()
        tl.store(low + other, lows, mask=other < layers)
        tl.store(lowest + other, at_low, mask=other < layers)
        tl.store(filled, first + loads)
        tl.debug_barrier()
    ends = phase + 1 + tl.arange(0, NP)
    tl.store(bounds + ends, tl.zeros([NP], tl.int32) + awaited + loads, mask=ends <= PHASES)
    # the layer is over: all may leave
    if RETAIN:
        ranks = tl.where(slot >= 0, after, infinite)
    else:
        last = tl.load(older + slots)
        leaving = tl.sum((slot >= 0).to(tl.int32), 0)
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
                tell(log, row, _EVICT, layer, victim, place, 0, None)
                row += 1
        tl.store(older + slots, last)
        count -= leaving
        holding -= leaving
        evictions += leaving
        ranks = tl.where(slot >= 0, after, infinite)
    tl.store(slot_of + base + column, slot, mask=mine)
    tl.store(rank + base + column, ranks, mask=mine)
    tl.store(low + layer, tl.min(ranks, 0))
    tl.store(lowest + layer, tl.argmin(ranks, 0).to(tl.int32))
    tl.store(held + layer, holding)
    tl.store(resident, count)
    add_to(tally + _HITS, hits)
    add_to(tally + _LOADS, loads)
    add_to(tally + _EVICTIONS, evictions)
    add_to(tally + _PHASES, phase)
    if PREFETCH:
        tl.store(fresh + base + column, new.to(tl.uint8), mask=mine)
        add_to(tally + _FRESH, found)
        add_to(tally + _WASTES, wasted)
    if (phase >= PHASES) | (broken > 0):  # never, by `phase_bound`; an expert would be skipped: it must not go unseen
        tl.store(tally + _BROKEN, 1)
    if LOG:
        tl.store(told, row)
    # every pair's slot, in the table of the phase that computes it
    tl.store(turn_slot + column, turn_at, mask=mine)
    tl.store(turn_table + column, table_at, mask=mine)
    tl.debug_barrier()
    place_of = tl.load(turn_slot + choice, mask=alive, other=-1)
    table_of = tl.load(turn_table + choice, mask=alive, other=-1)
    for number in tl.static_range(PHASES + 1):
        tl.store(pair_slots + number * pairs + pair, tl.where(table_of == number, place_of, -1), mask=pair < pairs)
