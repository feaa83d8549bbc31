"""A line of work on the device beside the main one. Must not know what is queued."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Lane:
    """A line of work beside the main one: a CUDA stream; on a CPU there is only one line, and it is kept in order.

    Args:
        device: where it is.
        urgent: its programs get multiprocessors before those of other lines that wait for one as well.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        """Create a lane with nothing queued."""
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1 if urgent else 0) if device.type == "cuda" else None
        self._apart = False

    @contextmanager
    def work(self) -> Iterator[None]:
        """Queue what runs inside behind all work of the current line so far, and beside its later work."""
        if self._stream is None:
            yield
            return
        self._apart = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Make the current line wait for what was queued here since the last call, if anything was."""
        if self._stream is not None and self._apart:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._apart = False
