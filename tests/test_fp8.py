"""Formats of one byte a weight: their numbers are torch's and the library's, and what cannot be decoded is refused."""

import importlib
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.errors import UnsupportedModelError
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.published.described import algorithms
from expertflow.formats.published.fp8 import (
    ALL,
    FLOAT_QUANTIZED,
    FP8,
    INT_QUANTIZED,
    Bytes,
    FloatQuantized,
    Fp8,
    IntQuantized,
)
from expertflow.formats.records import RecordLayout
from expertflow.formats.table import FORMATS
from expertflow.kernels.mlp import ExpertMlp, Workspace
from expertflow.models.weights.sources import RandomWeights
from helpers import DEVICES, MakeCheckpoint
from layout import write_twins
from layouts import LAYOUTS

DTYPES = ["float32", "bfloat16", "float16"]
CODES = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
"""All that are numbers."""


def claimed(quantization: dict[str, Any]) -> tuple[Format, ...]:
    return tuple(format_ for one in FORMATS.values() for format_ in one.claim(quantization))


def group(kind: str = "float", **weights: object) -> dict[str, Any]:
    """What compressed-tensors writes of a group."""
    return {"weights": {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, **weights}}


def compressed(stored_as: str, *groups: dict[str, Any], **more: object) -> dict[str, Any]:
    named = {f"group_{number}": one for number, one in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": stored_as, "config_groups": named, **more}


def decode(format_: Format, stored: list[dict[str, Tensor]], dtype: str, **how: bool) -> Tensor:
    """The numbers of tensors in the shapes and number types of a checkpoint, joined."""
    outputs, inputs = format_.logical_shape({name: tuple(part.shape) for name, part in stored[0].items()})
    shape = (outputs * len(stored), inputs)
    spec = TensorSpec(name="w", shape=shape, dtype=dtype, format=format_, joined=len(stored), **how)
    parts = {}
    for part in spec.parts:
        packed = [format_.repack(spec.one, part.name, one[part.source or part.name]).reshape(-1) for one in stored]
        dtype_ = getattr(torch, part.dtype)
        packed = [one.view(dtype_) if one.dtype.itemsize == 1 else one.to(dtype_) for one in packed]
        parts[part.name] = torch.cat(packed).view(part.shape)
    return format_.decode(spec, parts)


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return CODES[torch.randint(0, len(CODES), shape, generator=generator)].view(torch.float8_e4m3fn)


def random_scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_is_torchs(dtype: str) -> None:
    """All 254 codes that are numbers, with the smallest scale, ordinary ones and the largest; subnormal numbers are kept."""
    scales = torch.tensor([2.0**-149, 2.0**-126, 0.3, 1.0, -1.7, 3.0e38]).view(6, 1)
    codes = CODES.expand(6, -1).contiguous().view(torch.float8_e4m3fn)
    found = decode(Fp8(block=(1, 254)), [{"codes": codes, "scales": scales}], dtype)
    assert torch.equal(found, (codes.float() * scales).to(getattr(torch, dtype)))
    assert found[3].unique().numel() == 253  # both zeros are one
    assert (dtype == "float16") or found[1, 7] != 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"), [(192, 320, (128, 128)), (96, 160, (128, 128)), (100, 70, (32, 64))]
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_joined_tensors_have_blocks_of_their_own(
    outputs: int, inputs: int, block: tuple[int, int], interleaved: bool, dtype: str
) -> None:
    """Output n of up has the scale of block n // 128 of up, where gate ends within a block too."""
    grid = (-(-outputs // block[0]), -(-inputs // block[1]))
    stored = [{"codes": random_codes(outputs, inputs, seed=n), "scales": random_scales(*grid, seed=n)} for n in (3, 4)]
    found = decode(Fp8(block=block), stored, dtype, interleaved=interleaved)
    row, col = torch.arange(outputs)[:, None] // block[0], torch.arange(inputs)[None, :] // block[1]
    each = [(one["codes"].float() * one["scales"][row, col]).to(found.dtype) for one in stored]
    assert torch.equal(found[::2] if interleaved else found[:outputs], each[0])
    assert torch.equal(found[1::2] if interleaved else found[outputs:], each[1])


def test_scales_of_other_types_are_kept_exactly() -> None:
    """bfloat16, and powers of two in E8M0, the smallest of which is subnormal."""
    codes = random_codes(256, 384)
    grid = random_scales(2, 3).bfloat16()
    wide = decode(FP8, [{"codes": codes, "scales": grid}], "bfloat16")
    assert torch.equal(wide, decode(FP8, [{"codes": codes, "scales": grid.float()}], "bfloat16"))
    powers = torch.tensor([[0, 1, 119], [127, 128, 246]], dtype=torch.uint8)
    exact = torch.ldexp(torch.ones(2, 3, dtype=torch.float64), powers.int() - 127).float()
    found = decode(FP8, [{"codes": codes, "scales": powers.view(torch.float8_e8m0fnu)}], "bfloat16")
    assert torch.equal(found, decode(FP8, [{"codes": codes, "scales": exact}], "bfloat16"))


LIBRARY = {
    "channel": ((1, ALL), {"strategy": "channel"}, (192, 1)),
    "tensor": ((ALL, ALL), {"strategy": "tensor"}, (1,)),
    "block": ((128, 128), {"strategy": "block", "block_structure": [128, 128]}, (2, 3)),
}


@pytest.mark.parametrize("strategy", LIBRARY)
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("kind", ["float", "int"])
def test_numbers_are_those_of_compressed_tensors(kind: str, scale_dtype: str, strategy: str) -> None:
    """On random codes, in the number type of the scale; then rounded to the run's."""
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    compressors = importlib.import_module("compressed_tensors.compressors")
    block, about, shape = LIBRARY[strategy]
    scheme = library.QuantizationScheme(
        targets=["Linear"], weights=library.QuantizationArgs(num_bits=8, type=kind, **about)
    )
    scales = random_scales(*shape).to(getattr(torch, scale_dtype))
    codes = random_codes(192, 320).view(torch.int8)
    codes = codes if kind == "int" else codes.view(torch.float8_e4m3fn)
    theirs = compressors.BaseCompressor.get_value_from_registry(f"{kind}-quantized").decompress(
        {"weight": codes, "weight_scale": scales}, scheme
    )["weight"]
    assert theirs.dtype == scales.dtype
    (format_,) = claimed(compressed(f"{kind}-quantized", group(kind, **about)))
    stored_name = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[scale_dtype]
    format_ = format_.of_types({"codes": "F8_E4M3", "scales": stored_name})
    assert format_.block == block
    for dtype in DTYPES:
        found = decode(format_, [{"codes": codes, "scales": scales}], dtype)
        assert torch.equal(found, theirs.to(getattr(torch, dtype)))


def test_one_scale_a_tensor_is_multiplied_in_float32() -> None:
    """`fp8` without block sizes, and modelopt's FP8; gate and up have a scale each."""
    stored = [{"codes": random_codes(96, 64, seed=n), "scales": torch.tensor(0.0123 * (n + 1))} for n in (0, 1)]
    for quantization in ({"quant_method": "fp8"}, {"quant_method": "modelopt", "quant_algo": "FP8"}):
        (format_,) = claimed(quantization)
        each = [(one["codes"].float() * one["scales"]).bfloat16() for one in stored]
        assert torch.equal(decode(format_, stored, "bfloat16"), torch.cat(each))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_and_scales_that_are_no_numbers_are_refused(code: int) -> None:
    """The shifts would make 480 of them."""
    spec = TensorSpec(name="w", shape=(256, 128), dtype="bfloat16", format=FP8)
    codes = random_codes(256, 128)
    FP8.repack(spec, "codes", codes)
    codes.view(torch.uint8)[200, 100] = code
    with pytest.raises(ValueError, match="not a number"):
        FP8.repack(spec, "codes", codes)
    for bad in (float("nan"), float("inf")):
        for format_ in (FP8, FLOAT_QUANTIZED, INT_QUANTIZED):
            with pytest.raises(ValueError, match="not finite"):
                format_.repack(spec, "scales", torch.tensor([[1.0], [bad]]))
    with pytest.raises(ValueError, match="255"):
        FP8.repack(spec, "scales", torch.tensor([[127], [255]], dtype=torch.uint8).view(torch.float8_e8m0fnu))


@pytest.mark.parametrize("inputs", [16, 112, 192, 70])
@pytest.mark.parametrize("format_", [FP8, INT_QUANTIZED], ids=["fp8", "int8"])
def test_a_record_has_codes_as_tensor_cores_take_them(format_: Bytes, inputs: int) -> None:
    """Of 16 inputs thread q of four takes the pairs from 2 q and from 2 q + 8; steps of 64 lie thread by thread. Odd rows stay."""
    steps = []
    for step in range(0, inputs, 64):
        runs = range(step, min(step + 64, inputs), 16)
        steps.append([run + 2 * q + up + n for q in range(4) for run in runs for up in (0, 8) for n in (0, 1)])
    steps = steps if inputs % 16 == 0 else [list(range(inputs))]
    codes = torch.randint(0, 127, (6, inputs), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    stored = codes.view(torch.float8_e4m3fn if format_ is FP8 else torch.int8)
    spec = TensorSpec(name="w", shape=(6, inputs), dtype="float32", format=format_)
    found = format_.repack(spec, "codes", stored)
    assert torch.equal(found.view(torch.uint8).flatten(), torch.cat([codes[:, step].flatten() for step in steps]))
    (_, part, _) = spec.parts
    ones = torch.ones(part.shape, dtype=getattr(torch, part.dtype))
    assert torch.equal(format_.numbers(spec, {"codes": found, "scales": ones}), stored.float())


def test_what_configs_state() -> None:
    """Block sizes, and the kinds of the groups of compressed-tensors, whose format may stand in each group."""
    assert claimed({"quant_method": "fp8", "weight_block_size": [128, 64], "scale_fmt": "ue8m0"}) == (
        Fp8(block=(128, 64)),
    )
    assert claimed(compressed("float-quantized", group())) == (FloatQuantized(block=(1, ALL)),)
    assert claimed(compressed("int-quantized", group("int"))) == (IntQuantized(block=(1, ALL)),)
    assert claimed(compressed("naive-quantized", group())) == (FloatQuantized(block=(1, ALL)),)
    named = {**group(strategy="tensor"), "format": "float-quantized"}
    assert claimed(compressed("mixed-precision", named)) == (FloatQuantized(block=(ALL, ALL)),)
    assert claimed(compressed("float-quantized", group(), {"weights": None})) == (FloatQuantized(block=(1, ALL)),)
    assert not algorithms({"quant_method": "fp8", "quant_algo": "FP8"})
    assert not FP8.claim({"quant_method": "gptq", "bits": 8})
    packed = compressed("pack-quantized", group("int", num_bits=4, strategy="group", group_size=128))
    assert not any(format_.claim(packed) for format_ in (FP8, FLOAT_QUANTIZED, INT_QUANTIZED))


@pytest.mark.parametrize(
    ("quantization", "what"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'e5m2'"),
        (compressed("mxfp8-quantized", group()), "'mxfp8-quantized'"),
        (compressed("mixed-precision", group()), "'mixed-precision'"),
        (compressed("mixed-precision", {**group(), "format": "float-quantized"}, {**group(), "format": "marlin-24"}), "'marlin-24'"),
        (compressed("float-quantized", group(), group(strategy="tensor")), "differ in their type"),
        (compressed("mixed-precision", {**group("int"), "format": "int-quantized"}, {**group(), "format": "float-quantized"}), "differ in their type"),
        (compressed("float-quantized", group(strategy="group", group_size=128)), "strategy 'group'"),
        (compressed("float-quantized", group(strategy="block")), "block_structure None"),
        (compressed("float-quantized", group(dynamic=True)), "dynamic True"),
        (compressed("int-quantized", group("int", symmetric=False)), "symmetric False"),
        (compressed("int-quantized", group("int", num_bits=4)), "num_bits 4"),
        (compressed("float-quantized", group(), sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
        (compressed("float-quantized", group(), transform_config={"config_groups": {"a": {}}}), "transform_config"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "'FP8_PB_WO'"),
    ],
)  # fmt: skip
def test_variants_that_are_not_decoded_are_refused(quantization: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        claimed(quantization)


def test_keys_of_codes_and_scales() -> None:
    """Tensors of other names and number types are plain; zero points are parts that no record holds."""
    assert FP8.split_key("a.q_proj.weight", "F8_E4M3") == ("a.q_proj.weight", "codes")
    assert FP8.split_key("a.q_proj.weight", "BF16") is None
    assert FP8.split_key("a.q_proj.weight_scale_inv", "F32") == ("a.q_proj.weight", "scales")
    assert FP8.split_key("experts.gate_up_proj_scale_inv", "BF16") == ("experts.gate_up_proj", "scales")
    assert FP8.split_key("a.q_proj.weight_scale", "F8_E4M3") is None  # of NVFP4
    assert FP8.split_key("router.logit_scale", "F32") is None
    assert FLOAT_QUANTIZED.split_key("a.q_proj.weight_scale", "F16") == ("a.q_proj.weight", "scales")
    assert INT_QUANTIZED.split_key("a.q_proj.weight", "I8") == ("a.q_proj.weight", "codes")
    assert INT_QUANTIZED.split_key("a.q_proj.weight_zero_point", "I8") == ("a.q_proj.weight", "zeros")


@pytest.mark.parametrize("format_", [FP8, FLOAT_QUANTIZED, INT_QUANTIZED], ids=lambda one: one.name)
def test_drawn_numbers_have_the_deviation_asked_for(format_: Bytes) -> None:
    spec = TensorSpec(name="w", shape=(384, 320), dtype="bfloat16", format=format_, joined=2)
    drawn = format_.draw(spec, torch.Generator().manual_seed(0), 0.02)
    assert {name: tuple(part.shape) for name, part in drawn.items()} == {part.name: part.shape for part in spec.parts}
    assert float(format_.decode(spec, drawn).float().std()) == pytest.approx(0.02, rel=0.05)


ODD, WHOLE = (96, 160), (128, 256)
"""Inputs of the projections: in steps of 128 with a shorter last one, and without."""


@pytest.mark.parametrize(
    ("format_", "dtype", "sizes"),
    [
        (FP8, "float32", ODD),
        (FP8, "bfloat16", ODD),
        (Fp8(block=(32, 16)), "bfloat16", ODD),
        (Fp8(block=(ALL, ALL)), "bfloat16", ODD),
        (FloatQuantized(block=(1, ALL)), "float32", ODD),
        (FloatQuantized(block=(1, ALL), scale_dtype="float16"), "bfloat16", ODD),
        (FloatQuantized(block=(1, ALL), scale_dtype="float16"), "float16", ODD),
        (FloatQuantized(block=(1, ALL), scale_dtype="float16"), "float16", WHOLE),
        (FloatQuantized(block=(ALL, ALL), scale_dtype="float16"), "float16", WHOLE),
        (FloatQuantized(block=(64, 64)), "bfloat16", ODD),
        (Fp8(block=(48, 128)), "float16", ODD),
        (IntQuantized(block=(1, ALL)), "bfloat16", ODD),
    ],
    ids=str,
)
def test_kernels_read_what_a_format_decodes(format_: Bytes, dtype: str, sizes: tuple[int, int]) -> None:
    """The expert kernels give the same bits for packed records as for the same numbers in plain ones, at odd sizes too."""
    pytest.importorskip("triton", reason="kernels need triton")
    from expertflow.kernels import experts  # noqa: PLC0415

    device, (hidden, width) = torch.device(DEVICES[-1]), sizes
    shapes = {"gate_up_proj": ((2 * width, hidden), 2), "down_proj": ((hidden, width), 1)}
    packed = [TensorSpec(name=n, shape=s, dtype=dtype, format=format_, joined=j) for n, (s, j) in shapes.items()]
    layouts = [RecordLayout.of(packed), RecordLayout.of([plain(spec.name, spec.shape, dtype) for spec in packed])]
    records = [torch.zeros(2, layout.record_bytes, dtype=torch.uint8) for layout in layouts]
    for number, (ours, theirs) in enumerate(zip(*records, strict=True)):
        for spec in packed:
            codes, scales, pairs = layouts[0].parts(ours, spec.name).values()
            codes.copy_(random_codes(*codes.shape, seed=number).view(codes.dtype))
            scales.copy_(random_scales(*scales.shape, seed=number))
            pairs.copy_(format_.pairs_of(scales))
        for name, value in layouts[0].weights(ours).items():
            layouts[1].tensor(theirs, name).copy_(value)
    x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(2)).to(device, getattr(torch, dtype))
    slots = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32, device=device)
    mlps = [ExpertMlp.of(layout, "silu") for layout in layouts]
    quick = mlps[0].for_records(records[0])
    assert quick.up.spec.format.quick == (format_.code_dtype != "int8" and format_.scale_dtype != "float16")
    for block_k, fast in product((64, 128), (False, True)):
        found = []
        for mlp, pool in zip((quick if fast else mlps[0], mlps[1]), records, strict=True):
            on_device = pool.to(device)
            work = Workspace.allocate(mlp, 2, 2, device)
            work.parts.zero_()
            experts.launch_up(mlp, x, slots, on_device, work, experts.Tiling(32, block_k))
            experts.launch_down(mlp, slots, on_device, work, experts.Tiling(64, block_k))
            found.append(work.parts)
        assert found[0].abs().sum() > 0
        assert torch.equal(*found)


def test_stock_decodes_the_same_where_it_is_right(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Transformers on a folder of FP8 in whole blocks, dequantised. Where blocks are not whole it raises, or divides rows evenly."""
    pytest.importorskip("accelerate")
    sizes = {"moe_intermediate_size": 256, "hidden_size": 128}
    layout = replace(LAYOUTS["fp8 as Qwen3"], plain_layers=(), sizes=sizes)
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **sizes), tmp_path, layout)
    stock = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        quantization_config=FineGrainedFP8Config(dequantize=True),
        experts_implementation="eager",
    ).eval()
    for tensor in (*stock.parameters(), *stock.buffers()):
        tensor.data = tensor.data.clone()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.inference_mode():
        expected = stock(ids).logits
        model = from_pretrained(folder, slots=5, device="cpu")
        assert torch.equal(model(ids).logits, expected)
    model.expertflow.close()


@pytest.mark.parametrize("name", ["fp8 as Qwen3", "int-quantized", "nvfp4 in float32, attention in fp8"])
def test_a_stand_in_has_records_of_its_format(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Random weights for a packed checkpoint: records of its size, and answers."""
    layout = replace(LAYOUTS[name], plain_layers=())
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **layout.sizes), tmp_path, layout)
    real = prepare(folder, EngineConfig(device="cpu", slots=4)).plan
    with LLM(folder, device="cpu", slots=4, max_length=32, weights=RandomWeights()) as llm:
        assert llm.plan.record_bytes == real.record_bytes
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3
