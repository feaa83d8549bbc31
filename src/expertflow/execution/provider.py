"""The expert provider of passes that the host decides: carries out what the controller decides, and lends experts.

Starts every copy as early as its slot allows, so copies of later experts run while earlier ones compute.
Must not know the model.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice, takewhile

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


class CachedExperts:
    """Experts through the slot cache."""

    def __init__(self, controller: CacheController, transfer: Transfer, pool: SlotPool) -> None:
        """Drive `transfer` as `controller` decides, and lend the tensors of `pool`."""
        self.controller = controller
        self._transfer, self._pool = transfer, pool

    def begin_step(self, tokens: npt.NDArray[np.int32] | None = None, *, prompts: int = 0) -> None:
        """Start a forward pass, over so many tokens of prompts, and the first copies of its plan."""
        with self._or_forget():
            self.controller.begin_step(tokens, prompts=prompts)
            self._start(self.controller.take_loads())

    def stream(self, layer: int, experts: list[int]) -> Generator[tuple[int, ExpertWeights], None, None]:
        """Yield every needed expert once; its tensors are valid until the generator is resumed."""
        with closing(self._carry_out(layer, experts, together=False)) as groups:
            for (access,) in groups:
                yield access.expert, self._pool.weights(access.slot, layer)

    def groups(self, layer: int, experts: list[int]) -> Generator[list[Access], None, None]:
        """Yield every needed expert once, in groups that can be computed together; slots are valid until resumption.

        Residents come together, once the link has work. What is copied comes as it arrives: one expert, and those behind it that are
        there too. If the link has nothing to do until a resident's slot is free, that resident comes first and alone.
        """
        yield from self._carry_out(layer, experts, together=True)

    @contextmanager
    def lend_residents(self, layer: int) -> Iterator[dict[int, int]]:
        """Lend the layer's experts that are in their slots already, before anybody knows which are needed: expert to slot.

        `groups` yields those that are needed again. None are lent where a missing expert takes a slot of its own layer: its copy
        would wait until all of them are computed.
        """
        slots = self.controller.table.slot_of[layer].tolist()
        if self.controller.strategy.partition == "layer" and min(slots) < 0:
            slots = []
        found = {expert: slot for expert, slot in enumerate(slots) if slot >= 0 and self._transfer.arrived(slot)}
        try:
            yield found
        finally:
            self._transfer.release(list(found.values()))

    def time_loads(self, records: Sequence[int]) -> float:
        """Seconds that loads of these records take with nothing beside them, for measurements; only while no expert is in a slot."""
        assert not self.controller.table.resident, "the slots are in use"
        self._transfer.settle()
        began = time.perf_counter()
        self._transfer.start([(record, place % self.controller.table.slots) for place, record in enumerate(records)])
        self._transfer.settle()
        return time.perf_counter() - began

    def _carry_out(self, layer: int, experts: list[int], *, together: bool) -> Generator[list[Access], None, None]:
        """Start copies as early as their slots allow, and yield accesses; `together`: as `groups`, else one by one in their order.

        A decision is taken from the controller once its copy can start, so that it decides beside running copies; and behind the last
        one the plan for other layers. What that loads ahead starts at once, before this layer's computation is queued: if a slot is
        still to be read, once it is released.
        """
        transfer, first = self._transfer, layer * self.controller.table.experts
        decisions, over, decided = self._decisions(layer, experts), {_NOTHING}, 0
        resident, brought = dict[int, Access](), dict[int, Access]()  # by position in the schedule
        coming: Access | None = None
        ahead: list[Load] = []
        with closing(decisions):  # an interrupt leaves none of them for later, when it would forget what others decided
            try:
                coming = next(decisions) if experts else None
                while resident or brought or coming is not None:
                    while coming is not None and coming.after in over:
                        if coming.load:
                            if resident and _loading(brought) >= _BUSY:
                                break
                            transfer.start([(first + coming.expert, coming.slot)])
                        there = together and not (coming.load or coming.fresh)
                        (resident if there else brought)[decided] = coming
                        decided += 1
                        coming = next(decisions) if decided < len(experts) else None
                    if coming is None:
                        ahead = self._prefetch(decisions, ahead, (*resident.values(), *brought.values()))
                    if coming is not None and coming.after in resident and _loading(brought) < _BUSY:
                        chosen = [coming.after]
                    else:
                        chosen = list(resident) or self._arrivals(brought, together=together)
                    lent = [resident[place] if place in resident else brought[place] for place in chosen]
                    transfer.wait([access.slot for access in lent])
                    for place in chosen:  # from here on they count as lent
                        resident.pop(place, None)
                        brought.pop(place, None)
                    over.update(chosen)
                    try:
                        yield lent
                    finally:
                        transfer.release([access.slot for access in lent])
            finally:
                # a consumer may close the stream at its last expert; before that, the layer was given up half-way
                with self._or_forget():
                    if resident or brought or coming is not None or decided < len(experts):
                        self.controller.forget()
                    else:
                        self._prefetch(decisions, ahead)

    def _arrivals(self, brought: Mapping[int, Access], *, together: bool) -> list[int]:
        """The first of these accesses, by position; `together`: and those behind it whose copies are over."""
        first, *others = brought
        arrived = takewhile(lambda place: together and self._transfer.arrived(brought[place].slot), others)
        return [first, *arrived]

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

    def _prefetch(self, decisions: Iterator[Access], ahead: list[Load], unread: Sequence[Access] = ()) -> list[Load]:
        """Plan behind the last of the layer's `decisions`, which a second call finds done; start loads ahead, return those into a slot in `unread`."""
        next(decisions, None)
        ahead, slots = ahead + self.controller.take_loads(), {access.slot for access in unread}
        self._start([load for load in ahead if load.slot not in slots])
        return [load for load in ahead if load.slot in slots]

    def _start(self, loads: list[Load]) -> None:
        if loads:
            experts = self.controller.table.experts
            self._transfer.start([(load.layer * experts + load.expert, load.slot) for load in loads])


def _loading(brought: dict[int, Access]) -> int:
    """Loads of the running layer among these; those ahead came before it. No more than `_BUSY` are counted."""
    return sum(access.load for access in islice(reversed(brought.values()), _BUSY))
