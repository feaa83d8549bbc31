"""Replay a workload with a strategy and a number of slots: the engine's decisions on a virtual clock.

`replay` returns totals and is compiled; `replay_events` returns the event sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertflow.cache.controller import Ranker
from expertflow.cache.core import LOG, Planes, Rules, Tables, close, make_tables
from expertflow.cache.forecast import Forecast
from expertflow.cache.prefetch import open_step, run_layer
from expertflow.cache.shared import compiled
from expertflow.cache.strategy import GATE_RECALL, Setting, Strategy
from expertflow.errors import ConfigError
from expertflow.events import Event, EventKind, as_event
from expertflow.sim.clock import (
    BUSY,
    CLEAN,
    FRESH,
    HITS,
    LATE,
    MISSES,
    MOVED,
    NEEDED,
    NOW,
    PREFETCHED,
    STALL,
    WASTES,
    Clock,
    Cost,
    Durations,
    make_clock,
    tick,
)
from expertflow.sim.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Totals of a replay.

    Attributes:
        strategy: its name.
        batch: live sequences.
        groups: groups that step alternately.
        slots: slots in all.
        share: slots over experts.
        steps: steps replayed.
        tokens: tokens replayed.
        needed: distinct (layer, expert) needs, summed over steps.
        hits: needs in their slot when their layer ran, prefetched ones included.
        kept: hits other than first uses of prefetches: what retention alone gave.
        misses: needs loaded when their layer ran.
        prefetched: loads ahead.
        wasted: of those, never used.
        late: of those, not yet arrived when their layer ran.
        clean_steps: steps without a miss.
        row_bytes: bytes of one expert's record; the name is that of result files.
        moved_bytes: bytes over the link, each load's layer's record.
        seconds: virtual time.
        stall_seconds: of it, waiting for records.
        link_seconds: of it, link busy.
        compute_seconds: the same work with everything resident.
    """

    strategy: str
    batch: int
    groups: int
    slots: int
    share: float
    steps: int
    tokens: int
    needed: int
    hits: int
    kept: int
    misses: int
    prefetched: int
    wasted: int
    late: int
    clean_steps: int
    row_bytes: int
    moved_bytes: int
    seconds: float
    stall_seconds: float
    link_seconds: float
    compute_seconds: float

    @property
    def loads(self) -> int:
        """Records moved."""
        return self.misses + self.prefetched

    @property
    def hit_ratio(self) -> float:
        """Share of needs found in a slot when their layer ran (loaded ahead or kept)."""
        return self.hits / max(self.needed, 1)

    @property
    def kept_ratio(self) -> float:
        """Share of needs found without any load for them: retention alone, comparable with demand loading."""
        return self.kept / max(self.needed, 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes over the link."""
        return self.moved_bytes / max(self.tokens, 1)

    @property
    def clean_share(self) -> float:
        """Share of steps without a miss."""
        return self.clean_steps / max(self.steps, 1)

    @property
    def tokens_per_second(self) -> float:
        """On the virtual clock."""
        return self.tokens / self.seconds if self.seconds else 0.0


@compiled
def _open_step(t: Tables, planes: Planes, demand: npt.NDArray[np.float64], rules: Rules) -> None:
    open_step(t, planes, demand, rules)


@compiled
def _run_layer(
    t: Tables,
    planes: Planes,
    demand: npt.NDArray[np.float64],
    rules: Rules,
    layer: int,
    needed: npt.NDArray[np.bool_],
) -> None:
    run_layer(t, planes, demand, rules, layer, needed)


@compiled
def _run_step(  # noqa: PLR0913, PLR0917 - state of three parts, each used as it is
    t: Tables,
    planes: Planes,
    demand: npt.NDArray[np.float64],
    rules: Rules,
    needed: npt.NDArray[np.bool_],
    c: Clock,
    costs: Durations,
) -> None:
    missed = c.tally[MISSES]
    t.cursor[LOG] = 0
    open_step(t, planes, demand, rules)
    tick(c, costs, t.log, 0, t.cursor[LOG])
    for layer in range(needed.shape[0]):
        if not np.any(needed[layer]):
            continue
        t.cursor[LOG] = 0
        run_layer(t, planes, demand, rules, layer, needed[layer])
        tick(c, costs, t.log, 0, t.cursor[LOG])
    t.cursor[LOG] = 0
    c.tally[CLEAN] += missed == c.tally[MISSES]


@compiled
def _finish(t: Tables, c: Clock, costs: Durations) -> None:
    t.cursor[LOG] = 0
    close(t)
    tick(c, costs, t.log, 0, t.cursor[LOG])


def check_slots(workload: Workload, slots: int) -> None:
    """Refuse a pool that cannot be replayed.

    Raises:
        ConfigError: if there are fewer slots than the experts one token needs in one layer.
    """
    header = workload.trace.header
    if slots < header.top_k:
        raise ConfigError(
            f"slots={slots} is less than one layer's need: a token uses {header.top_k} experts a layer",
            f"Give {header.top_k} slots or more.",
        )


def setting_of(workload: Workload, gate_recall: float = GATE_RECALL, large: tuple[int, ...] = ()) -> Setting:
    """Return the facts a replay's forecast is made from, the recorded future included."""
    header = workload.trace.header
    return Setting(
        layers=header.layers, experts=header.experts, future=workload.needed, gate_recall=gate_recall, large=large
    )


def replay(
    workload: Workload,
    strategy: Strategy,
    slots: int,
    cost: Cost,
    *,
    forecast: Forecast | None = None,
    gate_recall: float = GATE_RECALL,
) -> Outcome:
    """Replay a workload.

    Args:
        workload: the steps.
        strategy: entry of the strategy table.
        slots: slots in all.
        cost: link and computation.
        forecast: replaces the strategy's own.
        gate_recall: recall of the next-layer gate, where a strategy uses it.

    Raises:
        ConfigError: if the slots are too few for one token in one layer.
    """
    return replay_sizes(workload, strategy, (slots,), cost, forecast=forecast, gate_recall=gate_recall)[0]


def replay_sizes(
    workload: Workload,
    strategy: Strategy,
    sizes: Sequence[int],
    cost: Cost,
    *,
    forecast: Forecast | None = None,
    gate_recall: float = GATE_RECALL,
) -> list[Outcome]:
    """Replay several pools side by side, because ranks and forecasts of a step do not depend on the slots.

    Args:
        workload: the steps.
        strategy: entry of the strategy table.
        sizes: slots of each pool.
        cost: link and computation.
        forecast: replaces the strategy's own.
        gate_recall: recall of the next-layer gate, where a strategy uses it.

    Raises:
        ConfigError: if the slots of a pool are too few for one token in one layer.
    """
    for slots in sizes:
        check_slots(workload, slots)
    header = workload.trace.header
    ranker = Ranker(strategy, setting_of(workload, gate_recall, cost.large), forecast)
    divided = strategy.partition == "layer"
    pools = [
        (
            make_tables(header.layers, header.experts, slots, divided=divided, large=cost.large),
            strategy.rules(header.layers, slots, len(cost.large)),
            make_clock(header.experts, slots),
        )
        for slots in sizes
    ]
    costs = cost.durations(header.layers)
    for number in range(len(workload)):
        planes, demand = ranker.rank(workload.before(number))
        needed = workload.needed[number]
        for tables, rules, clock in pools:
            _run_step(tables, planes, demand, rules, needed, clock, costs)
        ranker.learn(workload.after(number))
    for tables, _, clock in pools:
        _finish(tables, clock, costs)
    return [_outcome(workload, strategy, slots, cost, clock) for slots, (_, _, clock) in zip(sizes, pools, strict=True)]


def _outcome(workload: Workload, strategy: Strategy, slots: int, cost: Cost, clock: Clock) -> Outcome:
    header, count = workload.trace.header, clock.tally.tolist()
    compute = len(workload) * header.layers * cost.layer_us + count[NEEDED] * cost.expert_us
    return Outcome(
        strategy=strategy.name,
        batch=workload.batch,
        groups=workload.groups,
        slots=slots,
        share=slots / ((header.layers - len(cost.large)) * header.experts),
        steps=len(workload),
        tokens=workload.tokens,
        needed=count[NEEDED],
        hits=count[HITS],
        kept=count[HITS] - count[FRESH],
        misses=count[MISSES],
        prefetched=count[PREFETCHED],
        wasted=count[WASTES],
        late=count[LATE],
        clean_steps=count[CLEAN],
        row_bytes=cost.row_bytes,
        moved_bytes=count[MOVED],
        seconds=float(clock.time[NOW]) / 1e6,
        stall_seconds=float(clock.time[STALL]) / 1e6,
        link_seconds=float(clock.time[BUSY]) / 1e6,
        compute_seconds=compute / 1e6,
    )


def replay_events(
    workload: Workload,
    strategy: Strategy,
    slots: int,
    record_bytes: int | Sequence[int] = 1,
    forecast: Forecast | None = None,
    *,
    large: tuple[int, ...] = (),
) -> list[Event]:
    """Return the events of a replay from the compiled decisions; the engine emits the same on the same routing.

    Args:
        workload: the steps.
        strategy: entry of the strategy table.
        slots: slots in all.
        record_bytes: bytes of one expert's record, of all layers or of each.
        forecast: replaces the strategy's own.
        large: layers whose experts are always resident, outside the slots.
    """
    header = workload.trace.header
    ranker = Ranker(strategy, setting_of(workload, large=large), forecast)
    tables = make_tables(header.layers, header.experts, slots, divided=strategy.partition == "layer", large=large)
    rules = strategy.rules(header.layers, slots, len(large))
    events: list[Event] = []

    def collect(number: int) -> None:
        entries = tables.log[: tables.cursor[LOG]].tolist()
        events.extend(as_event(entry, number, record_bytes) for entry in entries)
        tables.cursor[LOG] = 0

    for number in range(len(workload)):
        planes, demand = ranker.rank(workload.before(number))
        events.append(Event(EventKind.STEP, number))
        _open_step(tables, planes, demand, rules)
        collect(number)
        for layer in np.flatnonzero(workload.needed[number].any(axis=1)).tolist():
            _run_layer(tables, planes, demand, rules, layer, workload.needed[number, layer])
            collect(number)
        ranker.learn(workload.after(number))
    close(tables)
    collect(len(workload) - 1)
    return events
