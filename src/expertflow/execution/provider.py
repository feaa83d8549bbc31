"""The expert provider of passes that the host decides: carries out what the controller decides, and lends experts.

Starts every copy as early as its slot allows, so copies of later experts run while earlier ones compute.
Must not know the model.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import takewhile

import numpy as np
import numpy.typing as npt

from expertflow.cache.controller import CacheController
from expertflow.memory.slots import SlotPool
from expertflow.memory.transfer import Transfer
from expertflow.models.experts import ExpertWeights
from expertflow.types import Access, Load

_NOTHING = -1
"""What an access comes after whose slot no earlier access of the layer uses."""
_BUSY = 2
"""Copies under way with which the link has work for a while."""
_Choose = Callable[[Mapping[int, Access], Access | None], list[int]]
"""Chooses from accesses that can be computed, by position in the layer's schedule, and the next one, whose slot is not free."""


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
        """Yield every needed expert once; its tensors are valid until the generator is resumed."""
        with closing(self._carry_out(layer, experts, _oldest)) as groups:
            for (access,) in groups:
                yield access.expert, self._pool.weights(access.slot, layer)

    def groups(self, layer: int, experts: list[int]) -> Generator[list[Access], None, None]:
        """Yield every needed expert once, in groups that can be computed together; slots are valid until resumption.

        Residents come together. What is copied comes as it arrives: one expert, and those behind it that are there too. If the
        link would have nothing to do until a resident's slot is free, that resident comes first and alone.
        """
        yield from self._carry_out(layer, experts, self._together)

    def _together(self, ready: Mapping[int, Access], coming: Access | None) -> list[int]:
        """The positions of the next group, see `groups`."""
        hits = [place for place, access in ready.items() if not (access.load or access.fresh)]
        if coming is not None and coming.after in hits and len(ready) - len(hits) < _BUSY:
            return [coming.after]
        if hits:
            return hits
        first, *others = ready
        return [first, *takewhile(lambda place: self._transfer.arrived(ready[place].slot), others)]

    def _carry_out(self, layer: int, experts: list[int], choose: _Choose) -> Generator[list[Access], None, None]:
        """Start copies as early as their slots allow, and yield the accesses that `choose` chooses, as long as there are any.

        A decision is taken from the controller once its copy can start, so that it decides beside running copies.
        """
        transfer, first = self._transfer, layer * self.controller.table.experts
        decisions, ready, over = self._decisions(layer, experts), dict[int, Access](), {_NOTHING}
        coming: Access | None = None
        try:
            coming = next(decisions, None)
            while ready or coming is not None:
                while coming is not None and coming.after in over:
                    if coming.load:
                        transfer.start(first + coming.expert, coming.slot)
                    ready[len(ready) + len(over) - 1] = coming
                    coming = next(decisions, None)
                chosen = choose(ready, coming)
                for place in chosen:
                    if ready[place].load or ready[place].fresh:
                        transfer.wait(ready[place].slot)
                lent = [ready.pop(place) for place in chosen]
                over.update(chosen)
                try:
                    yield lent
                finally:
                    for access in lent:
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


def _oldest(ready: Mapping[int, Access], coming: Access | None) -> list[int]:
    """One access after the other, in the order of the schedule."""
    del coming
    return [next(iter(ready))]
