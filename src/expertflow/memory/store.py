"""All experts of a model in host memory, one row each, page-locked for a GPU.

Ordinary anonymous memory is registered with the driver instead of allocated by it: that is five times faster and
does not round up to powers of two. Knows rows by flat number; refuses to know checkpoints.
"""

import mmap
import weakref
from pathlib import Path

import psutil
import torch
from torch import Tensor

from expertflow.errors import HostMemoryError
from expertflow.memory.layout import RowLayout
from expertflow.units import format_bytes

_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes a new allocation may take: what the machine has free, within the control group's limit if there is one."""
    free = int(psutil.virtual_memory().available)
    for limit_name, usage_name in _CGROUP_FILES:
        limit, usage = cgroup / limit_name, cgroup / usage_name
        if limit.is_file() and usage.is_file():
            text = limit.read_text().strip()
            if text.isdigit():
                free = min(free, int(text) - int(usage.read_text()) + _reclaimable(cgroup / "memory.stat"))
    return max(free, 0)


def _reclaimable(stat: Path) -> int:
    """Page cache that the control group counts as used and gives back on demand."""
    if not stat.is_file():
        return 0
    fields = dict(line.split() for line in stat.read_text().splitlines() if line)
    return int(fields.get("inactive_file", 0))


def check_host_memory(needed: int, allowed: int | None) -> None:
    """Refuse before anything is loaded if the store cannot fit.

    Args:
        needed: bytes of the store, and of everything else where the device is the host.
        allowed: bytes the user allows; None: what is free now.

    Raises:
        HostMemoryError: if it does not fit.
    """
    limit = available_host_bytes() if allowed is None else allowed
    if needed > limit:
        source = "free on this host" if allowed is None else "allowed by host_memory"
        raise HostMemoryError(
            f"the run needs {format_bytes(needed)} of host memory, {format_bytes(limit)} is {source}",
            "Free memory, use a smaller dtype, or a machine with more of it.",
        )


class HostStore:
    """Rows of all experts, `[L * E, row_bytes]` bytes, page-aligned.

    Args:
        layout: what a row holds.
        rows: number of experts in the model.
        pin: page-lock the memory for a CUDA device.
    """

    def __init__(self, layout: RowLayout, rows: int, *, pin: bool) -> None:
        """Reserve the memory; pages are touched when rows are written."""
        self.layout = layout
        try:
            # private: shared anonymous memory counts as a file, and gets no huge pages
            memory = mmap.mmap(-1, rows * layout.row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise HostMemoryError(
                f"the host refused {format_bytes(rows * layout.row_bytes)} for the experts: {error}",
                "Free memory, use a smaller dtype, or a machine with more of it.",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, layout.row_bytes)
        self._pin = pin
        self._unlock: weakref.finalize[..., HostStore] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the store."""
        return self.buffer.numel()

    def row(self, number: int) -> Tensor:
        """One row, uint8 `[row_bytes]`; `number` is `layer * E + expert`."""
        return self.buffer[number]

    def tensor(self, number: int, name: str) -> Tensor:
        """One tensor of one row, without copying."""
        return self.layout.views(self.row(number))[name]

    def lock(self) -> None:
        """Page-lock the rows if this store was made for a CUDA device. Call once they are filled."""
        if not self._pin or self._unlock is not None:
            return
        address = self.buffer.data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, self.nbytes, 0)
        if int(code) != 0:
            raise HostMemoryError(
                f"the driver refused to page-lock {format_bytes(self.nbytes)} (CUDA error {int(code)})",
                "Raise the limit on locked memory (ulimit -l) or free host memory.",
            )
        # also when the store is dropped without being closed: memory must not go back while it is registered
        self._unlock = weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, address)

    def close(self) -> None:
        """Give the memory back; later use of a row is an error."""
        if self._unlock is not None:
            self._unlock()
        self.buffer = torch.empty(0, 0, dtype=torch.uint8)
