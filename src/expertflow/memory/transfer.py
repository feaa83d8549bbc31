"""Copies of rows into slots, and who waits for whom.

`PlainTransfer` copies at once (any device). `StreamTransfer` copies on a second CUDA stream: a slot's events order
the copy behind the last computation that read the slot, and the computation behind the copy, so that the next
experts' copies overlap the current expert's computation. Both have the same four verbs; neither decides anything.
"""

from typing import Protocol, runtime_checkable

import torch

from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore


@runtime_checkable
class Transfer(Protocol):
    """Moves rows. `start` and `wait` pair up for a load, `release` ends every use of a slot."""

    def start(self, row: int, slot: int) -> None:
        """Begin copying a store row into a slot, behind the slot's last release."""

    def wait(self, slot: int) -> None:
        """Later computation sees the row in the slot."""

    def release(self, slot: int) -> None:
        """Computation queued so far is the last that reads the slot; a copy may follow it."""

    def settle(self) -> None:
        """Wait until nothing is under way."""


class PlainTransfer:
    """Copies when told, on the current stream."""

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        """Copy from `store` to `pool`."""
        self._store, self._pool = store, pool

    def start(self, row: int, slot: int) -> None:
        """Copy now."""
        self._pool.slot(slot).copy_(self._store.record(row))

    def wait(self, slot: int) -> None:
        """Nothing to wait for: the copy is done."""

    def release(self, slot: int) -> None:
        """Nothing to order."""

    def settle(self) -> None:
        """Nothing is under way."""


class StreamTransfer:
    """Copies page-locked rows on a stream of their own.

    The host's part of a load has to be short beside the copy, or the link waits for it: tensors of rows and slots are made
    once, and streams are named and switched instead of asked for. The pool's device has to be the current one.
    """

    def __init__(self, store: HostStore, pool: SlotPool) -> None:
        """Copy from `store` (page-locked) to `pool` (CUDA)."""
        device = pool.buffer.device
        self._rows, self._slots = store.buffer.unbind(), pool.buffer.unbind()
        self._device = device.index
        self._stream = torch.cuda.Stream(device)
        self._loaded = [torch.cuda.Event() for _ in self._slots]
        self._released = [torch.cuda.Event() for _ in self._slots]
        # the pool's memory may have been used by work queued before it was allocated
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self, row: int, slot: int) -> None:
        """Queue the copy behind the slot's last release."""
        self._stream.wait_event(self._released[slot])
        computing = torch.cuda.current_stream(self._device)
        try:
            torch.cuda.set_stream(self._stream)
            self._slots[slot].copy_(self._rows[row], non_blocking=True)
        finally:
            torch.cuda.set_stream(computing)
        self._loaded[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """Order the current stream behind the slot's copy."""
        torch.cuda.current_stream(self._device).wait_event(self._loaded[slot])

    def release(self, slot: int) -> None:
        """Mark the current stream's position as the last that reads the slot."""
        self._released[slot].record(torch.cuda.current_stream(self._device))

    def settle(self) -> None:
        """Wait for the copy stream."""
        self._stream.synchronize()
