"""GGUF files: numbers as the package `gguf` decodes them, bits as of the decoded checkpoint, and clear refusals."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.errors import CheckpointError, ConfigError, PromptError, UnsupportedModelError
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.published.gguf import GGUF
from expertflow.formats.records import RecordLayout
from expertflow.kernels import reference
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.models.gguf.header import TYPES, read_header
from expertflow.models.skeleton import build_skeleton
from helpers import DEVICES, MakeCheckpoint, load_resident, run

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Type  # noqa: E402 - needs the package

import gguf_files  # noqa: E402 - likewise

ROWS, COLUMNS = 24, 512
"""Of a weight of random blocks."""
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
WIDE = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 256}
FEW = {"num_hidden_layers": 2}


def k_types(name: str) -> str:
    """As in Q4_K_M: some tensors are wider."""
    return "Q6_K" if "down_exps" in name or name == "output.weight" else "Q5_K" if "attn" in name else "Q4_K"


def mx_types(name: str) -> str:
    """As gpt-oss is published."""
    return "MXFP4" if "exps" in name else "Q8_0" if "attn" in name else "BF16"


CASES = {
    "K": ("qwen3_moe", k_types, WIDE, {}),
    "Q8_0": ("qwen2_moe", lambda _: "Q8_0", {}, {}),
    "MXFP4": ("gpt_oss", mx_types, FEW, {}),
    "Q4_0": ("mixtral", lambda _: "Q4_0", {}, {}),
    "split": ("mixtral", lambda name: "Q5_0" if "exps" in name else "Q5_1", {}, {"parts": 3}),
    "fused": ("qwen2_moe", lambda _: "Q4_1", FEW, {"fused": True}),
    "F16": ("mixtral", lambda _: "F16", {}, {}),
    "reordered F16": ("gpt_oss", lambda _: "F16", FEW, {}),
}
"""Family, types by name in the file, sizes, how it is written."""
MakePair = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def make_pair(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """Writes a GGUF file and its decoded twin, once for each case and dtype."""

    @cache
    def make(case: str, dtype: str = "bfloat16") -> tuple[Path, Path]:
        family, types, sizes, options = CASES[case]
        source = make_checkpoint(family, "float32", spread=0.2, **sizes)
        return gguf_files.write(source, tmp_path_factory.mktemp("gguf"), types, dtype, **options)

    return make


def logits_of(llm: LLM) -> Iterator[Tensor]:
    """Of prompts and of a few tokens behind each of them, the same ones fed in every time."""
    executor = llm.engine._executor
    yield executor.prefill([PromptChunk(n, prompt, n, 0) for n, prompt in enumerate(PROMPTS)]).clone()
    for step in range(2):
        fed = [DecodeInput(n, 20 + 7 * step + n, n, len(prompt) + step) for n, prompt in enumerate(PROMPTS)]
        yield executor.decode(fed).clone()


def random_blocks(type_: str) -> tuple[np.ndarray, Tensor]:
    """Random bytes of a weight, but for scales that are no numbers; and its numbers as the package decodes them."""
    random, format_ = np.random.default_rng(7), GGUF[type_]
    blocks = random.integers(0, 256, (ROWS * COLUMNS // format_.per, format_.size), dtype=np.uint8)
    if type_ == "MXFP4":
        blocks[:, 0] = np.resize(np.arange(250), len(blocks))  # 2^127 times 6 is none
    elif format_.per == 1:
        blocks = gguf.quantize(random.standard_normal((ROWS, COLUMNS)).astype(np.float32), Type[type_]).view(np.uint8)
    else:
        for at in format_.scales:
            scale = random.standard_normal(len(blocks)) * 10.0 ** random.integers(-8, 1, len(blocks))
            blocks[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    raw = blocks.reshape(ROWS, -1)
    return raw, torch.from_numpy(gguf.dequantize(raw, Type[type_]).copy()).view(ROWS, COLUMNS)


def spec_of(type_: str, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(name="w", shape=(ROWS, COLUMNS), dtype=str(dtype).removeprefix("torch."), format=GGUF[type_])


def decode(type_: str, raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    spec, stored = spec_of(type_, dtype), torch.from_numpy(raw)
    parts = {part.name: spec.format.repack(spec, part.name, stored).reshape(part.shape) for part in spec.parts}
    return spec.format.decode(spec, parts)


def bits(numbers: Tensor) -> Tensor:
    return numbers.view({4: torch.int32, 2: torch.int16}[numbers.itemsize])


def stock_logits(folder: Path) -> list[Tensor]:
    with torch.inference_mode():
        model = load_resident(folder)
        return [model(torch.tensor([prompt])).logits for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_decoded_checkpoints_bits(case: str, dtype: str, make_pair: MakePair) -> None:
    """Law 1: logits of the stock model with the weights that the package decodes."""
    file, decoded = make_pair(case, dtype)
    model = from_pretrained(file, slots=3, device="cpu", dtype=dtype)
    with torch.inference_mode():
        found = [model(torch.tensor([prompt])).logits for prompt in PROMPTS]
    model.expertflow.close()
    assert all(map(torch.equal, found, stock_logits(decoded)))


@pytest.mark.parametrize("case", ["K", "Q8_0"])
def test_a_file_gives_the_bits_of_transformers_own_reader(case: str, make_pair: MakePair) -> None:
    """Where that reader is right: the logits of its model, from the same file."""
    pytest.importorskip("accelerate")
    file, _ = make_pair(case, "float32")
    options = {"gguf_file": file.name, "dtype": torch.float32, "experts_implementation": "eager"}
    stock = AutoModelForCausalLM.from_pretrained(file.parent, **options).eval()
    for tensor in (*stock.parameters(), *stock.buffers()):
        tensor.data = tensor.data.clone()  # aligned as ours: alignment changes the bits of a product
    model = from_pretrained(file, slots=3, device="cpu", dtype="float32")
    with torch.inference_mode():
        for prompt in PROMPTS:
            assert torch.equal(model(torch.tensor([prompt])).logits, stock(torch.tensor([prompt])).logits)
    model.expertflow.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("case", ["K", "MXFP4", "split"])
def test_both_executions_give_the_decoded_checkpoints_bits(
    case: str, execution: str, device: str, make_pair: MakePair
) -> None:
    """Law 1 for `LLM`: logits and tokens, whatever is resident, within the plan's memory."""
    file, decoded = make_pair(case)
    options = {"execution": execution, "device": device, "max_length": 32, "max_batch": 3}
    params, found = SamplingParams(max_tokens=3, temperature=0.8, seed=5, ignore_eos=True), []
    for place, slots in ((decoded, 1000), (file, 4), (file, 1000)):
        with LLM(place, slots=slots, **options) as llm:
            logits = list(logits_of(llm))
            found.append((logits, [output.token_ids for output in llm.generate(PROMPTS, params)]))
            assert device != "cpu" or llm.stats.peak_bytes <= llm.plan.total  # on CUDA other tests' memory counts
    for logits, tokens in found[1:]:
        assert all(map(torch.equal, logits, found[0][0]))
        assert tokens == found[0][1]


