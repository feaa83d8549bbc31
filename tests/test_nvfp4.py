"""NVFP4: its numbers are the library's, gate and up keep factors of their own, and what cannot be decoded is refused."""

import importlib
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from expertflow.errors import UnsupportedModelError
from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.published.fp8 import ALL, FloatQuantized, Fp8
from expertflow.formats.published.nvfp4 import MODELOPT_NVFP4, NVFP4
from expertflow.formats.records import RecordLayout
from expertflow.formats.words import Words
from expertflow.kernels.mlp import ExpertMlp, Workspace
from helpers import DEVICES
from layouts_fp8 import compressed
from layouts_nvfp4 import GROUP, mixed
from test_fp8 import DTYPES, claimed, decode

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
SCALES = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)


def stored(outputs: int, inputs: int, factor: float, seed: int = 0) -> dict[str, Tensor]:
    """Random parts of a tensor, any scale but those that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, len(SCALES), (outputs, inputs // 16), generator=generator)
    return {
        "codes": torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8),
        "scales": SCALES[picked].view(torch.float8_e4m3fn),
        "globals": torch.tensor([factor]),
    }


def codes_of(one: dict[str, Tensor]) -> Tensor:
    """Adjacent codes in a byte, the earlier one in the lower half."""
    return torch.stack((one["codes"] & 15, one["codes"] >> 4), dim=2).flatten(1).int()


@pytest.mark.parametrize("factor", [37.3, 6.0e-20, 1.8e19])
def test_numbers_are_those_of_compressed_tensors(factor: float) -> None:
    """On random bytes with any scale: a true division, in float32; the library rounds to bfloat16."""
    library = pytest.importorskip("compressed_tensors.quantization", reason="needs compressed-tensors")
    compressors = importlib.import_module("compressed_tensors.compressors")
    scheme = library.QuantizationScheme(targets=["Linear"], weights=library.QuantizationArgs(**GROUP))
    one = stored(48, 320, factor)
    theirs = compressors.NVFP4PackedCompressor.decompress(
        {"weight_packed": one["codes"], "weight_scale": one["scales"], "weight_global_scale": one["globals"]}, scheme
    )["weight"]
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(decode(NVFP4, [one], "bfloat16"), theirs)
    assert torch.equal(decode(NVFP4, [one], "float32").bfloat16(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale(dtype: str) -> None:
    """All sixteen codes with all 254 scales, subnormal ones too; modelopt multiplies, and has no -0."""
    codes = torch.arange(16, dtype=torch.uint8).expand(254, 16)
    one = {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "scales": SCALES.view(torch.float8_e4m3fn)[:, None]}
    scales = one["scales"].float()
    for format_, factor, whole in (
        (NVFP4, torch.tensor([2688.3]), scales / 2688.3),
        (MODELOPT_NVFP4, torch.tensor(0.00037), scales * torch.tensor(0.00037)),
    ):
        found = decode(format_, [{**one, "globals": factor}], dtype)
        assert torch.equal(found, (E2M1 * whole).to(found.dtype))
        assert bool(torch.signbit(found[:127, 8]).any()) == (format_ is NVFP4)


@pytest.mark.parametrize("format_", [NVFP4, MODELOPT_NVFP4], ids=lambda one: one.name)
def test_gate_and_up_have_factors_of_their_own(format_: Words) -> None:
    """With 160 inputs, of which a step has 128."""
    both = [stored(24, 160, factor, seed=n) for n, factor in enumerate((11.0, 0.3))]
    found = decode(format_, both, "bfloat16")
    for place, one in enumerate(both):
        scales = one["scales"].float() / one["globals"] if format_ is NVFP4 else one["scales"].float() * one["globals"]
        expected = (E2M1[codes_of(one)] * scales.repeat_interleave(16, 1)).bfloat16()
        assert torch.equal(found.view(2, 24, 160)[place], expected)


def test_scales_and_factors_that_are_no_numbers_are_refused() -> None:
    spec = TensorSpec(name="w", shape=(24, 160), dtype="bfloat16", format=NVFP4)
    one = stored(24, 160, 1.0)
    for code in (0x7F, 0xFF):
        one["scales"].view(torch.uint8)[3, 4] = code
        with pytest.raises(ValueError, match="not a number"):
            NVFP4.repack(spec, "scales", one["scales"])
    for factor in (float("nan"), float("inf")):
        for format_ in (NVFP4, MODELOPT_NVFP4):
            with pytest.raises(ValueError, match="not finite"):
                format_.repack(spec, "globals", torch.tensor([factor]))
    with pytest.raises(ValueError, match="is 0"):
        NVFP4.repack(spec, "globals", torch.tensor([0.0]))
    for factor in (5.0e-20, -1.9e19):
        with pytest.raises(ValueError, match="divided by a number beyond"):
            NVFP4.repack(spec, "globals", torch.tensor([factor]))


def nearest(value: Fraction) -> Fraction:
    """The float32 number nearest to a positive or negative one, half to even; no subnormal ones."""
    if value == 0:
        return value
    exponent = math.frexp(float(abs(value)))[1] - 24
    exponent += abs(value) >= Fraction(2) ** (exponent + 24)
    return round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent


def test_a_quotient_by_the_reciprocal_is_mended_to_the_true_one() -> None:
    """What kernels do in place of a division, in exact arithmetic: for each mantissa of a code, divisors at both ends and drawn ones."""
    drawn = torch.randint(1 << 23, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    for bits in [*range(40), *range((1 << 23) - 40, 1 << 23), *drawn]:
        divisor = 1 + Fraction(bits, 1 << 23)
        inverse = nearest(1 / divisor)
        for eighths in range(8, 16):
            scale = Fraction(eighths, 8)
            first = nearest(scale * inverse)
            left = nearest(scale - first * divisor)
            assert nearest(first + left * inverse) == nearest(scale / divisor), (bits, eighths)


def test_what_configs_state() -> None:
    """The format of each group, the algorithm of each layer."""
    assert claimed(compressed("nvfp4-pack-quantized", "float", **GROUP)) == (NVFP4,)
    assert claimed(mixed()) == (NVFP4, FloatQuantized(block=(1, ALL)))
    layers = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}}
    about = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    assert claimed(about) == (MODELOPT_NVFP4, Fp8(block=(ALL, ALL)))
    assert claimed({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}) == (MODELOPT_NVFP4,)
    assert claimed({"quant_method": "modelopt"}) == ()


@pytest.mark.parametrize(
    ("quantization", "what"),
    [
        (compressed("nvfp4-pack-quantized", "float", **{**GROUP, "group_size": 32}), "group_size 32"),
        (compressed("nvfp4-pack-quantized", "float", **{**GROUP, "symmetric": False}), "symmetric False"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "'NVFP4_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A8_AWQ"}}}, "'W4A8_AWQ'"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION'"),
    ],
)  # fmt: skip
def test_variants_that_are_not_decoded_are_refused(quantization: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what):
        claimed(quantization)


@pytest.mark.parametrize("format_", [NVFP4, MODELOPT_NVFP4], ids=lambda one: one.name)
def test_drawn_numbers_have_the_deviation_asked_for(format_: Words) -> None:
    spec = TensorSpec(name="w", shape=(384, 320), dtype="bfloat16", format=format_, joined=2)
    drawn = format_.draw(spec, torch.Generator().manual_seed(0), 0.02)
    assert {name: tuple(part.shape) for name, part in drawn.items()} == {part.name: part.shape for part in spec.parts}
    assert float(format_.decode(spec, drawn).float().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("format_", "dtype"), [(NVFP4, "bfloat16"), (NVFP4, "float32"), (MODELOPT_NVFP4, "bfloat16")])
def test_the_tile_loader_of_words_reads_it(format_: Words, dtype: str) -> None:
    """The expert kernels give the same bits for packed records as for the same numbers in plain ones."""
    pytest.importorskip("triton", reason="kernels need triton")
    from expertflow.kernels import experts  # noqa: PLC0415

    device, hidden, width = torch.device(DEVICES[-1]), 96, 160
    shapes = {"gate_up_proj": ((2 * width, hidden), 2), "down_proj": ((hidden, width), 1)}
    packed = [TensorSpec(name=n, shape=s, dtype=dtype, format=format_, joined=j) for n, (s, j) in shapes.items()]
    layouts = [RecordLayout.of(packed), RecordLayout.of([plain(spec.name, spec.shape, dtype) for spec in packed])]
    records = [torch.zeros(1, layout.record_bytes, dtype=torch.uint8) for layout in layouts]
    for spec in packed:
        parts = spec.format.draw(spec, torch.Generator().manual_seed(1), 0.1)
        parts["scales"] = SCALES[torch.randint(0, len(SCALES), parts["scales"].shape)].view(torch.float8_e4m3fn)
        parts["globals"] = torch.tensor([0.0011, 0.00027][: spec.joined]).pow(-1 if format_ is NVFP4 else 1)
        for name, part in parts.items():
            layouts[0].part(records[0][0], spec.name, name).copy_(part)
    for name, value in layouts[0].weights(records[0][0]).items():
        layouts[1].tensor(records[1][0], name).copy_(value)
    x = torch.randn(2, hidden, generator=torch.Generator().manual_seed(2)).to(device, getattr(torch, dtype))
    slots = torch.zeros(2, 1, dtype=torch.int32, device=device)
    found = []
    for layout, pool in zip(layouts, records, strict=True):
        mlp = ExpertMlp.of(layout, "silu")
        work = Workspace.allocate(mlp, 2, 1, device)
        experts.expert_pairs(mlp, x, slots, pool.to(device), work)
        found.append(work.parts)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)
