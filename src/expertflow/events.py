"""One stream of events that counters, reports, recorders and tests subscribe to.

It defines the kinds of events. Without a listener an event costs one comparison. Must not know its listeners.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple


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


class EventStream:
    """Passes events to listeners, in the order they happened."""

    def __init__(self) -> None:
        """Start without listeners."""
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` with every later event."""
        self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Call every listener with `event`."""
        for listener in self._listeners:
            listener(event)

    @property
    def listeners(self) -> int:
        """Number of listeners."""
        return len(self._listeners)


@dataclass(kw_only=True)
class CacheCounters:
    """Running totals of what the expert cache did; subscribe `CacheCounters.count`."""

    steps: int = 0
    hits: int = 0
    loads: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    wasted: int = 0
    evictions: int = 0
    bytes_moved: int = 0

    def count(self, event: Event) -> None:
        """Add one event to the totals."""
        match event.kind:
            case EventKind.HIT:
                self.hits += 1
                self.prefetch_hits += event.value
            case EventKind.MISS:
                self.loads += 1
                self.bytes_moved += event.value
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

    def add(self, more: "CacheCounters") -> None:
        """Add totals that the device counted, where single events are not emitted."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(more, field.name))

    @property
    def accesses(self) -> int:
        """Distinct experts needed, summed over layers and steps."""
        return self.hits + self.loads

    @property
    def hit_ratio(self) -> float:
        """Share of accesses found in a slot; 0 before the first access."""
        return self.hits / self.accesses if self.accesses else 0.0
