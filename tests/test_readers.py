"""How the expert kernels read each format: the bits that they give for the decoded weights, whatever is resident and however it is packed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.records import RecordLayout
from expertflow.formats.table import FORMATS
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp, Workspace
from helpers import DEVICES

pytest.importorskip("triton", reason="kernels need triton")
from expertflow.kernels import experts
from expertflow.kernels.reading.readers import READERS, reads
from expertflow.kernels.tiling import Tiling

ON_GPU = DEVICES[-1] == "cuda"
SIZES = [(96, 160), (256, 192)] if not ON_GPU else [(64, 32), (96, 160), (256, 192), (2880, 384), (512, 1000)]
"""Hidden size and expert width: whole steps and short ones."""

PAIRS = [[0, 2], [1, -1]] if not ON_GPU else [[0, 2], [1, 0], [2, -1], [0, 1]]
"""Slots of each token: every record, and a pair that has none; where they share a product, also experts of several tokens."""


def compressed(**weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors."""
    about = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": about}},
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4"},
    "int4": compressed(),
    "int4-g32": compressed(group_size=32),
    "int4-zeros": compressed(symmetric=False),
    "int4-channel": compressed(strategy="channel", group_size=None),
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "nvfp4": compressed(type="float", strategy="tensor_group", group_size=16) | {"format": "nvfp4-pack-quantized"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "awq-g32": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
}  # fmt: skip
"""Formats, by what a checkpoint says of itself."""


def named(name: str) -> Format:
    """The format of a config."""
    return next(found[0] for one in FORMATS.values() if (found := one.claim(CONFIGS[name])))


def of_scales(name: str, dtype: str) -> Format:
    """The format of a config, with scales as its checkpoints have them: AWQ's are float16, others' bfloat16."""
    found = named(name)
    if name.startswith("int4"):
        return replace(found, scale_dtype="bfloat16" if dtype == "bfloat16" else dtype)  # type: ignore[call-arg]
    return found


def cases() -> list[Any]:
    """Every format, joined from gate and up, in the dtypes that models run in; mxfp4 stacked, too."""
    found: list[Any] = []
    for name in CONFIGS:
        small = ["bfloat16"] if name.startswith("int4-") else ["float32", "bfloat16"]
        dtypes = ["bfloat16", "float16"] if name == "awq" else ["float16"] if name == "awq-g32" else small
        kinds = ["joined", "stacked"] if name == "mxfp4" else ["joined"]
        found += [(name, dtype, kind) for dtype in dtypes for kind in kinds]
    return found


def filled(layout: RecordLayout, generator: torch.Generator) -> torch.Tensor:
    """Three records of random codes, with scales that differ."""
    records = torch.zeros(3, layout.record_bytes, dtype=torch.uint8)
    for record in records:
        for spec in layout.specs:
            drawn = spec.format.draw(spec, generator, 0.02)
            for name, part in drawn.items():
                target = layout.part(record, spec.name, name)
                target.copy_(part.view(target.shape))
                if name == "scales" and target.dtype.itemsize == 1:
                    target.view(torch.uint8).add_(
                        torch.randint(-4, 3, target.shape, generator=generator).to(torch.uint8)
                    )
                elif (name == "scales" and target.is_floating_point()) or name == "globals":
                    target.mul_(torch.rand(target.shape, generator=generator) + 0.5)
                elif name == "zeros":
                    target.random_(0, 16, generator=generator)
    return records


@pytest.mark.parametrize(("name", "dtype", "kind"), cases())
def test_kernels_give_the_bits_of_the_decoded_weights(name: str, dtype: str, kind: str) -> None:
    """Gate and up packed each by itself, or together, interleaved and with biases; all sizes."""
    format_, device, stacked = of_scales(name, dtype), torch.device(DEVICES[-1]), kind == "stacked"
    generator = torch.Generator().manual_seed(3)
    for hidden, width in SIZES:
        if any(size % 32 for size in (hidden, width)) or (
            format_.name == "awq" and hidden % getattr(format_, "group", 1)
        ):
            continue
        shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
        specs = [
            TensorSpec(
                name=one, shape=shape[::-1] if stacked else shape, dtype=dtype, format=format_, transposed=stacked,
                joined=1 if stacked or one == "down_proj" else 2,
            )
            for one, shape in shapes.items()
        ]  # fmt: skip
        biases = [plain(f"{one}_bias", shape[:1], dtype) for one, shape in shapes.items()]
        layouts = [
            RecordLayout.of([*these, *biases]) for these in (specs, [plain(n, s, dtype) for n, s in shapes.items()])
        ]
        packed = filled(layouts[0], generator)
        decoded = torch.zeros(3, layouts[1].record_bytes, dtype=torch.uint8)
        for ours, theirs in zip(packed, decoded, strict=True):
            for one, value in layouts[0].weights(ours).items():
                layouts[1].tensor(theirs, one).copy_(value.t() if stacked and value.dim() == 2 else value)
        slots = torch.tensor(PAIRS, dtype=torch.int32, device=device)
        hidden_states = torch.randn(len(slots), hidden, generator=generator).to(getattr(torch, dtype)).to(device)
        parts = []
        for layout, pool, transposed in zip(layouts, (packed, decoded), (stacked, False), strict=True):
            activation = CLAMPED_SWIGLU if stacked else "silu"
            mlp = ExpertMlp.of(layout, activation, transposed=transposed, interleaved=stacked)
            work = Workspace.allocate(mlp, *slots.shape, device)
            work.parts.zero_()
            if ON_GPU:
                experts.expert_pairs(mlp, hidden_states, slots, pool.to(device), work)
            else:  # the interpreter's sums go by the size of a step
                experts.launch_up(mlp, hidden_states, slots, pool, work, Tiling(64, 64))
                experts.launch_down(mlp, slots, pool, work, Tiling(64, 64))
            parts.append(work.parts)
        assert parts[0].abs().sum() > 0
        assert torch.equal(*parts), f"{hidden} x {width}"


def test_every_format_of_the_table_is_read() -> None:
    """By an entry; none has a loader of its own."""
    for name in CONFIGS:
        assert reads(named(name))
        assert (named(name).tiles or named(name).name) in READERS
