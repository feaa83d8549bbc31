"""Copy records into slots, ordered with the computation that reads them.

`PlainTransfer` copies at once, on any device. `StreamTransfer` copies on a second CUDA stream. There a slot's events
order the copy after the last computation that read the slot, and the next computation after the copy. So the next
experts' copies overlap the current expert's computation. Both have the same five verbs; neither decides anything.
"""

from typing import Protocol, runtime_checkable

import torch

from expertflow.formats.records import ExpertStore
from expertflow.memory.slots import SlotPool


@runtime_checkable
class Transfer(Protocol):
    """Copies records. A load is `start`, then `wait`; `release` ends every use of a slot."""

    def start(self, record: int, slot: int) -> None:
        """Begin to copy a record of the store into a slot, after the slot's last release."""

    def wait(self, slot: int) -> None:
        """Order later computation after the slot's copy."""

    def arrived(self, slot: int) -> bool:
        """Whether the slot's last copy is over; does not wait."""

    def release(self, slot: int) -> None:
        """State that computation queued so far is the last that reads the slot or place; a copy may follow it."""

    def settle(self) -> None:
        """Wait for the copies under way."""


class PlainTransfer:
    """Copies at once, on the current stream. If slots are of plain numbers and records are packed, these are decoded on the way."""

    def __init__(self, store: ExpertStore, pool: SlotPool) -> None:
        """Copy from `store` to `pool`."""
        self._store, self._pool = store, pool
        self._decodes = store.layout != pool.layout
        self._experts = len(store.buffer) // len(store.layout.layers)

    def start(self, record: int, slot: int) -> None:
        """Copy now."""
        if self._decodes:
            layer = record // self._experts
            self._pool.put(slot, layer, self._store.layout.layers[layer].weights(self._store.record(record)))
        else:
            size = self._store.layout.layer_bytes[record // self._experts]
            self._pool.slot(slot)[:size].copy_(self._store.record(record)[:size])

    def wait(self, slot: int) -> None:
        """Do nothing: the copy is done."""

    def arrived(self, slot: int) -> bool:  # noqa: ARG002 - every copy is done at once
        """Always."""
        return True

    def release(self, slot: int) -> None:
        """Do nothing: a copy is ordered by the stream."""

    def settle(self) -> None:
        """Do nothing: no copy is under way."""


class StreamTransfer:
    """Copies page-locked records on a stream of their own.

    The host's part of a load has to be short beside the copy, or the link waits for it. So tensors of records and slots
    are made once, and streams are set directly, without a context manager. The pool's device has to be the current one.
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
        self._released = [torch.cuda.Event() for _ in pool.buffer]
        # the pool's memory may have been used by work queued before it was allocated
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self, record: int, slot: int) -> None:
        """Queue the copy after the slot's last release."""
        self._stream.wait_event(self._released[slot])
        computing = torch.cuda.current_stream(self._device)
        try:
            torch.cuda.set_stream(self._stream)
            source = self._records[record]
            self._slots[len(source)][slot].copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(computing)
        self._loaded[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """Order the current stream after the slot's copy."""
        torch.cuda.current_stream(self._device).wait_event(self._loaded[slot])

    def arrived(self, slot: int) -> bool:
        """Ask the driver; does not wait."""
        return bool(self._loaded[slot].query())

    def release(self, slot: int) -> None:
        """Mark the current stream's position as the last that reads the slot; a place behind the slots is never written again."""
        if slot < len(self._released):
            self._released[slot].record(torch.cuda.current_stream(self._device))

    def settle(self) -> None:
        """Wait for the copy stream."""
        self._stream.synchronize()
