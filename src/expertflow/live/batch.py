"""What a step has to know of the predictor's rows, and how the host tells a captured step: one copy before each.

Knows rows and tokens; refuses to know sequences, networks and slots.
"""

from itertools import accumulate
from typing import NamedTuple

import torch

from expertflow.cache.horizon import STEPS_KNOWN

_TOKENS = 2
"""Place of the told tokens among a slip's parts."""


class PredictorBatch(NamedTuple):
    """The predictor's rows in a step and behind it.

    Attributes:
        told: rows whose newest token the predictor has not been told of.
        tokens: those tokens.
        groups: rows that step now, then those whose turns come, group by group; those of which nothing is known are left out.
    """

    told: list[int]
    tokens: list[int]
    groups: list[list[int]]


class PredictorInputs:
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
        self._rows: tuple[list[int], list[int], list[list[int]]] | None = None
        """What the parts hold but for tokens; the same from step to step, as long as the same sequences step."""

    def write(self, seats: list[int], agenda: PredictorBatch | None) -> None:
        """Tell the next step; without an agenda it has no forecast."""
        told, tokens, groups = ([], [], []) if agenda is None else agenda
        if self._rows != (seats, told, groups):
            self._rows = seats, told, groups
            self._write_rows(seats, told, groups[:STEPS_KNOWN])
        self._parts[_TOKENS][: len(tokens)] = tokens
        self._there.copy_(self._here)  # ordinary memory: it may be used again at once

    def _write_rows(self, seats: list[int], told: list[int], groups: list[list[int]]) -> None:
        row, told_seats, _, members, turns = self._parts
        row[: len(seats)], row[len(seats) :] = seats, self._spare
        told_seats[: len(told)], told_seats[len(told) :] = told, self._spare
        everybody = [seat for group in groups for seat in group]
        members[: len(everybody)] = everybody
        turns[: 2 + len(groups)] = [len(groups), 0, *accumulate(len(group) for group in groups)]
