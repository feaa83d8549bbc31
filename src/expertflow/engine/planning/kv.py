"""How many tokens of keys and values a run keeps, and what they take. Pure. Must not know slots and passes."""

from typing import NamedTuple

from expertflow.config import EngineConfig
from expertflow.errors import ConfigError
from expertflow.execution.kv.layout import PAGE, Layout, pages_of
from expertflow.models.shape import ModelShape

SHARE = 0.5
"""Share of the memory left beside dense weights, workspace, captured steps and the least slots that keys and values take at most
where `kv_tokens` is auto: the other half holds further slots."""


class KvPlan(NamedTuple):
    """Memory of keys and values.

    Attributes:
        tokens: of all live sequences together, in whole pages.
        nbytes: of keys and values, and tables of pages.
        least: of a run with the least tokens that the options allow.
        layout: how they lie in pages; None: they do not.
    """

    tokens: int
    nbytes: int
    least: int
    layout: Layout | None = None


class Sequences(NamedTuple):
    """Sequences that may live at once, tokens of one at most, tokens of a pass over prompts."""

    live: int
    length: int
    chunk: int


def max_live(config: EngineConfig, shape: ModelShape) -> int:
    """Return the sequences that have keys and values at once.

    Raises:
        ConfigError: if they cannot take turns, and are more than a step has.
    """
    live = config.max_live or config.max_batch
    if live > config.max_batch and not shape.in_rows:
        raise ConfigError(
            f"max_live={live} is more than max_batch={config.max_batch}, and sequences of {shape.model_type!r} cannot take "
            "turns: its keys and values are not kept in rows",
            "Leave max_live out, or raise max_batch as well.",
        )
    return live


def plan_kv(config: EngineConfig, shape: ModelShape, sequences: Sequences, left: int | None) -> KvPlan:
    """Decide how many tokens are kept.

    The stated `kv_tokens`. If it is auto, every live sequence may be of full length, unless that takes more than `SHARE` of
    what is left of a budget (all of it where slots are stated): then as many tokens as that holds, but at least one
    sequence of full length.

    Args:
        config: the options.
        shape: the model's figures.
        sequences: how many and how long.
        left: what the budget leaves to keys, values and further slots, bytes; None: no budget.

    Raises:
        ConfigError: if `kv_tokens` is stated for a model whose keys and values do not lie in pages.
    """
    live, length, _ = sequences
    if not any(layer.in_pages for layer in shape.kv):
        if config.kv_tokens is not None:
            raise ConfigError(
                f"kv_tokens={config.kv_tokens} cannot be had: keys and values of {shape.model_type!r} do not lie in pages here",
                "Leave it out; max_live and max_length say what is kept.",
            )
        nbytes = shape.kv_bytes(length) * live
        return KvPlan(live * length, nbytes, nbytes)
    if config.kv_tokens is not None:
        found = _planned(shape, sequences, pages_of(config.kv_tokens, PAGE))
        return found._replace(least=found.nbytes)
    one = pages_of(length, PAGE)
    least, pages = _planned(shape, sequences, one), one * live
    if left is not None:
        room = left if config.slots is not None else int(left * SHARE)
        pages = _most(shape, sequences, (one, pages), room)
    return _planned(shape, sequences, pages)._replace(least=least.nbytes)


def _most(shape: ModelShape, sequences: Sequences, pages: tuple[int, int], room: int) -> int:
    """The most pages, between two numbers, whose bytes are at most `room`; the lower number if even that is too many."""
    low, high = pages
    while low < high:
        middle = (low + high + 1) // 2
        if _planned(shape, sequences, middle).nbytes <= room:
            low = middle
        else:
            high = middle - 1
    return low


def _planned(shape: ModelShape, sequences: Sequences, pages: int) -> KvPlan:
    live, length, chunk = sequences
    layout = Layout.of(shape.windows, rows=live, length=length, tokens=pages * PAGE, chunk=chunk)
    nbytes = layout.nbytes([layer.bytes_per_token for layer in shape.kv if layer.in_pages])
    return KvPlan(pages * PAGE, nbytes + shape.kv_bytes(length) * live, 0, layout)
