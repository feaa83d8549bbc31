"""Device memory of a pass over prompts in graph execution, as its CUDA kernels allocate it, and the plan of it.

On a CPU the kernels are references, whose temporaries a GPU does not have. Here stand-ins allocate what the kernels do and compute nothing,
and everything else of the pass is what a GPU runs.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig

from expertflow import LLM, SamplingParams
from expertflow.kernels import dense_reference, reference
from expertflow.models.families import FAMILIES
from expertflow.models.weights.sources import RandomWeights

TOKENS, CHUNK = 4096, 512
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "max_position_embeddings": TOKENS,
}
EXPERT = {"gpt_oss": "intermediate_size", "mixtral": "intermediate_size", "olmoe": "intermediate_size"}
FAMILY_NAMES = [
    name
    for name, one in FAMILIES.items()
    if not one.no_graph and "kv_lora_rank" not in one.tiny and name != "switch_transformers"
]
"""Those whose attention keeps keys and values, in pages."""


@pytest.fixture
def empty_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that make their outputs alone."""

    def attention(query: Tensor, keys: Tensor, values: Tensor, *_: Any, **more: Any) -> Tensor:
        del keys, more
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], values.shape[3])

    monkeypatch.setattr(dense_reference, "prompt_attention", attention)
    monkeypatch.setattr(dense_reference, "rms_norm", lambda states, *_, **__: states.new_zeros(states.shape))
    monkeypatch.setattr(reference, "group_pairs", lambda *_: None)
    monkeypatch.setattr(reference, "combine", lambda *given: given[4].zero_())


@pytest.mark.usefixtures("empty_kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_pass_takes_what_is_planned(family: str, heads: int, dtype: str, tmp_path: Path) -> None:
    """Two prompts as one full pass: its peak is within the workspace, and the workspace within twice of it."""
    expert = EXPERT.get(family, "moe_intermediate_size")
    sizes = {**FAMILIES[family].tiny, **SIZES, "num_key_value_heads": heads, expert: 128}
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "device": "cpu",
        "execution": "graph",
        "predictor": "none",
        "dtype": dtype,
        "slots": "100%",
    }
    with LLM(tmp_path, weights=RandomWeights(), max_batch=2, max_length=CHUNK, prefill_chunk=CHUNK, **options) as llm:
        plan = llm.plan
        assert plan.prompt_attention == "kernel"
        prompts = [[3 + place % 90 for place in range(CHUNK // 2)]] * 2
        llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True))
        taken = llm.stats.peak_bytes - (plan.dense + plan.kv + plan.slot_bytes)
    assert taken <= plan.workspace <= 2 * taken
