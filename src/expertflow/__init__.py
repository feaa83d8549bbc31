"""ExpertFlow: Mixture-of-Experts models inside a GPU memory budget you state, with the full model's exact output.

Exact means the bits of stock transformers with `experts_implementation="eager"`, which is not its default.
`LLM`, `SamplingParams` and `from_pretrained` are imported on first use, so that light commands need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from expertflow.config import EngineConfig, SamplingParams
from expertflow.errors import ExpertFlowError

if TYPE_CHECKING:
    from expertflow.engine.llm import LLM
    from expertflow.engine.plain import from_pretrained
    from expertflow.engine.request import RequestOutput, StreamOutput

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "EngineConfig",
    "ExpertFlowError",
    "RequestOutput",
    "SamplingParams",
    "StreamOutput",
    "from_pretrained",
]
_LAZY = {
    "LLM": "expertflow.engine.llm",
    "from_pretrained": "expertflow.engine.plain",
    "RequestOutput": "expertflow.engine.request",
    "StreamOutput": "expertflow.engine.request",
}


def __getattr__(name: str) -> Any:
    """Import the heavy names at their first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'expertflow' has no attribute {name!r}")
