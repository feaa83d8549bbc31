"""Copy records into slots, ordered with the computation that reads them.

`PlainTransfer` copies at once, on any device. `StreamTransfer` copies on a second CUDA stream. There a slot's events
order the copy after the last computation that read the slot, and the next computation after the copy. So the next
experts' copies overlap the current expert's computation. Both have the same five verbs; neither decides anything.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from expertflow.formats.records import ExpertStore
from expertflow.memory.slots import SlotPool


@runtime_checkable
class Transfer(Protocol):
    """Copies records. A load is `start`, then `wait`; `release` ends every use of a slot."""

    def start(self, loads: Sequence[tuple[int, int]]) -> None:
        """Begin to copy records of the store into slots, `(record, slot)` each, after the slot's last release."""

    def wait(self, slots: Sequence[int]) -> None:
        """Order later computation after the copies into these slots."""

    def arrived(self, slot: int) -> bool:
        """Whether the slot's last copy is over; does not wait."""

    def release(self, slots: Sequence[int]) -> None:
        """State that computation queued so far is the last that reads these slots or places; copies may follow it."""

    def settle(self) -> None:
        """Wait for the copies under way."""


class PlainTransfer:
    """Copies at once, on the current stream. If slots are of plain numbers and records are packed, these are decoded on the way."""

    def __init__(self, store: ExpertStore, pool: SlotPool) -> None:
        """Copy from `store` to `pool`."""
        self._store, self._pool = store, pool
        self._decodes = store.layout != pool.layout
        self._experts = len(store.buffer) // len(store.layout.layers)

    def start(self, loads: Sequence[tuple[int, int]]) -> None:
        """Copy now."""
        for record, slot in loads:
            layer = record // self._experts
            if self._decodes:
                self._pool.put(slot, layer, self._store.layout.layers[layer].weights(self._store.record(record)))
            else:
                size = self._store.layout.layer_bytes[layer]
                self._pool.slot(slot)[:size].copy_(self._store.record(record)[:size])

    def wait(self, slots: Sequence[int]) -> None:
        """Do nothing: the copies are done."""

    def arrived(self, slot: int) -> bool:  # noqa: ARG002 - every copy is done at once
        """Always."""
        return True

    def release(self, slots: Sequence[int]) -> None:
        """Do nothing: a copy is ordered by the stream."""

    def settle(self) -> None:
        """Do nothing: no copy is under way."""


class StreamTransfer:
    """Copies page-locked records on a stream of their own.

    The host's part of a load has to be short beside the copy, or the link waits for it. So tensors of records and slots
    are made once, and what can be said of several slots is said once. The pool's device has to be the current one, and what computes
    one stream, or streams that are ordered one after the other.
    """

    def __init__(self, store: ExpertStore, pool: SlotPool) -> None:
        """Copy from `store` (page-locked) to `pool` (CUDA)."""
        device = pool.buffer.device
        sizes, experts = store.layout.layer_bytes, len(store.buffer) // len(store.layout.layers)
        self._records = [row[: sizes[number // experts]] for number, row in enumerate(store.buffer.unbind())]
        self._slots = {size: [row[:size] for row in pool.buffer.unbind()] for size in set(sizes)}
        self._device = device.index
        self._stream = torch.cuda.Stream(device)
        self._loaded = [torch.cuda.Event() for _ in pool.buffer]
        self._released = [torch.cuda.Event()] * len(pool.buffer)  # one for all that were released together
        self._started, self._number = 0, [0] * len(pool.buffer)  # copies, and each slot's last one among them
        self._ordered = 0  # copies that computation is ordered after
        # the pool's memory may have been used by work queued before it was allocated
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self, loads: Sequence[tuple[int, int]]) -> None:
        """Queue the copies, each after its slot's last release."""
        computing, waited = torch.cuda.current_stream(self._device), None
        try:
            torch.cuda.set_stream(self._stream)
            for record, slot in loads:
                if (released := self._released[slot]) is not waited:
                    self._stream.wait_event(released)
                    waited = released
                source = self._records[record]
                self._slots[len(source)][slot].copy_(source, non_blocking=True)
                self._loaded[slot].record(self._stream)
                self._started += 1
                self._number[slot] = self._started
        finally:
            torch.cuda.set_stream(computing)

    def wait(self, slots: Sequence[int]) -> None:
        """Order the current stream after the last one of these copies: they are made one after the other."""
        last = max(slots, key=self._copy_of)
        if self._copy_of(last) > self._ordered:
            torch.cuda.current_stream(self._device).wait_event(self._loaded[last])
            self._ordered = self._number[last]

    def arrived(self, slot: int) -> bool:
        """Ask the driver, if computation is not ordered after the copy; does not wait."""
        return self._copy_of(slot) <= self._ordered or bool(self._loaded[slot].query())

    def release(self, slots: Sequence[int]) -> None:
        """Mark the current stream's position as the last that reads them; a place behind the slots is never written again."""
        released = torch.cuda.Event()
        released.record(torch.cuda.current_stream(self._device))
        for slot in slots:
            if slot < len(self._released):
                self._released[slot] = released

    def settle(self) -> None:
        """Wait for the copy stream."""
        self._stream.synchronize()
        self._ordered = self._started

    def _copy_of(self, slot: int) -> int:
        """The last copy into a slot, by number; 0: there was none, as behind the slots."""
        return self._number[slot] if slot < len(self._number) else 0
