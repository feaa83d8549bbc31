"""What a step has to know of the predictor's rows, and how the host tells a captured step: one copy before each.

Knows rows and tokens; refuses to know sequences, networks and slots.
"""

from itertools import accumulate
from typing import NamedTuple

import torch

from expertflow.cache.horizon import STEPS_KNOWN


class Agenda(NamedTuple):
    """The predictor's rows in a step and behind it.

    Attributes:
        told: rows whose newest token the predictor has not been told of, and that token.
        groups: rows that step now, then those whose turns come, group by group; those of which nothing is known are left out.
    """

    told: list[tuple[int, int]]
    groups: list[list[int]]


class Slip:
    """What the host tells a step of the predictor's rows, in one copy: whose step it is, whose tokens are new, whose turns come.

    Args:
        rows: sequences of a step at most.
        sequences: rows the predictor has.
        spare: the one that padding shares.
        device: where to.

    Attributes:
        room: tokens that may be new.
        seats: int64 `[rows]`, the step's own.
        told_seats: int64 `[rows]`, whose tokens are new; the spare one behind them.
        told_tokens: int64 `[rows]`.
        members: int64 `[sequences]`, who steps, in the order of their turns.
        turns: int64 `[STEPS_KNOWN + 2]`, as `Residency.expect` wants it.
    """

    def __init__(self, rows: int, sequences: int, spare: int, device: torch.device) -> None:
        """Nobody steps."""
        sizes = [rows, rows, rows, sequences, STEPS_KNOWN + 2]
        self.room, self._spare = rows, spare
        self._there = torch.zeros(sum(sizes), dtype=torch.long, device=device)
        self._there[: 2 * rows] = spare
        self.seats, self.told_seats, self.told_tokens, self.members, self.turns = self._there.split(sizes)
        self._here = torch.zeros(sum(sizes), dtype=torch.long)
        self._parts = [part.numpy() for part in self._here.split(sizes)]

    def write(self, seats: list[int], agenda: Agenda | None) -> None:
        """Tell the next step; without an agenda it has no forecast."""
        told = [] if agenda is None else agenda.told
        groups = [] if agenda is None else agenda.groups[:STEPS_KNOWN]
        row, told_seats, told_tokens, members, turns = self._parts
        row[: len(seats)], row[len(seats) :] = seats, self._spare
        told_seats[len(told) :] = self._spare
        if told:
            told_seats[: len(told)], told_tokens[: len(told)] = zip(*told, strict=True)
        everybody = [seat for group in groups for seat in group]
        members[: len(everybody)] = everybody
        turns[: 2 + len(groups)] = [len(groups), 0, *accumulate(len(group) for group in groups)]
        self._there.copy_(self._here)  # ordinary memory: it may be used again at once
