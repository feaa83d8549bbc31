"""The routing of the very runs that are measured, recorded once: what Belady could have done with it, and a gate.

Belady's loads are counted by the engine's own decision core, step by step, and need no model. The gate of `pregated` reads
hidden states that a model of another make would have to be trained for; here it answers from the recording, with its
published share of mistakes. Knows recordings; refuses to know how they are made.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.controller import CacheController
from expertflow.cache.forecast import NextGate, Nothing, Step
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


class Least(NamedTuple):
    """What no policy can better: share of decoding needs kept, and loads of a decoding step on average."""

    kept: float
    loads: float


def belady(recording: Recording, slots: int, skip_runs: int = 1) -> Least:
    """Belady's rule over all runs, counted over the decoding steps behind the first `skip_runs` runs.

    Args:
        recording: the runs, in order.
        slots: slots in all.
        skip_runs: runs that only fill the cache.
    """
    steps, layers, experts = recording.needed.shape
    events, counters = EventStream(), CacheCounters()
    events.subscribe(counters.count)
    controller = CacheController(
        layers=layers, experts=experts, slots=slots, strategy=STRATEGIES["oracle"], row_bytes=1, events=events,
        future=recording.needed,
    )  # fmt: skip
    begin = recording.runs[skip_runs].start
    hits = loads = counted = 0
    for number in range(steps):
        before = (counters.hits, counters.loads)
        controller.begin_step()
        for layer in np.flatnonzero(recording.needed[number].any(axis=1)).tolist():
            controller.access(layer, np.flatnonzero(recording.needed[number, layer]).tolist())
        if number >= begin and recording.decode[number]:
            hits += counters.hits - before[0]
            loads += counters.loads - before[1]
            counted += 1
    return Least(kept=hits / max(hits + loads, 1), loads=loads / max(counted, 1))


class RecordedGate(Nothing):
    """The next layer's gate, one layer early, for runs that were recorded; between them it knows nothing.

    Args:
        recall: share of a layer's experts that the gate foresees.
        seed: of its mistakes.
    """

    def __init__(self, recall: float, seed: int) -> None:
        """Knows nothing yet."""
        self._recall, self._seed = recall, seed
        self._gate: NextGate | None = None
        self._first: int | None = None

    def follow(self, needed: Needs | None) -> None:
        """The passes that come now, `[N, L, E]`; None: nobody recorded them."""
        self._gate = None if needed is None else NextGate(needed, self._recall, self._seed)
        self._first = None

    def outlook(self, step: Step) -> Outlook | None:
        """What the gate foresees of this pass."""
        if self._gate is None:
            return None
        if self._first is None:
            self._first = step.number
        return self._gate.outlook(Step(step.number - self._first))
