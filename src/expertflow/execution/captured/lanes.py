"""A line of work on the device beside the main one. Must not know what is queued."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Lane:
    """A line of work beside the main one: a CUDA stream; on a CPU there is only one line, and it is kept in order."""

    def __init__(self, device: torch.device) -> None:
        """Nothing queued."""
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._apart = False

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is queued inside runs behind all that the current line was given, and beside what it is given next."""
        if self._stream is None:
            yield
            return
        self._apart = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current line goes on behind what is queued here, if anything was since the last time."""
        if self._stream is not None and self._apart:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._apart = False
