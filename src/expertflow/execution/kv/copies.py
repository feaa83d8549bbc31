"""Copies of pages to host memory and back, on a line of their own, so that no step waits for a page to leave.

A *record* is a page of all layers of one kind as bytes: keys `[layers, heads, page, width]`, then values. All copies are
queued on one line: host memory that is lent again is written behind the copy that read it. On a GPU records pass through a
small buffer on the device, so that one transfer moves several. Must not know sequences, tokens and what is kept.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from expertflow.execution.captured.lanes import Lane
from expertflow.execution.kv.paged import Stack
from expertflow.memory.arena import HostArena


class Move(NamedTuple):
    """A page of a kind, where its record lies in the arena, and the range of its places that matters; None: all."""

    kind: int
    page: int
    begin: int
    places: slice | None = None


class PageCopies:
    """Copies pages between the device and an arena.

    Args:
        stacks: keys and values of each kind of layers.
        arena: host memory.
        device: where the pages are.
        buffer: bytes of the buffer on the device.
    """

    def __init__(self, stacks: Sequence[Stack], arena: HostArena, device: torch.device, buffer: int) -> None:
        """Queue nothing yet."""
        self._stacks, self._arena = stacks, arena
        self._lane = Lane(device)
        self._buffer = torch.empty(buffer if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
        self._leaving: set[tuple[int, int]] = set()
        """Pages, each with its kind, that a queued copy may still read."""

    def record_bytes(self, kind: int) -> int:
        """Bytes of a record; 0 before the first keys came."""
        stack = self._stacks[kind]
        return (stack.keys[:, 0].nbytes + stack.values[:, 0].nbytes) if stack.made else 0

    @torch.inference_mode()
    def out(self, moves: Sequence[Move]) -> None:
        """Copy pages to the arena, behind all work that is queued now and beside all later work."""
        with self._lane.work():
            for group in self._groups(moves):
                records = self._records(group)
                for move, (keys, values) in zip(group, self._views(group[0].kind, records), strict=True):
                    stack = self._stacks[move.kind]
                    keys.copy_(stack.keys[:, move.page])
                    values.copy_(stack.values[:, move.page])
                if len(self._buffer):
                    self._arena.piece(group[0].begin, len(records)).copy_(records, non_blocking=True)
        if len(self._buffer):
            self._leaving.update((move.kind, move.page) for move in moves)

    @torch.inference_mode()
    def into(self, moves: Sequence[Move]) -> None:
        """Copy records from the arena into pages; later work is queued behind it."""
        with self._lane.work():
            for group in self._groups(moves):
                records = self._records(group)
                if len(self._buffer):
                    records.copy_(self._arena.piece(group[0].begin, len(records)), non_blocking=True)
                for move, (keys, values) in zip(group, self._views(group[0].kind, records), strict=True):
                    stack, places = self._stacks[move.kind], move.places or slice(None)
                    stack.keys[:, move.page, :, places].copy_(keys[:, :, places])
                    stack.values[:, move.page, :, places].copy_(values[:, :, places])
        self._join()

    def before_writing(self, kind: int, pages: Sequence[int]) -> None:
        """Let later work wait for copies that may still read these pages."""
        if self._leaving and any((kind, page) in self._leaving for page in pages):
            self._join()

    def _join(self) -> None:
        self._lane.join()
        self._leaving.clear()

    def _groups(self, moves: Sequence[Move]) -> Iterator[list[Move]]:
        """Moves of one kind whose records lie one behind the other, as many as the buffer holds."""
        group: list[Move] = []
        for move in moves:
            size = self.record_bytes(move.kind)
            joined = bool(group) and group[-1].kind == move.kind and group[-1].begin + size == move.begin
            if group and not (joined and (len(group) + 1) * size <= len(self._buffer)):
                yield group
                group = []
            group.append(move)
        if group:
            yield group

    def _records(self, group: Sequence[Move]) -> Tensor:
        """Where the group's records are written or read by kernels: in the buffer, or in the arena itself on a CPU."""
        size = len(group) * self.record_bytes(group[0].kind)
        return self._buffer[:size] if len(self._buffer) else self._arena.piece(group[0].begin, size)

    def _views(self, kind: int, records: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each record, `[layers, heads, page, width]`."""
        keys, values = (part[:, 0] for part in (self._stacks[kind].keys, self._stacks[kind].values))
        for record in records.split(self.record_bytes(kind)):
            first, second = record.split([keys.nbytes, values.nbytes])
            yield first.view(keys.dtype).view(keys.shape), second.view(values.dtype).view(values.shape)
