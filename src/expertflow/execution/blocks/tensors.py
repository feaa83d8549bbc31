"""Weights of modules as blocks take them, by the names they have in their modules: of loaded ones, and of those that are tried.

Must not know where the numbers come from.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from expertflow.execution.blocks.forms import (
    AttentionBlock,
    AttentionTensors,
    ExpertsBlock,
    ExpertsTensors,
    FeedTensors,
    LatentBlock,
    LatentTensors,
)
from expertflow.kernels.blocks.given import Heads, LatentHeads, Norm, Rotary, Router

Tensors = dict[str, Tensor]
FEED = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""Names of the tensors of a gated feed-forward block."""
Join = Callable[[list[Tensor]], Tensor | None]
"""Makes one weight of several by their rows; None where it cannot."""


def tensors_of(module: Module) -> Tensors:
    """A module's parameters and buffers, by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def within(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """Those of a child."""
    return {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}


def rotary_of(block: AttentionBlock | LatentBlock, angles: Any) -> Rotary:
    """A pass's rotary tables, from what its layers are given: cosines and sines `[B, C, R]`, or both as complex numbers."""
    if isinstance(block, LatentBlock) and block.paired:
        angles = torch.view_as_real(angles).unbind(-1)
    cos, sin = (one.reshape(-1, one.shape[-1]) for one in angles)
    return Rotary(cos, sin, block.doubled, block.woven, isinstance(block, LatentBlock) and block.parted)


def attention_tensors(
    module: Any, block: AttentionBlock, tensors: Tensors, join: Join = torch.cat
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
    lengths = [len(tensors[name]) for name in gains]
    if sizes[1] != sizes[2] or lengths not in ([], [width, width], [sizes[0] * width, sizes[1] * width]):
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


def latent_tensors(module: Any, block: LatentBlock, tensors: Tensors, join: Join = torch.cat) -> LatentTensors | None:
    """Weights of a latent attention module, by the names they have in it.

    Args:
        module: with `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, `o_proj`, and `q_proj` or `q_a_proj` with its norm and `q_b_proj`.
        block: that it matches, or may match.
        tensors: its tensors.
        join: makes one of the weights of queries and latents.

    Returns:
        None if it has other tensors, or they have other shapes.
    """
    first, in_two = "q_proj" if "q_proj.weight" in tensors else "q_a_proj", "q_proj.weight" not in tensors
    pair = [first, "kv_a_proj_with_mqa"]
    needed = {*pair, "kv_a_layernorm", "kv_b_proj", "o_proj", *(("q_a_layernorm", "q_b_proj") if in_two else ())}
    biases = [f"{name}.bias" for name in pair if f"{name}.bias" in tensors]
    weights = {f"{name}.weight" for name in needed}
    if not weights <= tensors.keys() <= weights | {*biases, "o_proj.bias"} or len(biases) == 1:
        return None

    def norm(name: str) -> Norm:
        return Norm(tensors[f"{name}.weight"], module.get_submodule(name).variance_epsilon, block.wide)

    latents, plain, weight = norm("kv_a_layernorm"), int(module.qk_nope_head_dim), tensors["kv_b_proj.weight"]
    rope = len(tensors["kv_a_proj_with_mqa.weight"]) - len(latents.weight)
    asked = (norm("q_a_layernorm"), tensors["q_b_proj.weight"]) if in_two else None
    outputs = len(tensors["q_proj.weight"] if asked is None else asked[1])
    count = outputs // (plain + rope)
    if rope <= 0 or rope % 2 or outputs != count * (plain + rope) or len(weight) % count or not weight.is_contiguous():
        return None
    joined = join([tensors[f"{name}.weight"] for name in pair])
    bias = join([tensors[name] for name in biases]) if biases else None
    if joined is None or (biases and bias is None):
        return None
    heads = LatentHeads(count, plain, rope, latents, weight)
    return LatentTensors(joined, bias, heads, asked, tensors["o_proj.weight"], tensors.get("o_proj.bias"))


def feed_tensors(tensors: Tensors, activation: str, join: Join = torch.cat) -> FeedTensors | None:
    """Weights of a gated feed-forward block; None if it has other tensors than `FEED`, or of other shapes."""
    if {*FEED} != tensors.keys():
        return None
    gate, up, down = (tensors[name] for name in FEED)
    if gate.shape != up.shape or down.shape != gate.shape[::-1] or (joined := join([gate, up])) is None:
        return None
    return FeedTensors(joined, down, activation)


def experts_tensors(
    module: Any, block: ExpertsBlock, tensors: Tensors, counts: Tensor, join: Join = torch.cat
) -> ExpertsTensors | None:
    """Weights of a second part, by the names they have in it; None if `join` cannot join the router's with that of a share."""
    correction = None if block.correction is None else tensors[block.correction].flatten()
    weight, gated = tensors[f"{block.router}.weight"], block.gate is not None
    both = join([weight, tensors[f"{block.gate}.weight"]]) if gated else weight
    if both is None:
        return None
    router = Router(both, tensors.get(f"{block.router}.bias"), correction, block.rule, gated)
    if block.shared is None:
        return ExpertsTensors(router, counts, None)
    own, weights = module.get_submodule(block.shared), within(tensors, block.shared)
    if block.feed is not None and (feed := feed_tensors(weights, block.feed, join)) is not None:
        return ExpertsTensors(router, counts, feed)

    def shared(normed: Tensor) -> Tensor:
        out: Tensor = functional_call(own, weights, (normed,))
        return out

    return ExpertsTensors(router, counts, shared)
