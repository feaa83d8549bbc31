"""The device twin of the cache's decisions, driven: ranks, plan, and layer by layer the slots, as Triton kernels.

The router's choice never leaves the device. Every call only launches: `kernels.residency.ranks` says who is worth keeping,
`kernels.residency.lookahead` what is loaded ahead, `kernels.residency.access` where a layer's experts are.

Twin of `kernels.residency.reference`, which calls `cache.core` itself. Knows slots; refuses to know rows and weights.
"""

import triton
from torch import Tensor

from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.kernels.residency import access, lookahead, ranks
from expertflow.kernels.residency.state import POLICIES, CacheState, Notes, Schedule

_PLAN_CELLS = 256
"""Experts of all layers a warp of the plan handles."""


class Residency:
    """Drives the kernels over one state; every call only launches.

    Args:
        state: tables and ranks.
        notes: where the step's routing is noted for a predictor; None: nowhere.
    """

    def __init__(self, state: CacheState, notes: Notes | None = None) -> None:
        """Make room for what a layer's program passes from its experts to its pairs."""
        self.state, self._notes = state, notes
        self._turn_slot = state.slot_of.new_zeros(state.experts)
        self._turn_table = state.slot_of.new_zeros(state.experts)
        self._rules = state.strategy.rules(state.layers, state.slots)
        self._options = {
            "EP": triton.next_power_of_2(state.experts),
            "num_warps": 1,  # one thread writes what all have read: with one warp nobody lags
            "enable_fp_fusion": False,
        }

    def expect(self, said: Tensor, members: Tensor, turns: Tensor) -> None:
        """The demand of this step and further ones, from chances of single sequences.

        Args:
            said: float32 `[C, 5, L, E]`, what `predict.online` said of each sequence's coming step.
            members: int64, which of the C step, in the order of their turns.
            turns: int64, how many groups there are (at most `STEPS_KNOWN`; 0: no forecast), then where in `members` each
                begins, this step's first, then where the last one ends.
        """
        s = self.state
        s.known.fill_(STEPS_KNOWN)
        ranks.expect[(s.layers,)](
            said, members, turns, s.demand, s.known, s.tally, s.layers, s.experts, **self._options
        )

    def open_step(self, *, ahead: bool = True) -> None:
        """`prefetch.open_step`: this step's ranks, and its plan.

        Args:
            ahead: whether there may be loads ahead; if not, nothing may be `known`, and `bind` is not called.
        """
        s = self.state
        ranks.open_step[(s.layers,)](
            s.slot_of, s.last_use, s.count, s.recent, s.steady, s.waits, s.used, s.unused, s.limit, s.demand, s.known,
            s.pinned, s.fresh, s.rank, s.low, s.lowest, s.clock, s.future, s.following, s.ledger.table, s.ledger.count, s.entry,
            s.ahead, s.waiting, s.tally, s.layers, s.experts, len(s.future), s.ledger.entries, s.slots,
            POLICY=POLICIES[s.strategy.policy], SOURCE=s.source, PREFETCH=self._rules.prefetch, **self._options,
        )  # fmt: skip
        if self._rules.prefetch and ahead:
            self._look_ahead(-1, plan=True)

    def run_layer(self, layer: int, ids: Tensor, schedule: Schedule) -> None:
        """`core.access`: fill `schedule` for the layer.

        Args:
            layer: MoE layer.
            ids: integer `[T, K]` contiguous, the router's choice; outside `0 .. E - 1` means none.
            schedule: overwritten; says how many of the T tokens are live.
        """
        s, phases, notes = self.state, schedule.phases, self._notes
        access.run_layer[(1,)](
            ids, schedule.live, schedule.slots, schedule.todo, schedule.bounds,
            ids if notes is None else notes.seats, ids if notes is None else notes.routes,
            s.slot_of, s.owner, s.rank, s.used, s.unused, s.low, s.lowest, s.held, s.share, s.newer, s.older,
            s.pinned, s.fresh, s.resident, s.needed, s.ledger.table, s.ledger.count, s.entry,
            self._turn_slot, self._turn_table, s.tally, s.log, s.told,
            layer, ids.numel(), ids.shape[1], s.layers, s.experts, s.slots, self._rules.wave, s.ledger.entries,
            NP=triton.next_power_of_2(max(ids.numel(), phases)), LP=triton.next_power_of_2(s.layers), PHASES=phases,
            JOINT=self._rules.joint, RETAIN=self._rules.retain, PREFETCH=self._rules.prefetch, NOTE=notes is not None,
            LOG=len(s.log) > 0, **self._options,
        )  # fmt: skip

    def bind(self, layer: int) -> None:
        """`prefetch.pass_layer`: plan anew if the strategy does, and bind the loads the layer lets go."""
        if self._rules.prefetch:
            self._look_ahead(layer, plan=self._rules.rolling)

    def _look_ahead(self, now: int, *, plan: bool) -> None:
        s, rules = self.state, self._rules
        last = now + 1 + rules.ahead if rules.rolling else s.layers
        last = min(last, now + s.layers) if rules.wraps else min(last, s.layers)
        cells = triton.next_power_of_2(s.layers * s.experts)
        lookahead.look_ahead[(1,)](
            s.slot_of, s.owner, s.rank, s.low, s.lowest, s.held, s.newer, s.older, s.pinned, s.fresh, s.resident,
            s.demand, s.known, s.limit, s.used, s.unused, s.pending, s.waiting, s.ledger.table, s.ledger.count,
            s.entry, s.ahead, s.tally, s.log, s.told,
            now, last, s.layers, s.experts, s.slots, s.slots - rules.reserve, rules.ahead, s.ledger.entries,
            THRESHOLD=rules.threshold, PLAN=plan, ROLLING=rules.rolling, CELLS=cells,
            PLACES=triton.next_power_of_2(2 * s.layers), EP=self._options["EP"], LOG=len(s.log) > 0,
            num_warps=max(1, min(8, cells // _PLAN_CELLS)), enable_fp_fusion=False,
        )  # fmt: skip

    def close_step(self) -> None:
        """`Brain.end`: learn from the step."""
        s = self.state
        ranks.close_step[(s.layers,)](
            s.needed,
            s.last_use,
            s.count,
            s.recent,
            s.steady,
            s.clock,
            s.tally,
            s.made,
            s.layers,
            s.experts,
            **self._options,
        )
