"""What a kernel may count on where it is launched. Must not know any kernel."""

from typing import Any

import torch
from torch import Tensor

ROOM = 227 << 10
"""Bytes of shared memory that a program may take on Hopper."""


def starts_early(tensor: Tensor) -> bool:
    """Whether a tensor's device has Hopper's programmatic launch; a kernel launched so waits itself (`gdc_wait`)."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9


def room(tensor: Tensor) -> int:
    """Shared memory that a program may take on a tensor's device, bytes."""
    if not tensor.is_cuda:
        return ROOM
    properties: Any = torch.cuda.get_device_properties(tensor.device)  # torch's stubs lack the attribute
    return int(properties.shared_memory_per_block_optin)
