"""The device twin of `cache.prefetch`: which experts to load ahead, into which slots, and after which layer.

One program sweeps through the coming layers with every expert's rank in its registers: a planned load costs a few
reductions over all of them. Then the loads whose slots are free after layer `now` are bound and enter the ledger. Must
not know records and weights.
"""

import triton
import triton.language as tl

from expertflow.cache.core import EVICT, PREFETCH, WASTED
from expertflow.kernels.ledger import DST, PRIOR, SRC
from expertflow.kernels.residency.access import add_to, call_off, write_log
from expertflow.kernels.residency.state import AHEAD, BROKEN, EVICTIONS, WASTES

_PREFETCH, _EVICT, _WASTED = (tl.constexpr(kind) for kind in (PREFETCH, EVICT, WASTED))
_AHEAD, _EVICTIONS, _WASTES, _BROKEN = (tl.constexpr(place) for place in (AHEAD, EVICTIONS, WASTES, BROKEN))
_SRC, _DST, _PRIOR = (tl.constexpr(field) for field in (SRC, DST, PRIOR))


@triton.jit
def _count(mask):
    return tl.sum(mask.to(tl.int32), 0)


@triton.jit
def _pin_residents(want, at, pin, layer_of, inside, place_of, now, layers, room):
    """`prefetch.pin_residents`: which experts are pinned, and how many while each place runs."""
    pins = place_of * 0
    add = want & (at >= 0) & ~pin
    total = 0
    place = now + 1
    while place < now + 1 + layers:
        mine = inside & (layer_of == place % layers)
        already, more = pin & mine, add & mine
        before = total
        total += _count(already)
        extra = _count(more)
        if (extra > 0) & (place < layers):
            if total + extra > room:  # the first ones, in the order of experts, as long as there is room
                both = (already | more).to(tl.int32)
                more = more & (before + tl.cumsum(both, 0) - both < room)
                extra = _count(more)
            pin = pin | more
            total += extra
        pins += tl.where((place_of > now) & (place_of <= place), total - before, 0)
        place += 1
    return pin, pins


