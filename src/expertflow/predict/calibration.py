"""Weighs network and counts against each other, so that probabilities are true: logistic regression, layer by layer.

This is Platt scaling with more than one score. Must not know where scores come from.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from expertflow.predict.counts import SOURCES

_NEWTON = 10


def weigh(
    weights: Float[Tensor, "F O L 1"], logits: Float[Tensor, "*B O L E"], rows: Float[Tensor, "*B S L E"]
) -> Float[Tensor, "*B O L E"]:
    """Weighted sum of the network's logits and of the counts' log odds, and a shift.

    Args:
        weights: F = 2 + SOURCES: of the logits, of each source of counts, the shift.
        logits: of the first outputs, or of all.
        rows: log odds, as `Memory` gives them.
    """
    outputs = logits.shape[-3]
    result = torch.addcmul(weights[-1, :outputs], logits, weights[0, :outputs])
    for source in range(SOURCES):
        result = torch.addcmul(result, rows[..., source : source + 1, :, :], weights[1 + source, :outputs])
    return result


class Scored(NamedTuple):
    """Scores of N tokens, and what was true.

    Attributes:
        logits: `[N, O, L, E]` of the network.
        rows: `[N, S, L, E]` log odds of the counts.
        truth: `[N, O, L, E]` 0 or 1.
        valid: `[N, O]` bool, whether the truth is known.
    """

    logits: Tensor
    rows: Tensor
    truth: Tensor
    valid: Tensor


def recalled(scores: Tensor, truth: Tensor, valid: Tensor, guesses: int) -> tuple[Tensor, Tensor]:
    """`[O]` twice: true experts among the best guesses a layer, and all of them; tensors as in `Scored`."""
    hits = truth.gather(-1, scores.topk(guesses, dim=-1).indices).sum((-1, -2))
    return (hits * valid).sum(0), (truth.sum((-1, -2)) * valid).sum(0)


def calibrate(parts: Sequence[Scored]) -> Tensor:
    """Fit weights to what was true, by logistic regression for every output and layer (Newton's method).

    Args:
        parts: of passages that neither network nor counts learned from.

    Returns:
        `[2 + SOURCES, O, L, 1]` float32, see `weigh`; 1, 0, ..., 0 where there is nothing to fit.
    """
    outputs, layers = parts[0].logits.shape[1:3]
    count = 2 + SOURCES
    weights = torch.zeros(count, outputs, layers, dtype=torch.float64, device=parts[0].logits.device)
    weights[0] = 1
    ridge = 1e-3 * torch.eye(count, dtype=torch.float64, device=weights.device)
    for _ in range(_NEWTON):
        gradient = torch.zeros_like(weights)
        curve = torch.zeros(count, count, outputs, layers, dtype=torch.float64, device=weights.device)
        for part in parts:
            p = torch.sigmoid(weigh(weights.float()[..., None], part.logits, part.rows))
            known = part.valid[:, :, None, None].float()
            error, slope = (p - part.truth) * known, p * (1 - p) * known
            for first in range(count):
                x = _score(part, first)
                gradient[first] += (error * x).sum((0, 3)).double()
                for second in range(first + 1):
                    curve[first, second] += (slope * x * _score(part, second)).sum((0, 3)).double()
                    curve[second, first] = curve[first, second]
        change = torch.linalg.solve(curve.permute(2, 3, 0, 1) + ridge, gradient.permute(1, 2, 0)[..., None])
        weights -= change[..., 0].permute(2, 0, 1).clamp(-1, 1)
    return weights.float()[..., None]


def _score(part: Scored, number: int) -> Tensor:
    """The score that a weight multiplies: logits, log odds of counts, or 1."""
    if number == 0:
        return part.logits
    return part.rows[:, number - 1 : number] if number <= SOURCES else torch.ones_like(part.logits[:1])
