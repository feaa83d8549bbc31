"""A lock that threads get in the order in which they came, so that a loop of steps keeps no other thread waiting.

A lock of Python is often taken again by the thread that has just released it. Must not know what it guards.
"""

import threading
from collections import deque
from typing import Self


class FairLock:
    """First come, first served; the thread that has it may take it again. Use as a context manager."""

    def __init__(self) -> None:
        """Create a free lock."""
        self._guard = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock.

        After an exception while waiting, such as Ctrl-C, the queue is still in order.

        Args:
            wait: until it is free; else take it only if it is.

        Returns:
            Whether this thread has it now.
        """
        me = threading.get_ident()
        if self._owner == me:  # only this thread can have written that
            self._depth += 1
            return True
        if not self._guard.acquire(blocking=wait):
            return False
        try:
            if self._owner is None:
                self._owner, self._depth = me, 1
                return True
            if not wait:
                return False
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append((me, gate))
        finally:
            self._guard.release()
        try:
            gate.acquire()
        except BaseException:
            self._give_up(me, gate)
            raise
        return True

    def _give_up(self, me: int, gate: threading.Lock) -> None:
        with self._guard:
            if (me, gate) in self._waiting:
                self._waiting.remove((me, gate))
                return
        self.release()  # this thread got it meanwhile

    def release(self) -> None:
        """Give the lock to the thread that waits longest, once it was released as often as taken."""
        with self._guard:
            self._depth -= 1
            if self._depth:
                return
            self._owner = None
            if self._waiting:
                self._owner, gate = self._waiting.popleft()
                self._depth = 1
                gate.release()

    def __enter__(self) -> Self:
        """Take the lock."""
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()
