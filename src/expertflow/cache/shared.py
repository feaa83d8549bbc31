"""One function, two ways to run it: plain Python in the engine, compiled in the simulator (design law 2).

A function marked `shared` stays an ordinary Python function over NumPy arrays; a function marked `compiled` may call
it and is translated to machine code together with it, at its first call. So the simulator decides with the very source
that the engine runs. Numba takes seconds and 200 MB: nothing imports it before that first call.
Knows nothing of what the functions do.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import cache, cached_property, update_wrapper
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., object])
_MARK = "expertflow_shared"


def shared(function: Function) -> Function:
    """Let compiled code call a plain function."""
    setattr(function, _MARK, True)
    return function


def compiled(function: Function) -> Function:
    """Translate a function at its first call; the result is kept on disk for the next process, where there is a place."""
    return cast("Function", _Compiled(function))


class _Compiled:
    """A function that numba translates when it is first called."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self._dispatcher(*arguments)

    @cached_property
    def _dispatcher(self) -> Any:
        """Numba's own function.

        Numba takes a kept result for fresh as long as the function's own file has not changed. Here it is also stale when
        any file of the rooms that decide has: the digest of all of them stands in for the file's time stamp.
        """
        _register_callees(cast("FunctionType", self._function))
        dispatcher: Any = import_module("numba").njit(nogil=True)(self._function)
        try:
            dispatcher.enable_caching()
        except RuntimeError:  # no folder can be written to: every process translates for itself
            return dispatcher
        kept = dispatcher._cache  # noqa: SLF001 - numba has no public way
        kept._cache_file._source_stamp = _digest()  # noqa: SLF001
        kept.load_overload, kept.save_overload = _optional(kept.load_overload), _optional(kept.save_overload)
        return dispatcher


def _optional(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of keeping results that gives None where it fails: files that are damaged, unreadable, or on a full disk."""

    def attempt(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception:  # noqa: BLE001 - a damaged pickle may raise anything; the function is translated anew
            return None

    return attempt


@cache
def _register_callees(function: FunctionType) -> None:
    """Make known to numba, once a process, every shared function that a function calls, directly or not."""
    for name in _names(function.__code__):
        callee = function.__globals__.get(name)
        if isinstance(callee, FunctionType) and hasattr(callee, _MARK) and callee is not function:
            _register(callee)
            _register_callees(callee)


@cache
def _register(function: FunctionType) -> None:
    import_module("numba.extending").register_jitable(function)


def _names(code: CodeType) -> Iterator[str]:
    """Names that code looks up, that of comprehensions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _digest() -> str:
    rooms = Path(__file__).parents[1]
    files = sorted(path for room in ("cache", "schedule", "sim") for path in (rooms / room).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
