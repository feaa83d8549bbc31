"""Switch Transformers, which are outside the experts registry: their experts class is swapped for ours.

The stock class keeps every expert as a submodule and receives the routing as one-hot vectors. Source of the
semantics: transformers 5.17 `SwitchTransformersExperts`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.switch_transformers import modeling_switch_transformers as stock

from expertflow.models.experts import Binding, ExpertWeights, run_experts


class SwitchExperts(nn.Module):
    """Stands where `SwitchTransformersExperts` was, without parameters."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Take sizes and activation from the config."""
        super().__init__()
        self.num_experts = int(config.num_experts)
        self.act_fn: Any = ACT2FN[config.dense_act_fn]
        self.expert_shapes = (("wi", (config.d_ff, config.d_model)), ("wo", (config.d_model, config.d_ff)))
        self.expertflow: Binding | None = None

    @torch.compiler.disable(reason="offloaded experts are chosen and copied by the host")
    def forward(
        self,
        hidden_states: Float[Tensor, "T H"],
        selected_experts: Int[Tensor, "T 1 E"],
        routing_weights: Float[Tensor, "T 1"],
    ) -> Float[Tensor, "T H"]:
        """One expert a token, times its router probability; a token over capacity (all zeros) gets nothing."""
        binding = self.expertflow
        assert binding is not None
        chosen = selected_experts.argmax(dim=-1)
        index = torch.where(selected_experts.any(dim=-1), chosen, self.num_experts)
        carried = binding.context.now
        if carried.experts is not None:
            return carried.experts(binding.layer, hidden_states, index, routing_weights)
        if carried.padding is not None:
            index = index.masked_fill(carried.padding[:, None], self.num_experts)
        return run_experts(binding, self._mlp, hidden_states, index, routing_weights, self.num_experts)

    def _mlp(self, tokens: Tensor, expert: ExpertWeights) -> Tensor:
        inner = self.act_fn(functional.linear(tokens, expert["wi"])).to(expert["wo"].dtype)
        return functional.linear(inner, expert["wo"])


@contextmanager
def swapped_switch_experts() -> Iterator[None]:
    """Make Switch models inside with our experts class, because the stock one makes four useless modules an expert."""
    theirs = stock.SwitchTransformersExperts
    stock.SwitchTransformersExperts = SwitchExperts
    try:
        yield
    finally:
        stock.SwitchTransformersExperts = theirs


def mark_switch_experts(model: PreTrainedModel) -> None:
    """Keep transformers from initialising the experts of a model's sparse blocks; other models are left alone."""
    for module in model.modules():
        if isinstance(module, stock.SwitchTransformersSparseMLP):
            module._is_hf_initialized = True  # noqa: SLF001 - or transformers indexes experts
