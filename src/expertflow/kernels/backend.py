"""Which kernels a device gets: Triton's on CUDA, their torch references elsewhere. Both have the same calls."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from expertflow.formats.format import Format
from expertflow.kernels import dense_reference, reference
from expertflow.kernels.blocks import reference as blocks_reference
from expertflow.kernels.blocks.given import Routed
from expertflow.kernels.latent import reference as latent_reference
from expertflow.kernels.mlp import ExpertMlp
from expertflow.kernels.residency import reference as residency_reference
from expertflow.kernels.sampling import reference as sampling_reference
from expertflow.triton_support import HAS_TRITON, ensure_kernel_folder

if HAS_TRITON:
    from expertflow.kernels import dense, experts, fetch
    from expertflow.kernels.blocks import attend, gated, latents, product, rotate, route, slots
    from expertflow.kernels.latent import decode, prompts
    from expertflow.kernels.prompts import attention, grouped
    from expertflow.kernels.reading import readers
    from expertflow.kernels.residency import driver
    from expertflow.kernels.sampling import likely, select


@dataclass(frozen=True)
class Backend:
    """One set of kernels; what each does say the modules `reference` of `kernels`, and of `blocks`, `residency` and `sampling` in it.

    `grouped` gives `group_pairs` of one MLP. `prompt_product` is `product` for passes over prompts. `reads` is whether its expert
    kernels read a format.
    """

    expert_pairs: Callable[..., None]
    grouped: Callable[[ExpertMlp, torch.device], Callable[..., None]]
    combine: Callable[..., None]
    find_slots: Callable[[Tensor, Tensor, Tensor], Tensor]
    fetch_records: Callable[..., None]
    blocks_of: Callable[[int], int]
    residency: Callable[..., Any]
    decode_attention: Callable[..., Tensor]
    prompt_attention: Callable[..., Tensor]
    latent_attention: Callable[..., Tensor]
    latent_prompts: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    product: Callable[..., Tensor]
    prompt_product: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    attend_latents: Callable[..., Tensor]
    route: Callable[..., Routed]
    reads: Callable[[Format], bool]
    choose: Callable[..., Tensor]
    likely: Callable[..., Tensor]


def backend(device: torch.device) -> Backend:
    """The kernels for a device."""
    if device.type == "cuda" and HAS_TRITON:
        ensure_kernel_folder()
        return Backend(
            experts.expert_pairs,
            grouped.GroupedMlp,
            experts.combine,
            slots.find_slots,
            fetch.fetch_records,
            fetch.blocks_of,
            driver.Residency,
            dense.decode_attention,
            attention.prompt_attention,
            decode.decode_attention,
            prompts.prompt_attention,
            dense.rms_norm,
            product.product,
            partial(product.product, most=0),
            gated.gated,
            attend.attend,
            rotate.rotate,
            latents.attend_latents,
            route.route,
            readers.reads,
            select.choose,
            likely.likely,
        )
    return Backend(
        reference.expert_pairs,
        _grouped,
        reference.combine,
        reference.find_slots,
        reference.fetch_records,
        reference.blocks_of,
        residency_reference.Residency,
        dense_reference.decode_attention,
        dense_reference.prompt_attention,
        latent_reference.decode_attention,
        latent_reference.prompt_attention,
        dense_reference.rms_norm,
        blocks_reference.product,
        blocks_reference.product,
        blocks_reference.gated,
        blocks_reference.attend,
        blocks_reference.rotate,
        blocks_reference.attend_latents,
        blocks_reference.route,
        reference.reads,
        sampling_reference.choose_each,
        sampling_reference.likely,
    )


def _grouped(mlp: ExpertMlp, device: torch.device) -> Callable[..., None]:
    del device
    return partial(reference.group_pairs, mlp)
