"""The shortest way to decode packed weights gives the numbers of the format, wherever a record says that it may be taken."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expertflow import LLM
from expertflow.execution.captured.capturable import stored_mlps
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.pairs import MISSING, OCTAVES, find_pairs
from expertflow.formats.plain import plain
from expertflow.formats.published.fp8 import FP8, FloatQuantized, Fp8, IntQuantized, e4m3_numbers
from expertflow.formats.published.int4 import INT4, PackedInt4
from expertflow.formats.published.mxfp4 import MXFP4, power_of_two
from expertflow.formats.published.nvfp4 import MODELOPT_NVFP4, NVFP4
from expertflow.formats.records import RecordLayout
from expertflow.formats.words import E2M1, pack_words
from expertflow.kernels.mlp import ExpertMlp, Workspace
from helpers import DEVICES, MakeCheckpoint
from layout import write_twins
from layouts import LAYOUTS
from ptx import halves, run

pytest.importorskip("triton", reason="the programs are constants of Triton")
from expertflow.kernels.reading import assembly

CODES = torch.arange(16, dtype=torch.uint8)
ROWS = torch.stack([CODES.repeat(2).roll(turn) for turn in range(16)])
"""`[16, 32]`: every code at each place of a word."""
OF_WORD = [[2 * q + 8 * pair + n for pair in range(4) for n in range(2)] for q in range(4)]
"""The inputs whose codes a word has, by thread."""
EVERY_SCALE = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
"""The E4M3 codes that are numbers."""


SPEC = TensorSpec(name="w", shape=(2, 96), dtype="bfloat16", format=MODELOPT_NVFP4)


def words(code_map: str) -> np.ndarray:
    """Words of `ROWS`, `[16, 4]`."""
    return pack_words(ROWS[:, ::2] | ROWS[:, 1::2] << 4, code_map).numpy()


def unpacked(results: list[np.ndarray]) -> Tensor:
    """Four pairs of numbers of words `[..., 16, 4]` as `[..., 16, 4, 8]`."""
    pairs = [half for one in results for half in halves(one)]
    return torch.from_numpy(np.stack(pairs, -1)).to(torch.bfloat16)


def of_words(numbers: Tensor) -> Tensor:
    """Numbers of `ROWS` `[..., 16, 32]` in the order of `unpacked`."""
    return torch.stack([numbers[..., inputs] for inputs in OF_WORD], -2)


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether bits are equal, the sign of zero excepted: nothing that is added to a sum of 0 has one."""
    return torch.equal(found, wanted.to(torch.bfloat16))


def test_mxfp4_with_every_scale_in_range() -> None:
    """Codes lack 2 ** 126, which the scale has; subnormal numbers are kept."""
    scales = torch.arange(129, dtype=torch.uint8)
    numbers = of_words(torch.tensor(E2M1)[ROWS.int()] * power_of_two(scales)[:, None, None])
    for place in range(4):
        around = scales.numpy().astype(np.int64)[:, None, None] << 8 * place | 0xABCDEF89 & ~(0xFF << 8 * place)
        found = unpacked(run(assembly.E2M1_ONCE.value, 4, words("e2m1"), around, place * 0x0101 + 0x4040))
        assert same(found, numbers)
    assert not MXFP4.in_range(SPEC, {"scales": torch.tensor([1, 129], dtype=torch.uint8)})
    assert MXFP4.in_range(SPEC, {"scales": scales})


def test_int4_with_scales_in_range() -> None:
    """Codes are subnormal numbers, and eight scales are taken off in the same instruction that rounds."""
    bits = torch.arange(0, 0x3F00, 5, dtype=torch.int32)
    scales = bits.to(torch.int16).view(torch.bfloat16)
    scales = torch.cat([scales, -scales])
    twice = scales.view(torch.int16).numpy().astype(np.int64)[:, None, None] & 0xFFFF
    factor, less = run(assembly.INT4_FACTORS.value, 2, twice | twice << 16)
    found = unpacked(run(assembly.INT4_ONCE.value, 4, words("int4"), factor, less))
    numbers = (ROWS.to(torch.bfloat16) - 8) * scales[:, None, None]
    assert same(found, of_words(numbers))
    assert INT4.in_range(SPEC, {"scales": scales})
    assert not INT4.in_range(SPEC, {"scales": torch.tensor([0.1, -0.5], dtype=torch.bfloat16)})
    assert not replace(INT4, scale_dtype="float16").in_range(SPEC, {"scales": scales.half()})
    assert not PackedInt4(zeros=True).in_range(SPEC, {"scales": scales})


