"""Adafactor without momentum for bf16 weights: factored second moments, steps in proportion to the weights, stochastic rounding.

What it keeps is two vectors a matrix. Source: Shazeer and Stern 2018, with T5's settings. Stochastic rounding lets steps
smaller than a bf16 digit count.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_TINY, _SMALLEST_SCALE = 1e-30, 1e-3
_CHUNK = 1 << 26
"""Elements worked on at once: the float32 copies are what takes memory."""


def round_to(target: Tensor, exact: Tensor) -> None:
    """Write float32 values into a tensor; into bf16 up or down by chance, so that the mean is right."""
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    bits = exact.view(torch.int32)
    bits.add_(torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device)).bitwise_and_(-(1 << 16))
    target.copy_(exact)


class Factored:
    """The optimizer. Gradients are taken and dropped by `step`."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Start with nothing seen."""
        self._parameters = list(parameters)
        self._count = 0
        self._state: dict[int, tuple[Tensor, ...]] = {}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step; `rate` is relative to the weights' root mean square."""
        self._count += 1
        keep = 1 - self._count**-0.8
        for number, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            matrices = parameter.ndim >= 2
            weight = parameter.data if parameter.ndim == 3 else parameter.data[None]
            grad = parameter.grad if parameter.ndim == 3 else parameter.grad[None]
            state = self._state.setdefault(number, self._fresh(weight, matrices=matrices))
            each = max(1, _CHUNK // max(weight[0].numel(), 1))
            for begin in range(0, len(weight), each):
                part = slice(begin, begin + each)
                self._update(weight[part], grad[part].float(), [s[part] for s in state], rate, keep)
            parameter.grad = None

    @staticmethod
    def _fresh(weight: Tensor, *, matrices: bool) -> tuple[Tensor, ...]:
        if not matrices:
            return (torch.zeros(weight.shape, device=weight.device),)
        rows, columns = weight.shape[:-1], (*weight.shape[:-2], weight.shape[-1])
        return torch.zeros(rows, device=weight.device), torch.zeros(columns, device=weight.device)

    @staticmethod
    def _update(weight: Tensor, grad: Tensor, state: list[Tensor], rate: float, keep: float) -> None:
        square = grad.square().add_(_TINY)
        if len(state) == 1:
            state[0].mul_(keep).add_(square, alpha=1 - keep)
            grad.mul_(state[0].rsqrt())
        else:
            rows, columns = state
            rows.mul_(keep).add_(square.mean(-1), alpha=1 - keep)
            columns.mul_(keep).add_(square.mean(-2), alpha=1 - keep)
            grad.mul_((rows / rows.mean(-1, keepdim=True)).rsqrt_()[..., None]).mul_(columns.rsqrt()[..., None, :])
        inner = tuple(range(1, grad.ndim))
        size = torch.linalg.vector_norm(grad, dim=inner, keepdim=True) / grad[0].numel() ** 0.5
        exact = weight.float()
        scale = torch.linalg.vector_norm(exact, dim=inner, keepdim=True) / grad[0].numel() ** 0.5
        grad.mul_(-rate * scale.clamp(min=_SMALLEST_SCALE) / size.clamp(min=1))
        round_to(weight, exact.add_(grad))
