"""Which kernels a device gets: Triton's on CUDA, their torch references elsewhere. Both have the same calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow.formats.format import Format
from expertflow.kernels import dense_reference, reference
from expertflow.kernels.residency import reference as residency_reference
from expertflow.triton_support import HAS_TRITON, ensure_kernel_folder

if HAS_TRITON:
    from expertflow.kernels import dense, experts, fetch, readers
    from expertflow.kernels.residency import driver


@dataclass(frozen=True)
class Backend:
    """One set of kernels; see `kernels.reference` and `kernels.residency.reference` for what each does.

    `reads` is whether its expert kernels read a format.
    """

    expert_pairs: Callable[..., None]
    combine: Callable[[Tensor, Tensor, Tensor, int, Tensor], None]
    fetch_records: Callable[..., None]
    blocks_of: Callable[[int], int]
    residency: Callable[..., Any]
    decode_attention: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    reads: Callable[[Format], bool]


def backend(device: torch.device) -> Backend:
    """The kernels for a device."""
    if device.type == "cuda" and HAS_TRITON:
        ensure_kernel_folder()
        return Backend(
            experts.expert_pairs,
            experts.combine,
            fetch.fetch_records,
            fetch.blocks_of,
            driver.Residency,
            dense.decode_attention,
            dense.rms_norm,
            readers.reads,
        )
    return Backend(
        reference.expert_pairs,
        reference.combine,
        reference.fetch_records,
        reference.blocks_of,
        residency_reference.Residency,
        dense_reference.decode_attention,
        dense_reference.rms_norm,
        reference.reads,
    )
