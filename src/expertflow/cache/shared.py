"""One function, two ways to run it: plain Python in the engine, compiled in the simulator (design law 2).

A function marked `shared` stays an ordinary Python function over NumPy arrays; a function marked `compiled` may call
it and is translated to machine code together with it. So the simulator decides with the very source that the engine
runs. Knows nothing of what the functions do.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.extending import register_jitable

Function = TypeVar("Function", bound=Callable[..., object])


def shared(function: Function) -> Function:
    """Let compiled code call a plain function."""
    return cast("Function", register_jitable(function))


def compiled(function: Function) -> Function:
    """Translate a function at its first call; the result is kept on disk for the next process.

    Numba takes a kept result for fresh as long as the function's own file has not changed. Here it is also stale when
    any file of the rooms that decide has: the digest of all of them stands in for the file's time stamp.
    """
    dispatcher: Any = njit(cache=True, nogil=True)(function)
    dispatcher._cache._cache_file._source_stamp = _digest()  # noqa: SLF001 - numba has no public way
    return cast("Function", dispatcher)


def _digest() -> str:
    rooms = Path(__file__).parents[1]
    files = sorted(path for room in ("cache", "schedule", "sim") for path in (rooms / room).glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
