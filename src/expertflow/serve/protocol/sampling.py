"""From the fields of a request to `SamplingParams`. Must not know requests and prompts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertflow.config import SamplingParams
from expertflow.errors import ConfigError
from expertflow.serve.protocol.errors import bad

_SAME_NAMES = ("temperature", "top_p", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens")
_SEEDS = 2**63
DEFAULTS: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""How tokens are chosen where neither the request nor the model's `generation_config.json` says it."""


def sampling(fields: Mapping[str, Any], defaults: Mapping[str, Any], most: int | None) -> SamplingParams:
    """How to choose tokens and when to stop.

    Args:
        fields: honoured fields of the request.
        defaults: of the model, by names of `SamplingParams`; see `DEFAULTS`.
        most: tokens to generate at most where the request does not say it; None: as many as fit.

    Raises:
        ApiError: if the fields' values contradict each other or mean nothing.
    """
    given = {name: fields[name] for name in _SAME_NAMES if name in fields}
    if "top_k" in fields:
        given["top_k"] = max(0, fields["top_k"])  # -1 is vLLM's way to say all
    if "seed" in given:
        given["seed"] %= _SEEDS
    given["max_tokens"] = fields.get("max_completion_tokens", fields.get("max_tokens", most))
    try:
        return SamplingParams(**{**DEFAULTS, **defaults, **given})
    except ConfigError as error:
        param = next((name for name in (*given, *DEFAULTS) if error.what.startswith(f"{name}=")), None)
        raise bad(param, error.what, error.remedy) from error


def choices(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters of each of `count` answers to one prompt: a stated seed is that of the first one, and one more for each further."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=(params.seed + place) % _SEEDS) for place in range(count)]
