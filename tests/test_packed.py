"""Law 1 of every packed layout: packed gives the decoded checkpoint's bits; what is missing or damaged is named."""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.errors import ExpertFlowError
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from helpers import MakeCheckpoint, load_resident
from layout import write_twins
from layouts import LAYOUTS

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
PARAMS = SamplingParams(max_tokens=3, temperature=0.8, seed=5, ignore_eos=True)
ALL = 1000
EXPERTS = 8
"""Of a layer, in the tiny models."""

Twins = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def twins(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Makes a packed checkpoint and the same one decoded, once a layout."""

    @cache
    def make(name: str) -> tuple[Path, Path]:
        layout = LAYOUTS[name]
        sizes = {"num_hidden_layers": 2, **layout.sizes}
        source = make_checkpoint(layout.family, layout.dtype, spread=0.3, **sizes)
        return write_twins(source, tmp_path_factory.mktemp("twins"), layout)

    return make


def slots_of(name: str, packed: Path, turn: int) -> int:
    """1, top-k, E/2 or E, in turns."""
    config = json.loads((packed / "config.json").read_text())
    counts = (1, config.get("num_experts_per_tok", 2), EXPERTS // 2, EXPERTS)
    return counts[(list(LAYOUTS).index(name) + turn) % len(counts)]


def logits_of(llm: LLM) -> Iterator[Tensor]:
    """Of prompts and of two tokens behind each of them, the same ones fed in every time."""
    executor = llm.engine._executor
    yield executor.prefill([PromptChunk(n, prompt, n, 0) for n, prompt in enumerate(PROMPTS)]).clone()
    for step in range(2):
        fed = [DecodeInput(n, 20 + 7 * step + n, n, len(prompt) + step) for n, prompt in enumerate(PROMPTS)]
        yield executor.decode(fed).clone()


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_gives_the_decoded_checkpoints_bits(name: str, execution: str, twins: Twins) -> None:
    """Logits and sampled tokens equal those of the decoded checkpoint, of which everything is resident."""
    packed, decoded = twins(name)
    found = []
    for folder, slots in ((decoded, ALL), (packed, slots_of(name, packed, execution == "graph"))):
        with LLM(folder, slots=slots, execution=execution, device="cpu", max_length=32, max_batch=3) as llm:
            found.append((list(logits_of(llm)), [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1][0], found[0][0], strict=True))
    assert bool(torch.isfinite(found[0][0][0]).all())
    assert found[1][1] == found[0][1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_gives_the_stock_models_bits(name: str, twins: Twins) -> None:
    """`from_pretrained` on the packed folder, and transformers' own eager code on the decoded one."""
    packed, decoded = twins(name)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.inference_mode():
        expected = load_resident(decoded)(ids).logits
        model = from_pretrained(packed, slots=slots_of(name, packed, 2), device="cpu")
        assert torch.equal(model(ids).logits, expected)
    model.expertflow.close()


def test_kimi_k2_is_read_as_deepseek_v3(twins: Twins, tmp_path: Path) -> None:
    """As published: a type that transformers has no code for, the code of DeepSeek-V3, and a map to code that is never run."""
    packed, decoded = twins("int4 g128 with attention")
    config = json.loads((packed / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    folder = write(tmp_path / "kimi", packed, load_file(packed / "model.safetensors"))
    named = {
        "model_type": "kimi_k2",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config", "AutoModel": "modeling_deepseek.X"},
    }
    (folder / "config.json").write_text(json.dumps(config | named))
    found = []
    for place in (decoded, folder):
        with LLM(place, slots=4, device="cpu", max_length=32, max_batch=3) as llm:
            found.append([output.token_ids for output in llm.generate(PROMPTS, PARAMS)])
    assert found[0] == found[1]


def write(place: Path, packed: Path, state: dict[str, Tensor], quantization: Any = None) -> Path:
    """The packed folder with other tensors or another quantisation config."""
    place.mkdir()
    for file in packed.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        config = json.loads((place / "config.json").read_text()) | {"quantization_config": quantization}
        (place / "config.json").write_text(json.dumps(config))
    return place


def failure(folder: Path) -> str:
    with pytest.raises(ExpertFlowError) as caught:
        LLM(folder, device="cpu", slots=4, max_length=32).close()
    return str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_damaged_scales_are_named(name: str, twins: Twins, tmp_path: Path) -> None:
    """Missing, cut off, not a number, or those of another expert's shape: the error says which."""
    packed, decoded = twins(name)
    state, plain = load_file(packed / "model.safetensors"), load_file(decoded / "model.safetensors")
    key = [key for key in state if key not in plain and ".experts." in key and "scale" in key][-1]
    module, expert = key.partition(".experts")[0], re.search(r"experts\.(\d+)\.", key)
    message = failure(write(tmp_path / "missing", packed, {k: v for k, v in state.items() if k != key}))
    assert module in message
    assert expert is None or f"expert {expert[1]} " in message
    scales = state[key]
    for dim in range(scales.ndim):
        cut = scales.narrow(dim, 0, scales.shape[dim] - 1) if scales.shape[dim] > 1 else torch.cat([scales] * 2, dim)
        message = failure(write(tmp_path / f"cut {dim}", packed, {**state, key: cut.contiguous()}))
        assert key in message
    bad = scales.clone()
    bad.view(-1)[-1:] = float("nan") if bad.is_floating_point() else 255  # 255 is no number in E8M0
    message = failure(write(tmp_path / "nan", packed, {**state, key: bad}))
    assert key in message
    assert "cannot be decoded" in message


def other_groups(quantization: Any) -> Any:
    """A quantisation config with other group sizes, wherever they are stated."""
    if not isinstance(quantization, dict):
        return quantization
    changed = {key: other_groups(value) for key, value in quantization.items()}
    changed |= {key: [48, 48] for key in ("weight_block_size", "block_structure") if changed.get(key)}
    size = changed.get("group_size")
    return changed | {"group_size": 64 if size == 32 else 32} if isinstance(size, int) and size > 0 else changed


@pytest.mark.parametrize(
    "name", [name for name, one in LAYOUTS.items() if other_groups(one.quantization) != one.quantization]
)
def test_another_group_size_is_seen(name: str, twins: Twins, tmp_path: Path) -> None:
    """Scales that are not those of the config's groups are refused, not stretched."""
    packed, _ = twins(name)
    state = load_file(packed / "model.safetensors")
    message = failure(write(tmp_path / "groups", packed, state, other_groups(LAYOUTS[name].quantization)))
    assert "group_size" in message or any(key in message for key in state)
