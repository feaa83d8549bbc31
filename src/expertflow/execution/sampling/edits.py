"""Changes of single logits before a token is chosen: bias, penalties, and no ending too early.

Order and meaning as in vLLM and transformers: the bias is added, the repetition penalty divides positive logits and multiplies
others, then presence and frequency penalties are taken off. A sequence keeps a list of the tokens concerned; the vocabulary's
other logits are not touched. Must not know requests.
"""

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from expertflow.config import SamplingParams
from expertflow.execution.sampling.upload import upload

_ROOM = 64
"""Tokens that the list of a sequence has room for at first; it doubles."""


class TokenEdits:
    """The tokens of one sequence whose logits change.

    Args:
        params: bias and penalties.
        prompt: its tokens count for the repetition penalty.
        ends: tokens that end the sequence, forbidden before `min_tokens`.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], ends: Collection[int]) -> None:
        """List the tokens that are known now."""
        self._params, self._ends = params, set(ends) if params.min_tokens else set[int]()
        self._repeats = params.repetition_penalty != 1
        self._counts = bool(params.presence_penalty or params.frequency_penalty)
        self._places: dict[int, int] = {}
        self._ids = np.zeros(_ROOM, np.int64)
        self._numbers = np.zeros((3, _ROOM))
        """A line each: bias, whether it is in prompt or answer, and how often in the answer."""
        for token, bias in (params.logit_bias or {}).items():
            place = self._place(token)  # first: it may replace the arrays
            self._numbers[0, place] = bias
        for token in set(prompt) if self._repeats else ():
            place = self._place(token)
            self._numbers[1, place] = 1
        for token in self._ends:
            self._place(token)

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)], axis=1)
        self._ids[place] = token
        return place

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        if self._repeats or self._counts:
            place = self._place(token)
            self._numbers[1, place] = 1
            self._numbers[2, place] += 1

    def lines(self, generated: int) -> npt.NDArray[np.float64]:
        """The changes before the next token.

        Args:
            generated: tokens so far.

        Returns:
            `[4, n]`: token ids, each once; what is added, what is divided by, and what is then taken off.
        """
        count, params = len(self._places), self._params
        bias, seen, often = self._numbers[:, :count].copy()
        if generated < params.min_tokens:
            bias[[self._places[token] for token in self._ends]] = -np.inf
        divisor = np.where(seen > 0, params.repetition_penalty, 1.0)
        taken = params.frequency_penalty * often + params.presence_penalty * (often > 0)
        return np.stack([self._ids[:count], bias, divisor, taken])


def edit(
    logits: Float[Tensor, "B V"], edits: Sequence[TokenEdits | None], generated: Sequence[int]
) -> Float[Tensor, "B V"]:
    """The logits as float32, a copy, with the changes of each sequence; None: it has none. Waits for nothing.

    Args:
        logits: of all sequences.
        edits: of each.
        generated: tokens of each so far.
    """
    changed = logits.to(torch.float32, copy=True).contiguous()
    lines = []
    for row, (one, count) in enumerate(zip(edits, generated, strict=True)):
        if one is not None:
            found = one.lines(count)
            found[0] += row * logits.shape[1]
            lines.append(found)
    if not lines:
        return changed
    there = upload(np.concatenate(lines, axis=1), logits.device)
    where, (bias, divisor, taken) = there[0].long(), there[1:].float()
    flat = changed.view(-1)
    found = flat[where] + bias
    found = torch.where(found > 0, found / divisor, found * divisor) - taken
    flat[where] = found
    return changed
