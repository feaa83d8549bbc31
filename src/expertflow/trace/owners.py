"""Name the sequence of every token of a forward pass, because the routing does not contain it.

The code that runs a batch states before each step which sequences its rows belong to. Trace recorder and predictor
both need it. NumPy only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NO_SEQUENCE = -1
"""Sequence number of padding: computed and routed like a token, but of no sequence."""


class NextBatch(NamedTuple):
    """The coming steps, until the next `expect`.

    Attributes:
        sequences: sequence number of each row of the batch.
        lengths: for prefill (in one pass or several), tokens of each prompt or part of one; None for decoding.
        padded_left: whether shorter prompts are padded on the left, else on the right.
        following: sequences of the groups that step after this one, group by group, as far as is known.
        rows: KV row of each sequence; empty where nothing needs them.
        joined: whether prompts follow one another without padding.
        begins: for prefill, the place of each part's first token in its prompt; empty where nothing needs them.
    """

    sequences: Sequence[int]
    lengths: Sequence[int] | None = None
    padded_left: bool = True
    following: Sequence[Sequence[int]] = ()
    rows: Sequence[int] = ()
    joined: bool = False
    begins: Sequence[int] = ()


class BatchOwners:
    """Tracks the passes of a batch and names the sequence of each token."""

    def __init__(self) -> None:
        """Start with padding only."""
        self.coming = NextBatch((NO_SEQUENCE,))
        self._done = 0

    def expect(self, coming: NextBatch) -> None:
        """Expect other steps from now on."""
        self.coming, self._done = coming, 0

    def take(self, count: int) -> npt.NDArray[np.int32]:
        """Return int32 `[count]`, the sequence of each token of the next pass, `NO_SEQUENCE` for padding."""
        sequences, lengths, left = self.coming[:3]
        if lengths is not None and self.coming.joined:
            return np.repeat(np.asarray(sequences, dtype=np.int32), lengths)
        columns = count // len(sequences)
        owner = np.repeat(np.asarray(sequences, dtype=np.int32), columns)
        if lengths is None:
            return owner
        place = self._done + np.arange(columns)[None, :]
        self._done += columns
        length, width = np.asarray(lengths)[:, None], max(lengths)
        real = place >= width - length if left else place < length
        # the pass after an encoder's is the decoder's first: one start token a sequence
        real = np.where(place < width, real, True)
        return np.where(real.reshape(-1), owner, NO_SEQUENCE).astype(np.int32)
