"""Small GGUF files, written by the package `gguf` from small checkpoints, and the same weights decoded by it in transformers' format.

Names of tensors come from the package's own table, the order of rows from llama.cpp's converter. Metadata are written as that
converter writes them.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from helpers import load_resident

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe", "gpt_oss": "gpt-oss", "mixtral": "llama"}
_SCALES = {"Q4_K": (0, 2e-4, 1.4e-3), "Q5_K": (0, 1e-4, 1.4e-3), "Q6_K": (208, 3e-5, None)}
"""Where a block of random codes has its first scale, and scales with which its numbers are of the size of weights."""
Types = Callable[[str], str]
"""The type of a tensor by its name in the file."""
Written = dict[str, tuple[np.ndarray, Type]]
"""Data and type by name in the file."""


def write(
    source: Path, place: Path, types: Types, dtype: str, *, fused: bool = False, **options: Any
) -> tuple[Path, Path]:
    """A checkpoint as a GGUF file and as its decoded twin. `fused`: gate and up of experts in one tensor; `options` are of `save`."""
    model = load_resident(source)
    config, state = model.config, model.state_dict()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    random, written = np.random.default_rng(0), {}
    for key, value in state.items():
        decoded = []
        for module, kind, tensor in split(key, value.float(), reordered=config.model_type == "gpt_oss"):
            name = f"{table.get_name(module)}.{kind}"
            heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
            turned = heads.get(name.partition(".")[2].partition(".")[2]) if config.model_type == "mixtral" else None
            data = (tensor if turned is None else permute(tensor, turned)).squeeze().numpy()
            type_ = types(name) if data.ndim > 1 and "gate_inp" not in name and kind == "weight" else "F32"
            packed = pack(np.ascontiguousarray(data), type_, random)
            written[name] = (packed, Type[type_])
            numbers = torch.from_numpy(gguf.dequantize(packed, Type[type_]).copy()).view(tensor.shape)
            decoded.append(numbers if turned is None else unpermute(numbers, turned))
        state[key] = join(key, decoded, reordered=config.model_type == "gpt_oss").to(getattr(torch, dtype))
    for name in [name for name in written if fused and "gate_exps" in name]:
        (gate, type_), (up, _) = written.pop(name), written.pop(name.replace("gate", "up"))
        written[name.replace("gate", "gate_up")] = (np.concatenate([gate, up], axis=1), type_)
    model.to(getattr(torch, dtype)).load_state_dict(state)
    model.save_pretrained(place / "decoded")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for folder in (place, place / "decoded"):
            (folder / name).write_bytes((source / name).read_bytes())
    return save(place / "model.gguf", config, written, **options), place / "decoded"


def split(key: str, value: Tensor, *, reordered: bool) -> Iterator[tuple[str, str, Tensor]]:
    """A parameter's tensors as files have them, outputs first, with the module's name and `weight` or `bias`."""
    base, _, name = key.rpartition(".")
    if not base.endswith(".experts"):
        yield (base, name, value) if name in {"weight", "bias"} else (key, "weight", value)
        return
    kind = "bias" if name.endswith("_bias") else "weight"
    if reordered and kind == "weight":
        value = value.mT
    if name.startswith("down"):
        yield f"{base}.down_proj", kind, value
        return
    halves = (value[:, ::2], value[:, 1::2]) if reordered else value.chunk(2, dim=1)
    for half, one in zip(("gate_proj", "up_proj"), halves, strict=True):
        yield f"{base}.{half}", kind, one


def join(key: str, parts: list[Tensor], *, reordered: bool) -> Tensor:
    """The parameter of its tensors: the reverse of `split`."""
    whole = parts[0]
    if len(parts) == 2:
        whole = torch.stack(parts, dim=2).flatten(1, 2) if reordered else torch.cat(parts, dim=1)
    turned = reordered and key.endswith((".gate_up_proj", ".down_proj"))
    return whole.mT.contiguous() if turned else whole


def permute(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's converter does with Q and K."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """The reverse, row by row."""
    return weight[torch.argsort(permute(torch.arange(len(weight))[:, None], heads)[:, 0])]


def pack(data: np.ndarray, type_: str, random: np.random.Generator) -> np.ndarray:
    """Quantised by the package; random blocks of types that it only decodes."""
    if type_ not in _SCALES:
        return gguf.quantize(data, Type[type_])
    per, size = gguf.GGML_QUANT_SIZES[Type[type_]]
    at, scale, least = _SCALES[type_]
    blocks = random.integers(0, 256, (data.size // per, size), dtype=np.uint8)
    for place, each in ((at, scale), (at + 2, least)):
        if each is not None:
            blocks[:, place : place + 2] = np.array([each], np.float16).view(np.uint8)
    return blocks.reshape(*data.shape[:-1], -1)


def save(path: Path, config: Any, written: Written, *, parts: int = 0, change: Mapping[str, Any] | None = None) -> Path:
    """Write the file, or so many parts; returns the file, or the first part. `change`: metadata to replace, None to leave out."""
    writer = gguf.GGUFWriter(
        None if parts else path,
        ARCHITECTURES[config.model_type],
        **({"split_max_tensors": -(-len(written) // parts)} if parts else {}),
    )
    for key, value in {**metadata(config), **(change or {})}.items():
        if value is not None:
            add(writer, key, value)
    for name, (data, type_) in written.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf") if parts else path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """One entry of metadata, of the type that converters give it."""
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](key, value)


def metadata(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a config, the architecture excepted."""
    arch, rope = ARCHITECTURES[config.model_type], config.rope_parameters
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stated = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope["rope_theta"]), "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }  # fmt: skip
    own = {
        "qwen3_moe": lambda: {
            "expert_feed_forward_length": config.moe_intermediate_size, "attention.key_length": width,
            "attention.value_length": width,
        },
        "qwen2_moe": lambda: {
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        },
        "gpt_oss": lambda: {
            "expert_feed_forward_length": config.intermediate_size, "attention.key_length": width,
            "attention.value_length": width, "attention.sliding_window": config.sliding_window,
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        },
        "mixtral": lambda: {"vocab_size": config.vocab_size, "rope.dimension_count": width},
    }  # fmt: skip
    stated |= own[config.model_type]()
    return {
        "general.name": "tiny",
        **{f"{arch}.{key}": value for key, value in stated.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token {number}" for number in range(config.vocab_size)],
        "tokenizer.ggml.scores": [0.0] * config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }
