"""One stream of events that counters, reports, recorders and tests subscribe to.

It defines the kinds of events. Without a listener an event costs one comparison. Must not know its listeners.
"""

from collections.abc import Callable
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
    """Running totals of what the expert cache did; subscribe `CacheCounters.count`.

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
