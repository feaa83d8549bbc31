"""The predictor's own kernels: the Triton twin of a predictor step.

`path` does a step of all live sequences, `absorb` takes prompts in. Must not know the engine.
"""

from collections.abc import Callable

import torch

from expertflow.predict.artifact import Artifact
from expertflow.predict.online import Twin
from expertflow.triton_support import HAS_TRITON, ensure_kernel_folder

if HAS_TRITON:
    from expertflow.predict.kernels import path


def step_kernels(device: torch.device) -> Callable[[Artifact], Twin | None] | None:
    """The function that makes an artifact's step of kernels on a device.

    Args:
        device: where the predictor works.

    Returns:
        A function of an artifact, which gives None for a predictor it does not serve; None where torch's step is the only
        one.
    """
    if device.type != "cuda" or not HAS_TRITON:
        return None
    ensure_kernel_folder()
    return path.path_step
