"""What the cache remembers, as tensors on the device: the mirror of `core.Tables` and `policy.Usage`.

The host controller and the device twin take turns: `CacheState.load` takes over what the controller knows, `store` gives
it back, so that nothing resident is lost at a switch. Knows the layout and the bound on phases; decides nothing.

A layer runs in *phases*: within one, no slot is used twice, so its rows are fetched together and its experts computed
together. Their number in a graph is fixed, `phase_bound`; the twin fills as many as it needs. What is resident already
is computed before, and beside, the first phase's fetch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from expertflow.cache.core import LOG, PENDING, RESIDENT, Tables
from expertflow.cache.forecast import LayerOrder, Recorded, Step, next_uses
from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.cache.policy import DISCOUNT, Policy, Usage, belady, discounted_use, layer_order, lfu, lru, next_use
from expertflow.cache.strategy import Setting, Strategy
from expertflow.kernels.ledger import DONE, Ledger

POLICIES: dict[Policy, int] = {lru: 0, lfu: 1, next_use: 2, belady: 3, discounted_use: 4, layer_order: 5}
"""Policies with a device twin, by the number the kernels know them by."""
HITS, LOADS, EVICTIONS, PHASES, BROKEN, AHEAD, FRESH, WASTES, BLIND, BLOCKS = range(10)
"""Places in `CacheState.tally`; FRESH are hits that a load ahead brought, BLIND steps whose forecast was no number, BLOCKS
what was carried of all loads (a load that was called off is not carried whole)."""
UNKNOWN, RECORDED, CONSTANT, GIVEN = range(4)
"""Where a step's demand comes from: nowhere, a recording, one that says the same at every step, or whoever writes it
into `CacheState.demand`."""


def refusal(strategy: Strategy, *, given: bool = False) -> str | None:
    """Why a strategy has no device twin; None if it has one.

    Args:
        strategy: row of the strategy table.
        given: whether a trained predictor or the caller's own forecast takes the place of the strategy's.
    """
    if strategy.policy not in POLICIES:
        return f"strategy {strategy.name!r} ranks by a policy without a device twin"
    if given and strategy.policy is belady:
        return f"strategy {strategy.name!r} goes by every later use, and a step on the device is told of {STEPS_KNOWN}"
    if strategy.predicted and not given:
        return f"strategy {strategy.name!r} has no predictor here, and its counts by token are kept on the host"
    return None


def source_of(strategy: Strategy, setting: Setting, *, given: bool = False) -> tuple[int, np.ndarray]:
    """Where the demand of a strategy comes from, and what its forecast will say: bool `[N, L, E]`, N = 0 if unknown."""
    nothing = np.zeros((0, setting.layers, setting.experts), dtype=np.bool_)
    if strategy.predicted or given:
        return GIVEN, nothing
    forecast = strategy.make_forecast(setting)
    if isinstance(forecast, LayerOrder):
        said = np.ones((1, setting.layers, setting.experts), dtype=np.bool_)
        if setting.reached is not None:
            said[:, ~np.asarray(setting.reached)] = False
        return CONSTANT, said
    if setting.future is None or not strategy.needs_future:
        return UNKNOWN, nothing
    if isinstance(forecast, Recorded):
        return RECORDED, setting.future
    each = [forecast.outlook(Step(number)) for number in range(len(setting.future))]
    return RECORDED, np.stack([o.demand[0] > 0 for o in each if o is not None])


def phase_bound(strategy: Strategy, layers: int, slots: int, needed: int) -> int:
    """The most phases a layer can take that needs `needed` experts.

    A phase ends when a wave of loads is over, and once more if hits and loads together fill the layer's share of the
    slots, or what the plan leaves of them, before the first wave is over.
    """
    rules = strategy.rules(layers, slots)
    if rules.joint and needed <= rules.wave:
        return 1
    return 1 + -(-needed // rules.wave)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the twin decides for one layer, in the shape the kernels read; layers share one.

    Attributes:
        slots: int32 `[1 + P, T, K]`, the slot of each (token, rank) pair in the phase that computes it, else -1. The
            first table has the pairs that need not wait, table 1 + p those behind the fetch of phase p.
        todo: int32 `[N]`, entries of the ledger to be carried, in order.
        bounds: int32 `[P + 1]`, phase p waits for `todo[bounds[p] .. bounds[p + 1] - 1]`.
        live: int32 `[1]`, how many of the T tokens count; those behind are padding and need no expert.
    """

    slots: Tensor
    todo: Tensor
    bounds: Tensor
    live: Tensor

    @classmethod
    def allocate(cls, state: "CacheState", tokens: int, top_k: int) -> Self:
        """For steps of `tokens` tokens of `top_k` experts a layer; all of them live."""
        needed = min(tokens * top_k, state.experts)
        phases = phase_bound(state.strategy, state.layers, state.slots, needed)

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
class Notes:
    """What the predictor wants to know of a step: written while the step runs.

    Attributes:
        routes: int32 `[C, L, K]`, each sequence's experts in its last step; E none.
        seats: int64 `[T]`, which of the C a row of the batch is.
    """

    routes: Tensor
    seats: Tensor


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """Tables, usage and this step's ranks; what has a namesake in `core.Tables` or `policy.Usage` is that.

    Attributes:
        strategy: the row that decides, as `Strategy.on_device` makes it or any other that `refusal` lets pass.
        source: where the demand comes from: `UNKNOWN`, `RECORDED`, `CONSTANT` or `GIVEN`.
        slot_of: int32 `[L, E]`.
        owner: int32 `[S]`.
        rank: float64 `[L, E]`.
        low: float64 `[L]`.
        lowest: int32 `[L]`.
        held: int32 `[L]`.
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
        waits: float64 `[2, L]`, `Usage.waits`, and what a use so far away is worth.
        used: float64 `[L, E]`, this step's `Planes.used`.
        unused: float64 `[L, E]`, this step's `Planes.unused`.
        limit: float64 `[L, E]`, this step's `Planes.limit`.
        demand: float64 `[STEPS_KNOWN, L, E]`, as `Outlook.demand`.
        known: int32 `[1]`, how many of those steps are known; 0: no outlook.
        pending: int32 `[L * E, 3]`.
        waiting: int32 `[1]`, entries of `pending`.
        needed: uint8 `[L, E]`, what this step used so far.
        ledger: this step's loads.
        entry: int32 `[S]`, this step's load ahead into the slot, or -1.
        ahead: int32 `[L + 1, 2]`, entries of the ledger that were bound behind layer l - 1: the first, and one past the last.
        order: int32 `[N]`, 0, 1, 2, ...: the ledger as a list of its own.
        tally: int64 `[10]`, totals since the last `take_tally`, and whether a layer took more phases than its bound.
        made: int64 `[4]`, the loads in `tally` when the last step ended, `clock` then, and of the loads those ahead and, of these, those
            that met a need; in host memory, to be read there
            without waiting.
        log: int32 `[R, 5]`, log rows as `core.tell` writes them; R = 0 keeps none.
        told: int32 `[1]`, log rows written.
        future: uint8 `[N, L, E]`, the recording that demand is read from.
        following: float32 `[N + 1, L, E]`, as `forecast.next_uses`, for Belady; else of no length.
    """

    strategy: Strategy
    source: int
    slot_of: Tensor
    owner: Tensor
    rank: Tensor
    low: Tensor
    lowest: Tensor
    held: Tensor
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
    told: Tensor
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
    ) -> Self:
        """Room for what `tables` holds; nothing is taken over yet.

        Args:
            strategy: row to decide by; `refusal` must be None.
            tables: of the host controller, for their sizes.
            device: where to.
            log: keep a step's log rows, to be taken with `take_log` after every step.
            future: bool `[N, L, E]`, the run's routing, for a strategy that knows it.
            reached: the layers that a step runs, an encoder's are not among them; None: all.
            given: `demand` and `known` are written before every step, whatever the strategy's own forecast is.
        """
        (layers, experts), slots = tables.slot_of.shape, len(tables.owner)

        def room(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def plane() -> Tensor:
            return room(torch.float64, layers, experts)

        setting = Setting(layers=layers, experts=experts, future=future, reached=reached)
        source, recorded = source_of(strategy, setting, given=given)
        following = next_uses(recorded) if strategy.policy is belady else np.zeros((0, layers, experts), np.float32)
        entries = _entries(strategy, layers, experts)
        rows = layers * (1 + 3 * experts) + 3 * entries
        return cls(
            strategy=strategy,
            source=source,
            slot_of=room(torch.int32, layers, experts),
            owner=room(torch.int32, slots),
            rank=plane(),
            low=room(torch.float64, layers),
            lowest=room(torch.int32, layers),
            held=room(torch.int32, layers),
            share=room(torch.int32, layers),
            newer=room(torch.int32, slots + 1),
            older=room(torch.int32, slots + 1),
            pinned=room(torch.uint8, layers, experts),
            fresh=room(torch.uint8, layers, experts),
            resident=room(torch.int32, 1),
            last_use=plane(),
            count=plane(),
            recent=plane(),
            steady=plane(),
            clock=room(torch.int64, 2),
            waits=room(torch.float64, 2, layers),
            used=plane(),
            unused=plane(),
            limit=plane(),
            demand=room(torch.float64, STEPS_KNOWN, layers, experts),
            known=room(torch.int32, 1),
            pending=room(torch.int32, layers * experts, 3),
            waiting=room(torch.int32, 1),
            needed=room(torch.uint8, layers, experts),
            ledger=Ledger.allocate(entries, device),
            entry=room(torch.int32, slots),
            ahead=room(torch.int32, layers + 1, 2),
            order=torch.arange(entries, dtype=torch.int32, device=device),
            tally=room(torch.int64, 10),
            made=torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda"),
            log=room(torch.int32, rows if log else 0, 5),
            told=room(torch.int32, 1),
            future=torch.from_numpy(recorded.astype(np.uint8)).to(device),
            following=torch.from_numpy(following).to(device),
        )

    @staticmethod
    def nbytes(layers: int, experts: int, slots: int) -> int:
        """Bytes `allocate` takes, with a log and without a recorded future: what a planner counts."""
        planes = 8 * 8 + STEPS_KNOWN * 8 + 3 + 4 + 3 * 4 + _LEDGER_FULL * 7 * 4 + (4 + 3 * _LEDGER_FULL) * 5 * 4
        return layers * experts * planes + layers * 32 + slots * 16 + 256

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
    def load(self, tables: Tables, usage: Usage) -> None:
        """Take over from the host, between two steps; copies under way have to be there."""
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
    def store(self, tables: Tables, usage: Usage) -> None:
        """Give back to the host, between two steps."""
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
        """Forget totals and log rows of a step that was broken off."""
        self.tally.zero_()
        self.told.zero_()
        self.ledger.renew()

    @torch.inference_mode()
    def take_log(self) -> list[list[int]]:
        """The log rows written since the last call."""
        rows: list[list[int]] = self.log[: int(self.told)].tolist()
        self.told.zero_()
        return rows

    def read_tally(self) -> list[int]:
        """The totals since the last `take_tally`, between two steps; nothing is changed, and nothing allocated there."""
        totals: list[int] = self.tally.tolist()
        totals[BLOCKS] += int(self.ledger.table[DONE].cpu().numpy().sum(dtype=np.int64))
        return totals

    @torch.inference_mode()
    def take_tally(self) -> list[int]:
        """The totals since the last call, between two steps; see `HITS`."""
        totals = self.read_tally()
        self.ledger.table[DONE] = 0
        self.tally.zero_()
        assert not totals[BROKEN], "a layer took more phases than `phase_bound` allows, or found no slot for a load"
        return totals


_LEDGER_FULL = 4
"""Loads of a step over experts, at most: what layers need, and what is loaded ahead for this step and the next one."""


def _entries(strategy: Strategy, layers: int, experts: int) -> int:
    return layers * experts * (_LEDGER_FULL if strategy.prefetch != "none" else 1)


_TABLES = ("slot_of", "owner", "rank", "held", "share", "newer", "older", "pinned", "fresh")
_USAGE = ("last_use", "count", "recent", "steady")
