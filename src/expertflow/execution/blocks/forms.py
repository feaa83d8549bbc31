"""What of a decoder layer is computed by building blocks, and the compositions themselves.

A composition takes the set of kernels as an argument. So `match` runs the very same lines with the references, on random numbers, beside
a module's own forward. Must not know where modules and numbers come from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from expertflow.kernels.backend import Backend
from expertflow.kernels.blocks.given import Heads, Norm, Places, Router, RouterRule


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Attention over heads: one product of queries, keys and values, rotation, and a product of what heads give.

    Attributes:
        doubled: as of `Rotary`.
        normed: whether each head of queries and keys has a norm.
        wide: as of that `Norm`.
    """

    doubled: bool
    normed: bool
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertsBlock:
    """A router, experts, perhaps a shared expert beside them.

    Attributes:
        router: name of the router within the module.
        rule: how it chooses.
        correction: path of what is added to scores for the choice, or None.
        shared: name of the shared expert's module, or None.
        gate: name of the weight of its share, or None.
    """

    router: str
    rule: RouterRule
    correction: str | None = None
    shared: str | None = None
    gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """A decoder layer: states plus attention of their norm, then plus the second part of the sum's norm.

    Attributes:
        attention: name of the attention's module within the layer.
        second: name of the second part's: experts, or a plain feed-forward block.
        norms: names of the norms before them.
        wide: as of `Norm`.
        heads: what of the attention is computed by blocks; None: its own code runs.
        experts: what of the second part is; None: its own code runs.
    """

    attention: str
    second: str
    norms: tuple[str, str]
    wide: bool
    heads: AttentionBlock | None = None
    experts: ExpertsBlock | None = None


class AttentionTensors(NamedTuple):
    """Weights of an attention module.

    Attributes:
        joined: of queries, keys and values, `[(Q + 2G) D, H]`.
        bias: `[(Q + 2G) D]`, or None.
        heads: of them.
        norms: of a query's and a key's head, or None.
        out: `[H, Q D]`.
        out_bias: `[H]`, or None.
    """

    joined: Tensor
    bias: Tensor | None
    heads: Heads
    norms: tuple[Norm, Norm] | None
    out: Tensor
    out_bias: Tensor | None


class ExpertsTensors(NamedTuple):
    """What computes a layer's second part.

    Attributes:
        router: chooses.
        counts: as of `route`.
        shared: the shared expert, normed states to what it gives; None: there is none.
    """

    router: Router
    counts: Tensor
    shared: Callable[[Tensor], Tensor] | None


def attention(
    kernels: Backend,
    tensors: AttentionTensors,
    states: Tensor,
    attend: Callable[[Tensor], Tensor],
    norm: Norm | None = None,
) -> Tensor:
    """Attention of one token a sequence.

    Args:
        kernels: what computes.
        tensors: of the module.
        states: `[T, H]`.
        attend: queries, keys and values `[T, (Q + 2G) D]` to what heads give, `[T, Q, D]`.
        norm: before the module, whose result is then added to the states; None: states come normed, and nothing is added.

    Returns:
        `[T, H]`.
    """
    given = attend(kernels.product(states, tensors.joined, tensors.bias, norm))
    residual = None if norm is None else states
    return kernels.product(given.flatten(1), tensors.out, tensors.out_bias, None, residual)


def experts(
    kernels: Backend,
    tensors: ExpertsTensors,
    states: Tensor,
    norm: Norm,
    run: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None], Tensor],
    places: Places | None = None,
) -> Tensor:
    """Norm, router and experts, added to the states.

    Args:
        kernels: what computes.
        tensors: of the module.
        states: `[T, H]`.
        norm: before the module.
        run: normed states, experts `[T, K]`, weights `[T, K]`, what else is added, and the experts' slots if known, to `[T, H]`.
        places: where the layer's experts lie; None: that is decided later.
    """
    normed, index, weights, slots = kernels.route(states, norm, tensors.router, tensors.counts, places)
    added = (states,) if tensors.shared is None else (tensors.shared(normed), states)
    return run(normed, index, weights, added, slots)
