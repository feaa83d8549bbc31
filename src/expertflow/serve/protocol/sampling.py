"""From the fields of a request to `SamplingParams`. Must not know requests and prompts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expertflow.config import SamplingParams
from expertflow.errors import ConfigError
from expertflow.serve.protocol.errors import bad

_SAME_NAMES = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "min_tokens",
    "prompt_logprobs", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
)  # fmt: skip
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
    given["logprobs"] = _logprobs(fields)
    if fields.get("echo") and given["logprobs"] is not None:
        given.setdefault("prompt_logprobs", given["logprobs"])
    if fields.get("stream") and "prompt_logprobs" in given:
        raise bad("prompt_logprobs", "log-probabilities of the prompt are not streamed", "Leave stream out.")
    given["max_tokens"] = fields.get("max_completion_tokens", fields.get("max_tokens", most))
    try:
        return SamplingParams(**{**DEFAULTS, **defaults, **given})
    except ConfigError as error:
        param = next((name for name in (*given, *DEFAULTS) if error.what.startswith(f"{name}=")), None)
        raise bad(param, error.what, error.remedy) from error


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    """How many most probable tokens are wanted beside each: chats say it in two fields, completions in one."""
    wanted, most = fields.get("logprobs"), fields.get("top_logprobs")
    if most and not wanted:
        raise bad("top_logprobs", "top_logprobs is given and logprobs is not true", "Set logprobs.")
    return (most or 0 if wanted else None) if isinstance(wanted, bool) else wanted


def choices(params: SamplingParams, count: int) -> list[SamplingParams]:
    """Parameters of each of `count` answers to one prompt: a stated seed is that of the first one, and one more for each further."""
    if params.seed is None:
        return [params] * count
    return [replace(params, seed=(params.seed + place) % _SEEDS) for place in range(count)]
