"""Copies of pages to host memory and back, on a line of their own, so that no step waits for a page to leave.

A *record* is a page of all layers of one kind as bytes: keys `[layers, heads, page, width]`, then values. All copies are
queued on one line: host memory that is lent again is written behind the copy that read it. On a GPU records pass through a
small buffer on the device, so that one transfer moves several. Must not know sequences, tokens and what is kept.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from expertflow.execution.captured.lanes import Lane
from expertflow.execution.kv.paged import Stack
from expertflow.execution.sampling.upload import upload
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
        self._device, self._lane = device, Lane(device)
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
                records, pages = self._records(group), self._pages(group)
                for part, held in self._parts(group[0].kind, records):
                    torch.index_select(held, 1, pages, out=part)
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
                for part, held in self._parts(group[0].kind, records):
                    if group[0].places is None:
                        held.index_copy_(1, self._pages(group), part)
                    else:
                        held[:, group[0].page, :, group[0].places].copy_(part[:, 0, :, group[0].places])
        self._join()

    def before_writing(self, kind: int, pages: Sequence[int]) -> None:
        """Let later work wait for copies that may still read these pages."""
        if self._leaving and any((kind, page) in self._leaving for page in pages):
            self._join()

    def _join(self) -> None:
        self._lane.join()
        self._leaving.clear()

    def _groups(self, moves: Sequence[Move]) -> Iterator[list[Move]]:
        """Moves of one kind whose records lie one behind the other, as many as the buffer holds; of a part of a page, one alone."""
        group: list[Move] = []
        for move in moves:
            size = self.record_bytes(move.kind)
            whole = bool(group) and group[-1].places is None and move.places is None
            joined = whole and group[-1].kind == move.kind and group[-1].begin + size == move.begin
            room = not len(self._buffer) or (len(group) + 1) * size <= len(self._buffer)
            if group and not (joined and room):
                yield group
                group = []
            group.append(move)
        if group:
            yield group

    def _records(self, group: Sequence[Move]) -> Tensor:
        """Where the group's records are written or read by kernels: in the buffer, or in the arena itself on a CPU."""
        size = len(group) * self.record_bytes(group[0].kind)
        return self._buffer[:size] if len(self._buffer) else self._arena.piece(group[0].begin, size)

    def _pages(self, group: Sequence[Move]) -> Tensor:
        """Pages of a group, on the device."""
        return upload(np.array([move.page for move in group], dtype=np.int64), self._device)

    def _parts(self, kind: int, records: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys of all records, `[layers, records, heads, page, width]`, beside those of all pages; then values."""
        lines, begin = records.view(-1, self.record_bytes(kind)), 0
        for held in (self._stacks[kind].keys, self._stacks[kind].values):
            size = held[:, 0].nbytes
            part = lines[:, begin : begin + size].view(held.dtype)
            yield part.unflatten(1, held[:, 0].shape).transpose(0, 1), held
            begin += size
