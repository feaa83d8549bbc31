"""One stream of events that counters, reports, recorders and tests subscribe to.

It defines the kinds of events. Without a listener an event costs one comparison. Must not know its listeners.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EventKind(StrEnum):
    """What can happen to an expert, a layer, or a step."""

    STEP = "step"
    """A forward pass begins."""
    LAYER = "layer"
    """A layer's routing is known; `value` is the number of distinct experts it needs."""
    HIT = "hit"
    """A needed expert was in its slot; `value` is 1 if it was prefetched and this is its first use."""
    MISS = "miss"
    """A needed expert has to be loaded into `slot`; `value` is the bytes moved."""
    PREFETCH = "prefetch"
    """An expert is loaded into `slot` ahead of its layer; `value` is the bytes moved."""
    EVICT = "evict"
    """An expert is evicted from `slot`."""
    WASTED = "wasted"
    """A prefetched expert is evicted, or the run ends, before its first use."""
    PREDICTOR_OFF = "predictor-off"
    """A warning: the predictor raised an error and is switched off; `reason` is the error."""
    HOST = "host"
    """A batch's decode steps run in host execution although execution='auto' prefers a graph; `reason` is why."""


SURE = 0.5
"""Chance of use in a step from which on a needed expert counts as foreseen."""


class Event(NamedTuple):
    """One event. Fields that do not apply are -1 (or 0 for `value`)."""

    kind: EventKind
    step: int
    layer: int = -1
    expert: int = -1
    slot: int = -1
    value: int = 0
    reason: str = ""


Listener = Callable[[Event], None]


KINDS = (EventKind.LAYER, EventKind.HIT, EventKind.MISS, EventKind.PREFETCH, EventKind.EVICT, EventKind.WASTED)
"""Event kinds, by the kind number of a log entry (`cache.core.write_log`)."""
_HIT, _MISS, _PREFETCH, _EVICT, _WASTED = range(1, len(KINDS))
Entry = Sequence[int]
"""An entry of a log: kind, layer, expert, slot, and a detail of the kind."""


def as_event(entry: Entry, step: int, record_bytes: int | Sequence[int]) -> Event:
    """Turn a log entry into the event of a step; `record_bytes` are those of an expert, of all layers or of each."""
    kind = KINDS[entry[0]]
    value = entry[4] if kind in (EventKind.LAYER, EventKind.HIT) else 0
    if kind in (EventKind.MISS, EventKind.PREFETCH):
        value = record_bytes if isinstance(record_bytes, int) else record_bytes[entry[1]]
    return Event(kind, step, entry[1], entry[2], entry[3], value)


class EventStream:
    """Adds events to totals, and passes them to listeners, in the order they happened.

    Args:
        totals: what they are added to, if to anything. For that alone no event is made of a log's entries, which would take longer than
            the decisions.
    """

    def __init__(self, totals: "CacheCounters | None" = None) -> None:
        """Start without listeners."""
        self._totals, self._listeners = totals, list[Listener]()

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with every later event."""
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Count `event`, and call every listener with it."""
        if self._totals is not None:
            self._totals.count(event)
        for listener in self._listeners:
            listener(event)

    def emit_log(self, entries: Sequence[Entry], step: int, record_bytes: int | Sequence[int]) -> None:
        """Do what `emit` does, for each of a log's entries; bytes as in `as_event`."""
        if self._totals is not None:
            self._totals.count_log(entries, step, record_bytes)
        if self._listeners:
            for entry in entries:
                event = as_event(entry, step, record_bytes)
                for listener in self._listeners:
                    listener(event)

    @property
    def watched(self) -> bool:
        """Whether there is a listener."""
        return bool(self._listeners)


@dataclass(kw_only=True)
class CacheCounters:
    """Running totals of what the expert cache did, for an `EventStream`.

    Events do not carry `forecast` and `foreseen`, so they do not make totals unequal.

    Attributes:
        steps: passes and steps of the model.
        late_steps: of these, steps in which a needed expert had to be loaded.
        hits: needed experts that were in their slots.
        loads: needed experts that had to be loaded.
        prefetched: experts loaded ahead.
        prefetch_hits: of these, experts that were needed.
        wasted: of these, experts that were not.
        evictions: experts that left their slots.
        bytes_moved: by all loads.
        forecast: experts needed in layers whose demand a forecast gave before the step; the predictor's, if there is one.
        foreseen: of these, experts to which it gave a chance of `SURE` or more.
    """

    steps: int = 0
    late_steps: int = 0
    hits: int = 0
    loads: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    wasted: int = 0
    evictions: int = 0
    bytes_moved: int = 0
    forecast: int = field(default=0, compare=False)
    foreseen: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """Start before the first step."""
        self._late = -1  # the last step in which an expert had to be loaded

    def count(self, event: Event) -> None:
        """Add one event to the totals."""
        match event.kind:
            case EventKind.HIT:
                self.hits += 1
                self.prefetch_hits += event.value
            case EventKind.MISS:
                self.loads += 1
                self.bytes_moved += event.value
                self.late_steps += event.step != self._late
                self._late = event.step
            case EventKind.PREFETCH:
                self.prefetched += 1
                self.bytes_moved += event.value
            case EventKind.WASTED:
                self.wasted += 1
            case EventKind.EVICT:
                self.evictions += 1
            case EventKind.STEP:
                self.steps += 1
            case EventKind.LAYER | EventKind.HOST | EventKind.PREDICTOR_OFF:
                pass

    def count_log(self, entries: Sequence[Entry], step: int, record_bytes: int | Sequence[int]) -> None:
        """Add a log's entries, as `count` adds the events that they are."""
        kinds = [entry[0] for entry in entries]
        loads, prefetched = kinds.count(_MISS), kinds.count(_PREFETCH)
        self.hits += kinds.count(_HIT)
        self.prefetch_hits += sum(entry[4] for entry in entries if entry[0] == _HIT)
        self.loads += loads
        self.prefetched += prefetched
        self.evictions += kinds.count(_EVICT)
        self.wasted += kinds.count(_WASTED)
        if isinstance(record_bytes, int):
            self.bytes_moved += (loads + prefetched) * record_bytes
        else:
            self.bytes_moved += sum(record_bytes[entry[1]] for entry in entries if entry[0] in {_MISS, _PREFETCH})
        if loads:
            self.late_steps += step != self._late
            self._late = step

    def add(self, more: "CacheCounters") -> None:
        """Add totals that the device counted, where single events are not emitted."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(more, each.name))

    def judge(self, demand: npt.NDArray[np.float64], needed: npt.NDArray[np.bool_]) -> None:
        """Compare the demand of a step that is over, `[L, E]`, with the experts that it needed; no demand in a layer: no forecast."""
        known = demand.any(axis=1)
        self.forecast += int(needed[known].sum())
        self.foreseen += int((needed & (demand >= SURE))[known].sum())

    @property
    def clean_steps(self) -> int:
        """Steps that found every needed expert in its slot."""
        return self.steps - self.late_steps

    @property
    def recall(self) -> float | None:
        """Share of the needed experts that the forecast foresaw; None before its first step."""
        return self.foreseen / self.forecast if self.forecast else None

    @property
    def accesses(self) -> int:
        """Distinct experts needed, summed over layers and steps."""
        return self.hits + self.loads

    @property
    def hit_ratio(self) -> float:
        """Share of accesses found in a slot; 0 before the first access."""
        return self.hits / self.accesses if self.accesses else 0.0
