"""Passes of an offloaded model: each begins a step of the expert cache, and two never run at once.

Wraps the `forward` of the modules whose call is a pass. Must not know the cache.
"""

import inspect
import weakref
from collections.abc import Callable
from functools import update_wrapper
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from expertflow.errors import UnsupportedModelError
from expertflow.memory.devices import entered

Begin = Callable[[tuple[Any, ...], dict[str, Any]], None]
"""Begins a step of the expert cache; gets the arguments of the pass."""


class Passes:
    """Lets one thread at a time run passes; that thread may call the model again inside a pass, from a hook.

    Args:
        begin: called before a pass computes anything. If it raises, the pass does not run.
        end: called when the outermost pass is over, or has failed.

    Attributes:
        frozen: no gradient is wanted of the model: a backward pass stops at what it returns.
        device: made the current one during a pass.
    """

    def __init__(self, begin: Begin, end: Callable[[], None]) -> None:
        """Start with no pass running."""
        self._begin = torch.compiler.disable(begin, reason="the host begins a step of the expert cache")
        self._end = torch.compiler.disable(end, reason="the host ends a step of the expert cache")
        self.lock = RLock()
        self.frozen = False
        self._inside = False
        self.device = torch.device("cpu")

    def guard(self, module: nn.Module, *, begins: bool = False) -> None:
        """Make every call of a module a pass; `stock_forward` has what it did before.

        Args:
            module: a module that calls experts: the model, its decoder, its encoder.
            begins: whether the call begins a step inside another pass too, as an encoder's does.
        """
        own = unbound(module, "forward")

        @torch.compiler.disable(recursive=False, reason="passes run one at a time")
        def locked(*args: Any, **kwargs: Any) -> Any:
            with self.lock, entered(self.device):
                inside = self._inside
                try:
                    self._inside = True
                    if begins or not inside:
                        self._begin(args, kwargs)
                    out = own(*args, **kwargs)
                finally:
                    self._inside = inside
                    if not inside:
                        self._end()
            return out if inside or self.frozen or not torch.is_grad_enabled() else without_backward(out)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_dynamo_compiling():  # in there torch 2.11 takes every compilation for an export
                refuse_tracing()
            return locked(*args, **kwargs)

        update_wrapper(forward, module.forward)
        forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
        del forward.__wrapped__  # type: ignore[attr-defined]  # it keeps the module
        forward.stock = own  # type: ignore[attr-defined]  # for `stock_forward`
        module.forward = forward


def unbound(module: nn.Module, name: str) -> Callable[..., Any]:
    """A module's method, which does not keep the module alive if it is the one of its class."""
    if name in vars(module):
        own: Callable[..., Any] = vars(module)[name]
        return own
    method, owner = getattr(type(module), name), weakref.ref(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        return method(owner(), *args, **kwargs)

    return call


def stock_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's own forward, which begins no step of the expert cache."""
    own: Callable[..., Any] = getattr(module.forward, "stock", module.forward)
    return own


def refuse_tracing() -> None:
    """A trace or an export would keep the routing of its example, and use it for every input.

    Raises:
        UnsupportedModelError: inside `torch.jit.trace` or `torch.export`.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]  # untyped in torch
        raise UnsupportedModelError(
            "an offloaded model cannot be traced or exported: which experts run is decided anew in every pass",
            "Export the stock model, or use `torch.compile`.",
        )


class _NoBackward(torch.autograd.Function):
    """Returns its input; refuses a backward pass that arrives here."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, _: Tensor) -> Tensor:
        del ctx
        return value.detach()  # not a view, so that programs may write into their logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        del ctx, grads
        raise UnsupportedModelError(
            "a backward pass reached an offloaded model, which only runs forward", "Train the stock model."
        )


def without_backward(out: Any) -> Any:
    """The output of a pass whose loss and logits refuse a backward pass with the cause, where they have no gradient.

    Args:
        out: a `ModelOutput`, or the tuple that `return_dict=False` gives.
    """

    def marked(value: Any) -> Any:
        plain = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        anchor = torch.empty(0, requires_grad=True)
        return _NoBackward.apply(value, anchor) if plain and not value.is_inference() else value

    if isinstance(out, tuple):
        return tuple(marked(value) for value in out)
    for name in ("loss", "logits"):
        if getattr(out, name, None) is not None:
            out[name] = marked(out[name])
    return out
