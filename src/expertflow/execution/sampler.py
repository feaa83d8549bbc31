"""The next token of one sequence from its logits. Deterministic in (logits, parameters, uniform number).

Inverse-CDF sampling over sorted probabilities, with one uniform number a token. It is drawn from the request's own
generator on the host, so that neither the device nor other sequences change what is drawn.
"""

import secrets
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from expertflow.config import SamplingParams

NO_TOKEN = -1
"""In place of a token where logits are no numbers."""


def make_generator(params: SamplingParams) -> torch.Generator:
    """The request's own source of random numbers; its `initial_seed` is the seed stated, or the one drawn here."""
    return torch.Generator().manual_seed(draw_seed() if params.seed is None else params.seed)


def draw_seed() -> int:
    """A seed that cannot be foreseen, within the range that `SamplingParams` takes."""
    return secrets.randbits(63)


def choose_all(
    logits: Float[Tensor, "B V"],
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator],
    best: Int[Tensor, " B"] | None = None,
) -> list[int]:
    """Pick a token of every sequence, `NO_TOKEN` where its logits are no numbers; the device is waited for once for greedy ones.

    Args:
        logits: of all sequences.
        params: one a sequence.
        generators: one a sequence; see `choose`.
        best: the result of `most_probable`, if it is known already.
    """
    first = (most_probable(logits) if best is None else best).tolist()
    return [
        token if token == NO_TOKEN or one.temperature == 0 else choose(logits[place], one, generators[place])
        for place, (token, one) in enumerate(zip(first, params, strict=True))
    ]


def most_probable(logits: Float[Tensor, "B V"]) -> Int[Tensor, " B"]:
    """The most probable token of each sequence; `NO_TOKEN` where the largest logit is NaN or infinite. Waits for nothing."""
    best = logits.argmax(dim=-1)  # NaN counts as the largest
    return best.masked_fill_(~logits.gather(-1, best[:, None])[:, 0].isfinite(), NO_TOKEN)


def choose(logits: Float[Tensor, " V"], params: SamplingParams, generator: torch.Generator) -> int:
    """Pick a token.

    Args:
        logits: of one sequence, any float dtype.
        params: temperature 0 takes the most probable token, the lowest id among equals.
        generator: advanced by one number unless greedy.
    """
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / params.temperature, dim=-1)
    values, tokens = probabilities.sort(descending=True, stable=True)
    if params.top_k:
        values[params.top_k :] = 0
        values /= values.sum()
    before = values.cumsum(0) - values
    values[before >= params.top_p] = 0
    running = values.double().cumsum(0)
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
    position = int(torch.searchsorted(running, uniform * float(running[-1]), right=True))
    return int(tokens[min(position, int((values > 0).sum()) - 1)])
