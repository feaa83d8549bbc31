"""Decide for the engine which slots are used: routing in, accesses and loads out, events emitted.

The controller makes a step's ranks from policy and forecast, calls the functions that the simulator compiles (`core`,
`prefetch`; see `decisions`), and turns their log entries into events and commands. Must not know torch, clocks and copies.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import (
    EMPTY,
    HIT,
    LOG,
    MISS,
    PENDING,
    PREFETCH,
    Planes,
    Rules,
    Tables,
    close,
    evict,
    make_tables,
)
from expertflow.cache.decisions import Deciding
from expertflow.cache.forecast import Forecast, Step
from expertflow.cache.policy import Outlook, Usage, keep, spread
from expertflow.cache.strategy import Setting, Strategy
from expertflow.cache.table import SlotTable
from expertflow.events import CacheCounters, Event, EventKind, EventStream
from expertflow.types import Access, Load


class Ranker:
    """Ranks of each step from usage and forecast; shared by controller and replay.

    Args:
        strategy: entry of the strategy table.
        setting: what its forecast may be made from.
        forecast: replaces the strategy's own.

    Raises:
        ConfigError: if the strategy needs a recording and there is neither that nor a forecast.
    """

    def __init__(self, strategy: Strategy, setting: Setting, forecast: Forecast | None = None) -> None:
        """Start with no usage."""
        self.strategy = strategy
        self.forecast = forecast or strategy.make_forecast(setting)
        self.usage = Usage(layers=setting.layers, experts=setting.experts, reached=setting.reached)
        self._none = np.zeros((setting.layers, setting.experts))
        self._large = list(setting.large)

    def rank(self, step: Step) -> tuple[Planes, npt.NDArray[np.float64]]:
        """Return a coming step's ranks, and its demand float64 `[L, E]`: 0 where nothing is known, or everything is always resident."""
        outlook: Outlook | None = self.forecast.outlook(step)
        demand = self._none if outlook is None else outlook.demand[0]
        return keep(self.strategy.policy(self.usage, outlook), self._large), self.without_large(demand)

    def without_large(self, demand: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Demand `[L, E]` for slots: that of large layers is 0, because none of their experts is ever loaded."""
        if self._large:
            demand = demand.copy()
            demand[self._large] = 0
        return demand

    def rank_wide(self, slots: int) -> Planes:
        """Return the ranks of a pass that needs every expert, with so many slots."""
        planes = keep(self.strategy.policy(self.usage, Outlook(np.ones_like(self._none)[None])), self._large)
        return spread(planes._replace(limit=planes.before), slots // (len(self._none) - len(self._large)))

    def learn(self, step: Step) -> None:
        """Count a finished step in usage and forecast."""
        assert step.needed is not None
        self.usage.learn(step.needed)
        self.forecast.learn(step)


class CacheController:
    """Decides, layer by layer, which slot each needed expert gets, which one is evicted, and what is loaded ahead.

    Args:
        layers: MoE layers.
        experts: experts a layer.
        slots: slots in all, at least 1.
        strategy: entry of the strategy table.
        record_bytes: bytes of one expert, of all layers or of each, for the event stream.
        events: the stream that gets an event for every decision.
        future: `[N, L, E]` bool, the coming run's routing, for strategies that need a recording of it.
        forecast: replaces the strategy's own forecast.
        reached: for each layer, whether a decode step runs it (an encoder's are not run); None: all.
        wide: tokens of a pass over prompts from which on it is taken to need every expert; None: it never is.
        large: layers whose experts are always resident, in places behind the slots.
        deciding: the functions that decide; None: as Python.

    Attributes:
        judged: how good the demand of steps was; nothing else is counted in it. A step is judged when the next one begins.

    Raises:
        ConfigError: if the strategy needs a recording and there is neither that nor a forecast.
    """

    def __init__(  # noqa: PLR0913 - all by keyword
        self,
        *,
        layers: int,
        experts: int,
        slots: int,
        strategy: Strategy,
        record_bytes: int | Sequence[int],
        events: EventStream,
        future: npt.NDArray[np.bool_] | None = None,
        forecast: Forecast | None = None,
        reached: Sequence[bool] | None = None,
        wide: int | None = None,
        large: Sequence[int] = (),
        deciding: Deciding | None = None,
    ) -> None:
        """Start with every slot empty."""
        self._deciding = deciding or Deciding()
        self.strategy, self.events, self.future, self.reached = strategy, events, future, reached
        self.step = -1
        self._tables: Tables = make_tables(layers, experts, slots, divided=strategy.partition == "layer", large=large)
        self.table = SlotTable(self._tables)
        self._own_rules = self._rules = strategy.rules(layers, slots, len(large))
        self._wide_rules: Rules = strategy.wide_rules(layers, slots, len(large))
        self._wide = wide if strategy.reads_ahead else None
        setting = Setting(layers=layers, experts=experts, future=future, reached=reached, large=tuple(large))
        self._ranker = Ranker(strategy, setting, forecast)
        self._planes, self._demand = self._ranker.rank(Step(0))
        self._record_bytes, self._open = record_bytes, False
        self._needed = np.zeros((layers, experts), dtype=np.bool_)
        self._tokens: npt.NDArray[np.int32] | None = None
        self._routes: dict[int, npt.NDArray[np.int64]] = {}
        self._loads: list[Load] = []
        self._loaded = self._ahead = self._found = 0
        self.judged = CacheCounters()

    @property
    def per_token(self) -> bool:
        """Whether the forecast learns from single tokens: then `begin_step` and `observe` need them."""
        return self._ranker.forecast.per_token

    def begin(self, tokens: npt.NDArray[np.int32] | None) -> None:
        """Do nothing: an observer's method; `begin_step` gets the tokens."""

    def begin_step(self, tokens: npt.NDArray[np.int32] | None = None, *, prompts: int = 0) -> None:
        """Rank and plan a forward pass that starts; `take_loads` then has the copies to start now.

        Args:
            tokens: int32 `[T]`, ids of the tokens fed in; None if unknown.
            prompts: how many tokens of prompts are fed in; 0 in a decode step.
        """
        self.end_step()
        self.step += 1
        self._open = True
        self._tokens = tokens
        self._loaded = self._ahead = self._found = 0
        if self._wide is not None and prompts >= self._wide:
            self._rules = self._wide_rules
            self._planes, self._demand = self._ranker.rank_wide(self.table.slots), np.zeros_like(self._demand)
            self._demand[0] = 1
            self._demand = self._ranker.without_large(self._demand)
        else:
            self._planes, self._demand = self._ranker.rank(Step(self.step, tokens))
        self.events.emit(Event(EventKind.STEP, self.step))
        self._deciding.now.open_step(self._tables, self._planes, self._demand, self._rules)
        self._drain()

    def observe(self, layer: int, routes: npt.NDArray[np.int64], weights: object) -> None:  # noqa: ARG002 - an observer's signature
        """Store a layer's routing `[T, K]` for forecasts that learn from single tokens."""
        self._routes.setdefault(layer, routes)

    def access(self, layer: int, needed: Sequence[int]) -> list[Access]:
        """Decide a layer: which slot each needed expert uses, in which order, and what is loaded when.

        `take_loads` then has the copies for later layers, each to be started once nothing reads its slot any more.

        Args:
            layer: MoE layer.
            needed: distinct expert indexes the layer's tokens were routed to.

        Returns:
            One access an expert: hits in ascending order, then misses, the highest rank last.
        """
        return list(self.accesses(layer, needed))

    def accesses(self, layer: int, needed: Sequence[int]) -> Iterator[Access]:
        """Yield what `access` returns, each one as soon as it is decided, so that its copy runs beside the next decision.

        The layer is over when the iterator is exhausted. A caller that stops earlier has to call `forget`.
        """
        mask = np.zeros(self.table.experts, dtype=np.bool_)
        mask[list(needed)] = True
        self._needed[layer] |= mask
        tables, planes, rules, decide = self._tables, self._planes, self._rules, self._deciding.now
        misses, kept = decide.take_hits(tables, planes, rules, layer, mask)
        yield from self._drain()
        for number in range(misses.size):
            decide.place_miss(tables, planes, rules, layer, mask, misses, kept, number)
            yield from self._drain()
        decide.finish_layer(tables, planes, rules, layer, mask)
        if rules is self._wide_rules:  # residents of farther layers are not pinned, but make room, the farthest first
            self._demand[layer] = 0
            self._demand[layer + 1 : layer + 2] = 1
            self._demand = self._ranker.without_large(self._demand)
        decide.pass_layer(tables, planes, self._demand, rules, layer)
        self._drain()

    def take_loads(self) -> list[Load]:
        """Return the copies decided since the last call that run ahead of their layer, in order."""
        loads, self._loads = self._loads, []
        return loads

    def forget(self) -> None:
        """Empty every slot and drop the plan, because decisions were not carried out and the slots' contents are unknown."""
        tables = self._tables
        tables.cursor[LOG] = tables.cursor[PENDING] = 0
        for slot in np.flatnonzero(tables.owner != EMPTY):
            evict(tables, int(slot))
        tables.pinned[:] = False
        tables.last_access[:] = tables.order[:] = -1
        self._drain()
        self._loads, self._ahead, self._found = [], 0, 0

    def end_step(self) -> None:
        """Count the step that is over, once; `begin_step` does it for the step before."""
        if not self._open:
            return
        self._open = False
        counts = self._loaded, self._ahead, self._found
        if self._rules is self._own_rules:
            self.judged.judge(self._demand, self._needed)
        self._ranker.learn(Step(self.step, self._tokens, self._needed, self._token_routes(), *counts))
        if self._rules is not self._own_rules:  # what was loaded ahead and not used is no plan of the next step
            self._rules = self._own_rules
            if self._tables.fresh.any():
                close(self._tables)
            self._tables.pinned[:] = False
            self._drain()
        self._needed[:] = False
        self._routes = {}

    @property
    def tables(self) -> Tables:
        """The cache's tables, for the device execution that takes them over."""
        return self._tables

    @property
    def uses(self) -> npt.NDArray[np.int64]:
        """`[L, E]`, how many steps used each expert, one that runs included. A copy."""
        count = self._ranker.usage.count
        found: npt.NDArray[np.int64] = (count + self._needed if self._open else count).astype(np.int64)
        return found

    def lend_tables(self, take: Callable[[Tables, Usage], None]) -> None:
        """End the step, then let `take` copy tables and usage: the device execution decides the coming steps."""
        self.end_step()
        take(self._tables, self._ranker.usage)

    def reclaim_tables(self, give: Callable[[Tables, Usage], None], steps: int) -> None:
        """Let `give` write tables and usage after `steps` steps that the device execution decided."""
        give(self._tables, self._ranker.usage)
        self.step += steps

    def close(self) -> None:
        """Emit the prefetches that were never used as wasted, at the end of the run."""
        close(self._tables)
        self._drain()

    def _token_routes(self) -> npt.NDArray[np.uint16] | None:
        """Routing `[T, L, K]`, E in layers that did not run; None unless every layer routed exactly the tokens fed in."""
        tokens = self._tokens
        if tokens is None or not self._routes or any(len(routes) != len(tokens) for routes in self._routes.values()):
            return None
        top_k = next(iter(self._routes.values())).shape[1]
        result = np.full((len(tokens), self.table.layers, top_k), self.table.experts, dtype=np.uint16)
        for layer, routes in self._routes.items():
            result[:, layer] = routes
        return result

    def _drain(self) -> list[Access]:
        """Turn log entries into events, accesses and loads."""
        entries = self._tables.log[: self._tables.cursor[LOG]].tolist()
        self._tables.cursor[LOG] = 0
        self.events.emit_log(entries, self.step, self._record_bytes)
        accesses = []
        for kind, layer, expert, slot, detail in entries:
            if kind == HIT:
                self._found += detail
                accesses.append(Access(expert, slot, load=False, fresh=bool(detail), after=-1))
            elif kind == MISS:
                self._loaded += 1
                accesses.append(Access(expert, slot, load=True, fresh=False, after=detail))
            elif kind == PREFETCH:
                self._loaded += 1
                self._ahead += 1
                self._loads.append(Load(layer, expert, slot))
        return accesses
