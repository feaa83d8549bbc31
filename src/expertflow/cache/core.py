"""Decide which slot an expert gets, which expert is evicted, and what is prefetched, over flat arrays.

The engine calls these functions through `CacheController`, the simulator compiles them (`cache.shared`), and the device
kernels are their twins. They take facts and write log entries. Must not know clocks, copies and torch.

Every expert has a rank. The expert with the smallest rank is evicted, the lowest expert number among equals. An expert
that may not be evicted now (its layer is running, or the plan still needs it) has an infinite rank. A large layer has no
share of the slots: its experts are always in places behind them, their ranks infinite (`policy.keep`), so all are hits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.shared import shared

EMPTY = -1
LOG, PENDING, RESIDENT = 0, 1, 2
"""Places in `Tables.cursor`."""
LAYER, HIT, MISS, PREFETCH, EVICT, WASTED = 0, 1, 2, 3, 4, 5
"""Kinds of log entries, in the order of `events.KINDS`."""
NUDGE = 1e-6
"""Orders equal ranks inside a wave; it is smaller than any difference between two ranks."""


class Tables(NamedTuple):
    """What the cache remembers of L layers x E experts and S slots.

    Attributes:
        slot_of: `[L, E]` int32, the expert's slot or -1; a large layer's experts have places from S on.
        owner: `[S]` int32, the flat expert number `layer * E + index` in the slot, or -1.
        rank: `[L, E]` float64, the smallest is evicted; infinite if absent or not evictable now.
        pinned: `[L, E]` bool, experts the plan of this step still needs: resident, or promised a slot.
        fresh: `[L, E]` bool, prefetched and not used yet.
        per_layer: `[L]` int64, slots that each layer has.
        share: `[L]` int64, the most slots a layer may have; 0 for a large layer.
        low: `[L]` float64, the smallest rank of each layer.
        lowest: `[L]` int64, the lowest expert number that has it; -1 if both have to be found anew.
        newer: `[S + 1]` int32, the next entry in the ring of empty slots, longest empty first; entry S joins its ends.
        older: `[S + 1]` int32, the entry before in that ring.
        last_access: `[S + places]` int32, position of the slot's last access in the running layer's schedule, or -1.
        order: `[S + places]` int32, which of the running layer's experts is evicted first among equals: the largest.
        pending: `[L * E, 3]` int32, planned loads that wait for a layer: flat expert, slot, that layer.
        log: `[N, 5]` int32, the decisions: kind, layer, expert, slot, and a detail of the kind.
        cursor: `[3]` int64, see `LOG`.
    """

    slot_of: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]
    rank: npt.NDArray[np.float64]
    pinned: npt.NDArray[np.bool_]
    fresh: npt.NDArray[np.bool_]
    per_layer: npt.NDArray[np.int64]
    share: npt.NDArray[np.int64]
    low: npt.NDArray[np.float64]
    lowest: npt.NDArray[np.int64]
    newer: npt.NDArray[np.int32]
    older: npt.NDArray[np.int32]
    last_access: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    pending: npt.NDArray[np.int32]
    log: npt.NDArray[np.int32]
    cursor: npt.NDArray[np.int64]


class Planes(NamedTuple):
    """A policy's ranks for one step, `[L, E]` float64 each; the smallest is evicted.

    Attributes:
        before: while the expert's layer has not run in this step.
        used: from then on, if the layer used it.
        unused: from then on, if not.
        limit: a load ahead may evict only an expert of a smaller rank than this; none is above `before`.
    """

    before: npt.NDArray[np.float64]
    used: npt.NDArray[np.float64]
    unused: npt.NDArray[np.float64]
    limit: npt.NDArray[np.float64]


class Rules(NamedTuple):
    """A strategy's numbers.

    Attributes:
        retain: whether experts stay after their layer.
        prefetch: whether the strategy loads experts ahead.
        threshold: the least demand for which an expert is prefetched.
        reserve: slots the plan keeps free for corrections.
        ahead: layers a prefetch may run ahead of its layer.
        rolling: whether the plan is made anew after every layer, not once a step.
        wraps: whether a rolling plan continues into the next step's first layers.
        wave: loads of a layer after which its slots may be used again within it.
        joint: whether a layer's hits are computed together with its first wave of loads, and keep their slots until then.
    """

    retain: bool
    prefetch: bool
    threshold: float
    reserve: int
    ahead: int
    rolling: bool
    wraps: bool
    wave: int
    joint: bool


def make_tables(layers: int, experts: int, slots: int, *, divided: bool, large: Sequence[int] = ()) -> Tables:
    """Make tables in which every slot is empty.

    Args:
        layers: MoE layers.
        experts: experts a layer.
        slots: slots in all.
        divided: give each layer an equal share, the first layers one slot more if they do not divide evenly. With
            fewer slots than layers all layers share them.
        large: layers whose experts are always resident, outside the slots.
    """
    share = np.full(layers, slots, dtype=np.int64)
    small = np.setdiff1d(np.arange(layers), large)
    if divided and slots >= small.size:
        base, extra = divmod(slots, small.size)
        share[:] = base
        share[small[:extra]] += 1
    slot_of = np.full((layers, experts), EMPTY, dtype=np.int32)
    for number, layer in enumerate(large):
        share[layer] = 0
        slot_of[layer] = np.arange(experts) + (slots + number * experts)
    return Tables(
        slot_of=slot_of,
        owner=np.full(slots, EMPTY, dtype=np.int32),
        rank=np.full((layers, experts), np.inf),
        pinned=np.zeros((layers, experts), dtype=np.bool_),
        fresh=np.zeros((layers, experts), dtype=np.bool_),
        per_layer=np.zeros(layers, dtype=np.int64),
        share=share,
        low=np.full(layers, np.inf),
        lowest=np.full(layers, -1, dtype=np.int64),
        newer=np.roll(np.arange(slots + 1, dtype=np.int32), -1),
        older=np.roll(np.arange(slots + 1, dtype=np.int32), 1),
        last_access=np.full(slots + len(large) * experts, -1, dtype=np.int32),
        order=np.full(slots + len(large) * experts, -1, dtype=np.int32),
        pending=np.zeros((layers * experts, 3), dtype=np.int32),
        log=np.zeros((4 * experts + 6 * slots + 8, 5), dtype=np.int32),
        cursor=np.zeros(3, dtype=np.int64),
    )


@shared
def write_log(t: Tables, kind: int, layer: int, expert: int, slot: int, detail: int) -> None:
    """Append an entry to the log."""
    entry = t.log[t.cursor[LOG]]
    entry[0], entry[1], entry[2], entry[3], entry[4] = kind, layer, expert, slot, detail
    t.cursor[LOG] += 1


@shared
def fill_slot(t: Tables, layer: int, expert: int, slot: int) -> None:
    """Put an expert into an empty slot; its rank stays infinite for now."""
    older, newer = t.older[slot], t.newer[slot]
    t.newer[older], t.older[newer] = newer, older
    t.slot_of[layer, expert] = slot
    t.owner[slot] = layer * t.slot_of.shape[1] + expert
    t.per_layer[layer] += 1
    t.cursor[RESIDENT] += 1


@shared
def evict(t: Tables, slot: int) -> None:
    """Empty a slot, and log an unused prefetch as wasted."""
    layer, expert = divmod(t.owner[slot], t.slot_of.shape[1])
    if t.fresh[layer, expert]:
        t.fresh[layer, expert] = False
        write_log(t, WASTED, layer, expert, slot, 0)
    t.slot_of[layer, expert] = EMPTY
    t.rank[layer, expert] = np.inf
    t.lowest[layer] = -1
    t.owner[slot] = EMPTY
    t.per_layer[layer] -= 1
    t.cursor[RESIDENT] -= 1
    end = t.owner.shape[0]
    last = t.older[end]
    t.newer[last], t.older[slot], t.newer[slot], t.older[end] = slot, last, end, slot
    write_log(t, EVICT, layer, expert, slot, 0)


@shared
def find_lowest(rank: npt.NDArray[np.float64], low: npt.NDArray[np.float64], lowest: npt.NDArray[np.int64]) -> int:
    """Find the layer with the smallest rank of all, the first among equals; searches changed layers only."""
    for layer in (lowest < 0).nonzero()[0]:
        column = rank[layer].argmin()
        lowest[layer] = column
        low[layer] = rank[layer, column]
    return int(low.argmin())


@shared
def make_room(t: Tables, layer: int) -> int:
    """Find a slot for the layer: the longest empty one, else that of the smallest rank; -1 if none may be emptied."""
    slots = t.owner.shape[0]
    if t.cursor[RESIDENT] < slots and t.per_layer[layer] < t.share[layer]:
        return int(t.newer[slots])
    if t.share[layer] < slots:
        found, expert = layer, int(t.rank[layer].argmin())
    else:
        found = find_lowest(t.rank, t.low, t.lowest)
        expert = int(t.lowest[found])
    if t.rank[found, expert] == np.inf:
        return -1
    slot = int(t.slot_of[found, expert])
    evict(t, slot)
    return slot


@shared
def rank_residents(t: Tables, planes: Planes, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """Rank a layer's residents by what is known after the layer has run; all of them may be evicted."""
    after = np.where(needed, planes.used[layer], planes.unused[layer])
    t.rank[layer] = np.where(t.slot_of[layer] >= 0, after, np.inf)
    t.lowest[layer] = -1


