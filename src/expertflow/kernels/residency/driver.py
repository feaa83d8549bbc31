"""Launch the cache's decisions on the device: ranks, plan, and layer by layer the slots, as Triton kernels.

The router's choice never leaves the device. Every call only launches: `kernels.residency.ranks` ranks the experts,
`kernels.residency.lookahead` plans loads ahead, `kernels.residency.access` finds the slots of a layer's experts.

Twin of `kernels.residency.reference`, which calls `cache.core` itself. Must not know records and weights.
"""

import torch
import triton
from torch import Tensor

from expertflow.cache.horizon import STEPS_KNOWN
from expertflow.kernels.residency import access, lookahead, ranks
from expertflow.kernels.residency.state import POLICIES, CacheState, RoutingOutput, Schedule

_LAYER_CELLS, _MOST_WARPS = 64, 8
"""Experts that a warp handles where a program has a layer, and such a program's warps at most."""
_ACCESS_CELLS, _MOST_ACCESS_WARPS = 128, 4
"""The same for the program that decides a layer."""
_LINE_CELLS = 32
"""Experts of a program that lines up ranks, and those it compares at a time."""


class Residency:
    """Drives the kernels over one state; every call only launches.

    Args:
        state: tables and ranks.
        routing: buffer for the step's routing, which a predictor reads; None: no predictor.
    """

    def __init__(self, state: CacheState, routing: RoutingOutput | None = None) -> None:
        """Allocate orders of ranks, what a layer's program keeps between its waves, and the plan's copy of the tables."""
        self.state, self._routing = state, routing
        self._lines = state.slot_of.new_zeros(len(access.LINES), state.layers, state.experts)
        self._scratch = state.slot_of.new_zeros(access.SCRATCH, state.experts)
        self._nudged = state.rank.new_zeros(state.experts)
        self._rules = state.strategy.rules(state.layers, state.slots, len(state.large))
        planned = (state.layers, state.experts) if self._rules.prefetch else (0, 0)
        self._counts = state.slot_of.new_zeros(len(lookahead.COUNTS), planned[0])
        self._sweep_low = state.clock.new_zeros(planned[0])
        self._sweep_rank = state.clock.new_zeros(2, *planned)
        self._sweep_slot = torch.zeros_like(state.slot_of[: planned[0]])
        self._options = {
            "EP": triton.next_power_of_2(state.experts),
            "num_warps": 1,  # one thread writes what all have read: threads of one warp do not lag
            "enable_fp_fusion": False,
        }
        warps = max(1, min(_MOST_ACCESS_WARPS, state.experts // _ACCESS_CELLS))
        self._access_options = {**self._options, "num_warps": warps}  # barriers part its writes from later reads
        warps = max(1, min(_MOST_WARPS, state.experts // _LAYER_CELLS))
        self._layer_options = {**self._options, "num_warps": warps}  # of programs that handle a layer each

    def expect(self, probabilities: Tensor, members: Tensor, group_bounds: Tensor) -> None:
        """Compute the demand of this step and further ones from chances of single sequences.

        Args:
            probabilities: float32 `[C, 5, L, E]`, the output of `predict.online` for each sequence's coming step.
            members: int64, which of the C sequences step, group after group in the order in which groups step.
            group_bounds: int64, the number of groups (at most `STEPS_KNOWN`; 0: no forecast), then where in `members`
                each begins, this step's first, then where the last one ends.
        """
        s = self.state
        s.known.fill_(STEPS_KNOWN)
        ranks.expect[(s.layers,)](
            probabilities, members, group_bounds, s.demand, s.known, s.tally, s.layers, s.experts, **self._layer_options
        )

    def open_step(self, *, ahead: bool = True) -> None:
        """Run `prefetch.open_step`: this step's ranks, and its plan.

        Args:
            ahead: whether loads ahead are planned; if not, `known` has to be 0, and `bind` is not called.
        """
        s = self.state
        ranks.open_step[(s.layers,)](
            s.slot_of, s.last_use, s.count, s.recent, s.steady, s.waits, s.used, s.unused, s.limit, s.demand, s.known,
            s.pinned, s.fresh, s.rank, s.low, s.lowest, s.clock, s.future, s.following, s.ledger.table, s.ledger.count, s.entry,
            s.ahead, s.waiting, s.tally, s.share, s.share if s.ledger.lines is None else s.ledger.lines,
            s.layers, s.experts, len(s.future), s.ledger.entries, s.slots,
            POLICY=POLICIES[s.strategy.policy], SOURCE=s.source, PREFETCH=self._rules.prefetch, LARGE=bool(s.large),
            UNEQUAL=s.ledger.lines is not None, **self._layer_options,
        )  # fmt: skip
        block = min(self._options["EP"], _LINE_CELLS)
        ranks.line_up[(s.layers, triton.cdiv(s.experts, block))](
            s.rank, s.used, s.unused, self._lines, s.layers, s.experts, EP=self._options["EP"], BLOCK=block, num_warps=4
        )
        if self._rules.prefetch and ahead:
            self._look_ahead(-1, plan=True)

    def run_layer(self, layer: int, ids: Tensor, schedule: Schedule) -> None:
        """Run `core.access`: fill `schedule` for the layer.

        Args:
            layer: MoE layer.
            ids: integer `[T, K]` contiguous, the router's choice; outside `0 .. E - 1` means none.
            schedule: overwritten, except `live`, which holds how many of the T tokens count.
        """
        s, phases, routing = self.state, schedule.phases, self._routing
        access.run_layer[(1,)](
            ids, schedule.live, schedule.slots, schedule.todo, schedule.bounds,
            ids if routing is None else routing.state_rows, ids if routing is None else routing.routes,
            s.slot_of, s.owner, s.rank, s.used, s.unused, s.low, s.lowest, s.per_layer, s.share, s.newer, s.older,
            s.pinned, s.fresh, s.resident, s.needed, s.ledger.table, s.ledger.count, s.entry,
            self._lines, self._scratch, self._nudged, s.tally, s.log, s.log_count,
            layer, layer * s.experts, ids.numel(), s.layers, s.slots, self._rules.wave, s.ledger.entries,
            experts=s.experts, top_k=ids.shape[1], NP=triton.next_power_of_2(max(ids.numel(), phases)), LP=triton.next_power_of_2(s.layers), PHASES=phases,
            JOINT=self._rules.joint, RETAIN=self._rules.retain, PREFETCH=self._rules.prefetch, ROUTES=routing is not None,
            LOG=len(s.log) > 0, **self._access_options,
        )  # fmt: skip

    def bind(self, layer: int) -> None:
        """Run `prefetch.pass_layer`: plan anew if the strategy does, and bind the loads that waited for the layer."""
        if self._rules.prefetch:
            self._look_ahead(layer, plan=self._rules.rolling)

    def _look_ahead(self, now: int, *, plan: bool) -> None:
        s, rules = self.state, self._rules
        last = now + 1 + rules.ahead if rules.rolling else s.layers
        last = min(last, now + s.layers) if rules.wraps else min(last, s.layers)
        room, most = s.slots - rules.reserve, triton.next_power_of_2(s.layers)
        copy = self._counts, self._sweep_low, self._sweep_rank, self._sweep_slot
        if plan:
            sizes, options = (s.layers, s.experts), {"THRESHOLD": rules.threshold, **self._layer_options}
            lookahead.count_pins[(s.layers,)](s.demand, s.known, s.slot_of, s.pinned, self._counts, *sizes, **options)
            lookahead.pin_residents[(s.layers,)](
                s.demand, s.known, s.slot_of, s.pinned, s.rank, s.low, s.lowest, s.used, s.unused, *copy,
                now, *sizes, room, LP=most, **options,
            )  # fmt: skip
        lookahead.look_ahead[(1,)](
            s.slot_of, s.owner, s.rank, s.low, s.lowest, s.per_layer, s.newer, s.older, s.pinned, s.fresh, s.resident,
            s.demand, s.limit, s.used, s.pending, s.waiting, *copy, s.ledger.table, s.ledger.count, s.entry, s.ahead,
            s.tally, s.log, s.log_count,
            now, last, s.layers, s.experts, s.slots, room, rules.ahead, s.ledger.entries,
            THRESHOLD=rules.threshold, PLAN=plan, ROLLING=rules.rolling,
            PLACES=triton.next_power_of_2(2 * s.layers), LOG=len(s.log) > 0, LP=most, **self._options,
        )  # fmt: skip

    def close_step(self) -> None:
        """Run `Usage.learn`: count the finished step."""
        s = self.state
        ranks.close_step[(s.layers,)](
            s.needed, s.last_use, s.count, s.recent, s.steady, s.clock, s.tally, s.made, s.demand, s.known, s.layers, s.experts,
            **self._layer_options,
        )  # fmt: skip
