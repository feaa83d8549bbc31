"""Record a running model's routing as rows of a trace, step by step, to disk. NumPy only.

The code that runs the batch states before each step which sequences its rows belong to (`expect`). The model's hooks
then pass tokens and routing. A layer that a pass does not run (an encoder's, while the decoder runs) has no experts.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from expertflow.trace.format import DECODE, PREFILL, UNKNOWN_TOKEN, Rows, TraceWriter
from expertflow.trace.owners import BatchOwners, NextBatch


class Recorder:
    """Writes every forward pass into a trace.

    Args:
        writer: where rows go.
    """

    def __init__(self, writer: TraceWriter) -> None:
        """Start with nothing recorded."""
        self._writer = writer
        self._step = -1
        self._owners = BatchOwners()
        self._tokens: npt.NDArray[np.int32] | None = None
        self._layers: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = {}

    def expect(self, coming: NextBatch) -> None:
        """State which sequences the next rows belong to."""
        self.flush()
        self._owners.expect(coming)

    def begin(self, tokens: npt.NDArray[np.int32] | None) -> None:
        """Start a forward pass over `tokens`, int32 `[T]`; None if unknown."""
        self.flush()
        self._step += 1
        self._tokens = tokens

    def observe(
        self, layer: int, routes: npt.NDArray[np.int64], weights: Callable[[], npt.NDArray[np.float32]]
    ) -> None:
        """Record a layer's routing, experts and weights `[T, K]`."""
        self._layers[layer] = (routes, weights())

    def flush(self) -> None:
        """Write the finished pass to the trace."""
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
        prefill = self._owners.coming.lengths is not None
        owner = self._owners.take(count)
        tokens = np.full(count, UNKNOWN_TOKEN) if self._tokens is None else self._tokens
        phase = PREFILL if prefill else DECODE
        rows = Rows(
            experts.astype(header.dtype), weights.astype(np.float16),
            tokens.astype(np.int32), np.full(count, phase, dtype=np.uint8),
            owner, np.full(count, self._step, dtype=np.int32),
        )  # fmt: skip
        self._writer.append(rows)
