"""A decoder layer with random weights, whose own forwards run beside the blocks' compositions: only what agrees is a block.

Float32 on the CPU, but for number types. Attention and experts themselves are replaced by functions of everything they get. Must not
know loaded models.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expertflow.execution.blocks.attempt import attention_block
from expertflow.execution.blocks.draws import (
    FAILS,
    agree,
    drawn,
    drawn_as,
    enlarged,
    in_place_of,
    norm_rounding,
    plain,
    shapes_of,
)
from expertflow.execution.blocks.forms import ExpertsBlock, LayerForm, experts, feed
from expertflow.execution.blocks.tensors import FEED, Tensors, experts_tensors, feed_tensors, tensors_of
from expertflow.kernels.backend import backend
from expertflow.kernels.blocks.given import Norm, RouterRule
from expertflow.kernels.dense_reference import rms_norm
from expertflow.kernels.mlp import ACTIVATIONS
from expertflow.models.experts import is_registry_experts

_TOKENS = 24
"""Tokens that are tried: so many that a router's groups and ranks all come to bear."""
_NARROW = 64
"""Inner elements that a feed-forward block is tried with: it may have very many."""
_CPU = torch.device("cpu")


def _use(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """In place of experts: something that depends on states, experts and weights, not on the order of ranks."""
    return states * (weights.float() * (index + 1)).sum(dim=1, keepdim=True).to(states.dtype)


class Trial:
    """A decoder layer with random weights."""

    def __init__(self, layer: nn.Module, names: tuple[str, str, tuple[str, str]]) -> None:
        """Draw what both norms need; weights of the parts are drawn where a part may be a block."""
        self.layer: Any = layer.eval()
        self.attention, self.second, self.norms = names
        self.gains = [drawn(layer.get_submodule(name))["weight"] for name in self.norms]
        hidden = len(self.gains[0])
        states = torch.randn(_TOKENS, 1, hidden, generator=torch.Generator().manual_seed(1))
        self.states = states / states.pow(2).mean(-1, keepdim=True).sqrt()  # a norm without a weight changes nothing

    @torch.no_grad()
    def form(self) -> LayerForm | None:
        """Which parts are blocks; None if not even the layer's sums are."""
        roundings = {norm_rounding(self.layer.get_submodule(name)) for name in self.norms}
        wide = next(iter(roundings))
        if len(roundings) > 1 or wide is None or not any(self._adds(tupled=tupled) for tupled in (False, True)):
            return None
        form = LayerForm(attention=self.attention, second=self.second, norms=self.norms, wide=wide)
        heads, found = attention_block(self.layer.get_submodule(self.attention), self.states), self._experts()
        only = None if found is not None else feed_activation(self.layer.get_submodule(self.second), self.states)
        return replace(form, heads=heads, experts=found, feed=only)

    def _adds(self, *, tupled: bool) -> bool:
        """Whether the layer adds attention and second part to its states, each of their norm."""

        def attend(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            return torch.sin(3 * hidden_states), None

        def feed(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = torch.cos(2 * hidden_states)
            return (out, None) if tupled else out

        def normed(states: Tensor, which: int) -> Tensor:
            eps = self.layer.get_submodule(self.norms[which]).variance_epsilon
            return rms_norm(states, self.gains[which], eps, wide=True)

        first = self.states + torch.sin(3 * normed(self.states, 0))
        mine = first + torch.cos(2 * normed(first, 1))
        tensors = {f"{name}.weight": gains for name, gains in zip(self.norms, self.gains, strict=True)}
        parts = self.layer.get_submodule(self.attention), self.layer.get_submodule(self.second)
        given = {"attention_mask": None, "past_key_values": None, "position_embeddings": None}
        try:
            with in_place_of(parts[0], attend), in_place_of(parts[1], feed):
                return agree(mine, functional_call(self.layer, tensors, (self.states,), given))
        except FAILS:
            return False

    def _experts(self) -> ExpertsBlock | None:
        """The second part's block. A shared expert that is a feed-forward block is tried with few inner elements here, too."""
        module, tensors, activation, theirs = self.layer.get_submodule(self.second), Tensors(), None, None
        for found in experts_blocks(module, len(self.gains[1])):
            if not tensors:
                shapes = shapes_of(module)
                if found.shared is not None:
                    child = module.get_submodule(found.shared)
                    if (activation := feed_activation(child, self.states)) is not None:
                        shapes |= {f"{found.shared}.{name}": shape for name, shape in _narrow(shapes_of(child)).items()}
                tensors = drawn_as(shapes)
                theirs = self._routed(module, tensors)
            block = replace(found, feed=activation)
            if theirs is not None and self._routes(module, block, tensors, theirs):
                return _with_types(module, block, self.states)
        return None

    def _routed(self, module: Any, tensors: Tensors) -> Any:
        """What the second part's own forward gives; None if it cannot be called so."""
        try:
            with in_place_of(module.experts, _use):
                return plain(functional_call(module, tensors, (self.states,)))
        except FAILS:
            return None

    def _routes(self, module: Any, block: ExpertsBlock, tensors: Tensors, theirs: Any) -> bool:
        """Whether router and sums do as the block."""
        states = self.states[:, 0]
        norm = Norm(torch.ones(states.shape[1]), 0.0, wide=True)

        def run(normed: Tensor, index: Tensor, weights: Tensor, added: tuple[Tensor, ...], _: Tensor | None) -> Tensor:
            return sum(added[:-1], _use(normed, index, weights))

        if (given := experts_tensors(module, block, tensors, torch.zeros(0))) is None:
            return False
        return agree(experts(backend(_CPU), given, states, norm, run)[:, None], theirs)


def _narrow(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes of a feed-forward block's tensors, with few inner elements."""
    gate, up, down = (shapes[name] for name in FEED)
    inner = min(_NARROW, gate[0])
    return dict(
        zip(FEED, (torch.Size((inner, gate[1])), torch.Size((inner, up[1])), torch.Size((down[0], inner))), strict=True)
    )


def feed_activation(module: Any, states: Tensor) -> str | None:
    """The activation of a gated feed-forward block, tried with few inner elements; None if the module is none.

    Args:
        module: without weights.
        states: `[T, 1, H]`.
    """
    shapes = shapes_of(module)
    if {*FEED} != shapes.keys() or any(len(shape) != 2 for shape in shapes.values()):
        return None
    tensors, apart = drawn_as(_narrow(shapes)), dict[str, float]()
    for activation in ACTIVATIONS:
        found = [_feeds(module, some, states, activation) for some in (tensors, enlarged(tensors))]
        if None not in found:
            apart[activation] = float(found[0] or 0.0)
    return min(apart, key=apart.__getitem__, default=None)


def _feeds(module: Any, tensors: Tensors, states: Tensor, activation: str) -> float | None:
    """How far the module is from a block of that activation at most; None if it does something else."""
    if (given := feed_tensors(tensors, activation)) is None:
        return None
    mine = feed(backend(_CPU), given, states[:, 0])[:, None]
    try:
        theirs = functional_call(module, tensors, (states,))
    except FAILS:
        return None
    return float((mine - theirs).abs().max()) if agree(mine, theirs) else None


def experts_blocks(module: nn.Module, hidden: int) -> Iterator[ExpertsBlock]:
    """Blocks that a second part may be: of router, experts and perhaps a shared expert."""
    children = dict(module.named_children())
    found = {name: child for name, child in children.items() if is_registry_experts(child)}
    if list(found) != ["experts"]:
        return
    count = int(found["experts"].num_experts)  # type: ignore[arg-type]
    routers = [
        name
        for name, child in children.items()
        if getattr(getattr(child, "weight", None), "shape", None) == (count, hidden)
    ]
    gates = [
        name
        for name, child in children.items()
        if getattr(getattr(child, "weight", None), "shape", None) == (1, hidden)
    ]
    shared = [
        name for name in children if name not in ("experts", *routers, *gates) and list(children[name].parameters())
    ]
    if len(routers) != 1 or len(shared) > 1 or len(gates) > len(shared):
        return
    corrections = [
        name
        for name, tensor in tensors_of(module).items()
        if name.endswith("correction_bias") and tensor.numel() == count
    ]
    block = ExpertsBlock(
        router=routers[0],
        rule=RouterRule(top_k=1),
        shared=shared[0] if shared else None,
        gate=gates[0] if gates else None,
    )
    for rule, correction in product(_rules(children[routers[0]], count), [*corrections[:1], None]):
        yield replace(block, rule=rule, correction=correction)


def _rules(router: Any, count: int) -> Iterator[RouterRule]:
    """Rules that a router may have, by the numbers it carries."""
    top_k, scale = int(router.top_k), float(getattr(router, "routed_scaling_factor", 1.0))
    groups = int(getattr(router, "num_group", None) or 1)
    kept = int(getattr(router, "topk_group", None) or 1)
    tops = (2, 1) if groups > 1 and count % groups == 0 else ()
    for scores, normalised in product(("softmax", "sigmoid"), (False, True)):
        rule = RouterRule(top_k=top_k, scores=scores, normalised=normalised, scale=scale)
        for top in tops:
            yield replace(rule, groups=groups, kept_groups=kept, group_top=top)
        yield rule
    yield RouterRule(top_k=top_k, scores="logits", over_chosen=True, scale=scale)


def _with_types(module: Any, block: ExpertsBlock, states: Tensor) -> ExpertsBlock | None:
    """The block with the number types of its router, read off a run in bfloat16."""
    seen: list[Tensor] = []

    def note(normed: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        del index
        seen.append(weights)
        return normed

    def logits(_: Any, __: Any, given: Any) -> None:
        seen.extend(one for one in given if one.shape == (_TOKENS, int(module.experts.num_experts)))

    handle = module.get_submodule(block.router).register_forward_hook(logits)
    try:
        with in_place_of(module.experts, note):
            functional_call(module, drawn(module, torch.bfloat16), (states.bfloat16(),))
    except FAILS:
        return None
    finally:
        handle.remove()
    if len(seen) != 2:
        return None
    wide = not torch.equal(seen[0].float(), seen[0].bfloat16().float())
    rule = replace(block.rule, wide_logits=wide, wide_weights=seen[1].dtype == torch.float32)
    return replace(block, rule=rule)
