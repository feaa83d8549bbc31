"""A cheap guess of the next token: what followed the last time, looked up in a predictor's own memory.

Static shapes, no synchronisation and no branch on data, so that it can be captured in a CUDA graph. Knows a state;
refuses to know networks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from expertflow.predict.model import State


class Draft(NamedTuple):
    """A guess for each of B sequences.

    Attributes:
        tokens: `[B]` int64, -1 where there is none.
        match: `[B]` int64, what is alike there: 0 nothing, 1 the newest token, 2 also the one before it.
    """

    tokens: Int[Tensor, " B"]
    match: Int[Tensor, " B"]


def look_up(state: State, rows: Int[Tensor, " B"]) -> Draft:
    """What followed the most recent position with the newest token and the one before it, else with the newest token.

    Positions that have left the ring, and those that an unknown token followed, say nothing.

    Args:
        state: what is remembered; not changed.
        rows: which sequences; they have taken a token in.
    """
    tokens, befores = state.tokens[rows], state.before[rows]
    ring = tokens.shape[1]
    newest = state.taken[rows, None] - 1
    age = (newest - torch.arange(ring, device=tokens.device)) % ring
    followers = tokens.roll(-1, dims=1)
    now, before = (torch.gather(column, 1, newest % ring) for column in (tokens, befores))
    alike = (tokens == now) & (now >= 0) & (age >= 1) & (age <= newest) & (followers >= 0)
    twice = alike & (befores == before) & (before >= 0)
    best = torch.where(twice, 2 * ring - age, torch.where(alike, ring - age, 0)).max(dim=1)
    match = (best.values > 0).long() + (best.values > ring).long()
    found = torch.gather(followers, 1, best.indices[:, None])[:, 0]
    return Draft(torch.where(match > 0, found, -1), match)
