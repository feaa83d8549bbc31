"""Checkpoint folders: every way a bad one is refused, before weights are loaded."""

import json
import shutil
import struct
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertflow import LLM, EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.errors import (
    BudgetError,
    CheckpointError,
    DeviceError,
    HostMemoryError,
    UnreadWarning,
    UnsupportedModelError,
)
from expertflow.models.files import checkpoint
from expertflow.models.files.checkpoint import INDEX_NAME, SINGLE_NAME, walk
from helpers import MakeCheckpoint


@pytest.fixture
def folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(make_checkpoint("qwen3_moe"), tmp_path / "checkpoint"))


@pytest.fixture
def sharded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of a good checkpoint in several shards."""
    copy = Path(shutil.copytree(make_checkpoint("qwen3_moe", shard="100KB"), tmp_path / "sharded"))
    assert len(list(copy.glob("model-*.safetensors"))) > 2
    return copy


def refused(folder: Path | str, error: type[Exception], match: str, **options: object) -> None:
    with pytest.raises(error, match=match):
        LLM(folder, device="cpu", **options)


def test_headers_say_where_tensors_are(sharded: Path) -> None:
    """Walking the headers finds every tensor's bytes, as the safetensors library reads them."""
    found = walk(sharded)
    for shard in sharded.glob("*.safetensors"):
        for key, value in load_file(shard).items():
            raw = shard.read_bytes()[found[key].start : found[key].start + found[key].nbytes]
            assert torch.frombuffer(bytearray(raw), dtype=value.dtype).view(found[key].shape).equal(value)


def test_truncated_shard(folder: Path) -> None:
    """A shard cut short is named."""
    path = folder / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:-1000])
    refused(
        folder, CheckpointError, "model.safetensors is no whole safetensors file: .*not fully covered.*fetch it again"
    )


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 7, b"not a safetensors file at all", struct.pack("<Q", 10) + b"{nonsense!"]
)
def test_unreadable_shard(folder: Path, content: bytes) -> None:
    """A file that is no safetensors file is named."""
    (folder / SINGLE_NAME).write_bytes(content)
    refused(folder, CheckpointError, "model.safetensors is no whole safetensors file: .*header")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
        {"dtype": "Q3", "shape": [], "data_offsets": [0, 1]},
    ],
)
def test_header_that_contradicts_itself(folder: Path, entry: dict) -> None:
    """An entry whose shape, dtype and offsets disagree, or lacks them, is refused."""
    header = json.dumps({"x": entry}).encode()
    (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 64)
    refused(
        folder,
        CheckpointError,
        "model.safetensors is no whole safetensors file: .*(missing field|invalid shape, data type, or offset|Q3)",
    )


def test_index_naming_a_missing_shard(sharded: Path) -> None:
    """A shard the index names but the folder lacks is named."""
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    refused(sharded, CheckpointError, f"names shard {gone.name}.*Fetch the missing shard")


def test_index_naming_a_missing_tensor(sharded: Path) -> None:
    """A tensor the index promises but no shard holds is named."""
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost.weight"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_NAME).write_text(json.dumps(index))
    refused(sharded, CheckpointError, "'model.ghost.weight', which no shard holds")


@pytest.mark.parametrize("text", ["{", "[]", '{"metadata": {}}'])
def test_unreadable_index(sharded: Path, text: str) -> None:
    """An index that is no JSON object with a weight map is refused."""
    (sharded / INDEX_NAME).write_text(text)
    refused(sharded, CheckpointError, "model.safetensors.index.json")


def test_pickles_are_never_read(folder: Path) -> None:
    """A folder with pickled weights only is refused, and says why."""
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    refused(folder, CheckpointError, "pickled weights .*never read")


def test_no_weights_at_all(folder: Path) -> None:
    """A folder without weights says what it needs."""
    (folder / SINGLE_NAME).unlink()
    refused(folder, CheckpointError, "holds no safetensors weights")


def test_no_such_folder(tmp_path: Path) -> None:
    """Neither a folder nor a cached model: the error says how to get one."""
    refused(tmp_path / "nothing", CheckpointError, "is not a folder")
    refused("someone/some-model", CheckpointError, "neither a folder nor in the Hugging Face cache.*hf download")


