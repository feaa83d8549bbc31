"""How likely tokens were, by the model's own logits: before bias, penalties, mask and temperature. Must not know requests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from expertflow.execution.sampling.upload import upload
from expertflow.kernels.backend import backend


class Logprob(NamedTuple):
    """A token's log-probability.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        rank: its place among all tokens, from 1: by logit, the lowest id first among equals.
    """

    token_id: int
    logprob: float
    rank: int


class Logprobs(NamedTuple):
    """Log-probabilities of sequences' tokens.

    Attributes:
        most: by sequence, how many of the most probable tokens are wanted beside its own; None: no log-probability at all.
        rows: those that have some.
        lines: float64, of each of these what `kernels.sampling.reference.likely` says, on the device or on its way from there.
    """

    most: Sequence[int | None]
    rows: Sequence[int]
    lines: Tensor

    def read(self, tokens: Sequence[int]) -> list[tuple[Logprob, ...] | None]:
        """For each sequence its token, then the most probable ones, which may have it again; None if not wanted, or none.

        Args:
            tokens: of all sequences; below 0: none.
        """
        found: list[tuple[Logprob, ...] | None] = [None] * len(tokens)
        for row, (own, rank, *others) in zip(self.rows, self.lines.tolist(), strict=True):
            ids, values = others[: len(others) // 2], others[len(others) // 2 :]
            best = [
                Logprob(int(token), value, place)
                for place, (token, value) in enumerate(zip(ids, values, strict=True), 1)
            ]
            if tokens[row] >= 0:
                found[row] = (Logprob(tokens[row], own, int(rank)), *best[: self.most[row] or 0])
        return found


def begin(logits: Float[Tensor, "B V"], tokens: Int[Tensor, " B"], most: Sequence[int | None]) -> Logprobs:
    """Queue the work. Waits for nothing.

    Args:
        logits: of all sequences.
        tokens: one of each, on the device.
        most: as `Logprobs.most`; one at least is wanted.
    """
    rows = [row for row, count in enumerate(most) if count is not None]
    there = upload(np.asarray(rows), logits.device)
    count = min(max(most[row] or 0 for row in rows), logits.shape[1])
    return Logprobs(most, rows, backend(logits.device).likely(logits, there, tokens[there], count))


def log_probabilities(
    logits: Float[Tensor, "B V"], tokens: Sequence[int], most: Sequence[int | None]
) -> list[tuple[Logprob, ...] | None]:
    """Log-probabilities of tokens; waits for the device once, if any are wanted.

    Args:
        logits: of all sequences.
        tokens: one of each; below 0: none.
        most: as `Logprobs.most`.

    Returns:
        As `Logprobs.read`.
    """
    if all(one is None for one in most):
        return [None] * len(tokens)
    return begin(logits, upload(np.asarray(tokens), logits.device), most).read(tokens)
