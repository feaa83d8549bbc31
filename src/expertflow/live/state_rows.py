"""Where each live sequence's predictor state is: in the state row with the number of the sequence's KV row.

Pure numbers. Must not know tensors and tokens.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expertflow.trace.owners import NO_SEQUENCE


class StateRows:
    """Maps sequences to state rows.

    A KV row belongs to one live sequence at a time, and so does the state row with its number.

    Args:
        rows: state rows, as many as KV rows.
    """

    def __init__(self, rows: int) -> None:
        """Map no sequence."""
        self.spare = rows
        self.rows: dict[int, int] = {}
        self._used: set[int] = set()
        """Rows with the state of a sequence that was removed."""

    def __contains__(self, sequence: int) -> bool:
        """Whether the sequence has a row."""
        return sequence in self.rows

    def add(self, sequences: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Give sequences the state rows of their KV rows; those that have one keep it.

        Args:
            sequences: numbers, each once.
            rows: KV row of each.

        Returns:
            Rows with the state of an earlier sequence, in ascending order; the caller clears them.

        Raises:
            ValueError: if there are not as many rows as sequences, or there is no such state row.
        """
        new = {
            number: row
            for number, row in zip(sequences, rows, strict=True)
            if number != NO_SEQUENCE and number not in self.rows
        }
        if any(not 0 <= row < self.spare for row in new.values()):
            raise ValueError(f"rows {sorted(new.values())} are not among the {self.spare} state rows")
        self.rows |= new
        dirty = sorted(self._used.intersection(new.values()))
        self._used.difference_update(dirty)
        return dirty

    def remove(self, sequence: int) -> int:
        """Free a sequence's row, and return it."""
        row = self.rows.pop(sequence)
        self._used.add(row)
        return row

    def of(self, sequences: Sequence[int]) -> list[int]:
        """State row of each sequence; the spare row for sequences without one."""
        return [self.rows.get(number, self.spare) for number in sequences]

    def of_tokens(self, owners: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Row of each token's sequence, `[T]`; `NO_SEQUENCE` for padding and for sequences without a row.

        Args:
            owners: sequence of each token, `[T]`, `NO_SEQUENCE` for padding.
        """
        numbers, place = np.unique(owners, return_inverse=True)
        rows = np.array([self.rows.get(number, NO_SEQUENCE) for number in numbers.tolist()], dtype=np.int64)
        found: npt.NDArray[np.int64] = rows[place]
        return found
