"""Plan a step's prefetches: which experts to load ahead, into which slots, and after which layer.

The plan sweeps through the coming layers on a copy of the tables. At each layer the experts with enough demand get
slots, most probable first (paper section 3.4). A slot comes from the expert with the smallest rank at that point, if
that rank is below the load's `Planes.limit`; slots of finished layers are used again. The plan is fixed for the step.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import (
    EMPTY,
    PENDING,
    RESIDENT,
    Planes,
    Rules,
    Tables,
    access,
    begin_step,
    carry_out,
    find_lowest,
)
from expertflow.cache.shared import shared


@shared
def pin_residents(t: Tables, demand: npt.NDArray[np.float64], rules: Rules, now: int) -> npt.NDArray[np.int64]:
    """Pin residents that are demanded, nearest layer first, as far as the reserve allows.

    Returns:
        int64 `[2 L]`, how many experts are pinned while each coming layer runs, counted from this step's first layer.
    """
    layers = t.slot_of.shape[0]
    room = t.owner.shape[0] - rules.reserve
    pins = np.zeros(2 * layers, dtype=np.int64)
    total = 0
    wanted = (demand >= rules.threshold) & (t.slot_of >= 0)
    added = wanted & ~t.pinned
    for place in range(now + 1, now + 1 + layers):
        layer = place % layers
        if place >= layers or not np.any(added[layer]):
            already = int(np.count_nonzero(t.pinned[layer]))
            if already:
                pins[now + 1 : place + 1] += already
                total += already
            continue
        before = total
        for expert in np.flatnonzero(t.pinned[layer] | wanted[layer]):
            if t.pinned[layer, expert] or total < room:
                t.pinned[layer, expert] = True
                t.rank[layer, expert] = np.inf
                total += 1
        t.lowest[layer] = -1
        pins[now + 1 : place + 1] += total - before
    return pins


class Sweep(NamedTuple):
    """The sweep's copy of the tables, and its own counts.

    Attributes:
        slot_of: as in `Tables`.
        owner: as in `Tables`.
        rank: as in `Tables`.
        low: as in `Tables`.
        lowest: as in `Tables`.
        busy: `[S]` int64, the place after which the slot is free.
        pins: `[2 L]` int64, experts pinned while each place runs.
        left: `[3]` int64, empty slots left, the place that the plan starts after, and the longest empty slot.
    """

    slot_of: npt.NDArray[np.int32]
    owner: npt.NDArray[np.int32]
    rank: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    lowest: npt.NDArray[np.int64]
    busy: npt.NDArray[np.int64]
    pins: npt.NDArray[np.int64]
    left: npt.NDArray[np.int64]


@shared
def plan(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules, now: int) -> None:
    """Fill `t.pending` for the layers after `now` (-1: before the step).

    A load runs at most `rules.ahead` layers ahead and never takes the slot of an expert that is used sooner than its
    own. At every layer at least `rules.reserve` slots stay unpinned. Places count layers from this step's first one;
    those from L on are the next step's.
    """
    if not np.any(demand >= rules.threshold):
        return
    layers, slots = t.slot_of.shape[0], t.owner.size
    pins = pin_residents(t, demand, rules, now)
    left = np.array([slots - t.cursor[RESIDENT], now, t.newer[slots]])
    if not left[0]:
        find_lowest(t.rank, t.low, t.lowest)  # once for the tables, not for each copy of them
    busy = np.full(slots, now, dtype=np.int64)
    slot_of, owner, rank = t.slot_of.copy(), t.owner.copy(), t.rank.copy()
    sweep = Sweep(slot_of, owner, rank, t.low.copy(), t.lowest.copy(), busy, pins, left)
    last = now + 1 + rules.ahead if rules.rolling else layers
    last = min(last, now + layers) if rules.wraps else min(last, layers)
    for place in range(now + 1, last):
        layer = place % layers
        wanted = demand[layer] >= rules.threshold
        value = planes.limit[layer] if place < layers else planes.used[layer]
        missing = wanted & (sweep.slot_of[layer] < 0)
        if np.any(missing):
            ordered = np.argsort(np.where(missing, -demand[layer], np.inf), kind="mergesort")[: np.sum(missing)]
            served = plan_layer(t, sweep, rules, place, ordered, value)
            if rules.rolling and not served:
                return
        if place < layers:  # after the layer its experts may be evicted, ranked by their next use
            after_use = np.where(wanted, planes.used[layer], planes.unused[layer])
            sweep.rank[layer] = np.where(sweep.slot_of[layer] >= 0, after_use, np.inf)
            sweep.lowest[layer] = -1
            for expert in np.flatnonzero(wanted & (sweep.slot_of[layer] >= 0)):
                sweep.busy[sweep.slot_of[layer, expert]] = place


@shared
def plan_layer(
    t: Tables, sweep: Sweep, rules: Rules, place: int, ordered: npt.NDArray[np.int64], value: npt.NDArray[np.float64]
) -> bool:
    """Plan the loads of one layer, in the order given; return False if one of them finds no slot."""
    layers, experts = t.slot_of.shape
    layer, room = place % layers, sweep.owner.size - rules.reserve
    for expert in ordered:
        slot = find_slot(sweep, value[expert])
        if slot < 0:
            return False
        after = max(sweep.busy[slot], place - 1 - rules.ahead)
        for passing in range(place, after, -1):
            if sweep.pins[passing] >= room:
                after = passing
                break
        if after >= place or (rules.rolling and after > sweep.left[1]):
            return False
        sweep.pins[after + 1 : place + 1] += 1
        take_slot(sweep, t.newer, slot, layer * experts + expert)
        t.pinned[layer, expert] = True
        entry = t.pending[t.cursor[PENDING]]
        entry[0], entry[1], entry[2] = layer * experts + expert, slot, after
        t.cursor[PENDING] += 1
    return True


@shared
def find_slot(sweep: Sweep, value: float) -> int:
    """Find an empty slot, else that of the smallest rank below `value`; -1 if there is none."""
    if sweep.left[0]:
        return int(sweep.left[2])
    layer = find_lowest(sweep.rank, sweep.low, sweep.lowest)
    return int(sweep.slot_of[layer, sweep.lowest[layer]]) if sweep.low[layer] < value else -1


@shared
def take_slot(sweep: Sweep, newer: npt.NDArray[np.int32], slot: int, flat: int) -> None:
    """Give an expert a slot in the sweep's copy; it stays until its layer has run."""
    experts = sweep.slot_of.shape[1]
    if sweep.owner[slot] == EMPTY:
        sweep.left[0] -= 1
        sweep.left[2] = newer[slot]
    else:
        old_layer, old_expert = divmod(sweep.owner[slot], experts)
        sweep.slot_of[old_layer, old_expert] = EMPTY
        sweep.rank[old_layer, old_expert] = np.inf
        sweep.lowest[old_layer] = -1
    layer, expert = divmod(flat, experts)
    sweep.owner[slot] = flat
    sweep.slot_of[layer, expert] = slot  # its rank was infinite, and stays so