@shared
def end_wave(
    t: Tables,
    planes: Planes,
    layer: int,
    needed: npt.NDArray[np.bool_],
    over: npt.NDArray[np.int64],
) -> None:
    """Make the running layer's experts `over`, which have been computed, evictable; among equals the last wave's first.

    So experts of low rank pass through few slots, and the layer's other residents stay. Within a wave the first one goes first:
    it is computed while the next one is copied, so the link need not wait.
    """
    for expert in over:
        slot = t.slot_of[layer, expert]
        if slot >= 0:
            after = planes.used[layer, expert] if needed[expert] else planes.unused[layer, expert]
            t.rank[layer, expert] = after - NUDGE * (t.order[slot] + 1)
    t.lowest[layer] = -1


@shared
def end_waves(
    t: Tables, planes: Planes, layer: int, needed: npt.NDArray[np.bool_], kept: npt.NDArray[np.bool_]
) -> None:
    """Do `end_wave` for all residents of the layer except those `kept`."""
    after = np.where(needed, planes.used[layer], planes.unused[layer]) - NUDGE * (t.order[t.slot_of[layer]] + 1)
    t.rank[layer] = np.where((t.slot_of[layer] >= 0) & ~kept, after, t.rank[layer])
    t.lowest[layer] = -1


@shared
def begin_step(t: Tables, planes: Planes) -> None:
    """Rank every resident by what is known before the step; unused prefetches stay pinned (see `prefetch.open_step`)."""
    t.cursor[PENDING] = 0  # loads that waited for a layer that did not run
    t.pinned[:] = t.pinned & t.fresh
    t.rank[:] = np.where((t.slot_of >= 0) & ~t.pinned, planes.before, np.inf)
    t.lowest[:] = -1


