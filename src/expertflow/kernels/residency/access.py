"""The device twin of `cache.core`: a layer's routing in; the slot of every pair and the layer's loads out.

One program decides a layer. A hit costs no loop. A load costs one iteration that chooses its victim from orders made
before the step (`ranks.line_up`); all loads of a wave are entered into the tables together. Must not know records and
weights.
"""

import triton
import triton.language as tl

from expertflow.cache.core import EVICT, HIT, LAYER, MISS, NUDGE, WASTED
from expertflow.kernels.ledger import CALLED_OFF, CARRIED, DST, PRIOR, SRC, TAKEN
from expertflow.kernels.residency.keys import key_of, rank_of, smallest
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
_HALF = tl.constexpr(1 << 16)
"""Parts two counts in one int32; a layer has far fewer experts."""
LINES = NOW, IF_USED, IF_UNUSED, BY_USED, BY_UNUSED = range(5)
"""Planes of `lines`, int32 `[5, L, E]`: how many ranks of the layer are smaller than the expert's rank now, and than those it
gets if it is used and if not; then the layer's experts in ascending order of `used`, and of `unused`."""
SCRATCH = 7
"""Rows of `scratch`, int32 `[7, E]`: each expert's slot and table; the missing experts in the order of their loads; each loaded
expert's number among them, -1 for residents; the layer's own residents that may leave, in that order; and from a wave's end on, each
resident's phase and position in the schedule."""
_IF_USED, _IF_UNUSED, _BY_USED, _BY_UNUSED = (tl.constexpr(plane) for plane in (IF_USED, IF_UNUSED, BY_USED, BY_UNUSED))
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
def _next_in(line, last):
    """The smallest entry of a line behind `last`, or `_LAST`."""
    return tl.min(tl.where(line > last, line, _LAST), 0)


@triton.jit
def call_off(ledger, entries, entry, place):
    """Call off the load ahead into a slot: no program takes another block of it.

    Returns:
        The ledger entry that the slot's next load has to wait for, or -1.
    """
    prior = tl.load(entry + place)
    if prior >= 0:
        carried = tl.atomic_add(ledger + _TAKEN * entries + prior, _CALLED_OFF, sem="relaxed")
        tl.store(ledger + _CARRIED * entries + prior, carried)
        if carried == 0:  # never begun, so it may itself have had a load to wait for
            prior = tl.load(ledger + _PRIOR * entries + prior)
    return prior


@triton.jit
def _call_off_all(ledger, entries, entry, place, mask):
    """`call_off` for a block of slots."""
    prior = tl.load(entry + place, mask=mask, other=-1)
    begun = prior >= 0
    carried = tl.atomic_add(ledger + _TAKEN * entries + prior, _CALLED_OFF, mask=begun, sem="relaxed")
    tl.store(ledger + _CARRIED * entries + prior, carried, mask=begun)
    tl.debug_barrier()
    # of several threads with the same slot only one has the sum
    carried = tl.load(ledger + _CARRIED * entries + prior, mask=begun, other=1)
    before = tl.load(ledger + _PRIOR * entries + prior, mask=begun & (carried == 0), other=-1)
    return tl.where(begun & (carried == 0), before, prior)