@triton.jit
def _bind(  # noqa: PLR0915 - as `look_ahead`
    slot_of, owner, rank, low, lowest, per_layer, newer, older, fresh, resident, pending, waiting, ledger, filled, entry,
    tally, log, logged, now, layers, experts, entries, EP: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`prefetch.carry_out`: the planned loads whose slots are free after `now`; returns the log's next entry."""
    count, kept, index = tl.load(waiting), 0, 0
    load = tl.load(filled)
    begin = load
    column = tl.arange(0, EP)
    evictions, wasted = load * 0, load * 0
    while index < count:
        # everything that decides is read before anything is written: one thread writes, and the other warps may lag
        flat = tl.load(pending + 3 * index)
        slot, after = tl.load(pending + 3 * index + 1), tl.load(pending + 3 * index + 2)
        present, theirs = tl.load(slot_of + flat) >= 0, tl.load(owner + slot)
        was_fresh = tl.load(fresh + theirs, mask=theirs >= 0, other=0) != 0
        before, behind = tl.load(older + slot), tl.load(newer + slot)
        tl.debug_barrier()
        if after > now:
            tl.store(pending + 3 * kept, flat)
            tl.store(pending + 3 * kept + 1, slot)
            tl.store(pending + 3 * kept + 2, after)
            kept += 1
        elif not present:
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
                tl.store(per_layer + layer, tl.load(per_layer + layer) - 1)
                tl.debug_barrier()
                ranks = tl.load(rank + layer * experts + column, mask=column < experts, other=float("inf"))
                tl.store(low + layer, tl.min(ranks, 0))
                tl.store(lowest + layer, tl.argmin(ranks, 0).to(tl.int32))
                evictions += 1
                if LOG:
                    write_log(log, logged, _EVICT, layer, theirs % experts, slot, 0, None)
                    logged += 1
            else:
                tl.store(newer + before, behind)
                tl.store(older + behind, before)
                tl.store(resident, tl.load(resident) + 1)
            tl.store(slot_of + flat, slot)
            tl.store(owner + slot, flat)
            tl.store(per_layer + flat // experts, tl.load(per_layer + flat // experts) + 1)
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
        index += 1
        tl.debug_barrier()
    tl.store(waiting, kept)
    tl.store(filled, load)
    add_to(tally + _AHEAD, load - begin)
    add_to(tally + _EVICTIONS, evictions)
    add_to(tally + _WASTES, wasted)
    return begin, load, logged


@triton.jit(do_not_specialize=["now", "last", "layers", "experts", "slots", "room", "reach", "entries"])
# many parameters: 41; as `access.run_layer`
def look_ahead(  # noqa: C901, PLR0912, PLR0915 - one program's whole decision: splitting it would split its registers
    slot_of, owner, rank, low, lowest, per_layer, newer, older, pinned, fresh, resident,
    demand, known, limit, used, unused, pending, waiting, ledger, filled, entry, ahead, tally, log, log_count,
    now, last, layers, experts, slots, room, reach, entries,
    THRESHOLD: tl.constexpr, PLAN: tl.constexpr, ROLLING: tl.constexpr, CELLS: tl.constexpr,  # noqa: N803
    PLACES: tl.constexpr, EP: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`prefetch.plan` for places `now + 1 .. last - 1`, then `prefetch.carry_out`."""
    if PLAN:
        infinite = tl.full([1], float("inf"), tl.float64)
        cell, place_of = tl.arange(0, CELLS), tl.arange(0, PLACES)
        inside = cell < layers * experts
        layer_of = cell // experts
        chance = tl.load(demand + cell, mask=inside, other=0.0)
        want = inside & (chance >= THRESHOLD) & (tl.load(known) > 0)
        at = tl.load(slot_of + cell, mask=inside, other=-1)
        old = tl.load(pinned + cell, mask=inside, other=0) != 0
        pin, pins = _pin_residents(want, at, old, layer_of, inside, place_of, now, layers, room)
        ranks = tl.where(pin & ~old, infinite, tl.load(rank + cell, mask=inside, other=float("inf")))
        tl.store(rank + cell, ranks, mask=inside)
        tl.store(pinned + cell, pin.to(tl.uint8), mask=inside)
        tl.debug_barrier()
        column, layer = tl.arange(0, EP), 0
        while layer < layers:
            layer_ranks = tl.load(rank + layer * experts + column, mask=column < experts, other=float("inf"))
            tl.store(low + layer, tl.min(layer_ranks, 0))
            tl.store(lowest + layer, tl.argmin(layer_ranks, 0).to(tl.int32))
            layer += 1
        left, empty = slots - tl.load(resident), tl.load(newer + slots)
        busy = cell * 0 + now
        count = tl.load(waiting)
        place, going = now + 1, 1
        while (place < last) & (going > 0):
            layer = place % layers
            mine = inside & (layer_of == layer)
            lacking = want & mine & (at < 0)
            todo, served = _count(lacking), 1
            if todo > 0:
                value = tl.load(used + cell, mask=mine, other=0.0)
                if place < layers:
                    value = tl.load(limit + cell, mask=mine, other=0.0)
                while (todo > 0) & (served > 0):
                    best = tl.argmax(tl.where(lacking, chance, -1.0), 0).to(tl.int32)
                    chosen = cell == best
                    slot, victim, after = empty, -1, now
                    if left <= 0:
                        victim = tl.argmin(ranks, 0).to(tl.int32)
                        worth = tl.sum(tl.where(chosen, value, 0.0), 0)
                        slot = -1
                        if tl.min(ranks, 0) < worth:
                            slot = tl.sum(tl.where(cell == victim, at, 0), 0)
                            after = tl.sum(tl.where(cell == victim, busy, 0), 0)
                    after = tl.maximum(after, place - 1 - reach)
                    full = (place_of > after) & (place_of <= place) & (pins >= room)
                    after = tl.maximum(after, tl.max(tl.where(full, place_of, -1), 0))
                    served = ((slot >= 0) & (after < place)).to(tl.int32)
                    if ROLLING:
                        served = served * (after <= now).to(tl.int32)
                    if served > 0:
                        pins += ((place_of > after) & (place_of <= place)).to(tl.int32)
                        if left > 0:
                            left -= 1
                            empty = tl.load(newer + slot)
                        gone = cell == victim
                        at = tl.where(gone, -1, at)
                        ranks = tl.where(gone, infinite, ranks)
                        at = tl.where(chosen, slot, at)
                        lacking = lacking & ~chosen
                        tl.store(pinned + best, tl.full([], 1, tl.uint8))
                        tl.store(pending + 3 * count, best)
                        tl.store(pending + 3 * count + 1, slot)
                        tl.store(pending + 3 * count + 2, after)
                        count += 1
                        todo -= 1
            if ROLLING:
                going = served
            if (place < layers) & (going > 0):  # after the layer its experts may be evicted, ranked by their next use
                here = mine & (at >= 0)
                then = tl.load(unused + cell, mask=mine, other=0.0)
                then = tl.where(want, tl.load(used + cell, mask=mine, other=0.0), then)
                ranks = tl.where(mine, tl.where(here, then, infinite), ranks)
                busy = tl.where(here & want, place, busy)
            place += 1
        tl.store(waiting, count)
        tl.debug_barrier()
    logged = 0
    if LOG:
        logged = tl.load(log_count)
    begin, end, logged = _bind(
        slot_of, owner, rank, low, lowest, per_layer, newer, older, fresh, resident, pending, waiting, ledger, filled, entry,
        tally, log, logged, now, layers, experts, entries, EP, LOG,
    )  # fmt: skip
    if LOG:
        tl.store(log_count, logged)
    tl.store(ahead + 2 * (now + 1), begin)
    tl.store(ahead + 2 * (now + 1) + 1, end)
