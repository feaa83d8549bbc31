"""Snapshots of an engine, taken between two steps, at most once a second, and only if somebody asks.

What the device has is copied behind the steps that are queued. The copies are waited for behind the next step, so no step
waits for a reader. Must not know HTTP.
"""

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from expertflow.engine.llm import LLM, RunStats
    from expertflow.engine.plan import Plan
    from expertflow.execution.captured.view import CacheView, Coming

SECONDS = 1.0
"""Time between two snapshots at least."""


class Snapshot(NamedTuple):
    """The engine between two steps.

    Attributes:
        taken: when, by `time.monotonic`.
        stats: what it has done.
        plan: what it was built from.
        kv_share: share of the pages of keys and values in use.
        predictor: its state: `works`, `none`, or why it was switched off.
        view: the expert cache.
    """

    taken: float
    stats: "RunStats"
    plan: "Plan"
    kv_share: float
    predictor: str
    view: "CacheView"


class _Begun(NamedTuple):
    """A snapshot whose copies are under way; the first two as in `Snapshot`."""

    taken: float
    kv_share: float
    llm: "LLM"
    coming: "Coming[tuple[RunStats, CacheView]]"


class Snapshots:
    """Takes snapshots in the thread that runs the steps; that thread alone calls its methods.

    Attributes:
        latest: the last one, or None; any thread may read it.
    """

    def __init__(self) -> None:
        """Start without one."""
        self.latest: Snapshot | None = None
        self._begun: _Begun | None = None
        self._readers: list[Future[None]] = []

    def ask(self, reader: "Future[None]", llm: "LLM") -> None:
        """Begin a snapshot, unless one is under way or new; called between two steps.

        Args:
            reader: is done once `latest` is new enough.
            llm: of the engine.
        """
        now = time.monotonic()
        if self._begun is None and (self.latest is None or now - self.latest.taken >= SECONDS):
            self._begun = _Begun(now, llm.engine.kv_share, llm, llm.look())
        self._readers.append(reader)

    def show(self, *, wait: bool) -> None:
        """Finish a snapshot that was begun, if its copies are over or `wait` is true, and tell the readers."""
        if self._begun is not None:
            taken, kv_share, llm, coming = self._begun
            if not (wait or coming.ready()):
                return
            self._begun = None
            state = "none" if llm.predictor is None else llm.predictor_failure or "works"
            stats, view = coming.result()
            self.latest = Snapshot(taken, stats, llm.plan, kv_share, state, view)
        readers, self._readers = self._readers, []
        for reader in readers:
            if reader.set_running_or_notify_cancel():
                reader.set_result(None)
