"""The plan of a step: which experts to load ahead, into which slots, and behind which layer.

A sweep through the coming layers on a copy of the tables: at each layer the experts with enough demand get slots,
most probable first, and take them from whoever has the smallest rank by then (paper section 3.4: slots go to layers
by predicted demand, slots of finished layers are used again), if the policy says that the load is worth that one's
leaving (`Planes.limit`). What the sweep finds is immutable in the step.
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
    """Protect residents that are demanded, nearest layer first, as far as the reserve allows.

    Returns:
        `[2 L]` how many experts are pinned while each coming layer runs, counted from this step's first layer.
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
    """The sweep's copy of the tables, and what it keeps track of.

    Attributes:
        slot_of: as in `Tables`.
        owner: as in `Tables`.
        rank: as in `Tables`.
        low: as in `Tables`.
        lowest: as in `Tables`.
        busy: `[S]` int64, the place after which the slot is free.
        pins: `[2 L]` int64, experts pinned while each place runs.
        left: `[3]` int64, empty slots left, the place from which the plan is made, and the longest empty slot.
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

    A load runs at most `rules.ahead` layers ahead, never takes the slot of an expert that is used sooner than its
    own, and at no layer are more than all but `rules.reserve` slots pinned. Places count layers from this step's
    first one; those from L on are the next step's.
    """
    if not np.any(demand >= rules.threshold):
        return
    layers, slots = t.slot_of.shape[0], t.owner.size
    pins = pin_residents(t, demand, rules, now)
    left = np.array([slots - t.cursor[RESIDENT], now, t.newer[slots]])
    if not left[0]:
        find_lowest(t.rank, t.low, t.lowest)  # once for the tables, and not for each copy of them
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
        if place < layers:  # the layer passes: what it used is free, and ranked by its next use
            after_use = np.where(wanted, planes.used[layer], planes.unused[layer])
            sweep.rank[layer] = np.where(sweep.slot_of[layer] >= 0, after_use, np.inf)
            sweep.lowest[layer] = -1
            for expert in np.flatnonzero(wanted & (sweep.slot_of[layer] >= 0)):
                sweep.busy[sweep.slot_of[layer, expert]] = place


@shared
def plan_layer(
    t: Tables, sweep: Sweep, rules: Rules, place: int, ordered: npt.NDArray[np.int64], value: npt.NDArray[np.float64]
) -> bool:
    """Plan the loads of one layer, in the order given; False once there is no slot for one of them."""
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
        take(sweep, t.newer, slot, layer * experts + expert)
        t.pinned[layer, expert] = True
        entry = t.pending[t.cursor[PENDING]]
        entry[0], entry[1], entry[2] = layer * experts + expert, slot, after
        t.cursor[PENDING] += 1
    return True


@shared
def find_slot(sweep: Sweep, value: float) -> int:
    """An empty slot, else that of the smallest rank below `value`; -1 if there is none."""
    if sweep.left[0]:
        return int(sweep.left[2])
    row = find_lowest(sweep.rank, sweep.low, sweep.lowest)
    return int(sweep.slot_of[row, sweep.lowest[row]]) if sweep.low[row] < value else -1


@shared
def take(sweep: Sweep, newer: npt.NDArray[np.int32], slot: int, flat: int) -> None:
    """In the sweep's copy, an expert takes a slot and stays until its layer has passed."""
    experts = sweep.slot_of.shape[1]
    if sweep.owner[slot] == EMPTY:
        sweep.left[0] -= 1
        sweep.left[2] = newer[slot]
    else:
        row, column = divmod(sweep.owner[slot], experts)
        sweep.slot_of[row, column] = EMPTY
        sweep.rank[row, column] = np.inf
        sweep.lowest[row] = -1
    layer, expert = divmod(flat, experts)
    sweep.owner[slot] = flat
    sweep.slot_of[layer, expert] = slot  # its rank was infinite, and stays so


@shared
def open_step(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules) -> None:
    """A step starts: rank, plan, and bind what is planned before the first layer.

    Args:
        t: changed in place.
        planes: ranks of this step.
        demand: `[L, E]` how likely this step uses each expert; not read without a plan.
        rules: the strategy's numbers.
    """
    if rules.prefetch:
        # what is pinned in a layer that does not run would stay so for good; where nothing is known, nobody is waited for
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
    """A layer of the step: its accesses, then the planned loads that wait for it."""
    access(t, planes, rules, layer, needed)
    pass_layer(t, planes, demand, rules, layer)


@shared
def pass_layer(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules, layer: int) -> None:
    """A layer's accesses are over: plan anew if the strategy does, and bind the loads that waited for it."""
    if rules.prefetch:
        if rules.rolling:
            plan(t, planes, demand, rules, layer)
        carry_out(t, layer)
