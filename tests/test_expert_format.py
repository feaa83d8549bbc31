"""Experts that are quantised on loading: the nearest numbers, the bits of a checkpoint written in that format, and said."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.config import EXPERT_FORMATS, EngineConfig
from expertflow.engine.llm import shipped_model
from expertflow.engine.prepare import prepare
from expertflow.errors import CheckpointError, ConfigError, QuantisedWarning
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.formats.format import TensorSpec
from expertflow.formats.table import FORMATS
from expertflow.models.weights.sources import RandomWeights
from helpers import MakeCheckpoint, run
from layout import Layout, write_twins
from layouts_fp8 import fp8
from layouts_int4 import compressed, words

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
PARAMS = SamplingParams(max_tokens=3, temperature=0.8, seed=5, ignore_eos=True)
OPTIONS = {"device": "cpu", "max_length": 32, "max_batch": 3, "slots": 5}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.tensor(
    [(m / 8 if e == 0 else (1 + m / 8) * 2 ** (e - 1)) * 2**-6 for e in range(16) for m in range(8)][:127],
    dtype=torch.float64,
)
"""Numbers of codes without a sign, by code."""


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry; of two, the even one."""
    even_first = torch.cat([torch.arange(0, len(table), 2), torch.arange(1, len(table), 2)])
    return even_first[(values.double()[..., None] - table[even_first]).abs().argmin(-1)]


