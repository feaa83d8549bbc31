"""The device twin of `cache.core` without prefetch: who is resident, who leaves, what is fetched, as Triton kernels.

Three launches: `open_step` ranks everybody, `run_layer` gives a layer's experts their turns, `close_step` learns. The
router's choice never leaves the device. One program decides a layer: a hit costs no loop, a load one turn of a loop of
a few reductions. Ranks are float64 and bit-equal to NumPy's, so nothing may be fused into multiply-adds.

Twin of `kernels.residency_reference`, which calls `cache.core` itself. Knows slots; refuses to know rows and weights.
"""

import triton
import triton.language as tl
from torch import Tensor

from expertflow.cache.core import EVICT, HIT, LAYER, MISS
from expertflow.cache.policy import FADE, MIX
from expertflow.kernels.state import POLICIES, CacheState, Schedule

_LAYER, _HIT, _MISS, _EVICT = (tl.constexpr(kind) for kind in (LAYER, HIT, MISS, EVICT))
_NUDGE = tl.constexpr(1e-6)
_NEW = tl.constexpr(1 - FADE[0])
_NEW_STEADY = tl.constexpr(1 - FADE[1])
_FADE = tl.constexpr(FADE[0])
_FADE_STEADY = tl.constexpr(FADE[1])
_MIX = tl.constexpr(MIX)
_REST = tl.constexpr(1 - MIX)
_GAIN = tl.constexpr(MIX * (1 - FADE[0]) + (1 - MIX) * (1 - FADE[1]))
_MIX_FADE = tl.constexpr(MIX * FADE[0])
_REST_FADE = tl.constexpr((1 - MIX) * FADE[1])
_LRU, _LFU, _BELADY = (tl.constexpr(code) for code in (0, 1, 3))
_PROGRAM_EXPERTS = 256
"""Experts a warp handles; beyond, a program has four."""


@triton.jit
def _gap(rate):
    """`policy.gap`."""
    return 1.0 / tl.maximum(rate, tl.full([1], 1e-6, tl.float64)) - 1.0


