"""Use one device of several: enter it, and read its free memory. Must not know plans and models."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


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
