"""Checkpoints of one byte a weight: FP8 in blocks and by tensor, and compressed-tensors' FP8 and int8."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from layout import Layout

FINITE = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)


def e4m3(generator: torch.Generator, *shape: int) -> Tensor:
    """Random codes that are numbers."""
    return FINITE[torch.randint(0, len(FINITE), shape, generator=generator)].view(torch.float8_e4m3fn)


def pack_fp8(
    key: str,
    weight: Tensor,
    generator: torch.Generator,
    *,
    block: tuple[int, int],
    scale: torch.dtype = torch.float32,
    rounds: bool = False,
    end: str = "_scale_inv",
    int8: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """A scale for each block, in the given number type; `rounds`: the product is rounded to it."""
    outputs, inputs = weight.shape
    grid = (-(-outputs // block[0]), -(-inputs // block[1]))
    codes = e4m3(generator, outputs, inputs)
    if int8:
        codes = torch.randint(-128, 128, (outputs, inputs), generator=generator).to(torch.int8)
    scales = torch.rand(grid, generator=generator) * 0.002 + 0.001
    if scale == torch.float8_e8m0fnu:
        scales = torch.exp2(torch.randint(-10, -8, grid, generator=generator).float())
    scales = scales.to(scale)
    row, col = torch.arange(outputs)[:, None] // block[0], torch.arange(inputs)[None, :] // block[1]
    numbers = codes.float() * scales.float()[row, col]
    numbers = (numbers.to(scale) if rounds else numbers).to(weight.dtype)
    return {key: codes, f"{key}{end}": scales}, numbers


def pack_by_tensor(
    key: str, weight: Tensor, generator: torch.Generator, *, shape: tuple[int, ...] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """One scale a tensor, and one of its inputs, which is not used."""
    tensors, numbers = pack_fp8(key, weight, generator, block=tuple(weight.shape), end="_scale")
    stem = key.removesuffix("weight")
    one = tensors[f"{key}_scale"].reshape(shape)
    return {key: tensors[key], f"{key}_scale": one, f"{stem}input_scale": one * 3}, numbers


def fp8(block: list[int] | None, **about: object) -> dict[str, Any]:
    sizes = {} if block is None else {"weight_block_size": block}
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **sizes, **about}


def compressed(stored_as: str, kind: str, **weights: object) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors, that would quantise activations, too."""
    args = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": False, "actorder": None, **weights}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    scheme = {"targets": ["Linear"], "weights": args, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": {"group_0": scheme},
            "ignore": ["lm_head"], "kv_cache_scheme": None}  # fmt: skip


WIDE = 1 << 20
LAYOUTS_FP8 = {
    "fp8 as Qwen3": Layout(
        family="qwen3_moe", quantization=fp8([128, 128]), dense=True, pack=partial(pack_fp8, block=(128, 128)),
        sizes={"moe_intermediate_size": 192, "hidden_size": 160}, plain_layers=(1,),
    ),
    "fp8 as DeepSeek-V3, bfloat16 scales": Layout(
        family="deepseek_v3", quantization=fp8([128, 128]), dense=True,
        pack=partial(pack_fp8, block=(128, 128), scale=torch.bfloat16),
        sizes={"moe_intermediate_size": 192, "kv_lora_rank": 152},
    ),
    "fp8 with powers of two, in float32": Layout(
        family="minimax_m2", quantization=fp8([32, 64], scale_fmt="ue8m0"), dtype="float32",
        pack=partial(pack_fp8, block=(32, 64), scale=torch.float8_e8m0fnu), sizes={"intermediate_size": 80},
    ),
    "fp8 by tensor": Layout(
        family="mixtral", quantization=fp8(None, activation_scheme="static"), pack=partial(pack_by_tensor, shape=(1,)),
        sizes={"intermediate_size": 96},
    ),
    "float-quantized by channel": Layout(
        family="glm4_moe", quantization=compressed("float-quantized", "float", strategy="channel"), dense=True,
        pack=partial(pack_fp8, block=(1, WIDE), scale=torch.float16, rounds=True, end="_scale"),
    ),
    "float-quantized in blocks, in float32": Layout(
        family="qwen3_moe", dtype="float32",
        quantization=compressed("float-quantized", "float", strategy="block", block_structure=[128, 128]),
        pack=partial(pack_fp8, block=(128, 128), scale=torch.bfloat16, rounds=True, end="_scale"),
        sizes={"moe_intermediate_size": 192},
    ),
    "int-quantized": Layout(
        family="qwen2_moe", quantization=compressed("int-quantized", "int", strategy="channel"), dense=True,
        pack=partial(pack_fp8, block=(1, WIDE), scale=torch.bfloat16, rounds=True, end="_scale", int8=True),
    ),
}  # fmt: skip
