"""Writes `tests/data/decoded.safetensors`: random packed weights, and what the libraries that published their formats make of them.

AutoGPTQ 0.7.1, AutoAWQ 0.2.9, NVIDIA's modelopt 0.47.0 and GPTQModel 7.7.0 are needed once, unpacked, not installed: their decoding is
plain torch.

Usage: python tests/write_vectors.py auto-gptq=FOLDER autoawq=FOLDER modelopt=FOLDER gptqmodel=FOLDER
       each the folder that holds the package; vectors of libraries that are not named stay as they are
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


def gptq_v2(folder: Path, generator: torch.Generator, group: int) -> dict[str, Tensor]:
    """What GPTQModel decodes of a layer in its own format, `gptq_v2`, whose zeros are stored as they are, in float16."""
    root = "gptqmodel.nn_modules.qlinear"
    for name in (
        "adapter.adapter",
        "models._const",
        "quantization",
        "utils.backend",
        "utils.env",
        "utils.logger",
        "utils.safe",
    ):
        sys.modules[f"gptqmodel.{name}"] = MagicMock()  # what choosing and running kernels needs, and decoding does not
    load(folder / "gptqmodel/utils/planar_packing.py", "gptqmodel.utils")
    kind = load(folder / "gptqmodel/nn_modules/qlinear/__init__.py", root).PackableQuantLinear
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer.bits, layer.maxq, layer.pack_dtype, layer.pack_dtype_bits, layer.pack_factor = 4, 15, torch.int32, 32, 8
    layer.in_features, layer.out_features, layer.group_size = INPUTS, OUTPUTS, group
    layer.planar, layer.enable_wf_unsqueeze, layer.dequant_dtype = False, True, torch.int8
    layer._register_gptq_buffers(bias=False)  # what its constructor calls, behind checks of kernels
    layer.qweight, layer.qzeros = words(generator, *layer.qweight.shape), words(generator, *layer.qzeros.shape)
    layer.scales = (torch.rand(layer.scales.shape, generator=generator) * 0.1).half()
    decoded = layer.dequantize_weight().t().contiguous()
    parts = {"codes": layer.qweight, "zeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
    return {**parts, "decoded": decoded}


def vectors(library: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The vectors of one library, by name."""
    generator = torch.Generator().manual_seed(0)
    makers = {"auto-gptq": ("gptq", gptq), "autoawq": ("awq", awq), "gptqmodel": ("gptq_v2", gptq_v2)}
    if library == "modelopt":
        return {"modelopt-nvfp4": modelopt(folder, generator)}
    name, make = makers[library]
    return {f"{name} {group}": make(folder, generator, group) for group in (32, 64)}


def main(given: list[str]) -> None:
    """Decode, and write."""
    tensors = load_file(OUT) if OUT.exists() else {}
    for library, _, folder in (text.partition("=") for text in given):
        for name, parts in vectors(library, Path(folder)).items():
            tensors |= {f"{name} {part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, OUT)


if __name__ == "__main__":
    main(sys.argv[1:])
