"""Weights of modules as blocks take them, by the names they have in their modules: of loaded ones, and of those that are tried.

Must not know where the numbers come from.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expertflow.execution.blocks.forms import AttentionBlock, AttentionTensors, ExpertsBlock, ExpertsTensors
from expertflow.kernels.blocks.given import Heads, Norm, Router

Tensors = dict[str, Tensor]


def tensors_of(module: nn.Module) -> Tensors:
    """A module's parameters and buffers, by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def within(tensors: Tensors, name: str) -> dict[str, Tensor]:
    """Those of a child."""
    return {key.removeprefix(f"{name}."): one for key, one in tensors.items() if key.startswith(f"{name}.")}


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


def experts_tensors(module: Any, block: ExpertsBlock, tensors: Tensors, counts: Tensor) -> ExpertsTensors:
    """Weights of a second part, by the names they have in it."""
    correction = None if block.correction is None else tensors[block.correction].flatten()
    router = Router(tensors[f"{block.router}.weight"], tensors.get(f"{block.router}.bias"), correction, block.rule)
    if block.shared is None:
        return ExpertsTensors(router, counts, None)
    own, weights = module.get_submodule(block.shared), within(tensors, block.shared)
    gate = None if block.gate is None else tensors[f"{block.gate}.weight"]

    def shared(normed: Tensor) -> Tensor:
        out: Tensor = functional_call(own, weights, (normed,))
        return out if gate is None else torch.sigmoid(nn.functional.linear(normed, gate)) * out

    return ExpertsTensors(router, counts, shared)
