"""The cache's tables and usage as tensors on the device: the mirror of `core.Tables` and `policy.Usage`.

Either the host controller or the device twin decides. `CacheState.copy_from` takes the controller's tables, `copy_to`
gives them back, so residents stay resident at a switch. Must not decide anything.

A layer runs in *phases*. Within a phase no slot is used twice, so its records are fetched together and its experts
computed together. A graph has a fixed number of phases, `phase_bound`; the twin fills as many as it needs. Experts that
are resident already are computed before the first phase, beside its fetch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from expertflow.cache.core import LOG, PENDING, RESIDENT, Tables
from expertflow.cache.forecast import LayerOrder, NoForecast, Recorded, Step, next_uses
from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.cache.policy import DISCOUNT, Policy, Usage, belady, discounted_use, layer_order, lfu, lru, next_use
from expertflow.cache.strategy import Setting, Strategy
from expertflow.events import CacheCounters
from expertflow.kernels.ledger import DONE, LINE, Ledger

POLICIES: dict[Policy, int] = {lru: 0, lfu: 1, next_use: 2, belady: 3, discounted_use: 4, layer_order: 5}
"""Policies with a device twin, and their numbers in the kernels."""
HITS, LOADS, EVICTIONS, PHASES, BROKEN, AHEAD, FRESH, WASTES, BLIND, BLOCKS = range(10)
LATE, BEFORE, FORECAST, FORESEEN = range(10, 14)
"""Indexes into `CacheState.tally`. FRESH counts hits that a load ahead brought, BLIND steps whose forecast had a NaN,
BLOCKS the blocks carried of all loads, or what `Ledger.moved` counts where records are unequal. A load that was called off is not carried whole.
LATE counts steps with a load that was needed, BEFORE holds LOADS at the end of the last step. FORECAST and FORESEEN are those
of `CacheCounters`."""
UNKNOWN, RECORDED, CONSTANT, GIVEN = range(4)
"""The source of a step's demand: none, a recording, a recording of one step for all, or a caller that writes
`CacheState.demand`."""


def refusal(strategy: Strategy, *, given: bool = False) -> str | None:
    """Return why a strategy has no device twin; None if it has one.

    Args:
        strategy: entry of the strategy table.
        given: whether a trained predictor or the caller's own forecast replaces the strategy's.
    """
    if strategy.policy not in POLICIES:
        return f"strategy {strategy.name!r} ranks by a policy without a device twin"
    if given and strategy.policy is belady:
        return f"strategy {strategy.name!r} ranks by every later use, and a step on the device knows those of {STEPS_KNOWN} steps"
    if strategy.predicted and not given:
        return f"strategy {strategy.name!r} has no predictor here, and its counts by token are kept on the host"
    known = strategy.predicted or given or strategy.needs_future
    if not known and type(strategy.make_forecast(Setting(layers=1, experts=1))) not in (NoForecast, LayerOrder):
        return f"the forecast of strategy {strategy.name!r} is made on the host"
    return None


def source_of(strategy: Strategy, setting: Setting, *, given: bool = False) -> tuple[int, np.ndarray]:
    """Return the source of a strategy's demand, and the recorded demand, bool `[N, L, E]`; N = 0 if there is none."""
    nothing = np.zeros((0, setting.layers, setting.experts), dtype=np.bool_)
    if strategy.predicted or given:
        return GIVEN, nothing
    forecast = strategy.make_forecast(setting)
    if isinstance(forecast, LayerOrder):
        every = np.ones((1, setting.layers, setting.experts), dtype=np.bool_)
        if setting.reached is not None:
            every[:, ~np.asarray(setting.reached)] = False
        return CONSTANT, every
    if setting.future is None or not strategy.needs_future:
        return UNKNOWN, nothing
    if isinstance(forecast, Recorded):
        return RECORDED, setting.future
    each = [forecast.outlook(Step(number)) for number in range(len(setting.future))]
    return RECORDED, np.stack([o.demand[0] > 0 for o in each if o is not None])


