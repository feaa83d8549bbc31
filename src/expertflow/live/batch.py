"""The state rows that a captured step reads and updates: one copy to fixed buffers before each step.

Must not know sequences, networks and slots.
"""

from itertools import accumulate
from typing import NamedTuple

import torch

from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.memory.devices import send

_TOKENS = 2
"""Place of the new tokens among the parts of `PredictorInputs`."""


class PredictorBatch(NamedTuple):
    """The predictor's state rows in a step and in the steps behind it.

    Attributes:
        updated: rows whose newest token the step takes in.
        tokens: those tokens.
        groups: rows of this step, then of the coming steps, group by group; rows without a prediction are left out.
    """

    updated: list[int]
    tokens: list[int]
    groups: list[list[int]]


class PredictorInputs:
    """Device buffers with a step's state rows, its new tokens, and the groups of the coming steps.

    Args:
        rows: sequences of a step at most.
        sequences: state rows of the predictor.
        spare: the state row that padding shares.
        device: where the buffers are.

    Attributes:
        room: new tokens at most.
        state_rows: int64 `[rows]`, of the step's sequences; the spare row behind them.
        updated_rows: int64 `[rows]`, rows that take a new token in; the spare row behind them.
        updated_tokens: int64 `[rows]`, these tokens.
        members: int64 `[sequences]`, rows of this step's group and the coming ones, one group after the other.
        turns: int64 `[STEPS_KNOWN + 2]`, number and bounds of the groups, as `Residency.expect` takes it.
    """

    def __init__(self, rows: int, sequences: int, spare: int, device: torch.device) -> None:
        """Allocate buffers for a step without sequences."""
        sizes = [rows, rows, rows, sequences, STEPS_KNOWN + 2]
        self.room, self._spare = rows, spare
        self._there = torch.zeros(sum(sizes), dtype=torch.long, device=device)
        self._there[: 2 * rows] = spare
        self.state_rows, self.updated_rows, self.updated_tokens, self.members, self.turns = self._there.split(sizes)
        self._here = torch.zeros(sum(sizes), dtype=torch.long)
        self._parts = [part.numpy() for part in self._here.split(sizes)]
        self._rows: tuple[list[int], list[int], list[list[int]]] | None = None
        """The content of all parts but the tokens; it stays the same while the same sequences step."""

    def write(self, state_rows: list[int], batch: PredictorBatch | None) -> None:
        """Fill the buffers for the next step.

        Args:
            state_rows: of the step's sequences.
            batch: None for a step without a forecast.
        """
        updated, tokens, groups = ([], [], []) if batch is None else batch
        if self._rows != (state_rows, updated, groups):
            self._rows = state_rows, updated, groups
            self._write_rows(state_rows, updated, groups[:STEPS_KNOWN])
        self._parts[_TOKENS][: len(tokens)] = tokens
        send(self._here, self._there)

    def _write_rows(self, state_rows: list[int], updated: list[int], groups: list[list[int]]) -> None:
        own, updated_rows, _, members, turns = self._parts
        own[: len(state_rows)], own[len(state_rows) :] = state_rows, self._spare
        updated_rows[: len(updated)], updated_rows[len(updated) :] = updated, self._spare
        all_members = [row for group in groups for row in group]
        members[: len(all_members)] = all_members
        turns[: 2 + len(groups)] = [len(groups), 0, *accumulate(len(group) for group in groups)]
