"""What attention layers see and keep: taken from the models themselves, never from config keys."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache

from expertflow import LLM, SamplingParams
from expertflow.errors import CheckpointError, UnsupportedModelError
from expertflow.execution.kv_rows import step_masks
from expertflow.models.attention import attention_windows, cache_argument
from expertflow.models.families import FAMILIES
from helpers import MakeCheckpoint, load_resident, model_class

WINDOW = 5
DECODERS = [name for name in FAMILIES if name != "switch_transformers"]
GRAPHS = [name for name in DECODERS if not FAMILIES[name].no_graph]
CONFIGS = {
    "as published": {},
    "stray window": {"sliding_window": WINDOW},
    "full first": {
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "full first, stray sharing": {
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
    },
    "window in use": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
}


def greedy(model: nn.Module, ids: list[int], count: int) -> list[int]:
    """The most probable tokens, every one from a whole forward without a cache: the plainest way to say what is right."""
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", DECODERS)
def test_each_layer_sees_what_the_stock_forward_shows_it(family: str, config: dict) -> None:
    """Allowed positions of every layer equal those of the stock model's masks, around the window and over several passes."""
    made = AutoConfig.for_model(family, **{**FAMILIES[family].tiny, **config})
    made._attn_implementation = "eager"
    with torch.device("meta"):
        skeleton = model_class(made)(made)
    windows = attention_windows(skeleton, made)
    stock = model_class(made)(made).eval()
    seen: list[torch.Tensor] = []
    for layer in stock.get_decoder().layers:
        layer.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["attention_mask"] >= 0), with_kwargs=True)
    cache, begin = DynamicCache(), 0
    for count in (WINDOW - 1, 1, 1, 7):  # up to window - 1, window, window + 1, and beyond
        seen.clear()
        with torch.inference_mode():
            # a cache that keeps every token: stock's own drops some by the config's word
            stock(torch.full((1, count), 7), use_cache=True, **{cache_argument(stock): cache})
        positions = torch.arange(begin, begin + count)[None]
        begin += count
        for mask, window in zip(seen, windows, strict=True):
            ours = step_masks(positions, begin, [window], torch.float32)[0] >= 0
            assert torch.equal(mask, ours), (begin, window)


def test_a_wide_window_is_found() -> None:
    """A window of more than 131,072 tokens, inside a context that is longer still."""
    made = AutoConfig.for_model(
        "gpt_oss", **{**FAMILIES["gpt_oss"].tiny, "sliding_window": 200_000, "max_position_embeddings": 1 << 20}
    )
    with torch.device("meta"):
        assert attention_windows(model_class(made)(made), made) == (200_000, None, 200_000)


@pytest.mark.parametrize("config", list(CONFIGS.values())[1:], ids=list(CONFIGS)[1:])
@pytest.mark.parametrize("family", DECODERS)
def test_tokens_beyond_the_window_are_stock(family: str, config: dict, make_checkpoint: MakeCheckpoint) -> None:
    """A prompt longer than the window, read in several passes, gets the tokens of a stock forward without a cache."""
    folder = make_checkpoint(family, spread=0.3, **config)
    prompt = [3 + 7 * place % 90 for place in range(3 * WINDOW)]
    expected = greedy(load_resident(folder), prompt, 4)
    with LLM(folder, device="cpu", slots=9, max_length=32, max_batch=1, prefill_chunk=4) as llm:
        assert list(llm.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == expected


@pytest.mark.parametrize("family", GRAPHS)
def test_graph_steps_see_the_same(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """The graph execution ignores a stray window as the host execution does."""
    folder = make_checkpoint(family, spread=0.3, **CONFIGS["stray window"])
    prompt = [3 + 7 * place % 90 for place in range(3 * WINDOW)]
    expected = greedy(load_resident(folder), prompt, 3)
    with LLM(folder, device="cpu", execution="graph", slots=9, max_length=32, max_batch=1) as llm:
        assert list(llm.generate([prompt], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == expected


RECURRENT = {
    "jamba": {"intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "attn_layer_period": 3,
              "attn_layer_offset": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
              "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "qwen3_next": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
                   "intermediate_size": 64, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
                   "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                   "shared_expert_intermediate_size": 32,
                   "layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "lfm2_moe": {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
                 "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "inkling_text": {"moe_intermediate_size": 32, "n_routed_experts": 8, "head_dim": 16, "swa_num_attention_heads": 4,
                     "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": WINDOW, "intermediate_size": 64,
                     "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
    "zaya": {"num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16},
}  # fmt: skip
COHORTS = {
    "afmoe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64,
              "head_dim": 16, "sliding_window": WINDOW, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": WINDOW},
}  # fmt: skip
LIKE_OLMOE = dict(FAMILIES["olmoe"].tiny)


PASSED = [*FAMILIES, *RECURRENT, *COHORTS]


@pytest.mark.parametrize("family", PASSED)
def test_the_size_of_a_pass_changes_no_token(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """Prompts of several lengths, read at once and in passes of one of two sizes, get the stock tokens: what a layer keeps is carried."""
    folder = make_checkpoint(
        family, spread=0.3, **({} if family in FAMILIES else {**LIKE_OLMOE, **(RECURRENT | COHORTS)[family]})
    )
    prompts = [[3 + (7 * i * j + i) % 90 for j in range(3 + 7 * i)] for i in range(1, 4)]
    stock = load_resident(folder)
    if stock.config.is_encoder_decoder:
        generated = [
            stock.generate(torch.tensor([p]), max_new_tokens=4, do_sample=False, eos_token_id=None) for p in prompts
        ]
        expected = [ids[0, 1:].tolist() for ids in generated]
    else:
        expected = [greedy(stock, prompt, 4) for prompt in prompts]
    for chunk in ((3, 7)[PASSED.index(family) % 2], 512):
        with LLM(folder, device="cpu", slots=9, max_length=48, max_batch=3, prefill_chunk=chunk) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
        assert [list(output.token_ids) for output in outputs] == expected, chunk


def test_a_cache_of_unknown_kind_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """Layers that keep what no pass of ours was tested with are refused by kind, before anything is loaded."""
    folder = make_checkpoint(
        "deepseek_v32", **{**FAMILIES["deepseek_v3"].tiny, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16}
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="whose cache LLM cannot serve"):
        LLM(folder, device="cpu")


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"is_causal": False}, UnsupportedModelError, "bidirectional_attention"),
        (
            {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
            UnsupportedModelError,
            "linear_att",
        ),
        ({"layer_types": ["chunked_attention", "full_attention", "full_attention"]}, CheckpointError, "cannot run"),
    ],
)
def test_attention_that_the_family_has_not_is_refused(
    config: dict, error: type[Exception], match: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Tokens that see later ones, layers with a state, and layers of other families are refused before loading."""
    folder = Path(shutil.copytree(make_checkpoint("mixtral"), tmp_path / "odd"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(error, match=match):
        LLM(folder, device="cpu")
