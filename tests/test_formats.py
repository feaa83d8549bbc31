"""Formats: what a record holds, and that packed experts give the bits of the decoded checkpoint, in every execution."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.errors import CheckpointError, ConfigError, UnreadWarning, UnsupportedModelError
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import PLAIN, plain
from expertflow.formats.published.awq import AWQ
from expertflow.formats.published.gguf import GGUF
from expertflow.formats.published.gptq import GPTQ
from expertflow.formats.published.int4 import INT4
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.published.nvfp4 import MODELOPT_NVFP4, NVFP4
from expertflow.formats.records import ALIGNMENT, RecordLayout, StoreLayout
from expertflow.formats.table import FORMATS
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.models.weights import mapping
from expertflow.models.weights.sources import RandomWeights
from four_bit import GROUP, LINEAR, STACKED, TABLE, FourBit, numbers
from helpers import DEVICES, MakeCheckpoint

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
CASES = {"qwen3_moe": LINEAR, "gpt_oss": STACKED}


Twins = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def make_twins(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Makes a packed checkpoint of a family and the same one decoded, once; `mixed`: one layer is left plain."""

    @cache
    def make(family: str, dtype: str, *, mixed: bool = False) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp(f"{family}-{dtype}-{mixed}")
        return pack(make_checkpoint(family, dtype), place, CASES[family], plain_layer=2 if mixed else None)

    return make


