"""Logits of all positions of a prompt, a few at a time: a pass computes those of the last position only.

The states before the model's head are kept while a pass runs. The model's own forward then computes the logits of some of them,
with whatever a family does behind its head, around a decoder that does nothing but return them. Must not know requests.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from expertflow.execution.passes import stock_forward

POSITIONS = 16
"""Positions whose logits are there at once."""
Score = Callable[[int, int, Tensor], None]
"""Takes logits `[n, V]` of a prompt: its place in the pass, the first position, the logits, which are valid inside the call."""


def no_score(place: int, begin: int, logits: Tensor) -> None:
    """Where no positions are scored."""
    raise AssertionError((place, begin, logits.shape))


class Scored(NamedTuple):
    """Positions of one prompt that are scored, and where a pass has their states.

    Attributes:
        place: of the prompt in the pass.
        row: of the pass's states `[B, C, H]`.
        column: there, of the first position.
        positions: in the prompt.
    """

    place: int
    row: int
    column: int
    positions: range


@contextmanager
def states_kept(model: PreTrainedModel, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list to which every pass of the model inside appends its states before the head, `[B, C, H]`."""
    kept: list[Tensor] = []
    if not wanted:
        yield kept
        return

    def keep(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out.last_hidden_state)

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def score_all(model: PreTrainedModel, states: Float[Tensor, "B C H"], scored: Sequence[Scored], score: Score) -> None:
    """Hand the logits of these positions to `score`, `POSITIONS` at a time."""
    for one in scored:
        for begin in range(0, len(one.positions), POSITIONS):
            some = one.positions[begin : begin + POSITIONS]
            column = one.column + begin
            score(one.place, some.start, head(model, states[one.row, column : column + len(some)]))


@torch.inference_mode()
def head(model: PreTrainedModel, states: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
    """The model's logits from states before its head."""
    decoder = model.get_decoder()
    own = vars(decoder).get("forward")
    decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states[None])
    try:
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        out: Any = stock_forward(model)(input_ids=ids, use_cache=False, logits_to_keep=0)
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    logits: Tensor = out.logits[0]
    return logits
