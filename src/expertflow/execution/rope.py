"""Rotary tables a sequence, for the scalings that choose one table by the longest position of a pass.

With `longrope` and `dynamic` scaling transformers takes the table of the longest sequence for all that step together, so a
token would depend on who steps beside it. Here every sequence gets the table it gets alone. While its prompt is read that is
the whole prompt's, also in a pass over a part of it; then that of its own length. Must not know KV rows and experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

SCALINGS = ("dynamic", "longrope")
"""Scalings whose table depends on the length."""


def by_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding whose table depends on the length."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(isinstance(one, str) and any(scaling in one for scaling in SCALINGS) for one in kinds)


class SequenceRope:
    """Makes a model's rotary embeddings compute every sequence's angles by its own length.

    Args:
        model: loaded model; one whose tables do not depend on the length is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the modules."""
        self._modules: list[Any] = [module for module in model.modules() if by_length(module)]

    @contextmanager
    def of(self, lengths: Sequence[int]) -> Iterator[None]:
        """Inside, sequence b of a pass gets the angles of a pass of `lengths[b]` tokens on its own."""
        for module in self._modules:
            module.forward = partial(_angles, module, list(lengths))
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward


def _angles(module: Any, lengths: Sequence[int], states: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> Any:
    """What the module's own forward returns, `[B, C, ...]` tensors, sequence by sequence."""
    forward: Callable[..., Any] = type(module).forward
    found = []
    for place, length in enumerate(lengths):
        _restart(module)
        # one more position, the sequence's last, makes the module choose the sequence's table
        positions = torch.cat([position_ids[place], position_ids.new_tensor([length - 1])])[None]
        found.append(forward(module, states[place : place + 1], positions, *more, **named))
    return tree_map(lambda *parts: torch.cat([part[:, :-1] for part in parts]), *found)


def _restart(module: Any) -> None:
    """Forget the longest sequence so far: `dynamic` scaling keeps its table for shorter ones."""
    for name in [name for name in module.__dict__ if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name in [name for name, _ in module.named_buffers() if name.endswith("original_inv_freq")]:
        setattr(module, name.replace("original_inv_freq", "inv_freq"), getattr(module, name).clone())
