"""Checkpoints of four-bit integers: compressed-tensors, GPTQ and AWQ, packed field by field as their documents say."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from layout import Layout

AWQ_FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: Tensor, dim: int, fields: Sequence[int] = range(8)) -> Tensor:
    """Eight codes of neighbours along a dimension in an int32; field j, from the lowest bits on, has element `fields[j]`."""
    last = codes.long().movedim(dim, -1)
    padded = torch.nn.functional.pad(last, (0, -last.shape[-1] % 8)).unflatten(-1, (-1, 8))
    word = sum(padded[..., element] << 4 * field for field, element in enumerate(fields))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int().movedim(-1, dim).contiguous()


def expand(each: Tensor, inputs: int, group: int) -> Tensor:
    """What groups have, for every input: `[N, groups]` to `[N, K]`."""
    return each[:, torch.arange(inputs) // group]


def numbers(codes: Tensor, zeros: Tensor, scales: Tensor, group: int) -> Tensor:
    """`(code - zero) * scale`, exact but for float32 scales in float32, and rounded to the scale's dtype."""
    inputs = codes.shape[1]
    whole = codes.float() - expand(zeros, inputs, group).float()
    return (whole * expand(scales, inputs, group).float()).to(scales.dtype)


def draw(
    weight: Tensor, group: int, scale: torch.dtype, generator: torch.Generator, zeros: range | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales and zeros, 8 unless they are drawn from a range; and the weight they stand for."""
    outputs, inputs = weight.shape
    groups = -(-inputs // group)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.05 + 0.02).to(scale)
    zero = torch.full((outputs, groups), 8)
    if zeros is not None:
        zero = torch.randint(zeros.start, zeros.stop, (outputs, groups), generator=generator)
    return codes, scales, zero, numbers(codes, zero, scales, group).to(weight.dtype)


def pack_compressed(
    key: str,
    weight: Tensor,
    generator: torch.Generator,
    *,
    group: int,
    scale: torch.dtype = torch.bfloat16,
    asymmetric: bool = False,
    ordered: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors, `pack-quantized`."""
    codes, scales, zeros, decoded = draw(weight, group, scale, generator, range(16) if asymmetric else None)
    packed = {"packed": words(codes, 1), "scale": scales, "shape": torch.tensor(weight.shape)}
    if asymmetric:
        packed["zero_point"] = words(zeros, 0)
    if ordered:
        packed["g_idx"] = (torch.arange(weight.shape[1]) // group).int()
    return {f"{key}_{name}": tensor for name, tensor in packed.items()}, decoded


def pack_gptq(
    key: str,
    weight: Tensor,
    generator: torch.Generator,
    *,
    group: int,
    added: int = 1,
    zeros: range | None = None,
    g_idx: bool = True,
    scale: torch.dtype = torch.float16,
) -> tuple[dict[str, Tensor], Tensor]:
    """GPTQ; zeros are stored less `added`."""
    codes, scales, zero, decoded = draw(weight, group, scale, generator, zeros)
    packed = {"qweight": words(codes.t(), 0), "scales": scales.t(), "qzeros": words(zero.t() - added, 1)}
    if g_idx:
        packed["g_idx"] = (torch.arange(weight.shape[1]) // group).int()
    stem = key.removesuffix(".weight")
    return {f"{stem}.{name}": tensor for name, tensor in packed.items()}, decoded


def pack_awq(key: str, weight: Tensor, generator: torch.Generator, *, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """AWQ in the version of its GEMM kernels."""
    codes, scales, zero, decoded = draw(weight, group, torch.float16, generator, range(16))
    packed = {
        "qweight": words(codes.t(), 1, AWQ_FIELDS),
        "scales": scales.t(),
        "qzeros": words(zero.t(), 1, AWQ_FIELDS),
    }
    stem = key.removesuffix(".weight")
    return {f"{stem}.{name}": tensor for name, tensor in packed.items()}, decoded


def compressed(group: int, *, mixed: bool = False, **weights: object) -> dict:
    """A `quantization_config` of compressed-tensors; `mixed`: its format stands in the group."""
    channel = group < 0
    args = {"num_bits": 4, "type": "int", "strategy": "channel" if channel else "group", "symmetric": True,
            "group_size": None if channel else group, "dynamic": False, **weights}  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    if mixed:
        scheme["format"] = "pack-quantized"
    top = "mixed-precision" if mixed else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": top,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",  # else transformers leaves dense weights random
    }


def gptq(group: int, **about: object) -> dict:
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True, **about}


def awq(group: int) -> dict:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}


WIDE = 1 << 30
LAYOUTS_INT4 = {
    "int4 g32": Layout(
        family="qwen3_moe", quantization=compressed(32), pack=partial(pack_compressed, group=32),
        sizes={"moe_intermediate_size": 192}, plain_layers=(1,),
    ),
    "int4 g128 with attention": Layout(
        family="deepseek_v3", quantization=compressed(128, mixed=True, actorder="weight"), dense=True,
        pack=partial(pack_compressed, group=128), sizes={"moe_intermediate_size": 192},
    ),
    "int4 g64 asymmetric, float16 scales": Layout(
        family="mixtral", quantization=compressed(64, symmetric=False, actorder="group"), dense=True,
        pack=partial(pack_compressed, group=64, scale=torch.float16, asymmetric=True, ordered=True),
        sizes={"intermediate_size": 192},
    ),
    "int4 asymmetric by row, in float32": Layout(
        family="olmoe", quantization=compressed(-1, symmetric=False), dtype="float32",
        pack=partial(pack_compressed, group=WIDE, scale=torch.float32, asymmetric=True), sizes={"intermediate_size": 160},
    ),
    "gptq g32 in float16": Layout(
        family="qwen3_moe", quantization=gptq(32), pack=partial(pack_gptq, group=32), dtype="float16",
    ),
    "gptq g128 asymmetric": Layout(
        family="qwen2_moe", quantization=gptq(128, sym=False, desc_act=True), dense=True,
        pack=partial(pack_gptq, group=128, zeros=range(1, 16)), sizes={"moe_intermediate_size": 192},
    ),
    "gptq_v2 g64 asymmetric": Layout(
        family="minimax_m2", quantization=gptq(64, sym=False, checkpoint_format="gptq_v2"),
        pack=partial(pack_gptq, group=64, added=0, zeros=range(16), g_idx=False), sizes={"intermediate_size": 96},
    ),
    "gptq that stores 8": Layout(
        family="mixtral", quantization=gptq(-1), pack=partial(pack_gptq, group=WIDE, added=0, scale=torch.bfloat16),
    ),
    "awq g32 in float16": Layout(
        family="mixtral", quantization=awq(32), pack=partial(pack_awq, group=32), dtype="float16",
    ),
    "awq g64 with attention": Layout(
        family="glm4_moe", quantization=awq(64), pack=partial(pack_awq, group=64), dense=True,
        sizes={"moe_intermediate_size": 192},
    ),
}  # fmt: skip
