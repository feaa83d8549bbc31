"""The layouts of packed checkpoints there are, each a few experts small. A new kind is a file of its own and an entry here."""

import torch
from torch import Tensor

from layout import Layout
from layouts_fp8 import LAYOUTS_FP8
from layouts_int4 import LAYOUTS_INT4
from layouts_nvfp4 import LAYOUTS_NVFP4

__all__ = ["LAYOUTS", "Layout"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def pack_mxfp4(key: str, weight: Tensor, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Experts stacked, adjacent codes in a byte, a power of two for 32 inputs."""
    experts, outputs, inputs = weight.shape
    codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 126, codes.shape[:3], generator=generator, dtype=torch.uint8)
    numbers = torch.ldexp(torch.tensor(E2M1)[codes.int()], scales.int()[..., None] - 127)
    packed = {f"{key}_blocks": codes[..., ::2] | codes[..., 1::2] << 4, f"{key}_scales": scales}
    return packed, numbers.flatten(2).to(weight.dtype)


_MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
LAYOUTS = {
    "mxfp4": Layout(family="gpt_oss", quantization=_MXFP4, pack=pack_mxfp4, sizes={"intermediate_size": 192}),
    "mxfp4 in float32": Layout(
        family="gpt_oss", quantization=_MXFP4, pack=pack_mxfp4, dtype="float32", plain_layers=(1,)
    ),
    **LAYOUTS_INT4,
    **LAYOUTS_FP8,
    **LAYOUTS_NVFP4,
}
