"""How likely tokens were, by the model's own logits: before bias, penalties, mask and temperature. Must not know requests."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 256
"""Tokens of which the most probable one is looked for first: on a GPU few of many numbers are found slowly, and few of few fast."""
ROWS = 2
"""Sequences, or positions, that are worked on at once: it takes up to 17 bytes for each of their logits, and 16 a token."""


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


def log_probabilities(
    logits: Float[Tensor, "B V"], tokens: Sequence[int], most: Sequence[int | None]
) -> list[tuple[Logprob, ...] | None]:
    """Log-probabilities of tokens.

    Args:
        logits: of all sequences.
        tokens: one of each; below 0: none.
        most: how many of the most probable tokens are wanted beside it; None: no log-probability at all.

    Returns:
        For each sequence the token, then the most probable ones, which may have it again; None if not wanted.
    """
    wanted = [
        row for row, (token, count) in enumerate(zip(tokens, most, strict=True)) if token >= 0 and count is not None
    ]
    found: list[tuple[Logprob, ...] | None] = [None] * len(tokens)
    work = [(rows, _begin(logits, rows, tokens, most)) for rows in _slices(wanted)]
    for rows, there in work:  # the device is waited for once
        lines = there.tolist()
        for row, (own, rank, *others) in zip(rows, lines, strict=True):
            ids, values = others[: len(others) // 2], others[len(others) // 2 :]
            best = [
                Logprob(int(token), value, place)
                for place, (token, value) in enumerate(zip(ids, values, strict=True), 1)
            ]
            found[row] = (Logprob(tokens[row], own, int(rank)), *best[: most[row] or 0])
    return found


def _slices(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[begin : begin + ROWS] for begin in range(0, len(rows), ROWS)]


def _begin(
    logits: Float[Tensor, "B V"], rows: Sequence[int], tokens: Sequence[int], most: Sequence[int | None]
) -> Float[Tensor, "R N"]:
    """Queue the work for a few sequences: a line each of the token's value and rank, then ids and values of the most probable.

    In float64, which holds all of these numbers.
    """
    count = min(max(most[row] or 0 for row in rows), logits.shape[1])
    chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)[:, None]
    values = logits[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] == len(rows) - 1 else logits[list(rows)]
    values = values.float()
    norm = values.logsumexp(-1, keepdim=True)
    own = values.gather(-1, chosen)
    ids = torch.arange(logits.shape[1], device=logits.device)
    rank = 1 + ((values > own) | ((values == own) & (ids < chosen))).sum(-1, keepdim=True)
    parts = [own - norm, rank]
    if count:
        best = _largest(_order(values), count)
        found = (2**32 - 1) - (best & (2**32 - 1))
        parts += [found, values.gather(-1, found) - norm]
    return torch.cat([part.double() for part in parts], dim=-1)


def _largest(keys: Int[Tensor, "R V"], count: int) -> Int[Tensor, "R K"]:
    """The largest of keys that are all different, in descending order: they lie in that many blocks, those with the largest ones."""
    blocks = keys.shape[1] // BLOCK
    if count >= blocks:
        return keys.topk(count).values
    blocked, rest = keys[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)), keys[:, blocks * BLOCK :]
    best = blocked.amax(-1).topk(count).indices
    found = blocked.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1)
    return torch.cat([found, rest], dim=1).topk(count).values


def _order(values: Float[Tensor, "R V"]) -> Int[Tensor, "R V"]:
    """Integers in the order of the tokens: by logit, the lowest id largest among equals."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(values.shape[1], device=values.device)
    return bits.bitwise_left_shift_(32).add_((2**32 - 1) - ids)
