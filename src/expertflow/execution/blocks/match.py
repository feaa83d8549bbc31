"""Which building blocks compute what a model's modules compute: found by what modules are made of, and tried before it is believed.

Names of families are not looked at. A layer of each kind is found in the skeleton, which has no weights: it gets random ones. Then its
modules' own forwards run on the CPU in float32 beside the blocks' references, and only what agrees is taken. A module that no block
matches keeps its own code. Must not know kernels on a device, and which passes use them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface

from expertflow.execution.blocks.forms import (
    AttentionBlock,
    AttentionTensors,
    ExpertsBlock,
    ExpertsTensors,
    LayerForm,
    attention,
    experts,
)
from expertflow.kernels.backend import backend
from expertflow.kernels.blocks.given import Cells, Heads, Norm, Rotary, Router, RouterRule
from expertflow.kernels.blocks.reference import rotate
from expertflow.kernels.dense_reference import rms_norm
from expertflow.models.attention import STEP_FORMS, attention_form
from expertflow.models.experts import Uncopied, is_registry_experts
from expertflow.models.skeleton import Skeleton

TRIED = "expertflow-tried"
"""The attention implementation that modules get while they are tried."""
_TOKENS = 24
"""Tokens that are tried: so many that a router's groups and ranks all come to bear."""
_CLOSE = 1e-4
_CPU = torch.device("cpu")
_FAILS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a module's own forward raises that wants to be called otherwise than it is here."""
Tensors = dict[str, Tensor]


