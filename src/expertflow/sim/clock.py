"""The virtual clock: how long the decisions of a step take, on a link and a device given by a few numbers.

One link carries rows in order, a load that a running layer waits for before one that runs ahead; one device computes
a layer's experts in the order of their turns. Reads log rows, decides nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import HIT, LAYER, MISS, PREFETCH, WASTED
from expertflow.cache.shared import shared
from expertflow.errors import ConfigError

NOW, LINK, STALL, BUSY = 0, 1, 2, 3
"""Places in `Clock.time`, microseconds."""
NEEDED, HITS, FRESH, MISSES, PREFETCHED, WASTES, LATE, CLEAN = 0, 1, 2, 3, 4, 5, 6, 7
"""Places in `Clock.tally`."""
HEAD, TAIL = 0, 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What things cost.

    Attributes:
        row_bytes: one expert.
        link_gbps: bandwidth from host to device, GB/s (10^9).
        copy_us: fixed cost of a copy.
        layer_us: a layer without its experts (attention, router, norms).
        expert_us: one expert's computation.
    """

    row_bytes: int = 49_800_000
    link_gbps: float = 50.0
    copy_us: float = 10.0
    layer_us: float = 25.0
    expert_us: float = 17.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("row_bytes", "link_gbps"):
            if not 1e-9 <= getattr(self, name) <= 1e15:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is not positive and finite", "Give a number above 0, 10^15 at most."
                )
        for name in ("copy_us", "layer_us", "expert_us"):
            if not 0 <= getattr(self, name) <= 1e15:
                raise ConfigError(
                    f"{name}={getattr(self, name)} is negative or not finite", "Give 0 or more, 10^15 at most."
                )

    @property
    def load_us(self) -> float:
        """One row over the link."""
        return self.copy_us + self.row_bytes / (self.link_gbps * 1e3)


class Rates(NamedTuple):
    """A cost in microseconds, for compiled code."""

    load: float
    layer: float
    expert: float


class Clock(NamedTuple):
    """The clock's state for S slots.

    Attributes:
        time: `[4]` float64, see `NOW`.
        tally: `[8]` int64, see `NEEDED`; CLEAN counts steps that found everything in its slot.
        arrival: `[S]` float64, when the slot's row is there.
        done: `[E]` float64, when each turn of the running layer ends.
        queue: `[Q]` int32, slots whose loads ahead wait for the link.
        issued: `[Q]` float64, when each was asked for.
        ends: `[2]` int64, the queue's head and tail, ever growing.
        waiting: `[S]` int64, the queue place of a slot's load, or -1.
    """

    time: npt.NDArray[np.float64]
    tally: npt.NDArray[np.int64]
    arrival: npt.NDArray[np.float64]
    done: npt.NDArray[np.float64]
    queue: npt.NDArray[np.int32]
    issued: npt.NDArray[np.float64]
    ends: npt.NDArray[np.int64]
    waiting: npt.NDArray[np.int64]


def make_clock(experts: int, slots: int) -> Clock:
    """Time zero, link and queue empty."""
    room = 8 * slots + 64
    return Clock(
        time=np.zeros(4), tally=np.zeros(8, dtype=np.int64), arrival=np.zeros(slots), done=np.zeros(experts),
        queue=np.zeros(room, dtype=np.int32), issued=np.zeros(room), ends=np.zeros(2, dtype=np.int64),
        waiting=np.full(slots, -1, dtype=np.int64),
    )  # fmt: skip


@shared
def carry(c: Clock, rates: Rates, slot: int, start: float) -> float:
    """The link carries a row, not before `start`; when it arrives."""
    c.time[LINK] = max(c.time[LINK], start) + rates.load
    c.time[BUSY] += rates.load
    c.arrival[slot] = c.time[LINK]
    return float(c.time[LINK])


@shared
def drain(c: Clock, rates: Rates, until: float) -> None:
    """Start the loads ahead that the link has time for before `until`."""
    size = c.queue.shape[0]
    while c.ends[HEAD] < c.ends[TAIL]:
        place = c.ends[HEAD] % size
        slot = c.queue[place]
        if slot >= 0:
            if max(c.time[LINK], c.issued[place]) >= until:
                return
            carry(c, rates, slot, c.issued[place])
            if c.waiting[slot] == c.ends[HEAD]:
                c.waiting[slot] = -1
        c.ends[HEAD] += 1


@shared
def enqueue(c: Clock, rates: Rates, slot: int) -> None:
    """A load ahead is asked for."""
    size = c.queue.shape[0]
    if c.ends[TAIL] - c.ends[HEAD] == size:
        drain(c, rates, c.time[LINK] + rates.load)
    place = c.ends[TAIL] % size
    c.queue[place], c.issued[place] = slot, c.time[NOW]
    c.waiting[slot] = c.ends[TAIL]
    c.ends[TAIL] += 1


@shared
def tick(c: Clock, rates: Rates, log: npt.NDArray[np.int32], begin: int, end: int) -> None:  # noqa: C901 - a branch a kind
    """Let the log rows from `begin` to `end` happen: a layer's, or those before the first layer."""
    turn, turns, start = 0, 0, 0.0
    for row in range(begin, end):
        kind, slot, detail = log[row, 0], log[row, 3], log[row, 4]
        if kind == LAYER:
            turns = detail
            c.tally[NEEDED] += turns
            start = c.time[NOW] + rates.layer  # the router's answer
            c.time[NOW] = start
            drain(c, rates, start)
        elif kind == HIT:
            ready = start
            c.tally[HITS] += 1
            if detail:
                c.tally[FRESH] += 1
                if c.waiting[slot] >= 0:  # asked for, not begun: now it goes first
                    c.queue[c.waiting[slot] % c.queue.shape[0]] = -1
                    c.waiting[slot] = -1
                    carry(c, rates, slot, start)
                if c.arrival[slot] > start:
                    c.tally[LATE] += 1
                    ready = c.arrival[slot]
            c.time[NOW] = max(c.time[NOW], ready) + rates.expert
            c.done[turn] = c.time[NOW]
            turn += 1
        elif kind == MISS:
            c.tally[MISSES] += 1
            free = start if detail < 0 else max(start, c.done[detail])
            ready = carry(c, rates, slot, free)
            c.time[NOW] = max(c.time[NOW], ready) + rates.expert
            c.done[turn] = c.time[NOW]
            turn += 1
        elif kind == PREFETCH:
            c.tally[PREFETCHED] += 1
            enqueue(c, rates, slot)
        elif kind == WASTED:
            c.tally[WASTES] += 1
    if turns:
        c.time[STALL] += c.time[NOW] - start - turns * rates.expert
