"""What trials of modules share: random numbers in place of weights, comparing, and what a module's own forward may raise.

Must not know blocks.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from expertflow.execution.blocks.tensors import Tensors, tensors_of
from expertflow.kernels.dense_reference import rms_norm

_POOL = 1_000_003
"""Random numbers that are drawn; larger weights repeat them, in rows that begin elsewhere."""
_CLOSE = 1e-4
FAILS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)
"""What a module's own forward raises that wants to be called otherwise than it is here."""


def drawn(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensors:
    """Random numbers of the shapes of a module's tensors, on the CPU: sums of products near one, weights of norms too."""
    return drawn_as(shapes_of(module), dtype)


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a module's tensors, by name."""
    return {name: tensor.shape for name, tensor in tensors_of(module).items()}


def drawn_as(shapes: Mapping[str, torch.Size], dtype: torch.dtype = torch.float32) -> Tensors:
    """The same of given shapes."""
    pool, found = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)), Tensors()
    for place, (name, shape) in enumerate(shapes.items()):
        count = shape.numel()
        numbers = pool[place * 7919 % (_POOL // 2) :][:count]
        numbers = (numbers * shape[-1] ** -0.5 if len(shape) > 1 else 1 + 0.3 * numbers).to(dtype)
        found[name] = numbers.repeat(-(-count // len(numbers)))[:count].view(shape)
    return found


def enlarged(tensors: Tensors) -> Tensors:
    """The same numbers, so large that a module which clamps what it computes shows it."""
    return {name: 1e3 * one for name, one in tensors.items()}


def agree(mine: Any, theirs: Any) -> bool:
    """Whether both are tensors of one shape whose numbers are close."""
    same = isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.shape == theirs.shape
    return same and torch.allclose(mine, theirs, atol=_CLOSE, rtol=_CLOSE)


def plain(given: Any) -> Any:
    """What a module gives, or the first of several."""
    return given[0] if isinstance(given, tuple) else given


@contextmanager
def in_place_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of a module, inside."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def norm_rounding(norm: Any) -> bool | None:
    """How a norm rounds; None if it is none of ours."""
    tensors = drawn(norm, torch.bfloat16)
    states = torch.randn(8, *tensors["weight"].shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    try:
        own = functional_call(norm, tensors, (states,))
    except FAILS:
        return None
    for wide in (False, True):
        if own.dtype == states.dtype and torch.equal(
            own, rms_norm(states, tensors["weight"], norm.variance_epsilon, wide=wide)
        ):
            return wide
    return None
