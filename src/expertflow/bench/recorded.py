"""Recorded routing of the runs that are measured: Belady's bound on it, and a simulated gate.

Belady's loads are counted by the engine's own decision core, step by step, and need no model. The gate of `pregated`
reads hidden states of a model that is trained for it. Here the recording answers in its place, with the gate's
published share of mistakes. Must not know how recordings are made.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.controller import CacheController
from expertflow.cache.forecast import NextGate, NoForecast, Step
from expertflow.cache.policy import Outlook
from expertflow.cache.strategy import STRATEGIES
from expertflow.errors import TraceError
from expertflow.events import CacheCounters, EventStream
from expertflow.sim.workload import as_recorded
from expertflow.trace.format import DECODE, load_trace

Needs = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Runs of one batch size, one after another.

    Attributes:
        needed: `[N, L, E]` bool, the experts of every forward pass.
        decode: `[N]` bool, whether the pass is a decoding step.
    """

    needed: Needs
    decode: npt.NDArray[np.bool_]

    @property
    def runs(self) -> list[slice]:
        """The passes of each run: a run begins where a prompt follows a decoding step."""
        begins = np.flatnonzero(~self.decode[1:] & self.decode[:-1]) + 1
        borders = [0, *begins.tolist(), len(self.decode)]
        return [slice(begin, end) for begin, end in pairwise(borders)]


def read_recording(path: Path) -> Recording:
    """A trace file as runs.

    Raises:
        TraceError: if it is damaged, or holds no decoding step.
    """
    trace = load_trace(path)
    needed = as_recorded(trace).needed
    _, first = np.unique(trace.rows.step, return_index=True)
    decode = trace.rows.phase[first] == DECODE
    if not decode.any():
        raise TraceError(f"{path} holds no decoding step", "Generate two tokens or more.")
    return Recording(needed=needed, decode=decode)


class BeladyBound(NamedTuple):
    """The fewest loads of any policy, whatever was in its slots when a run began.

    Attributes:
        kept: share of the decoding steps' needs that can be kept.
        loads: loads of a decoding step, on average.
        kept_all: share of all needs that can be kept, prompts included.
    """

    kept: float
    loads: float
    kept_all: float


def belady(recording: Recording, slots: int, repeats: int, large: tuple[int, ...] = ()) -> BeladyBound:
    """Belady's rule on runs 1 to `repeats`, as a bound.

    Decoding steps are bounded run by run, as if prompts cost nothing and filled the slots in the best way. Whole runs
    are bounded together, because a run may find an earlier one's experts in the slots.

    Args:
        recording: the runs, in order; the first warms up.
        slots: slots in all.
        repeats: timed runs.
        large: layers whose experts are always resident, outside the slots.
    """
    runs = recording.runs[1 : repeats + 1]
    everything = slice(runs[0].start, runs[-1].stop)
    decoding = [recording.needed[run][recording.decode[run]] for run in runs]
    loads = sum(fewest_loads(needed, slots, large) for needed in decoding)
    needs = sum(int(needed.sum()) for needed in decoding)
    whole = recording.needed[everything]
    return BeladyBound(
        kept=1 - loads / max(needs, 1),
        loads=loads / max(sum(map(len, decoding)), 1),
        kept_all=1 - fewest_loads(whole, slots, large) / max(int(whole.sum()), 1),
    )


def fewest_loads(needed: Needs, slots: int, large: tuple[int, ...] = ()) -> int:
    """Loads that no policy can avoid, even with the best slots to begin with: Belady's, without those into empty slots.

    Args:
        needed: `[N, L, E]` bool, the experts of every pass.
        slots: slots in all.
        large: layers whose experts are always resident, outside the slots.
    """
    _, layers, experts = needed.shape
    counters = CacheCounters()
    events = EventStream(counters)
    controller = CacheController(
        layers=layers,
        experts=experts,
        slots=slots,
        strategy=STRATEGIES["oracle"],
        record_bytes=1,
        events=events,
        future=needed,
        large=large,
    )
    for step in needed:
        controller.begin_step()
        for layer in np.flatnonzero(step.any(axis=1)).tolist():
            controller.access(layer, np.flatnonzero(step[layer]).tolist())
    return counters.evictions  # with every slot full, a load evicts an expert


class RecordedForecast(NoForecast):
    """A forecast that reads the recording of the coming run; between runs it has none.

    Attributes:
        note: remark for a reader of its rows.
    """

    note = ""
    foreknown = True

    def __init__(self) -> None:
        """Start without a recording."""
        self._outlooks: list[Outlook | None] = []
        self._first: int | None = None

    def follow(self, needed: Needs | None) -> None:
        """Take the passes that come next, `[N, L, E]`; None: they were not recorded. All outlooks are made here, outside the timing."""
        self._outlooks = [] if needed is None else [self.read(number, needed) for number in range(len(needed))]
        self._first = None

    def outlook(self, step: Step) -> Outlook | None:
        """What is known of this pass; None behind the recording's end."""
        if not self._outlooks:
            return None
        if self._first is None:
            self._first = step.number
        number = step.number - self._first
        return None if number >= len(self._outlooks) else self._outlooks[number]

    def read(self, number: int, needed: Needs) -> Outlook | None:
        """What is known of pass `number`."""
        raise NotImplementedError


class RecordedGate(RecordedForecast):
    """The next layer's gate, one layer early.

    Args:
        recall: share of a layer's experts that the gate foresees.
        seed: of its mistakes.
    """

    def __init__(self, recall: float, seed: int) -> None:
        """Start without a recording."""
        super().__init__()
        self._recall, self._seed = recall, seed
        self.note = f"the gate is simulated: it foresees {recall:.0%} of a layer's experts, its published recall"

    def read(self, number: int, needed: Needs) -> Outlook | None:
        """The path with the gate's mistakes, the same for the same pass."""
        return NextGate(needed, self._recall, self._seed).outlook(Step(number))


class RecordedLayers(RecordedForecast):
    """Every expert of the layers that a pass reaches: what a ring has to know where an encoder and a decoder alternate."""

    note = "it knows whether the encoder or the decoder runs, and goes round the layers of that one"

    def read(self, number: int, needed: Needs) -> Outlook | None:
        """All experts of these layers."""
        reached = needed[number].any(axis=1, keepdims=True)
        return Outlook(np.broadcast_to(reached, needed[number].shape)[None].astype(np.float64))
