"""The hook: transformers' experts call, computed with weights that a provider brings one expert at a time.

Stands as the `forward` of each experts module, so an unmodified model calls it. Results are bit-equal to the family's
eager code: the linear calls and their token order are the same. Each token's contributions are added in ascending order
of expert, whatever the order in which experts were computed. Must not know slots, copies and families.
"""

import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from expertflow.errors import UnsupportedModelError
from expertflow.models.context import ForwardContext

_ALIGNED = 64
"""Bytes: what a tensor of its own is aligned to. Results of matrix products depend on it on CPUs."""
ExpertWeights = Mapping[str, Tensor]
"""One expert's tensors by parameter name, on the compute device."""


@runtime_checkable
class ExpertProvider(Protocol):
    """Brings experts to the device."""

    def stream(self, layer: int, experts: list[int]) -> Generator[tuple[int, ExpertWeights], None, None]:
        """Yield every expert once with its tensors, in an order of the provider's choice.

        The tensors are valid until the generator is resumed or closed.
        """


Recorded = Callable[[int], Tensor | None]
"""What replaces the router's choice in a layer of the running pass: experts `[T, K]`; None: nothing does."""


class Uncopied:
    """Cannot be copied or pickled, and neither can anything that refers to it."""

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Refuse, because the experts' memory would have to be copied too.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "an offloaded model, or a part of one, cannot be copied or pickled",
            "Share it, or load it again where a second one is needed.",
        )


@dataclass(kw_only=True)
class Binding(Uncopied):
    """What an experts module needs to know to run offloaded; set as its attribute `expertflow`."""

    layer: int
    provider: ExpertProvider
    own_forward: bool = field(default=False)
    """Run the family's own eager forward (the universal fallback) instead of the expert loop."""
    context: ForwardContext = field(default_factory=ForwardContext)
    """What the running pass carries; its `padding` is not for `own_forward`."""
    replay: Recorded | None = field(default=None)
    """Gives what replaces the router's choice (`execution.replay`). Not for `own_forward`."""


Mlp = Callable[[Tensor, ExpertWeights], Tensor]


def is_registry_experts(module: nn.Module) -> bool:
    """Whether a module is an experts module of transformers' registry (decorated, with a stock eager forward)."""
    return (
        hasattr(type(module).forward, "__wrapped__")
        and hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
    )


def refuse_gradients(*inputs: Tensor) -> None:
    """Refuse gradients: a backward pass would need expert weights that were evicted by then.

    Raises:
        UnsupportedModelError: if autograd records this call.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise UnsupportedModelError(
            "a gradient was requested through offloaded experts, which only run forward",
            "Run the model under `torch.no_grad()`, or train the stock model.",
        )


def run_experts(
    binding: Binding,
    mlp: Mlp,
    hidden: Float[Tensor, "T H"],
    index: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    experts: int,
) -> Float[Tensor, "T H"]:
    """Apply each token's experts and add their weighted results.

    Args:
        binding: layer and provider.
        mlp: one expert: tokens and weights in, tokens out.
        hidden: token states.
        index: expert of each token and rank; `experts` itself means none.
        weights: router weight of each; may be of a wider dtype than `hidden`.
        experts: experts a layer.

    Raises:
        UnsupportedModelError: if autograd records the call.
    """
    refuse_gradients(hidden, weights)
    tokens, top_k = index.shape
    routes = index.cpu()  # the one host sync of a layer
    # the stock code takes an expert's tokens rank by rank, so sort by (expert, rank, token)
    order = torch.argsort(index.t().reshape(-1), stable=True)
    token_of = order % tokens
    weight_of = weights.t().reshape(-1)[order]
    if (observe := binding.context.now.observe) is not None:
        observe(binding.layer, routes, weights)
    ends = np.bincount(routes.numpy().reshape(-1), minlength=experts + 1).cumsum().tolist()
    begins = [0, *ends[:experts]]
    needed = [expert for expert in range(experts) if ends[expert] > begins[expert]]
    # an entry a (token, rank) pair, sorted by expert: what the expert reads, and then what it made of it
    parts = hidden[token_of]
    aligned = hidden.shape[1] * hidden.element_size() % _ALIGNED == 0
    with closing(binding.provider.stream(binding.layer, needed)) as brought:
        for expert, tensors in brought:
            mine = parts[begins[expert] : ends[expert]]
            out = mlp(mine if aligned else mine.clone(), tensors)
            if out.dtype != hidden.dtype:  # weighted before it is rounded, as in the stock code
                share = weight_of[begins[expert] : ends[expert]]
                out = out * share[:, None]
                share.fill_(1)
            mine.copy_(out)
            del tensors  # decoded ones would live beside the next expert's
    parts.mul_(weight_of[:, None])
    parts[ends[experts - 1] :] = 0  # pairs without an expert
    position = torch.empty_like(order)
    position[order] = torch.arange(order.shape[0], device=order.device)
    ascending = position.view(top_k, tokens).sort(dim=0).values
    total = torch.zeros_like(hidden)
    for rank in range(top_k):
        total += parts[ascending[rank]]
    return total


class _Weakly(Uncopied):
    """Returns a module without keeping it alive."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> Any:
        return self._module()


