"""The reference of `kernels.residency`: the same calls, answered by `cache.core` itself over the state's own memory.

What the device execution decides with on a CPU, and what the kernels are tested against. Knows no Triton.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertflow.cache.core import EVICT, HIT, LOG, MISS, RESIDENT, Planes, Tables, access, begin_step, make_tables
from expertflow.cache.policy import Outlook, Usage
from expertflow.kernels.state import EVICTIONS, HITS, LOADS, PHASES, CacheState, Schedule


class Residency:
    """Twin of `kernels.residency.Residency` for a state on the CPU."""

    def __init__(self, state: CacheState) -> None:
        """Look at the state's tensors as the arrays that `core` works on; nothing is copied."""
        self.state = state
        own = make_tables(state.layers, state.experts, state.slots, divided=False)
        shared = ("slot_of", "owner", "rank", "held", "share", "low", "lowest", "newer", "older")
        self._tables: Tables = own._replace(**{name: getattr(state, name).numpy() for name in shared})
        self._rules = state.strategy.rules(state.layers, state.slots)
        self._usage = Usage(layers=state.layers, experts=state.experts)
        for name in ("last_use", "count", "recent", "steady"):
            setattr(self._usage, name, getattr(state, name).numpy())
        before = state.rank.numpy().copy()
        self._planes = Planes(before, state.used.numpy(), state.unused.numpy(), before.copy())

    def open_step(self) -> None:
        """`prefetch.open_step`: this step's ranks."""
        self._usage.step = int(self.state.clock[1])
        planes = self.state.strategy.policy(self._usage, self._outlook(self._usage.step))
        for kept, made in zip(self._planes, planes, strict=True):
            kept[:] = made
        begin_step(self._tables, self._planes)
        self.state.clock[0] = self._usage.step

    def _outlook(self, step: int) -> Outlook | None:
        """As `forecast.Recorded` with an endless horizon."""
        if step >= len(self.state.future):
            return None
        demand = self.state.future[step : step + 1].numpy().astype(np.float64)
        return Outlook(demand, self.state.following[step + 1].numpy() - float(step + 1))

    def run_layer(self, layer: int, ids: Tensor, schedule: Schedule) -> None:
        """`prefetch.run_layer`: fill `schedule` for the layer. See the twin."""
        tables, state = self._tables, self.state
        choice = ids.numpy().astype(np.int64)
        choice[int(schedule.live) :] = state.experts
        needed = np.zeros(state.experts, dtype=np.bool_)
        needed[choice[(choice >= 0) & (choice < state.experts)]] = True
        tables.cursor[LOG], tables.cursor[RESIDENT] = 0, int(state.resident)
        access(tables, self._planes, self._rules, layer, needed)
        state.resident.fill_(int(tables.cursor[RESIDENT]))
        state.needed[layer] |= state.needed.new_tensor(needed)
        rows = tables.log[: tables.cursor[LOG]]
        if len(state.log):
            told = int(state.told)
            state.log[told : told + len(rows)] = state.log.new_tensor(rows)
            state.told.add_(len(rows))
        phases = _fill(schedule, rows, choice, layer * state.experts, state.experts)
        for place, total in ((HITS, rows[:, 0] == HIT), (LOADS, rows[:, 0] == MISS), (EVICTIONS, rows[:, 0] == EVICT)):
            state.tally[place] += int(total.sum())
        state.tally[PHASES] += phases

    def close_step(self) -> None:
        """`Brain.end`: learn from the step."""
        self._usage.step = int(self.state.clock[0])
        self._usage.learn(self.state.needed.numpy() != 0)
        self.state.needed.zero_()
        self.state.clock[1] = self._usage.step


def _fill(
    schedule: Schedule, rows: npt.NDArray[np.int32], choice: npt.NDArray[np.int64], first: int, experts: int
) -> int:
    """Cut a layer's accesses into phases and write them down; how many phases beyond the first it took."""
    turns = [row for row in rows.tolist() if row[0] in {HIT, MISS}]
    phase_of, slot_of = np.full(experts + 1, -1), np.full(experts + 1, -1)
    phase_of_turn: list[int] = []
    phase, loads, begins = 0, 0, [0]
    for kind, _, expert, slot, detail in turns:
        if kind == MISS:
            if detail >= 0 and phase_of_turn[detail] >= phase:
                phase += 1
                begins.append(loads)
            schedule.src[loads], schedule.dst[loads] = first + expert, slot
            loads += 1
        phase_of[expert], slot_of[expert] = phase if kind == MISS else 0, slot
        phase_of_turn.append(int(phase_of[expert]))
    begins += [loads] * (schedule.phases + 1 - len(begins))
    schedule.bounds.copy_(schedule.bounds.new_tensor(begins))
    known = np.where((choice >= 0) & (choice < experts), choice, experts)
    for number, table in enumerate(schedule.slots.numpy()):
        table[:] = np.where(phase_of[known] == number, slot_of[known], -1)
    return phase
