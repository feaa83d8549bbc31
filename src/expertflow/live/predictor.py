"""The live predictor: predicts the experts of the coming steps of live sequences, and takes in what the steps used.

It is a forecast (`cache.forecast.Forecast`) on top of `predict.online`. `live.pacing` decides whether a step predicts
it, `live.tokens` which tokens its state lacks, `live.state_rows` where each sequence's state is. A sequence's newest
token is taken in before its own next step, or in an earlier step of other sequences. So where groups take turns, the
paths of all groups are known while one of them computes. In a captured step `predict` runs on the device, and kernels
write the true routing to `routes`. If the predictor raises, it is switched off with a warning event and generation goes
on: a forecast can cost bytes, never a token. Must not know slots.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertflow.cache.forecast import Step
from expertflow.cache.horizon import hazards, take_turns, unite
from expertflow.cache.policy import Outlook
from expertflow.events import Event, EventKind, EventStream
from expertflow.live import prompts
from expertflow.live.batch import PredictorBatch
from expertflow.live.pacing import Pacing
from expertflow.live.state_rows import StateRows
from expertflow.live.tokens import NewestTokens
from expertflow.predict.network import OUTPUTS
from expertflow.predict.online import OnlinePredictor
from expertflow.predict.state import to_device
from expertflow.trace.owners import NO_SEQUENCE, BatchOwners, NextBatch

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_REMEMBERED = 1024
"""Tokens after which a faded average has all but forgotten: the slowest fades by .99 a token."""


class _Pass(NamedTuple):
    """The forward pass that runs: its number, each token's state row, and where the parts of prompts in the rows begin.

    None of the last: it is a decode step, whose tokens are taken in already.
    """

    number: int
    rows: npt.NDArray[np.int64]
    begins: dict[int, int] | None


class _LastBatch(NamedTuple):
    """The sequences of the last decode step and their state rows, while they keep them."""

    sequences: tuple[int, ...]
    rows: list[int]


class LivePredictor:
    """Predicts for the live sequences.

    Args:
        online: the predictor, with a state row for every KV row.
        events: takes the warning event if the predictor is switched off.
        aside: entered while the predictor works, so that a predictor in host memory does not count as device memory.
        room: tokens of prompts taken in at once.

    Attributes:
        artifact: the trained predictor.
        pacing: whether the next step predicts.
        routes: int32 `[C + 1, L, K]` on the predictor's device, each row's experts in its last step; E where unknown.
        probabilities: float32 `[C + 1, O, L, E]` there, of each row's next step, and within the horizons behind it.
        failure: why the predictor was switched off, or None.
        listener: called with a state row, the place of a part of its prompt, and the part's true routes `[t, L, K]`; or None.
    """

    per_token, foreknown = True, False

    def __init__(
        self,
        online: OnlinePredictor,
        events: EventStream,
        aside: Callable[[], AbstractContextManager[object]] = nullcontext,
        room: int = 1 << 30,
    ) -> None:
        """Start without sequences."""
        self._online, self._events, self._aside, self._room = online, events, aside, room
        self.artifact = online.artifact
        self._layers, self._experts, self._top_k = online.artifact.shape
        self.pacing = Pacing()
        self._owners, self._tokens, self._rows = BatchOwners(), NewestTokens(), StateRows(online.rows)
        self._last: _LastBatch | None = None
        rows, device = online.rows + 1, online.device
        shape = rows, self._layers, self._top_k
        self.routes = torch.full(shape, self._experts, dtype=torch.int32, device=device)
        self.probabilities = torch.zeros(rows, OUTPUTS, self._layers, self._experts, device=device)
        self._pass = _no_pass()
        self.failure: str | None = None
        self.listener: Callable[[int, int, npt.NDArray[np.uint16]], None] | None = None

    @property
    def recalled(self) -> int:
        """Tokens before a restart that the state depends on: all it can look at, and all that its faded averages still weigh."""
        return max(_REMEMBERED, self._online.state.tokens.shape[1])

    def unknown(self, count: int) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
        """Routes `[count, L, K]` that are not known."""
        shape = count, self._layers, self._top_k
        if self._experts < 256:
            return np.full(shape, self._experts, dtype=np.uint8)
        return np.full(shape, self._experts, dtype=np.uint16)

    @property
    def sequences(self) -> int:
        """C, sequences that may live at once."""
        return self._online.rows

    @property
    def spare(self) -> int:
        """A state row of no sequence, for padding."""
        return self._online.spare

    def state_rows(self, sequences: Sequence[int]) -> list[int]:
        """State row of each sequence; the spare row for sequences without one."""
        if self._last is not None and tuple(sequences) == self._last.sequences:
            return self._last.rows
        return self._rows.of(sequences)

    def expect(self, coming: NextBatch) -> None:
        """Take note of the next steps' sequences and their KV rows. A sequence number is never used again."""
        self._owners.expect(coming)
        if self._last is not None and tuple(coming.sequences) == self._last.sequences:
            return  # they have their rows
        self._guarded(Step(-1), lambda: self._clear(self._rows.add(coming.sequences, coming.rows)))

    def recall(self, sequence: int, row: int, tokens: Sequence[int], routes: npt.NDArray[np.integer]) -> None:
        """Begin a sequence in a KV row with tokens that no pass reads, and their routes `[N, L, K]`; E where not known."""

        def begin() -> None:
            self._clear(self._rows.add([sequence], [row]))
            rows, given = np.full(len(tokens), row), np.asarray(tokens, dtype=np.int64)
            prompts.take_in(self._online, self.routes, rows, given, routes, self._room)

        self._guarded(Step(-1), begin)

    def leave(self, sequences: Sequence[int]) -> None:
        """Forget sequences; their KV rows may go to others."""
        self._guarded(Step(-1), lambda: self._forget([number for number in sequences if number in self._rows]))

    def sampled(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        """Take note of the newest token of each sequence. Sampled tokens come in by this method only."""
        known = self._rows.rows
        self._tokens.sampled(
            {number: token for number, token in zip(sequences, tokens, strict=True) if number in known}
        )

    def steps_again(self, sequences: Sequence[int]) -> bool:
        """Whether these are the last step's sequences, in its order, and all their tokens were taken in."""
        return self._last is not None and tuple(sequences) == self._last.sequences and not self._tokens.pending

    def took(self, sequences: Sequence[int]) -> bool:
        """Whether the newest tokens of these were taken in."""
        return not any(number in self._tokens.pending for number in sequences)

    def outlook(self, step: Step) -> Outlook | None:
        """Demand of the pass and of the steps behind it; None for prompts, and if its tokens or sequences are not known."""
        return self._guarded(step, lambda: self._outlook(step))

    def learn(self, step: Step) -> None:
        """Take in what the pass used, and the tokens of prompts."""
        self._guarded(step, lambda: self._learn(step))

    def paths(self, sequences: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Probability that each sequence's next token uses an expert, `[N, L, E]`; None if one is not known, or while paused."""
        return self._guarded(Step(-1), lambda: self._paths(sequences))

    def usual(self, tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """Mean probability that a prompt's token uses an expert, `[L, E]`, predicted from the tokens alone."""
        given = np.asarray(tokens, dtype=np.int64)
        return self._guarded(Step(-1), lambda: self._online.usual(self._tensor(given)).cpu().numpy())

    def next_batch(self, room: int) -> PredictorBatch | None:
        """State rows and tokens for the expected step; None if the predictor does not know all its sequences.

        The caller passes `updated` and `tokens` to `predict` before it reads `probabilities` of the groups, or to `update`
        while the predictor is paused.

        Args:
            room: tokens that the caller can take in; if there are more, the others are taken in at once.
        """
        return self._guarded(Step(-1), lambda: self._next_batch(room))

    def predict(self, rows: Tensor, tokens: Tensor) -> bool:
        """Take newest tokens in, and write what their steps will use to `probabilities`.

        Args:
            rows: int64 `[B]`, state rows, each once, but for the spare one.
            tokens: int64 `[B]`, their newest tokens.

        Returns:
            False once the predictor is switched off.
        """
        return self._guarded(Step(-1), lambda: self._predict(rows, tokens)) is not None

    def update(self, rows: Tensor, tokens: Tensor) -> None:
        """Take newest tokens in as `predict` does; `probabilities` stay as they are."""
        self._guarded(Step(-1), lambda: self._online.update(rows, tokens, self.routes[rows]))

    def switch_off(self, step: int, reason: str) -> None:
        """Stop using the predictor, and give the reason in a warning and an event."""
        self.failure = reason
        _LOG.warning("the predictor failed in step %d and is switched off: %s", step, reason)
        self._events.emit(Event(EventKind.PREDICTOR_OFF, step, reason=reason))

    def _guarded(self, step: Step, work: Callable[[], _T]) -> _T | None:
        if self.failure is not None:
            return None
        try:
            with self._aside():
                return work()
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, generation goes on without it
            self.switch_off(step.number, f"{type(error).__name__}: {error}")
            return None

    def _next_batch(self, room: int) -> PredictorBatch | None:
        coming, tokens, predicts = self._owners.coming, self._tokens, not self.pacing.paused
        sequences = tuple(coming.sequences)
        last = self._last
        if last is not None and self._is_last(coming) and len(sequences) <= room:
            _, newest = tokens.take_all(predicted=predicts)
            return PredictorBatch(last.rows, newest, [last.rows] if predicts else [])
        now = [number for number in sequences if number in self._rows]
        numbers, newest = tokens.take(now, predicted=predicts)
        rows = self._rows.of(numbers)
        if len(now) < len(sequences) or not all(tokens.updated(number) for number in now):
            self._take_in(rows, newest)
            return None
        self._take_in(rows[room:], newest[room:])
        self._last = _LastBatch(sequences, self._rows.of(now))
        predicts = predicts and all(tokens.predicted(number) for number in now)
        turns = (now, *coming.following) if predicts else ()
        groups = [self._rows.of([number for number in turn if tokens.predicted(number)]) for turn in turns]
        return PredictorBatch(rows[:room], newest[:room], [group for group in groups if group])

    def _is_last(self, coming: NextBatch) -> bool:
        """Whether the last step's sequences step again, and they alone have pending tokens: then nothing has to be looked up."""
        if self._last is None or coming.following:
            return False
        return tuple(coming.sequences) == self._last.sequences == tuple(self._tokens.pending)

    def _predict(self, rows: Tensor, tokens: Tensor) -> bool:
        answer = self._online.step(rows, tokens, self.routes[rows])
        self.probabilities[rows] = torch.cat([answer.demand[:, None], answer.within], dim=1)
        return True

    def _take_in(self, rows: list[int], tokens: list[int]) -> None:
        """Take tokens in now, outside a captured step, and predict unless paused. What these tokens use is not known yet."""
        if not rows:
            return
        state_rows, newest = self._tensor(np.array(rows)), self._tensor(np.array(tokens))
        if self.pacing.paused:
            self._online.update(state_rows, newest, self.routes[state_rows])
        else:
            self._predict(state_rows, newest)
        self.routes[state_rows] = self._experts

    def _paths(self, sequences: Sequence[int]) -> npt.NDArray[np.float32] | None:
        if self.pacing.paused:
            return None
        numbers, newest = self._tokens.take_only(sequences, predicted=True)
        self._take_in(self._rows.of(numbers), newest)
        if not all(self._tokens.predicted(number) for number in sequences):
            return None
        found: npt.NDArray[np.float32] = self.probabilities[self._rows.of(sequences), 0].cpu().numpy()
        return found

    def _forget(self, sequences: list[int]) -> None:
        self._last = None
        rows = [self._rows.remove(number) for number in sequences]
        for number in sequences:
            self._tokens.forget(number)
        # the pass that is not learned from yet may have had their tokens
        self._pass.rows[np.isin(self._pass.rows, rows)] = NO_SEQUENCE

    def _clear(self, rows: list[int]) -> None:
        if rows:
            self._online.free(rows)
            self.routes[self._tensor(np.array(rows))] = self._experts

    def _begin_pass(self, step: Step) -> None:
        """Find the state rows of a pass's tokens."""
        self._pass = _no_pass()
        if step.tokens is None:
            return
        self._pass = _no_pass(step.number)
        coming = self._owners.coming
        rows = self._rows.of_tokens(self._owners.take(len(step.tokens)))
        if np.any(rows != NO_SEQUENCE):
            begins = None if coming.lengths is None else dict(zip(coming.rows, coming.begins, strict=False))
            self._pass = _Pass(step.number, rows, begins)

    def _outlook(self, step: Step) -> Outlook | None:
        self._begin_pass(step)
        if self._pass.begins is not None or not len(self._pass.rows):
            return None  # prompts use most experts: for them, counts keep what a forecast would keep
        batch = self._next_batch(self.sequences)
        if batch is None:
            return None
        self._take_in(batch.updated, batch.tokens)
        if not batch.groups:
            return None
        each = self.probabilities.cpu().numpy()
        return Outlook(take_turns([hazards(unite(each[group])) for group in batch.groups]))

    def _learn(self, step: Step) -> None:
        if self._pass.number != step.number:  # a pass that needs every expert asks for no outlook
            self._begin_pass(step)
        rows, begins = self._pass.rows, self._pass.begins
        if step.tokens is None or len(rows) != len(step.tokens):
            return
        routes = step.routes
        if routes is None:
            routes = np.full((len(step.tokens), self._layers, self._top_k), self._experts, dtype=np.uint16)
        if begins is None:
            self.pacing.count(step.loads, 1, step.ahead, step.found)
            live = np.flatnonzero(rows != NO_SEQUENCE)
            self.routes[self._tensor(rows[live])] = self._tensor(routes[live]).int()
        else:
            prompts.take_in(self._online, self.routes, rows, step.tokens, routes, self._room)
            if self.listener is not None:
                for row, begin in begins.items():
                    self.listener(row, begin, routes[rows == row])

    def _tensor(self, values: npt.NDArray[np.integer]) -> Tensor:
        return to_device(values, self._online.device)


def _no_pass(number: int = -1) -> _Pass:
    return _Pass(number, np.zeros(0, dtype=np.int64), None)
