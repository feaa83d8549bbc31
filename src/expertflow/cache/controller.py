"""The decision maker as the engine sees it: facts in, a schedule of accesses and loads out, events told.

A thin cover over `core` and `prefetch`: it makes the step's ranks from policy and forecast, calls the same functions the
simulator compiles, and turns their log rows into events and commands. No torch, no clock, no copies (design law 2).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import LOG, Planes, Rules, Tables, close, forget, leave, load, make_tables, meet
from expertflow.cache.forecast import Forecast, Step
from expertflow.cache.policy import Outlook, Usage
from expertflow.cache.prefetch import open_step, pass_layer
from expertflow.cache.strategy import Setting, Strategy
from expertflow.cache.table import SlotTable
from expertflow.events import Event, EventKind, EventStream
from expertflow.types import Access, Load

KINDS = (EventKind.LAYER, EventKind.HIT, EventKind.MISS, EventKind.PREFETCH, EventKind.EVICT, EventKind.WASTED)
"""Event kinds by the numbers of log rows."""


class Brain:
    """What is known and expected, and the ranks that follow from it, step by step.

    Shared by controller and replay: everything that decides, but the tables.
    """

    def __init__(self, strategy: Strategy, setting: Setting, forecast: Forecast | None = None) -> None:
        """Know nothing yet; `forecast` replaces the strategy's own source."""
        self.strategy = strategy
        self.forecast = forecast or strategy.make_forecast(setting)
        self.usage = Usage(layers=setting.layers, experts=setting.experts, reached=setting.reached)
        self._none = np.zeros((setting.layers, setting.experts))

    def begin(self, step: Step) -> tuple[Planes, npt.NDArray[np.float64]]:
        """Ranks and demand of a step, before it."""
        outlook: Outlook | None = self.forecast.outlook(step)
        demand = self._none if outlook is None else outlook.demand[0]
        return self.strategy.policy(self.usage, outlook), demand

    def end(self, step: Step) -> None:
        """Learn from a finished step."""
        assert step.needed is not None
        self.usage.learn(step.needed)
        self.forecast.learn(step)


