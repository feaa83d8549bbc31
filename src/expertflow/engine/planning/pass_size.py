"""How many tokens a pass over prompts has where `prefill_chunk` is auto, and how long such a pass takes.

Where experts are missing, a pass copies most of them, however few its tokens are. So it has as many tokens as are computed
while they are copied: fewer would copy the same for less, and more would only keep the other sequences waiting. While
others wait, a pass behind a long context has fewer tokens: those that are computed in little more than the copies take. Pure
numbers. Must not know slots, and what a workspace is made of.
"""

from collections import Counter
from collections.abc import Callable
from math import ceil, prod
from typing import NamedTuple

from expertflow.models.shape import ModelShape
from expertflow.schedule.portions import Pace

SMALLEST = 512
"""Tokens of a pass at least, unless fewer can come together; and on a CPU, where a copy is no bottleneck."""
ALL_RESIDENT = 2048
"""Tokens of a pass where nothing is copied."""
MOST = 8192
"""Tokens of a pass at most where no budget bounds its memory."""
GRAIN = 64
"""Sizes in between are multiples of this."""
STALL, OVERLAP = 1.3, 1.15
"""Times its copies that a pass may last while other sequences wait for it; and times the longer of copies and computation that one
lasts at most, because the first layer's copies and the last one's computation have nothing beside them."""
PACED = 0.58
"""Share of a large pass's speed that a pass beside steps is planned with. With 0.62 the last ones of 98,304 tokens took all of their bound
(gpt-oss-20b, long_stall_h200.json)."""
SHARE, LEFT_SHARE = 1 / 8, 1 / 4
"""Shares of the budget, and of what it leaves beside the least that works, that the workspace may take at most on top of that of a
pass of `SMALLEST` tokens."""


class Speeds(NamedTuple):
    """Bytes a second over the link, and floating-point operations a second."""

    link: float
    compute: float


class PassWork(NamedTuple):
    """What a pass over prompts has to do.

    Attributes:
        copied: bytes of all experts without a slot.
        flops: of a token, without attention to earlier tokens.
    """

    copied: int
    flops: int


def token_flops(shape: ModelShape) -> int:
    """Floating-point operations of one token: its dense products and `top_k` experts a layer; the output head is not among them."""
    expert = sum(prod(spec.shape) for spec in shape.specs)
    return 2 * (shape.multiplied + shape.layers * shape.top_k * expert)


def attention_flops(shape: ModelShape, columns: int) -> int:
    """Floating-point operations of one token's attention to so many earlier tokens, in all layers."""
    seen = sum(min(columns, window or columns) for window in shape.windows)
    return 4 * shape.head_width * seen


def balanced(work: PassWork, speeds: Speeds) -> int:
    """Tokens whose computation takes as long as the copies, rounded up to `GRAIN`."""
    tokens = work.copied / speeds.link * speeds.compute / work.flops
    return ceil(tokens / GRAIN) * GRAIN


def pass_tokens(work: PassWork, speeds: Speeds, limit: int) -> int:
    """Tokens of a pass: `balanced`, at least `SMALLEST`, or `ALL_RESIDENT` without copies; `limit` at most."""
    return min(limit, max(SMALLEST, balanced(work, speeds)) if work.copied else ALL_RESIDENT)


def largest_pass(workspace: Callable[[int], int], memory: tuple[int, int] | None, most: int) -> int:
    """The most tokens of a pass that memory allows.

    Args:
        workspace: bytes, by tokens; never less for more tokens.
        memory: the budget, and the least that works; None: no budget.
        most: tokens at most; what is returned is `SMALLEST` at least, unless `most` is less.
    """
    if memory is None:
        return min(most, MOST)
    budget, least = memory
    more = int(min(budget * SHARE, (budget - least) * LEFT_SHARE))
    if most <= SMALLEST or workspace(most) - workspace(SMALLEST) <= more:
        return most
    low, high = SMALLEST // GRAIN, most // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        if workspace(middle * GRAIN) - workspace(SMALLEST) <= more:
            low = middle
        else:
            high = middle - 1
    return low * GRAIN


def pace_of(shape: ModelShape, work: PassWork, speeds: Speeds, chunk: int) -> Pace:
    """How long passes of up to `chunk` tokens take, and may take while others wait.

    The bound is what `STALL` times the copies leaves to computation, or the same of the fewest tokens' products, if those take longer.
    """
    fewest, compute = min(chunk, SMALLEST if work.copied else ALL_RESIDENT), PACED * speeds.compute
    token, column = work.flops / compute, 4 * shape.head_width / compute
    return Pace(
        token=token,
        columns=tuple((window, column * layers) for window, layers in Counter(shape.windows).items()),
        bound=STALL / OVERLAP * max(work.copied / speeds.link, fewest * token),
        least=min(chunk, SMALLEST),
    )


def longest_pass(pace: Pace, copies: float, chunk: int, length: int, *, bounded: bool) -> float:
    """Seconds that a pass lasts at most, behind a longest prompt.

    Args:
        pace: how long tokens take.
        copies: seconds of its copies.
        chunk: tokens of a pass.
        length: tokens of a sequence.
        bounded: whether passes keep to the pace.
    """
    deepest = chunk * pace.seconds(length - 1, length)
    return OVERLAP * max(copies, min(deepest, pace.allowed(length)) if bounded else deepest)