def test_an_id_is_fetched_without_pickles(monkeypatch: pytest.MonkeyPatch, make_checkpoint: MakeCheckpoint) -> None:
    """A Hugging Face id is fetched: weights as safetensors, configs and tokenizer, and nothing else."""
    calls: list[tuple] = []

    def fetch(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        calls.append((name, allow_patterns, ignore_patterns))
        return str(make_checkpoint("qwen3_moe"))

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    assert checkpoint.resolve("someone/some-model") == make_checkpoint("qwen3_moe")
    assert calls[0][0] == "someone/some-model"
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in calls[0][1])
    assert any(fnmatch("consolidated.00.safetensors", pattern) for pattern in calls[0][2])


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_missing_or_broken_config(folder: Path) -> None:
    """No config, or one that is no JSON, is refused."""
    (folder / "config.json").write_text("{broken")
    refused(folder, CheckpointError, "config.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, "config.json is missing")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "llama"}, "no experts: it is no Mixture-of-Experts model.*expertflow models"),
        ({"model_type": "bert"}, "no(t a text-generating model| experts)"),
        ({"model_type": "no_such_model"}, "unknown to transformers"),
        ({"model_type": None}, "unknown to transformers"),
        ({"model_type": "custom", "auto_map": {"AutoConfig": "code.Config"}}, "run code of its own.*never done"),
    ],
)
def test_models_that_cannot_be_offloaded(folder: Path, changes: dict, match: str) -> None:
    """What is not an MoE of a supported kind is refused with the reason."""
    _edit_config(folder, **changes)
    refused(folder, UnsupportedModelError, match)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 4},
        {"num_experts": 16},
        {"moe_intermediate_size": 48},
        {"hidden_size": 128},
        {"num_hidden_layers": 5},
    ],
)
def test_config_that_disagrees_with_the_tensors(folder: Path, changes: dict) -> None:
    """Experts or layers of another number or size than the config says are refused."""
    if "num_experts" in changes:  # the config knows it by two names
        changes = {**changes, "num_local_experts": changes["num_experts"]}
    _edit_config(folder, **changes)
    refused(folder, CheckpointError, "disagree|does not match|lacks|the config says")


def test_expert_dtype_that_disagrees_with_the_config(folder: Path) -> None:
    """Experts stored in another dtype than the config states are refused, and converted when a dtype is stated."""
    _edit_config(folder, dtype="bfloat16")
    refused(folder, CheckpointError, "stored as float32, the config says bfloat16.*--dtype")
    with LLM(folder, device="cpu", dtype="bfloat16", max_length=32) as llm:
        assert llm.plan.shape.dtype == "bfloat16"


def test_integer_experts_are_refused(folder: Path) -> None:
    """Experts in a dtype that cannot be run exactly are refused."""
    tensors = load_file(folder / SINGLE_NAME)
    key = next(key for key in tensors if ".experts.3.down_proj" in key)
    tensors[key] = tensors[key].to(torch.int8)
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    refused(folder, UnsupportedModelError, "stored as I8")


def test_missing_dense_weight(folder: Path) -> None:
    """A dense weight that is not there is an error, never a random initialisation."""
    tensors = load_file(folder / SINGLE_NAME)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    refused(folder, CheckpointError, "lacks 1 weights, first 'model.layers.1.self_attn.q_proj.weight'")


def test_tensors_without_a_place_are_named(folder: Path) -> None:
    """Biases that the model does not have, and layers beyond its config, are not used: the warning names them."""
    tensors = load_file(folder / SINGLE_NAME)
    extra = [
        "model.layers.0.mlp.experts.1.up_proj.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.9.mlp.gate.weight",
    ]
    save_file(tensors | {key: torch.ones(3) for key in extra}, folder / SINGLE_NAME, {"format": "pt"})
    with pytest.warns(UnreadWarning, match=f"no place for 3 .*{', '.join(extra)}$"):
        LLM(folder, device="cpu", max_length=16).close()


def test_missing_expert(folder: Path) -> None:
    """An expert that is not there is named."""
    tensors = load_file(folder / SINGLE_NAME)
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    refused(folder, CheckpointError, r"gate_up_proj of expert 5 in model.layers.2")


def test_budget_too_small_names_the_least_that_works(folder: Path) -> None:
    """The least budget in the error works, and one byte less does not."""
    with pytest.raises(BudgetError, match=r"too small.*least that works") as caught:
        LLM(folder, device="cpu", gpu_memory="100KB", max_length=32, max_batch=1)
    least = caught.value.least_bytes
    with LLM(folder, device="cpu", gpu_memory=least, max_length=32, max_batch=1) as llm:
        assert llm.plan.slots == 1
    refused(folder, BudgetError, "too small", gpu_memory=least - 1, max_length=32, max_batch=1)


