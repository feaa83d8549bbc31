"""Rotary tables a sequence, for the scalings that choose one table by the longest position of a pass.

With `longrope` and `dynamic` scaling transformers takes the table of the longest sequence for all that step together,
so a token would depend on the sequences beside it. Here every sequence gets the table it gets alone. While its prompt
is read that is the whole prompt's, also in a pass over a part of it; then that of its own length. Must not know KV rows
and experts.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from expertflow.models.context import ForwardContext

SCALINGS = ("dynamic", "longrope")
"""Scalings whose table depends on the length."""


def by_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding whose table depends on the length."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else (kind,)
    return any(isinstance(one, str) and any(scaling in one for scaling in SCALINGS) for one in kinds)


def use_own_lengths(model: nn.Module, context: ForwardContext) -> None:
    """Make a model's rotary embeddings compute sequence b's angles as in a pass of `lengths[b]` tokens on its own.

    Args:
        model: loaded model; a module whose table does not depend on the length is left alone.
        context: what its passes carry; without `lengths` a module runs its class's own forward.
    """
    for module in model.modules():
        if by_length(module):
            module.forward = partial(_forward, weakref.ref(module), context)


def _forward(
    module: weakref.ref[Any], context: ForwardContext, states: Tensor, position_ids: Tensor, *more: Any, **named: Any
) -> Any:
    """A rotary embedding's forward that looks at the context; it must not keep the module alive, which keeps it."""
    own: Any = module()
    lengths = context.now.lengths
    if lengths is None:
        return type(own).forward(own, states, position_ids, *more, **named)
    return _angles(own, lengths, states, position_ids, *more, **named)


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