@pytest.mark.parametrize("format_", [NVFP4, MODELOPT_NVFP4], ids=lambda one: one.name)
def test_nvfp4_with_every_scale(format_: Format) -> None:
    """Every code with every normal E4M3 scale, and factors, of which one is 0; other scales are out of range."""
    factors = torch.tensor([3.1e-4, 1.4142e-5, 0.99, 6.0e-20])
    factors = torch.cat([factors, torch.rand(60, generator=torch.Generator().manual_seed(3)) * 1e-3 + 1e-5])
    factors = factors.reciprocal() if format_ is NVFP4 else torch.cat([factors, torch.zeros(1), -factors])
    pairs = format_.repack(None, "pairs", factors)  # type: ignore[arg-type]
    assert not bool((pairs == MISSING).any())
    normal = torch.arange(8, 0x7F, dtype=torch.uint8)
    scales = e4m3_numbers(normal.clone())
    whole = scales[:, None] / factors if format_ is NVFP4 else scales[:, None] * factors
    high, low = (pairs.numpy().astype(np.int64) >> shift & 0xFFFF for shift in (16, 0))
    for place, turn in product(range(4), (0, 1)):
        # of four scales, one is chosen for the first half of a word, and its neighbour for the second
        chosen = place // 2 * 2
        around = (normal.numpy().astype(np.int64) << 8 * place)[:, None, None, None]
        mine = unpacked(
            run(
                assembly.E2M1_BY_PAIR.value, 4, words("e2m1")[turn * 7 : turn * 7 + 2], around, chosen * 0x0101 + 0x4040,
                (high << 16 | high)[:, None, None], (low << 16 | low)[:, None, None],
            )
        )  # fmt: skip
        numbers = of_words(torch.tensor(E2M1)[ROWS[turn * 7 : turn * 7 + 2].int()] * whole[:, :, None, None])
        half = slice(0, 4) if place % 2 == 0 else slice(4, 8)
        assert same(mine[..., half], numbers[..., half])
    pair, scale = torch.zeros(1, dtype=torch.int32), torch.full((1, 2, 8), 0x38, dtype=torch.uint8)
    for code, place, fits in (
        (8, 0, True),
        (0x7E, 5, True),
        (7, 5, False),
        (0, 0, False),
        (0xB8, 1, False),
        (0, 6, True),
    ):
        scale[0, 1] = 0x38
        scale[0, 1, place] = code
        parts = {"pairs": pair, "scales": scale.view(torch.float8_e4m3fn)}
        assert format_.in_range(SPEC, parts) == fits  # of 96 inputs, groups 6 and 7 of the step are none


def test_fp8_codes_with_scales() -> None:
    """Every code with scales of many sizes, and with 0; a pair holds for all codes."""
    scales = torch.cat([torch.logspace(-27, 2, 400), torch.rand(400) * 1e-2, torch.zeros(1), torch.tensor([1.0, -0.3])])
    pairs = FP8.pairs_of(scales)
    assert not bool((pairs == MISSING).any())
    high, low = (pairs.numpy().astype(np.int64)[:, None] >> shift & 0xFFFF for shift in (16, 0))
    codes = torch.cat([EVERY_SCALE, EVERY_SCALE[:2]])
    program = assembly.E4M3_BY_PAIR.value.replace("$7", "$4")  # in the kernel each operand comes four times
    found = run(program, 2, codes.view(torch.int32).numpy(), high << 16 | high, low << 16 | low)
    numbers = torch.from_numpy(np.stack([half for one in found for half in halves(one)], -1)).flatten(1)
    assert same(numbers.to(torch.bfloat16), e4m3_numbers(codes.clone()) * scales[:, None])


