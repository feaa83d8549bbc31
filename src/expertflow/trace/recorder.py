"""Turns what a running model tells into rows of a trace, step by step, to disk. NumPy only.

Whoever runs the batch says before each of its steps which sequences its rows belong to (`expect`); the model's hooks
then tell tokens and routing. A layer a pass does not reach (an encoder's, while the decoder runs) has no experts.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expertflow.trace.format import DECODE, PREFILL, UNKNOWN_TOKEN, Rows, TraceWriter

NOBODY = -1
"""Sequence number of padding: computed and routed like a token, but of no sequence."""


class Recorder:
    """Writes every forward pass into a trace.

    Args:
        writer: where rows go.
    """

    def __init__(self, writer: TraceWriter) -> None:
        """Nothing recorded yet."""
        self._writer = writer
        self._step = -1
        self._sequences: Sequence[int] = (NOBODY,)
        self._lengths: Sequence[int] | None = None
        self._left = True
        self._tokens: npt.NDArray[np.int32] | None = None
        self._layers: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = {}
        self._done = 0

    def expect(
        self, sequences: Sequence[int], prompt_lengths: Sequence[int] | None, *, padded_left: bool = True
    ) -> None:
        """Say whose rows come next.

        Args:
            sequences: sequence number of each row of the batch.
            prompt_lengths: tokens of each prompt if its prefill comes (in one pass or several), None for decoding.
            padded_left: on which side shorter prompts are padded.
        """
        self.flush()
        self._sequences, self._lengths, self._left, self._done = sequences, prompt_lengths, padded_left, 0

    def begin(self, tokens: npt.NDArray[np.int32] | None) -> None:
        """A forward pass starts."""
        self.flush()
        self._step += 1
        self._tokens = tokens

    def observe(self, layer: int, routes: npt.NDArray[np.int64], weights: npt.NDArray[np.float32]) -> None:
        """A layer's routing."""
        self._layers[layer] = (routes, weights)

    def flush(self) -> None:
        """Write the pass that is over."""
        if not self._layers:
            return
        header = self._writer.header
        count = len(next(iter(self._layers.values()))[0])
        experts = np.full((count, header.layers, header.top_k), header.experts, dtype=np.int64)
        weights = np.zeros((count, header.layers, header.top_k), dtype=np.float32)
        for layer, (routes, shares) in self._layers.items():
            order = np.argsort(-shares, axis=1, kind="stable")
            experts[:, layer] = np.take_along_axis(routes, order, axis=1)
            weights[:, layer] = np.take_along_axis(shares, order, axis=1)
        self._layers = {}
        sequence, real = self._owners(count)
        tokens = np.full(count, UNKNOWN_TOKEN) if self._tokens is None else self._tokens
        phase = DECODE if self._lengths is None else PREFILL
        rows = Rows(
            experts.astype(header.dtype), weights.astype(np.float16),
            tokens.astype(np.int32), np.full(count, phase, dtype=np.uint8),
            np.where(real, sequence, NOBODY).astype(np.int32), np.full(count, self._step, dtype=np.int32),
        )  # fmt: skip
        self._writer.append(rows)

    def _owners(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Sequence of each row of the pass, and whether it is a token of it or padding."""
        columns = count // len(self._sequences)
        sequence = np.repeat(np.asarray(self._sequences, dtype=np.int64), columns)
        if self._lengths is None:
            return sequence, np.ones(count, dtype=np.bool_)
        place = self._done + np.arange(columns)[None, :]
        self._done += columns
        length, width = np.asarray(self._lengths)[:, None], max(self._lengths)
        real = place >= width - length if self._left else place < length
        # the pass behind an encoder's is the decoder's first: one start token a sequence
        return sequence, np.where(place < width, real, True).reshape(-1)
