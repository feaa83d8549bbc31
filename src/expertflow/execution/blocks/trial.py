"""A decoder layer with random weights, whose own forwards run beside the blocks' compositions: only what agrees is a block.

Float32 on the CPU, but for number types. Attention and experts themselves are replaced by functions of everything they get. Must not
know loaded models.
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
    LayerForm,
    attention,
    experts,
)
from expertflow.execution.blocks.tensors import Tensors, attention_tensors, experts_tensors, tensors_of
from expertflow.kernels.backend import backend
from expertflow.kernels.blocks.given import Cells, Norm, Rotary, RouterRule
from expertflow.kernels.blocks.reference import rotate
from expertflow.kernels.dense_reference import rms_norm
from expertflow.models.attention import AttentionForm, attention_form
from expertflow.models.experts import Uncopied, is_registry_experts

TRIED = "expertflow-tried"
"""The attention implementation that modules get while they are tried."""
_TOKENS = 24
"""Tokens that are tried: so many that a router's groups and ranks all come to bear."""
_FEW = 3
"""Tokens that attention is tried with: each costs as many products as the module has weights."""
_POOL = 1_000_003
"""Random numbers that are drawn; larger weights repeat them, in rows that begin elsewhere."""
_CLOSE = 1e-4
_CPU = torch.device("cpu")
_FAILS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a module's own forward raises that wants to be called otherwise than it is here."""


def drawn(module: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random numbers of the shapes of a module's tensors, on the CPU: sums of products near one, weights of norms too."""
    pool, found = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)), Tensors()
    for place, (name, tensor) in enumerate(tensors_of(module).items()):
        numbers = pool[place * 7919 % (_POOL // 2) :][: tensor.numel()]
        numbers = (numbers * tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1 + 0.3 * numbers).to(dtype)
        found[name] = numbers.repeat(-(-tensor.numel() // len(numbers)))[: tensor.numel()].view(tensor.shape)
    return found


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
        return replace(form, heads=self._heads(), experts=self._experts())

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
            with _in_place_of(parts[0], attend), _in_place_of(parts[1], feed):
                return _agree(mine, functional_call(self.layer, tensors, (self.states,), given))
        except _FAILS:
            return False

    def _heads(self) -> AttentionBlock | None:
        """The attention's block."""
        module = self.layer.get_submodule(self.attention)
        if attention_form(module) not in (AttentionForm.HEADS, AttentionForm.WIDE):
            return None
        tensors = drawn(module)
        normed = "q_norm.weight" in tensors
        wide = normed and norm_rounding(module.q_norm)
        if wide is None:
            return None
        block = AttentionBlock(doubled=True, normed=normed, wide=wide)
        if (given := attention_tensors(module, block, tensors)) is None:
            return None
        for turned, doubled in product((module.head_dim, module.head_dim // 2, module.head_dim // 4), (True, False)):
            if self._attends(module, tensors, given, _angles(turned, doubled=doubled)):
                return replace(block, doubled=doubled)
        return None

    def _attends(self, module: Any, tensors: Tensors, given: AttentionTensors, rotary: Rotary) -> bool:
        """Whether the attention does as its block."""
        states, heads, place = self.states[:_FEW, 0], given.heads, torch.arange(_FEW)
        kept = torch.zeros(2, _FEW, heads.keys, 1, heads.width)
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
            return _agree(
                mine, _plain(functional_call(module, tensors, (), {"hidden_states": self.states[:_FEW], **more}))
            )
        except _FAILS:
            return False
        finally:
            module.config = own

    def _experts(self) -> ExpertsBlock | None:
        """The second part's block."""
        module, tensors = self.layer.get_submodule(self.second), Tensors()
        for block in experts_blocks(module, len(self.gains[1])):
            tensors = tensors or drawn(module)
            if self._routes(module, block, tensors):
                return _with_types(module, block, self.states)
        return None

    def _routes(self, module: Any, block: ExpertsBlock, tensors: Tensors) -> bool:
        """Whether router and sums do as the block."""
        states = self.states[:, 0]
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
    angles = 6 * torch.rand(_FEW, turned // 2, generator=torch.Generator().manual_seed(2))
    angles = torch.cat([angles, angles], dim=1) if doubled else angles
    return Rotary(angles.cos(), angles.sin(), doubled)


def norm_rounding(norm: Any) -> bool | None:
    """How a norm rounds; None if it is none of ours."""
    tensors = drawn(norm, torch.bfloat16)
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
        with _in_place_of(module.experts, note):
            functional_call(module, drawn(module, torch.bfloat16), (states.bfloat16(),))
    except _FAILS:
        return None
    finally:
        handle.remove()
    if len(seen) != 2:
        return None
    wide = not torch.equal(seen[0].float(), seen[0].bfloat16().float())
    rule = replace(block.rule, wide_logits=wide, wide_weights=seen[1].dtype == torch.float32)
    return replace(block, rule=rule)
