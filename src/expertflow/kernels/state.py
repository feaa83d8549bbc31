"""What the cache remembers, as tensors on the device: the mirror of `core.Tables` and `policy.Usage`.

The host controller and the device twin take turns: `CacheState.load` takes over what the controller knows, `store` gives
it back, so that nothing resident is lost at a switch. Knows the layout and the bound on phases; decides nothing.

A layer runs in *phases*: within one, no slot is used twice, so its rows are fetched together and its experts computed
together. Their number in a graph is fixed, `phase_bound`; the twin fills as many as it needs.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from expertflow.cache.core import LOG, PENDING, RESIDENT, Tables
from expertflow.cache.forecast import next_uses
from expertflow.cache.policy import Policy, Usage, belady, lfu, lru, next_use
from expertflow.cache.strategy import Strategy

POLICIES: dict[Policy, int] = {lru: 0, lfu: 1, next_use: 2, belady: 3}
"""Policies with a device twin, by the number the kernels know them by."""
HITS, LOADS, EVICTIONS, PHASES, BROKEN = 0, 1, 2, 3, 4
"""Places in `CacheState.tally`."""


def refusal(strategy: Strategy) -> str | None:
    """Why a strategy has no device twin; None if it has one."""
    if strategy.prefetch != "none":
        return f"strategy {strategy.name!r} loads ahead, which only the host execution does"
    if strategy.policy not in POLICIES:
        return f"strategy {strategy.name!r} ranks by a policy without a device twin"
    return None


def phase_bound(strategy: Strategy, layers: int, slots: int, needed: int) -> int:
    """The most phases a layer can take that needs `needed` experts.

    A phase ends when a wave of loads is over, and once more if hits and loads together fill the layer's share of the
    slots before the first wave is over.
    """
    rules = strategy.rules(layers, slots)
    share = slots // layers if strategy.partition == "layer" and slots >= layers else slots
    if rules.joint and needed <= min(rules.wave, share):
        return 1
    return 1 + -(-needed // rules.wave)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What the twin decides for one layer, in the shape the kernels read; layers share one.

    Attributes:
        slots: int32 `[P, T, K]`, the slot of each (token, rank) pair in the phase that computes it, else -1.
        src: int32 `[N]`, rows to fetch, in order.
        dst: int32 `[N]`, their slots.
        bounds: int32 `[P + 1]`, phase p fetches entries `bounds[p] .. bounds[p + 1] - 1`.
        live: int32 `[1]`, how many of the T tokens count; those behind are padding and need no expert.
    """

    slots: Tensor
    src: Tensor
    dst: Tensor
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
            slots=numbers(phases, tokens, top_k, value=-1),
            src=numbers(needed),
            dst=numbers(needed),
            bounds=numbers(phases + 1),
            live=numbers(1, value=tokens),
        )

    @property
    def phases(self) -> int:
        """P, the bound on phases."""
        return len(self.slots)


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """Tables, usage and this step's ranks; what has a namesake in `core.Tables` or `policy.Usage` is that.

    Attributes:
        strategy: the row that decides, as `Strategy.on_device` makes it or any other without prefetch.
        slot_of: int32 `[L, E]`.
        owner: int32 `[S]`.
        rank: float64 `[L, E]`.
        low: float64 `[L]`.
        lowest: int32 `[L]`.
        held: int32 `[L]`.
        share: int32 `[L]`.
        newer: int32 `[S + 1]`.
        older: int32 `[S + 1]`.
        resident: int32 `[1]`.
        last_use: float64 `[L, E]`.
        count: float64 `[L, E]`.
        recent: float64 `[L, E]`.
        steady: float64 `[L, E]`.
        clock: int64 `[2]`, steps learned from, twice: a kernel reads one and writes the other.
        used: float64 `[L, E]`, this step's `Planes.used`.
        unused: float64 `[L, E]`, this step's `Planes.unused`.
        needed: uint8 `[L, E]`, what this step used so far.
        tally: int64 `[5]`, totals since the last `take_tally`, and whether a layer took more phases than its bound.
        log: int32 `[R, 5]`, log rows as `core.tell` writes them; R = 0 keeps none.
        told: int32 `[1]`, log rows written.
        future: uint8 `[N, L, E]`, the coming steps' routing for the oracle; N = 0 without one.
        following: float32 `[N + 1, L, E]`, as `forecast.next_uses`.
    """

    strategy: Strategy
    slot_of: Tensor
    owner: Tensor
    rank: Tensor
    low: Tensor
    lowest: Tensor
    held: Tensor
    share: Tensor
    newer: Tensor
    older: Tensor
    resident: Tensor
    last_use: Tensor
    count: Tensor
    recent: Tensor
    steady: Tensor
    clock: Tensor
    used: Tensor
    unused: Tensor
    needed: Tensor
    tally: Tensor
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
    ) -> Self:
        """Room for what `tables` holds; nothing is taken over yet.

        Args:
            strategy: row to decide by; `refusal` must be None.
            tables: of the host controller, for their sizes.
            device: where to.
            log: keep a step's log rows, to be taken with `take_log` after every step.
            future: bool `[N, L, E]`, the run's routing, for a policy that knows it.
        """
        assert refusal(strategy) is None
        (layers, experts), slots = tables.slot_of.shape, len(tables.owner)

        def room(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def plane() -> Tensor:
            return room(torch.float64, layers, experts)

        recorded = np.zeros((0, layers, experts), dtype=np.bool_) if future is None else future
        return cls(
            strategy=strategy,
            slot_of=room(torch.int32, layers, experts),
            owner=room(torch.int32, slots),
            rank=plane(),
            low=room(torch.float64, layers),
            lowest=room(torch.int32, layers),
            held=room(torch.int32, layers),
            share=room(torch.int32, layers),
            newer=room(torch.int32, slots + 1),
            older=room(torch.int32, slots + 1),
            resident=room(torch.int32, 1),
            last_use=plane(),
            count=plane(),
            recent=plane(),
            steady=plane(),
            clock=room(torch.int64, 2),
            used=plane(),
            unused=plane(),
            needed=room(torch.uint8, layers, experts),
            tally=room(torch.int64, 5),
            log=room(torch.int32, layers * (1 + 3 * experts) if log else 0, 5),
            told=room(torch.int32, 1),
            future=torch.from_numpy(recorded.astype(np.uint8)).to(device),
            following=torch.from_numpy(next_uses(recorded)).to(device),
        )

    @staticmethod
    def nbytes(layers: int, experts: int, slots: int) -> int:
        """Bytes `allocate` takes, without log and recorded future: what a planner counts."""
        return layers * experts * (7 * 8 + 4 + 1 + 4) + layers * 24 + slots * 12 + 8 + 2 * 8 + 5 * 8 + 8

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
        """Take over from the host, between two steps. Without prefetch: nothing may be pinned, fresh or pending."""
        assert not tables.fresh.any()
        assert not tables.cursor[PENDING]
        for name in _TABLES:
            getattr(self, name).copy_(torch.from_numpy(getattr(tables, name)))
        for name in _USAGE:
            getattr(self, name).copy_(torch.from_numpy(getattr(usage, name)))
        self.resident.fill_(int(tables.cursor[RESIDENT]))
        self.clock.fill_(usage.step)
        self.needed.zero_()

    @torch.inference_mode()
    def store(self, tables: Tables, usage: Usage) -> None:
        """Give back to the host, between two steps."""
        for name in _TABLES:
            getattr(tables, name)[:] = getattr(self, name).cpu().numpy()
        for name in _USAGE:
            getattr(usage, name)[:] = getattr(self, name).cpu().numpy()
        tables.cursor[RESIDENT] = int(self.resident)
        tables.cursor[LOG] = 0
        tables.lowest[:] = -1
        usage.step = int(self.clock[0])

    @torch.inference_mode()
    def take_log(self) -> list[list[int]]:
        """The log rows written since the last call."""
        rows: list[list[int]] = self.log[: int(self.told)].tolist()
        self.told.zero_()
        return rows

    @torch.inference_mode()
    def take_tally(self) -> list[int]:
        """The totals since the last call: hits, loads, evictions, phases beyond a layer's first."""
        totals: list[int] = self.tally.tolist()
        self.tally.zero_()
        assert not totals[BROKEN], "a layer took more phases than `phase_bound` allows"
        return totals


_TABLES = ("slot_of", "owner", "rank", "held", "share", "newer", "older")
_USAGE = ("last_use", "count", "recent", "steady")
