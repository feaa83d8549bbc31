"""The dense part of a captured step, and of a pass over prompts beside such steps: attention and norms as single kernels.

A module computes what its class computes, in fewer launches; over prompts, in memory linear in length. A module of a form that the
kernels support reads from the pass's context whether they run; in every other pass its class's own forward runs. Must not know
families.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from expertflow.kernels.backend import Backend, backend
from expertflow.kernels.blocks.given import Seen
from expertflow.models.attention import PROMPT_FORMS, STEP_FORMS, AttentionForm, attention_form, by_kernel
from expertflow.models.context import ForwardContext
from expertflow.models.experts import Uncopied
from expertflow.models.skeleton import Skeleton

ATTENTION = "expertflow"
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

    Attributes:
        forms: forms of attention that are computed here.
    """

    forms = STEP_FORMS

    def __init__(
        self, model: PreTrainedModel, skeleton: Skeleton, windows: Sequence[int | None], context: ForwardContext
    ) -> None:
        """Make the modules look at the context."""
        self._windows, self._context = windows, context
        self._kernels: Backend = backend(model.device)
        self._wide = skeleton.config.model_type in _WIDE_NORMS
        stepping = list(model.get_decoder().modules())
        self._norms: list[Any] = [module for module in stepping if _is_norm(module)]
        found = {module: attention_form(module) for module in stepping}
        self._attentions: list[Any] = [module for module, form in found.items() if form in self.forms]
        for norm in self._norms:
            norm.forward = _norm_forward(norm, context)
        for attention in self._attentions:
            own, form = getattr(attention.config, "own", attention.config), found[attention]
            attention.config = AttentionConfig(own, context, form)
            if form is AttentionForm.LATENT:
                attention.expand_kv = _expansion(attention, context)

    @property
    def attends(self) -> bool:
        """Whether attention is computed here, and goes by positions instead of masks."""
        return bool(self._attentions)

    @property
    def in_place(self) -> bool:
        """Whether attention finds its KV rows among all of them by itself."""
        return self.attends

    def norm(self, module: Any, states: Tensor) -> Tensor:
        """What the norm's own forward computes, `[..., H]`."""
        return self._kernels.rms_norm(states, module.weight, module.variance_epsilon, wide=self._wide)

    def attend(
        self, module: Any, given: tuple[Tensor, Tensor, Tensor], scale: float, more: Mapping[str, Any]
    ) -> Tensor:
        """`[B, Q, 1, D]` over keys and values of all KV rows to `[B, 1, Q, D]`; a bias is `[1, Q, 1, M]`, by distance."""
        (query, keys, values), now, bias = given, self._context.now, more.get("position_bias")
        if module.config.form is AttentionForm.LATENT:
            return self._over_latents(module, given, scale)
        queries, attend = query[:, :, 0].contiguous(), self._kernels.decode_attention
        if not module.is_causal:  # over what the encoder has read, all of it
            assert now.lasts is not None
            return attend(queries, keys, values, (now.rows, now.lasts), scale)[:, None]
        window, sinks = self._windows[module.layer_idx], getattr(module, "sinks", None)
        by_distance = None if bias is None else bias[0, :, 0]
        where, table = (now.rows, now.positions[:, 0]), self._table(module)
        return attend(queries, keys, values, where, scale, window, sinks, by_distance, table=table)[:, None]

    def _over_latents(self, module: Any, given: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
        """`[B, Q, 1, D]` over latents and rotary parts in pages, which come as keys and values, to `[B, 1, Q, V]`."""
        query, now, weight = given[0][:, :, 0], self._context.now, module.kv_b_proj.weight
        where = now.rows, now.positions[:, 0]
        return self._kernels.latent_attention(query, given[1:], weight, where, scale, self._table(module))[:, None]

    def seen(self, module: Any) -> Seen:
        """What a decoder layer's attention sees in a pass of one token a sequence over pages."""
        now, table = self._context.now, self._table(module)
        assert table is not None
        window, sinks = self._windows[module.layer_idx], getattr(module, "sinks", None)
        return Seen(now.rows, now.positions[:, 0], table, module.scaling, window, sinks)

    def _table(self, module: Any) -> Tensor | None:
        """The page table of an attention layer; None where keys and values lie in rows."""
        pages = self._context.now.pages
        return None if pages is None else pages.table(module.layer_idx)


class PromptParts(DenseParts):
    """The same of passes over prompts, whose sequences have several tokens each: padded on the left, or without padding."""

    forms = PROMPT_FORMS

    def __init__(
        self, model: PreTrainedModel, skeleton: Skeleton, windows: Sequence[int | None], context: ForwardContext
    ) -> None:
        """Make the modules look at the context, unless some layer's attention has no form that the kernel takes: then all keep theirs."""
        super().__init__(model, skeleton, windows, context)
        self._attends = by_kernel(model, len(windows))

    @property
    def attends(self) -> bool:
        """Whether attention of every layer is computed here."""
        return self._attends

    @property
    def in_place(self) -> bool:
        """Wherever it is computed here."""
        return self._attends

    def attend(
        self, module: Any, given: tuple[Tensor, Tensor, Tensor], scale: float, more: Mapping[str, Any]
    ) -> Tensor:
        """`[B, Q, C, D]` over keys and values of all KV rows, or of those of the pass, to `[B, C, Q, V]`."""
        now, pieces = self._context.now, None
        assert more.get("position_bias") is None
        if module.config.form is AttentionForm.LATENT:
            return self._of_prompts(module, given, scale)
        rows, table, lasts = now.rows, self._table(module), now.positions[:, -1]
        if now.pieces is not None:
            rows, lasts, pieces = now.pieces.rows, now.pieces.lasts, (now.pieces.bounds, now.pieces.longest)
        return self._kernels.prompt_attention(
            *given, (rows, lasts), scale, self._windows[module.layer_idx], sinks=getattr(module, "sinks", None),
            softcap=more.get("softcap"), table=table, pieces=pieces,
        )  # fmt: skip

    def _of_prompts(self, module: Any, given: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
        """`[1, Q, T, D]` over latents and rotary parts in pages to `[1, T, Q, V]`; a step that the host decides is one of decoding."""
        pieces, weight = self._context.now.pieces, module.kv_b_proj.weight
        if pieces is None:
            return self._over_latents(module, given, scale)
        return self._kernels.latent_prompts(
            given[0], given[1:], weight, (pieces.rows, pieces.lasts), scale, self._table(module),
            pieces=(pieces.bounds, pieces.longest), room=(pieces.begins, pieces.columns),
        )  # fmt: skip


class AttentionConfig(Uncopied):
    """An attention module's config, which names our implementation in passes that carry `dense` for modules of its form.

    Args:
        own: the module's config; every other question goes to it.
        context: what the model's passes carry.
        form: the module's.
    """

    def __init__(self, own: Any, context: ForwardContext, form: AttentionForm | None) -> None:
        """Stand in for `own`."""
        self.own, self.context, self.form = own, context, form

    def __getattr__(self, name: str) -> Any:
        """As of the module's config."""
        return getattr(self.own, name)

    @property
    def _attn_implementation(self) -> Any:  # transformers offers no other way to choose it
        dense = self.context.now.dense
        taken = dense is not None and dense.attends and self.form in dense.forms
        return ATTENTION if taken else self.own._attn_implementation  # noqa: SLF001


def _norm_forward(module: nn.Module, context: ForwardContext) -> Callable[[Tensor], Tensor]:
    """A norm's forward that looks at the context; it must not keep the module alive, which keeps it."""
    own: Callable[..., Tensor] = type(module).forward
    norm = weakref.ref(module)

    def forward(states: Tensor) -> Tensor:
        dense = context.now.dense
        return own(norm(), states) if dense is None else dense.norm(norm(), states)

    return forward


def _expansion(module: Any, context: ForwardContext) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A method that makes keys and values of latents, unless attention reads latents; it must not keep the module alive."""
    own: Callable[..., tuple[Tensor, Tensor]] = type(module).expand_kv
    attention = weakref.ref(module)

    def expand_kv(kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:  # transformers' names
        return (kv_nope, k_rot) if context.now.all_rows else own(attention(), kv_nope, k_rot)

    return expand_kv


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(_NORMS) and hasattr(module, "variance_epsilon")


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """The attention implementation `expertflow`; the mask is not read, because positions and windows imply it."""
    del attention_mask
    dense = module.config.context.now.dense
    return dense.attend(module, (query, key, value), scaling, more), None


AttentionInterface.register(ATTENTION, attend)
