"""Check a config before a model is built from it: building 10^9 layers would never end.

Checked are only sizes and switches that this program cannot work with. Whether a config fits its weights is checked on
their headers, and everything else by transformers itself. Must not know families.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expertflow.errors import CheckpointError, ExpertFlowError, HostMemoryError
from expertflow.limits import lacks_memory

_LAYERS = re.compile(r"(num|n|encoder|decoder)_(\w+_)?layers?|layers")
_EXPERTS = re.compile(r"(\w+_)?(num|n)_(\w+_)?experts")
_SIZES = re.compile(r"\w+_(size|dim|rank|heads|width|embeddings)|d_(model|ff|kv)")
_MOST = ((_LAYERS, 1 << 10), (_EXPERTS, 1 << 14), (_SIZES, (1 << 31) - 1))
"""Keys, and the most that a model of that many layers, experts, or columns could have."""
_POSITIVE = frozenset({
    "vocab_size", "hidden_size", "d_model", "num_hidden_layers", "num_layers", "n_layer", "num_attention_heads", "num_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "attention_chunk_size", "num_experts",
    "num_local_experts", "n_routed_experts", "num_experts_per_tok",
})  # fmt: skip
"""Keys whose value has to be a number of 1 or more, or null."""
_FIXED = MappingProxyType({"return_dict": True, "torchscript": False})
"""Switches of transformers that this program cannot work with otherwise."""
_TOKENS = frozenset({"eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id"})
_UNBOUNDED = frozenset({"time_step_limit", "__float__"})
"""Keys that may hold infinity."""


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse values that nothing can be built from.

    Args:
        path: of the config, for the message.
        config: its content.

    Raises:
        CheckpointError: naming key and value.
    """
    for key, value in _entries(config):
        if fault := _fault(key, value):
            raise CheckpointError(
                f"{path} has {key}={str(value)[:80]}, {fault}", "Correct it, or fetch the config again."
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values, those of parts such as `text_config` and of lists included."""
    for key, value in config.items():
        yield key, value
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _entries(part)
            elif isinstance(value, list) and not isinstance(part, list):
                yield f"{key}[]", part


def _fault(key: str, value: Any) -> str:
    """What is wrong with a value; empty if nothing is known to be."""
    if key in _FIXED and value is not _FIXED[key]:
        return f"and only {str(_FIXED[key]).lower()} can be run"
    return _wrong_type(key, value) or _out_of_bounds(key, value)


def _wrong_type(key: str, value: Any) -> str:
    if key.removesuffix("[]") in _TOKENS and not (
        value is None or type(value) in ((int,) if key[-1] == "]" else (int, list))
    ):
        return "which is no token id"
    if key in {"dtype", "torch_dtype"} and not isinstance(value, str | None):
        return "which is no name of a type"
    if isinstance(value, float) and not math.isfinite(value) and key.removesuffix("[]") not in _UNBOUNDED:
        return "which is no number"
    return "which is no whole number" if key in _POSITIVE and type(value) not in (int, type(None)) else ""


def _out_of_bounds(key: str, value: Any) -> str:
    if type(value) is not int:
        return ""
    if key in _POSITIVE and value < 1:
        return "which is less than 1"
    most = next((most for pattern, most in _MOST if pattern.fullmatch(key)), (1 << 63) - 1)
    return f"which is more than {most}" if value > most else "which is less than -2^63" if value < -(1 << 63) else ""


@contextmanager
def describing(path: Path, what: str) -> Iterator[None]:
    """Turn what library code raises inside into an error about a file of the checkpoint.

    Args:
        path: the file.
        what: what is wrong with it then, such as `describes no model that can be built`.

    Raises:
        CheckpointError: for an error of the library.
        HostMemoryError: if memory is short.
    """
    try:
        yield
    except ExpertFlowError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise HostMemoryError(f"the host has too little memory: {_first_line(error)}", "Free memory.") from error
        raise CheckpointError(
            f"{path} {what}: {type(error).__name__}: {_first_line(error)}",
            "Checkpoint and config.json disagree: fetch both again.",
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
