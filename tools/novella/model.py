"""A compact training twin of Qwen3-MoE (and dense Qwen3) whose state maps 1:1 to the stock model.

The stock implementation is the reference (see tests): this one only adds speed. It sorts tokens by expert and
multiplies all experts in one grouped GEMM. Weights are fp32, and it computes in bf16 on CUDA. It returns the
load-balance and router z-losses with the language-model loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from novella.constants import Recipe, Shape

GROUPED_MM: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm  # noqa: SLF001


class LayerOut(NamedTuple):
    """What one decoder layer returns: its output, its two router losses, tokens per expert."""

    hidden: Tensor
    balance: Tensor
    z: Tensor
    counts: Tensor


class Dispatch(torch.autograd.Function):
    """Copy each token's row once per chosen expert, in expert order; backward is `combine_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        """Return the copied rows."""
        ctx.save_for_backward(inverse)
        ctx.k = k
        return rows[order // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Sum the gradients of a token's copies."""
        (inverse,) = ctx.saved_tensors
        return combine_rows(grads[0], inverse, ctx.k), None, None, None


class Combine(torch.autograd.Function):
    """Sum a token's expert outputs back into one row; the adjoint of `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        """Return one row a token."""
        ctx.save_for_backward(order)
        ctx.k = k
        return combine_rows(rows, inverse, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Hand every copy the token's gradient."""
        (order,) = ctx.saved_tensors
        return grads[0][order // ctx.k], None, None, None


def combine_rows(rows: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Sum each token's `k` rows of an expert-ordered tensor."""
    return rows[inverse].view(-1, k, rows.shape[-1]).sum(1)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply expert-ordered rows with each expert's own [out, in] matrix."""
    if rows.is_cuda:
        ends = counts.cumsum(0).to(torch.int32)
        return GROUPED_MM(rows, weight.transpose(-2, -1), offs=ends)
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(part, weight[e]) for e, part in enumerate(parts)])


def choose_experts(probs: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` largest probabilities, largest first (fuses well)."""
    left = probs.detach()
    places = torch.arange(left.shape[-1], device=left.device)
    chosen = []
    for _ in range(k):
        best = left.argmax(-1, keepdim=True)
        chosen.append(best)
        left = torch.where(places == best, -1.0, left)
    return torch.cat(chosen, -1)


class Norm(nn.Module):
    """RMSNorm, normalising in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        """Make a norm over the last dimension of `size`."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and scale."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Linear(nn.Module):
    """A bias-free linear map that computes in its input's precision."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Make the [outputs, inputs] matrix."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with per-head query and key norms and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        """Make the four projections and two norms."""
        super().__init__()
        self.shape = shape
        self.q_proj = Linear(shape.hidden, shape.heads * shape.head_dim)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.hidden)
        self.q_norm = Norm(shape.head_dim, shape.norm_eps)
        self.k_norm = Norm(shape.head_dim, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend causally over the sequence."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        copies = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class Experts(nn.Module):
    """The experts' stacked matrices, named and shaped as in the stock model."""

    def __init__(self, shape: Shape) -> None:
        """Make both stacks."""
        super().__init__()
        width, hidden = shape.expert_width, shape.hidden
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, hidden, width))


class MoE(nn.Module):
    """A router and its experts."""

    def __init__(self, shape: Shape) -> None:
        """Make the router and the experts."""
        super().__init__()
        self.shape = shape
        self.gate = Linear(shape.hidden, shape.experts)
        self.experts = Experts(shape)

    def forward(self, x: Tensor) -> LayerOut:
        """Route every token to its top-k experts and sum their weighted outputs."""
        k = self.shape.top_k
        rows = x.reshape(-1, x.shape[-1])
        logits = self.gate(rows).float()
        probs = logits.softmax(-1)
        chosen = choose_experts(probs, k)
        weights = probs.gather(-1, chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        flat = chosen.flatten()
        order = torch.sort(flat.to(torch.uint8), stable=True).indices
        places = torch.arange(order.shape[0], device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, places)
        counts = (flat[:, None] == torch.arange(self.shape.experts, device=flat.device)).sum(0)
        out = self.apply_experts(rows, order, inverse, weights.flatten().gather(0, order), counts)
        load = counts.float() / flat.shape[0]
        balance = self.shape.experts * (load * probs.mean(0)).sum()
        z = logits.logsumexp(-1).pow(2).mean()
        return LayerOut(out.view_as(x), balance, z, counts)

    def apply_experts(self, rows: Tensor, order: Tensor, inverse: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Run the chosen experts over their tokens."""
        k = self.shape.top_k
        spread: Tensor = Dispatch.apply(rows, order, inverse, k)
        gate_up = grouped_linear(spread, self.experts.gate_up_proj.to(rows.dtype), counts)
        gate, up = gate_up.chunk(2, -1)
        inner = F.silu(gate) * up * weights[:, None]
        out = grouped_linear(inner, self.experts.down_proj.to(rows.dtype), counts)
        result: Tensor = Combine.apply(out, order, inverse, k)
        return result


class Dense(nn.Module):
    """The baseline's gated MLP."""

    def __init__(self, shape: Shape) -> None:
        """Make the three matrices."""
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.dense_width)
        self.up_proj = Linear(shape.hidden, shape.dense_width)
        self.down_proj = Linear(shape.dense_width, shape.hidden)

    def forward(self, x: Tensor) -> LayerOut:
        """Apply the MLP; there is nothing to balance."""
        zero = x.new_zeros((), dtype=torch.float32)
        out = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return LayerOut(out, zero, zero, x.new_zeros(1, dtype=torch.int64))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        """Make attention, MLP and their norms."""
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp: MoE | Dense = MoE(shape) if shape.moe else Dense(shape)
        self.input_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> LayerOut:
        """Add attention and MLP to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: LayerOut = self.mlp(self.post_attention_layernorm(x))
        return LayerOut(x + out.hidden, *out[1:])


class Body(nn.Module):
    """Embedding, layers and final norm, named as in the stock model."""

    def __init__(self, shape: Shape) -> None:
        """Make all layers."""
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to [batch, heads, length, head_dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + turned * sin


def run_layer(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call one layer (the unit that torch.compile sees, the same code for every layer).

    A plain tuple of `LayerOut`'s fields: torch 2.11 cannot return a named tuple from a compiled function.
    """
    hidden, balance, z, counts = layer(x, cos, sin)
    return hidden, balance, z, counts


def token_losses(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over all tokens."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), embedding.to(hidden.dtype))
    return F.cross_entropy(logits.float(), targets.reshape(-1))


class Losses(NamedTuple):
    """The total loss, its parts, and tokens per expert and layer."""

    total: Tensor
    language: Tensor
    balance: Tensor
    z: Tensor
    counts: Tensor


class Twin(nn.Module):
    """The whole language model."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        """Make the model; `dtype` is what it computes in (its weights are fp32)."""
        super().__init__()
        self.shape = shape
        self.dtype = dtype
        self.model = Body(shape)
        self.run_layer: Callable[..., tuple[Tensor, ...]] = run_layer
        self.loss_of: Callable[..., Tensor] = token_losses
        self.tables: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def compile_parts(self) -> None:
        """Compile one layer (all share the code) and the loss, for training shapes."""
        self.run_layer = torch.compile(run_layer, fullgraph=True, dynamic=False)
        self.loss_of = torch.compile(token_losses, fullgraph=True, dynamic=False)

    def use_eager(self) -> None:
        """Go back to uncompiled code (for evaluation and sampling)."""
        self.run_layer, self.loss_of = run_layer, token_losses

    def initialise(self, seed: int) -> Twin:
        """Draw every matrix from a seeded normal; residual outputs are scaled down by depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in sorted(self.named_parameters()):
            if weight.dim() > 1:
                deep = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                std = self.shape.init_std / (math.sqrt(2 * self.shape.layers) if deep else 1.0)
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * std)
        return self

    def positions(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the rotary cosines and sines of the first `length` positions."""
        key = (length, str(device))
        if key not in self.tables:
            half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32, device=device)
            turns = 1.0 / self.shape.rope_theta ** (half / self.shape.head_dim)
            angles = torch.outer(torch.arange(length, device=device).float(), turns)
            angles = torch.cat((angles, angles), -1)
            self.tables[key] = (angles.cos().to(self.dtype), angles.sin().to(self.dtype))
        return self.tables[key]

    def hidden(self, tokens: Tensor) -> tuple[Tensor, list[LayerOut]]:
        """Return the final hidden states and every layer's output."""
        cos, sin = self.positions(tokens.shape[1], tokens.device)
        x = F.embedding(tokens, self.model.embed_tokens.weight).to(self.dtype)
        outs: list[LayerOut] = []
        for layer in self.model.layers:
            outs.append(LayerOut(*self.run_layer(layer, x, cos, sin)))
            x = outs[-1].hidden
        return self.model.norm(x), outs

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the next-token logits of every position."""
        hidden, _ = self.hidden(tokens)
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))

    def forward(self, tokens: Tensor, targets: Tensor, recipe: Recipe) -> Losses:
        """Return the losses of one batch."""
        hidden, outs = self.hidden(tokens)
        language = self.loss_of(hidden, self.model.embed_tokens.weight, targets)
        balance = torch.stack([out.balance for out in outs]).mean()
        z = torch.stack([out.z for out in outs]).mean()
        total = language + recipe.balance_coef * balance + recipe.z_coef * z
        return Losses(total, language, balance, z, torch.stack([out.counts for out in outs]))


def stock_config(shape: Shape, recipe: Recipe) -> PretrainedConfig:
    """Return the ordinary Hugging Face config of the same model."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.norm_eps,
        "initializer_range": shape.init_std,
        "intermediate_size": shape.dense_width,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if not shape.moe:
        return Qwen3Config(**common)
    return Qwen3MoeConfig(
        **common,
        moe_intermediate_size=shape.expert_width,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance_coef,
    )


def parameter_counts(twin: Twin) -> dict[str, int]:
    """Return total, expert and per-token active parameters."""
    shape = twin.shape
    total = sum(p.numel() for p in twin.parameters())
    experts = sum(p.numel() for n, p in twin.named_parameters() if ".experts." in n)
    used = experts * shape.top_k // shape.experts if shape.moe else 0
    return {"total": total, "experts": experts, "active": total - experts + used}
