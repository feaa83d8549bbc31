"""The engine: requests come and go at any step; each `step` carries out what the scheduler decides next.

`add`, `cancel`, `step`: a pass over prompts or a decode step at a time, a token of every sequence that took part.
A step that breaks has given nobody a token: its sequences step again in the next round, but those of a cohort are cancelled.
Stands between requests (`engine.request`), decisions (`schedule.scheduler`), tensors (`execution.runner`) and who sees the routing;
refuses to know how any of them works.
"""

import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertflow.engine.build import OffloadedModel
from expertflow.engine.lock import FairLock
from expertflow.engine.plan import rates
from expertflow.engine.request import Request, StreamOutput
from expertflow.engine.threads import Threads
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.execution.sampler import NO_TOKEN, choose_all
from expertflow.memory.store import memory_reported
from expertflow.predict.online import PREVIEW
from expertflow.schedule.cost import Costs, fixed_part
from expertflow.schedule.scheduler import Decode, Prefill, Scheduler
from expertflow.trace.owners import NextBatch
from expertflow.trace.recorder import Recorder

_P = ParamSpec("_P")
_R = TypeVar("_R")
_PASSES, _STEPS = 9, 64
"""Passes, and steps, whose durations say what the next ones will take."""


@dataclass(kw_only=True)
class _Running:
    """A request in the engine."""

    request: Request
    added: float
    take: Callable[[StreamOutput], None] | None
    first: float = 0.0
    usual: npt.NDArray[np.float32] | None = field(default=None)


