"""What the predictor takes in behind a pass over prompts: its tokens and their true routing, grouped by state row.

Must not know sequences, and when the predictor predicts.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertflow.predict.online import OnlinePredictor
from expertflow.predict.state import to_device
from expertflow.trace.owners import NO_SEQUENCE

Rows = npt.NDArray[np.int64]


def take_in(
    online: OnlinePredictor,
    last: Tensor,
    rows: Rows,
    tokens: npt.NDArray[np.integer],
    routes: npt.NDArray[np.integer],
    room: int,
) -> None:
    """Update the predictor's state with a pass over T tokens of prompts.

    Args:
        online: the predictor.
        last: integer `[C + 1, L, K]` on its device, each row's experts in its last step; overwritten for these rows.
        rows: `[T]`, state row of each token, `NO_SEQUENCE` for padding.
        tokens: `[T]`, ids.
        routes: `[T, L, K]`, their experts; E for none.
        room: tokens taken in at once.
    """
    device = online.device
    count = np.bincount(rows[rows != NO_SEQUENCE], minlength=online.rows)
    single = count[rows] == 1  # such as a decoder's first tokens: one update of all rows together
    for order, present, _ in group_by_row(np.where(single, rows, NO_SEQUENCE), online.rows):
        state_rows = to_device(present, device)
        online.update(state_rows, to_device(tokens[order], device), last[state_rows])
        last[state_rows] = to_device(routes[order], device).int()
    for order, present, counts in group_by_row(np.where(single, NO_SEQUENCE, rows), room):
        pieces = online.pieces(present, counts)
        used = to_device(routes[order], device, np.int32)
        before = pieces.shifted(used, last[pieces.rows])
        online.observe(pieces, to_device(tokens[order], device), before)
        last[pieces.rows] = used[pieces.begins + pieces.counts - 1]


def group_by_row(rows: Rows, room: int) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Group tokens by state row, in ascending order of rows, each row's in their order, without padding; no group has a row twice.

    Args:
        rows: `[T]`, state row of each token, `NO_SEQUENCE` for padding.
        room: tokens of a group at most; a row with more goes through several groups.

    Yields:
        Places of the group's tokens among the T, its rows, and the number of tokens of each.
    """
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] != NO_SEQUENCE]
    present, counts = np.unique(rows[order], return_counts=True)
    parts = -(-counts // room)
    whole, last_parts = np.full(int(parts.sum()), room), np.cumsum(parts) - 1
    whole[last_parts] = counts - (parts - 1) * room
    present, counts = np.repeat(present, parts), whole
    ends, first = np.cumsum(counts), 0
    while first < len(present):
        begin = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, begin + room, side="right")))
        yield order[begin : ends[last - 1]], present[first:last], counts[first:last]
        first = last
