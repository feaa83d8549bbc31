"""Measure the peak of device memory in use.

On CUDA the allocator counts. On a CPU "device memory" means what a GPU would hold. There a dispatch mode counts every
tensor that operators create until its storage is freed. It misses temporaries inside one operator, which a GPU's
allocator counts. Must not know plans and budgets.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@runtime_checkable
class Meter(Protocol):
    """Measures the peak of device memory."""

    def watch(self) -> AbstractContextManager[Any]:
        """Measure what runs inside."""

    def aside(self) -> AbstractContextManager[Any]:
        """Leave what runs inside uncounted, because it works in host memory."""

    @property
    def peak_bytes(self) -> int:
        """The most bytes in use at once since the meter was made."""


class CudaMeter:
    """Reads the CUDA caching allocator of one device; the peak starts when the meter is made."""

    def __init__(self, device: torch.device) -> None:
        """Start a new peak."""
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def watch(self) -> AbstractContextManager[Any]:
        """Do nothing: the allocator always measures."""
        return nullcontext()

    def aside(self) -> AbstractContextManager[Any]:
        """Do nothing: the allocator counts no host memory."""
        return nullcontext()

    @property
    def peak_bytes(self) -> int:
        """`torch.cuda.max_memory_allocated`."""
        return torch.cuda.max_memory_allocated(self._device)


class CpuMeter:
    """Counts CPU tensors: the resident ones it is given, and those created while it watches."""

    def __init__(self, resident: Iterable[Tensor], exclude: Iterable[Tensor] = ()) -> None:
        """Count `resident` tensors from the start; never count `exclude` (host memory)."""
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
        self._now = 0
        self._aside = False
        self.peak_bytes = 0
        for tensor in resident:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - the storage's identity; its address may be null
        if self._aside or key in self._live or storage.data_ptr() in self._excluded:
            return
        self._live[key] = weakref.ref(storage, self._forget(key, size))
        self._now += size
        self.peak_bytes = max(self.peak_bytes, self._now)

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            if self._live.pop(key, None) is not None:
                self._now -= size

        return gone

    def watch(self) -> AbstractContextManager[Any]:
        """Count every tensor that operators create inside."""
        return _Counting(self)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count nothing that is made inside."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False


class _Counting(TorchDispatchMode):
    def __init__(self, meter: CpuMeter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._meter.add(result)
        elif result is not None:
            for item in tree_iter(result):
                if isinstance(item, Tensor):
                    self._meter.add(item)
        return result
