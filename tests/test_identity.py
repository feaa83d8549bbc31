"""One view of a checkpoint folder, and which model exactly it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertflow import LLM, SamplingParams
from expertflow.config import EngineConfig
from expertflow.engine.offline import Results
from expertflow.engine.prepare import prepare
from expertflow.errors import CheckpointError, ConfigError, ResultsError
from expertflow.models.files.checkpoint import INDEX_NAME, SINGLE_NAME, walk
from expertflow.models.files.fingerprint import fingerprint
from helpers import MakeCheckpoint, load_resident

PROMPT = [5, 17, 33, 62]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def sharded(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    folder = tmp_path / "sharded"
    shutil.copytree(make_checkpoint("qwen3_moe", shard="100KB", spread=0.3), folder)
    return folder


@pytest.fixture
def single(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    folder = tmp_path / "single"
    shutil.copytree(make_checkpoint("qwen3_moe", spread=0.3), folder)
    return folder


def tokens(folder: Path) -> list[int]:
    with LLM(folder, device="cpu", slots=5, max_length=32) as llm:
        return list(llm.generate([PROMPT], PARAMS)[0].token_ids)


def stock(folder: Path) -> list[int]:
    ids = torch.tensor([PROMPT])
    return load_resident(folder).generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 4:].tolist()


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_single_file_beside_an_index_is_the_checkpoint(sharded: Path, single: Path) -> None:
    """As in transformers, `model.safetensors` wins over an index, for experts and dense weights alike."""
    assert stock(sharded) != stock(single)
    shutil.copy(single / SINGLE_NAME, sharded)
    assert tokens(sharded) == stock(sharded) == stock(single)


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_the_file_the_config_names_is_the_checkpoint(name: str, sharded: Path, single: Path) -> None:
    """`transformers_weights` wins over both, be it a file or an index."""
    wanted = stock(sharded if name.endswith("json") else single)
    (sharded / INDEX_NAME).rename(sharded / "other.safetensors.index.json")
    shutil.copy(single / SINGLE_NAME, sharded / "other.safetensors")
    save_file({}, sharded / SINGLE_NAME)
    edit(sharded / "config.json", transformers_weights=name)
    assert tokens(sharded) == stock(sharded) == wanted


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "weights.bin", 7])
def test_weights_outside_the_folder_are_refused(name: object, sharded: Path) -> None:
    """What the config names has to be a safetensors file in the folder."""
    edit(sharded / "config.json", transformers_weights=name)
    with pytest.raises(CheckpointError, match=r"transformers_weights=.*no safetensors file in the folder"):
        tokens(sharded)


def test_two_copies_of_a_tensor_must_agree(sharded: Path) -> None:
    """A stale copy in another shard is refused by name; an equal copy is none."""
    expected, found = tokens(sharded), walk(sharded)
    for key in ("model.norm.weight", "model.layers.1.mlp.experts.3.down_proj.weight"):
        other = next(tensor.file for tensor in found.values() if tensor.file != found[key].file)
        before, held = load_file(other), load_file(found[key].file)[key]
        save_file({**before, key: held}, other, {"format": "pt"})
        assert tokens(sharded) == expected
        save_file({**before, key: held * 2}, other, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"different copies of '{key}'"):
            tokens(sharded)
        save_file(before, other, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "stacked"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.down_proj"),
        ("granitemoe", "model.layers.1.block_sparse_moe.experts.down_proj"),
    ],
)
def test_experts_under_two_names_are_refused(
    family: str, stacked: str, tmp_path: Path, make_checkpoint: MakeCheckpoint
) -> None:
    """A layer's experts, stored by transformers' own names beside the names of the family's checkpoints."""
    folder = tmp_path / family
    shutil.copytree(make_checkpoint(family), folder)
    content = load_file(folder / SINGLE_NAME)
    other = dict(load_resident(folder).named_parameters())[stacked].detach() * 2
    save_file({**content, stacked: other}, folder / SINGLE_NAME, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{stacked}' (and|are).*{stacked.rpartition('.')[0]}"):
        tokens(folder)


def test_an_adapter_is_not_forgotten(single: Path) -> None:
    """Weights that come with an adapter would give other tokens without it."""
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter"):
        tokens(single)


def identity(folder: Path) -> str:
    with LLM(folder, device="cpu", slots=5, max_length=32) as llm:
        return llm.identity


def _unsampled(folder: Path) -> None:
    """Change one number that the sampled fingerprint does not see."""
    sampled = fingerprint(walk(folder))
    content = load_file(folder / SINGLE_NAME)
    for key in content:
        content[key].view(-1)[-1] += 1
        save_file(content, folder / SINGLE_NAME, {"format": "pt"})
        if fingerprint(walk(folder)) == sampled:
            return
        content[key].view(-1)[-1] -= 1
    raise AssertionError("every tensor is sampled whole")


CHANGES: dict[str, Callable[[Path], None]] = {
    "config": lambda folder: edit(folder / "config.json", rope_theta=5000.0),
    "generation config": lambda folder: edit(folder / "generation_config.json", eos_token_id=[2, 9]),
    "versioned config": lambda folder: (folder / "config.5.0.0.json").write_text((folder / "config.json").read_text()),
    "tokenizer": lambda folder: edit(folder / "tokenizer_config.json", model_max_length=77),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
    "weights": _unsampled,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_results_are_not_continued_by_a_changed_model(change: Callable, single: Path, tmp_path: Path) -> None:
    """Whatever answers depend on is part of the identity, and a results file of before is refused."""
    before = identity(single)
    with Results(tmp_path / "out", ["a"], PARAMS, before):
        pass
    change(single)
    after = identity(single)
    assert after != before
    with pytest.raises(ResultsError, match="another model, or of this one before its files changed"):
        Results(tmp_path / "out", ["a"], PARAMS, after)


def test_shards_do_not_change_the_identity(tmp_path: Path, sharded: Path) -> None:
    """The same tensors in one file are the same model."""
    joined = tmp_path / "joined"
    shutil.copytree(sharded, joined, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    content = {key: value for shard in sharded.glob("*.safetensors") for key, value in load_file(shard).items()}
    save_file(content, joined / SINGLE_NAME, {"format": "pt"})
    assert identity(joined) == identity(sharded)


def test_a_dense_tensor_that_was_not_sampled_is_not_shared(single: Path, tmp_path: Path) -> None:
    """`beside` goes by the whole content: an equal copy shares, a copy that differs by one number does not."""
    other = tmp_path / "copy"
    shutil.copytree(single, other)
    options = {"device": "cpu", "slots": 5, "max_length": 32}
    with LLM(single, **options) as llm:
        with LLM(other, beside=llm, **options) as twin:
            assert twin.identity == llm.identity
            assert twin._offloaded.store is llm._offloaded.store
        _unsampled(other)
        assert prepare(other, EngineConfig(device="cpu")).fingerprint == llm.fingerprint
        with pytest.raises(ConfigError, match="cannot share the experts"):
            LLM(other, beside=llm, **options)
        _unsampled(single)  # the files the first one was loaded from, changed under it
        with pytest.raises(ConfigError, match="cannot share the experts"):
            LLM(single, beside=llm, **options)
