"""Which tokens may come next: a bit each, filled in on the host by whatever knows, such as a grammar. Must not know requests."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@runtime_checkable
class TokenMask(Protocol):
    """Restricts the tokens of one request. The engine calls it in the thread that steps."""

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next: bit `v % 32` of word `v // 32` for token v.

        Args:
            row: int32 `[ceil(V / 32)]`, all zeros; bits beyond the vocabulary are not looked at.
        """

    def accept(self, token: int) -> None:
        """Learn the token that was chosen."""


def fill_all(masks: Sequence[TokenMask | None], vocabulary: int) -> tuple[npt.NDArray[np.int32], dict[int, str]]:
    """The next tokens that each sequence may get.

    Args:
        masks: one a sequence; None allows all.
        vocabulary: V.

    Returns:
        int32 `[B, ceil(V / 32)]`, and what is wrong with masks that failed or allow nothing, by place; their rows allow all.
    """
    words, rest = -(-vocabulary // 32), vocabulary % 32
    rows, faults = np.full((len(masks), words), -1, np.int32), dict[int, str]()
    for place, mask in enumerate(masks):
        if mask is None:
            continue
        rows[place] = 0
        try:
            mask.fill(rows[place])
        except Exception as error:  # noqa: BLE001 - a mask may be anybody's code; its request alone fails
            faults[place] = f"its mask failed: {error!r}"
        if place not in faults and not _allows(rows[place], rest):
            faults[place] = "its mask allows no token"
        if place in faults:
            rows[place] = -1
    return rows, faults


def _allows(row: npt.NDArray[np.int32], rest: int) -> bool:
    """Whether a bit is set within the vocabulary, whose last word has `rest` bits; 0: all."""
    last = int(row[-1]) & ((1 << rest) - 1 if rest else -1)
    return bool(row[:-1].any()) or last != 0
