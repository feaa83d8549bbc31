"""Use one device of several: enter it, read its free memory, send it small tensors. Must not know plans and models."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from expertflow.errors import DeviceError


def entered(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one inside the context, because every thread has its own; nothing for a CPU.

    Args:
        device: with its index if it is a CUDA device.
    """
    return nullcontext() if device.type != "cuda" else torch.cuda.device(device)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a CUDA device that new tensors can take, those cached by torch's allocator included.

    Args:
        device: with its index.
    """
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def resolve_device(device: str) -> torch.device:
    """Find the torch device, with its index, for `auto`, `cpu`, `cuda` (torch's current device) or `cuda:N`.

    Raises:
        DeviceError: if torch does not see that CUDA device.
    """
    available, (kind, _, index) = torch.cuda.is_available(), device.partition(":")
    if kind == "cpu" or (kind == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise DeviceError(
            f"device={device!r}, but torch sees no CUDA device", "Use --device cpu, or install a CUDA build of torch."
        )
    number = int(index) if index else torch.cuda.current_device()
    if number >= (count := torch.cuda.device_count()):
        raise DeviceError(
            f"device={device!r}, but the last CUDA device torch sees is 'cuda:{count - 1}'",
            "Use a smaller number, or list more devices in CUDA_VISIBLE_DEVICES.",
        )
    return torch.device("cuda", number)


def locked(here: Tensor) -> Tensor:
    """A page-locked copy of a small tensor; torch keeps it until copies from it are over."""
    found = torch.empty(here.shape, dtype=here.dtype, pin_memory=True)
    found.numpy()[...] = here.numpy()  # `pin_memory` wakes a pool of threads for some ten thousand numbers
    return found


def send(here: Tensor, there: Tensor) -> None:
    """Copy a small tensor of ordinary host memory behind what is queued on the device. It may be changed at once; nobody waits."""
    if there.is_cuda:
        there.copy_(locked(here), non_blocking=True)
    else:
        there.copy_(here)


def fetched(there: Tensor) -> Tensor:
    """Host memory that a copy of a tensor comes into, behind what is queued on its device."""
    if not there.is_cuda:
        return there.clone()
    host = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    return host.copy_(there, non_blocking=True)