@shared
def access(t: Tables, planes: Planes, rules: Rules, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """Decide the accesses of a layer whose routing is known.

    Residents come first: they compute while the others are copied, and none of them is evicted before it is computed.
    Then come the loads, in waves of `rules.wave`. After a wave its experts and those before it may be evicted for the
    next one. So a layer runs even if it needs more experts than there are slots, and an expert of low rank keeps a slot
    only while it is computed.

    The engine calls the parts instead, to carry out an access before the next one is decided: `take_hits`, `place_miss`
    for each load, `finish_layer`.

    Args:
        t: changed in place. Log entries are LAYER (detail: experts needed), HIT (detail: 1 if prefetched and unused so
            far) and MISS. The detail of MISS is the position in the schedule of the slot's last access, or -1.
        planes: ranks of this step.
        rules: the strategy's numbers.
        layer: MoE layer.
        needed: `[E]` bool, the experts it needs.
    """
    misses, kept = take_hits(t, planes, rules, layer, needed)
    for number in range(misses.size):
        place_miss(t, planes, rules, layer, needed, misses, kept, number)
    finish_layer(t, planes, rules, layer, needed)


@shared
def take_hits(
    t: Tables, planes: Planes, rules: Rules, layer: int, needed: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Log the layer's hits and order its misses.

    Returns:
        The missing experts in the order of their loads, highest rank last because the last ones stay. Then bool `[E]`,
        the residents that may not be evicted before the first wave of loads is over.
    """
    present = t.slot_of[layer] >= 0
    hits = np.flatnonzero(needed & present)
    misses = np.flatnonzero(needed & ~present)
    write_log(t, LAYER, layer, -1, -1, hits.size + misses.size)
    t.pinned[layer] = False
    for position in range(hits.size):
        expert = hits[position]
        slot = t.slot_of[layer, expert]
        t.last_access[slot] = t.order[slot] = position
        write_log(t, HIT, layer, expert, slot, int(t.fresh[layer, expert]))
        t.fresh[layer, expert] = False
    kept = needed & rules.joint
    if misses.size:
        misses = misses[np.argsort(planes.used[layer][misses], kind="mergesort")]
        t.rank[layer] = np.where(kept, np.inf, t.rank[layer])
    return misses, kept


@shared
def finish_layer(t: Tables, planes: Planes, rules: Rules, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """Rank the layer's residents after its last access; evict them if the strategy retains nothing."""
    t.last_access[:] = t.order[:] = -1
    rank_residents(t, planes, layer, needed)
    if not rules.retain and t.share[layer]:
        for expert in np.flatnonzero(t.slot_of[layer] >= 0):
            evict(t, t.slot_of[layer, expert])


@shared
def drop_plan(t: Tables, planes: Planes, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """Unpin every expert, because the plan waits for layers that do not run (a decoder without its encoder)."""
    t.pinned[:] = False
    t.rank[:] = np.where(t.slot_of >= 0, planes.before, np.inf)
    t.lowest[:] = -1
    end_waves(t, planes, layer, needed, np.zeros_like(needed))


@shared
def place_miss(  # noqa: PLR0913, PLR0917 - the results of `take_hits`, each used as it is
    t: Tables,
    planes: Planes,
    rules: Rules,
    layer: int,
    needed: npt.NDArray[np.bool_],
    misses: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
    number: int,
) -> None:
    """Give the `number`-th missing expert of the running layer a slot; `kept` stay until the first wave is over."""
    expert = misses[number]
    if number == 0 or (rules.joint and number == rules.wave):
        end_waves(t, planes, layer, needed, kept)
        kept[:] = False
    elif number % rules.wave == 0:
        end_wave(t, planes, layer, needed, misses[number - rules.wave : number])
    slot = make_room(t, layer)
    if slot < 0:
        end_waves(t, planes, layer, needed, kept)
        slot = make_room(t, layer)
    if slot < 0:
        drop_plan(t, planes, layer, needed)
        slot = make_room(t, layer)
    fill_slot(t, layer, expert, slot)
    write_log(t, MISS, layer, expert, slot, t.last_access[slot])
    position = np.count_nonzero(needed) - misses.size + number
    t.last_access[slot] = position
    t.order[slot] = position - 2 * (number % rules.wave) + rules.wave - 1  # waves ascend, and each of them descends


@shared
def carry_out(t: Tables, now: int) -> None:
    """Bind the planned loads whose slots are free after layer `now`, and log each as PREFETCH."""
    waiting = t.cursor[PENDING]
    left = 0
    for entry in range(waiting):
        flat, slot = t.pending[entry, 0], t.pending[entry, 1]
        if t.pending[entry, 2] > now:
            t.pending[left] = t.pending[entry]
            left += 1
            continue
        layer, expert = divmod(flat, t.slot_of.shape[1])
        if t.slot_of[layer, expert] >= 0:
            continue  # a layer that did not run left the slot occupied, and the expert was loaded as a miss
        if t.owner[slot] != EMPTY:
            evict(t, slot)
        fill_slot(t, layer, expert, slot)
        t.fresh[layer, expert] = True
        write_log(t, PREFETCH, layer, expert, slot, now)
    t.cursor[PENDING] = left


@shared
def close(t: Tables) -> None:
    """Log every prefetch that was never used as wasted, at the end of a run."""
    for slot in range(t.owner.shape[0]):
        if t.owner[slot] != EMPTY:
            layer, expert = divmod(t.owner[slot], t.slot_of.shape[1])
            if t.fresh[layer, expert]:
                t.fresh[layer, expert] = False
                write_log(t, WASTED, layer, expert, slot, 0)