def find_layers(skeleton: Skeleton) -> dict[str, LayerForm]:
    """The form of every decoder layer that has one, by module path."""
    model, found, known = skeleton.model, dict[str, LayerForm](), dict[Any, LayerForm | None]()
    for path, layer in model.named_modules():
        names = _names(layer)
        if names is None:
            continue
        shapes = tuple((name, tensor.shape) for name, tensor in _tensors(layer))
        kind = type(layer), shapes
        if kind not in known:
            known[kind] = _Tried(layer, names).form()
        if (form := known[kind]) is not None:
            found[path] = form
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module divides by the root of the mean square, and multiplies by a weight."""
    return hasattr(module, "variance_epsilon") and [name for name, _ in module.named_parameters()] == ["weight"]


def _names(layer: nn.Module) -> tuple[str, str, tuple[str, str]] | None:
    """Names of a layer's attention, second part and two norms, if it has these parts and no other."""
    children = dict(layer.named_children())
    attentions = [name for name, child in children.items() if attention_form(child) is not None]
    norms = [name for name, child in children.items() if is_norm(child)]
    others = [name for name in children if name not in (*attentions, *norms)]
    if len(attentions) != 1 or len(norms) != 2 or len(others) != 1:
        return None
    return attentions[0], others[0], (norms[0], norms[1])


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _drawn(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random numbers of the shapes of a module's tensors, on the CPU: sums of products near one, weights of norms too."""
    random, found = torch.Generator().manual_seed(0), {}
    for name, tensor in _tensors(module):
        numbers = torch.randn(tensor.shape, generator=random)
        found[name] = (numbers * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1 + 0.3 * numbers).to(dtype)
    return found


def _within(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """Those of a child."""
    return {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}


def _agree(mine: Any, theirs: Any) -> bool:
    same = isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape
    return same and torch.allclose(mine, theirs, atol=_CLOSE, rtol=_CLOSE)


def _plain(given: Any) -> Any:
    """What a module gives, or the first of several."""
    return given[0] if isinstance(given, tuple) else given


@contextmanager
def _in_place_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of a module, inside."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class _Config(Uncopied):
    """An attention module's config, which names the implementation under which it is tried."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self._attn_implementation = TRIED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _mix(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **more: Any
) -> tuple[Tensor, None]:
    """In place of attention: something that depends on every number of queries, keys, values, and on the scale."""
    del module, attention_mask
    if any(more.get(name) is not None for name in ("position_bias", "softcap")):
        raise NotImplementedError
    groups = query.shape[1] // key.shape[1]
    mixed = (
        torch.tanh(query * scaling * 8) + key.repeat_interleave(groups, 1) - 0.5 * value.repeat_interleave(groups, 1)
    )
    return mixed.transpose(1, 2), None


AttentionInterface.register(TRIED, _mix)


def _use(states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """In place of experts: something that depends on states, experts and weights, not on the order of ranks."""
    return states * (weights.float() * (index + 1)).sum(dim=1, keepdim=True).to(states.dtype)


class _Tried:
    """A decoder layer with random weights."""

    def __init__(self, layer: nn.Module, names: tuple[str, str, tuple[str, str]]) -> None:
        self.layer: Any = layer.eval()
        self.attention, self.second, self.norms = names
        self.tensors = _drawn(layer)
        hidden = self.tensors[f"{self.norms[0]}.weight"].shape[0]
        states = torch.randn(_TOKENS, 1, hidden, generator=torch.Generator().manual_seed(1))
        self.states = states / states.pow(2).mean(-1, keepdim=True).sqrt()  # a norm without a weight changes nothing

    @torch.no_grad()
    def form(self) -> LayerForm | None:
        wide = _wide(self.layer.get_submodule(self.norms[0]))
        if wide is None or not any(self._adds(tupled=tupled) for tupled in (False, True)):
            return None
        form = LayerForm(attention=self.attention, second=self.second, norms=self.norms, wide=wide)
        return replace(form, heads=self._heads(), experts=self._experts())

    def _adds(self, *, tupled: bool) -> bool:
        """Whether the layer adds attention and second part to its states, each of their norm."""

        def attend(hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
            return torch.sin(3 * hidden_states), None

        def feed(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = torch.cos(2 * hidden_states)
            return (out, None) if tupled else out

        def normed(states: Tensor, name: str) -> Tensor:
            eps = self.layer.get_submodule(name).variance_epsilon
            return rms_norm(states, self.tensors[f"{name}.weight"], eps, wide=True)

        first = self.states + torch.sin(3 * normed(self.states, self.norms[0]))
        mine = first + torch.cos(2 * normed(first, self.norms[1]))
        parts = self.layer.get_submodule(self.attention), self.layer.get_submodule(self.second)
        given = {"attention_mask": None, "past_key_values": None, "position_embeddings": None}
        try:
            with _in_place_of(parts[0], attend), _in_place_of(parts[1], feed):
                return _agree(mine, functional_call(self.layer, self.tensors, (self.states,), given))
        except _FAILS:
            return False

    def _heads(self) -> AttentionBlock | None:
        """The attention's block."""
        module = self.layer.get_submodule(self.attention)
        tensors = _within(self.tensors, self.attention)
        if attention_form(module) not in STEP_FORMS:
            return None
        normed = "q_norm.weight" in tensors
        wide = normed and _wide(module.q_norm)
        if wide is None:
            return None
        for turned, doubled in product((module.head_dim, module.head_dim // 2, module.head_dim // 4), (True, False)):
            block = AttentionBlock(doubled=doubled, normed=normed, wide=wide)
            if (given := attention_tensors(module, block, tensors)) is None:
                return None
            if self._attends(module, tensors, given, _angles(turned, doubled=doubled)):
                return block
        return None

    def _attends(self, module: Any, tensors: Tensors, given: AttentionTensors, rotary: Rotary) -> bool:
        """Whether the attention does as its block."""
        states, heads, place = self.states[:, 0], given.heads, torch.arange(_TOKENS)
        kept = torch.zeros(2, _TOKENS, heads.keys, 1, heads.width)
        cells = Cells(kept[0], kept[1], place, torch.zeros_like(place))

        def attend(joined: Tensor) -> Tensor:
            queries = rotate(joined, heads, rotary, given.norms, cells)
            return _mix(module, queries[:, :, None], *cells[:2], None, module.scaling)[0][:, 0]

        mine = attention(backend(_CPU), given, states, attend)[:, None]
        own = module.config
        angles = rotary.cos[:, None], rotary.sin[:, None]
        more = {"position_embeddings": angles, "attention_mask": None, "past_key_values": None}
        module.config = _Config(own)
        try:
            return _agree(mine, _plain(functional_call(module, tensors, (), {"hidden_states": self.states, **more})))
        except _FAILS:
            return False
        finally:
            module.config = own

    def _experts(self) -> ExpertsBlock | None:
        """The second part's block."""
        module = self.layer.get_submodule(self.second)
        for block in _experts_blocks(module, self.tensors[f"{self.norms[1]}.weight"].shape[0]):
            if self._routes(module, block):
                return _with_types(module, block, self.states)
        return None

    def _routes(self, module: Any, block: ExpertsBlock) -> bool:
        """Whether router and sums do as the block."""
        tensors, states = _within(self.tensors, self.second), self.states[:, 0]
        norm = Norm(torch.ones(states.shape[1]), 0.0, wide=True)

        def run(normed: Tensor, index: Tensor, weights: Tensor, added: tuple[Tensor, ...], _: Tensor | None) -> Tensor:
            return sum(added[:-1], _use(normed, index, weights))

        given = experts_tensors(module, block, tensors, torch.zeros(0))
        mine = experts(backend(_CPU), given, states, norm, run)[:, None]
        try:
            with _in_place_of(module.experts, _use):
                return _agree(mine, _plain(functional_call(module, tensors, (self.states,))))
        except _FAILS:
            return False


def _angles(turned: int, *, doubled: bool) -> Rotary:
    """Random angles for `turned` elements of a head."""
    angles = 6 * torch.rand(_TOKENS, turned // 2, generator=torch.Generator().manual_seed(2))
    angles = torch.cat([angles, angles], dim=1) if doubled else angles
    return Rotary(angles.cos(), angles.sin(), doubled)


def _wide(norm: Any) -> bool | None:
    """How a norm rounds; None if it is none of ours."""
    tensors = _drawn(norm, torch.bfloat16)
    states = torch.randn(8, *tensors["weight"].shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    try:
        own = functional_call(norm, tensors, (states,))
    except _FAILS:
        return None
    for wide in (False, True):
        if own.dtype == states.dtype and torch.equal(
            own, rms_norm(states, tensors["weight"], norm.variance_epsilon, wide=wide)
        ):
            return wide
    return None


def attention_tensors(
    module: Any, block: AttentionBlock, tensors: Tensors, join: Callable[[list[Tensor]], Tensor | None] = torch.cat
) -> AttentionTensors | None:
    """Weights of an attention module, by the names they have in it.

    Args:
        module: with `q_proj`, `k_proj`, `v_proj`, `o_proj`, perhaps `q_norm` and `k_norm`.
        block: that it matches, or may match.
        tensors: its tensors.
        join: makes one of the weights of queries, keys and values; None where it cannot.

    Returns:
        None if it has other tensors, or they have other shapes.
    """
    width = module.head_dim
    names = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj")]
    biases = [name for name in ("q_proj.bias", "k_proj.bias", "v_proj.bias") if name in tensors]
    gains = ["q_norm.weight", "k_norm.weight"] if block.normed else []
    known = {*names, *biases, *gains, "o_proj.weight", "o_proj.bias", "sinks"}
    if not {*names, *gains, "o_proj.weight"} <= tensors.keys() <= known or len(biases) not in (0, 3):
        return None
    sizes = [len(tensors[name]) // width for name in names]
    if sizes[1] != sizes[2] or any(tensors[name].shape != (width,) for name in gains):
        return None
    joined, bias = join([tensors[name] for name in names]), join([tensors[name] for name in biases]) if biases else None
    if joined is None or (biases and bias is None):
        return None
    norms = [
        Norm(tensors[name], module.get_submodule(name.removesuffix(".weight")).variance_epsilon, block.wide)
        for name in gains
    ]
    heads = Heads(sizes[0], sizes[1], width)
    pair = (norms[0], norms[1]) if norms else None
    return AttentionTensors(joined, bias, heads, pair, tensors["o_proj.weight"], tensors.get("o_proj.bias"))


def _experts_blocks(module: nn.Module, hidden: int) -> Iterator[ExpertsBlock]:
    """Blocks that a module's parts may be."""
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
        name for name, tensor in _tensors(module) if name.endswith("correction_bias") and tensor.numel() == count
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


def experts_tensors(module: Any, block: ExpertsBlock, tensors: Tensors, counts: Tensor) -> ExpertsTensors:
    """Weights of a second part, by the names they have in it."""
    correction = None if block.correction is None else tensors[block.correction].flatten()
    router = Router(tensors[f"{block.router}.weight"], tensors.get(f"{block.router}.bias"), correction, block.rule)
    if block.shared is None:
        return ExpertsTensors(router, counts, None)
    own, weights = module.get_submodule(block.shared), _within(tensors, block.shared)
    gate = None if block.gate is None else tensors[f"{block.gate}.weight"]

    def shared(normed: Tensor) -> Tensor:
        out: Tensor = functional_call(own, weights, (normed,))
        return out if gate is None else torch.sigmoid(nn.functional.linear(normed, gate)) * out

    return ExpertsTensors(router, counts, shared)


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
        with _in_place_of(module.experts, note):
            functional_call(module, _drawn(module, torch.bfloat16), (states.bfloat16(),))
    except _FAILS:
        return None
    finally:
        handle.remove()
    if len(seen) != 2:
        return None
    wide = not torch.equal(seen[0].float(), seen[0].bfloat16().float())
    rule = replace(block.rule, wide_logits=wide, wide_weights=seen[1].dtype == torch.float32)
    return replace(block, rule=rule)