def signed(values: Tensor, table: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Codes of the nearest numbers, whose sign bit is given, and these numbers."""
    codes = nearest(values.abs(), table)
    return codes + sign * torch.signbit(values), torch.copysign(table[codes].float(), values)


def each_block(numbers: Tensor, rows: int, cols: int, work: Callable[[float], float]) -> tuple[Tensor, Tensor]:
    """What `work` makes of the largest magnitude of each block, float32: a grid, and it for every number."""
    grid = [[work(float(block.abs().max())) for block in strip.split(cols, 1)] for strip in numbers.float().split(rows)]
    scales = torch.tensor(grid, dtype=torch.float64).float()
    outputs, inputs = numbers.shape
    return scales, scales[torch.arange(outputs)[:, None] // rows, torch.arange(inputs)[None] // cols]


def fp8_reference(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the numbers they stand for, float32, in blocks of 128 by 128."""
    scales, each = each_block(numbers, 128, 128, lambda largest: float(torch.tensor(largest) / 448))
    codes, values = signed(numbers.float() / torch.where(each == 0, 1, each), E4M3, 128)
    return codes, scales, values * each


def int4_reference(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In groups of 128 inputs, around 8, with scales in bfloat16; the numbers are rounded to it."""
    scales, each = each_block(numbers, 1, 128, lambda largest: float((torch.tensor(largest) / 7.5).bfloat16()))
    table = torch.arange(-8, 8, dtype=torch.float64)
    codes = nearest(numbers.float() / torch.where(each == 0, 1, each), table)
    return codes, scales.bfloat16(), (table[codes].float() * each).bfloat16().float()


def mxfp4_reference(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In groups of 32 inputs; scales are exponents, floor(log2(largest)) - 2."""

    def exponent(largest: float) -> float:
        mantissa, above = torch.frexp(torch.tensor(largest, dtype=torch.float64))
        return max(-127, int(above) - 1 - 2) if mantissa else -127

    scales, each = each_block(numbers, 1, 32, exponent)
    power = torch.exp2(each.double())
    codes, values = signed((numbers.double() / power).float(), E2M1, 8)
    return codes, scales + 127, (values.double() * power).float()


REFERENCES = {"fp8": fp8_reference, "int4": int4_reference, "mxfp4": mxfp4_reference}
ERRORS = {"fp8": 16.1 / 448, "int4": 0.54 / 7.5, "mxfp4": 0.25}
"""Of a block's largest number, what rounding costs at most; a number of 7.99 becomes 6 in mxfp4."""


def hard_numbers(dtype: torch.dtype, outputs: int, inputs: int) -> Tensor:
    """Normal, tiny and huge numbers, zeros of both signs, and numbers that lie between two codes."""
    torch.manual_seed(outputs)
    numbers = torch.randn(outputs, inputs) * 0.02
    far = [1e-44, 1e-39, 1e-30, 1e30, 5e37] if dtype != torch.float16 else [1e-7, 3e-6, 1e3]
    for row, size in enumerate(far[: outputs - 2]):
        numbers[row] = torch.randn(inputs) * size
    numbers[-1], numbers[-2, ::2] = 0, -0.0
    numbers[-2, 1::2] = (torch.arange(inputs // 2) % 29) / 4 - 3.5
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(130, 192), (9, 128), (7, 33)], ids=str)
@pytest.mark.parametrize("name", EXPERT_FORMATS)
def test_codes_are_the_nearest(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes, scales and decoded numbers are those of a search over all codes; the last group or block may be short."""
    numbers, format_ = hard_numbers(dtype, *shape), FORMATS[name]
    spec = TensorSpec(name="w", shape=shape, dtype="float32", format=format_)
    parts = format_.encode(spec, numbers)
    codes, scales, values = REFERENCES[name](numbers)
    wanted = {part.name: part for part in spec.parts if part.nbytes}
    assert {key: (part.shape, str(part.dtype)) for key, part in parts.items()} == {
        key: (part.shape, f"torch.{part.dtype}") for key, part in wanted.items()
    }
    if name == "fp8":
        assert torch.equal(parts["scales"], scales)  # codes are in a record's order: the decoded numbers tell
    else:
        found = format_.by_input(spec, parts["scales"])
        assert torch.equal(format_.codes_of(spec, parts).long(), codes)
        assert torch.equal(found.double(), scales.double().repeat_interleave(format_.group, 1)[:, : shape[1]])
    decoded = format_.decode(spec, parts)
    assert torch.equal(decoded, values)
    assert bool(decoded.isfinite().all())
    blocks = (128, 128) if name == "fp8" else (1, format_.group)
    _, largest = each_block(numbers, *blocks, lambda largest: largest)
    normal = largest > 1e-30  # below, scales themselves are subnormal
    assert bool(((decoded - numbers.float()).abs() <= largest * ERRORS[name])[normal].all())


@pytest.mark.parametrize("name", EXPERT_FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_quantised(name: str, bad: float) -> None:
    """Encoding it raises; nothing is made up."""
    numbers = torch.ones(4, 160)
    numbers[2, 150] = bad
    with pytest.raises(ValueError, match="not finite"):
        FORMATS[name].encode(TensorSpec(name="w", shape=(4, 160), dtype="float32", format=FORMATS[name]), numbers)


def pack_fp8(key: str, weight: Tensor, _: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    codes, scales, values = fp8_reference(weight)
    packed = {key: codes.to(torch.uint8).view(torch.float8_e4m3fn), f"{key}_scale_inv": scales}
    return packed, values.to(weight.dtype)


def pack_int4(key: str, weight: Tensor, _: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """One tensor, or those of all experts one after another."""
    whole = weight.flatten(0, -2)
    codes, scales, values = (part.view(*weight.shape[:-1], -1) for part in int4_reference(whole))
    packed = {"packed": words(codes, -1), "scale": scales}
    return {f"{key}_{name}": tensor for name, tensor in packed.items()}, values.to(weight.dtype)


def pack_mxfp4(key: str, weight: Tensor, _: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Stacked, adjacent codes in a byte."""
    whole = weight.flatten(0, -2)
    codes, scales, values = (part.view(*weight.shape[:-1], -1) for part in mxfp4_reference(whole))
    pairs = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(-1, (-1, 16))
    return {f"{key}_blocks": pairs, f"{key}_scales": scales.to(torch.uint8)}, values.to(weight.dtype)


WIDE = {"moe_intermediate_size": 192, "hidden_size": 160}
CASES = {
    "fp8": Layout(family="qwen3_moe", quantization=fp8([128, 128]), pack=pack_fp8, sizes=WIDE),
    "int4": Layout(family="qwen3_moe", quantization=compressed(128), pack=pack_int4, sizes=WIDE),
    "int4, stacked": Layout(
        family="granitemoe", quantization=compressed(128), pack=pack_int4, sizes={"intermediate_size": 192}
    ),
    "mxfp4": Layout(
        family="gpt_oss", quantization={"quant_method": "mxfp4"}, pack=pack_mxfp4, sizes={"intermediate_size": 192}
    ),
    "mxfp4 in float32": Layout(
        family="gpt_oss", quantization={"quant_method": "mxfp4"}, pack=pack_mxfp4, dtype="float32"
    ),
}  # fmt: skip
Made = Callable[[str], tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def made(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes a plain checkpoint, the same one packed by the functions above, and that one decoded; once a case."""

    @cache
    def make(name: str) -> tuple[Path, Path, Path]:
        layout = CASES[name]
        source = make_checkpoint(layout.family, layout.dtype, spread=0.3, **{"num_hidden_layers": 2, **layout.sizes})
        return (source, *write_twins(source, tmp_path_factory.mktemp("twins"), layout))

    return make


def format_of(case: str) -> str:
    """The first word of a case."""
    return case.partition(" ")[0].strip(",")


@contextmanager
def loaded(folder: Path, expert_format: str | None, **options: object) -> Iterator[LLM]:
    """An LLM; if it quantises, it has to warn."""
    given = {**OPTIONS, **options}
    if expert_format is None:
        llm = LLM(folder, **given)
    else:
        with pytest.warns(QuantisedWarning, match=f"quantised to {expert_format} .*answers change"):
            llm = LLM(folder, expert_format=expert_format, **given)
    with llm:
        yield llm


def answers(llm: LLM) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Logits of prompts and of a token behind each, and sampled tokens."""
    executor = llm.engine._executor
    logits = [executor.prefill([PromptChunk(n, prompt, n, 0) for n, prompt in enumerate(PROMPTS)]).clone()]
    fed = [DecodeInput(n, 20 + n, n, len(prompt)) for n, prompt in enumerate(PROMPTS)]
    logits.append(executor.decode(fed).clone())
    return logits, [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_checkpoint_written_in_that_format(name: str, made: Made) -> None:
    """Bits of the packed folder, and of the folder of its numbers; the plain checkpoint's are others."""
    source, packed, decoded = made(name)
    found = []
    for folder, expert_format in ((source, format_of(name)), (packed, None), (decoded, None), (source, None)):
        with loaded(folder, expert_format, execution="host") as llm:
            found.append((*answers(llm), llm.plan.record_bytes))
    ours, theirs, plain, other = found
    for others in (theirs, plain):
        assert all(torch.equal(mine, its) for mine, its in zip(ours[0], others[0], strict=True))
        assert ours[1] == others[1]
    assert ours[2] == theirs[2] < other[2]
    assert not torch.equal(ours[0][0], other[0][0])


@pytest.mark.parametrize("name", ["fp8", "int4", "int4, stacked", "mxfp4"])
def test_captured_steps_read_it_as_the_checkpoint_in_that_format(name: str, made: Made) -> None:
    """Kernels give the bits that they give on the packed folder."""
    source, packed, _ = made(name)
    found = []
    for folder, expert_format in ((source, format_of(name)), (packed, None)):
        with loaded(folder, expert_format, execution="graph") as llm:
            found.append(answers(llm))
    assert all(torch.equal(mine, its) for mine, its in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


def test_plain_transformers_models_take_it(made: Made) -> None:
    """`from_pretrained(expert_format=)` gives the logits of `from_pretrained` on the packed folder."""
    source, packed, _ = made("int4")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with pytest.warns(QuantisedWarning):
        ours = from_pretrained(source, device="cpu", slots=3, expert_format="int4")
    theirs = from_pretrained(packed, device="cpu", slots=3)
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    ours.expertflow.close()
    theirs.expertflow.close()


@pytest.mark.parametrize("name", ["fp8", "int4", "mxfp4"])
def test_packed_experts_are_not_quantised_again(name: str, made: Made) -> None:
    """Whatever the format, and also where no file is read."""
    _, packed, _ = made(name)
    for weights in (None, RandomWeights()):
        with pytest.raises(ConfigError, match=rf"expert_format='int4' .*stored as {name}. Leave expert_format out"):
            prepare(packed, EngineConfig(device="cpu", expert_format="int4"), weights=weights)


def test_an_unknown_format_is_refused() -> None:
    """It names the nearest one."""
    with pytest.raises(ConfigError, match=r"expert_format='mxfp8' is unknown. Did you mean 'mxfp4'"):
        EngineConfig(expert_format="mxfp8")


def test_a_damaged_weight_is_named(made: Made, tmp_path: Path) -> None:
    """The error names the checkpoint's tensor."""
    source, *_ = made("int4")
    state = load_file(source / "model.safetensors")
    key = [key for key in state if ".experts." in key][-1]
    state[key][3, 7] = float("nan")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = rf"'{key}' cannot be quantised to fp8: a number is not finite"
    with pytest.warns(QuantisedWarning), pytest.raises(CheckpointError, match=message):
        LLM(tmp_path, expert_format="fp8", **OPTIONS)


@pytest.mark.filterwarnings("ignore::expertflow.errors.QuantisedWarning")
def test_it_is_another_model(made: Made) -> None:
    """Its identity differs, so that results are not continued and experts not shared; its fingerprint is the checkpoint's."""
    source, *_ = made("int4")
    identities, fingerprints = set(), set()
    for expert_format, other in ((None, "int4"), ("int4", "mxfp4")):
        with LLM(source, expert_format=expert_format, **OPTIONS) as llm:
            with pytest.raises(ConfigError, match="format of experts"):
                LLM(source, beside=llm, expert_format=other, **OPTIONS)
            with LLM(source, beside=llm, expert_format=expert_format, **OPTIONS) as second:
                assert second.identity == llm.identity
            changed = prepare(source, EngineConfig(device="cpu", expert_format=other))
            identities |= {llm.identity, changed.weights.identity(changed.located)}
            fingerprints |= {llm.fingerprint, changed.fingerprint}
    assert len(identities) == 3
    assert len(fingerprints) == 1


def test_the_plan_says_it() -> None:
    """Format, note and size of records, as a table and as JSON; the shipped model's predictor is used all the same."""
    plain, packed = (
        json.loads(run("plan", "--slots", 9, "--json", "--device", "cpu", *more).stdout)
        for more in ((), ("--expert-format", "int4"))
    )
    assert (plain["expert_format"], packed["expert_format"]) == (None, "int4")
    assert packed["row"] < 0.3 * plain["row"]
    assert packed["strategy"] == plain["strategy"] == "plec"
    text = run("plan", "--slots", 9, "--device", "cpu", "--expert-format", "int4").stdout
    assert "quantised to int4 on loading" in text
    assert "the model's answers change" in " ".join(text.split())


def test_random_weights_are_drawn_in_that_format(made: Made) -> None:
    """Their records are laid out as those of the quantised checkpoint."""
    source, *_ = made("int4")
    config = EngineConfig(device="cpu", expert_format="int4")
    drawn, read = (prepare(source, config, weights=weights) for weights in (RandomWeights(), None))
    assert drawn.plan.shape.records == read.plan.shape.records


def test_what_kernels_cannot_read_runs_on_the_host() -> None:
    """The shipped model's experts have 112 inputs: no whole words of four bits. Captured steps are refused with the reason."""
    with pytest.raises(ConfigError, match="execution='graph' cannot be had: experts have 112 inputs"):
        prepare(shipped_model(), EngineConfig(device="cpu", expert_format="mxfp4", execution="graph"))
