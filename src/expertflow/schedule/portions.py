"""How many tokens of each prompt a pass reads: by room, by time, and at borders of pages.

A pass may have so many tokens, and while other sequences wait for their next one it may last so long. Its time is that of
its tokens' products and of their attention to all tokens before them, so a piece behind a long context has fewer tokens. Pure
numbers. Must not know which sequences these are, and where durations come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple


class Unread(NamedTuple):
    """What is left of a prompt: tokens `begin .. end - 1`."""

    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long tokens of prompts take, and how long a pass may last while other sequences wait.

    Attributes:
        token: seconds of a token, without attention to itself and to earlier ones.
        columns: seconds of attention to one token, in all layers of a kind, by their window; None: they see every token.
        bound: seconds of a pass.
        least: tokens of a pass at least, however long they take.
    """

    token: float
    columns: tuple[tuple[int | None, float], ...]
    bound: float
    least: int

    def seconds(self, begin: int, end: int) -> float:
        """What tokens `begin .. end - 1` of a sequence take."""
        seen = ((_seen(end, window) - _seen(begin, window)) * each for window, each in self.columns)
        return (end - begin) * self.token + sum(seen)

    def tokens(self, begin: int, seconds: float) -> int:
        """The most tokens from `begin` on that take no longer."""
        low, high = 0, max(0, int(seconds / self.token)) + 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.seconds(begin, begin + middle) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def allowed(self, begin: int) -> float:
        """Seconds of a pass whose first piece begins there: the bound, or what the fewest tokens take."""
        return max(self.bound, self.seconds(begin, begin + self.least))

    def next_pass(self, unread: Sequence[Unread], grain: int) -> float:
        """Seconds that the next pass may last. Where two passes are left it is half of their time, so that the last one is not short.

        A grain of each prompt is added to the half: borders of pages cut pieces short, and no third pass must follow.
        """
        total, allowed = sum(self.seconds(*one) for one in unread), self.allowed(unread[0].begin)
        cut_off = sum(self.seconds(max(begin, end - grain), end) for begin, end in unread)
        return min(allowed, total / 2 + cut_off) if allowed < total <= 2 * allowed else allowed


def _seen(count: int, window: int | None) -> int:
    """How many tokens the first `count` of a sequence see in all, each itself included."""
    inside = count if window is None else min(count, window)
    return inside * (inside + 1) // 2 + (count - inside) * (window or 0)


def even_room(unread: Sequence[Unread], room: int, grain: int = 1) -> int:
    """Tokens of the next pass where these prompts alone are left: passes of about one size, no more of them than with `room` tokens each.

    Every pass loads the missing experts, and hides that behind its own computation. A short last pass would hide nothing.

    Args:
        unread: as in `portions`.
        room: tokens of a pass at most.
        grain: as in `portions`.
    """
    left = sum(end - begin for begin, end in unread)
    each = -(-left // -(-left // room))
    return min(room, -(-each // grain) * grain)


def portions(unread: Sequence[Unread], room: int, grain: int = 1, pace: Pace | None = None) -> list[int]:
    """Tokens of each prompt in a pass, in the order of the prompts, of any sizes; the first one gets some.

    A prompt that would need more than is left takes half of it, or all that those behind it leave: a long one does not
    keep short ones waiting for all of its passes.

    Args:
        unread: what is left of each prompt.
        room: tokens of the pass.
        grain: a piece that does not end its prompt ends at a multiple of it.
        pace: how long the pass may last; None: it does not matter.
    """
    left, found = inf if pace is None else pace.next_pass(unread, grain), list[int]()
    for place, (begin, end) in enumerate(unread):
        need, behind = end - begin, unread[place + 1 :]
        count = need if need <= room else max(room - sum(one.end - one.begin for one in behind), room - room // 2)
        if pace is not None and pace.seconds(begin, end) > left:
            others = sum(pace.seconds(*one) for one in behind)
            count = min(count, pace.tokens(begin, max(left - others, left / 2)))
        if count < need:
            count = max(0, (begin + count) // grain * grain - begin)
        if not count and not found:
            count = min(grain, need, room)
        found.append(count)
        room -= count
        left -= 0.0 if pace is None else pace.seconds(begin, begin + count)
    return found


def columns(unread: Sequence[Unread], room: int, grain: int = 1, pace: Pace | None = None) -> int:
    """Tokens of each prompt in a pass that has as many of all of them; 0 if it has none for several. See `portions`."""
    most = room // len(unread)
    if pace is not None:
        each = pace.allowed(unread[0].begin) / len(unread)
        most = min(most, *(pace.tokens(one.begin, each) for one in unread))
    return most // grain * grain or (max(1, most) if len(unread) == 1 else 0)
