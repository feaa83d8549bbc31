"""Decoder layers of a captured step, and of a pass over prompts beside such steps, run by building blocks where their modules match.

A layer's forward looks at the pass's context: where it carries `blocks`, the layer is composed here, and else its class's own forward
runs. What no block matches is called as the layer itself calls it. Must not know families, requests and graphs.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from expertflow.execution.blocks import forms
from expertflow.execution.blocks.forms import (
    AttentionBlock,
    AttentionTensors,
    ExpertsTensors,
    FeedTensors,
    LatentBlock,
    LatentTensors,
    LayerForm,
)
from expertflow.execution.blocks.join import joined
from expertflow.execution.blocks.tensors import (
    attention_tensors,
    experts_tensors,
    feed_tensors,
    latent_tensors,
    rotary_of,
    tensors_of,
)
from expertflow.kernels.backend import Backend, backend
from expertflow.kernels.blocks.given import Known, Norm, Places
from expertflow.models.context import ForwardContext


class BoundLayer(NamedTuple):
    """A layer of a loaded model.

    Attributes:
        form: which of its parts are blocks.
        attention: the attention's module.
        second: the second part's.
        norms: before them.
        heads: weights of the attention, if it is a block.
        experts: weights of the second part, if it is one.
        feed: weights of the second part, if it is one without experts.
    """

    form: LayerForm
    attention: Any
    second: Any
    norms: tuple[Norm, Norm]
    heads: AttentionTensors | LatentTensors | None
    experts: ExpertsTensors | None
    feed: FeedTensors | None


class LayerBlocks:
    """Runs a model's decoder layers in passes that carry it as `blocks`: of one token a sequence, or of prompts without padding.

    Args:
        model: loaded model; weights of queries, keys and values become views of joined ones.
        matched: forms of its layers, by module path.
        context: what the model's passes carry.
        batch: sequences of a step at most; 0: what runs is passes over prompts.
        places: where a layer's experts lie; None where that is decided once they are chosen.

    Attributes:
        layers: the layers that are run here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matched: Mapping[str, LayerForm],
        context: ForwardContext,
        batch: int,
        places: Callable[[int], Places | None],
    ) -> None:
        """Find the blocks, join weights, make the layers look at the context."""
        self._context, self._places = context, places
        kernels = backend(model.device)
        self._kernels: Backend = kernels if batch else replace(kernels, product=kernels.prompt_product)
        counts = torch.zeros(batch, dtype=torch.int32, device=model.device)
        self.layers: dict[int, BoundLayer] = {}
        for path, form in matched.items():
            layer = model.get_submodule(path)
            self.layers[id(layer)] = _bind(layer, form, counts)
            layer.forward = _layer_forward(layer, context)

    def run(self, layer: Any, hidden: Tensor, more: Mapping[str, Any]) -> Tensor:
        """What the layer's own forward computes of `[B, 1, H]` or `[1, T, H]`; `more` is what it is given by name."""
        bound = self.layers[id(layer)]
        states = self._attend(bound, hidden.reshape(-1, hidden.shape[2]), hidden.shape, more)
        return self._feed(bound, states, hidden.shape).view(hidden.shape)

    def _attend(self, bound: BoundLayer, states: Tensor, shape: torch.Size, more: Mapping[str, Any]) -> Tensor:
        norm, dense = bound.norms[0], self._context.now.dense
        if bound.heads is None or bound.form.heads is None or dense is None or not dense.in_place:
            normed = self._kernels.rms_norm(states, norm.weight, norm.eps, wide=norm.wide).view(shape)
            return states + bound.attention(hidden_states=normed, **more)[0].reshape(states.shape)
        tensors, attention = bound.heads, bound.attention
        cells = more["past_key_values"].layers[attention.layer_idx].cells(states, tensors.heads)
        rotary = rotary_of(bound.form.heads, more["position_embeddings"])
        if isinstance(tensors, LatentTensors):

            def over_latents(queries: Tensor, latents: Tensor) -> Tensor:
                seen = dense.seen(attention)
                return self._kernels.attend_latents(queries, latents, tensors.heads, rotary, cells, seen)

            return forms.over_latents(self._kernels, tensors, states, over_latents, norm)
        one_each = self._context.now.pieces is None

        def attend(joined: Tensor) -> Tensor:
            if one_each:
                return self._kernels.attend(joined, tensors.heads, rotary, tensors.norms, cells, dense.seen(attention))
            queries = self._kernels.rotate(joined, tensors.heads, rotary, tensors.norms, cells)
            given = queries.transpose(0, 1)[None], cells.keys, cells.values
            return dense.attend(attention, given, attention.scaling, {})[0]

        return forms.attention(self._kernels, tensors, states, attend, norm)

    def _feed(self, bound: BoundLayer, states: Tensor, shape: torch.Size) -> Tensor:
        norm, compute = bound.norms[1], self._context.now.experts
        if bound.feed is not None:
            return forms.feed(self._kernels, bound.feed, states, norm, residual=states)
        if bound.experts is None or compute is None:
            normed = self._kernels.rms_norm(states, norm.weight, norm.eps, wide=norm.wide).view(shape)
            out = bound.second(normed)
            return states + (out[0] if isinstance(out, tuple) else out).reshape(states.shape)
        binding = bound.second.experts.expertflow

        def run(
            normed: Tensor, index: Tensor, weights: Tensor, added: tuple[Tensor, ...], slots: Tensor | None
        ) -> Tensor:
            return compute(binding.layer, normed, index, weights, added, slots)

        recorded = None if binding.replay is None else binding.replay(binding.layer)
        return forms.experts(
            self._kernels, bound.experts, states, norm, run, Known(self._places(binding.layer), recorded)
        )


def of_prompts(matched: Mapping[str, LayerForm]) -> dict[str, LayerForm]:
    """What of layers is run here in a pass over prompts: attention over heads. Its many small kernels wait for the host."""
    return {
        path: replace(
            form, heads=form.heads if isinstance(form.heads, AttentionBlock) else None, experts=None, feed=None
        )
        for path, form in matched.items()
    }


def _bind(layer: Any, form: LayerForm, counts: Tensor) -> BoundLayer:
    """A layer's form with its weights."""
    attention, second = layer.get_submodule(form.attention), layer.get_submodule(form.second)
    found = [layer.get_submodule(name) for name in form.norms]
    norms = [Norm(norm.weight.detach(), norm.variance_epsilon, form.wide) for norm in found]
    own, others = tensors_of(attention), tensors_of(second)
    heads: AttentionTensors | LatentTensors | None = None
    if isinstance(form.heads, LatentBlock):
        heads = latent_tensors(attention, form.heads, own, joined)
    elif form.heads is not None:
        heads = attention_tensors(attention, form.heads, own, joined)
    experts = None if form.experts is None else experts_tensors(second, form.experts, others, counts, joined)
    feed = None if form.feed is None else feed_tensors(others, form.feed, joined)
    return BoundLayer(form, attention, second, (norms[0], norms[1]), heads, experts, feed)


def _layer_forward(module: Any, context: ForwardContext) -> Callable[..., Any]:
    """A layer's forward that looks at the context; it must not keep the module alive, which keeps it."""
    own: Callable[..., Any] = type(module).forward
    layer = weakref.ref(module)

    def forward(hidden_states: Tensor, *args: Any, **more: Any) -> Any:
        blocks = context.now.blocks
        if blocks is None or args:
            return own(layer(), hidden_states, *args, **more)
        return blocks.run(layer(), hidden_states, more)

    return forward
