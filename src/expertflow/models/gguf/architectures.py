"""The architectures of GGUF files that run: what their metadata and tensors are called in transformers.

Own tables, because transformers' readers fail on gpt-oss and make a dense model of Mixtral. A key or tensor that no table
knows is refused, since it may change what the model computes. Must not know bytes and files.
Source: llama.cpp's `convert_hf_to_gguf.py`, `gguf/constants.py` (0.19.0), and what llama.cpp computes for each architecture.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from expertflow.errors import CheckpointError, UnsupportedModelError
from expertflow.formats.published.gguf import METHOD
from expertflow.models.gguf.header import GgufTensor, Header

_ANOTHER = "Make the file again with a current llama.cpp, or give the checkpoint that it was made from."
_BLOCK = re.compile(r"blk\.(?P<layer>0|[1-9]\d{0,8})\.(?P<rest>.+)")
_EXPERTS = "mlp.experts."


def _named(**names: str) -> Mapping[str, str]:
    return MappingProxyType(names)


_SIZES = _named(
    hidden_size="embedding_length", num_hidden_layers="block_count", num_attention_heads="attention.head_count",
    num_key_value_heads="attention.head_count_kv", rms_norm_eps="attention.layer_norm_rms_epsilon",
    max_position_embeddings="context_length", num_experts_per_tok="expert_used_count",
)  # fmt: skip
"""Keys of a config by keys of metadata, alike in all architectures."""
_ATTENTION = MappingProxyType({
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
})  # fmt: skip
_BIASES = MappingProxyType({
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
})  # fmt: skip
_ROUTED = MappingProxyType({
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
})  # fmt: skip
_STACKED = MappingProxyType({
    "ffn_gate_exps.weight": "mlp.experts.gate_up_proj.0",
    "ffn_up_exps.weight": "mlp.experts.gate_up_proj.1",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
})  # fmt: skip
"""Tensors of all experts of a layer; those that are joined have their place behind the name."""
_FUSED = MappingProxyType({**_STACKED, "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj"})
"""Where a module has gate and up one after another, a file may, too."""
_WHOLE = MappingProxyType({
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
})  # fmt: skip
_NEUTRAL = frozenset({"vocab_size", "feed_forward_length", "rope.scaling.finetuned"})
"""Keys of metadata that change nothing where they are not read: the vocabulary's size is that of its tensor."""
_STATED = MappingProxyType({"expert_weights_scale": 1.0, "attention.causal": True, "rope.scaling.yarn_ext_factor": 1.0})
"""Values that further keys have if they are there, in all architectures."""
_COMPARED = frozenset({"attention.key_length", "attention.value_length", "rope.dimension_count"})
"""Keys of metadata that have to say the same: the width of a head."""
_ROPE = frozenset({"rope.freq_base", "rope.scaling.type"})
_SCALING = MappingProxyType({
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of GGUF files.

    Attributes:
        name: as files state it.
        model_type: in transformers.
        sizes: further keys of the config, by keys of metadata.
        fixed: keys of the config that files do not state.
        stated: values that keys of metadata have if they are there.
        tensors: names of a block's tensors, as in the module.
        head_dim: whether the config states the width of a head; else it is hidden size over heads.
        yarn: what files do not state of a rotary table that is scaled by yarn.
        permuted: whether rows of Q and K alternate between the halves of each head.
        reordered: whether the module has experts' weights in another order than the file, input-major or interleaved.
    """

    name: str
    model_type: str
    sizes: Mapping[str, str]
    tensors: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    stated: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    head_dim: bool = True
    yarn: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    permuted: bool = False
    reordered: bool = False


_ENTRIES = (
    Architecture(
        name="qwen3moe",
        model_type="qwen3_moe",
        sizes=_named(num_experts="expert_count", moe_intermediate_size="expert_feed_forward_length"),
        fixed=MappingProxyType({"norm_topk_prob": True, "decoder_sparse_step": 1}),
        stated=MappingProxyType({**_STATED, "expert_weights_norm": True, "expert_gating_func": 1}),
        tensors=MappingProxyType({
            **_ATTENTION, **_ROUTED, **_FUSED,
            "attn_q_norm.weight": "self_attn.q_norm.weight",
            "attn_k_norm.weight": "self_attn.k_norm.weight",
        }),
    ),
    Architecture(
        name="qwen2moe",
        model_type="qwen2_moe",
        sizes=_named(
            num_experts="expert_count", moe_intermediate_size="expert_feed_forward_length",
            shared_expert_intermediate_size="expert_shared_feed_forward_length",
        ),
        fixed=MappingProxyType({"norm_topk_prob": False, "decoder_sparse_step": 1}),
        stated=MappingProxyType({**_STATED, "expert_weights_norm": False, "expert_gating_func": 1, "expert_shared_count": 1}),
        tensors=MappingProxyType({
            **_ATTENTION, **_BIASES, **_ROUTED, **_FUSED,
            "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
            "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
            "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
            "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
        }),
        head_dim=False,
    ),
    Architecture(
        name="gpt-oss",
        model_type="gpt_oss",
        sizes=_named(
            num_local_experts="expert_count", intermediate_size="expert_feed_forward_length",
            sliding_window="attention.sliding_window",
        ),
        stated=MappingProxyType({**_STATED, "attention.sliding_window_pattern": 2}),
        tensors=MappingProxyType({
            **_ATTENTION, **_BIASES, **_STACKED,
            "attn_output.bias": "self_attn.o_proj.bias",
            "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm.weight": "post_attention_layernorm.weight",
            "ffn_gate_inp.weight": "mlp.router.weight",
            "ffn_gate_inp.bias": "mlp.router.bias",
            "ffn_gate_exps.bias": "mlp.experts.gate_up_proj_bias.0",
            "ffn_up_exps.bias": "mlp.experts.gate_up_proj_bias.1",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        }),
        yarn=MappingProxyType({"truncate": False}),
        reordered=True,
    ),
    Architecture(
        name="llama",
        model_type="mixtral",
        sizes=_named(num_local_experts="expert_count", intermediate_size="feed_forward_length"),
        fixed=MappingProxyType({"sliding_window": None}),
        stated=MappingProxyType({**_STATED, "expert_weights_norm": True, "expert_gating_func": 1}),
        tensors=MappingProxyType({**_ATTENTION, **_ROUTED, **_FUSED}),
        permuted=True,
    ),
)  # fmt: skip
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({one.name: one for one in _ENTRIES})
"""By the name that files state."""


def architecture_of(header: Header, name: str) -> Architecture:
    """The architecture of a file.

    Args:
        header: of the file.
        name: of the file, for messages.

    Raises:
        UnsupportedModelError: if there is no table for it, or it has no experts.
    """
    stated, kind = header.metadata.get("general.architecture"), header.metadata.get("general.type", "model")
    if kind != "model":
        raise UnsupportedModelError(f"{name} holds a {kind}, and no model", "Give the file of the model itself.")
    if stated not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name} is of the architecture {stated!r}; of GGUF files {', '.join(ARCHITECTURES)} with experts run",
            "Give the checkpoint that it was made from; `expertflow models` lists the families that run.",
        )
    if not header.metadata.get(f"{stated}.expert_count"):
        raise UnsupportedModelError(
            f"{name} has no experts: it is no Mixture-of-Experts model", "Give a Mixture-of-Experts model."
        )
    return ARCHITECTURES[str(stated)]


def config_of(architecture: Architecture, header: Header, name: str) -> dict[str, Any]:
    """What config.json of the same model says.

    Args:
        architecture: of the file.
        header: of the file.
        name: of the file, for messages.

    Raises:
        CheckpointError: if the metadata lack a key, or disagree with each other.
        UnsupportedModelError: if a key may change what the model computes in a way that is not known.
    """
    read = _Metadata(architecture, header, name)
    sizes = {key: read.number(stated) for key, stated in {**_SIZES, **architecture.sizes}.items()}
    if (embedding := header.tensors.get("token_embd.weight")) is None:
        raise CheckpointError(f"{name} has no tensor 'token_embd.weight'", "Fetch it again.")
    width = read.width(int(sizes["hidden_size"]), int(sizes["num_attention_heads"]), own=architecture.head_dim)
    read.refuse_unknown({*_SIZES.values(), *architecture.sizes.values()})
    return {
        "model_type": architecture.model_type,
        **architecture.fixed,
        **sizes,
        **({"head_dim": width} if architecture.head_dim else {}),
        **read.tokens(embedding.shape[0]),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": read.rope(),
        "dtype": _dtype(header.tensors),
        "quantization_config": {"quant_method": METHOD},
    }


def _dtype(tensors: Mapping[str, GgufTensor]) -> str:
    """The dtype to run in: of the experts, if all are of one type that a model can run in."""
    types = {tensor.type for name, tensor in tensors.items() if name.endswith("_exps.weight")}
    return {"F32": "float32", "F16": "float16"}.get(types.pop(), "bfloat16") if len(types) == 1 else "bfloat16"


class _Metadata:
    """Reads the metadata of one file."""

    def __init__(self, architecture: Architecture, header: Header, name: str) -> None:
        self._about, self._name, self._prefix = header.metadata, name, f"{architecture.name}."
        self._architecture = architecture

    def get(self, key: str) -> Any:
        return self._about.get(self._prefix + key)

    def number(self, key: str) -> int | float:
        """A number; one for each layer only if they are all the same."""
        value = self.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self._name} has {self._prefix}{key}={str(value)[:80]}, which is not one number", _ANOTHER
            )
        return value

    def width(self, hidden: int, heads: int, *, own: bool) -> int:
        """The width of a head, on which all keys about it have to agree."""
        usual = hidden // max(heads, 1)
        width = int(self.number("attention.key_length")) if self.get("attention.key_length") is not None else usual
        stated = {key: self.get(key) for key in _COMPARED}
        if odd := next((key for key, value in stated.items() if value not in (None, width)), None):
            raise UnsupportedModelError(
                f"{self._name} has heads of {width} numbers and {self._prefix}{odd}={stated[odd]}", _ANOTHER
            )
        if width != usual and not own:
            raise UnsupportedModelError(
                f"{self._name} has {heads} heads of {width} numbers, and a hidden size of {hidden}", _ANOTHER
            )
        return width

    def rope(self) -> dict[str, Any]:
        """What transformers calls `rope_parameters`."""
        kind = self.get("rope.scaling.type") or "none"
        base = self.number("rope.freq_base") if self.get("rope.freq_base") is not None else 10000.0
        found = {"rope_theta": base, "rope_type": "default"}
        scaling = {ours: self.number(key) for key, ours in _SCALING.items() if self.get(key) is not None}
        if kind == "none":
            return found
        wanted = {"linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"}}.get(kind)
        if wanted is None:
            raise UnsupportedModelError(f"{self._name} scales its rotary table by {kind!r}", _ANOTHER)
        if lacking := sorted(wanted - scaling.keys()):
            raise CheckpointError(
                f"{self._name} scales its rotary table by {kind} and states no {lacking[0]}", _ANOTHER
            )
        if kind == "linear":
            return {**found, "rope_type": kind, "factor": scaling["factor"]}
        return {**found, "rope_type": kind, "beta_fast": 32.0, "beta_slow": 1.0, **scaling, **self._architecture.yarn}

    def tokens(self, vocabulary: int) -> dict[str, Any]:
        """Tokens that begin, end and fill a text."""
        ids = {
            name: value
            for name in ("bos", "eos", "eot", "padding")
            if isinstance(value := self._about.get(f"tokenizer.ggml.{name}_token_id"), int) and value < vocabulary
        }
        ends = sorted({ids[name] for name in ("eos", "eot") if name in ids})
        return {"bos_token_id": ids.get("bos"), "eos_token_id": ends or None, "pad_token_id": ids.get("padding")}

    def refuse_unknown(self, sizes: set[str]) -> None:
        """Refuse a key about the architecture that nothing reads, and one that says what is not computed here."""
        known = sizes | _NEUTRAL | _COMPARED | _ROPE | _SCALING.keys()
        for key in self._about:
            own = key.removeprefix(self._prefix)
            if own == key or own in known:
                continue
            stated = self._architecture.stated
            if own not in stated or self._about[key] != stated[own]:
                raise UnsupportedModelError(
                    f"{self._name} has {key}={str(self._about[key])[:80]}, which is not computed here", _ANOTHER
                )


def key_of(architecture: Architecture, tensor: str, layers: int) -> str:
    """The name that a tensor has in the module.

    Args:
        architecture: of the file.
        tensor: its name in the file.
        layers: of the model.

    Returns:
        The parameter's name; for experts that are joined, such as gate and up, followed by `.` and their place.

    Raises:
        UnsupportedModelError: if the table does not have it.
    """
    if tensor in _WHOLE:
        return _WHOLE[tensor]
    found = _BLOCK.fullmatch(tensor)
    name = architecture.tensors.get(found["rest"]) if found is not None else None
    if found is None or name is None or int(found["layer"]) >= layers:
        raise UnsupportedModelError(
            f"the GGUF file has a tensor {tensor!r}, which models of {architecture.name!r} with {layers} layers are not known to have",
            _ANOTHER,
        )
    return f"model.layers.{int(found['layer'])}.{name}"
