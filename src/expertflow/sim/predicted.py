"""Use a trained predictor's output for every row of a trace as the forecast of a replay.

Predictions are made beforehand, row by row, each from the steps before that row. So a replay of any batch only has to
unite them. Must not know predictors.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from expertflow.cache.forecast import NoForecast, Step
from expertflow.cache.horizon import Chances, hazards, take_turns, unite
from expertflow.cache.policy import Outlook
from expertflow.errors import TraceError
from expertflow.sim.workload import Workload
from expertflow.types import HORIZONS


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Predictions for rows of a trace.

    Attributes:
        rows: `[n]` row numbers of the trace, each once.
        probabilities: `[n, O, L, E]` this step, then within the horizons; float16 is enough.
        place: `[highest row + 2]` index of a row's prediction, -1 for none; the last entry stands for rows not covered.
    """

    rows: npt.NDArray[np.int64]
    probabilities: npt.NDArray[np.floating]
    place: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Index the rows.

        Raises:
            TraceError: if the array is not one of predictions for these rows.
        """
        shape = self.probabilities.shape
        if len(shape) != 4 or len(self.rows) != shape[0] or shape[1] not in {1, 1 + len(HORIZONS)}:
            raise TraceError(
                f"predictions of shape {list(shape)} for {len(self.rows)} rows are unusable",
                f"Give [rows, 1 or {1 + len(HORIZONS)}, layers, experts].",
            )
        place = np.full(int(self.rows.max(initial=-1)) + 2, -1, dtype=np.int64)
        place[self.rows] = np.arange(len(self.rows))
        object.__setattr__(self, "place", place)

    def of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        """Return the predictions `[B, O, L, E]` of rows that are covered."""
        found: npt.NDArray[np.floating] = self.probabilities[self.place[rows]]
        return found

    def covers(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return bool `[B]`, which rows have a prediction."""
        return self.place[np.minimum(rows, len(self.place) - 1)] >= 0


class PredictedRows(NoForecast):
    """Forecasts from united predictions of the sequences of a step and of the groups that step next.

    It uses what the engine knows at that step: the groups still to step in this round, and after them the groups that
    stepped already, as if each stayed together. How the next round is grouped is not known yet.

    Args:
        workload: the steps.
        scores: predictions for all of their rows.

    Raises:
        TraceError: if a row has no prediction, or the predictions are of another shape.
    """

    def __init__(self, workload: Workload, scores: RowScores) -> None:
        """Check that every row is covered."""
        header = workload.trace.header
        if scores.probabilities.shape[2:] != (header.layers, header.experts):
            raise TraceError(
                f"the predictions are for {list(scores.probabilities.shape[2:])} layers and experts, "
                f"the trace has {[header.layers, header.experts]}",
                "Predict with a predictor trained for this model.",
            )
        rows = np.unique(workload.members[workload.members >= 0])
        lacking = rows[~scores.covers(rows)]
        if len(lacking):
            raise TraceError(
                f"{len(lacking)} of the {len(rows)} rows to replay have no prediction, row {lacking[0]} is the first",
                "Predict the whole trace, or replay only the sequences that were predicted.",
            )
        self._workload, self._scores = workload, scores
        self._known: dict[int, Chances] = {}
        self._again: dict[int, Chances | None] = {}

    def outlook(self, step: Step) -> Outlook | None:
        """Return demand from this step on; None after the workload's end."""
        groups, steps = self._workload.groups, len(self._workload)
        if step.number >= steps:
            return None
        begin = step.number // groups * groups
        if step.number == begin:
            self._known, self._again = {}, {}
        for number in range(step.number, min(begin + groups, steps)):
            if number not in self._known:
                self._known[number] = self._demand(self._workload.members[number])
        for number in range(begin, step.number):
            if number not in self._again:
                self._again[number] = self._following(number, begin + groups)
        turns = [self._known[number] for number in range(step.number, min(begin + groups, steps))]
        turns += [again for again in self._again.values() if again is not None]
        return Outlook(take_turns(turns))

    def _demand(self, rows: npt.NDArray[np.int64]) -> Chances:
        """Return demand `[H, L, E]` of sequences that step together, from what is known before the step."""
        return hazards(unite(self._scores.of(rows[rows >= 0])))

    def _following(self, number: int, begin: int) -> Chances | None:
        """Return it for the next step of the sequences of step `number`, in the round that starts at `begin`."""
        rows, sequence = self._workload.members[number], self._workload.trace.rows.sequence
        later = self._workload.members[begin : begin + self._workload.groups].reshape(-1)
        found = later[(later >= 0) & np.isin(sequence[later], sequence[rows[rows >= 0]])]
        return self._demand(found) if len(found) else None
