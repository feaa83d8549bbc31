"""The optimiser: Muon for hidden matrices (batched over experts), AdamW for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from novella.constants import Recipe

ADAM_NAMES = ("embed_tokens", "mlp.gate.weight")


def orthogonalise(stack: Tensor, steps: int) -> Tensor:
    """Return the nearest orthogonal matrix of each [rows <= columns] matrix (Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if stack.is_cuda else torch.float32
    x = stack.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """View a parameter (or its gradient) as a stack of matrices, gate and up apart."""
    if name.endswith("gate_up_proj"):
        experts, twice, hidden = tensor.shape
        return tensor.view(2 * experts, twice // 2, hidden)
    return tensor if tensor.dim() == 3 else tensor[None]


@dataclass
class Bucket:
    """Parameters whose matrices share one shape, and their common momentum."""

    names: list[str] = field(default_factory=list)
    params: list[nn.Parameter] = field(default_factory=list)
    momentum: Tensor | None = None


class Hybrid:
    """Muon and AdamW side by side, under one learning-rate factor."""

    def __init__(self, model: nn.Module, recipe: Recipe, lr_scale: float = 1.0) -> None:
        """Sort the parameters into Muon's shape buckets and AdamW's groups."""
        self.recipe = recipe
        self.lr_scale = lr_scale
        self.buckets: dict[tuple[int, int], Bucket] = {}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, param in model.named_parameters():
            if param.dim() < 2:
                plain.append(param)
            elif any(part in name for part in ADAM_NAMES):
                decayed.append(param)
            else:
                rows, columns = as_matrices(name, param).shape[1:]
                key = (min(rows, columns), max(rows, columns))
                bucket = self.buckets.setdefault(key, Bucket())
                bucket.names.append(name)
                bucket.params.append(param)
        fused = next(model.parameters()).is_cuda
        self.adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": recipe.vector_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=recipe.vector_lr,
            betas=recipe.adam_betas,
            eps=1e-10,
            fused=fused,
        )
        self.all = [p for _, p in model.named_parameters()]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Clip, then update every parameter with `factor` times the recipe's learning rates."""
        factor *= self.lr_scale
        nn.utils.clip_grad_norm_(self.all, self.recipe.grad_clip)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.vector_lr * factor
        self.adam.step()
        for bucket in self.buckets.values():
            self.step_bucket(bucket, self.recipe.matrix_lr * factor)
        for param in self.all:
            param.grad = None

    def step_bucket(self, bucket: Bucket, lr: float) -> None:
        """Apply Muon to all matrices of one shape."""
        grads: list[Tensor] = []
        for name, param in zip(bucket.names, bucket.params, strict=True):
            if param.grad is None:
                msg = f"no gradient for {name}"
                raise RuntimeError(msg)
            stack = as_matrices(name, param.grad.contiguous())
            grads.append(stack.mT if stack.shape[1] > stack.shape[2] else stack)
        grad = torch.cat(grads)
        if bucket.momentum is None:
            bucket.momentum = torch.zeros_like(grad)
        bucket.momentum.lerp_(grad, 1.0 - self.recipe.momentum)
        update = orthogonalise(grad.lerp_(bucket.momentum, self.recipe.momentum), self.recipe.newton_schulz_steps)
        pieces = update.float().split([g.shape[0] for g in grads])
        for name, param, piece in zip(bucket.names, bucket.params, pieces, strict=True):
            stack = as_matrices(name, param)
            rows, columns = stack.shape[1:]
            turned = piece.mT if rows > columns else piece
            stack.mul_(1.0 - lr * self.recipe.matrix_decay)
            stack.add_(turned, alpha=-lr * max(1.0, rows / columns) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on."""
        momenta = {key: bucket.momentum for key, bucket in self.buckets.items()}
        return {"adam": self.adam.state_dict(), "momenta": momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s answer."""
        self.adam.load_state_dict(state["adam"])
        for key, momentum in state["momenta"].items():
            device = self.buckets[key].params[0].device
            self.buckets[key].momentum = None if momentum is None else momentum.to(device)


def learning_factor(step: int, total: int, recipe: Recipe) -> float:
    """Return the schedule: linear warm-up, a constant stretch, then linear decay to zero.

    Warm-up depends on `step` alone, so the total may still be unknown while it lasts.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    start = max(recipe.warmup_steps, recipe.constant_share * total)
    if step <= start:
        return 1.0
    return max(0.0, (total - step) / max(1.0, total - start))
