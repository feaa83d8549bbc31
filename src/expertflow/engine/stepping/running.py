"""A request in the engine, and where its outputs go. Must not know how it is run."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from expertflow.engine.request import Channel, Request, StreamOutput

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(kw_only=True)
class Running:
    """A request in the engine.

    Attributes:
        request: its tokens and text.
        added: when it came, by `time.perf_counter`.
        channel: where its outputs go.
        first: when its first token came; 0: not yet.
        usual: float [layers, experts], what its prompt is likely to use; None: not predicted yet.
    """

    request: Request
    added: float
    channel: Channel
    first: float = 0.0
    usual: npt.NDArray[np.float32] | None = field(default=None)


def keep(outbox: list[tuple[int, StreamOutput]], number: int, output: StreamOutput) -> None:
    """The channel of requests that were added without one: keep the output until `step` returns it."""
    outbox.append((number, output))


def weakly(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that does not keep its object alive, for what that object owns."""
    bound = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        found = bound()
        assert found is not None, "its owner is gone"
        return found(*args, **kwargs)

    return call
