"""The decisions themselves: which slot, who leaves, what is prefetched, as functions over flat arrays.

The engine calls them through `CacheController`, the simulator compiles them (`cache.shared`); the device kernels are
their twins. Facts in, log rows out: no clock, no copies, no torch.

Every expert has a rank, and who leaves is the extremum: the smallest rank, the lowest expert number among equals.
An expert that may not leave now (its layer is running, or the plan still needs it) ranks infinitely high.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.shared import shared

EMPTY = -1
LOG, PENDING, RESIDENT = 0, 1, 2
"""Places in `Tables.cursor`."""
LAYER, HIT, MISS, PREFETCH, EVICT, WASTED = 0, 1, 2, 3, 4, 5
"""Kinds of log rows; the order of `controller.KINDS`."""
_NUDGE = 1e-6
"""Orders equal ranks inside a wave; ranks that differ, differ by more."""


class Tables(NamedTuple):
    """Everything that is remembered of L layers x E experts and S slots.

    Attributes:
        slot_of: `[L, E]` int32, the expert's slot or -1.
        owner: `[S]` int32, the flat expert number `layer * E + index` in the slot, or -1.
        rank: `[L, E]` float64, what eviction looks at; infinite if absent or not allowed to leave.
        pinned: `[L, E]` bool, experts the plan of this step still needs: resident, or promised a slot.
        fresh: `[L, E]` bool, prefetched and not used yet.
        held: `[L]` int64, residents of each layer.
        share: `[L]` int64, the most a layer may hold.
        low: `[L]` float64, the smallest rank of each layer.
        lowest: `[L]` int64, the lowest expert number that has it; -1 if both have to be found anew.
        newer: `[S + 1]` int32, the empty slots as a ring, the longest empty first: who follows; S is the ring's joint.
        older: `[S + 1]` int32, who comes before.
        turn: `[S]` int32, place of the slot's last access in the running schedule, or -1.
        pending: `[L * E, 3]` int32, planned loads that wait for a layer: flat expert, slot, that layer.
        log: `[N, 5]` int32, what was decided: kind, layer, expert, slot, and a detail of the kind.
        cursor: `[3]` int64, see `LOG`.
    """

    slot_of: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]
    rank: npt.NDArray[np.float64]
    pinned: npt.NDArray[np.bool_]
    fresh: npt.NDArray[np.bool_]
    held: npt.NDArray[np.int64]
    share: npt.NDArray[np.int64]
    low: npt.NDArray[np.float64]
    lowest: npt.NDArray[np.int64]
    newer: npt.NDArray[np.int32]
    older: npt.NDArray[np.int32]
    turn: npt.NDArray[np.int32]
    pending: npt.NDArray[np.int32]
    log: npt.NDArray[np.int32]
    cursor: npt.NDArray[np.int64]


class Planes(NamedTuple):
    """A policy's ranks for one step, `[L, E]` float64 each; the smallest leaves.

    Attributes:
        before: while the expert's layer has not run in this step.
        used: from then on, if the layer used it.
        unused: from then on, if not.
        limit: the rank that whoever makes room for a load ahead has to be below; none is above `before`.
    """

    before: npt.NDArray[np.float64]
    used: npt.NDArray[np.float64]
    unused: npt.NDArray[np.float64]
    limit: npt.NDArray[np.float64]


class Rules(NamedTuple):
    """A strategy's numbers.

    Attributes:
        retain: whether experts stay after their layer.
        prefetch: whether there is a plan at all.
        threshold: a demand from which an expert is prefetched.
        reserve: slots the plan leaves to corrections.
        ahead: layers a prefetch may run ahead of its layer.
        rolling: plan anew after every layer instead of once a step.
        wraps: a rolling plan goes on into the next step's first layers.
        wave: loads of a layer after which its slots may be used again within it.
        joint: the layer's hits and its first wave of loads are computed together, so hits keep their slots as long.
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


def make_tables(layers: int, experts: int, slots: int, *, divided: bool) -> Tables:
    """Every slot empty.

    Args:
        layers: MoE layers.
        experts: experts a layer.
        slots: slots in all.
        divided: give each layer an equal share (the first layers one more if it does not divide); with fewer slots
            than layers they are shared all the same.
    """
    share = np.full(layers, slots, dtype=np.int64)
    if divided and slots >= layers:
        base, extra = divmod(slots, layers)
        share[:] = base
        share[:extra] += 1
    return Tables(
        slot_of=np.full((layers, experts), EMPTY, dtype=np.int32),
        owner=np.full(slots, EMPTY, dtype=np.int32),
        rank=np.full((layers, experts), np.inf),
        pinned=np.zeros((layers, experts), dtype=np.bool_),
        fresh=np.zeros((layers, experts), dtype=np.bool_),
        held=np.zeros(layers, dtype=np.int64),
        share=share,
        low=np.full(layers, np.inf),
        lowest=np.full(layers, -1, dtype=np.int64),
        newer=np.roll(np.arange(slots + 1, dtype=np.int32), -1),
        older=np.roll(np.arange(slots + 1, dtype=np.int32), 1),
        turn=np.full(slots, -1, dtype=np.int32),
        pending=np.zeros((layers * experts, 3), dtype=np.int32),
        log=np.zeros((4 * experts + 6 * slots + 8, 5), dtype=np.int32),
        cursor=np.zeros(3, dtype=np.int64),
    )


