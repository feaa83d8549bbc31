"""Whose token is each row of a forward pass: what the batch's driver knows and the routing does not say.

Whoever runs a batch says before each of its steps which sequences its rows belong to; trace recorder and predictor
both need it. NumPy only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NOBODY = -1
"""Sequence number of padding: computed and routed like a token, but of no sequence."""


class NextBatch(NamedTuple):
    """The steps that come, until the next word.

    Attributes:
        sequences: sequence number of each row of the batch.
        lengths: tokens of each prompt, or part of one, if its prefill comes (in one pass or several), None for decoding.
        padded_left: on which side shorter prompts are padded.
        following: sequences whose turns come behind these, group by group, as far as is known.
        rows: KV row of each sequence; empty where nothing needs them.
    """

    sequences: Sequence[int]
    lengths: Sequence[int] | None = None
    padded_left: bool = True
    following: Sequence[Sequence[int]] = ()
    rows: Sequence[int] = ()


class BatchOwners:
    """Follows the passes of a batch."""

    def __init__(self) -> None:
        """Nobody is expected."""
        self.coming = NextBatch((NOBODY,))
        self._done = 0

    def expect(self, coming: NextBatch) -> None:
        """Other steps come now."""
        self.coming, self._done = coming, 0

    def take(self, count: int) -> npt.NDArray[np.int32]:
        """`[count]` the sequence of each row of the next pass, `NOBODY` for padding."""
        sequences, lengths, left = self.coming[:3]
        columns = count // len(sequences)
        owner = np.repeat(np.asarray(sequences, dtype=np.int32), columns)
        if lengths is None:
            return owner
        place = self._done + np.arange(columns)[None, :]
        self._done += columns
        length, width = np.asarray(lengths)[:, None], max(lengths)
        real = place >= width - length if left else place < length
        # the pass behind an encoder's is the decoder's first: one start token a sequence
        real = np.where(place < width, real, True)
        return np.where(real.reshape(-1), owner, NOBODY).astype(np.int32)
