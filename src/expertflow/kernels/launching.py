"""Launches that cost the host little: what Triton compiled is kept, by everything that it depends on.

Triton looks at every argument of a launch and asks which of its programs fits, which takes the host longer than the launch itself. A pass
over prompts makes hundreds, one after the other, and the device waits for them. Must not know any kernel.
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

_ALIGNED = 16
"""Bytes, and numbers, to whose multiples Triton compiles other code."""
_SMALL = 1 << 31
"""Numbers from here on are of 64 bits."""
_made: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], **constants: Any) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: a function of Triton's, one of a module.
        grid: programs, in up to three dimensions.
        given: its first arguments, tensors and whole numbers.
        constants: the others, known when it is compiled, and options such as `num_warps`; hashable.
    """
    device = torch.cuda.current_device() if given[0].is_cuda else -1  # for which Triton compiles
    key = (id(kernel), device, *map(_kind, given), *constants.items())
    if (known := _made.get(key)) is not None:
        compiled, rest = known
        compiled[(*grid, 1, 1)[:3]](*given, *rest)
        return
    compiled = kernel[grid](*given, **constants)
    if compiled is not None:  # the interpreter compiles nothing
        _made[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(given) :])


def launch_within(kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], stages: int, **constants: Any) -> int:
    """Launch with so many steps in flight, or with fewer if the device has no room for them, which changes no bit.

    Args:
        kernel: as of `launch`.
        grid: as of `launch`.
        given: as of `launch`.
        stages: at most.
        constants: as of `launch`.

    Returns:
        How many steps are in flight.
    """
    while True:
        try:
            launch(kernel, grid, given, num_stages=stages, **constants)
        except OutOfResources:  # how much shared memory is needed is known to the compiler alone
            if stages == 1:
                raise
            stages -= 1
        else:
            return stages


def _kind(value: Any) -> Any:
    """What of an argument Triton compiles for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % _ALIGNED == 0
    return value == 1, value % _ALIGNED == 0, -_SMALL <= value < _SMALL