@shared
def tell(t: Tables, kind: int, layer: int, expert: int, slot: int, detail: int) -> None:
    """Write a log row."""
    row = t.log[t.cursor[LOG]]
    row[0], row[1], row[2], row[3], row[4] = kind, layer, expert, slot, detail
    t.cursor[LOG] += 1


@shared
def put(t: Tables, layer: int, expert: int, slot: int) -> None:
    """An expert enters an empty slot and may not leave for now."""
    older, newer = t.older[slot], t.newer[slot]
    t.newer[older], t.older[newer] = newer, older
    t.slot_of[layer, expert] = slot
    t.owner[slot] = layer * t.slot_of.shape[1] + expert
    t.held[layer] += 1
    t.cursor[RESIDENT] += 1


@shared
def evict(t: Tables, slot: int) -> None:
    """A slot's expert leaves."""
    layer, expert = divmod(t.owner[slot], t.slot_of.shape[1])
    if t.fresh[layer, expert]:
        t.fresh[layer, expert] = False
        tell(t, WASTED, layer, expert, slot, 0)
    t.slot_of[layer, expert] = EMPTY
    t.rank[layer, expert] = np.inf
    t.lowest[layer] = -1
    t.owner[slot] = EMPTY
    t.held[layer] -= 1
    t.cursor[RESIDENT] -= 1
    joint = t.owner.shape[0]
    last = t.older[joint]
    t.newer[last], t.older[slot], t.newer[slot], t.older[joint] = slot, last, joint, slot
    tell(t, EVICT, layer, expert, slot, 0)


@shared
def find_lowest(rank: npt.NDArray[np.float64], low: npt.NDArray[np.float64], lowest: npt.NDArray[np.int64]) -> int:
    """The layer with the smallest rank of all, the first among equals; looks only where something has changed."""
    for layer in (lowest < 0).nonzero()[0]:
        column = rank[layer].argmin()
        lowest[layer] = column
        low[layer] = rank[layer, column]
    return int(low.argmin())


@shared
def make_room(t: Tables, layer: int) -> int:
    """A slot for the layer: the longest empty one, else the smallest rank leaves; -1 if nobody may."""
    slots = t.owner.shape[0]
    if t.cursor[RESIDENT] < slots and t.held[layer] < t.share[layer]:
        return int(t.newer[slots])
    if t.share[layer] < slots:
        row, column = layer, int(t.rank[layer].argmin())
    else:
        row = find_lowest(t.rank, t.low, t.lowest)
        column = int(t.lowest[row])
    if t.rank[row, column] == np.inf:
        return -1
    slot = int(t.slot_of[row, column])
    evict(t, slot)
    return slot


