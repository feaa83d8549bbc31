"""Whether a kernel may be put on the device while the one before it ends. Must not know any kernel."""

import torch
from torch import Tensor


def starts_early(tensor: Tensor) -> bool:
    """Whether a tensor's device has Hopper's programmatic launch; a kernel launched so waits itself (`gdc_wait`)."""
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] >= 9
