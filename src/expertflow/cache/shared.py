"""Run one function in two ways: as plain Python, and compiled (design law 2).

A function marked `shared` stays an ordinary Python function over NumPy arrays. A function marked `compiled` may call
it; both are compiled together at the first call. So the simulator decides with the source that the engine runs. Numba
takes seconds to import and 200 MB on disk, so it is imported at that first call only. Must not know what the functions
do.
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
    """Mark a plain function that compiled code may call."""
    setattr(function, _MARK, True)
    return function


def compiled(function: Function) -> Function:
    """Compile a function at its first call; the result is cached on disk for the next process, if a folder is writable."""
    return cast("Function", _Compiled(function))


def on_disk(function: object) -> bool:
    """Whether the next process finds on disk what `compiled` made here: a folder is writable, and no reading or writing has failed."""
    return isinstance(function, _Compiled) and function.on_disk and not _failed


class _Compiled:
    """A function that numba compiles when it is first called."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self._dispatcher(*arguments)

    @property
    def on_disk(self) -> bool:
        return self._dispatcher._cache.cache_path is not None  # noqa: SLF001 - numba has no public way

    @cached_property
    def _dispatcher(self) -> Any:
        """Numba's compiled function.

        Numba reuses a cached result while the function's own file is unchanged. Here a change in any file of the
        packages that decide makes it stale too: their digest replaces the file's time stamp.
        """
        _register_callees(cast("FunctionType", self._function))
        dispatcher: Any = import_module("numba").njit(nogil=True)(self._function)
        try:
            dispatcher.enable_caching()
        except RuntimeError:  # no folder is writable: every process compiles anew
            return dispatcher
        cached = dispatcher._cache  # noqa: SLF001 - numba has no public way
        cached._cache_file._source_stamp = _digest()  # noqa: SLF001
        cached.load_overload, cached.save_overload = _optional(cached.load_overload), _optional(cached.save_overload)
        return dispatcher


_failed: list[str] = []
"""Steps of the disk cache that failed in this process."""


def _optional(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a step of the disk cache to return None where it fails: damaged or unreadable files, a full disk."""

    def attempt(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything; the function is compiled anew
            _failed.append(repr(error))
            return None

    return attempt


@cache
def _register_callees(function: FunctionType) -> None:
    """Register with numba, once a process, every shared function that a function calls, directly or not."""
    for name in _names(function.__code__):
        callee = function.__globals__.get(name)
        if isinstance(callee, FunctionType) and hasattr(callee, _MARK) and callee is not function:
            _register(callee)
            _register_callees(callee)


@cache
def _register(function: FunctionType) -> None:
    import_module("numba.extending").register_jitable(function)


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that code looks up, those of comprehensions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _digest() -> str:
    source = Path(__file__).parents[1]
    files = sorted(path for package in ("cache", "schedule", "sim") for path in (source / package).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
