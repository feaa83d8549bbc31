"""How fast devices copy and compute, where the plan compares times. Must not know options."""

from expertflow.engine.planning.pass_size import Speeds
from expertflow.models.shape import ModelShape

SPEEDS = {"cuda": (50e9, 3e12, 1e-3, 4e-3), "cpu": (10e9, 10e9, 1e-3, 4e-3)}
"""Bytes a second over the link and in the device's memory (H100: benchmarks/results/kernels_h100.json; a CPU: a guess),
and fixed seconds of a step and of a division into groups."""
_COMPUTE, _COMPUTE_FLOAT32 = 300e12, 30e12
"""Floating-point operations a second of a pass over prompts, of 16-bit numbers on an H200; of float32: a guess."""


def pass_speeds(shape: ModelShape) -> Speeds:
    """What copies and computes a pass over prompts on CUDA."""
    return Speeds(SPEEDS["cuda"][0], _COMPUTE_FLOAT32 if shape.dtype == "float32" else _COMPUTE)
