"""Draw steps from a trace: which tokens step together.

A step is the union of the experts of some tokens. The simulator has no other facts of a model.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow.cache.forecast import Step
from expertflow.errors import TraceError
from expertflow.limits import check_room
from expertflow.schedule.cluster import group
from expertflow.trace.format import DECODE, Trace

_SHORTER = "Use a shorter trace, or free memory."


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Steps drawn from a trace.

    Attributes:
        trace: the trace.
        members: `[N, T]` row numbers of the trace that step together, -1 for none.
        needed: `[N, L, E]` bool, the distinct experts of each step.
        batch: live sequences.
        groups: groups that step alternately.
    """

    trace: Trace
    members: npt.NDArray[np.int64]
    batch: int
    groups: int = 1
    needed: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        """Unite the experts of each step."""
        header, (steps, width) = self.trace.header, self.members.shape
        check_room(2 * steps * header.layers * (header.experts + 1), f"a replay of {steps} steps", _SHORTER)
        marks = np.zeros((steps, header.layers, header.experts + 1), dtype=np.bool_)
        step, layer = np.arange(steps)[:, None, None], np.arange(header.layers)[None, :, None]
        for column in range(width):
            routes = self.trace.rows.experts[self.members[:, column]]
            marks[step, layer, np.where(self.members[:, column, None, None] >= 0, routes, header.experts)] = True
        object.__setattr__(self, "needed", np.ascontiguousarray(marks[..., : header.experts]))

    def __len__(self) -> int:
        """Steps."""
        return len(self.members)

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return int((self.members >= 0).sum())

    def before(self, number: int) -> Step:
        """Return what is known before a step."""
        return Step(number, self.trace.rows.tokens[self._rows(number)])

    def after(self, number: int) -> Step:
        """Return what is known after it."""
        rows = self._rows(number)
        return Step(number, self.trace.rows.tokens[rows], self.needed[number], self.trace.rows.experts[rows])

    def _rows(self, number: int) -> npt.NDArray[Any]:
        rows: npt.NDArray[np.int64] = self.members[number]
        return rows if rows[-1] >= 0 else rows[rows >= 0]


def live_sequences(trace: Trace, batch: int, groups: int = 1, seed: int = 0) -> Workload:
    """Draw steps of `batch` live sequences; the next sequence replaces one that is finished.

    Only decoding rows are replayed. The order of sequences is shuffled by `seed`. The replay ends when fewer than
    `batch` sequences are left, so every step has the same number of tokens. With `groups` > 1 the batch is divided:
    group 0 takes a step, then group 1, and so on.

    Raises:
        TraceError: if there are fewer sequences than places, or nothing to replay.
    """
    if batch < 1 or groups < 1 or batch % groups:
        raise TraceError(f"batch {batch} cannot be divided into {groups} groups", "Use a multiple of the groups.")
    rows = np.flatnonzero(trace.rows.phase == DECODE)
    sequence = trace.rows.sequence[rows]
    order = np.lexsort((trace.rows.step[rows], sequence))
    rows, sequence = rows[order], sequence[order]
    borders = np.flatnonzero(np.diff(sequence)) + 1
    parts = np.split(rows, borders) if len(rows) else []
    if len(parts) < batch:
        raise TraceError(
            f"the trace has {len(parts)} sequences with decoding steps, batch {batch} needs as many at least",
            "Use a smaller batch, or a longer trace.",
        )
    waiting = [parts[index] for index in np.random.default_rng(seed).permutation(len(parts))]
    members = _fill(waiting, batch)
    return Workload(trace=trace, members=members.reshape(-1, batch // groups), batch=batch, groups=groups)


def regrouped(workload: Workload, method: str, paths: npt.NDArray[np.bool_] | None = None) -> Workload:
    """Divide the same sequences anew before every round of groups, by the paths they are expected to take.

    Args:
        workload: of several groups.
        method: a key of `schedule.cluster.METHODS`.
        paths: `[rows of the trace, L, E]`; None: the recorded ones.

    Raises:
        ConfigError: for an unknown method.
    """
    members = workload.members.reshape(-1, workload.batch).copy()
    for round_ in members:
        expected = _paths(workload.trace, round_) if paths is None else paths[round_]
        round_[:] = round_[np.argsort(group(expected, workload.groups, method), kind="stable")]
    return Workload(
        trace=workload.trace, members=members.reshape(workload.members.shape), batch=workload.batch,
        groups=workload.groups,
    )  # fmt: skip


def _paths(trace: Trace, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return bool `[T, L, E]`, the experts that rows of the trace used."""
    marks = np.zeros((len(rows), trace.header.layers, trace.header.experts + 1), dtype=np.bool_)
    np.put_along_axis(marks, trace.rows.experts[rows].astype(np.int64), values=True, axis=2)
    return marks[..., : trace.header.experts]


def _fill(waiting: list[npt.NDArray[np.int64]], batch: int) -> npt.NDArray[np.int64]:
    """Give each next sequence to the place that is free first; return row numbers `[steps, batch]`."""
    ends = np.zeros(batch, dtype=np.int64)
    places: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(batch)]
    for part in waiting:
        place = int(np.argmin(ends))
        places[place].append(part)
        ends[place] += len(part)
    steps = int(ends.min())
    return np.stack([np.concatenate(parts)[:steps] for parts in places], axis=1)


def as_recorded(trace: Trace) -> Workload:
    """Return the forward passes as they were recorded, prefill included.

    Raises:
        TraceError: if the trace's steps are not forward passes (imported traces: every sequence starts at 0).
    """
    steps = trace.rows.step
    if np.any(np.diff(steps) < 0):
        raise TraceError("the trace does not say which tokens ran together", "Give a batch size instead.")
    _, index, counts = np.unique(steps, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    check_room(
        8 * len(counts) * int(counts.max()), f"a table of {len(counts)} steps by {counts.max()} tokens", _SHORTER
    )
    members = np.full((len(counts), int(counts.max())), -1, dtype=np.int64)
    members[index, np.arange(len(steps)) - starts[index]] = np.arange(len(steps))
    return Workload(trace=trace, members=members, batch=int(counts.max()))
