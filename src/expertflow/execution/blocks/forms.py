"""What of a decoder layer is computed by building blocks, and the compositions themselves.

A composition takes the set of kernels as an argument. So `match` runs the very same lines with the references, on random numbers, beside
a module's own forward. Must not know where modules and numbers come from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from expertflow.kernels.backend import Backend
from expertflow.kernels.blocks.given import Heads, Known, LatentHeads, Norm, Router, RouterRule


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Attention over heads: one product of queries, keys and values, rotation, and a product of what heads give.

    Attributes:
        doubled: as of `Rotary`.
        normed: whether each head of queries and keys has a norm, or all of them together.
        wide: as of that `Norm`.
        woven: as of `Rotary`.
    """

    doubled: bool
    normed: bool
    wide: bool = False
    woven: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentBlock:
    """Attention over latents: one product of queries, or what they are made of, and latents; rotation; a product of what heads give.

    Attributes:
        wide: as of the `Norm` of latents.
        doubled: as of `Rotary`.
        woven: as of `Rotary`.
        parted: as of `Rotary`.
        paired: whether angles come as complex numbers.
    """

    wide: bool
    doubled: bool = False
    woven: bool = False
    parted: bool = False
    paired: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertsBlock:
    """A router, experts, perhaps a shared expert beside them.

    Attributes:
        router: name of the router within the module.
        rule: how it chooses.
        correction: path of what is added to scores for the choice, or None.
        shared: name of the shared expert's module, or None.
        gate: name of the weight of its share, or None.
        feed: the shared expert's activation, if blocks compute it; None: its own code runs.
    """

    router: str
    rule: RouterRule
    correction: str | None = None
    shared: str | None = None
    gate: str | None = None
    feed: str | None = None


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
        feed: activation of the second part, if blocks compute it and it has no experts; None otherwise.
    """

    attention: str
    second: str
    norms: tuple[str, str]
    wide: bool
    heads: AttentionBlock | LatentBlock | None = None
    experts: ExpertsBlock | None = None
    feed: str | None = None


class AttentionTensors(NamedTuple):
    """Weights of an attention module.

    Attributes:
        joined: of queries, keys and values, `[(Q + 2G) D, H]`.
        bias: `[(Q + 2G) D]`, or None.
        heads: of them.
        norms: of a query's and a key's head or of all of them, or None.
        out: `[H, Q D]`.
        out_bias: `[H]`, or None.
    """

    joined: Tensor
    bias: Tensor | None
    heads: Heads
    norms: tuple[Norm, Norm] | None
    out: Tensor
    out_bias: Tensor | None


class LatentTensors(NamedTuple):
    """Weights of a latent attention module.

    Attributes:
        joined: of queries, or of what they are made of, and of latents with the keys' rotary part, `[N + rank + R, H]`.
        bias: `[N + rank + R]`, or None.
        heads: of it.
        asked: what makes queries of what the first product gives: its norm `[N]`, and a weight `[Q (plain + R), N]`; None: they are that.
        out: `[H, Q V]`.
        out_bias: `[H]`, or None.
    """

    joined: Tensor
    bias: Tensor | None
    heads: LatentHeads
    asked: tuple[Norm, Tensor] | None
    out: Tensor
    out_bias: Tensor | None


class FeedTensors(NamedTuple):
    """Weights of a gated feed-forward block.

    Attributes:
        joined: of both products, `[2I, H]`.
        out: `[H, I]`.
        activation: a key of `ACTIVATIONS`.
    """

    joined: Tensor
    out: Tensor
    activation: str


class ExpertsTensors(NamedTuple):
    """What computes a layer's second part.

    Attributes:
        router: chooses.
        counts: as of `route`.
        shared: the shared expert, its weights or a function of normed states; None: there is none.
    """

    router: Router
    counts: Tensor
    shared: FeedTensors | Callable[[Tensor], Tensor] | None


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


def over_latents(
    kernels: Backend,
    tensors: LatentTensors,
    states: Tensor,
    attend: Callable[[Tensor, Tensor], Tensor],
    norm: Norm | None = None,
) -> Tensor:
    """Attention of one token a sequence over latents.

    Args:
        kernels: what computes.
        tensors: of the module.
        states: `[T, H]`.
        attend: queries `[T, Q (plain + R)]` and latents `[T, rank + R]` to what heads give, `[T, Q, V]`.
        norm: as of `attention`.

    Returns:
        `[T, H]`.
    """
    kept = sum(width for _, width in tensors.heads.kept)
    joined = kernels.product(states, tensors.joined, tensors.bias, norm)
    queries, latents = joined.split([joined.shape[1] - kept, kept], dim=1)
    if tensors.asked is not None:
        queries = kernels.product(queries, tensors.asked[1], None, tensors.asked[0])
    residual = None if norm is None else states
    return kernels.product(attend(queries, latents).flatten(1), tensors.out, tensors.out_bias, None, residual)


def feed(
    kernels: Backend,
    tensors: FeedTensors,
    states: Tensor,
    norm: Norm | None = None,
    *,
    residual: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """A gated feed-forward block.

    Args:
        kernels: what computes.
        tensors: of the module.
        states: `[T, H]`.
        norm: before the module; None: states come normed.
        residual: `[T, H]`, what its result is added to; None: nothing.
        share: `[T, 1]`, what it is multiplied by before; None: nothing.

    Returns:
        `[T, H]`.
    """
    inner = kernels.gated(states, tensors.joined, tensors.activation, norm)
    return kernels.product(inner, tensors.out, None, None, residual, share)


def experts(
    kernels: Backend,
    tensors: ExpertsTensors,
    states: Tensor,
    norm: Norm,
    run: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor | None], Tensor],
    known: Known | None = None,
) -> Tensor:
    """Norm, router and experts, added to the states.

    Args:
        kernels: what computes.
        tensors: of the module.
        states: `[T, H]`.
        norm: before the module.
        run: normed states, experts `[T, K]`, weights `[T, K]`, what else is added, and the experts' slots if known, to `[T, H]`.
        known: of the layer's experts; None: nothing.
    """
    normed, index, weights, slots, share = kernels.route(
        states, norm, tensors.router, tensors.counts, *(known or Known())
    )
    added: tuple[Tensor, ...] = (states,)
    if isinstance(tensors.shared, FeedTensors):
        added = feed(kernels, tensors.shared, normed, share=share), states
    elif tensors.shared is not None:
        out = tensors.shared(normed)
        added = out if share is None else share * out, states
    return run(normed, index, weights, added, slots)