def phase_bound(strategy: Strategy, layers: int, slots: int, needed: int, large: int = 0) -> int:
    """Return the most phases that a layer with `needed` needed experts can take.

    A phase ends with each wave of loads. One more phase ends if hits and loads fill the layer's share of the slots, or
    the slots that the plan keeps free, before the first wave is over.
    """
    rules = strategy.rules(layers, slots, large)
    if rules.joint and needed <= rules.wave:
        return 1
    return 1 + -(-needed // rules.wave)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The twin's decisions for one layer, in the shape the kernels read; all layers share one.

    Attributes:
        slots: int32 `[1 + P, T, K]`, the slot of each (token, rank) pair in the phase that computes it, else -1. The
            first table has the pairs that wait for no copy, table 1 + p those that wait for the fetch of phase p.
        todo: int32 `[N]`, entries of the ledger to be carried, in order.
        bounds: int32 `[P + 1]`, phase p waits for `todo[bounds[p] .. bounds[p + 1] - 1]`.
        live: int32 `[1]`, how many of the T tokens count; the others are padding and need no expert.
    """

    slots: Tensor
    todo: Tensor
    bounds: Tensor
    live: Tensor

    @classmethod
    def allocate(cls, state: "CacheState", tokens: int, top_k: int) -> Self:
        """Allocate for steps of `tokens` tokens with `top_k` experts a layer, all of them live."""
        needed = min(tokens * top_k, state.experts)
        phases = phase_bound(state.strategy, state.layers, state.slots, needed, len(state.large))

        def numbers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=state.slot_of.device)

        return cls(
            slots=numbers(1 + phases, tokens, top_k, value=-1),
            todo=numbers(needed),
            bounds=numbers(phases + 1),
            live=numbers(1, value=tokens),
        )

    @property
    def phases(self) -> int:
        """P, the bound on phases."""
        return len(self.slots) - 1


@dataclass(frozen=True, kw_only=True)
class RoutingOutput:
    """A step's routing, written for the predictor while the step runs.

    Attributes:
        routes: int32 `[C, L, K]`, each sequence's experts in its last step; E means none.
        state_rows: int64 `[T]`, for each row of the batch its sequence's index among the C.
    """

    routes: Tensor
    state_rows: Tensor


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """Tables, usage and this step's ranks; a name that is also in `core.Tables` or `policy.Usage` means the same.

    Attributes:
        strategy: the entry that decides, from `Strategy.on_device` or any other that `refusal` allows.
        source: the source of the demand: `UNKNOWN`, `RECORDED`, `CONSTANT` or `GIVEN`.
        large: layers whose experts are always resident, outside the slots.
        slot_of: int32 `[L, E]`.
        owner: int32 `[S]`.
        rank: float64 `[L, E]`.
        low: float64 `[L]`.
        lowest: int32 `[L]`.
        per_layer: int32 `[L]`.
        share: int32 `[L]`.
        newer: int32 `[S + 1]`.
        older: int32 `[S + 1]`.
        pinned: uint8 `[L, E]`.
        fresh: uint8 `[L, E]`.
        resident: int32 `[1]`.
        last_use: float64 `[L, E]`.
        count: float64 `[L, E]`.
        recent: float64 `[L, E]`.
        steady: float64 `[L, E]`.
        clock: int64 `[2]`, steps learned from, twice: a kernel reads one and writes the other.
        waits: float64 `[2, L]`, `Usage.waits`, and the worth of a use so far away.
        used: float64 `[L, E]`, this step's `Planes.used`.
        unused: float64 `[L, E]`, this step's `Planes.unused`.
        limit: float64 `[L, E]`, this step's `Planes.limit`.
        demand: float64 `[STEPS_KNOWN, L, E]`, as `Outlook.demand`.
        known: int32 `[1]`, how many of those steps are known; 0: no outlook.
        pending: int32 `[L * E, 3]`.
        waiting: int32 `[1]`, entries of `pending`.
        needed: uint8 `[L, E]`, the experts this step used so far.
        ledger: this step's loads.
        entry: int32 `[S]`, this step's load ahead into the slot, or -1.
        ahead: int32 `[L + 1, 2]`, entries of the ledger that were bound after layer l - 1: the first, and one past the last.
        order: int32 `[N]`, 0, 1, 2, ...: all entries of the ledger in order.
        tally: int64 `[14]`, totals since the last `take_tally`, and whether a layer took more phases than its bound.
        made: int64 `[4]`, when the last step ended: loads in `tally`, `clock`, loads ahead, and loads ahead that were
            needed. In page-locked host memory, which the host reads without waiting.
        log: int32 `[R, 5]`, log entries as `core.write_log` writes them; R = 0 keeps none.
        log_count: int32 `[1]`, log entries written.
        future: uint8 `[N, L, E]`, the recording that demand is read from.
        following: float32 `[N + 1, L, E]`, as `forecast.next_uses`, for Belady; else of no length.
    """

    strategy: Strategy
    source: int
    large: tuple[int, ...]
    slot_of: Tensor
    owner: Tensor
    rank: Tensor
    low: Tensor
    lowest: Tensor
    per_layer: Tensor
    share: Tensor
    newer: Tensor
    older: Tensor
    pinned: Tensor
    fresh: Tensor
    resident: Tensor
    last_use: Tensor
    count: Tensor
    recent: Tensor
    steady: Tensor
    clock: Tensor
    waits: Tensor
    used: Tensor
    unused: Tensor
    limit: Tensor
    demand: Tensor
    known: Tensor
    pending: Tensor
    waiting: Tensor
    needed: Tensor
    ledger: Ledger
    entry: Tensor
    ahead: Tensor
    order: Tensor
    tally: Tensor
    made: Tensor
    log: Tensor
    log_count: Tensor
    future: Tensor
    following: Tensor

    @classmethod
    def allocate(
        cls,
        strategy: Strategy,
        tables: Tables,
        device: torch.device,
        *,
        log: bool = False,
        future: np.ndarray | None = None,
        reached: Sequence[bool] | None = None,
        given: bool = False,
        layer_bytes: Sequence[int] = (),
    ) -> Self:
        """Allocate the state for tables of this size; `copy_from` fills it.

        Args:
            strategy: entry to decide by; `refusal` must be None.
            tables: of the host controller, for their sizes.
            device: where to allocate.
            log: keep a step's log entries, to be taken with `take_log` after every step.
            future: bool `[N, L, E]`, the run's routing, for a strategy that needs it.
            reached: for each layer, whether a step runs it (an encoder's are not run); None: all.
            given: whether the caller writes `demand` and `known` before every step, in place of the strategy's forecast.
            layer_bytes: `[L]`, what a load of each layer's record moves, if it is not always a slot's bytes.
        """
        (layers, experts), slots = tables.slot_of.shape, len(tables.owner)
        large = tuple(np.flatnonzero(tables.share == 0).tolist())
        setting = Setting(layers=layers, experts=experts, future=future, reached=reached, large=large)
        lines = torch.tensor(layer_bytes, dtype=torch.int64, device=device) // LINE
        each = lines.to(torch.int32).repeat_interleave(experts) if layer_bytes else None
        source, recorded = source_of(strategy, setting, given=given)
        following = next_uses(recorded) if strategy.policy is belady else np.zeros((0, layers, experts), np.float32)
        entries = _entries(strategy, layers, experts)
        logged = layers * (1 + 3 * experts) + 3 * entries
        shapes = _shapes(layers, experts, slots, logged if log else 0)
        zeros = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, *shape) in shapes.items()}
        return cls(
            strategy=strategy,
            source=source,
            large=large,
            ledger=Ledger.allocate(entries, device, each),
            order=torch.arange(entries, dtype=torch.int32, device=device),
            made=torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda"),
            future=torch.from_numpy(recorded.astype(np.uint8)).to(device),
            following=torch.from_numpy(following).to(device),
            **zeros,
        )

    @staticmethod
    def nbytes(layers: int, experts: int, slots: int) -> int:
        """Return the bytes `allocate` and the plan's copy take, with a log and without a recorded future, for the planner."""
        ledger = _LEDGER_FULL * 7 * 4 + 4 + (4 + 3 * _LEDGER_FULL) * 5 * 4
        planes = 8 * 8 + _SWEEP_BYTES + _LINE_BYTES + STEPS_KNOWN * 8 + 3 + 4 + 3 * 4 + ledger
        return layers * experts * planes + experts * _SCRATCH_BYTES + layers * 64 + slots * 16 + 256

    @property
    def layers(self) -> int:
        """L."""
        return self.slot_of.shape[0]

    @property
    def experts(self) -> int:
        """E."""
        return self.slot_of.shape[1]

    @property
    def slots(self) -> int:
        """S."""
        return len(self.owner)

    @torch.inference_mode()
    def copy_from(self, tables: Tables, usage: Usage) -> None:
        """Copy the host's tables and usage, between two steps; copies of records have to be finished."""
        for name in _TABLES:
            getattr(self, name).copy_(torch.from_numpy(getattr(tables, name)))
        for name in _USAGE:
            getattr(self, name).copy_(torch.from_numpy(getattr(usage, name)))
        self.resident.fill_(int(tables.cursor[RESIDENT]))
        self.waits.copy_(torch.from_numpy(np.stack([usage.waits[:, 0], DISCOUNT ** usage.waits[:, 0]])))
        self.clock.fill_(usage.step)
        self.made.copy_(torch.tensor([0, usage.step, 0, 0]))
        self.needed.zero_()
        self.entry.fill_(-1)

    @torch.inference_mode()
    def copy_to(self, tables: Tables, usage: Usage) -> None:
        """Write the host's tables and usage, between two steps."""
        for name in _TABLES:
            getattr(tables, name)[:] = getattr(self, name).cpu().numpy()
        for name in _USAGE:
            getattr(usage, name)[:] = getattr(self, name).cpu().numpy()
        tables.cursor[RESIDENT] = int(self.resident)
        tables.cursor[LOG] = tables.cursor[PENDING] = 0
        tables.lowest[:] = -1
        usage.step = int(self.clock[0])

    @torch.inference_mode()
    def drop(self) -> None:
        """Clear totals and log entries of a step that was broken off."""
        self.tally.zero_()
        self.log_count.zero_()
        self.ledger.renew()

    @torch.inference_mode()
    def take_log(self) -> list[list[int]]:
        """Return the log entries written since the last call."""
        entries: list[list[int]] = self.log[: int(self.log_count)].tolist()
        self.log_count.zero_()
        return entries

    def read_tally(self) -> list[int]:
        """The totals since the last `take_tally`, between two steps; nothing is changed, and nothing allocated there."""
        totals: list[int] = self.tally.tolist()
        totals[BLOCKS] += self.ledger.moved()
        return totals

    @torch.inference_mode()
    def take_tally(self) -> list[int]:
        """Return the totals since the last call, between two steps; see `HITS`."""
        totals = self.read_tally()
        self.ledger.table[DONE] = 0
        self.tally.zero_()
        assert not totals[BROKEN], "a layer took more phases than `phase_bound` allows, or found no slot for a load"
        return totals


def counters_of(tally: Sequence[int], steps: int, bytes_moved: int) -> CacheCounters:
    """The totals that a tally holds, after `steps` steps that moved so many bytes."""
    return CacheCounters(
        steps=steps,
        late_steps=tally[LATE],
        hits=tally[HITS],
        loads=tally[LOADS],
        prefetched=tally[AHEAD],
        prefetch_hits=tally[FRESH],
        wasted=tally[WASTES],
        evictions=tally[EVICTIONS],
        bytes_moved=bytes_moved,
        forecast=tally[FORECAST],
        foreseen=tally[FORESEEN],
    )


_SWEEP_BYTES = 2 * 8 + 4
"""Of an expert in the plan's copy of the tables: a rank before and after its layer, and a slot."""
_LINE_BYTES = 5 * 4
"""Of an expert in the orders of ranks: `access.LINES`."""
_SCRATCH_BYTES = 7 * 4 + 8
"""Of an expert of a layer, which a layer's program keeps between its waves: `access.SCRATCH` and a rank."""
_LEDGER_FULL = 4
"""Loads of a step over experts, at most: loads that layers need, and loads ahead for this step and the next one."""


def _shapes(layers: int, experts: int, slots: int, logged: int) -> dict[str, tuple[torch.dtype, *tuple[int, ...]]]:
    """Return type and shape of every tensor of a `CacheState` that starts as zeros."""
    f64, i64, i32, u8 = torch.float64, torch.int64, torch.int32, torch.uint8
    plane = (layers, experts)
    usage = dict.fromkeys(_USAGE, (f64, *plane))
    ranks = dict.fromkeys(("rank", "used", "unused", "limit"), (f64, *plane))
    marks = dict.fromkeys(("pinned", "fresh", "needed"), (u8, *plane))
    return {
        **usage, **ranks, **marks,
        "slot_of": (i32, *plane), "owner": (i32, slots), "entry": (i32, slots),
        "low": (f64, layers), "lowest": (i32, layers), "per_layer": (i32, layers), "share": (i32, layers),
        "newer": (i32, slots + 1), "older": (i32, slots + 1), "resident": (i32, 1),
        "clock": (i64, 2), "waits": (f64, 2, layers), "demand": (f64, STEPS_KNOWN, *plane), "known": (i32, 1),
        "pending": (i32, layers * experts, 3), "waiting": (i32, 1), "ahead": (i32, layers + 1, 2),
        "tally": (i64, 14), "log": (i32, logged, 5), "log_count": (i32, 1),
    }  # fmt: skip


def _entries(strategy: Strategy, layers: int, experts: int) -> int:
    return layers * experts * (_LEDGER_FULL if strategy.prefetch != "none" else 1)


_TABLES = ("slot_of", "owner", "rank", "per_layer", "share", "newer", "older", "pinned", "fresh")
_USAGE = ("last_use", "count", "recent", "steady")