@shared
def open_step(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules) -> None:
    """Start a step: rank the residents, plan, and bind the loads planned before the first layer.

    Args:
        t: changed in place.
        planes: ranks of this step.
        demand: float64 `[L, E]`, how likely this step uses each expert; not read without prefetch.
        rules: the strategy's numbers.
    """
    if rules.prefetch:
        # an expert pinned in a layer that does not run would stay pinned for good
        for layer in range(t.slot_of.shape[0]):
            if not np.any(demand[layer] > 0):
                t.pinned[layer] = False
    begin_step(t, planes)
    if rules.prefetch:
        plan(t, planes, demand, rules, -1)
        carry_out(t, -1)


@shared
def run_layer(
    t: Tables,
    planes: Planes,
    demand: npt.NDArray[np.float64],
    rules: Rules,
    layer: int,
    needed: npt.NDArray[np.bool_],
) -> None:
    """Run a layer of the step: its accesses, then the planned loads that wait for it."""
    access(t, planes, rules, layer, needed)
    pass_layer(t, planes, demand, rules, layer)


@shared
def pass_layer(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules, layer: int) -> None:
    """After a layer's accesses, plan anew if the strategy does, and bind the loads that waited for the layer."""
    if rules.prefetch:
        if rules.rolling:
            plan(t, planes, demand, rules, layer)
        carry_out(t, layer)
