"""The expert provider of host passes: carries out what the controller decides, and lends the model each expert's tensors.

Starts every copy as early as its slot allows, so copies of later experts run while earlier ones compute.
Must not know the model.
"""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from expertflow.cache.controller import CacheController
from expertflow.memory.slots import SlotPool
from expertflow.memory.transfer import Transfer
from expertflow.models.experts import ExpertWeights
from expertflow.types import Access, Load


class CachedExperts:
    """Experts through the slot cache."""

    def __init__(self, controller: CacheController, transfer: Transfer, pool: SlotPool) -> None:
        """Drive `transfer` as `controller` decides, and lend the tensors of `pool`."""
        self.controller = controller
        self._transfer, self._pool = transfer, pool

    def begin_step(self, tokens: npt.NDArray[np.int32] | None = None) -> None:
        """Start a forward pass and the first copies of its plan."""
        with self._or_forget():
            self.controller.begin_step(tokens)
            self._prefetch(self.controller.take_loads())

    def stream(self, layer: int, experts: list[int]) -> Generator[tuple[int, ExpertWeights], None, None]:
        """Yield every needed expert once; its tensors are valid until the generator is resumed.

        A decision is taken from the controller once its copy can start, so that it decides beside running copies.
        """
        transfer, first = self._transfer, layer * self.controller.table.experts
        decisions, ready, done = self._decisions(layer, experts), deque[Access](), 0
        coming: Access | None = None
        try:
            coming = next(decisions, None)
            while ready or coming is not None:
                while coming is not None and coming.after < done:
                    if coming.load:
                        transfer.start(first + coming.expert, coming.slot)
                    ready.append(coming)
                    coming = next(decisions, None)
                access = ready[0]
                if access.load or access.fresh:
                    transfer.wait(access.slot)
                ready.popleft()  # from here on it counts as lent
                done += 1
                try:
                    yield access.expert, self._pool.weights(access.slot, layer)
                finally:
                    transfer.release(access.slot)
        finally:
            decisions.close()  # now, not when a traceback releases it: it forgets what was decided and not carried out
            # a consumer may close the stream at its last expert; before that, the layer was given up half-way
            with self._or_forget():
                if ready or coming is not None:
                    self.controller.forget()
                else:
                    self._prefetch(self.controller.take_loads())

    def _decisions(self, layer: int, experts: list[int]) -> Generator[Access, None, None]:
        """Yield the controller's accesses; if it fails half-way, its tables are not valid."""
        with self._or_forget():
            yield from self.controller.accesses(layer, experts)

    @contextmanager
    def _or_forget(self) -> Iterator[None]:
        """Empty every slot if a decision may not have been carried out (an error, Ctrl-C)."""
        try:
            yield
        except BaseException:
            self.controller.forget()
            raise

    def _prefetch(self, loads: list[Load]) -> None:
        for load in loads:
            self._transfer.start(load.layer * self.controller.table.experts + load.expert, load.slot)