@triton.jit(do_not_specialize=["layers", "experts", "steps"])
def _open_step(
    slot_of, last_use, count, recent, steady, used, unused, rank, low, lowest, clock, future, following,
    layers, experts, steps,
    POLICY: tl.constexpr, EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One program a layer: planes as `policy` makes them, ranks as `core.begin_step` does."""
    layer = tl.program_id(0)
    step = tl.load(clock + 1)
    if layer == 0:
        tl.store(clock, step)
    column = tl.arange(0, EP)
    mask = column < experts
    at = layer * experts + column
    place = layer.to(tl.float64)
    now = (step * layers).to(tl.float64) + place
    coming = ((step + 1) * layers).to(tl.float64) + place
    if POLICY == _LRU:
        before = tl.load(last_use + at, mask=mask, other=0.0)
        after_use, after_rest = tl.zeros([EP], tl.float64) + now, before
    elif POLICY == _LFU:
        before = tl.load(count + at, mask=mask, other=0.0)
        after_use, after_rest = before + 1.0, before
    else:
        fast = tl.load(recent + at, mask=mask, other=0.0) * _NEW
        slow = tl.load(steady + at, mask=mask, other=0.0) * _NEW_STEADY
        faded = _MIX_FADE * fast + _REST_FADE * slow
        wait, after_use, after_rest = _gap(_MIX * fast + _REST * slow), _gap(faded + _GAIN), _gap(faded)
        before = -(now + wait * layers.to(tl.float64))
        after_use = -(coming + after_use * layers.to(tl.float64))
        after_rest = -(coming + after_rest * layers.to(tl.float64))
        if POLICY == _BELADY:  # noqa: SIM102 - one is known to the compiler, the other to the device
            if step < steps:  # what is recorded is float32 on the host, up to the sum
                where = (step + 1) * layers * experts + at
                later = tl.load(following + where, mask=mask, other=0.0) - (step + 1).to(tl.float32)
                sure = tl.load(future + step * layers * experts + at, mask=mask, other=0) != 0
                wait_known = tl.where(sure, 0.0, later + 1.0)
                before = -(now + (wait_known * layers.to(tl.float32)).to(tl.float64))
                after_use = -(coming + (later * layers.to(tl.float32)).to(tl.float64))
                after_rest = after_use
    tl.store(used + at, after_use, mask=mask)
    tl.store(unused + at, after_rest, mask=mask)
    present = tl.load(slot_of + at, mask=mask, other=-1) >= 0
    ranks = tl.where(present, before, float("inf"))
    tl.store(rank + at, ranks, mask=mask)
    tl.store(low + layer, tl.min(ranks, 0))
    tl.store(lowest + layer, tl.argmin(ranks, 0).to(tl.int32))


@triton.jit(do_not_specialize=["layers", "experts"])
def _close_step(
    needed, last_use, count, recent, steady, clock,
    layers, experts,
    EP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One program a layer: `Usage.learn`."""
    layer = tl.program_id(0)
    step = tl.load(clock)
    if layer == 0:
        tl.store(clock + 1, step + 1)
    column = tl.arange(0, EP)
    mask = column < experts
    at = layer * experts + column
    use = tl.load(needed + at, mask=mask, other=0)
    one = use.to(tl.float64)
    now = (step * layers).to(tl.float64) + layer.to(tl.float64)
    tl.store(last_use + at, tl.zeros([EP], tl.float64) + now, mask=mask & (use != 0))
    tl.store(count + at, tl.load(count + at, mask=mask, other=0.0) + one, mask=mask)
    tl.store(recent + at, tl.load(recent + at, mask=mask, other=0.0) * _FADE + one, mask=mask)
    tl.store(steady + at, tl.load(steady + at, mask=mask, other=0.0) * _FADE_STEADY + one, mask=mask)
    tl.store(needed + at, tl.zeros([EP], tl.uint8), mask=mask)


@triton.jit
def _tell(log, row, kind, layer, expert, slot, detail, mask):
    """`core.tell`, for one row or a block of rows."""
    at = log + row * 5
    tl.store(at, kind, mask=mask)
    tl.store(at + 1, layer, mask=mask)
    tl.store(at + 2, expert, mask=mask)
    tl.store(at + 3, slot, mask=mask)
    tl.store(at + 4, detail, mask=mask)


@triton.jit(do_not_specialize=["layer", "pairs", "top_k", "layers", "experts", "slots", "wave"])
def _run_layer(  # noqa: C901, PLR0912, PLR0915 - one program's whole decision: splitting it would split its registers
    ids, live, pair_slots, src, dst, bounds,
    slot_of, owner, rank, used, unused, low, lowest, held, share, newer, older, resident, needed,
    turn_slot, turn_phase, tally, log, told,
    layer, pairs, top_k, layers, experts, slots, wave,
    NP: tl.constexpr, EP: tl.constexpr, LP: tl.constexpr, PHASES: tl.constexpr,  # noqa: N803
    JOINT: tl.constexpr, RETAIN: tl.constexpr, LOG: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """`core.access`: the running layer's row lives in registers, the other layers' rows in memory."""
    infinite = tl.full([1], float("inf"), tl.float64)
    column, other, pair = tl.arange(0, EP), tl.arange(0, LP), tl.arange(0, NP)
    base = layer * experts
    # who is needed
    alive = (pair < pairs) & (pair // top_k < tl.load(live))
    choice = tl.load(ids + pair, mask=alive, other=experts).to(tl.int32)
    alive = alive & (choice >= 0) & (choice < experts)
    tl.store(needed + base + choice, tl.full([NP], 1, tl.uint8), mask=alive)
    tl.debug_barrier()
    mine = column < experts
    need = tl.load(needed + base + column, mask=mine, other=0) != 0
    slot = tl.load(slot_of + base + column, mask=mine, other=-1)
    hit = need & (slot >= 0)
    missing = need & (slot < 0)
    hits = tl.sum(hit.to(tl.int32), 0)
    loads = tl.sum(missing.to(tl.int32), 0)
    turn = tl.where(hit, tl.cumsum(hit.to(tl.int32), 0) - 1, -1)
    turn_at = tl.where(hit, slot, -1)  # where each needed expert is when its turn comes
    phase_at = tl.where(hit, 0, -1)
    wanted = tl.load(used + base + column, mask=mine, other=0.0)
    after = tl.where(need, wanted, tl.load(unused + base + column, mask=mine, other=0.0))
    row = 0
    if LOG:
        row = tl.load(told)
        _tell(log, row, _LAYER, layer, -1, -1, hits + loads, None)
        _tell(log, row + 1 + turn, _HIT, layer, column, slot, 0, hit)
        row += 1 + hits
    phase, evictions = 0, 0
    count = tl.load(resident)
    holding = tl.load(held + layer)
    tl.store(bounds, 0)
    if loads > 0:
        lows = tl.load(low + other, mask=other < layers, other=float("inf"))
        at_low = tl.load(lowest + other, mask=other < layers, other=0)
        allowed = tl.load(share + layer)
        if JOINT:
            ranks = tl.where((slot >= 0) & (need == 0), after, infinite)
        else:
            ranks = tl.where(slot >= 0, after - _NUDGE * (turn + 1).to(tl.float64), infinite)
        number = 0
        while number < loads:  # the interpreter has no `range` over values of the device
            expert = tl.argmin(tl.where(missing, wanted, infinite), 0).to(tl.int32)
            chosen = column == expert
            missing = missing & (column != expert)
            if (number > 0) & (number % wave == 0):
                ranks = tl.where(slot >= 0, after - _NUDGE * (turn + 1).to(tl.float64), infinite)
            before, behind = -1, -1  # turn and phase of the last access that uses the slot
            if (count < slots) & (holding < allowed):
                place = tl.load(newer + slots)
                follower = tl.load(newer + place)
                tl.store(newer + slots, follower)
                tl.store(older + follower, slots)
                count += 1
                holding += 1
            else:
                own = tl.min(ranks, 0)
                lows = tl.where(other == layer, own, lows)
                if tl.where(allowed < slots, own, tl.min(lows, 0)) == float("inf"):  # the wave has to end here
                    ranks = tl.where(slot >= 0, after - _NUDGE * (turn + 1).to(tl.float64), infinite)
                    own = tl.min(ranks, 0)
                    lows = tl.where(other == layer, own, lows)
                victim_layer = tl.where(allowed < slots, layer, tl.argmin(lows, 0).to(tl.int32))
                if victim_layer == layer:
                    victim = tl.argmin(ranks, 0).to(tl.int32)
                    leaves = column == victim
                    place = tl.sum(tl.where(leaves, slot, 0), 0)
                    before = tl.sum(tl.where(leaves, turn, 0), 0)
                    behind = tl.sum(tl.where(leaves, phase_at, 0), 0)
                    slot = tl.where(leaves, -1, slot)
                    ranks = tl.where(leaves, infinite, ranks)
                else:
                    victim = tl.sum(tl.where(other == victim_layer, at_low, 0), 0)
                    theirs = victim_layer * experts
                    place = tl.load(slot_of + theirs + victim)
                    their_ranks = tl.load(rank + theirs + column, mask=mine, other=float("inf"))
                    their_ranks = tl.where(column == victim, infinite, their_ranks)
                    lows = tl.where(other == victim_layer, tl.min(their_ranks, 0), lows)
                    at_low = tl.where(other == victim_layer, tl.argmin(their_ranks, 0).to(tl.int32), at_low)
                    tl.store(slot_of + theirs + victim, -1)
                    tl.store(rank + theirs + victim, float("inf"))
                    tl.store(held + victim_layer, tl.load(held + victim_layer) - 1)
                    holding += 1
                evictions += 1
                if LOG:
                    _tell(log, row, _EVICT, victim_layer, victim, place, 0, None)
                    row += 1
            if behind >= phase:
                phase = behind + 1
                tl.store(bounds + phase, number, mask=phase <= PHASES)
            slot = tl.where(chosen, place, slot)
            turn = tl.where(chosen, hits + number, turn)
            turn_at = tl.where(chosen, place, turn_at)
            phase_at = tl.where(chosen, phase, phase_at)
            tl.store(owner + place, base + expert)
            tl.store(src + number, base + expert)
            tl.store(dst + number, place)
            if LOG:
                _tell(log, row, _MISS, layer, expert, place, before, None)
                row += 1
            number += 1
            tl.debug_barrier()
        tl.store(low + other, lows, mask=other < layers)
        tl.store(lowest + other, at_low, mask=other < layers)
        tl.debug_barrier()
    ends = phase + 1 + tl.arange(0, NP)
    tl.store(bounds + ends, tl.zeros([NP], tl.int32) + loads, mask=ends <= PHASES)
    # the layer is over: all may leave
    if RETAIN:
        ranks = tl.where(slot >= 0, after, infinite)
    else:
        last = tl.load(older + slots)
        leaving = tl.sum((slot >= 0).to(tl.int32), 0)
        left = leaving
        while left > 0:
            victim = tl.argmax((slot >= 0).to(tl.int32), 0).to(tl.int32)
            place = tl.sum(tl.where(column == victim, slot, 0), 0)
            slot = tl.where(column == victim, -1, slot)
            tl.store(owner + place, -1)
            tl.store(newer + last, place)
            tl.store(older + place, last)
            tl.store(newer + place, slots)
            tl.debug_barrier()
            last = place
            left -= 1
            if LOG:
                _tell(log, row, _EVICT, layer, victim, place, 0, None)
                row += 1
        tl.store(older + slots, last)
        count -= leaving
        holding -= leaving
        evictions += leaving
        ranks = tl.where(slot >= 0, after, infinite)
    tl.store(slot_of + base + column, slot, mask=mine)
    tl.store(rank + base + column, ranks, mask=mine)
    tl.store(low + layer, tl.min(ranks, 0))
    tl.store(lowest + layer, tl.argmin(ranks, 0).to(tl.int32))
    tl.store(held + layer, holding)
    tl.store(resident, count)
    tl.store(tally, tl.load(tally) + hits)
    tl.store(tally + 1, tl.load(tally + 1) + loads)
    tl.store(tally + 2, tl.load(tally + 2) + evictions)
    tl.store(tally + 3, tl.load(tally + 3) + phase)
    if phase >= PHASES:  # never, by `phase_bound`; an expert would be skipped, so it must not go unseen
        tl.store(tally + 4, 1)
    if LOG:
        tl.store(told, row)
    # every pair's slot, in the phase that computes it
    tl.store(turn_slot + column, turn_at, mask=mine)
    tl.store(turn_phase + column, phase_at, mask=mine)
    tl.debug_barrier()
    place_of = tl.load(turn_slot + choice, mask=alive, other=-1)
    phase_of = tl.load(turn_phase + choice, mask=alive, other=-1)
    for number in tl.static_range(PHASES):
        tl.store(pair_slots + number * pairs + pair, tl.where(phase_of == number, place_of, -1), mask=pair < pairs)


class Residency:
    """Drives the kernels over one state; every call only launches."""

    def __init__(self, state: CacheState) -> None:
        """Keep the state and make room for what a layer's program passes from its experts to its pairs."""
        self.state = state
        self._turn_slot = state.slot_of.new_zeros(state.experts)
        self._turn_phase = state.slot_of.new_zeros(state.experts)
        self._rules = state.strategy.rules(state.layers, state.slots)
        self._options = {
            "EP": triton.next_power_of_2(state.experts),
            "num_warps": 1 if state.experts <= _PROGRAM_EXPERTS else 4,
            "enable_fp_fusion": False,
        }

    def open_step(self) -> None:
        """`prefetch.open_step`: this step's ranks."""
        s = self.state
        _open_step[(s.layers,)](
            s.slot_of, s.last_use, s.count, s.recent, s.steady, s.used, s.unused, s.rank, s.low, s.lowest, s.clock,
            s.future, s.following, s.layers, s.experts, len(s.future), POLICY=POLICIES[s.strategy.policy],
            **self._options,
        )  # fmt: skip

    def run_layer(self, layer: int, ids: Tensor, schedule: Schedule) -> None:
        """`prefetch.run_layer`: fill `schedule` for the layer.

        Args:
            layer: MoE layer.
            ids: integer `[T, K]` contiguous, the router's choice; outside `0 .. E - 1` means none.
            schedule: overwritten; says how many of the T tokens are live.
        """
        s, phases = self.state, schedule.phases
        _run_layer[(1,)](
            ids, schedule.live, schedule.slots, schedule.src, schedule.dst, schedule.bounds,
            s.slot_of, s.owner, s.rank, s.used, s.unused, s.low, s.lowest, s.held, s.share, s.newer, s.older,
            s.resident, s.needed, self._turn_slot, self._turn_phase, s.tally, s.log, s.told,
            layer, ids.numel(), ids.shape[1], s.layers, s.experts, s.slots, self._rules.wave,
            NP=triton.next_power_of_2(max(ids.numel(), phases)), LP=triton.next_power_of_2(s.layers), PHASES=phases,
            JOINT=self._rules.joint, RETAIN=self._rules.retain, LOG=len(s.log) > 0,
            **self._options,
        )  # fmt: skip

    def close_step(self) -> None:
        """`Brain.end`: learn from the step."""
        s = self.state
        _close_step[(s.layers,)](
            s.needed, s.last_use, s.count, s.recent, s.steady, s.clock, s.layers, s.experts, **self._options
        )
