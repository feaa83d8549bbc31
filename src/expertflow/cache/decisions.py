"""The functions by which the controller decides, as plain Python or compiled.

As Python, the decisions of a layer that needs 32 experts take .33 ms, as long as a copy, which the link may wait for; compiled, .06.
Compiling takes ten seconds or more, so a process of its own does it, once an installation, and leaves the result on disk; decisions are
Python's until it is there. Both are the same functions (`cache.shared`), so nothing else depends on when that is. Must not know who
decides, and when.
"""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock, Thread
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.cache.core import Planes, Rules, Tables, finish_layer, make_tables, place_miss, take_hits
from expertflow.cache.prefetch import open_step, pass_layer
from expertflow.cache.shared import compiled, on_disk

Demand = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Misses = npt.NDArray[np.int64]


class Decisions(NamedTuple):
    """What a pass calls: before its first layer, when a layer's experts are known, for each missing one, after these, and to plan."""

    open_step: Callable[[Tables, Planes, Demand, Rules], None]
    take_hits: Callable[[Tables, Planes, Rules, int, Mask], tuple[Misses, Mask]]
    place_miss: Callable[[Tables, Planes, Rules, int, Mask, Misses, Mask, int], None]
    finish_layer: Callable[[Tables, Planes, Rules, int, Mask], None]
    pass_layer: Callable[[Tables, Planes, Demand, Rules, int], None]


PLAIN = Decisions(open_step, take_hits, place_miss, finish_layer, pass_layer)
COMPILED = Decisions(
    compiled(open_step), compiled(take_hits), compiled(place_miss), compiled(finish_layer), compiled(pass_layer)
)


class Deciding:
    """The functions in use.

    Args:
        now: at first.

    Attributes:
        now: at present.
    """

    def __init__(self, now: Decisions = PLAIN) -> None:
        """Compile nothing yet."""
        self.now = now
        self._begun, self._lock = False, Lock()

    def compile(self) -> Thread | None:
        """Begin to compile beside everything else, once; where nothing can be left on disk, `now` stays as it is.

        Returns:
            A thread that ends with it; None if it has begun already.
        """
        with self._lock:
            if self._begun or not sys.executable or hasattr(sys, "frozen"):  # a frozen program would start itself
                return None
            self._begun = True
        thread = Thread(target=self._compile, name="compile decisions", daemon=True)
        thread.start()
        return thread

    def _compile(self) -> None:
        """Wait for the other process, which takes some 380 MB meanwhile, load what it left, and use it from then on."""
        paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(  # noqa: S603 - this module, of this folder
            [sys.executable, "-P", "-m", __name__], env={**os.environ, "PYTHONPATH": paths}, stdin=quiet, stdout=quiet, stderr=quiet
        )  # fmt: skip
        atexit.register(process.terminate)  # it is of use to nobody then
        try:
            over = process.wait()
        finally:
            atexit.unregister(process.terminate)
        if over == 0:
            call_all(COMPILED)
            self.now = COMPILED


ON_GPU = Deciding()
"""Of every controller in this process whose experts are on a GPU."""


def call_all(decisions: Decisions) -> None:
    """Call each function once, with arguments of the types that a controller gives it: at its first call one is compiled, or loaded."""
    tables = make_tables(2, 2, 3, divided=False)
    planes, demand, needed = Planes(*(np.zeros((2, 2)) for _ in Planes._fields)), np.ones((2, 2)), np.ones(2, np.bool_)
    rules = Rules(
        retain=True, prefetch=True, threshold=0.5, reserve=1, ahead=1, rolling=True, wraps=False, wave=1, joint=False
    )
    decisions.open_step(tables, planes, demand, rules)
    misses, kept = decisions.take_hits(tables, planes, rules, 1, needed)
    for number in range(len(misses)):
        decisions.place_miss(tables, planes, rules, 1, needed, misses, kept, number)
    decisions.finish_layer(tables, planes, rules, 1, needed)
    decisions.pass_layer(tables, planes, demand, rules, 1)


if __name__ == "__main__":
    os.nice(10)  # the model is being loaded meanwhile
    call_all(COMPILED)
    sys.exit(not all(map(on_disk, COMPILED)))
