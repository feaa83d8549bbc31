"""Small arrays on their way to the device, without waiting for the steps that are queued there."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from expertflow.memory.devices import locked


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A copy of the array on the device, complete for whatever is queued from now on. On a CPU it is the array itself."""
    here = torch.from_numpy(array)
    # a copy from ordinary memory would wait for the device
    return locked(here).to(device, non_blocking=True) if device.type == "cuda" else here
