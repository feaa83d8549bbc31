"""How much host memory beginnings of prompts are kept in, and why none are. Pure. Must not know requests and pages."""

from expertflow.config import EngineConfig
from expertflow.errors import ConfigError
from expertflow.execution.kv.layout import PAGE
from expertflow.models.shape import ModelShape
from expertflow.units import parse_bytes

AUTO_BYTES = 4 << 30
"""Where it is auto: 40 to 170 thousand tokens of models of 20 to 30 billion parameters."""
BUFFER_BYTES = 8 << 20
"""Of the buffer on the device that pages pass through, unless one takes more: transfers of 8 MiB use the link in full."""


def plan_prefix(config: EngineConfig, shape: ModelShape, refusal: str) -> int:
    """Return the bytes of host memory.

    Args:
        config: the options.
        shape: the model's figures.
        refusal: why no beginning of a prompt can be used again; empty if it can.

    Raises:
        ConfigError: if memory is stated and cannot be used.
    """
    if str(config.prefix_memory) == "0":
        return 0
    if not any(layer.in_pages for layer in shape.kv):
        refusal = f"keys and values of {shape.model_type!r} do not lie in pages here"
    if config.prefix_memory == "auto":
        return 0 if refusal else AUTO_BYTES
    if refusal:
        raise ConfigError(f"prefix_memory={config.prefix_memory} cannot be used: {refusal}", "Leave it out.")
    return parse_bytes(config.prefix_memory, "prefix_memory")


def buffer_bytes(shape: ModelShape) -> int:
    """Bytes of the buffer on the device that pages pass through on their way."""
    return max(BUFFER_BYTES, PAGE * sum(layer.bytes_per_token for layer in shape.kv if layer.in_pages))