class CacheController:
    """Decides, layer by layer, in which slot each needed expert is, who leaves for it, and what is loaded ahead.

    Args:
        layers: MoE layers.
        experts: experts a layer.
        slots: slots in all, at least 1.
        strategy: row of the strategy table.
        record_bytes: bytes of one expert, for the event stream.
        events: where everything is told.
        future: `[N, L, E]` bool, the coming run's routing, for strategies that need a recording of it.
        forecast: replaces the strategy's own source of expectations.
        reached: the layers that a decode step runs, an encoder's are not among them; None: all.

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
        record_bytes: int,
        events: EventStream,
        future: npt.NDArray[np.bool_] | None = None,
        forecast: Forecast | None = None,
        reached: Sequence[bool] | None = None,
    ) -> None:
        """Start with every slot empty."""
        self.strategy, self.events, self.future, self.reached = strategy, events, future, reached
        self.step = -1
        self._tables: Tables = make_tables(layers, experts, slots, divided=strategy.partition == "layer")
        self.table = SlotTable(self._tables)
        self._rules: Rules = strategy.rules(layers, slots)
        self._brain = Brain(strategy, Setting(layers=layers, experts=experts, future=future, reached=reached), forecast)
        self._planes, self._demand = self._brain.begin(Step(0))
        self._row_bytes, self._open = record_bytes, False
        self._needed = np.zeros((layers, experts), dtype=np.bool_)
        self._tokens: npt.NDArray[np.int32] | None = None
        self._routes: dict[int, npt.NDArray[np.int64]] = {}
        self._loads: list[Load] = []
        self._loaded = self._ahead = self._found = 0

    @property
    def per_token(self) -> bool:
        """Whether the forecast learns from single tokens: then `begin_step` and `observe` have to be told of them."""
        return self._brain.forecast.per_token

    def begin(self, tokens: npt.NDArray[np.int32] | None) -> None:
        """Nothing: `begin_step` says it all."""

    def begin_step(self, tokens: npt.NDArray[np.int32] | None = None) -> None:
        """A forward pass starts; `take_loads` then has the copies to start now.

        Args:
            tokens: `[T]` ids of the tokens fed in, if they are known.
        """
        self.end_step()
        self.step += 1
        self._open = True
        self._tokens = tokens
        self._loaded = self._ahead = self._found = 0
        self._planes, self._demand = self._brain.begin(Step(self.step, tokens))
        self.events.emit(Event(EventKind.STEP, self.step))
        open_step(self._tables, self._planes, self._demand, self._rules)
        self._drain()

    def observe(self, layer: int, routes: npt.NDArray[np.int64], weights: object) -> None:  # noqa: ARG002 - an observer's signature
        """Take note of a layer's `[T, K]` choices, for forecasts that learn from single tokens."""
        self._routes.setdefault(layer, routes)

    def access(self, layer: int, needed: Sequence[int]) -> list[Access]:
        """Decide a layer: which slot each needed expert uses, in which order, and what is loaded when.

        `take_loads` then has the copies for later layers, to be started once this layer is done.

        Args:
            layer: MoE layer.
            needed: distinct expert indexes the layer's tokens were routed to.

        Returns:
            One access an expert: hits in ascending order, then misses, those worth keeping last.
        """
        return list(self.turns(layer, needed))

    def turns(self, layer: int, needed: Sequence[int]) -> Iterator[Access]:
        """`access`, each turn told as soon as it is decided: its copy can be under way while the next one is thought about.

        The layer is over when the iterator is exhausted; whoever gives up before has to `forget`.
        """
        mask = np.zeros(self.table.experts, dtype=np.bool_)
        mask[list(needed)] = True
        self._needed[layer] |= mask
        tables, planes, rules = self._tables, self._planes, self._rules
        misses, held = meet(tables, planes, rules, layer, mask)
        yield from self._drain()
        for number in range(misses.size):
            load(tables, planes, rules, layer, mask, misses, held, number)
            yield from self._drain()
        leave(tables, planes, rules, layer, mask)
        pass_layer(tables, planes, self._demand, rules, layer)
        self._drain()

    def take_loads(self) -> list[Load]:
        """The copies decided since the last call that run ahead of their layer, in order."""
        loads, self._loads = self._loads, []
        return loads

    def forget(self) -> None:
        """Empty every slot: what was decided was not carried out, so what the slots hold is unknown."""
        forget(self._tables)
        self._drain()
        self._loads, self._ahead, self._found = [], 0, 0

    def end_step(self) -> None:
        """Learn from the step that is over, once; `begin_step` does it for the one before."""
        if not self._open:
            return
        self._open = False
        counts = self._loaded, self._ahead, self._found
        self._brain.end(Step(self.step, self._tokens, self._needed, self._token_routes(), *counts))
        self._needed[:] = False
        self._routes = {}

    @property
    def tables(self) -> Tables:
        """What is remembered; for whoever takes turns with this controller."""
        return self._tables

    def lend_tables(self, take: Callable[[Tables, Usage], None]) -> None:
        """Let somebody else decide the coming steps: the step that is over is learned from, `take` copies what is known."""
        self.end_step()
        take(self._tables, self._brain.usage)

    def reclaim_tables(self, give: Callable[[Tables, Usage], None], steps: int) -> None:
        """Go on after `steps` steps that somebody else decided; `give` writes what is known now."""
        give(self._tables, self._brain.usage)
        self.step += steps

    def close(self) -> None:
        """The end of the run: tell what was prefetched in vain."""
        close(self._tables)
        self._drain()

    def _token_routes(self) -> npt.NDArray[np.uint16] | None:
        """`[T, L, K]`, E in layers the pass did not reach; None unless every layer saw the tokens fed in."""
        tokens = self._tokens
        if tokens is None or not self._routes or any(len(routes) != len(tokens) for routes in self._routes.values()):
            return None
        top_k = next(iter(self._routes.values())).shape[1]
        result = np.full((len(tokens), self.table.layers, top_k), self.table.experts, dtype=np.uint16)
        for layer, routes in self._routes.items():
            result[:, layer] = routes
        return result

    def _drain(self) -> list[Access]:
        """Turn log rows into events, accesses and loads."""
        rows = self._tables.log[: self._tables.cursor[LOG]].tolist()
        self._tables.cursor[LOG] = 0
        accesses = []
        for row in rows:
            event = as_event(row, self.step, self._row_bytes)
            self.events.emit(event)
            if event.kind is EventKind.HIT:
                self._found += row[4]
                accesses.append(Access(event.expert, event.slot, load=False, fresh=bool(row[4]), after=-1))
            elif event.kind is EventKind.MISS:
                self._loaded += 1
                accesses.append(Access(event.expert, event.slot, load=True, fresh=False, after=row[4]))
            elif event.kind is EventKind.PREFETCH:
                self._loaded += 1
                self._ahead += 1
                self._loads.append(Load(event.layer, event.expert, event.slot))
        return accesses


def as_event(row: Sequence[int], step: int, record_bytes: int) -> Event:
    """A log row as an event."""
    kind = KINDS[row[0]]
    moved = record_bytes if kind in (EventKind.MISS, EventKind.PREFETCH) else 0
    value = row[4] if kind in (EventKind.LAYER, EventKind.HIT) else moved
    return Event(kind, step, row[1], row[2], row[3], value)
