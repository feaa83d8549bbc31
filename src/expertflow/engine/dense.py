"""The dense part of a captured step: the model's own modules, with attention and norms as single kernels.

What a module computes stays what its class says; only how many launches it takes changes. Done where a module is of a
form the kernels know, for as long as a step runs. A family whose attention has another form keeps its own.
Knows modules by their attributes; refuses to know families.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from expertflow.kernels.backend import Backend, backend
from expertflow.models.skeleton import Skeleton

ATTENTION = "expertflow_decode"
_NORMS = ("RMSNorm", "SwitchTransformersLayerNorm")
"""How the names of norms end that divide by the root of the mean square and have no bias."""
_WIDE_NORMS = ("gpt_oss",)
"""Families whose norm multiplies by its weight in float32."""


class DenseParts:
    """Puts the kernels in place of a model's attention and norms, and takes them out again.

    Args:
        model: loaded model.
        skeleton: of it.
        windows: each attention layer's sliding window, or None.

    Attributes:
        rows: int64 `[B]`, of keys and values, of the running step; to be set before the model runs.
        positions: int64 `[B]`, of its tokens; likewise.
    """

    def __init__(self, model: PreTrainedModel, skeleton: Skeleton, windows: Sequence[int | None]) -> None:
        """Find the modules."""
        self._config: Any = model.config.get_text_config(decoder=True)
        self._windows = windows
        self._kernels: Backend = backend(model.device)
        self._own = self._config._attn_implementation  # noqa: SLF001 - transformers offers no other way to read it
        self._wide = skeleton.config.model_type in _WIDE_NORMS
        self._norms = [module for module in model.modules() if _is_norm(module)]
        self._attentions = [module for module in model.modules() if _is_attention(module, self._config)]
        self.rows = self.positions = torch.zeros(0, dtype=torch.long)

    @property
    def attends(self) -> bool:
        """Whether attention is ours; it then finds its rows among all of them."""
        return bool(self._attentions)

    def attach(self) -> None:
        """The kernels run from now on."""
        for norm in self._norms:
            norm.forward = self._norm(norm)
        if self._attentions:
            self._config._attn_implementation = ATTENTION  # noqa: SLF001
        for attention in self._attentions:
            attention.expertflow_attend = self._attend

    def detach(self) -> None:
        """The modules' own code runs from now on."""
        for norm in self._norms:
            del norm.forward
        if self._attentions:
            self._config._attn_implementation = self._own  # noqa: SLF001
        for attention in self._attentions:
            del attention.expertflow_attend

    def _norm(self, module: Any) -> Callable[[Tensor], Tensor]:
        def forward(states: Tensor) -> Tensor:
            return self._kernels.rms_norm(states, module.weight, module.variance_epsilon, wide=self._wide)

        return forward

    def _attend(self, module: Any, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """`[B, Q, 1, D]` over keys and values of all rows to `[B, 1, Q, D]`."""
        window, sinks = self._windows[module.layer_idx], getattr(module, "sinks", None)
        asked = query[:, :, 0].contiguous()
        where = self.rows, self.positions
        return self._kernels.decode_attention(asked, keys, values, where, scale, window, sinks)[:, None]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(_NORMS) and hasattr(module, "variance_epsilon")


def _is_attention(module: nn.Module, config: Any) -> bool:
    """Whether keys and values are cached as attention reads them, in heads of a width the kernel takes."""
    if getattr(config, "kv_lora_rank", None) or not hasattr(module, "layer_idx") or not hasattr(module, "scaling"):
        return False
    width = getattr(module, "head_dim", 0)
    return width >= 16 and width & (width - 1) == 0


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The attention implementation `expertflow_decode`; the mask says nothing that positions and windows do not."""
    del attention_mask
    return module.expertflow_attend(module, query, key, value, scaling), None


AttentionInterface.register(ATTENTION, attend)
