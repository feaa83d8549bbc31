"""Which kernels a device gets: Triton's on CUDA, their torch references elsewhere. Same calls, same words."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertflow.kernels import dense_reference, reference, residency_reference

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON:
    from triton import knobs

    from expertflow.kernels import dense, experts, fetch, path, residency


@dataclass(frozen=True)
class Backend:
    """One set of kernels; see `kernels.reference` and `kernels.residency_reference` for what each does.

    `path_step` gives a predictor's step, or None for one it does not serve; where it is None, `predict` has the only one.
    """

    expert_pairs: Callable[..., None]
    combine: Callable[[Tensor, Tensor, Tensor, int, Tensor], None]
    fetch_rows: Callable[..., None]
    blocks_of: Callable[[int], int]
    residency: Callable[..., Any]
    decode_attention: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    path_step: Callable[[Any], Any] | None


def backend(device: torch.device) -> Backend:
    """The kernels for a device."""
    if device.type == "cuda" and HAS_TRITON:
        find_place_for_kernels()
        return Backend(
            experts.expert_pairs,
            experts.combine,
            fetch.fetch_rows,
            fetch.blocks_of,
            residency.Residency,
            dense.decode_attention,
            dense.rms_norm,
            path.path_step,
        )
    return Backend(
        reference.expert_pairs,
        reference.combine,
        reference.fetch_rows,
        reference.blocks_of,
        residency_reference.Residency,
        dense_reference.decode_attention,
        dense_reference.rms_norm,
        None,
    )


def find_place_for_kernels() -> None:
    """Let Triton keep what it compiles in a new temporary folder if its own cannot be written to."""
    place = Path(knobs.cache.dir)
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="expertflow-triton-")