def test_every_mantissa_has_a_pair_for_fp8() -> None:
    """Every 37th of 2 ** 23; all of them were tried once, in 20 seconds."""
    factors = torch.arange(0, 1 << 23, 37, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    assert not bool((FP8.pairs_of(factors) == MISSING).any())


def test_a_factor_without_a_pair_is_marked() -> None:
    """The first that is known, and sizes at which other codes would be rounded otherwise; its format is out of range then."""
    factor = torch.tensor([(203889 + (127 << 23))], dtype=torch.int32).view(torch.float32)
    assert MODELOPT_NVFP4.repack(None, "pairs", factor).tolist() == [MISSING]  # type: ignore[arg-type]
    assert set(FP8.pairs_of(torch.tensor([1e-30, -200.0, 2.0**-149, 3.0e38])).tolist()) == {MISSING}
    for format_ in (FP8, MODELOPT_NVFP4):
        assert not format_.in_range(SPEC, {"pairs": torch.tensor([5, MISSING], dtype=torch.int32)})
    assert FP8.in_range(SPEC, {"pairs": torch.tensor([5, 7], dtype=torch.int32)})
    half = torch.ones(2, dtype=torch.float16)
    assert set(FloatQuantized(scale_dtype="float16").pairs_of(half).tolist()) == {MISSING}
    assert set(IntQuantized().pairs_of(torch.ones(2)).tolist()) == {MISSING}
    wrong = torch.ones(8, 1, dtype=torch.bfloat16)  # no number times these
    assert find_pairs(np.array([1.5]), list(OCTAVES), wrong).tolist() == [MISSING]


FORMATS: dict[str, Format] = {
    "mxfp4": MXFP4, "int4": INT4, "nvfp4": NVFP4, "modelopt": MODELOPT_NVFP4, "fp8": FP8, "fp8 a tensor": Fp8(block=(0, 0)),
    "fp8 an output": FloatQuantized(block=(1, 0)),
}  # fmt: skip


ON_GPU = DEVICES[-1] == "cuda"


@pytest.mark.parametrize("tokens", [1, 4, 40] if ON_GPU else [2])
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_give_the_bits_of_decoded_weights(name: str, tokens: int) -> None:
    """Random codes and scales of all sizes that occur; the same projections decoded by the other way, and in plain numbers."""
    from expertflow.kernels import experts  # noqa: PLC0415

    device, format_ = torch.device(DEVICES[-1]), FORMATS[name]
    hidden, width = (640, 288) if ON_GPU else (160, 96)  # the interpreter is slow, and has one way
    generator = torch.Generator().manual_seed(4)
    shapes = {"gate_up_proj": ((2 * width, hidden), 2), "down_proj": ((hidden, width), 1)}
    packed = [TensorSpec(name=n, shape=s, dtype="bfloat16", format=format_, joined=j) for n, (s, j) in shapes.items()]
    layouts = [RecordLayout.of(packed), RecordLayout.of([plain(one.name, one.shape, "bfloat16") for one in packed])]
    records = [torch.zeros(2, layout.record_bytes, dtype=torch.uint8) for layout in layouts]
    for ours, theirs in zip(*records, strict=True):
        for spec in packed:
            for part, value in drawn(spec, generator).items():
                layouts[0].part(ours, spec.name, part).copy_(value)
        for tensor, value in layouts[0].weights(ours).items():
            layouts[1].tensor(theirs, tensor).copy_(value)
    plainly = ExpertMlp.of(layouts[0], "relu")
    quick = plainly.for_records(records[0])
    assert quick.up.spec.format.quick
    assert quick.down.spec.format.quick
    x = torch.randn(tokens, hidden, generator=generator).to(device, torch.bfloat16)
    slots = torch.randint(0, 2, (tokens, 2), generator=generator, dtype=torch.int32)
    slots = torch.stack([slots[:, 0], 1 - slots[:, 0]], 1).contiguous().to(device)
    found = []
    for mlp, pool in ((quick, records[0]), (plainly, records[0]), (ExpertMlp.of(layouts[1], "relu"), records[1])):
        work = Workspace.allocate(mlp, tokens, 2, device)
        experts.expert_pairs(mlp, x, slots, pool.to(device), work)
        found.append(work.parts)
    assert found[0].isfinite().all()
    assert found[0].abs().sum() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def drawn(spec: TensorSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random parts whose scales differ; subnormal E4M3 scales and codes, and zeros, are among them."""
    parts = spec.format.draw(spec, generator, 0.1)
    scales = parts["scales"]
    if spec.format is MXFP4:
        parts["scales"] = torch.randint(118, 129, scales.shape, generator=generator, dtype=torch.uint8)
    elif spec.format in {NVFP4, MODELOPT_NVFP4}:
        parts["scales"] = torch.randint(8, 0x7E, scales.shape, generator=generator, dtype=torch.uint8)
        parts["scales"] = parts["scales"].view(torch.float8_e4m3fn)
    else:
        sizes = torch.rand(scales.shape, generator=generator) * 0.02
        parts["scales"] = torch.where(sizes < 0.001, 0, sizes).to(scales.dtype)
    if "pairs" in parts and spec.format not in {NVFP4, MODELOPT_NVFP4}:
        parts["pairs"] = spec.format.repack(spec, "pairs", parts["scales"])
    return parts


def test_one_scale_out_of_range_sends_its_layer_the_other_way(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The records that were filled decide, layer by layer; layers that are read alike share what the kernels are told."""
    layout = replace(LAYOUTS["mxfp4"], plain_layers=())
    folder, _ = write_twins(make_checkpoint(layout.family, layout.dtype, spread=0.3, **layout.sizes), tmp_path, layout)
    with LLM(folder, device="cpu", slots="50%", execution="graph") as llm:
        skeleton, store = llm._offloaded.skeleton, llm._offloaded.store
        first, *others = stored_mlps(skeleton, store)
        assert others
        assert all(one is first for one in others)
        assert first.up.spec.format == first.down.spec.format == replace(MXFP4, quick=True)
        record = store.record(skeleton.experts + 2)
        store.layout.layers[1].part(record, "down_proj", "scales").view(-1)[-1] = 129
        found = stored_mlps(skeleton, store)
        assert all(one.up.spec.format.quick for one in found)
        assert [one.down.spec.format.quick for one in found] == [layer != 1 for layer in range(len(found))]