def _weakly(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method that does not keep its object alive, for what that object owns."""
    bound = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        found = bound()
        assert found is not None, "its owner is gone"
        return found(*args, **kwargs)

    return call


class Engine:
    """Runs requests on a loaded model. Several threads may add, cancel and step.

    Args:
        offloaded: the model.

    Attributes:
        lock: held for a step or an addition, and handed on in the order in which threads asked for it.
        threads: how many the steps use.
    """

    def __init__(self, offloaded: OffloadedModel) -> None:
        """No request yet."""
        self._offloaded, plan = offloaded, offloaded.plan
        self._executor = offloaded.executor()
        self.threads = Threads(plan.record_bytes)
        asks = offloaded.live_predictor is not None and plan.schedule != "fifo"
        self._scheduler = Scheduler(
            rows=plan.max_live,
            batch=plan.max_batch,
            chunk=plan.prefill_chunk,
            policy=plan.schedule,  # type: ignore[arg-type]  # checked when it was stated
            joins=self._executor.joins,
            whole=self._executor.whole,
            top_k=plan.shape.top_k,
            rates=rates(plan),
            ask=_weakly(self._paths) if asks else None,
            preview=_weakly(self._usual) if asks else None,
            costs=_weakly(self._costs),
        )
        self._passes: deque[float] = deque(maxlen=_PASSES)
        self._turns: deque[tuple[int, float]] = deque(maxlen=_STEPS)
        self._turns_a_round = 1
        self._running: dict[int, _Running] = {}
        self._untaken: list[tuple[int, StreamOutput]] = []
        self._stepping = False
        self._to_cancel: deque[int] = deque()
        self.lock = FairLock()
        self._next = 0
        self._reread = offloaded.skeleton.reread_length
        self.recorder: Recorder | None = None

    @property
    def begun(self) -> int:
        """Requests added so far; the next one's number."""
        return self._next

    @property
    def unfinished(self) -> int:
        """Requests that wait or run, or have tokens that `step` has not returned yet."""
        live = self._running.keys() - set(self._to_cancel)
        return len(live | {number for number, _ in self._untaken})

    @property
    def step_seconds(self) -> float:
        """Median time of the last decode steps, at most 64, in seconds; 0 if there was none. First steps of a shape weigh little."""
        return statistics.median(lasted for _, lasted in self._turns) if self._turns else 0.0

    def knows(self, number: int) -> bool:
        """Whether a request waits or runs."""
        return number in self._running and number not in self._to_cancel

    def add(self, request: Request, take: Callable[[StreamOutput], None] | None = None) -> int:
        """Queue a request.

        Args:
            request: not added before.
            take: called with each of its tokens; None: they are returned by `step`.

        Returns:
            Its number, by which it can be cancelled.
        """
        with self.lock:
            number, self._next = self._next, self._next + 1
            self._running[number] = _Running(request=request, added=time.perf_counter(), take=take)
            self._scheduler.add(number, len(request.prompt_token_ids))
        return number

    def cancel(self, number: int) -> bool:
        """Forget a request, waiting or running; False if it is over, or unknown. Waits for nothing.

        While a step runs, in this thread or another, it takes effect behind that step.
        """
        if not self.knows(number):
            return False
        self._to_cancel.append(number)
        self._drop_cancelled()
        return True

    def _drop_cancelled(self) -> None:
        """Forget what was cancelled, unless a step runs: that does it at its end."""
        while self._to_cancel and self.lock.acquire(wait=False):
            try:
                if self._stepping:
                    return
                number = self._to_cancel.popleft()
                self._untaken = [one for one in self._untaken if one[0] != number]
                if number in self._running:
                    self._remove(number)
            finally:
                self.lock.release()

    def _remove(self, number: int) -> None:
        self._scheduler.remove(number)
        del self._running[number]
        if self._offloaded.live_predictor is not None:
            self._offloaded.live_predictor.leave([number])
        if not self._running:
            self._offloaded.settle()  # idle: totals and tables are the host's again

    def step(self) -> list[tuple[int, StreamOutput]]:
        """Carry out what comes next; new tokens by request number, of requests that were added without a taker.

        Also those that came while somebody else called `advance`. Empty behind a pass that ended no prompt, or if idle.

        Raises:
            ClosedError: if the model was closed.
        """
        with self.lock:
            self.advance()
            found, self._untaken = self._untaken, []
        return found

    def advance(self) -> int:
        """Carry out what comes next, and hand out the tokens; how many there were. One thread at a time.

        Raises:
            ClosedError: if the model was closed.
        """
        try:
            with self.lock, self._offloaded.on_device():
                return self._advance()
        finally:
            self._drop_cancelled()

    def _advance(self) -> int:
        self._offloaded.check_open()
        turn = self._scheduler.next()
        if turn is None:
            return 0
        began = time.perf_counter()
        self._stepping = True
        try:
            with memory_reported(), self._offloaded.meter.watch(), self.threads.step():
                count = self._prefill(turn) if isinstance(turn, Prefill) else self._decode(turn)
        except BaseException:
            if not self._executor.joins:  # what a cohort keeps may have half of the step
                self._to_cancel += turn.sequences
            raise
        finally:
            self._stepping = False
            self._drop_cancelled()
        lasted = time.perf_counter() - began
        if isinstance(turn, Prefill):
            self._passes.append(lasted)
        else:
            self._turns.append((len(turn.sequences), lasted))
            self._turns_a_round = len(turn.groups)
        return count

    def _costs(self) -> Costs:
        """What the last passes and steps took; nothing until two passes ran, since the first one is slow."""
        if len(self._passes) < 2 or not self._turns:
            return Costs(0.0, 0.0, 0.0)
        turns = self._turns_a_round
        return Costs(statistics.median_low(self._passes), fixed_part(self._turns) * turns, self.step_seconds * turns)

    def _prefill(self, turn: Prefill) -> int:
        pieces = []
        for part in turn.parts:
            tokens, row = self._running[part.sequence].request.read_ids, self._scheduler.row(part.sequence)
            read = tokens[part.begin : part.end]
            pieces.append(PromptChunk(part.sequence, read, row, part.begin, len(tokens) - part.begin - len(read)))
        self._announce(
            NextBatch(
                [piece.sequence for piece in pieces],
                [len(piece.tokens) for piece in pieces],
                padded_left=self._executor.padded_left,
            )
        )
        logits = self._executor.prefill(pieces)
        ended = [place for place, part in enumerate(turn.parts) if part.last]
        numbers = [turn.parts[place].sequence for place in ended]
        chosen = self._choose(numbers, logits[ended]) if ended else []
        self._scheduler.done(turn)
        return self._hand_out(numbers, chosen)

    def _decode(self, turn: Decode) -> int:
        fed = []
        for number in turn.sequences:
            request = self._running[number].request
            before = len(request.prompt_token_ids) if request.continues else 1  # a decoder's own first token
            position = before + len(request.token_ids) - 1
            fed.append(DecodeInput(number, request.token_ids[-1], self._scheduler.row(number), position))
        self._announce(NextBatch(turn.sequences, following=turn.groups[1:]))
        return self._hand_out(turn.sequences, self._choose(turn.sequences, self._executor.decode(fed)))

    def _announce(self, coming: NextBatch) -> None:
        for listener in (self.recorder, self._offloaded.live_predictor):
            if listener is not None:
                listener.expect(coming)

    def _choose(self, numbers: Sequence[int], logits: Tensor) -> list[int]:
        """The next token of each request; random numbers are not used up if that fails."""
        requests = [self._running[number].request for number in numbers]
        before = [(one.generator, one.generator.get_state()) for one in requests if one.params.temperature]
        try:
            return self._pick(requests, logits)
        except BaseException:
            for generator, state in before:
                generator.set_state(state)
            raise

    def _pick(self, requests: Sequence[Request], logits: Tensor) -> list[int]:
        generators = [request.generator for request in requests]
        return choose_all(logits, [request.params for request in requests], generators, self._executor.best())

    def _hand_out(self, numbers: Sequence[int], tokens: Sequence[int]) -> int:
        """Give requests their tokens, and the tokens to their takers; how many. What one raises keeps none from the others."""
        now, errors = time.perf_counter(), []
        if self._offloaded.live_predictor is not None:
            found = [place for place, token in enumerate(tokens) if token != NO_TOKEN]
            self._offloaded.live_predictor.sampled(
                [numbers[place] for place in found], [tokens[place] for place in found]
            )
        for number, token in zip(numbers, tokens, strict=True):
            one = self._running[number]
            one.first = one.first or now
            try:
                if token == NO_TOKEN:
                    output = one.request.fail()
                else:
                    output = one.request.append(token, waited=one.first - one.added, lasted=now - one.added)
                if output.output is not None or output.error is not None:
                    self._remove(number)
                elif len(one.request.read_ids) == self._reread:
                    self._read_anew(number, self._reread)
                if one.take is None:
                    self._untaken.append((number, output))
                else:
                    one.take(output)
            except Exception as error:  # noqa: BLE001 - a tokenizer's or a taker's; raised below
                errors.append(error)
                if number in self._running:
                    self._to_cancel.append(number)
        if errors:
            raise errors[0]
        return len(tokens)

    def _read_anew(self, number: int, length: int) -> None:
        """A sequence's rotary table changes at this length: what was cached by the old one is made again."""
        self._scheduler.reread(number, length)
        if self._offloaded.live_predictor is not None:
            self._offloaded.live_predictor.leave([number])

    def _paths(self, numbers: Sequence[int]) -> npt.NDArray[np.floating] | None:
        """How likely the next token of live sequences uses each expert."""
        assert self._offloaded.live_predictor is not None
        self._offloaded.controller.end_step()  # the routing of a pass by the host is learned from behind it
        return self._offloaded.live_predictor.paths(numbers)

    def _usual(self, numbers: Sequence[int]) -> npt.NDArray[np.floating] | None:
        """What requests, live or waiting, are likely to use as far as their prompts say."""
        said = []
        for number in numbers:
            one = self._running[number]
            if one.usual is None:
                assert self._offloaded.live_predictor is not None
                one.usual = self._offloaded.live_predictor.usual(one.request.prompt_token_ids[-PREVIEW:])
            if one.usual is None:
                return None
            said.append(one.usual)
        return np.stack(said)
