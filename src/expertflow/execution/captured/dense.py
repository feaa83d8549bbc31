"""The dense part of a captured step: the model's own modules, with attention and norms as single kernels.

A module computes what its class computes, in fewer launches. A module of a form that the kernels support reads from the
pass's context whether they run; in every other pass its class's own forward runs. Must not know families.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from expertflow.kernels.backend import Backend, backend
from expertflow.models.context import ForwardContext
from expertflow.models.experts import Uncopied
from expertflow.models.skeleton import Skeleton

ATTENTION = "expertflow_decode"
_NORMS = ("RMSNorm", "SwitchTransformersLayerNorm")
"""How the names of norms end that divide by the root of the mean square and have no bias."""
_WIDE_NORMS = ("gpt_oss",)
"""Families whose norm multiplies by its weight in float32."""


class DenseParts:
    """The kernels of a model's attention and norms; passes that carry it as `dense` run them.

    Args:
        model: loaded model.
        skeleton: of it.
        windows: each attention layer's sliding window, or None.
        context: what the model's passes carry.
    """

    def __init__(
        self, model: PreTrainedModel, skeleton: Skeleton, windows: Sequence[int | None], context: ForwardContext
    ) -> None:
        """Make the modules look at the context."""
        self._windows, self._context = windows, context
        self._kernels: Backend = backend(model.device)
        self._wide = skeleton.config.model_type in _WIDE_NORMS
        stepping = list(model.get_decoder().modules())
        self._norms: list[Any] = [module for module in stepping if _is_norm(module)]
        self._attentions: list[Any] = [module for module in stepping if _is_attention(module)]
        for norm in self._norms:
            norm.forward = _norm_forward(norm, context)
        for attention in self._attentions:
            attention.config = AttentionConfig(getattr(attention.config, "own", attention.config), context)

    @property
    def attends(self) -> bool:
        """Whether attention is computed here; it then finds its KV rows among all of them."""
        return bool(self._attentions)

    def norm(self, module: Any, states: Tensor) -> Tensor:
        """What the norm's own forward computes, `[..., H]`."""
        return self._kernels.rms_norm(states, module.weight, module.variance_epsilon, wide=self._wide)

    def attend(
        self, module: Any, query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None
    ) -> Tensor:
        """`[B, Q, 1, D]` over keys and values of all KV rows to `[B, 1, Q, D]`; `bias` is `[1, Q, 1, M]`, by distance."""
        now = self._context.now
        queries, attend = query[:, :, 0].contiguous(), self._kernels.decode_attention
        if not module.is_causal:  # over what the encoder has read, all of it
            assert now.lasts is not None
            return attend(queries, keys, values, (now.rows, now.lasts), scale)[:, None]
        window, sinks = self._windows[module.layer_idx], getattr(module, "sinks", None)
        by_distance = None if bias is None else bias[0, :, 0]
        where = now.rows, now.positions[:, 0]
        return attend(queries, keys, values, where, scale, window, sinks, by_distance)[:, None]


class AttentionConfig(Uncopied):
    """An attention module's config, which names our implementation in passes that carry `dense`.

    Args:
        own: the module's config; every other question goes to it.
        context: what the model's passes carry.
    """

    def __init__(self, own: Any, context: ForwardContext) -> None:
        """Stand in for `own`."""
        self.own, self.context = own, context

    def __getattr__(self, name: str) -> Any:
        """As of the module's config."""
        return getattr(self.own, name)

    @property
    def _attn_implementation(self) -> Any:  # transformers offers no other way to choose it
        return self.own._attn_implementation if self.context.now.dense is None else ATTENTION  # noqa: SLF001


def _norm_forward(module: nn.Module, context: ForwardContext) -> Callable[[Tensor], Tensor]:
    """A norm's forward that looks at the context; it must not keep the module alive, which keeps it."""
    own: Callable[..., Tensor] = type(module).forward
    norm = weakref.ref(module)

    def forward(states: Tensor) -> Tensor:
        dense = context.now.dense
        return own(norm(), states) if dense is None else dense.norm(norm(), states)

    return forward


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
    """The attention implementation `expertflow_decode`; the mask is not read, because positions and windows imply it."""
    del attention_mask
    dense = module.config.context.now.dense
    return dense.attend(module, query, key, value, scaling, more.get("position_bias")), None


AttentionInterface.register(ATTENTION, attend)
