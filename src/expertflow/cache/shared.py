"""One function, two ways to run it: plain Python in the engine, compiled in the simulator (design law 2).

A function marked `shared` stays an ordinary Python function over NumPy arrays; a function marked `compiled` may call
it and is translated to machine code together with it. So the simulator decides with the very source that the engine
runs. Knows nothing of what the functions do.
"""

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit
from numba.extending import register_jitable

Function = TypeVar("Function", bound=Callable[..., object])


def shared(function: Function) -> Function:
    """Let compiled code call a plain function."""
    return cast("Function", register_jitable(function))


def compiled(function: Function) -> Function:
    """Translate a function at its first call; the result is kept on disk for the next process."""
    return cast("Function", njit(cache=True, nogil=True)(function))
