"""How many slots a run has, and what they take. Pure. Must not know keys, values and workspaces."""

from expertflow.config import EngineConfig
from expertflow.errors import BudgetError
from expertflow.formats.records import StoreLayout
from expertflow.memory.slots import SlotPool
from expertflow.models.shape import ModelShape
from expertflow.units import format_bytes, parse_slots


def _stated_slots(config: EngineConfig, shape: ModelShape, layout: StoreLayout) -> int | None:
    sharing = shape.layers - len(layout.large)
    return None if config.slots is None else parse_slots(config.slots, sharing, shape.experts)


def least_slots(config: EngineConfig, shape: ModelShape, layout: StoreLayout) -> int:
    """Return the bytes of the stated slots, or of one, and of large layers."""
    slots = SlotPool.nbytes(layout.record_bytes, _stated_slots(config, shape, layout) or 1)
    return slots + SlotPool.large_nbytes(layout, shape.experts)


def plan_slots(config: EngineConfig, shape: ModelShape, layout: StoreLayout, fixed: int, budget: int | None) -> int:
    """Return the slots, which large layers need none of.

    Raises:
        BudgetError: if the budget holds too little.
    """
    slot_bytes, sharing = layout.record_bytes, shape.layers - len(layout.large)
    total, large = sharing * shape.experts, SlotPool.large_nbytes(layout, shape.experts)
    stated = _stated_slots(config, shape, layout)
    taken = f"dense weights, KV and workspace take {format_bytes(fixed)}, "
    if large:
        taken += (
            f"large layers ({', '.join(map(str, layout.large))}), which are always resident, {format_bytes(large)}, "
        )
    fixed += large
    least = fixed + SlotPool.nbytes(slot_bytes, stated or 1)
    if budget is not None and budget < least:
        need = f"{stated} slots" if stated else "a single slot"
        raise BudgetError(
            f"gpu_memory={format_bytes(budget)} is too small: {taken}and {need} of {format_bytes(slot_bytes)} must fit beside them",
            f"The least that works here is {format_bytes(least)} ({least} bytes); a smaller max_batch, max_length, "
            "kv_tokens or prefill_chunk lowers it.",
            least,
        )
    if stated is not None:
        return stated
    if budget is None:
        return total
    return min(total, (budget - fixed - SlotPool.nbytes(slot_bytes, 0)) // slot_bytes)
