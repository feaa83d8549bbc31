"""Options of `expertflow serve` that are no fields of `EngineConfig` as they stand. Must not import torch and FastAPI."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from expertflow.errors import ConfigError

_NEEDED = ("fastapi", "uvicorn", "orjson", "prometheus_client")


def read_options(engine: Mapping[str, Any], length: str, share: float | None) -> dict[str, Any]:
    """Fields of `EngineConfig` for a server.

    Args:
        engine: those that were given.
        length: of sequences: a number, `32k`, or `auto`.
        share: of the GPU's memory, or None.

    Raises:
        ConfigError: if a length is none, both ways to state a budget are used, or what the server needs is not installed.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"serve needs {', '.join(missing)}", "Install it: pip install 'expertflow-moe[serve]'.")
    if share is not None and "gpu_memory" in engine:
        raise ConfigError("gpu_memory and gpu_memory_utilization are both given", "They state the same budget: give one.")
    return dict(engine) if length == "auto" else {**engine, "max_length": parse_length(length)}


def parse_length(text: str) -> int:
    """Tokens: `4096`, `32k` (32,000) or `32K` (32,768).

    Raises:
        ConfigError: if it is none.
    """
    digits, scale = text, 1
    for ending, factor in (("k", 1000), ("K", 1024)):
        if text.endswith(ending):
            digits, scale = text[:-1], factor
    if not (digits.isdecimal() and digits.isascii() and len(digits) < 10 and int(digits)):
        raise ConfigError(f"max_model_len={text!r} is no number of tokens", "Write it like 4096, 32k or auto.")
    return int(digits) * scale
