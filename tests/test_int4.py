"""Four-bit integers: decoders give their libraries' numbers, and what is not decoded is refused by name.

AutoGPTQ, AutoAWQ and modelopt cannot be installed beside this torch: what they decoded is stored, and all other cases of GPTQ and AWQ
follow their documents.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.errors import CheckpointError, ExpertFlowError, UnsupportedModelError
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.published.awq import AWQ
from expertflow.formats.published.gptq import GPTQ
from expertflow.formats.published.int4 import INT4
from expertflow.formats.published.nvfp4 import MODELOPT_NVFP4
from expertflow.formats.words import ROW
from expertflow.models.skeleton import build_skeleton
from expertflow.models.weights.sources import RandomWeights
from helpers import MakeCheckpoint
from layout import write_twins
from layouts import LAYOUTS
from layouts_int4 import AWQ_FIELDS, awq, compressed, gptq, numbers, words
from test_fp8 import decode

RUNS = ("float32", "bfloat16", "float16")
OUTPUTS = 24


def drawn(inputs: int, group: int, scale: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, K]`, all of them with each scale; scales and zeros `[N, groups]`, the smallest and largest scales among them."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(0, 16, (OUTPUTS, inputs), generator=generator)
    codes[:, :16] = torch.arange(16)
    scales = (torch.randn(OUTPUTS, groups, generator=generator) * 0.03).to(scale)
    facts = torch.finfo(scale)
    extremes = [
        facts.smallest_normal,
        facts.smallest_normal / 2,
        facts.smallest_normal * facts.eps,
        facts.max,
        -facts.max,
        facts.max / 16,
    ]
    scales[: len(extremes), 0] = torch.tensor(extremes, dtype=scale)
    zeros = torch.randint(0, 16, (OUTPUTS, groups), generator=generator)
    return codes, scales, zeros


def decoded(format_: Format, inputs: int, run: str, stored: dict[str, Tensor]) -> Tensor:
    """What our format makes of checkpoint tensors, as loading does it."""
    stated = format_.of_types(
        {"scales": {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[stored["scales"].dtype]}
    )
    spec = TensorSpec(name="w", shape=(OUTPUTS, inputs), dtype=run, format=stated)
    parts = {part.name: part for part in spec.parts}
    assert all(parts[name].stored == tuple(tensor.shape) for name, tensor in stored.items())
    assert stated.logical_shape({name: part.stored for name, part in parts.items()}) == spec.shape
    return stated.decode(
        spec, {name: stated.repack(spec, name, one).view(parts[name].shape) for name, one in stored.items()}
    )


def same(ours: Tensor, theirs: Tensor) -> None:
    """Bit by bit, signs of zeros included."""
    assert ours.dtype == theirs.dtype
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(bits), theirs.contiguous().view(bits))


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (192, 64), (256, 128), (512, 256), (192, -1)])
def test_compressed_tensors_numbers(inputs: int, group: int, symmetric: bool, scale: torch.dtype) -> None:
    """Those of its own `decompress`, rounded once more to the dtype to run in."""
    pack_quantized = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, scales, zeros = drawn(inputs, ROW if group < 0 else group, scale)
    state = {
        "weight_packed": helpers.pack_to_int32((codes - 8).to(torch.int8), 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not symmetric:
        state["weight_zero_point"] = helpers.pack_to_int32((zeros - 8).to(torch.int8), 4, packed_dim=0)
    about = compressed(group, symmetric=symmetric)
    args = quantization.QuantizationArgs(**about["config_groups"]["group_0"]["weights"])
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    theirs = pack_quantized.PackedQuantizationCompressor.decompress(dict(state), scheme)["weight"]
    (format_,) = INT4.claim(about)
    stored = {"codes": state["weight_packed"], "scales": scales}
    if not symmetric:
        stored["zeros"] = state["weight_zero_point"]
    for run in RUNS:
        same(decoded(format_, inputs, run, stored), theirs.to(getattr(torch, run)))


def by_hand(layout: str, group: int, added: int, stored: dict[str, Tensor]) -> Tensor:
    """GPTQ or AWQ, element by element as their documents have it; arithmetic of numpy, in the scale's dtype."""
    words_, zeros_ = (stored[name].numpy().view(np.uint32) for name in ("codes", "zeros"))
    scales = stored["scales"].numpy()
    inputs = stored["codes"].shape[0] * (8 if layout == "gptq" else 1)
    n, k = np.indices((OUTPUTS, inputs))
    field = n % 8 if layout == "gptq" else np.array([0, 4, 1, 5, 2, 6, 3, 7])[n % 8]  # of output 8 w + i
    code = words_[k // 8, n] >> (4 * (k % 8)) if layout == "gptq" else words_[k, n // 8] >> (4 * field)
    zero = (zeros_[k // group, n // 8] >> (4 * field) & 15).astype(np.int64) + added
    with np.errstate(over="ignore"):
        return torch.from_numpy(((code & 15).astype(np.int64) - zero).astype(scales.dtype) * scales[k // group, n])


@pytest.mark.parametrize("scale", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
@pytest.mark.parametrize(("inputs", "group"), [(96, 32), (192, 128), (320, 256), (64, -1)])
def test_gptq_and_awq_numbers(inputs: int, group: int, layout: str, scale: torch.dtype) -> None:
    """Those of their documents; the last group may be short."""
    width = ROW if group < 0 else group
    codes, scales, zeros = drawn(inputs, width, scale)
    if layout == "awq":
        (format_,) = AWQ.claim(awq(group))
        stored = {"codes": words(codes.t(), 1, AWQ_FIELDS), "zeros": words(zeros.t(), 1, AWQ_FIELDS)}
    else:
        (format_,) = GPTQ.claim(gptq(group, sym=False, checkpoint_format=layout))
        zeros = zeros.clamp(0, 14) if layout == "gptq" else zeros
        stored = {"codes": words(codes.t(), 0), "zeros": words(zeros.t(), 1)}
    stored["scales"] = scales.t().contiguous()
    theirs = by_hand(layout.removesuffix("_v2"), width, layout == "gptq", stored)
    for run in RUNS:
        same(decoded(format_, inputs, run, stored), theirs.to(getattr(torch, run)))


LIBRARIES = ["gptq 32", "gptq 64", "gptq_v2 32", "gptq_v2 64", "awq 32", "awq 64", "modelopt-nvfp4"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_numbers_of_the_publishing_libraries(name: str) -> None:
    """What AutoGPTQ, GPTQModel, AutoAWQ and modelopt decoded of random words once: see `write_vectors.py`."""
    found = load_file(Path(__file__).parent / "data" / "decoded.safetensors")
    stored = {key.removeprefix(f"{name} "): one for key, one in found.items() if key.startswith(f"{name} ")}
    theirs = stored.pop("decoded")
    kind, _, group = name.partition(" ")
    claims: dict[str, Callable[[], tuple[Format, ...]]] = {
        "gptq": lambda: GPTQ.claim(gptq(int(group), sym=False)),
        "gptq_v2": lambda: GPTQ.claim(gptq(int(group), sym=False, checkpoint_format="gptq_v2")),
        "awq": lambda: AWQ.claim(awq(int(group))),
        "modelopt-nvfp4": lambda: (MODELOPT_NVFP4,),
    }
    (format_,) = claims[kind]()
    same(decode(format_, [stored], "bfloat16"), theirs.bfloat16())


@pytest.mark.parametrize(("inputs", "group"), [(192, 128), (320, 256), (192, 512), (24, 128), (320, -1), (160, 64)])
def test_short_groups_and_rows(inputs: int, group: int) -> None:
    """Of compressed-tensors, whose library does not take them; rows that are no whole words of a kernel's step, too."""
    width = ROW if group < 0 else group
    codes, scales, zeros = drawn(inputs, width, torch.bfloat16)
    (format_,) = INT4.claim(compressed(group, symmetric=False))
    stored = {"codes": words(codes, 1), "scales": scales, "zeros": words(zeros, 0)}
    same(decoded(format_, inputs, "bfloat16", stored), numbers(codes, zeros, scales, width))


def zeros_of(format_: Format, *values: int) -> Tensor:
    """The record's zeros of a weight of 8 outputs and 32 inputs that stores the given ones."""
    spec = TensorSpec(name="w", shape=(8, 32), dtype="float16", format=format_)
    return format_.repack(spec, "zeros", words(torch.tensor([values]), 1))


def test_zeros_of_gptq() -> None:
    """Symmetric: 8, stored all 7 or all 8. Else one less than they are; what does not fit, or is neither, is refused."""
    (symmetric,), (first,), (second,) = (
        GPTQ.claim(gptq(32, **about)) for about in ({}, {"sym": False}, {"sym": False, "checkpoint_format": "gptq_v2"})
    )
    for stored in (7, 8):
        assert zeros_of(symmetric, *[stored] * 8).numel() == 0
    for stored in ([6] * 8, [7] * 7 + [8]):
        with pytest.raises(ValueError, match="not all stored zeros are 7, or 8"):
            zeros_of(symmetric, *stored)
    assert zeros_of(first, *range(7, 15)).flatten().tolist() == [value for n in range(8, 16) for value in (n, 0, 0, 0)]
    assert zeros_of(second, *range(8, 16)).flatten().tolist() == [value for n in range(8, 16) for value in (n, 0, 0, 0)]
    with pytest.raises(ValueError, match="15"):
        zeros_of(first, *[15] * 8)


def test_order_of_activation_is_seen_in_the_groups() -> None:
    """Whatever the config says: groups of neighbours are decoded, others are refused."""
    (format_,) = GPTQ.claim(gptq(32, desc_act=True))
    spec = TensorSpec(name="w", shape=(8, 80), dtype="float16", format=format_)
    in_order = torch.tensor([0] * 32 + [1] * 32 + [2] * 16, dtype=torch.int32)
    assert format_.repack(spec, "g_idx", in_order).numel() == 0
    with pytest.raises(ValueError, match="act-order"):
        format_.repack(spec, "g_idx", in_order.flip(0))


def mixed(*changes: dict) -> dict:
    """A config of compressed-tensors with groups that differ."""
    groups = {f"group_{place}": {"format": "pack-quantized", "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}, **change}
              for place, change in enumerate(changes)}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}


@pytest.mark.parametrize(
    ("format_", "about", "cause"),
    [
        (GPTQ, gptq(128, bits=3), "gptq to 3 bits"),
        (GPTQ, gptq(128, bits=8), "gptq to 8 bits"),
        (GPTQ, gptq(16), "groups of 16"),
        (GPTQ, gptq(128, checkpoint_format="marlin"), "'marlin'"),
        (GPTQ, gptq(128, is_marlin_format=True), "'marlin'"),
        (GPTQ, gptq(128, dynamic={r"+:.*down.*": {"bits": 8}}), "another 'bits' for some weights"),
        (AWQ, {**awq(128), "version": "gemv"}, "version 'gemv'"),
        (AWQ, {**awq(128), "version": "marlin"}, "version 'marlin'"),
        (AWQ, {**awq(128), "bits": 8}, "awq to 8 bits"),
        (AWQ, {"quant_method": "awq"}, "awq to None bits"),
        (INT4, compressed(128, num_bits=8), "weights of 8 bits"),
        (INT4, compressed(128, type="float"), "of the type 'float'"),
        (INT4, compressed(128, strategy="tensor"), "quantised by 'tensor'"),
        (INT4, compressed(48), "groups of 48"),
        (INT4, compressed(128) | {"config_groups": {"W4A16": ["Linear"]}}, "name no weights"),
        (INT4, mixed({"weights": None}), "name no weights"),
        (INT4, compressed(128) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "also sparse"),
        (INT4, compressed(128) | {"transform_config": {"config_groups": {"u": {}}}}, "rotated"),
        (INT4, mixed({}, {"format": "float-quantized"}), "and as 'float-quantized'"),
        (INT4, mixed({}, {"weights": {"num_bits": 4, "group_size": 64}}), "2 ways"),
    ],
)  # fmt: skip
def test_what_is_not_decoded_is_refused_by_name(format_: Format, about: dict, cause: str) -> None:
    """Other bits, groups, arrangements and mixtures; the remedy says what to fetch."""
    with pytest.raises(UnsupportedModelError, match=cause) as caught:
        format_.claim(about)
    assert "4-bit weights" in caught.value.remedy


def test_what_a_format_claims() -> None:
    """Its own method, and of compressed-tensors its own format; old names of AWQ's settings, weights that are left plain."""
    assert INT4.claim(gptq(32)) == AWQ.claim(gptq(32)) == GPTQ.claim(awq(32)) == ()
    assert INT4.claim(mixed({"format": "nvfp4-pack-quantized"})) == ()
    assert INT4.claim(mixed({}, {"targets": ["re:.*experts.*"]})) == INT4.claim(compressed(32))
    assert AWQ.claim({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}) == AWQ.claim(awq(64))
    assert GPTQ.claim(gptq(64, dynamic={r"-:.*gate.*": {}})) == GPTQ.claim(gptq(64))


@pytest.mark.parametrize("format_", [INT4, GPTQ, AWQ])
def test_random_parts_have_the_spread_that_is_asked_for(format_: Format) -> None:
    """Stand-ins for real weights."""
    spec = TensorSpec(name="w", shape=(64, 256), dtype="float32", format=format_)
    parts = format_.draw(spec, torch.Generator().manual_seed(1), 0.02)
    weight = format_.decode(spec, parts)
    assert 0.018 < float(weight.std()) < 0.022
    assert abs(float(weight.mean())) < 0.003


def act_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "model.layers.1.mlp.experts.3.down_proj.g_idx"
    return {**state, key: state[key].flip(0)}


def without_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if "self_attn.q_proj.g_idx" not in key}


def other_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "model.layers.1.mlp.experts.3.up_proj.scales"
    return {**state, key: state[key].float()}


def with_zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    key = "model.layers.0.self_attn.o_proj.weight_zero_point"
    return {**state, key: torch.zeros(8, 1, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("name", "spoil", "error", "cause"),
    [
        ("gptq g128 asymmetric", act_order, CheckpointError, r"experts.3.down_proj.g_idx' cannot be decoded as gptq: .*act-order"),
        ("gptq g128 asymmetric", without_order, CheckpointError, r"self_attn.q_proj.weight' is stored as gptq and lacks its g_idx"),
        ("gptq g128 asymmetric", other_scales, CheckpointError, r"experts.3.up_proj.scales' is stored as F32, the format gptq has F16"),
        ("int4 g128 with attention", with_zeros, UnsupportedModelError, r"self_attn.o_proj.weight' has a part 'zeros'"),
    ],
)  # fmt: skip
def test_what_a_checkpoint_contradicts_is_named(
    name: str,
    spoil: Callable,
    error: type[ExpertFlowError],
    cause: str,
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    """Inputs in order of activation, no word of their order, scales of two types, zeros of symmetric weights."""
    layout = LAYOUTS[name]
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **layout.sizes), tmp_path, layout)
    save_file(spoil(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=cause):
        LLM(folder, device="cpu", slots=4, max_length=32).close()


def test_a_packed_checkpoint_states_its_format_in_its_text_part(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Scales decide the type in which numbers are rounded, whatever the format expects."""
    layout = LAYOUTS["int4 g64 asymmetric, float16 scales"]
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **layout.sizes), tmp_path, layout)
    plan = prepare(folder, EngineConfig(device="cpu", slots=4)).plan
    (first, second) = plan.shape.records.layers[0].specs
    assert {first.format.scale_dtype, second.format.scale_dtype} == {"float16"}
    assert (first.joined, second.joined) == (2, 1)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_stock_decodes_the_same_where_it_is_right(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Transformers on the packed folder: symmetric weights of compressed-tensors. Asymmetric experts and short groups raise there."""
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("accelerate")
    layout = replace(LAYOUTS["int4 g32"], plain_layers=(), dense=True)  # left plain: only what the config ignores
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **layout.sizes), tmp_path, layout)
    stock = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        quantization_config=CompressedTensorsConfig(dequantize=True),
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


@pytest.mark.parametrize(
    "name", ["int4 g64 asymmetric, float16 scales", "gptq g32 in float16", "awq g64 with attention"]
)
def test_a_stand_in_has_records_of_its_format(name: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Random weights for a packed checkpoint: records of its size, and answers."""
    layout = LAYOUTS[name]
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **layout.sizes), tmp_path, layout)
    real = prepare(folder, EngineConfig(device="cpu", slots=4)).plan
    with LLM(folder, device="cpu", slots=4, max_length=32, weights=RandomWeights()) as llm:
        assert llm.plan.record_bytes == real.record_bytes
        assert len(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_config_may_state_its_format_in_its_text_part(tmp_path: Path) -> None:
    """As Kimi's does, whose models of images and text have it there."""
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
            "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    AutoConfig.for_model("qwen3_5_moe", text_config=text).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["quantization_config"] = compressed(32)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build_skeleton(tmp_path, "bfloat16").packed == INT4.claim(compressed(32))
