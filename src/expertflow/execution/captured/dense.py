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
        lasts: int64 `[B]`, position of the last token that an encoder has read; likewise, None without an encoder.
    """

    def __init__(self, model: PreTrainedModel, skeleton: Skeleton, windows: Sequence[int | None]) -> None:
        """Find the modules."""
        self._windows = windows
        self._kernels: Backend = backend(model.device)
        self._wide = skeleton.config.model_type in _WIDE_NORMS
        stepping = list(model.get_decoder().modules())
        self._norms = [module for module in stepping if _is_norm(module)]
        self._attentions: list[Any] = [module for module in stepping if _is_attention(module)]
        self._config: Any = self._attentions[0].config if self._attentions else None
        self._own = getattr(self._config, "_attn_implementation", None)  # transformers offers no other way to read it
        self.rows = self.positions = torch.zeros(0, dtype=torch.long)
        self.lasts: Tensor | None = None

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

    def _attend(
        self, module: Any, query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        """`[B, Q, 1, D]` over keys and values of all rows to `[B, 1, Q, D]`; `bias` is `[1, Q, 1, M]`, by distance."""
        asked, attend = query[:, :, 0].contiguous(), self._kernels.decode_attention
        if not module.is_causal:  # over what the encoder has read, all of it alike
            assert self.lasts is not None
            return attend(asked, keys, values, (self.rows, self.lasts), scale)[:, None]
        window, sinks = self._windows[module.layer_idx], getattr(module, "sinks", None)
        by_distance = None if bias is None else bias[0, :, 0]
        return attend(asked, keys, values, (self.rows, self.positions), scale, window, sinks, by_distance)[:, None]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(_NORMS) and hasattr(module, "variance_epsilon")


def _is_attention(module: Any) -> bool:
    """Whether keys and values are cached as attention reads them, in heads of a width the kernel takes."""
    if not all(hasattr(module, name) for name in ("config", "layer_idx", "scaling", "is_causal")):
        return False
    if getattr(module.config, "kv_lora_rank", None):
        return False
    width = getattr(module, "head_dim", getattr(module, "key_value_proj_dim", 0))
    return width >= 16 and width & (width - 1) == 0


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """The attention implementation `expertflow_decode`; the mask says nothing that positions and windows do not."""
    del attention_mask
    return module.expertflow_attend(module, query, key, value, scaling, more.get("position_bias")), None


AttentionInterface.register(ATTENTION, attend)
