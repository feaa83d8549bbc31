"""The families with an exactness test of their own, one entry each.

A family listed here is run by the expert loop (`models.experts`) or a class swap (`models.switch`), and the tests
make a small checkpoint of it from `tiny`. Any other family of transformers' experts registry is run by its own
forward with weights fetched one expert at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {
    **_BASE,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 4,
    "topk_group": 3,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        model_type: as in config.json.
        title: name in messages and tables.
        examples: well-known checkpoints.
        tiny: config values of a small model of the family, for tests and demos.
        activation: of the experts, by the kernels' name for it; empty: the config's `hidden_act`.
        no_graph: why its decode step cannot be captured; empty if it can.
        rereads_beyond: config key of the length beyond which a sequence has another rotary table and is read anew; empty: none.
        expert_key: pattern of expert tensors in checkpoints, where transformers' conversion table lacks it; groups
            `module`, `expert` and `tensor`.
    """

    model_type: str
    title: str
    examples: str
    tiny: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    activation: str = ""
    no_graph: str = ""
    rereads_beyond: str = ""
    expert_key: str | None = None


def _family(model_type: str, title: str, examples: str, **tiny: Any) -> Family:
    own = {name: tiny.pop(name) for name in ("activation", "no_graph", "rereads_beyond", "expert_key") if name in tiny}
    return Family(
        model_type=model_type, title=title, examples=examples, tiny=MappingProxyType({**_BASE, **tiny}), **own
    )


_ENTRIES = (
    _family("mixtral", "Mixtral", "Mixtral-8x7B, 8x22B", intermediate_size=32, num_local_experts=8, num_experts_per_tok=2),
    _family(
        "qwen2_moe", "Qwen2-MoE", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=4, shared_expert_intermediate_size=64, intermediate_size=64,
    ),
    _family(
        "qwen3_moe", "Qwen3-MoE", "Qwen3-30B-A3B, Qwen3-235B-A22B, Novella", moe_intermediate_size=32, num_experts=8,
        num_experts_per_tok=2, head_dim=16, norm_topk_prob=True, intermediate_size=64,
    ),
    _family("olmoe", "OLMoE", "OLMoE-1B-7B", intermediate_size=32, num_experts=8, num_experts_per_tok=4),
    Family(
        model_type="deepseek_v2", title="DeepSeek-V2", examples="DeepSeek-V2, V2-Lite, DeepSeek-Coder-V2",
        tiny=MappingProxyType({**_MLA, "topk_method": "greedy"}),
    ),
    Family(
        model_type="deepseek_v3", title="DeepSeek-V3", examples="DeepSeek-V3, R1, Moonlight, Kimi-K2",
        tiny=MappingProxyType(_MLA),
    ),
    _family(
        "gpt_oss", "GPT-OSS", "gpt-oss-20b, 120b", intermediate_size=32, num_local_experts=8,
        num_experts_per_tok=4, head_dim=16, sliding_window=8, activation="clamped_swiglu",
    ),
    _family(
        "phimoe", "PhiMoE", "Phi-3.5-MoE, Phi-mini-MoE", intermediate_size=32, num_local_experts=8,
        num_experts_per_tok=2, no_graph="its long-rope code makes a tensor on the host in every step",
        rereads_beyond="original_max_position_embeddings",
    ),
    _family(
        "granitemoe", "Granite MoE", "granite-3.1-1b-a400m, 3b-a800m", intermediate_size=32, num_local_experts=8,
        num_experts_per_tok=4,
    ),
    _family(
        "glm4_moe", "GLM-4 MoE", "GLM-4.5, GLM-4.5-Air, GLM-4.6", moe_intermediate_size=32, n_routed_experts=8,
        num_experts_per_tok=4, n_shared_experts=1, first_k_dense_replace=1, intermediate_size=64, head_dim=16,
    ),
    _family(
        "ernie4_5_moe", "ERNIE 4.5 MoE", "ERNIE-4.5-21B-A3B, 300B-A47B", moe_intermediate_size=32, moe_num_experts=8,
        moe_k=4, moe_num_shared_experts=1, intermediate_size=64,
    ),
    _family(
        "minimax_m2", "MiniMax M2", "MiniMax-M2", intermediate_size=32, num_local_experts=8,
        num_experts_per_tok=4, head_dim=16, rotary_dim=16,
    ),
    Family(
        model_type="switch_transformers", title="Switch Transformers", examples="switch-base-8 ... 256",
        expert_key=r"(?P<module>.+\.experts)\.expert_(?P<expert>\d+)\.(?P<tensor>w[io])\.weight",
        tiny=MappingProxyType({
            "d_model": 64, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
            "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 8, "vocab_size": 96,
            "decoder_start_token_id": 0,
        }),
    ),
)  # fmt: skip
READ_AS = MappingProxyType({"kimi_k2": "deepseek_v3"})
"""Types that transformers has no code for, and the type whose code and config they have."""
FAMILIES = {family.model_type: family for family in _ENTRIES}
REFUSED = {"minimax": "its linear attention needs a cache class of its own"}
"""Registry families that the engine's caches cannot serve, and why."""
