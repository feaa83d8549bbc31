"""The plan of a step: which experts to load ahead, into which slots, and behind which layer.

A sweep through the coming layers on a copy of the tables: at each layer the experts with enough demand get slots,
most probable first, and take them from whoever has the smallest rank by then (paper section 3.4: slots go to layers
by predicted demand, slots of finished layers are used again). What the sweep finds is immutable in the step.
"""

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import EMPTY, FAR, PENDING, Planes, Rules, Tables, access, begin_step, carry_out
from expertflow.cache.shared import shared


@shared
def pin_residents(t: Tables, demand: npt.NDArray[np.float64], rules: Rules, now: int) -> npt.NDArray[np.int64]:
    """Protect residents that are demanded, nearest layer first, as far as the reserve allows.

    Returns:
        `[2 L]` how many experts are pinned while each coming layer runs, counted from this step's first layer.
    """
    layers, experts = t.slot_of.shape
    room = t.owner.shape[0] - rules.reserve
    pins = np.zeros(2 * layers, dtype=np.int64)
    for place in range(now + 1, now + 1 + layers):
        layer = place % layers
        for expert in range(experts):
            wanted = demand[layer, expert] >= rules.threshold and place < layers and t.slot_of[layer, expert] >= 0
            if t.pinned[layer, expert] or (wanted and pins[now + 1] < room):
                t.pinned[layer, expert] = True
                t.rank[layer, expert] = np.inf
                pins[now + 1 : place + 1] += 1
    return pins


@shared
def plan(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules, now: int) -> None:
    """Fill `t.pending` for the layers after `now` (-1: before the step).

    A load runs at most `rules.ahead` layers ahead, never takes the slot of an expert that is used sooner than its
    own, and at no layer are more than all but `rules.reserve` slots pinned.
    """
    layers = t.slot_of.shape[0]
    pins = pin_residents(t, demand, rules, now)
    slot_of, owner, rank = t.slot_of.copy(), t.owner.copy(), t.rank.copy()
    busy = np.full(owner.size, now, dtype=np.int64)  # the layer after which a slot is free
    last = now + 1 + rules.ahead if rules.rolling else layers
    last = min(last, now + layers) if rules.wraps else min(last, layers)
    for place in range(now + 1, last):
        layer = place % layers
        wanted = demand[layer] >= rules.threshold
        value = planes.before[layer] if place < layers else planes.used[layer]
        if np.any(wanted & (slot_of[layer] < 0)):
            for expert in np.argsort(-demand[layer], kind="mergesort"):
                if not wanted[expert]:
                    break
                if slot_of[layer, expert] >= 0:
                    continue
                slot = find_slot(owner, t.freed, rank, slot_of, value[expert])
                if slot < 0:
                    break
                after = max(busy[slot], place - 1 - rules.ahead)
                for passing in range(place, after, -1):
                    if pins[passing] >= owner.size - rules.reserve:
                        after = passing
                        break
                if after >= place or (rules.rolling and after > now):
                    break
                pins[after + 1 : place + 1] += 1
                take(owner, slot_of, rank, slot, layer * slot_of.shape[1] + expert)
                t.pinned[layer, expert] = True
                entry = t.pending[t.cursor[PENDING]]
                entry[0], entry[1], entry[2] = layer * slot_of.shape[1] + expert, slot, after
                t.cursor[PENDING] += 1
        if place < layers:  # the layer passes: what it used is free, and ranked by its next use
            after_use = np.where(wanted, planes.used[layer], planes.unused[layer])
            rank[layer] = np.where(slot_of[layer] >= 0, after_use, np.inf)
            for expert in np.flatnonzero(wanted & (slot_of[layer] >= 0)):
                busy[slot_of[layer, expert]] = place


@shared
def find_slot(
    owner: npt.NDArray[np.int32],
    freed: npt.NDArray[np.int64],
    rank: npt.NDArray[np.float64],
    slot_of: npt.NDArray[np.int32],
    value: float,
) -> int:
    """An empty slot, else that of the smallest rank below `value`; -1 if there is none."""
    empty = owner == EMPTY
    if np.any(empty):
        return int(np.argmin(np.where(empty, freed, FAR)))
    row, column = divmod(int(np.argmin(rank)), rank.shape[1])
    return int(slot_of[row, column]) if rank[row, column] < value else -1


@shared
def take(
    owner: npt.NDArray[np.int32],
    slot_of: npt.NDArray[np.int32],
    rank: npt.NDArray[np.float64],
    slot: int,
    flat: int,
) -> None:
    """In the sweep's copy, an expert takes a slot and stays until its layer has passed."""
    if owner[slot] != EMPTY:
        row, column = divmod(owner[slot], slot_of.shape[1])
        slot_of[row, column] = EMPTY
        rank[row, column] = np.inf
    row, column = divmod(flat, slot_of.shape[1])
    owner[slot] = flat
    slot_of[row, column] = slot
    rank[row, column] = np.inf


@shared
def open_step(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules) -> None:
    """A step starts: rank, plan, and bind what is planned before the first layer.

    Args:
        t: changed in place.
        planes: ranks of this step.
        demand: `[L, E]` how likely this step uses each expert; not read without a plan.
        rules: the strategy's numbers.
    """
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
    if rules.prefetch:
        if rules.rolling:
            plan(t, planes, demand, rules, layer)
        carry_out(t, layer)