@shared
def settle(t: Tables, planes: Planes, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """Rank a layer's residents by what is known once the layer has run: all of them may leave."""
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
    """The running layer's experts `over`, whose turn is over, may leave; among equals the latest turn first.

    So experts of little worth pass through few slots, and the rest of what the layer found stays.
    """
    for expert in over:
        slot = t.slot_of[layer, expert]
        if slot >= 0:
            after = planes.used[layer, expert] if needed[expert] else planes.unused[layer, expert]
            t.rank[layer, expert] = after - _NUDGE * (t.turn[slot] + 1)
    t.lowest[layer] = -1


@shared
def end_waves(
    t: Tables, planes: Planes, layer: int, needed: npt.NDArray[np.bool_], kept: npt.NDArray[np.bool_]
) -> None:
    """`end_wave` for all of the layer's residents but those `kept`."""
    after = np.where(needed, planes.used[layer], planes.unused[layer]) - _NUDGE * (t.turn[t.slot_of[layer]] + 1)
    t.rank[layer] = np.where((t.slot_of[layer] >= 0) & ~kept, after, t.rank[layer])
    t.lowest[layer] = -1


@shared
def begin_step(t: Tables, planes: Planes) -> None:
    """A step starts: rank everybody by what is known before it. What was loaded ahead stays pinned (see `prefetch.open_step`)."""
    t.cursor[PENDING] = 0  # what waited for a layer that did not run
    t.pinned[:] = t.pinned & t.fresh
    t.rank[:] = np.where((t.slot_of >= 0) & ~t.pinned, planes.before, np.inf)
    t.lowest[:] = -1


@shared
def access(t: Tables, planes: Planes, rules: Rules, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """A layer's routing is known: give every needed expert its turn.

    Residents go first: they compute while the others are copied, and none of them can leave before its turn. Then
    come the loads, in waves of `rules.wave`: when a wave is over, its experts and those before it may leave for the
    next one. So a layer that needs more experts than there are slots runs all the same, and an expert that is not
    worth a slot takes none for longer than its turn.

    Its parts are there for who carries out a turn before the next one is decided: `meet`, `load` for each load, `leave`.

    Args:
        t: changed in place; log rows are LAYER (detail: how many), HIT (detail: 1 if prefetched and unused so far)
            and MISS (detail: place in the schedule of the last access that uses the slot, or -1).
        planes: ranks of this step.
        rules: the strategy's numbers.
        layer: which.
        needed: `[E]` bool.
    """
    misses, held = meet(t, planes, rules, layer, needed)
    for number in range(misses.size):
        load(t, planes, rules, layer, needed, misses, held, number)
    leave(t, planes, rules, layer, needed)


@shared
def meet(
    t: Tables, planes: Planes, rules: Rules, layer: int, needed: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Give the layer's residents their turns.

    Returns:
        What is missing, in the order of its loads: those worth keeping come last, because the last ones stay; and `[E]`, the
        residents that may not leave before the first wave of loads is over.
    """
    present = t.slot_of[layer] >= 0
    hits = np.flatnonzero(needed & present)
    misses = np.flatnonzero(needed & ~present)
    tell(t, LAYER, layer, -1, -1, hits.size + misses.size)
    t.pinned[layer] = False
    for turn in range(hits.size):
        expert = hits[turn]
        slot = t.slot_of[layer, expert]
        t.turn[slot] = turn
        tell(t, HIT, layer, expert, slot, int(t.fresh[layer, expert]))
        t.fresh[layer, expert] = False
    held = needed & rules.joint
    if misses.size:
        misses = misses[np.argsort(planes.used[layer][misses], kind="mergesort")]
        t.rank[layer] = np.where(held, np.inf, t.rank[layer])
    return misses, held


@shared
def leave(t: Tables, planes: Planes, rules: Rules, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """The layer's turns are all given."""
    t.turn[:] = -1
    settle(t, planes, layer, needed)
    if not rules.retain:
        for expert in np.flatnonzero(t.slot_of[layer] >= 0):
            evict(t, t.slot_of[layer, expert])


@shared
def give_up_plan(t: Tables, planes: Planes, layer: int, needed: npt.NDArray[np.bool_]) -> None:
    """Every slot is held for layers that were passed over (a decoder runs without its encoder): they may leave."""
    t.pinned[:] = False
    t.rank[:] = np.where(t.slot_of >= 0, planes.before, np.inf)
    t.lowest[:] = -1
    end_waves(t, planes, layer, needed, np.zeros_like(needed))


@shared
def load(  # noqa: PLR0913, PLR0917 - what `meet` made, each used as it is
    t: Tables,
    planes: Planes,
    rules: Rules,
    layer: int,
    needed: npt.NDArray[np.bool_],
    misses: npt.NDArray[np.int64],
    held: npt.NDArray[np.bool_],
    number: int,
) -> None:
    """Give one of the running layer's missing experts a slot. `held` stay where they are until the first wave of loads is over."""
    expert = misses[number]
    if number == 0 or (rules.joint and number == rules.wave):
        end_waves(t, planes, layer, needed, held)
        held[:] = False
    elif number % rules.wave == 0:
        end_wave(t, planes, layer, needed, misses[number - rules.wave : number])
    slot = make_room(t, layer)
    if slot < 0:
        end_waves(t, planes, layer, needed, held)
        slot = make_room(t, layer)
    if slot < 0:
        give_up_plan(t, planes, layer, needed)
        slot = make_room(t, layer)
    put(t, layer, expert, slot)
    tell(t, MISS, layer, expert, slot, t.turn[slot])
    t.turn[slot] = np.count_nonzero(needed) - misses.size + number


@shared
def carry_out(t: Tables, now: int) -> None:
    """Bind the planned loads whose slots are free once layer `now` is done; a log row PREFETCH each."""
    waiting = t.cursor[PENDING]
    kept = 0
    for entry in range(waiting):
        flat, slot = t.pending[entry, 0], t.pending[entry, 1]
        if t.pending[entry, 2] > now:
            t.pending[kept] = t.pending[entry]
            kept += 1
            continue
        layer, expert = divmod(flat, t.slot_of.shape[1])
        if t.slot_of[layer, expert] >= 0:
            continue  # a layer that was passed over did not free the slot in time, and the expert came on its own
        if t.owner[slot] != EMPTY:
            evict(t, slot)
        put(t, layer, expert, slot)
        t.fresh[layer, expert] = True
        tell(t, PREFETCH, layer, expert, slot, now)
    t.cursor[PENDING] = kept


def forget(t: Tables) -> None:
    """Evict everybody, and the running plan with them."""
    t.cursor[LOG] = 0
    for slot in np.flatnonzero(t.owner != EMPTY):
        evict(t, int(slot))
    t.pinned[:] = False
    t.turn[:] = -1
    t.cursor[PENDING] = 0


@shared
def close(t: Tables) -> None:
    """The end: what was prefetched and never used is told as wasted."""
    for slot in range(t.owner.shape[0]):
        if t.owner[slot] != EMPTY:
            layer, expert = divmod(t.owner[slot], t.slot_of.shape[1])
            if t.fresh[layer, expert]:
                t.fresh[layer, expert] = False
                tell(t, WASTED, layer, expert, slot, 0)
