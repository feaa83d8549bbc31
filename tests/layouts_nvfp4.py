"""Checkpoints in NVFP4, of compressed-tensors and of modelopt; attention in FP8 where both are mixed."""

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layout import Layout
from layouts_fp8 import WIDE, compressed, pack_by_tensor, pack_fp8

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def draw(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of two codes, their numbers, and FP8 scales of groups of 16."""
    outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = torch.randint(0x20, 0x70, (outputs, inputs // 16), generator=generator, dtype=torch.uint8)
    numbers = torch.tensor(E2M1)[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), numbers, scales.view(torch.float8_e4m3fn)


def pack_compressed(key: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """A scale is divided by the tensor's own factor."""
    packed, numbers, scales = draw(weight, generator)
    factor = torch.rand(1, generator=generator) * 300 + 100
    whole = (scales.float() / factor).repeat_interleave(16, 1)
    stem = key.removesuffix("weight")
    tensors = {f"{key}_packed": packed, f"{key}_scale": scales, f"{key}_global_scale": factor}
    return {**tensors, f"{stem}input_global_scale": factor * 3}, (numbers * whole).to(weight.dtype)


def pack_modelopt(key: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """A scale is multiplied with the tensor's own factor, which is a number without a dimension."""
    packed, numbers, scales = draw(weight, generator)
    factor = torch.rand((), generator=generator) * 0.01 + 0.002
    whole = (scales.float() * factor).repeat_interleave(16, 1)
    stem = key.removesuffix("weight")
    tensors = {key: packed, f"{key}_scale": scales, f"{key}_scale_2": factor, f"{stem}input_scale": factor * 3}
    return tensors, (numbers * whole).to(weight.dtype)


def pack_mixed(
    key: str, weight: Tensor, generator: torch.Generator, *, experts: Any, attention: Any
) -> tuple[dict[str, Tensor], Tensor]:
    return (experts if ".experts." in key else attention)(key, weight, generator)


GROUP = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "dynamic": False,
}


def mixed() -> dict[str, Any]:
    """The format stands in each group."""
    quantization = compressed("mixed-precision", "float", strategy="channel")
    (attention,) = quantization["config_groups"].values()
    experts = {"targets": ["re:.*experts.*"], "weights": GROUP, "format": "nvfp4-pack-quantized"}
    groups = {"group_0": {**attention, "format": "float-quantized"}, "group_1": experts}
    return {**quantization, "config_groups": groups}


def own_file(**about: object) -> dict[str, str]:
    """What modelopt writes beside the config."""
    content = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"kv_cache_quant_algo": None, **about},
    }
    return {"hf_quant_config.json": json.dumps(content)}


LAYOUTS_NVFP4 = {
    "nvfp4 of compressed-tensors": Layout(
        family="qwen3_moe", dense=True, pack=pack_compressed,
        quantization=compressed("nvfp4-pack-quantized", "float", **GROUP), sizes={"moe_intermediate_size": 160},
    ),
    "nvfp4 in float32, attention in fp8": Layout(
        family="glm4_moe", dense=True, quantization=mixed(), dtype="float32", sizes={"moe_intermediate_size": 192},
        pack=partial(
            pack_mixed, experts=pack_compressed,
            attention=partial(pack_fp8, block=(1, WIDE), scale=torch.bfloat16, rounds=True, end="_scale"),
        ),
    ),
    "nvfp4 of modelopt": Layout(
        family="deepseek_v3", pack=pack_modelopt, sizes={"moe_intermediate_size": 96}, plain_layers=(2,),
        quantization={"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}, "ignore": ["lm_head"]},
    ),
    "nvfp4 of modelopt with a file of its own, attention in fp8": Layout(
        family="qwen3_moe", dense=True, quantization={},
        pack=partial(pack_mixed, experts=pack_modelopt, attention=pack_by_tensor),
        files=own_file(quant_algo="MIXED_PRECISION", quantized_layers={
            "model.layers.0.mlp.experts.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        }),
    ),
}  # fmt: skip