def offload(module: nn.Module) -> None:
    """Make an experts module run offloaded: `offloaded_forward` in place of the family's own forward."""
    # not a bound method: the module must not keep itself, and with it the expert store, alive
    module.forward = partial(offloaded_forward, _Weakly(module))


@torch.compiler.disable(reason="offloaded experts are chosen and copied by the host")
def offloaded_forward(
    module: Callable[[], Any],
    hidden_states: Float[Tensor, "T H"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T H"]:
    """An experts module's `forward`, in place of the family's own; `module` gives the module."""
    own = module()
    binding = own.expertflow
    assert isinstance(binding, Binding)
    carried = binding.context.now
    recorded = None if binding.replay is None else binding.replay(binding.layer)
    if recorded is not None:
        top_k_index = recorded.to(top_k_index.dtype)
    if carried.experts is not None:
        return carried.experts(binding.layer, hidden_states, top_k_index, top_k_weights)
    if binding.own_forward:
        return _own_forward(own, binding, hidden_states, top_k_index, top_k_weights)
    experts = int(own.num_experts)
    if carried.padding is not None:
        top_k_index = top_k_index.masked_fill(carried.padding[:, None], experts)

    def mlp(tokens: Tensor, expert: ExpertWeights) -> Tensor:
        return _registry_mlp(own, tokens, expert)

    return run_experts(binding, mlp, hidden_states, top_k_index, top_k_weights, experts)


def _registry_mlp(module: Any, tokens: Tensor, expert: ExpertWeights) -> Tensor:
    """One expert as the registry's layout attributes describe it: [gate and] up, activation, down."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _project(module, tokens, expert, up)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # noqa: SLF001 - the registry's contract
    return _project(module, inner, expert, "down_proj")


def _project(module: Any, tokens: Tensor, expert: ExpertWeights, name: str) -> Tensor:
    out = tokens @ expert[name] if module.is_transposed else functional.linear(tokens, expert[name])
    return out + expert[f"{name}_bias"] if module.has_bias else out


class _Weights:
    """Stands where a stacked parameter was: `weights[e]` brings expert e."""

    def __init__(self, current: "_Current", name: str) -> None:
        self._current, self._name = current, name

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._current.weights(int(expert))[self._name]


class _Current:
    """The expert whose weights are lent out; lending another one gives it back first."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._expert = -1
        self._lent: ExpertWeights = {}
        self._stream: Generator[tuple[int, ExpertWeights], None, None] | None = None

    def weights(self, expert: int) -> ExpertWeights:
        if expert != self._expert:
            self.close()
            self._stream = self._binding.provider.stream(self._binding.layer, [expert])
            self._expert, self._lent = next(self._stream)
        return self._lent

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._expert, self._lent, self._stream = -1, {}, None


def _own_forward(module: Any, binding: Binding, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The family's eager forward, with every `weights[e]` fetching expert e: exact for any eager code, no overlap."""
    refuse_gradients(hidden, weights)
    if (observe := binding.context.now.observe) is not None:
        observe(binding.layer, index.cpu(), weights)
    with closing(_Current(binding)) as current:
        for name, _ in module.expert_shapes:
            setattr(module, name, _Weights(current, name))
        out: Tensor = type(module).forward.__wrapped__(module, hidden, index, weights)
    return out
