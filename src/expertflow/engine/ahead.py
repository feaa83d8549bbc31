"""A decode step that begins before the host knows the tokens of the step before it.

While a step runs, the next one of the same sequences is queued behind it, and gets their tokens on the device: so the device does not wait
for the host between the two. That is done where nothing may come between, and where the host is not needed to choose a token. Only
a text that ends by itself is not foreseen: its sequence takes part in one more step, for nothing. Must not know channels.
"""

from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from expertflow.engine.request import Request
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.replay import Playback

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

    def of(self, running: Container[int]) -> "Begun | None":
        """What of it belongs to requests that still run; None if none does."""
        places = [place for place, number in enumerate(self.numbers) if number in running]
        if len(places) in {0, len(self.numbers)}:
            return self if places else None
        best = None if self.best is None else self.best[places]
        return Begun(tuple(self.numbers[place] for place in places), self.logits[places], best)


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
        A token each, all `UNKNOWN` where the model chooses them; None where a request ends with its next token, where its next token
        depends on ones that the host has to know, or where only some tokens are recorded.
    """
    found = []
    for number, row in zip(numbers, rows, strict=True):
        request = requests[number]
        if not request.goes_on or request.read_length + 1 == reread:
            return None
        token = None if playback is None else playback.known(request.index, request.position)
        found.append(DecodeInput(number, UNKNOWN if token is None else token, row, request.fed + 1))
    return found if len({one.token == UNKNOWN for one in found}) == 1 else None
