"""How long sequences may be where nobody states it: as long as the expert cache can afford. Pure."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from expertflow.config import EngineConfig
from expertflow.errors import BudgetError
from expertflow.execution.kv.layout import PAGE
from expertflow.models.shape import ModelShape

if TYPE_CHECKING:
    from expertflow.engine.plan import Plan

SHORTEST = 512
"""Tokens of a sequence from which on lengths are tried."""
KEPT = 0.5
"""Share of the slots that one sequence of full length leaves at least, where a budget is stated."""
ROOM = 0.25
"""Share of the memory left that keys and values take at most, where none is stated."""


class Served(NamedTuple):
    """Options that follow.

    Attributes:
        max_length: tokens of a sequence.
        kv_tokens: of all live sequences; None: the plan decides.
    """

    max_length: int
    kv_tokens: int | None


def longest(
    plan_of: "Callable[[EngineConfig], Plan]", config: EngineConfig, shape: ModelShape, default: int, free: int
) -> Served:
    """The longest sequences, up to the model's context.

    With a budget, one sequence of that length leaves `KEPT` of the slots that a short one leaves. Without a budget its keys
    and values take `ROOM` of the free memory at most, and those of all live sequences together no more.

    Args:
        plan_of: plans a run.
        config: the options, without `max_length`.
        shape: the model's figures.
        default: the context of a model that states none.
        free: bytes free on the device beside what the plan holds.

    Raises:
        BudgetError: if not even the shortest fits.
    """
    paged = any(layer.in_pages for layer in shape.kv)
    context = min(shape.context or default, config.kv_tokens or shape.context or default)
    if not paged or shape.unplanned or shape.encoder_decoder:
        return Served(min(context, default), config.kv_tokens)

    def one(length: int) -> "Plan":
        return plan_of(replace(config, max_length=length, kv_tokens=max(length, PAGE)))

    low, most = min(SHORTEST, context), context
    base, room = one(low), int(free * ROOM)

    def fits(length: int) -> bool:
        try:
            plan = one(length)
        except BudgetError:
            return False
        return plan.kv <= room if plan.budget is None else plan.slots >= base.slots * KEPT

    while low < most:
        middle = min(most, (low + most) // 2 // PAGE * PAGE + PAGE)
        if fits(middle):
            low = middle
        else:
            most = max(low, middle - PAGE)
    if base.budget is not None or config.kv_tokens is not None:
        return Served(low, config.kv_tokens)
    live = config.max_live or config.max_batch
    together = low * max(1, min(live, room // max(1, one(low).kv)))
    return Served(low, None if together >= low * live else together)