def pack(source: Path, place: Path, format_: FourBit, plain_layer: int | None) -> tuple[Path, Path]:
    """The folder with experts of random codes, but for one layer; and the folder with their numbers."""
    folders = [place / "packed", place / "decoded"]
    tensors, states = load_file(source / "model.safetensors"), ({}, {})
    generator = torch.Generator().manual_seed(3)
    for key, value in tensors.items():
        expert = ".experts." in key and "bias" not in key and f"layers.{plain_layer}." not in key
        if not expert:
            for state in states:
                state[key] = value
            continue
        for name, packed in draw(key, value, format_, generator).items():
            states[1 if name == key else 0][name] = packed
    for folder, state in zip(folders, states, strict=True):
        folder.mkdir()
        for file in source.iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folders[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": format_.name}
    (folders[0] / "config.json").write_text(json.dumps(config))
    return folders[0], folders[1]


def draw(key: str, value: Tensor, format_: FourBit, generator: torch.Generator) -> dict[str, Tensor]:
    """Random codes and scales in place of a weight, in the layout of checkpoints, and the numbers they stand for."""
    stacked = format_ is STACKED
    whole = value if stacked else value[None]
    shape = whole.shape[1:]
    n, k = shape[::-1] if stacked else shape
    codes = torch.randint(0, 16, (len(whole), n, k // GROUP, GROUP), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 126, (len(whole), n, k // GROUP), generator=generator, dtype=torch.uint8)
    dtype = str(value.dtype).removeprefix("torch.")
    decoded = torch.stack([numbers(one, scale, dtype) for one, scale in zip(codes, scales, strict=True)])
    decoded = decoded.mT.contiguous() if stacked else decoded
    pairs = codes[..., ::2] | codes[..., 1::2] << 4  # adjacent codes in a byte
    if stacked:
        return {f"{key}_blocks": pairs, f"{key}_scales": scales, key: decoded}
    shape_of = torch.tensor([n, k])  # which no decoder needs
    return {
        f"{key}_packed": pairs[0].reshape(n, k // 2),
        f"{key}_scale": scales[0],
        f"{key}_shape": shape_of,
        key: decoded[0],
    }


def logits_of(llm: LLM) -> Iterator[Tensor]:
    """Of prompts and of a few tokens behind each of them, the same ones fed in every time."""
    executor = llm.engine._executor
    yield executor.prefill([PromptChunk(n, prompt, n, 0) for n, prompt in enumerate(PROMPTS)]).clone()
    for step in range(4):
        fed = [DecodeInput(n, 20 + 7 * step + n, n, len(prompt) + step) for n, prompt in enumerate(PROMPTS)]
        yield executor.decode(fed).clone()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize(
    ("family", "dtype", "mixed"),
    [
        ("qwen3_moe", "float32", False),
        ("qwen3_moe", "bfloat16", True),
        ("gpt_oss", "float32", True),
        ("gpt_oss", "bfloat16", False),
    ],
)
def test_packed_experts_give_the_decoded_checkpoints_bits(
    family: str, dtype: str, mixed: bool, execution: str, device: str, make_twins: Twins
) -> None:
    """Law 1: logits and sampled tokens, whatever is resident; one layer may be plain; the peak is within the plan."""
    packed, decoded = make_twins(family, dtype, mixed=mixed)
    options = {"execution": execution, "device": device, "max_length": 32, "max_batch": 3, "formats": TABLE}
    params = SamplingParams(max_tokens=9, temperature=0.8, seed=5, ignore_eos=True)
    found = []
    for folder, slots in ((decoded, 1000), (packed, 5), (packed, 1000)):
        with LLM(folder, slots=slots, **options) as llm:
            logits = list(logits_of(llm))
            found.append((logits, [output.token_ids for output in llm.generate(PROMPTS, params)]))
            assert device != "cpu" or llm.stats.peak_bytes <= llm.plan.total  # on CUDA other tests' memory counts
    for logits, tokens in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(logits, found[0][0], strict=True))
        assert tokens == found[0][1]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("family", CASES)
def test_a_plain_transformers_model_has_packed_experts(family: str, mixed: bool, make_twins: Twins) -> None:
    """`from_pretrained` gives the logits of the decoded checkpoint."""
    packed, decoded = make_twins(family, "float32", mixed=mixed)
    ids, found = torch.tensor([[5, 6, 7, 8, 9, 10]]), []
    for folder in (packed, decoded):
        model = from_pretrained(folder, slots=5, device="cpu", formats=TABLE)
        with torch.inference_mode():
            found.append(model(ids).logits)
        model.expertflow.close()
    assert torch.equal(*found)


@pytest.mark.parametrize("family", CASES)
def test_a_plan_counts_packed_records(family: str, make_twins: Twins) -> None:
    """Packed experts take the bytes of their codes and scales, in slots and host memory; a plain layer among them those of its records."""
    config = EngineConfig(device="cpu", slots=4, max_length=32)
    plans = {}
    for mixed in (False, True):
        packed, decoded = make_twins(family, "bfloat16", mixed=mixed)
        plans[mixed] = prepare(packed, config, formats=TABLE).plan
        plain_plan = prepare(decoded, config, formats=TABLE).plan
    specs = plans[False].shape.records.layers[0].specs
    packed_bytes = sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for spec in specs for part in spec.parts)
    experts, plain_bytes = plans[False].shape.experts, plain_plan.record_bytes
    assert plans[False].record_bytes == plans[True].record_bytes == packed_bytes < plain_bytes
    assert plans[False].host == packed_bytes * 3 * experts
    assert plans[True].host == (packed_bytes * 2 + plain_bytes) * experts
    assert [layout.is_plain for layout in plans[True].shape.records.layers] == [False, False, True]


def test_a_format_outside_the_table_is_refused(make_twins: Twins) -> None:
    """Without its entry the same folder is a quantised checkpoint that does not run."""
    with pytest.raises(UnsupportedModelError, match="four-bit"):
        prepare(make_twins("qwen3_moe", "float32")[0], EngineConfig(device="cpu"), formats=FORMATS)


def test_what_a_packed_checkpoint_lacks_is_named(make_twins: Twins, tmp_path: Path) -> None:
    """Scales that are missing, of another type, or beside plain numbers; and packed weights that are no expert's."""
    packed, _ = make_twins("qwen3_moe", "float32")
    state = load_file(packed / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    spoilt = {
        "should be": {key: value for key, value in state.items() if key != f"{name}_scale"},
        "has U8 there": {**state, f"{name}_scale": state[f"{name}_scale"].float()},
        "must be stored alike": {**state, name: torch.zeros(1)},
        "plain numbers": {**state, "model.layers.0.self_attn.q_proj.weight_packed": torch.zeros(1, dtype=torch.uint8)},
    }
    for number, (message, tensors) in enumerate(spoilt.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_bytes((packed / "config.json").read_bytes())
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
            prepare(folder, EngineConfig(device="cpu"), formats=TABLE)


@pytest.mark.parametrize("kind", ["linear", "stacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tile_loader_reads_what_its_format_decodes(kind: str, dtype: str) -> None:
    """The expert kernels give the same bits for packed records as for the same numbers in plain ones, at odd sizes too."""
    pytest.importorskip("triton", reason="kernels need triton")
    from expertflow.kernels import experts  # noqa: PLC0415

    device = torch.device(DEVICES[-1])
    hidden, width, stacked = 96, 160, kind == "stacked"
    format_ = STACKED if stacked else LINEAR
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    shapes = {name: shape[::-1] if stacked else shape for name, shape in shapes.items()}
    biases = [plain("gate_up_proj_bias", (2 * width,), dtype), plain("down_proj_bias", (hidden,), dtype)]
    packed = [TensorSpec(name=n, shape=s, dtype=dtype, format=format_, transposed=stacked) for n, s in shapes.items()]
    layouts = [
        RecordLayout.of([*packed, *biases]),
        RecordLayout.of([*(plain(n, s, dtype, transposed=stacked) for n, s in shapes.items()), *biases]),
    ]
    torch.manual_seed(2)
    records = [torch.zeros(3, layout.record_bytes, dtype=torch.uint8) for layout in layouts]
    for ours, theirs in zip(*records, strict=True):
        for spec in packed:
            layouts[0].part(ours, spec.name, "codes").random_(0, 256)
            layouts[0].part(ours, spec.name, "scales").random_(118, 124)
        for bias in biases:
            layouts[0].tensor(ours, bias.name).normal_()
        for name, value in layouts[0].weights(ours).items():
            layouts[1].tensor(theirs, name).copy_(value)
    x = torch.randn(4, hidden, device=device).to(getattr(torch, dtype))
    slots = torch.tensor([[0, 2], [1, 0], [2, -1], [0, 1]], dtype=torch.int32, device=device)
    parts = []
    for layout, pool in zip(layouts, records, strict=True):
        activation = CLAMPED_SWIGLU if stacked else "silu"
        mlp = ExpertMlp.of(layout, activation, transposed=stacked, interleaved=stacked)
        work = Workspace.allocate(mlp, 4, 2, device)
        work.parts.zero_()
        experts.expert_pairs(mlp, x, slots, pool.to(device), work)
        parts.append(work.parts)
    assert parts[0].abs().sum() > 0
    if (
        stacked and dtype == "float32" and device.type == "cpu"
    ):  # the sums of NumPy's products go by the order in memory
        torch.testing.assert_close(*parts, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(*parts)


def test_slots_fit_all_layers_but_large_ones() -> None:
    """A slot has the largest record up to 1.25 times the median; layers alike share a layout."""
    small, larger, large = ([plain("w", (64, words), "float32")] for words in (4, 5, 6))
    layout = StoreLayout.of([small, larger, small, large])
    assert layout.layer_bytes == (1024, 1280, 1024, 1536)
    assert (layout.record_bytes, layout.large) == (1280, (3,))
    assert [one.record_bytes for one in layout.layers] == [1280, 1280, 1280, 1536]
    assert layout.layers[0] is layout.layers[2] is not layout.layers[1]


def test_a_store_is_shared_with_the_same_formats_only(make_twins: Twins) -> None:
    """Records of another format are other bytes: a model that is planned for plain ones refuses packed ones."""
    packed, decoded = make_twins("qwen3_moe", "float32")
    with LLM(packed, slots=5, device="cpu", max_length=32, formats=TABLE) as first:
        with LLM(packed, slots=3, device="cpu", max_length=32, formats=TABLE, beside=first) as second:
            assert second._offloaded.store is first._offloaded.store
        with pytest.raises(ConfigError, match="cannot share"):
            LLM(decoded, slots=5, device="cpu", max_length=32, formats=TABLE, beside=first)


def test_random_weights_are_packed_where_the_config_says_so(make_twins: Twins) -> None:
    """A stand-in for a packed model has records of its size, and answers."""
    packed, _ = make_twins("qwen3_moe", "float32")
    plans = [
        prepare(packed, EngineConfig(device="cpu"), weights=one, formats=TABLE).plan for one in (None, RandomWeights())
    ]
    assert plans[0].record_bytes == plans[1].record_bytes
    with LLM(packed, device="cpu", slots=5, max_length=32, weights=RandomWeights(), formats=TABLE) as llm:
        assert len(llm.generate(PROMPTS[0], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_part_that_a_format_does_not_decode_is_refused(make_twins: Twins, tmp_path: Path) -> None:
    """Zero points that a format knows nothing of would change the numbers."""

    class WithZeros(FourBit):
        def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
            zero = key.removesuffix("_zero")
            return (zero, "zeros") if zero != key else super().split_key(key, stored)

    packed, _ = make_twins("qwen3_moe", "float32")
    state = load_file(packed / "model.safetensors")
    state["model.layers.1.mlp.experts.3.up_proj.weight_zero"] = torch.zeros(4, dtype=torch.uint8)
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    table = {**FORMATS, LINEAR.name: WithZeros(LINEAR.name, {"_packed": "codes", "_scale": "scales"}, blocks=False)}
    with pytest.raises(UnsupportedModelError, match="'zeros'"):
        prepare(tmp_path, EngineConfig(device="cpu"), formats=table)


def test_packed_experts_beyond_the_config_are_left_out(make_twins: Twins, tmp_path: Path) -> None:
    """Layers that the config does not have, such as those of multi-token prediction, may be packed too."""
    packed, _ = make_twins("qwen3_moe", "float32")
    state, key = load_file(packed / "model.safetensors"), "model.layers.1.mlp.experts.3.up_proj.weight_packed"
    state[key.replace("layers.1", "layers.7")] = state[key].clone()
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((packed / name).read_bytes())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UnreadWarning, match="layers.7"):
        from_pretrained(tmp_path, slots=5, device="cpu", formats=TABLE).expertflow.close()


def test_packed_keys_are_resolved_together(make_twins: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' conversion table is made a few times a checkpoint, not once a tensor: there are ten thousands of those."""
    calls = []
    stock = mapping.get_model_conversion_mapping
    monkeypatch.setattr(mapping, "get_model_conversion_mapping", lambda model: calls.append(1) or stock(model))
    prepare(make_twins("qwen3_moe", "float32")[0], EngineConfig(device="cpu"), formats=TABLE)
    assert len(calls) <= 3


def test_what_a_gpu_packs_needs_no_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are said to be packed anywhere are: NumPy, which reads host memory alone, is not asked."""
    monkeypatch.setattr(torch.Tensor, "numpy", lambda _: pytest.fail("read by NumPy"))
    packed = set()
    for name, format_ in {**FORMATS, **{one.name: one for one in GGUF.values()}}.items():
        spec = TensorSpec(name="down_proj", shape=(40, 512), dtype="bfloat16", format=format_)
        for part in (one for one in format_.parts(spec) if one.name in format_.packed_anywhere):
            kind = torch.uint8 if "U8" in part.also else torch.int32
            size = torch.Size(part.stored).numel() * kind.itemsize
            format_.repack(spec, part.name, torch.randint(256, (size,), dtype=torch.uint8).view(kind).view(part.stored))
            packed.add(name)
    assert len(packed) >= len(WORDS)


WORDS = {
    "mxfp4": MXFP4, "int4": INT4, "gptq": GPTQ, "awq": AWQ, "nvfp4": NVFP4, "modelopt's nvfp4": MODELOPT_NVFP4,
}  # fmt: skip
"""Formats whose codes a GPU packs while a checkpoint is loaded."""


@pytest.mark.parametrize("name", WORDS)
def test_codes_are_packed_alike_everywhere(name: str, cuda: torch.device) -> None:
    """A GPU packs random bytes as a processor does, short last steps included."""
    format_ = WORDS[name]
    spec = TensorSpec(name="down_proj", shape=(40, 416), dtype="bfloat16", format=format_)
    (part,) = (part for part in format_.parts(spec) if part.name == "codes")
    assert part.name in format_.packed_anywhere
    kind = torch.int32 if name in {"int4", "gptq", "awq"} else torch.uint8
    size = torch.Size(part.stored).numel() * kind.itemsize
    drawn = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    stored = drawn.view(kind).view(part.stored)
    want = format_.repack(spec, part.name, stored)
    assert torch.equal(format_.repack(spec, part.name, stored.to(cuda)).cpu(), want)


@pytest.mark.parametrize("shape", ["as it is", "transposed", "interleaved"])
@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one is not PLAIN])
def test_strips_are_decoded_as_the_whole(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up decoded in strips, the last one short, are the numbers of each as a whole, put together; memory is that of a strip."""
    size, format_ = (300, 512), FORMATS[name]
    spec = TensorSpec(
        name="gate_up_proj", shape=(512, 600) if shape == "transposed" else (600, 512), dtype="bfloat16", format=format_,
        transposed=shape == "transposed", joined=2, interleaved=shape == "interleaved",
    )  # fmt: skip
    parts = format_.draw(spec, torch.Generator().manual_seed(5), 0.02)
    halves = [
        {key: part.view(2, -1, *part.shape[1:])[place] for key, part in parts.items() if part.numel()}
        for place in range(2)
    ]
    gate, up = (format_.numbers(spec.one, half) for half in halves)
    assert gate.shape == up.shape == size
    whole = torch.stack([gate, up], 1).flatten(0, 1) if spec.interleaved else torch.cat([gate, up])
    counted, seen = format_.strip_bytes(spec), list[int]()
    assert counted == gate.numel() * format_.decode_bytes_each
    stock = type(format_).numbers
    monkeypatch.setattr("expertflow.formats.format._STRIP", 100 * 512)
    monkeypatch.setattr(type(format_), "numbers", lambda *given: seen.append(given[1].outputs) or stock(*given))
    found = format_.decode(spec, parts)
    assert torch.equal(found, whole.t() if spec.transposed else whole)
    assert found.is_contiguous()
    strips = {128: [128, 128, 44], 1: [100, 100, 100]}[format_.rows_alike(spec.one)]
    assert seen == strips * 2
    assert format_.strip_bytes(spec) == counted * strips[0] // 300