def test_slots_that_do_not_fit_the_budget(folder: Path) -> None:
    """Slots asked for are never silently fewer."""
    refused(
        folder, BudgetError, "24 slots", gpu_memory="600KB", slots="100%", max_length=32, max_batch=1, prefill_chunk=32
    )


def test_host_memory_is_checked_before_loading(folder: Path) -> None:
    """A store larger than allowed is refused."""
    refused(folder, HostMemoryError, "allowed by host_memory", host_memory="100KB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_asked_for_and_not_there(folder: Path) -> None:
    """No silent fallback to the CPU."""
    with pytest.raises(DeviceError, match=r"no CUDA device.*--device cpu"):
        LLM(folder, device="cuda")


@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe"])
def test_planning_reads_no_weights(model_type: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A plan comes from config and headers alone: the data may be holes."""
    folder = Path(shutil.copytree(make_checkpoint(model_type), tmp_path / "holes"))
    path = folder / SINGLE_NAME
    size = path.stat().st_size
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = path.read_bytes()[: 8 + length]
    with path.open("wb") as file:
        file.write(header)
        file.truncate(size)
    plan = prepare(folder, EngineConfig(device="cpu", slots="50%", max_length=64)).plan
    assert plan.slots == 12
    assert plan.host == 24 * plan.record_bytes


def _save_changed(folder: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    tensors[key] = change(tensors[key]).contiguous()
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda w: w.half(), CheckpointError, "'lm_head.weight' is stored as float16, the config says float32"),
        (lambda w: w.to(torch.int8), UnsupportedModelError, "'lm_head.weight' is stored as I8"),
        (lambda w: w[:, :-1], CheckpointError, r"'lm_head.weight' is \[96, 63\], the config says \[96, 64\]"),
    ],
)
def test_dense_weights_that_disagree_with_the_config(
    folder: Path, change: Callable, error: type[Exception], match: str
) -> None:
    """Dense weights are checked from their headers, by plan and run alike."""
    _save_changed(folder, "lm_head.weight", change)
    refused(folder, error, match)
    with pytest.raises(error, match=match):
        prepare(folder, EngineConfig(device="cpu"))


def test_dense_weights_are_converted_when_asked(folder: Path) -> None:
    """Stating a dtype is asking for conversion."""
    _save_changed(folder, "lm_head.weight", lambda w: w.half())
    with LLM(folder, device="cpu", dtype="float32", max_length=16) as llm:
        assert llm._offloaded.model.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "abc"},
        {"max_position_embeddings": "many"},
        {"hidden_act": "no_such_function"},
        {"num_attention_heads": 0},
        {"num_experts_per_tok": 99},
        {"pad_token_id": 10_000},
    ],
)
def test_nonsense_in_the_config(folder: Path, changes: dict) -> None:
    """Values no model can be built from are refused as what they are."""
    _edit_config(folder, **changes)
    refused(folder, CheckpointError, "config.json")


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"x": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"x": ["F32", [16], [0, 64]]},
        {"x": {"dtype": "F32", "shape": [16.0], "data_offsets": [0, 64]}},
    ],
)
def test_header_of_wrong_types(folder: Path, header: object) -> None:
    """Valid JSON that is no safetensors header is refused."""
    raw = json.dumps(header).encode()
    (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\x00" * 64)
    refused(folder, CheckpointError, "model.safetensors")


def test_index_of_wrong_types(sharded: Path) -> None:
    """An index whose shards are no names is refused."""
    (sharded / INDEX_NAME).write_text('{"weight_map": {"a": 3}}')
    refused(sharded, CheckpointError, "names a shard .3., which is no file of the folder")


def test_broken_tokenizer(folder: Path) -> None:
    """A tokenizer that cannot be read is named."""
    (folder / "tokenizer.json").write_text("{broken")
    refused(folder, CheckpointError, "the tokenizer in .* cannot be loaded", max_length=16)


def test_a_family_the_caches_cannot_serve(folder: Path) -> None:
    """A registry family that would fail while generating is refused before loading."""
    _edit_config(folder, model_type="minimax")
    refused(folder, UnsupportedModelError, "needs a cache class of its own")
