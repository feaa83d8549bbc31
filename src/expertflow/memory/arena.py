"""One block of host memory, page-locked for a GPU, that is lent in pieces of any sizes.

The first hole that is large enough is lent; neighbouring holes become one. Must not know what pieces hold.
"""

import mmap
import weakref
from bisect import bisect_left

import torch
from torch import Tensor

from expertflow.errors import HostMemoryError
from expertflow.units import format_bytes


class HostArena:
    """Host memory that is lent in pieces.

    Args:
        nbytes: of all pieces together.
        pin: page-lock the memory for a CUDA device.

    Attributes:
        nbytes: as above.
        used: bytes that are lent.

    Raises:
        HostMemoryError: if the host refuses the memory, or the driver to lock it.
    """

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        """Reserve the memory, as one hole; unless it is locked, the system gives pages as they are written."""
        self.nbytes, self.used = nbytes, 0
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise HostMemoryError(
                f"the host refused {format_bytes(nbytes)} for keys and values of earlier prompts: {error}",
                "State a smaller prefix_memory.",
            ) from error
        self._buffer = torch.frombuffer(memory, dtype=torch.uint8)
        self._begins, self._ends = [0], [nbytes]  # of the holes, ascending
        self._unlock: weakref.finalize[..., HostArena] | None = None
        if pin:
            self._lock()

    def _lock(self) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self.nbytes, 0))
        if code != 0:
            raise HostMemoryError(
                f"the driver refused to page-lock {format_bytes(self.nbytes)} of prefix_memory (CUDA error {code})",
                "State a smaller prefix_memory, or raise the limit on locked memory (ulimit -l).",
            )
        # also if the arena is dropped without being closed: registered memory must not be freed
        self._unlock = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, self._buffer.data_ptr())

    def take(self, size: int) -> int | None:
        """Lend `size` bytes; where they begin, or None if no hole is large enough."""
        for place, (begin, end) in enumerate(zip(self._begins, self._ends, strict=True)):
            if end - begin >= size:
                self._begins[place] += size
                if self._begins[place] == end:
                    del self._begins[place], self._ends[place]
                self.used += size
                return begin
        return None

    def give_back(self, begin: int, size: int) -> None:
        """Take back what was lent."""
        end, place = begin + size, bisect_left(self._begins, begin)
        self.used -= size
        if place < len(self._begins) and self._begins[place] == end:
            end = self._ends[place]
            del self._begins[place], self._ends[place]
        if place and self._ends[place - 1] == begin:
            self._ends[place - 1] = end
            return
        self._begins.insert(place, begin)
        self._ends.insert(place, end)

    def piece(self, begin: int, size: int) -> Tensor:
        """What lies there, uint8 `[size]`."""
        return self._buffer[begin : begin + size]

    def close(self) -> None:
        """Free the memory, once no copy is under way; nothing can be lent afterwards."""
        if self._unlock is not None:
            self._unlock()
        self._buffer, self._begins, self._ends = torch.empty(0, dtype=torch.uint8), [], []
