"""The expert provider: what the controller decides, carried out by the transfer, handed to the model.

Starts every copy as early as its slot allows, so copies of later experts run while earlier ones compute.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from expertflow.cache.controller import CacheController
from expertflow.memory.slots import SlotPool
from expertflow.memory.transfer import Transfer
from expertflow.models.experts import Row
from expertflow.types import Load


class CachedExperts:
    """Experts through the slot cache."""

    def __init__(self, controller: CacheController, transfer: Transfer, pool: SlotPool) -> None:
        """Drive `transfer` as `controller` says, and lend out `pool`'s tensors."""
        self.controller = controller
        self._transfer, self._pool = transfer, pool

    def begin_step(self, tokens: npt.NDArray[np.int32] | None = None) -> None:
        """A forward pass starts: its plan's first copies start."""
        with self._or_forget():
            self.controller.begin_step(tokens)
            self._prefetch(self.controller.take_loads())

    def stream(self, layer: int, experts: list[int]) -> Generator[tuple[int, Row], None, None]:
        """Yield every needed expert once; its tensors are valid until the generator is resumed."""
        with self._or_forget():
            schedule = self.controller.access(layer, experts)
            ahead = self.controller.take_loads()
        first = layer * self.controller.table.experts
        begun = reached = 0
        try:
            for turn, access in enumerate(schedule):
                while begun < len(schedule) and schedule[begun].after < turn:
                    if schedule[begun].load:
                        self._transfer.start(first + schedule[begun].expert, schedule[begun].slot)
                    begun += 1
                if access.load or access.fresh:
                    self._transfer.wait(access.slot)
                reached += 1
                try:
                    yield access.expert, self._pool.views[access.slot]
                finally:
                    self._transfer.release(access.slot)
        finally:
            # a consumer may close the stream at its last expert; before that, the layer was given up half-way
            with self._or_forget():
                if reached < len(schedule):
                    self.controller.forget()
                else:
                    self._prefetch(ahead)

    @contextmanager
    def _or_forget(self) -> Iterator[None]:
        """If a decision may not have been carried out (an error, Ctrl-C), no slot is trusted any more."""
        try:
            yield
        except BaseException:
            self.controller.forget()
            raise

    def _prefetch(self, loads: list[Load]) -> None:
        for load in loads:
            self._transfer.start(load.layer * self.controller.table.experts + load.expert, load.slot)
