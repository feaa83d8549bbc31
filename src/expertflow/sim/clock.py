"""A virtual clock: how long a step's decisions take on a link and a device given by a few numbers.

One link carries records in order, a load that a running layer waits for before one that runs ahead. One device
computes a layer's experts in the order of their accesses. The clock reads log entries and decides nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import HIT, LAYER, MISS, PREFETCH, WASTED
from expertflow.cache.shared import shared
from expertflow.errors import ConfigError
from expertflow.types import large_layers

NOW, LINK, STALL, BUSY = 0, 1, 2, 3
"""Indexes into `Clock.time`, microseconds."""
NEEDED, HITS, FRESH, MISSES, PREFETCHED, WASTES, LATE, CLEAN, MOVED = range(9)
"""Indexes into `Clock.tally`."""
HEAD, TAIL = 0, 1
"""Indexes into `Clock.ends`."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What loads, layers and experts cost.

    Attributes:
        row_bytes: bytes of one expert's record; the name is that of result files.
        link_gbps: bandwidth from host to device, GB/s (10^9).
        copy_us: fixed cost of a copy, microseconds.
        layer_us: a layer without its experts (attention, router, norms), microseconds.
        expert_us: one expert's computation, microseconds.
        layer_bytes: bytes of one record of each layer; empty: `row_bytes` in all of them.
    """

    row_bytes: int = 49_800_000
    link_gbps: float = 50.0
    copy_us: float = 10.0
    layer_us: float = 25.0
    expert_us: float = 17.0
    layer_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: naming the value and its range.
        """
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
    def large(self) -> tuple[int, ...]:
        """The layers whose experts are always resident, outside the slots."""
        return large_layers(self.layer_bytes) if self.layer_bytes else ()

    def durations(self, layers: int) -> "Durations":
        """The same for compiled code, for a model of so many layers."""
        size = np.array(self.layer_bytes or (self.row_bytes,) * layers, dtype=np.int64)
        return Durations(self.copy_us + size / (self.link_gbps * 1e3), size, self.layer_us, self.expert_us)


class Durations(NamedTuple):
    """A `Cost` in microseconds, for compiled code; `load` and `size` (bytes) are those of each layer's records, `[L]`."""

    load: npt.NDArray[np.float64]
    size: npt.NDArray[np.int64]
    layer: float
    expert: float


class Clock(NamedTuple):
    """The clock's state for S slots.

    Attributes:
        time: `[4]` float64, see `NOW`.
        tally: `[9]` int64, see `NEEDED`; CLEAN counts steps that found everything in its slot, MOVED bytes.
        arrival: `[S]` float64, when the slot's record has arrived.
        done: `[E]` float64, when each access of the running layer ends.
        queue: `[Q]` int32, slots whose loads ahead wait for the link.
        issued: `[Q]` float64, when each load was issued.
        lasts: `[Q]` float64, how long the link takes for each.
        ends: `[2]` int64, the queue's head and tail, which only grow.
        waiting: `[S]` int64, the position in the queue of a slot's load, or -1.
    """

    time: npt.NDArray[np.float64]
    tally: npt.NDArray[np.int64]
    arrival: npt.NDArray[np.float64]
    done: npt.NDArray[np.float64]
    queue: npt.NDArray[np.int32]
    issued: npt.NDArray[np.float64]
    lasts: npt.NDArray[np.float64]
    ends: npt.NDArray[np.int64]
    waiting: npt.NDArray[np.int64]


def make_clock(experts: int, slots: int) -> Clock:
    """Make a clock at time zero, link and queue empty."""
    room = 8 * slots + 64
    return Clock(
        time=np.zeros(4), tally=np.zeros(9, dtype=np.int64), arrival=np.zeros(slots), done=np.zeros(experts),
        queue=np.zeros(room, dtype=np.int32), issued=np.zeros(room), lasts=np.zeros(room), ends=np.zeros(2, dtype=np.int64),
        waiting=np.full(slots, -1, dtype=np.int64),
    )  # fmt: skip


@shared
def carry(c: Clock, lasts: float, slot: int, start: float) -> float:
    """Send a record over the link, not before `start`; return when it arrives."""
    c.time[LINK] = max(c.time[LINK], start) + lasts
    c.time[BUSY] += lasts
    c.arrival[slot] = c.time[LINK]
    return float(c.time[LINK])


@shared
def drain(c: Clock, until: float) -> None:
    """Start the loads ahead that the link has time for before `until`."""
    size = c.queue.shape[0]
    while c.ends[HEAD] < c.ends[TAIL]:
        place = c.ends[HEAD] % size
        slot = c.queue[place]
        if slot >= 0:
            if max(c.time[LINK], c.issued[place]) >= until:
                return
            carry(c, c.lasts[place], slot, c.issued[place])
            if c.waiting[slot] == c.ends[HEAD]:
                c.waiting[slot] = -1
        c.ends[HEAD] += 1


@shared
def enqueue(c: Clock, lasts: float, slot: int) -> None:
    """Queue a load ahead."""
    size = c.queue.shape[0]
    if c.ends[TAIL] - c.ends[HEAD] == size:
        drain(c, c.time[LINK] + lasts)
    place = c.ends[TAIL] % size
    c.queue[place], c.issued[place], c.lasts[place] = slot, c.time[NOW], lasts
    c.waiting[slot] = c.ends[TAIL]
    c.ends[TAIL] += 1


@shared
def tick(c: Clock, costs: Durations, log: npt.NDArray[np.int32], begin: int, end: int) -> None:  # noqa: C901 - a branch a kind
    """Advance the clock over the log entries `begin` to `end`: those of a layer, or those before the first layer."""
    position, accesses, start = 0, 0, 0.0
    for entry in range(begin, end):
        kind, layer, slot, detail = log[entry, 0], log[entry, 1], log[entry, 3], log[entry, 4]
        if kind == LAYER:
            accesses = detail
            c.tally[NEEDED] += accesses
            start = c.time[NOW] + costs.layer  # the router has chosen
            c.time[NOW] = start
            drain(c, start)
        elif kind == HIT:
            ready = start
            c.tally[HITS] += 1
            if detail:
                c.tally[FRESH] += 1
                if c.waiting[slot] >= 0:  # queued, not begun: now it goes first
                    c.queue[c.waiting[slot] % c.queue.shape[0]] = -1
                    c.waiting[slot] = -1
                    carry(c, costs.load[layer], slot, start)
                if c.arrival[slot] > start:
                    c.tally[LATE] += 1
                    ready = c.arrival[slot]
            c.time[NOW] = max(c.time[NOW], ready) + costs.expert
            c.done[position] = c.time[NOW]
            position += 1
        elif kind == MISS:
            c.tally[MISSES] += 1
            c.tally[MOVED] += costs.size[layer]
            free = start if detail < 0 else max(start, c.done[detail])
            ready = carry(c, costs.load[layer], slot, free)
            c.time[NOW] = max(c.time[NOW], ready) + costs.expert
            c.done[position] = c.time[NOW]
            position += 1
        elif kind == PREFETCH:
            c.tally[PREFETCHED] += 1
            c.tally[MOVED] += costs.size[layer]
            enqueue(c, costs.load[layer], slot)
        elif kind == WASTED:
            c.tally[WASTES] += 1
    if accesses:
        c.time[STALL] += c.time[NOW] - start - accesses * costs.expert
