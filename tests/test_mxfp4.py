"""MXFP4: all codes with all scales, in the decoder and in the kernels' reader; what is no number is refused."""

import pytest
import torch
from torch import Tensor

from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.records import RecordLayout
from expertflow.kernels.mlp import ExpertMlp, Workspace
from helpers import DEVICE

INPUTS = 32
CODES = torch.arange(16, dtype=torch.uint8).repeat(2)
NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def record(scales: Tensor, dtype: str) -> tuple[RecordLayout, Tensor]:
    """An expert whose outputs have all codes, and a scale each; and a projection that nothing depends on."""
    up = TensorSpec(name="up_proj", shape=(len(scales), INPUTS), dtype=dtype, format=MXFP4)
    layout = RecordLayout.of([up, plain("down_proj", (INPUTS, len(scales)), dtype)])
    made = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    blocks = (CODES[::2] | CODES[1::2] << 4).expand(len(scales), 1, INPUTS // 2)
    for part, stored in (("codes", blocks), ("scales", scales[:, None])):
        target = layout.part(made[0], "up_proj", part)
        target.copy_(MXFP4.repack(up, part, stored).view(target.shape))
    return layout, made


def expected(scales: Tensor) -> Tensor:
    """As the OCP standard defines them, `[N, K]` in float64."""
    powers = torch.tensor([2.0 ** (scale - 127) for scale in scales.tolist()], dtype=torch.float64)
    return NUMBERS[CODES.int()] * powers[:, None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_code_with_every_scale(dtype: str) -> None:
    """Subnormal numbers are kept, and what is too large for the type is infinite."""
    scales = torch.arange(255, dtype=torch.uint8)
    layout, made = record(scales, dtype)
    found = layout.tensor(made[0], "up_proj")
    assert torch.equal(found, expected(scales).to(getattr(torch, dtype)))
    assert torch.equal(torch.signbit(found[:, 8]), torch.ones(255, dtype=torch.bool))
    assert 0 < found[0, 1] < torch.finfo(found.dtype).tiny


def test_kernels_read_every_code_with_every_scale() -> None:
    """Tokens with a single one, or minus one, pick out each input; scales with which a code gives infinity are left out."""
    pytest.importorskip("triton", reason="kernels need triton")
    from expertflow.kernels import experts  # noqa: PLC0415

    scales = torch.arange(253, dtype=torch.uint8)
    layout, made = record(scales, "float32")
    mlp = ExpertMlp.of(layout, "relu")
    tokens = torch.cat([torch.eye(INPUTS), -torch.eye(INPUTS)]).to(DEVICE)
    work = Workspace.allocate(mlp, len(tokens), 1, DEVICE)
    slots = torch.zeros(len(tokens), 1, dtype=torch.int32, device=DEVICE)
    experts.launch_up(mlp, tokens, slots, made.to(DEVICE), work, experts.tilings(mlp, len(tokens))[0])
    plus, minus = work.inner.cpu().view(2, INPUTS, len(scales)).double()
    assert torch.equal((plus - minus).t(), expected(scales))


def test_a_scale_that_is_no_number_is_refused() -> None:
    spec = TensorSpec(name="w", shape=(2, INPUTS), dtype="float32", format=MXFP4)
    with pytest.raises(ValueError, match="255"):
        MXFP4.repack(spec, "scales", torch.tensor([[3], [255]], dtype=torch.uint8))
