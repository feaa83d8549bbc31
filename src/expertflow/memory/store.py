"""The expert store: the records of all experts of a model in host memory, page-locked for a GPU.

Ordinary anonymous memory is registered with the driver instead of allocated by it. That is five times faster and does
not round up to powers of two. Records have flat numbers, `layer * E + expert`. Must not know checkpoints.
"""

import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from expertflow.errors import ExpertFlowError, HostMemoryError
from expertflow.formats.records import StoreLayout
from expertflow.limits import free_addresses, free_memory, lacks_memory, lockable_memory
from expertflow.units import format_bytes

_ROOM = 256 << 20
"""Bytes of address space that threads, their stacks and the allocator need besides."""
_LARGEST_TRIAL = 1 << 30
"""Most bytes that are page-locked to test whether the driver enforces the limit."""


def check_host_memory(needed: int, allowed: int | None) -> None:
    """Refuse a store that does not fit, before anything is loaded.

    Args:
        needed: bytes of the store, and of everything else where the device is the host.
        allowed: bytes the user allows; None: what is free now.

    Raises:
        HostMemoryError: if it does not fit.
    """
    limit = free_memory() if allowed is None else allowed
    if needed > limit:
        source = "free on this host" if allowed is None else "allowed by host_memory"
        raise HostMemoryError(
            f"the run needs {format_bytes(needed)} of host memory, {format_bytes(limit)} is {source}",
            "Free memory, use a smaller dtype, or a machine with more of it.",
        )


def check_addresses(needed: int) -> None:
    """Refuse a run that a limit on address space cannot hold, before anything is loaded.

    Args:
        needed: bytes that will be allocated or mapped.

    Raises:
        HostMemoryError: if the limit leaves too little.
    """
    free = free_addresses()
    if free is not None and needed + _ROOM > free:
        raise HostMemoryError(
            f"the run needs {format_bytes(needed + _ROOM)} of address space, the limit leaves {format_bytes(free)}",
            "Raise the limit (ulimit -v; clusters set it from the memory that a job requests), or state fewer slots.",
        )


def check_locking(needed: int) -> None:
    """Refuse a run that page-locks more memory than the system allows, before anything is loaded.

    Most drivers lock more than `ulimit -l`. So if that limit is too small, locking a little more than it is tried.

    Args:
        needed: bytes that will be page-locked.

    Raises:
        HostMemoryError: if the driver enforces the limit.
    """
    limit = lockable_memory()
    if limit is None or needed <= limit or limit > _LARGEST_TRIAL:
        return
    trial = mmap.mmap(-1, limit + mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(trial, dtype=torch.uint8).data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(address, limit + mmap.PAGESIZE, 0))
    if code != 0:
        raise HostMemoryError(
            f"the run page-locks {format_bytes(needed)}, the limit on locked memory is {format_bytes(limit)} (CUDA error {code})",
            "Raise it with `ulimit -l unlimited`, in a container with `--ulimit memlock=-1`, or use --device cpu.",
        )
    torch.cuda.cudart().cudaHostUnregister(address)


@contextmanager
def memory_reported() -> Iterator[None]:
    """Turn every refused host allocation inside into our error.

    Raises:
        HostMemoryError: if the host refuses memory.
    """
    try:
        yield
    except ExpertFlowError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if not lacks_memory(error):
            raise
        raise HostMemoryError(
            f"the host refused memory: {next(iter(str(error).splitlines()), 'out of memory')[:300]}",
            "Free memory, raise its limits (ulimit -v, control groups), or state fewer slots and shorter sequences.",
        ) from error


class HostStore:
    """Records of all experts in host memory, `[L * E, record_bytes]` bytes, page-aligned; those of large layers by themselves.

    Rows of large layers are address space alone: nothing writes or locks them.

    Args:
        layout: what a record of each layer holds.
        records: number of experts in the model.
        pin: page-lock the memory for a CUDA device.

    Raises:
        HostMemoryError: if the host refuses the memory.
    """

    def __init__(self, layout: StoreLayout, records: int, *, pin: bool) -> None:
        """Reserve the memory; pages are touched when records are written."""
        self.layout = layout
        self._experts = records // len(layout.layers)
        self.buffer = _reserve(records, layout.record_bytes)
        self._large = {layer: _reserve(self._experts, layout.layers[layer].record_bytes) for layer in layout.large}
        self._pin = pin
        self._unlock: list[weakref.finalize[..., HostStore]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all records; 0 once the store was closed."""
        return self.layout.store_bytes(self._experts) if len(self.buffer) else 0

    @property
    def memory(self) -> list[Tensor]:
        """Every block of memory of the store."""
        return [self.buffer, *self._large.values()]

    def record(self, number: int) -> Tensor:
        """Return one record, uint8 `[record_bytes]` of its layer; `number` is `layer * E + expert`."""
        if self._large and (large := self._large.get(number // self._experts)) is not None:
            return large[number % self._experts]
        return self.buffer[number]

    def lock(self) -> None:
        """Page-lock the filled records that are loaded into slots, if this store was made for a CUDA device.

        Raises:
            HostMemoryError: if the driver refuses.
        """
        if not self._pin or self._unlock:
            return
        for address, size in self._ranges():
            code = torch.cuda.cudart().cudaHostRegister(address, size, 0)
            if int(code) != 0:
                raise HostMemoryError(
                    f"the driver refused to page-lock {format_bytes(size)} (CUDA error {int(code)})",
                    "Raise the limit on locked memory (ulimit -l) or free host memory.",
                )
            # also if the store is dropped without being closed: registered memory must not be freed
            self._unlock.append(weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address))

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Address and bytes of each run of layers that are not large; runs that would share a page are one."""
        layer, page = self._experts * self.buffer.shape[1], mmap.PAGESIZE
        begin = end = 0
        for number in sorted(set(range(len(self.layout.layers))) - set(self.layout.large)):
            first, last = number * layer // page * page, (number + 1) * layer
            if first > end:
                if end:
                    yield self.buffer.data_ptr() + begin, end - begin
                begin = first
            end = min(-(-last // page) * page, self.buffer.numel())
        yield self.buffer.data_ptr() + begin, end - begin

    def close(self) -> None:
        """Free the memory; later use of a record is an error."""
        for unlock in self._unlock:
            unlock()
        self.buffer, self._large = torch.empty(0, 0, dtype=torch.uint8), {}


def _reserve(rows: int, row: int) -> Tensor:
    """Anonymous memory, uint8 `[rows, row]`.

    Raises:
        HostMemoryError: if the host refuses it.
    """
    try:
        # private: shared anonymous memory counts as a file, and gets no huge pages
        memory = mmap.mmap(-1, rows * row, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise HostMemoryError(
            f"the host refused {format_bytes(rows * row)} for the experts: {error}",
            "Free memory, use a smaller dtype, or a machine with more of it.",
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(rows, row)
