"""Writes `tests/data/decoded.safetensors`: random packed weights, and what the libraries that published their formats make of them.

AutoGPTQ 0.7.1, AutoAWQ 0.2.9 and NVIDIA's modelopt 0.47.0 are needed once, unpacked, not installed: their decoding is plain torch.

Usage: python tests/write_vectors.py AUTO_GPTQ AUTOAWQ MODELOPT
       each the folder that holds the package
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).parent / "data" / "decoded.safetensors"
INPUTS, OUTPUTS = 192, 32


def load(path: Path, package: str = "") -> Any:
    """A module of a file; relative imports find empty packages and the files beside it."""
    name = f"{package}.{path.stem}" if package else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def words(generator: torch.Generator, *shape: int) -> Tensor:
    """Random words of 32 bits."""
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def gptq(folder: Path, generator: torch.Generator, group: int) -> dict[str, Tensor]:
    """What AutoGPTQ's layer multiplies with: its product with the identity, in float16."""
    layer = load(folder / "auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py").QuantLinear(
        4, group, INPUTS, OUTPUTS, bias=False, use_cuda_fp16=False, trainable=True
    )
    layer.qweight = words(generator, *layer.qweight.shape)
    layer.qzeros = words(generator, *layer.qzeros.shape) & 0x66666666  # 15 and a carry are read differently by readers
    layer.scales = (torch.rand(layer.scales.shape, generator=generator) * 0.1).half()
    decoded = layer(torch.eye(INPUTS, dtype=torch.float16)).t().contiguous()
    parts = {"codes": layer.qweight, "zeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
    return {**parts, "decoded": decoded}


def awq(folder: Path, generator: torch.Generator, group: int) -> dict[str, Tensor]:
    """What AutoAWQ decodes for its GEMM layers, in float16."""
    groups = INPUTS // group
    codes, zeros = words(generator, INPUTS, OUTPUTS // 8), words(generator, groups, OUTPUTS // 8)
    scales = (torch.rand(groups, OUTPUTS, generator=generator) * 0.1).half()
    decoded = load(folder / "awq/utils/packing_utils.py").dequantize_gemm(codes, zeros, scales, 4, group)
    return {"codes": codes, "zeros": zeros, "scales": scales, "decoded": decoded.t().contiguous()}


def modelopt(folder: Path, generator: torch.Generator) -> dict[str, Tensor]:
    """What modelopt's tensor of NVFP4 decodes to, in bfloat16."""
    at, root = folder / "modelopt/torch/quantization", "modelopt.torch.quantization"
    for name in (
        "modelopt",
        "modelopt.torch",
        root,
        *(f"{root}.{one}" for one in ("backends", "backends.utils", "qtensor", "utils")),
    ):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    # what the files import for quantising, and decoding does not call
    sys.modules[f"{root}.backends.utils"].fp4_compatible = None  # type: ignore[attr-defined]
    unused = "reduce_amax reduce_block_amax reduce_block_padding fsdp2_aware_weight_update patch_fsdp_mp_dtypes"
    for name in unused.split():
        setattr(sys.modules[f"{root}.utils"], name, None)
    load(at / "utils/numeric_utils.py", f"{root}.utils")
    load(at / "qtensor/base_qtensor.py", f"{root}.qtensor")
    kind = load(at / "qtensor/nvfp4_tensor.py", f"{root}.qtensor").NVFP4QTensor
    codes = torch.randint(0, 256, (OUTPUTS, INPUTS // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randint(1, 127, (OUTPUTS, INPUTS // 16), generator=generator, dtype=torch.uint8)
    scales, factor = scales.view(torch.float8_e4m3fn), torch.tensor(0.00037)
    packed = kind(torch.Size((OUTPUTS, INPUTS)), torch.bfloat16, codes)
    decoded = packed.dequantize(scale=scales, double_scale=factor, block_sizes={-1: 16})
    return {"codes": codes, "scales": scales, "globals": factor, "decoded": decoded}


def main(folders: list[Path]) -> None:
    """Decode, and write."""
    generator = torch.Generator().manual_seed(0)
    found = {
        "gptq 32": gptq(folders[0], generator, 32),
        "gptq 64": gptq(folders[0], generator, 64),
        "awq 32": awq(folders[1], generator, 32),
        "awq 64": awq(folders[1], generator, 64),
        "modelopt-nvfp4": modelopt(folders[2], generator),
    }
    tensors = {f"{name} {part}": tensor.contiguous() for name, parts in found.items() for part, tensor in parts.items()}
    save_file(tensors, OUT)


if __name__ == "__main__":
    main([Path(text) for text in sys.argv[1:]])
