"""Blocks of tokens whose keys and values are kept in host memory: named by all tokens up to their end, the least worth dropped first.

A block's name is a hash over the name of the block before it and its own tokens, so equal names have equal beginnings. What
a block is worth is the time of a use plus twice the blocks that this use saves, the most of all its uses; time is counted in
blocks that came. So a long chat outlives short requests that came after it, and worth fades without being written anew. A
block is used whenever one behind it is, and is worth more. So of each beginning the end is dropped first. Pure numbers, and
pieces of an arena. Must not know rows, pages and devices.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.memory.arena import HostArena

Routes = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
_NAME_BYTES = 16
WORTH = 2.0
"""Blocks that a use counts later for each block that it saves; 0: the least recently used one is dropped."""


def names_of(tokens: Sequence[int], piece: int) -> list[bytes]:
    """Names of the whole blocks of `piece` tokens that a sequence begins with."""
    data, size, name, names = np.asarray(tokens, dtype=np.int64).tobytes(), 8 * piece, b"", list[bytes]()
    for begin in range(0, len(tokens) // piece * size, size):
        name = blake2b(name + data[begin : begin + size], digest_size=_NAME_BYTES).digest()
        names.append(name)
    return names


class Part(NamedTuple):
    """What layers of one kind keep of a block: from which token of the sequence on, and where in the arena."""

    first: int
    begin: int
    size: int


@dataclass(kw_only=True)
class Block:
    """What is kept of a block.

    Attributes:
        parts: by kind of layers.
        routes: `[piece, L, K]`, the experts of its tokens; None: not known.
        worth: what it is worth, then how near it is to the beginning.
    """

    parts: dict[int, Part] = field(default_factory=dict)
    routes: Routes | None = None
    worth: tuple[float, int] = (0.0, 0)


class BlockStore:
    """Blocks by name.

    Args:
        arena: where their parts lie. Routes lie elsewhere; together they take no more than the arena has.
        worth: see `WORTH`.
    """

    def __init__(self, arena: HostArena, worth: float = WORTH) -> None:
        """Start with no block."""
        self._arena, self._worth = arena, worth
        self._blocks: dict[bytes, Block] = {}
        self._order: list[tuple[tuple[float, int], bytes]] = []  # a heap; what is no longer a block's worth is skipped
        self._time = 0
        self._routes_bytes = 0

    def __contains__(self, name: bytes) -> bool:
        """Whether a block is kept."""
        return name in self._blocks

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        return self._arena.used + self._routes_bytes

    def get(self, name: bytes) -> Block | None:
        """A block, or None; this is no use."""
        return self._blocks.get(name)

    def add(self, name: bytes) -> Block:
        """Begin a block without parts."""
        self._time += 1
        block = self._blocks[name] = Block()
        self._value(name, block, (float(self._time), 0))
        return block

    def use(self, names: Sequence[bytes]) -> None:
        """Count a beginning as used: what is kept of it, its first block as worth most."""
        self._time += 1
        kept = [(place, name) for place, name in enumerate(names) if name in self._blocks]
        for place, name in kept:
            worth, block = (self._time + self._worth * len(kept), -place), self._blocks[name]
            if worth > block.worth:
                self._value(name, block, worth)
        if len(self._order) > 2 * len(self._blocks) + len(names):
            self._order = [(block.worth, name) for name, block in self._blocks.items()]
            heapify(self._order)

    def put(self, block: Block, kind: int, first: int, size: int, spared: Collection[bytes]) -> Part | None:
        """Have room for a part of a block, in place of the one it had; drop blocks of least worth until there is some.

        Args:
            block: to have it.
            kind: of its layers.
            first: its first token.
            size: bytes.
            spared: names of blocks that are not dropped.

        Returns:
            Where it goes; None if only spared blocks could be dropped. Then the block has what it had.
        """
        while (begin := self._take(size)) is None:
            if not self.drop(spared):
                return None
        if (before := block.parts.get(kind)) is not None:
            self._arena.give_back(before.begin, before.size)
        part = block.parts[kind] = Part(first, begin, size)
        return part

    def note(self, block: Block, routes: Routes, spared: Collection[bytes]) -> None:
        """Keep a block's routes, if there is room once blocks of least worth are dropped."""
        while self.nbytes + routes.nbytes > self._arena.nbytes:
            if not self.drop(spared):
                return
        block.routes = routes
        self._routes_bytes += routes.nbytes

    def drop(self, spared: Collection[bytes] = ()) -> bool:
        """Drop the block that is worth least and not spared; False if there is none."""
        passed, found = [], False
        while self._order and not found:
            worth, name = entry = heappop(self._order)
            block = self._blocks.get(name)
            if block is None or block.worth != worth:
                continue
            if name in spared:
                passed.append(entry)
                continue
            self.remove(name)
            found = True
        for entry in passed:
            heappush(self._order, entry)
        return found

    def remove(self, name: bytes) -> None:
        """Drop a block."""
        block = self._blocks.pop(name)
        for part in block.parts.values():
            self._arena.give_back(part.begin, part.size)
        if block.routes is not None:
            self._routes_bytes -= block.routes.nbytes

    def close(self) -> None:
        """Drop everything and free the memory."""
        self._blocks.clear()
        self._order.clear()
        self._arena.close()

    def _value(self, name: bytes, block: Block, worth: tuple[float, int]) -> None:
        block.worth = worth
        heappush(self._order, (worth, name))

    def _take(self, size: int) -> int | None:
        return None if self.nbytes + size > self._arena.nbytes else self._arena.take(size)
