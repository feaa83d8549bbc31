"""The predictor's own kernels: the Triton twin of a predictor step.

`path` does a step of all live sequences, `absorb` takes prompts in. Must not know the engine.
"""

from collections.abc import Callable
from typing import Any

import torch

from expertflow.triton_support import HAS_TRITON, ensure_kernel_folder

if HAS_TRITON:
    from expertflow.predict.kernels import path


def step_kernels(device: torch.device) -> Callable[[Any], Any] | None:
    """What makes a predictor's step of kernels on a device.

    Args:
        device: where the predictor works.

    Returns:
        A function of an artifact, which gives None for a predictor it does not serve; None where `predict.online` has the
        only step.
    """
    if device.type != "cuda" or not HAS_TRITON:
        return None
    ensure_kernel_folder()
    return path.path_step
