"""A decode step that begins before the host knows the tokens of the step before it.

While a step runs, the next one of the same sequences is queued behind it, and gets their tokens on the device: so the device does not wait
for the host between the two. That is done where nothing may come between: penalties, masks and log-probabilities depend on tokens that the
host knows by then. Only a text that ends by itself, or a mask without a choice, is not foreseen: its sequence takes part in one more step,
for nothing. Must not know channels.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from expertflow.engine.request import Request
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.replay import Playback
from expertflow.execution.sampler import Chosen, Unread

UNKNOWN = -1
"""In place of a token that is on the device."""


class Begun(NamedTuple):
    """A step that is queued.

    Attributes:
        numbers: its requests.
        logits: `[B, V]`, of their next tokens, valid until the next step.
        best: int64 `[B]`, as `Executor.best` gives it.
    """

    numbers: tuple[int, ...]
    logits: Tensor
    best: Tensor | None

    def of(self, numbers: Sequence[int]) -> "Begun":
        """What of it belongs to some of its requests, in its order."""
        if len(numbers) == len(self.numbers):
            return self
        places = [self.numbers.index(number) for number in numbers]
        return Begun(tuple(numbers), self.logits[places], None if self.best is None else self.best[places])


class Read(NamedTuple):
    """Tokens that the host knows, in place of `Unread`."""

    chosen: Chosen

    def read(self) -> Chosen:
        """Those."""
        return self.chosen


class Unsent(NamedTuple):
    """Tokens that are chosen, and known to nobody yet.

    Attributes:
        numbers: of the requests that they belong to.
        positions: of these tokens in their sequences.
        unread: the tokens.
    """

    numbers: Sequence[int]
    positions: Sequence[int]
    unread: Unread | Read

    def left(self, positions: Mapping[int, int]) -> tuple[list[int], Chosen]:
        """Requests that still want theirs, and these tokens, waiting for them; `positions` are those of next tokens by request."""
        chosen, each = self.unread.read(), zip(self.numbers, self.positions, strict=True)
        places = [place for place, (number, position) in enumerate(each) if positions.get(number) == position]
        return [self.numbers[place] for place in places], chosen.of(places)


@dataclass
class Ahead:
    """What an engine has begun ahead.

    Attributes:
        begun: the step that is queued, if one is.
        unsent: tokens of the step before it, until each request has its own.
    """

    begun: Begun | None = None
    unsent: Unsent | None = None

    def take(self, running: Container[int]) -> tuple[Begun | None, tuple[int, ...]]:
        """The step that has begun, which is nobody's then, and those of its requests that still run; None where none does."""
        begun, self.begun = self.begun, None
        left = () if begun is None else tuple(number for number in begun.numbers if number in running)
        return (begun if left else None), left

    def forget(self) -> None:
        """Let go of both."""
        self.begun = self.unsent = None


def inputs_behind(
    numbers: Sequence[int],
    requests: Mapping[int, Request],
    rows: Sequence[int],
    playback: Playback | None,
    reread: int | None,
) -> list[DecodeInput] | None:
    """What the step behind the running one is fed.

    Args:
        numbers: requests of the running step.
        requests: by their numbers.
        rows: KV row of each.
        playback: replays tokens; None: they are the model's.
        reread: length at which a sequence is read anew; None: none is.

    Returns:
        A token each, all `UNKNOWN` where the model chooses them; None where a request ends with its next token or is read anew behind it,
        where only some tokens are recorded, or where log-probabilities of such are wanted.
    """
    found = []
    for number, row in zip(numbers, rows, strict=True):
        request = requests[number]
        if not request.goes_on or request.read_length + 1 == reread:
            return None
        if playback is not None and request.params.logprobs is not None:  # they are of what is recorded
            return None
        token = None if playback is None else playback.known(request.index, request.position)
        found.append(DecodeInput(number, UNKNOWN if token is None else token, row, request.fed + 1))
    return found if len({one.token == UNKNOWN for one in found}) == 1 else None