@triton.jit(
    do_not_specialize=["layer", "base", "pairs", "layers", "slots", "wave", "entries"],
    # with nothing known of addresses every vector has one layout: exchanging layouts costs more than wide reads save
    do_not_specialize_on_alignment=[
        "ids", "pair_slots", "todo", "bounds", "state_rows", "routes", "slot_of", "rank", "used", "unused", "low", "lowest",
        "pinned", "fresh", "needed", "ledger", "lines", "scratch", "nudged", "log",
    ],
)  # fmt: skip
# many parameters: 48; every table is a pointer of its own, because Triton takes no structures, and joining tables into one
# buffer would change their addresses and loads
def run_layer(  # noqa: C901, PLR0912, PLR0915 - one program's whole decision: splitting it would split its registers
    ids, live, pair_slots, todo, bounds, state_rows, routes,
    slot_of, owner, rank, used, unused, low, lowest, per_layer, share, newer, older, pinned, fresh, resident, needed,
    ledger, filled, entry, lines, scratch, nudged, tally, log, log_count,
    layer, base, pairs, layers, slots, wave, entries,
    experts: tl.constexpr, top_k: tl.constexpr, NP: tl.constexpr, EP: tl.constexpr, LP: tl.constexpr, PHASES: tl.constexpr,  # noqa: N803
    JOINT: tl.constexpr, RETAIN: tl.constexpr, PREFETCH: tl.constexpr, ROUTES: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`core.access`, wave by wave: victims are chosen one after the other from lines in registers, then all of a wave's loads entered at once.

    `lines` int32 `[5, L, E]` is what `ranks.line_up` wrote, `scratch` int32 `[7, E]` and `nudged` float64 `[E]` are this program's own.
    """
    infinite = tl.full([1], float("inf"), tl.float64)
    column, other, pair = tl.arange(0, EP), tl.arange(0, LP), tl.arange(0, NP)
    cells = layers * experts
    expert_slot, expert_table, turn = scratch, scratch + experts, scratch + 2 * experts
    turn_of, leaving_at = scratch + 3 * experts, scratch + 4 * experts
    phase_of, position_of = scratch + 5 * experts, scratch + 6 * experts
    PART: tl.constexpr = min(EP, 128)  # noqa: N806 - a wave's end is rare, so it may be slow, but must not cost registers
    part = tl.arange(0, PART)
    # read first what does not depend on the needed experts: reads after writes would wait for one another
    mine = column < experts
    count = tl.load(live)
    choice = tl.load(ids + pair, mask=pair < pairs, other=experts).to(tl.int32)
    slot = tl.load(slot_of + base + column, mask=mine, other=-1)
    new = tl.load(fresh + base + column, mask=mine, other=0) != 0
    sorted_at = tl.load(lines + _BY_USED * cells + base + column, mask=mine, other=0)
    sorted_away = tl.load(lines + _BY_UNUSED * cells + base + column, mask=mine, other=0)
    rank_used = tl.load(used + base + column, mask=mine, other=0.0)
    rank_unused = tl.load(unused + base + column, mask=mine, other=0.0)
    line_used = tl.load(lines + _IF_USED * cells + base + column, mask=mine, other=0)
    line_unused = tl.load(lines + _IF_UNUSED * cells + base + column, mask=mine, other=0)
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
    table_at = tl.where(hit, 0, -1)  # hits that wait for no copy are in a table of their own, before the phases
    awaited = 0
    if PREFETCH:
        tl.store(pinned + base + column, tl.zeros([EP], tl.uint8), mask=mine)
        under_way = tl.load(entry + slot, mask=hit & new, other=-1)
        late = under_way >= 0
        awaited = tl.sum(late.to(tl.int32), 0)
        if awaited > 0:
            tl.store(todo + tl.cumsum(late.to(tl.int32), 0) - 1, under_way, mask=late)
        table_at = tl.where(late, 1, table_at)
        tl.store(fresh + base + column, tl.zeros([EP], tl.uint8), mask=hit)
    # the slot of each needed expert when it is computed, and the table of its pairs
    tl.store(expert_slot + column, tl.where(hit, slot, -1), mask=mine)
    tl.store(expert_table + column, table_at, mask=mine)
    logged = 0
    if LOG:
        logged = tl.load(log_count)
        position = tl.cumsum(hit.to(tl.int32), 0) - 1
        write_log(log, logged, _LAYER, layer, -1, -1, hits + loads, None)
        write_log(log, logged + 1 + position, _HIT, layer, column, slot, new.to(tl.int32), hit)
        logged += 1 + hits
    found = tl.sum((new & hit).to(tl.int32), 0)
    zero = hits * 0
    phase, evictions, wasted, broken = zero, zero, zero, zero
    tl.store(bounds, 0)
    if loads > 0:
        # the missing experts in the order of their loads: those of high rank last, because the last ones stay
        lacks = mine & (tl.load(needed + base + sorted_at, mask=mine, other=0) != 0)
        lacks = lacks & (tl.load(slot_of + base + sorted_at, mask=mine, other=0) < 0)
        # its own residents that may leave, in their order; one scan numbers both
        leaves_now = mine & (tl.load(needed + base + sorted_away, mask=mine, other=1) == 0)
        leaves_now = leaves_now & (tl.load(slot_of + base + sorted_away, mask=mine, other=-1) >= 0)
        numbers = tl.cumsum(lacks.to(tl.int32) + leaves_now.to(tl.int32) * _HALF, 0)
        tl.store(turn + numbers % _HALF - 1, sorted_at, mask=lacks)
        tl.store(leaving_at + numbers // _HALF - 1, sorted_away, mask=leaves_now)
        tl.store(turn_of + column, tl.where(slot >= 0, -1, 0), mask=mine)
        mine_left, mine_gone = tl.sum(leaves_now.to(tl.int32), 0), zero
        # of another layer, while it loses experts: each one's place, then its number, so that the smallest entry is the next to leave
        their_line, their_layer, their_last = tl.zeros([EP], tl.int32) + _LAST, zero - 1, zero - 1
        lows_upper, lows_lower = key_of(tl.where(other == layer, infinite, lows))
        best_upper, best_lower, best_layer = smallest(lows_upper, lows_lower, other)
        best = rank_of(best_upper, best_lower)
        best_at = tl.sum(tl.where(other == best_layer, at_low, 0), 0)
        rest, rest_layer, rest_at = best, best_layer, best_at  # the smallest rank of all other layers but `their_layer`
        empty = tl.load(newer + slots)
        tl.debug_barrier()
        expert = tl.load(turn + pair, mask=pair < loads, other=0)
        number, waves = zero, zero
        again = zero  # whether the layer's own residents may leave, needed or not
        if not JOINT:
            again += 1
        while number < loads:  # the interpreter has no `range` over values of the device
            if again > 0:  # `core.end_waves`
                start, turns, present = zero, zero, zero
                while start < experts:
                    col = start + part
                    some = col < experts
                    use = tl.load(needed + base + col, mask=some, other=0) != 0
                    held = tl.load(slot_of + base + col, mask=some, other=-1)
                    loaded_as = tl.load(turn_of + col, mask=some, other=0)
                    known = use & (loaded_as < 0)
                    at = tl.where(known, turns + tl.cumsum(known.to(tl.int32), 0) - 1, -1)
                    order = tl.where(use & (loaded_as >= 0), hits + loaded_as - 2 * (loaded_as % wave) + wave - 1, at)
                    after = tl.load(used + base + col, mask=some & use, other=0.0)
                    after += tl.load(unused + base + col, mask=some & (use == 0), other=0.0)
                    after = tl.where(held >= 0, after - _NUDGE * (order + 1).to(tl.float64), infinite)
                    tl.store(nudged + col, after, mask=some)
                    when = tl.load(expert_table + col, mask=use & (loaded_as >= 0), other=1) - 1
                    tl.store(phase_of + col, tl.where(use, when, -1), mask=some)
                    tl.store(position_of + col, tl.where(use & (loaded_as >= 0), hits + loaded_as, at), mask=some)
                    turns += tl.sum(known.to(tl.int32), 0)
                    present += tl.sum((after < float("inf")).to(tl.int32), 0)
                    start += PART
                tl.debug_barrier()
                start = zero
                while start < experts:
                    col = start + part
                    after = tl.load(nudged + col, mask=col < experts, other=float("inf"))
                    below, index = tl.zeros([PART], tl.int32), zero
                    while index < experts:
                        one = tl.load(nudged + index)
                        below += ((one < after) | ((one == after) & (index < col))).to(tl.int32)
                        index += 1
                    tl.store(leaving_at + below, col, mask=after < float("inf"))
                    start += PART
                tl.debug_barrier()
                mine_left, mine_gone = present, zero
                waves += 1
            mine_at = tl.load(leaving_at, mask=mine_left > 0, other=0)
            mine_rank = tl.load(unused + base + mine_at, mask=(mine_left > 0) & (waves == 0), other=float("inf"))
            mine_rank = tl.load(nudged + mine_at, mask=(mine_left > 0) & (waves > 0), other=mine_rank)
            begin = number
            end = tl.minimum(number - number % wave + wave, loads)
            ready = 1
            # the flat expert that each load of the wave evicts, or -2 - an empty slot
            leaves = tl.full([NP], -1, tl.int32)
            phases, befores = tl.zeros([NP], tl.int32) + phase, leaves
            while (number < end) & (ready > 0):
                chosen = pair == number
                victim, behind, before = zero - 1, zero - 1, zero - 1
                if (count < slots) & (holding < allowed):
                    victim = -2 - empty
                    empty = tl.load(newer + empty)
                    tl.store(newer + slots, empty)
                    tl.store(older + empty, slots)
                    count += 1
                    holding += 1
                else:
                    own = (allowed < slots) | (mine_rank < best) | ((mine_rank == best) & (layer < best_layer))
                    ready = (tl.where(own, mine_rank, best) < float("inf")).to(tl.int32)
                    if own:
                        if ready > 0:
                            victim = base + mine_at
                            behind = tl.load(phase_of + mine_at, mask=waves > 0, other=-1)
                            if LOG:
                                before = tl.load(position_of + mine_at, mask=waves > 0, other=-1)
                            mine_gone += 1
                            some = mine_gone < mine_left
                            mine_at = tl.load(leaving_at + mine_gone, mask=some, other=0)
                            mine_rank = tl.load(unused + base + mine_at, mask=some & (waves == 0), other=float("inf"))
                            mine_rank = tl.load(nudged + mine_at, mask=some & (waves > 0), other=mine_rank)
                    elif ready > 0:
                        theirs = best_layer * experts
                        victim = theirs + best_at
                        if their_layer != best_layer:
                            their_layer = best_layer
                            tl.debug_barrier()
                            line = tl.load(lines + theirs + column, mask=mine, other=0) * EP + column
                            there = tl.load(rank + theirs + column, mask=mine, other=float("inf")) < float("inf")
                            their_line = tl.where(there, line, _LAST)
                            their_last = _next_in(their_line, zero - 1)
                            lows_upper = tl.where(other == best_layer, _INFINITE, lows_upper)
                            lows_lower = tl.where(other == best_layer, -1 - _LAST, lows_lower)
                            rest_upper, rest_lower, rest_layer = smallest(lows_upper, lows_lower, other)
                            rest = rank_of(rest_upper, rest_lower)
                            rest_at = tl.sum(tl.where(other == rest_layer, at_low, 0), 0)
                        their_last = _next_in(their_line, their_last)
                        at = tl.where(their_last < _LAST, their_last & (EP - 1), 0)
                        left = tl.load(rank + theirs + at, mask=their_last < _LAST, other=float("inf"))
                        tl.store(rank + victim, float("inf"))
                        tl.store(low + best_layer, left)
                        tl.store(lowest + best_layer, at)
                        if (left < rest) | ((left == rest) & (best_layer < rest_layer)):
                            best, best_at = left, at
                        else:
                            upper, lower = key_of(left)
                            lows_upper = tl.where(other == best_layer, upper, lows_upper)
                            lows_lower = tl.where(other == best_layer, lower, lows_lower)
                            at_low = tl.where(other == best_layer, at, at_low)
                            best, best_layer, best_at = rest, rest_layer, rest_at
                        holding += 1
                if ready > 0:
                    if behind >= phase:
                        phase = behind + 1
                        tl.store(bounds + phase, awaited + number, mask=phase <= PHASES)
                        phases = tl.where(pair >= number, phase, phases)
                    leaves = tl.where(chosen, victim, leaves)
                    if LOG:
                        befores = tl.where(chosen, before, befores)
                    number += 1
            # enter the wave's loads: read what is there, then write
            done = (pair >= begin) & (pair < number)
            evicts = done & (leaves >= 0)
            places = tl.where(evicts, tl.load(slot_of + leaves, mask=evicts, other=0), -2 - leaves)
            victim_layer = leaves // experts
            prior, was_fresh = tl.full([NP], -1, tl.int32), evicts & (pair < 0)
            if PREFETCH:
                was_fresh = tl.load(fresh + leaves, mask=evicts, other=0) != 0
                unused_loads = tl.sum(was_fresh.to(tl.int32), 0)
                if unused_loads > 0:
                    prior = _call_off_all(ledger, entries, entry, places, was_fresh)
                    tl.store(fresh + leaves, tl.zeros([NP], tl.uint8), mask=was_fresh)
                    wasted += unused_loads
            tl.debug_barrier()
            flat, load = base + expert, first + pair
            tl.store(slot_of + leaves, tl.full([NP], -1, tl.int32), mask=evicts)
            tl.atomic_add(per_layer + victim_layer, -1, mask=evicts & (victim_layer != layer), sem="relaxed")
            tl.store(slot_of + flat, places, mask=done)
            tl.store(owner + places, flat, mask=done)
            tl.store(todo + awaited + pair, load, mask=done)
            tl.store(ledger + _SRC * entries + load, flat, mask=done)
            tl.store(ledger + _DST * entries + load, places, mask=done)
            tl.store(ledger + _PRIOR * entries + load, prior, mask=done)
            tl.store(expert_slot + expert, places, mask=done)
            tl.store(expert_table + expert, 1 + phases, mask=done)
            tl.store(turn_of + expert, pair, mask=done)
            evictions += tl.sum(evicts.to(tl.int32), 0)
            if LOG:
                written = done.to(tl.int32) + evicts.to(tl.int32) + was_fresh.to(tl.int32)
                at_entry = logged + tl.cumsum(written, 0) - written
                write_log(log, at_entry, _WASTED, victim_layer, leaves % experts, places, 0, was_fresh)
                at_entry += was_fresh.to(tl.int32)
                write_log(log, at_entry, _EVICT, victim_layer, leaves % experts, places, 0, evicts)
                write_log(log, at_entry + evicts.to(tl.int32), _MISS, layer, expert, places, befores, done)
                logged += tl.sum(written, 0)
            tl.debug_barrier()
            if (number == begin) & (again > 0):  # cannot happen: the plan keeps slots free for corrections
                broken += 1
                number = loads
            again = zero + 1
        tl.store(filled, first + loads)
    ends = phase + 1 + tl.arange(0, NP)
    tl.store(bounds + ends, tl.zeros([NP], tl.int32) + awaited + loads, mask=ends <= PHASES)
    tl.debug_barrier()
    # every pair's slot, in the table of the phase that computes it
    place_of = tl.load(expert_slot + choice, mask=alive, other=-1)
    table_of = tl.load(expert_table + choice, mask=alive, other=-1)
    slot = tl.load(slot_of + base + column, mask=mine, other=-1)
    for number in tl.static_range(PHASES + 1):
        tl.store(pair_slots + number * pairs + pair, tl.where(table_of == number, place_of, -1), mask=pair < pairs)
    # after the layer all residents may be evicted
    after = tl.where(need, rank_used, rank_unused)
    line = tl.where(need, line_used, line_unused)
    if not RETAIN:
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
        tl.store(slot_of + base + column, slot, mask=mine)
    tl.store(rank + base + column, tl.where(slot >= 0, after, infinite), mask=mine)
    tl.store(lines + base + column, line, mask=mine)
    head = tl.min(tl.where(slot >= 0, line * EP + column, _LAST), 0)
    at, some = head & (EP - 1), head < _LAST
    was_needed = tl.load(needed + base + at, mask=some, other=0) != 0
    lowest_rank = tl.load(used + base + at, mask=some & was_needed, other=float("inf"))
    lowest_rank = tl.load(unused + base + at, mask=some & (was_needed == 0), other=lowest_rank)
    tl.store(low + layer, lowest_rank)
    tl.store(lowest + layer, tl.where(some, at, 0))
    tl.store(per_layer + layer, holding)
    tl.store(resident, count)
    add_to(tally + _HITS, hits)
    add_to(tally + _LOADS, loads)
    add_to(tally + _EVICTIONS, evictions)
    add_to(tally + _PHASES, phase)
    if PREFETCH:
        add_to(tally + _FRESH, found)
        add_to(tally + _WASTES, wasted)
    if (phase >= PHASES) | (
        broken > 0
    ):  # cannot happen, by `phase_bound`; if it does, the host raises, because an expert would be skipped
        tl.store(tally + _BROKEN, 1)
    if LOG:
        tl.store(log_count, logged)
