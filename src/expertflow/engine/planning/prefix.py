"""How much host memory beginnings of prompts are kept in, and why none are. Pure. Must not know requests and pages."""

from typing import NamedTuple

from expertflow.config import EngineConfig
from expertflow.errors import ConfigError
from expertflow.execution.kv.layout import PAGE
from expertflow.models.shape import ModelShape
from expertflow.units import parse_bytes

AUTO_BYTES, AUTO_PROMPTS = 4 << 30, 32
"""Where it is auto: 40 to 170 thousand tokens of models of 20 to 30 billion parameters; and no more than so many prompts of full length."""
BUFFER_BYTES = 8 << 20
"""Of the buffer on the device that pages pass through, unless one takes more: transfers of 8 MiB use the link in full."""


class PrefixPlan(NamedTuple):
    """Bytes of host memory, and why they are none although they are auto; else empty."""

    nbytes: int
    reason: str = ""


def plan_prefix(config: EngineConfig, shape: ModelShape, length: int, refusal: str) -> PrefixPlan:
    """Decide how much host memory there is.

    Args:
        config: the options.
        shape: the model's figures.
        length: tokens of a sequence at most.
        refusal: why no beginning of a prompt can be used again; empty if it can.

    Raises:
        ConfigError: if memory is stated and cannot be used.
    """
    if str(config.prefix_memory) == "0":
        return PrefixPlan(0)
    if not any(layer.in_pages for layer in shape.kv):
        refusal = f"keys and values of {shape.model_type!r} do not lie in pages here"
    if config.prefix_memory == "auto":
        token = sum(layer.bytes_per_token for layer in shape.kv if layer.in_pages)
        return PrefixPlan(0, refusal) if refusal else PrefixPlan(min(AUTO_BYTES, AUTO_PROMPTS * length * token))
    if refusal:
        raise ConfigError(f"prefix_memory={config.prefix_memory} cannot be used: {refusal}", "Leave it out.")
    return PrefixPlan(parse_bytes(config.prefix_memory, "prefix_memory"))


def buffer_bytes(shape: ModelShape) -> int:
    """Bytes of the buffer on the device that pages pass through on their way."""
    return max(BUFFER_BYTES, PAGE * sum(layer.bytes_per_token for layer in shape.kv if layer.in_pages))
