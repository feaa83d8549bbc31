"""The reference of `kernels.residency`: the same calls, computed by `cache` itself over the state's own memory.

The device execution uses it on a CPU, and tests compare the kernels with it. Must not know Triton.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertflow.cache.core import (
    EVICT,
    HIT,
    LOG,
    MISS,
    PENDING,
    PREFETCH,
    RESIDENT,
    WASTED,
    Planes,
    Tables,
    access,
    make_tables,
)
from expertflow.cache.horizon import STEPS_KNOWN, hazards, take_turns, unite
from expertflow.cache.policy import Outlook, Usage, keep
from expertflow.cache.prefetch import open_step, pass_layer
from expertflow.events import CacheCounters
from expertflow.kernels.ledger import CALLED_OFF, CARRIED, DONE, DST, PRIOR, SRC, TAKEN
from expertflow.kernels.residency.state import (
    AHEAD,
    BEFORE,
    BLIND,
    BLOCKS,
    CONSTANT,
    EVICTIONS,
    FORECAST,
    FORESEEN,
    FRESH,
    HITS,
    LATE,
    LOADS,
    PHASES,
    RECORDED,
    WASTES,
    CacheState,
    RoutingOutput,
    Schedule,
)


class Residency:
    """Twin of `kernels.residency.Residency` for a state on the CPU."""

    def __init__(self, state: CacheState, routing: RoutingOutput | None = None) -> None:
        """View the state's tensors as the arrays that `core` works on, without copying."""
        self.state, self._routing = state, routing
        own = make_tables(state.layers, state.experts, state.slots, divided=False, large=state.large)
        shared = ("slot_of", "owner", "rank", "per_layer", "share", "low", "lowest", "newer", "older", "pending")
        marks = {name: getattr(state, name).numpy().view(np.bool_) for name in ("pinned", "fresh")}
        self._tables: Tables = own._replace(**{name: getattr(state, name).numpy() for name in shared}, **marks)
        self._rules = state.strategy.rules(state.layers, state.slots, len(state.large))
        self._usage = Usage(layers=state.layers, experts=state.experts)
        for name in ("last_use", "count", "recent", "steady"):
            setattr(self._usage, name, getattr(state, name).numpy())
        self._usage.waits = state.waits[0].numpy()[:, None]
        before = state.rank.numpy().copy()
        self._planes = Planes(before, state.used.numpy(), state.unused.numpy(), state.limit.numpy())

    def expect(self, probabilities: Tensor, members: Tensor, group_bounds: Tensor) -> None:
        """Compute the demand of this step and further ones from chances of single sequences. See the twin."""
        count, *borders = group_bounds.tolist()
        if not count:
            self.state.known.zero_()
            return
        groups = [probabilities[members[borders[group] : borders[group + 1]]].numpy() for group in range(count)]
        demand = take_turns([hazards(unite(each)) for each in groups])
        sane = bool(np.isfinite(demand).all())
        self.state.known.fill_(STEPS_KNOWN if sane else 0)
        self.state.tally[BLIND] += not sane
        self.state.demand.copy_(self.state.demand.new_tensor(demand))

    def open_step(self, *, ahead: bool = True) -> None:  # noqa: ARG002 - where nothing is known, nothing is planned anyway
        """Run `prefetch.open_step`: this step's ranks, and its plan. See the twin."""
        state = self.state
        self._usage.step = int(state.clock[1])
        outlook = self._outlook(self._usage.step)
        for kept, made in zip(
            self._planes, keep(state.strategy.policy(self._usage, outlook), state.large), strict=True
        ):
            kept[:] = made
        state.demand[0] = 0 if outlook is None else state.demand.new_tensor(outlook.demand[0])
        state.demand[0, list(state.large)] = 0
        state.tally[BLOCKS] += state.ledger.moved()
        state.ledger.renew()
        state.ledger.count.zero_()
        state.entry.fill_(-1)
        self._tables.cursor[LOG], self._tables.cursor[RESIDENT] = 0, int(state.resident)
        open_step(self._tables, self._planes, state.demand[0].numpy(), self._rules)
        state.clock[0] = self._usage.step
        self._bound(-1)

    def _outlook(self, step: int) -> Outlook | None:
        """Return the outlook of the strategy's forecast for a step."""
        state = self.state
        if state.source == CONSTANT:
            return Outlook(state.future.numpy().astype(np.float64))
        if state.source == RECORDED:
            if step >= len(state.future):
                return None
            beyond = state.following[step + 1].numpy() - float(step + 1) if len(state.following) else None
            return Outlook(state.future[step : step + 1].numpy().astype(np.float64), beyond)
        known = int(state.known)
        return Outlook(state.demand[:known].numpy().copy()) if known else None

    def run_layer(self, layer: int, ids: Tensor, schedule: Schedule) -> None:
        """Run `core.access`: fill `schedule` for the layer. See the twin."""
        tables, state = self._tables, self.state
        choice = ids.numpy().astype(np.int64)
        choice[int(schedule.live) :] = state.experts
        if self._routing is not None:
            routed = np.where((choice >= 0) & (choice < state.experts), choice, state.experts)
            self._routing.routes[self._routing.state_rows[: len(routed)], layer] = self._routing.routes.new_tensor(
                routed
            )
        needed = np.zeros(state.experts, dtype=np.bool_)
        needed[choice[(choice >= 0) & (choice < state.experts)]] = True
        tables.cursor[LOG], tables.cursor[RESIDENT] = 0, int(state.resident)
        access(tables, self._planes, self._rules, layer, needed)
        state.needed[layer] |= state.needed.new_tensor(needed)
        logged = self._take_log()
        state.tally[PHASES] += self._fill(schedule, logged, choice, layer * state.experts)

    def bind(self, layer: int) -> None:
        """Run `prefetch.pass_layer`. See the twin."""
        if not self._rules.prefetch:
            return
        self._tables.cursor[LOG] = 0
        pass_layer(self._tables, self._planes, self.state.demand[0].numpy(), self._rules, layer)
        self._bound(layer)

    def close_step(self) -> None:
        """Run `Usage.learn`: count the finished step."""
        self._usage.step = int(self.state.clock[0])
        needed, tally = self.state.needed.numpy() != 0, self.state.tally
        self._usage.learn(needed)
        judged = CacheCounters()
        judged.judge(self.state.demand[0].numpy(), needed)
        tally[FORECAST] += judged.forecast
        tally[FORESEEN] += judged.foreseen
        tally[LATE] += tally[LOADS] > tally[BEFORE]
        tally[BEFORE] = tally[LOADS]
        self.state.made.copy_(tally[[LOADS, LOADS, AHEAD, FRESH]])
        self.state.made[0] += tally[AHEAD]
        self.state.made[1] = self._usage.step
        self.state.needed.zero_()
        self.state.clock[1] = self._usage.step

    def _take_log(self) -> npt.NDArray[np.int32]:
        """Return the log entries since the last decision; count them, and append them to the state's log."""
        tables, state = self._tables, self.state
        state.resident.fill_(int(tables.cursor[RESIDENT]))
        state.waiting.fill_(int(tables.cursor[PENDING]))
        logged = tables.log[: tables.cursor[LOG]]
        if len(state.log):
            begin = int(state.log_count)
            state.log[begin : begin + len(logged)] = state.log.new_tensor(logged)
            state.log_count.add_(len(logged))
        kinds = ((HITS, HIT), (LOADS, MISS), (EVICTIONS, EVICT), (AHEAD, PREFETCH), (WASTES, WASTED))
        for place, kind in kinds:
            state.tally[place] += int((logged[:, 0] == kind).sum())
        state.tally[FRESH] += int(((logged[:, 0] == HIT) & (logged[:, 4] == 1)).sum())
        return logged

    def _bound(self, layer: int) -> None:
        """Enter the loads ahead that were just bound into the ledger."""
        begin = int(self.state.ledger.count)
        for kind, of, expert, slot, _ in self._take_log().tolist():
            if kind == WASTED:
                self._call_off(slot)
            elif kind == PREFETCH:
                self.state.entry[slot] = self._enter(of * self.state.experts + expert, slot, -1)
        self.state.ahead[layer + 1, 0], self.state.ahead[layer + 1, 1] = begin, int(self.state.ledger.count)

    def _enter(self, flat: int, slot: int, prior: int) -> int:
        ledger, load = self.state.ledger, int(self.state.ledger.count)
        for name, value in ((SRC, flat), (DST, slot), (PRIOR, prior)):
            ledger.table[name, load] = value
        ledger.count.fill_(load + 1)
        return load

    def _call_off(self, slot: int) -> None:
        """Call off a slot's load ahead; here a load is carried whole or not begun."""
        table, load = self.state.ledger.table, int(self.state.entry[slot])
        if load >= 0:
            table[CARRIED, load] = table[TAKEN, load]
            assert table[TAKEN, load] == table[DONE, load]
            table[TAKEN, load] += CALLED_OFF

    def _fill(
        self, schedule: Schedule, logged: npt.NDArray[np.int32], choice: npt.NDArray[np.int64], first: int
    ) -> int:
        """Cut a layer's accesses into phases and fill `schedule`; return the number of phases beyond the first."""
        experts = self.state.experts
        table_of, slot_of = np.full(experts + 1, -1), np.full(experts + 1, -1)
        phase_of: list[int] = []
        late = [self.state.entry[one[3]].item() for one in logged.tolist() if one[0] == HIT and one[4]]
        todo = [entry for entry in late if entry >= 0]
        phase, begins = 0, [0]
        for kind, _, expert, slot, detail in logged.tolist():
            if kind == WASTED:
                self._call_off(slot)
            if kind not in {HIT, MISS}:
                continue
            if kind == MISS:
                if detail >= 0 and phase_of[detail] >= phase:
                    phase += 1
                    begins.append(len(todo))
                todo.append(self._enter(first + expert, slot, -1))
            waits = kind == MISS or (detail and self.state.entry[slot] >= 0)
            here = phase if kind == MISS else 0
            table_of[expert], slot_of[expert] = 1 + here if waits else 0, slot
            phase_of.append(here)
        schedule.todo[: len(todo)] = schedule.todo.new_tensor(todo)
        begins += [len(todo)] * (schedule.phases + 1 - len(begins))
        schedule.bounds.copy_(schedule.bounds.new_tensor(begins))
        known = np.where((choice >= 0) & (choice < experts), choice, experts)
        for number, table in enumerate(schedule.slots.numpy()):
            table[:] = np.where(table_of[known] == number, slot_of[known], -1)
        return phase
