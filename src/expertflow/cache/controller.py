"""The decision maker: routed experts in, a schedule of accesses and loads out.

Pure bookkeeping over `SlotTable`: no torch, no clock, no copies. The engine and the simulator drive the same
object, so what was simulated is what runs (design law 2).
"""

from collections.abc import Sequence

import numpy as np

from expertflow.cache.policy import Slots, Usage, lru
from expertflow.cache.strategy import Strategy
from expertflow.cache.table import EMPTY, SlotTable
from expertflow.events import Event, EventKind, EventStream
from expertflow.types import Access, ExpertId


class CacheController:
    """Decides, layer by layer, in which slot each needed expert is and who leaves for it.

    Within a layer the experts already resident go first: they compute while the others are copied, and none can be
    evicted before its turn. If a layer needs more experts than there are slots, slots of experts whose turn is over
    are used again: the layer runs in waves and nothing is skipped.

    Args:
        layers: MoE layers.
        experts: experts a layer.
        slots: slots in all, at least 1.
        strategy: row of the strategy table.
        row_bytes: bytes of one expert, for the event stream.
        events: where hits, misses and evictions are told.
    """

    def __init__(
        self, *, layers: int, experts: int, slots: int, strategy: Strategy, row_bytes: int, events: EventStream
    ) -> None:
        """Start with every slot empty."""
        self.table = SlotTable(layers, experts, slots)
        self.strategy = strategy
        self.events = events
        self.step = -1
        self._row_bytes = row_bytes
        self._usage = Usage(last_use=np.zeros(slots, dtype=np.int64))
        self._clock = 0
        base, extra = divmod(slots, layers)
        divided = strategy.partition == "layer" and slots >= layers  # fewer slots than layers can only be shared
        self._shares = [base + (layer < extra) for layer in range(layers)] if divided else None

    def begin_step(self) -> None:
        """A forward pass starts."""
        self.step += 1
        self.events.emit(Event(EventKind.STEP, self.step))

    def access(self, layer: int, needed: Sequence[int]) -> list[Access]:
        """Decide a layer: which slot each needed expert uses, in which order, and what is loaded when.

        Args:
            layer: MoE layer.
            needed: distinct expert indexes the layer's tokens were routed to.

        Returns:
            One access an expert: hits in ascending order, then misses in ascending order.
        """
        slot_of = self.table.slot_of[layer]
        order = sorted(needed, key=lambda index: (slot_of[index] == EMPTY, index))
        self.events.emit(Event(EventKind.LAYER, self.step, layer, value=len(order)))
        last_turn: dict[int, int] = {}
        schedule: list[Access] = []
        for turn, index in enumerate(order):
            slot = int(slot_of[index])
            load = slot == EMPTY
            if load:
                slot = self._make_room(layer)
                self.table.bind(ExpertId(layer, index), slot)
            self._clock += 1
            self._usage.last_use[slot] = self._clock
            kind, moved = (EventKind.MISS, self._row_bytes) if load else (EventKind.HIT, 0)
            self.events.emit(Event(kind, self.step, layer, index, slot, moved))
            schedule.append(Access(index, slot, load, last_turn.get(slot, -1)))
            last_turn[slot] = turn
        if not self.strategy.retain:
            for slot in last_turn:
                self._evict(slot)
        return schedule

    def _make_room(self, layer: int) -> int:
        """An empty slot, or the one the strategy's policy gives up."""
        candidates = self._candidates(layer)
        empty = candidates[self.table.owner[candidates] == EMPTY]
        if len(empty):
            return lru(empty, self._usage)  # a copy into it then waits for the oldest computation
        victim = self.strategy.policy(candidates, self._usage)
        self._evict(victim)
        return victim

    def _candidates(self, layer: int) -> Slots:
        """Slots the layer may take now: all, or within its share."""
        if self._shares is None:
            return np.arange(self.table.slots)
        owner = self.table.owner
        of_layer = (owner != EMPTY) & (owner // self.table.experts == layer)
        # no layer exceeds its share, so a layer below its own always finds an empty slot
        return np.flatnonzero(of_layer if of_layer.sum() >= self._shares[layer] else owner == EMPTY)

    def _evict(self, slot: int) -> None:
        expert = self.table.release(slot)
        self.events.emit(Event(EventKind.EVICT, self.step, expert.layer, expert.expert, slot))
