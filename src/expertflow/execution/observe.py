"""Observers of passes and layers, which are given the routing as NumPy arrays.

Trace recorder and learning forecasts see the running model through these. Without an observer a layer pays one
comparison; with one, it shows the routing that it has on the host anyway. Must not know any observer.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertflow.models.context import Observer

Weights = Callable[[], npt.NDArray[np.float32]]


class StepObserver(Protocol):
    """Sees every forward pass."""

    def begin(self, tokens: npt.NDArray[np.int32] | None) -> None:
        """A forward pass starts; `[T]` ids fed in, row by row of the batch."""

    def observe(self, layer: int, routes: npt.NDArray[np.int64], weights: Weights) -> None:
        """A layer's routing, both `[T, K]`; calling `weights` costs a copy."""


def step_tokens(args: Sequence[Any], kwargs: dict[str, Any]) -> npt.NDArray[np.int32] | None:
    """The token ids of a forward call, flattened `[B * C]`; None if it was given embeddings."""
    ids = _given_ids(args, kwargs)
    if ids is None:
        return None
    flat: npt.NDArray[np.int32] = ids.reshape(-1).cpu().numpy().astype(np.int32)
    return flat


def prompt_tokens(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """How many tokens of prompts a forward call is given; 0 if it is a decode step, or was given embeddings."""
    ids = _given_ids(args, kwargs)
    return 0 if ids is None or ids.shape[-1] == 1 else ids.numel()


def _given_ids(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor | None:
    given = [kwargs.get("decoder_input_ids"), kwargs.get("input_ids"), *args[:1]]
    ids = next((value for value in given if isinstance(value, Tensor)), None)
    return None if ids is None or ids.is_floating_point() else ids


def observe_all(observers: Sequence[StepObserver]) -> Observer:
    """One function for the experts hook that calls every observer."""

    def observe(layer: int, index: Tensor, weights: Tensor) -> None:
        routes = index.numpy()
        for observer in observers:
            observer.observe(layer, routes, lambda: weights.float().cpu().numpy())

    return observe