@pytest.mark.parametrize("type_", GGUF)
def test_a_decoder_gives_the_packages_numbers(type_: str) -> None:
    """Random bytes, of all scales that are numbers: equal to `gguf.dequantize` to the bit, then rounded once."""
    raw, want = random_blocks(type_)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = decode(type_, raw, dtype)
        assert torch.equal(bits(found), bits(want.to(dtype)))


@pytest.mark.parametrize("type_", [name for name in GGUF if name != "MXFP4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_is_what_the_format_decodes(type_: str, dtype: torch.dtype) -> None:
    """The tile loader gives the bits of `decode`, and zeros outside."""
    pytest.importorskip("triton", reason="kernels need triton")
    from gguf_tile import copy_tile  # noqa: PLC0415

    raw, want = random_blocks(type_)
    want = bits(torch.nn.functional.pad(want, (0, 128, 0, 32 - ROWS)).to(dtype)).to(DEVICES[-1])
    record = torch.zeros(256 + raw.nbytes, dtype=torch.uint8)
    record[256:] = torch.from_numpy(raw).view(-1)
    record = record.to(DEVICES[-1]).view(dtype)
    out = torch.empty(32, 128, dtype=dtype, device=record.device)
    about = GGUF[type_].constants(spec_of(type_, dtype))
    for first in (0, 128, COLUMNS - 64):
        copy_tile[(1,)](record, out, first, at=(256,), about=about, n=ROWS, k=COLUMNS, rows=32, block=128)
        assert torch.equal(bits(out), want[:, first : first + 128])


@pytest.mark.parametrize(("type_", "dtype"), [("MXFP4", "bfloat16"), ("Q8_0", "float32")])
def test_kernels_read_gate_and_up_of_an_interleaved_module(type_: str, dtype: str) -> None:
    """gpt-oss: records hold gate, then up; the kernels give the bits of records in the module's order."""
    pytest.importorskip("triton", reason="kernels need triton")
    from expertflow.kernels import experts  # noqa: PLC0415

    device, hidden, width = torch.device(DEVICES[-1]), 32, 64
    order = {"transposed": True, "format": GGUF[type_], "dtype": dtype}
    bias = plain("gate_up_proj_bias", (2 * width,), dtype)
    packed = [
        TensorSpec(name="gate_up_proj", shape=(hidden, 2 * width), joined=2, interleaved=True, **order),
        TensorSpec(name="down_proj", shape=(width, hidden), **order),
    ]
    layouts = [
        RecordLayout.of([*packed, bias]),
        RecordLayout.of([*(plain(spec.name, spec.shape, dtype, transposed=True) for spec in packed), bias]),
    ]
    random = torch.Generator().manual_seed(2)
    records = [torch.zeros(2, layout.record_bytes, dtype=torch.uint8) for layout in layouts]
    for ours, theirs in zip(*records, strict=True):
        for spec in packed:
            for name, part in spec.format.draw(spec, random, 0.3).items():
                layouts[0].part(ours, spec.name, name).copy_(part.view(layouts[0].part(ours, spec.name, name).shape))
        layouts[0].part(ours, bias.name, "values").normal_(generator=random)
        for name, value in layouts[0].weights(ours).items():
            layouts[1].tensor(theirs, name).copy_(value)
    x = torch.randn(2, hidden, generator=random).to(getattr(torch, dtype)).to(device)
    slots, parts = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32, device=device), []
    for layout, pool in zip(layouts, records, strict=True):
        mlp = ExpertMlp.of(layout, CLAMPED_SWIGLU, transposed=True, interleaved=True)
        for compute in (experts.expert_pairs, reference.expert_pairs):
            work = Workspace.allocate(mlp, 2, 2, device)
            work.parts.zero_()
            compute(mlp, x, slots, pool.to(device), work)
            parts.append(work.parts)
    assert parts[0].abs().sum() > 0
    assert torch.equal(parts[1], parts[3])  # the references
    if dtype == "float32":
        torch.testing.assert_close(parts[0], parts[1], rtol=1e-4, atol=1e-4)
    if dtype == "float32" and device.type == "cpu":  # the sums of NumPy's products go by the order in memory
        torch.testing.assert_close(parts[0], parts[2], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(parts[0], parts[2])


def test_types_are_the_packages() -> None:
    """Numbers of types, and bytes of a block, agree with the package's tables."""
    assert dict(TYPES) == {type_.value: type_.name for type_ in Type}
    assert {name: (one.per, one.size) for name, one in GGUF.items()} == {
        name: gguf.GGML_QUANT_SIZES[Type[name]] for name in GGUF
    }


def test_a_header_is_read_as_the_package_reads_it(make_pair: MakePair) -> None:
    """Metadata, and where tensors are."""
    file, _ = make_pair("MXFP4")
    theirs, ours = gguf.GGUFReader(file), read_header(file)
    assert {one.name: (one.tensor_type.name, one.data_offset, one.n_bytes) for one in theirs.tensors} == {
        name: (one.type, one.start, prod(one.byte_shape)) for name, one in ours.tensors.items()
    }
    stated = {key: one.contents() for key, one in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: value for key, value in ours.metadata.items() if value is not None} == {
        key: value for key, value in stated.items() if key != "tokenizer.ggml.tokens"
    }


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_the_original_ones(case: str, make_pair: MakePair) -> None:
    """All that the original config says about the computation, as metadata state it."""
    file, decoded = make_pair(case)
    found, original = build_skeleton(file, "auto").config, build_skeleton(decoded, "auto").config
    same = (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "tie_word_embeddings", "num_experts_per_tok", "bos_token_id", "intermediate_size", "sliding_window",
        "layer_types", "norm_topk_prob", "moe_intermediate_size", "shared_expert_intermediate_size", "attention_bias", "mlp_only_layers",
    )  # fmt: skip
    for name in same:
        if name != "intermediate_size" or case in {"Q4_0", "MXFP4"}:  # Qwen's is that of dense layers, which are none
            assert getattr(found, name, None) == getattr(original, name, None), name
    assert found.rope_parameters == original.rope_parameters
    assert found.rms_norm_eps == pytest.approx(original.rms_norm_eps)


def test_a_file_runs_from_the_command_line(make_pair: MakePair) -> None:
    """`plan` and `run`, with the tokenizer beside the file or another folder's; the text is the decoded checkpoint's."""
    file, decoded = make_pair("split")
    small = ("--device", "cpu", "--max-length", 32)
    planned = json.loads(run("plan", file, *small, "--json").stdout)
    assert (planned["model_type"], planned["dtype"]) == ("mixtral", "bfloat16")
    words = ("--prompt", "hello", "--max-tokens", 4, *small, "--json")
    texts = [json.loads(run("run", *place, *words).stdout)["outputs"][0]["text"] for place in ((file,), (decoded,))]
    assert texts[0] == texts[1]
    alone = file.parent / "alone"
    alone.mkdir()
    for part in file.parent.glob("*.gguf"):
        (alone / part.name).symlink_to(part)
    with pytest.raises(PromptError, match=r"tokenizer\.json"):
        run("run", alone / file.name, *words)
    given = json.loads(run("run", alone / file.name, "--tokenizer", decoded, *words).stdout)
    assert given["outputs"][0]["text"] == texts[0]
    with pytest.raises(ConfigError, match="no folder with a tokenizer"):
        run("run", alone / file.name, "--tokenizer", alone, *words)
    with LLM(alone / file.name, device="cpu", max_length=32, slots=4) as llm:
        assert len(llm.generate([PROMPTS[0]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_identity_covers_weights_and_metadata(make_pair: MakePair, tmp_path: Path) -> None:
    """A copy has the same identity and shares its experts; other weights or other metadata have another."""
    file, _ = make_pair("Q8_0")
    copies = [tmp_path / name / "model.gguf" for name in ("same", "weights", "metadata")]
    raw = file.read_bytes()
    changed = raw.replace(b"qwen2moe.rope.freq_base", b"qwen2moe.rope.freq_basf")
    for copy, data in zip(copies, (raw, raw[:-1] + bytes([raw[-1] ^ 1]), changed), strict=True):
        copy.parent.mkdir()
        copy.write_bytes(data)
        for other in file.parent.glob("tokenizer*"):
            (copy.parent / other.name).write_bytes(other.read_bytes())
    with pytest.raises(UnsupportedModelError, match="freq_basf"):
        build_skeleton(copies[2], "auto")
    copies[2].write_bytes(raw.replace(b"tiny", b"tinx"))
    prepared = [prepare(place, EngineConfig(device="cpu", slots=4)) for place in (file, *copies)]
    identities = [one.weights.identity(one.located) for one in prepared]
    assert identities[0] == identities[1]
    assert len(set(identities)) == 3
    assert prepared[0].fingerprint == prepared[1].fingerprint
    with (
        LLM(file, device="cpu", slots=4, max_length=32) as first,
        LLM(copies[0], device="cpu", slots=4, max_length=32, beside=first) as second,
    ):
        assert second._offloaded.store is first._offloaded.store


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"llama.expert_count": None}, UnsupportedModelError, "has no experts"),
        ({"general.type": "adapter"}, UnsupportedModelError, "holds a adapter"),
        ({"llama.logit_scale": 2.0}, UnsupportedModelError, "logit_scale=2.0, which is not computed"),
        ({"llama.expert_weights_norm": False}, UnsupportedModelError, "expert_weights_norm=False"),
        ({"llama.rope.scaling.type": "longrope"}, UnsupportedModelError, "rotary table by 'longrope'"),
        ({"llama.rope.scaling.type": "yarn"}, CheckpointError, "states no factor"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "rope.dimension_count=8"),
        ({"llama.attention.head_count_kv": [1, 2, 2]}, CheckpointError, "is not one number"),
        ({"llama.block_count": 2}, UnsupportedModelError, "with 2 layers are not known to have"),
        ({"llama.block_count": 4}, CheckpointError, "holds no gate_up_proj"),
        ({"llama.block_count": 2000}, CheckpointError, "more than 1024"),
        ({"llama.expert_count": 9}, CheckpointError, r"the config says \[9"),
        ({"llama.embedding_length": None}, CheckpointError, "embedding_length=None"),
        ({"split.count": 2}, CheckpointError, "one of 2 parts"),
    ],
)
def test_metadata_that_do_not_run_are_named(
    change: dict, error: type, match: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """What is missing, disagrees, or would change what is computed: an error that names the key."""
    source = make_checkpoint("mixtral", "float32", spread=0.2)
    file, _ = gguf_files.write(source, tmp_path, lambda _: "Q8_0", "bfloat16", change=change)
    with pytest.raises(error, match=match):
        prepare(file, EngineConfig(device="cpu"))


def test_tensors_that_do_not_run_are_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Types without a decoder, names without an entry, other architectures, and gate and up of different types."""
    config = build_skeleton(make_checkpoint("mixtral", "float32", spread=0.2), "auto").config
    row = np.zeros((8, 64), np.float32)

    def refusal(name: str, data: np.ndarray, type_: str, **options: object) -> str:
        file = gguf_files.save(tmp_path / "x.gguf", config, {name: (data, Type[type_])}, **options)
        with pytest.raises(UnsupportedModelError) as caught:
            prepare(file, EngineConfig(device="cpu"))
        return str(caught.value)

    assert "stores 'a' as IQ4_NL, which is not decoded" in refusal("a", np.zeros((8, 36), np.uint8), "IQ4_NL")
    assert "stores 'a' as Q2_K" in refusal("a", np.zeros((8, 84), np.uint8), "Q2_K")
    raw = gguf_files.save(
        tmp_path / "x.gguf", config, {"token_embd.weight": (row, Type.F32), "rope_freqs.weight": (row, Type.F32)}
    )
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight"):
        prepare(raw, EngineConfig(device="cpu"))
    raw.write_bytes(raw.read_bytes().replace(b"llama", b"llamb"))
    with pytest.raises(UnsupportedModelError, match=r"architecture 'llamb'; of GGUF files qwen3moe"):
        prepare(raw, EngineConfig(device="cpu"))
    source = make_checkpoint("mixtral", "float32", spread=0.2)
    file, _ = gguf_files.write(source, tmp_path, lambda name: "Q4_0" if "gate_exps" in name else "Q8_0", "bfloat16")
    with pytest.raises(CheckpointError, match="must be stored alike"):
        prepare(file, EngineConfig(device="cpu"))


def test_scales_that_are_no_numbers_are_refused() -> None:
    """Infinite and NaN scales, and the scale 255 of MXFP4."""
    cases = (("Q4_K", 2, (0, 0x7C)), ("Q8_0", 0, (1, 0xFE)), ("Q6_K", 208, (0, 0xFC)), ("MXFP4", 0, (0xFF,)))
    for type_, at, scale in cases:
        raw, _ = random_blocks(type_)
        raw.reshape(-1, GGUF[type_].size)[3, at : at + len(scale)] = scale
        with pytest.raises(ValueError, match="not a number"):
            decode(type_, raw, torch.float32)


def test_parts_of_a_file(make_pair: MakePair, tmp_path: Path) -> None:
    """A part that is missing, a later part in place of the first, and parts of different files."""
    first, _ = make_pair("split")
    parts = sorted(first.parent.glob("*.gguf"))
    for part in parts:
        (tmp_path / part.name).write_bytes(part.read_bytes())
    copies = [tmp_path / part.name for part in parts]
    with pytest.raises(CheckpointError, match="a later part of a GGUF file"):
        prepare(copies[1], EngineConfig(device="cpu"))
    copies[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"parts of model-00001-of-00003\.gguf disagree"):
        prepare(copies[0], EngineConfig(device="cpu"))
    copies[2].unlink()
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf is missing"):
        prepare(copies[0], EngineConfig(device="cpu"))


def test_damaged_files_are_one_clear_error(make_pair: MakePair, tmp_path: Path) -> None:
    """Cut anywhere, or with any byte of the header changed: an error of ours, or a header of the same tensors."""
    raw = make_pair("Q4_0")[0].read_bytes()
    begin = min(one.start for one in read_header(make_pair("Q4_0")[0]).tensors.values())
    random, copy = np.random.default_rng(3), tmp_path / "model.gguf"
    for cut in (0, 3, 4, 8, 20, 24, *random.integers(0, begin, 40), begin, len(raw) - 1):
        copy.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            read_header(copy)
    for _ in range(300):
        changed = bytearray(raw)
        for place in random.integers(0, begin, random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        for place in (8, 16):  # the counts of tensors and of metadata
            if random.random() < 0.05:
                changed[place : place + 8] = random.bytes(8)
        copy.write_bytes(changed)
        with suppress(CheckpointError, UnsupportedModelError):
            assert all(one.start + prod(one.byte_shape) <= len(raw) for one in read_header(copy).tensors.values())
