"""Shows how far long work is: a bar on a terminal, a line at every tenth into a file or pipe. Always on stderr.

Every command and the loading of weights use it. Must not know what the work is.
"""

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from expertflow.units import format_bytes

_PARTS = 10
_LONGEST_SILENCE = 60.0
"""Seconds after which a line is due, whatever was done since the last one."""


class Progress:
    """The progress of one piece of work; a context manager. Its methods may be called from several threads.

    Nothing appears before the first call of `advance` or `update`, so two of them may be nested if the inner one ends first.

    Args:
        what: what is done, such as `recording`.
        total: steps of the work, or bytes; None: the first `update` gives it.
        size: whether the steps are bytes.
        show: False keeps it silent.
    """

    def __init__(self, what: str, total: int | None = None, *, size: bool = False, show: bool = True) -> None:
        """Start with nothing done."""
        self._what, self._total, self._size, self._show = what, total, size, show
        self._done, self._part, self._note = 0, 0, ""
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._moves = self._console.is_terminal and not self._console.is_dumb_terminal
        self._lock = threading.Lock()
        self._began = self._last = time.monotonic()

    def __enter__(self) -> Self:
        """Start counting time."""
        self._began = self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count further finished steps.

        Args:
            count: steps.
            note: shown beside the numbers, such as a speed; empty: the last one stays.
        """
        with self._lock:
            self._done += count
            self._tell(note)

    def update(self, done: int, total: int, note: str = "") -> None:
        """Set the number of finished steps.

        Args:
            done: steps since the beginning.
            total: of the whole work, as far as it is known now.
            note: as for `advance`.
        """
        with self._lock:
            self._done, self._total = done, total
            self._tell(note)

    def _tell(self, note: str) -> None:
        self._note = note or self._note
        if not self._show:
            return
        if self._moves:
            self._move_bar()
        elif self._is_due():
            self._last = time.monotonic()
            self._console.print(self._line(), markup=False, highlight=False, soft_wrap=True)

    def _move_bar(self) -> None:
        if self._bar is None:
            numbers: tuple[ProgressColumn, ...] = (
                (DownloadColumn(binary_units=True), TransferSpeedColumn()) if self._size else (MofNCompleteColumn(),)
            )
            times = (TimeElapsedColumn(), TimeRemainingColumn())
            words = TextColumn("{task.description}", markup=False)
            self._bar = Bar(words, BarColumn(), *numbers, *times, console=self._console, transient=True)
            self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        name = f"{self._what}, {self._note}" if self._note else self._what
        self._bar.update(self._bar.task_ids[0], completed=self._done, total=self._total, description=name)

    def _is_due(self) -> bool:
        """Whether another tenth is done, or a line is due again."""
        part = _PARTS * self._done // max(self._total or 0, 1) if self._total else 0
        passed, self._part = part > self._part, max(part, self._part)
        return passed or time.monotonic() - self._last > _LONGEST_SILENCE

    def _line(self) -> str:
        done, total = (
            (format_bytes(self._done), format_bytes(self._total or 0)) if self._size else (self._done, self._total)
        )
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        of = f" of {total}" if self._total else ""
        note = f", {self._note}" if self._note else ""
        return f"{self._what}: {done}{of}{share}, {time.monotonic() - self._began:.0f} s{note}"
