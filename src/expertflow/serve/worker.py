"""The one thread that owns an engine: it loads the model, takes commands between two steps, and hands outputs out.

1. `Worker.submit` (in the thread of an event loop) checks the bounds, and sends requests to the inbox.
2. The thread takes all commands of the inbox, then runs one pass or step.
3. The outputs of a step go to the event loop in one call; there each goes to the outbox of its HTTP request.
4. `Worker.cancel` sends a command too: it takes effect before the next step.

Must not know HTTP and the shapes of answers.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Protocol

from expertflow.serve.live.snapshots import Snapshot, Snapshots
from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.writers.parts import Shaper

if TYPE_CHECKING:
    from expertflow.engine.engine import Engine
    from expertflow.engine.llm import LLM
    from expertflow.engine.request import Request, StreamOutput
    from expertflow.serve.grammar import Grammars

_log = logging.getLogger(__name__)
_FAULTS = 2
"""Steps that fail one after another, from which on every request is given up."""
_LONGEST_RETRY = 60
"""Seconds that a client is asked to wait at most."""


@dataclass(kw_only=True)
class Loading:
    """How far loading is.

    Attributes:
        phase: what is done now: `starting`, `reading`, `loading`, `preparing`, `ready`, or `failed`.
        done: bytes of experts that are in host memory.
        total: of all bytes; 0: not known yet.
        shaper: what is known of the model's answers, once it is ready.
        link: bytes a second that loads of experts reach alone, measured before the first request; 0: not known.
        grammars: makes grammars for the model, once it is ready.
    """

    phase: str = "starting"
    done: int = 0
    total: int = 0
    shaper: Shaper = field(default_factory=Shaper)
    link: float = 0.0
    grammars: "Grammars | None" = None


class Bounds(NamedTuple):
    """What may wait for its first token.

    Attributes:
        requests: sequences.
        tokens: of their prompts.
    """

    requests: int = 256
    tokens: int = 2_000_000


class Watcher(Protocol):
    """Is told what clients get, in the event loop's thread."""

    def output(self, ticket: "Ticket", output: "StreamOutput") -> None:
        """An output came."""

    def step(self, tokens: int) -> None:
        """A pass or step gave tokens."""

    def forget(self, tickets: "Sequence[Ticket]") -> None:
        """Sequences were cancelled or have failed."""


class Item(NamedTuple):
    """What an outbox holds: an output of one choice, or the error that ended all."""

    choice: int
    output: "StreamOutput | None"
    error: BaseException | None = None


class Outbox:
    """The outputs of the requests of one HTTP request, in order. Belongs to the event loop that made it."""

    def __init__(self) -> None:
        """Create an empty one."""
        self.loop = asyncio.get_running_loop()
        self.tickets: list[Ticket] = []
        self._items: deque[Item] = deque()
        self._filled = asyncio.Event()
        self._due: float | None = None
        """When somebody who waits wants to be told that nothing came; None: nobody waits."""
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: Item) -> None:
        """Add an item."""
        self._items.append(item)
        self._filled.set()

    async def take(self, seconds: float | None = None) -> list[Item]:
        """Wait for an item, and take all that are there; none if that many seconds pass first."""
        if not self._items and seconds is not None:
            self._due = self.loop.time() + seconds
            if self._timer is None:  # it outlasts many items: one each would cost as much as what is sent
                self._timer = self.loop.call_later(seconds, self._look)
        try:
            await self._filled.wait()
        finally:
            self._due = None
        self._filled.clear()
        items = list(self._items)
        self._items.clear()
        return items

    def _look(self) -> None:
        """The timer: wake who has waited long enough."""
        self._timer = None
        if self._due is None:
            return
        left = self._due - self.loop.time()
        if left > 0:
            self._timer = self.loop.call_later(left, self._look)
        else:
            self._filled.set()


@dataclass(eq=False)
class Ticket:
    """One sequence on its way.

    Attributes:
        request: the engine's.
        choice: its place among the sequences of its HTTP request.
        outbox: where its outputs go.
        came: when it was submitted, by `time.perf_counter`.
        waiting: whether it has no token yet.
        number: the engine's, once it is there. Only the worker's thread writes it.
        dropped: whether it was cancelled before it came to the engine.
    """

    request: "Request"
    choice: int
    outbox: Outbox
    came: float = field(default_factory=time.perf_counter)
    waiting: bool = True
    number: int | None = None
    dropped: bool = False


class Worker:
    """Owns an engine. Made and used in the thread of an event loop; `start` begins its own thread.

    Args:
        load: loads the model, in the worker's thread; it may say in its argument how far it is.
        bounds: what may wait.
        watcher: is told what clients get, for metrics; None: nobody is.

    Attributes:
        loading: how far loading is.
        refused: requests that were refused, by reason.
    """

    def __init__(
        self,
        load: "Callable[[Loading], LLM]",
        bounds: Bounds | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        """Create a worker that has not begun."""
        self._load, self._bounds, self._watcher = load, bounds or Bounds(), watcher
        self.loading = Loading()
        self.refused: dict[str, int] = {"queue": 0, "draining": 0, "loading": 0}
        self._llm: LLM | None = None
        self._error: BaseException | None = None
        self._draining, self._drained = False, 0.0
        self._live: set[Ticket] = set()
        self._seconds_a_request = 1.0
        self._inbox: SimpleQueue[Callable[[Engine], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        # the worker's thread alone uses what follows
        self._running: dict[int, Ticket] = {}
        self._fresh: list[tuple[Ticket, Item]] = []
        self._faults = 0
        self._snapshots = Snapshots()

    def start(self) -> None:
        """Load the model in the worker's thread, then serve."""
        self._thread.start()

    @property
    def error(self) -> BaseException | None:
        """Why loading failed, or None."""
        return self._error

    @property
    def latest(self) -> Snapshot | None:
        """The last snapshot, or None."""
        return self._snapshots.latest

    @property
    def alive(self) -> bool:
        """Whether the worker's thread has not ended."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server ends."""
        return self._draining

    @property
    def waiting(self) -> int:
        """Sequences that have no token yet."""
        return sum(ticket.waiting for ticket in self._live)

    @property
    def running(self) -> int:
        """Sequences that have a token, and are not over."""
        return len(self._live) - self.waiting

    @property
    def llm(self) -> "LLM":
        """The loaded model.

        Raises:
            ApiError: while it is being loaded, if that failed, or if the server ends.
        """
        if self._draining:
            self.refused["draining"] += 1
            raise ApiError(503, "the server is shutting down", "Try another one.", code="shutting_down", retry=5)
        if self._error is not None:
            raise ApiError(503, "the model could not be loaded", "See the server's log.", code="loading_failed")
        if self._llm is None:
            self.refused["loading"] += 1
            raise ApiError(
                503, "the model is still being loaded", "Ask /health how far it is.", code="loading", retry=2
            )
        return self._llm

    def submit(self, requests: "Sequence[Request]") -> Outbox:
        """Queue the requests of one HTTP request.

        Args:
            requests: not submitted before.

        Returns:
            Where their outputs come.

        Raises:
            ApiError: if too much waits already, or the server ends.
        """
        assert self.llm
        waiting = [ticket for ticket in self._live if ticket.waiting]
        tokens = sum(len(one.prompt_token_ids) for one in (*(ticket.request for ticket in waiting), *requests))
        if waiting and (len(waiting) + len(requests) > self._bounds.requests or tokens > self._bounds.tokens):
            self.refused["queue"] += 1
            retry = min(_LONGEST_RETRY, max(1, math.ceil(self._seconds_a_request)))
            raise ApiError(
                503, f"{len(waiting)} requests wait already", f"Try again in {retry} s.", code="overloaded", retry=retry
            )
        outbox = Outbox()
        outbox.tickets = [Ticket(request, choice, outbox) for choice, request in enumerate(requests)]
        self._live.update(outbox.tickets)
        self._inbox.put(partial(self._add, outbox.tickets))
        return outbox

    def cancel(self, outbox: Outbox) -> None:
        """End what is not over of an HTTP request; nothing comes to its outbox any more."""
        left = [ticket for ticket in outbox.tickets if ticket in self._live]
        self._live.difference_update(left)
        if self._watcher is not None:
            self._watcher.forget(left)
        for ticket in left:
            ticket.dropped = True
        if left:
            self._inbox.put(partial(self._cancel, left))

    async def snapshot(self, seconds: float = 1.0) -> Snapshot | None:
        """What the engine has done, read between two steps, at most once a second; the last one if a step takes longer than `seconds`."""
        if self._llm is not None and self._thread.is_alive():
            found: Future[None] = Future()
            self._inbox.put(partial(self._read, found))
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(found), seconds)
        return self.latest

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for those that run, and cancel what is left after that many seconds."""
        self._draining = True
        self._drained = time.monotonic() + seconds
        while self._live and time.monotonic() < self._drained:  # noqa: ASYNC110 - twice in a server's life
            await asyncio.sleep(0.02)
        left = list(self._live)
        for ticket in left:
            ticket.outbox.put(
                Item(ticket.choice, None, ApiError(503, "the server is shutting down", code="shutting_down"))
            )
        for outbox in {ticket.outbox for ticket in left}:
            self.cancel(outbox)

    def hurry(self) -> None:
        """Let `drain` wait no longer."""
        self._drained = 0.0

    async def close(self) -> None:
        """End the thread and free the model's memory; a model that is still being loaded is not waited for."""
        self._draining = True
        self._inbox.put(None)
        if self._thread.is_alive() and self._llm is not None:
            await asyncio.to_thread(self._thread.join)

    # in the event loop's thread

    def _deliver(self, fresh: list[tuple[Ticket, Item]]) -> None:
        if self._watcher is not None and (tokens := sum(item.output is not None for _, item in fresh)):
            self._watcher.step(tokens)
        for ticket, item in fresh:
            if ticket not in self._live:
                continue
            over = item.error is not None
            if item.output is not None:
                if ticket.waiting:
                    self._seconds_a_request += 0.1 * (time.perf_counter() - ticket.came - self._seconds_a_request)
                if self._watcher is not None:
                    self._watcher.output(ticket, item.output)
                ticket.waiting = False
                over = item.output.output is not None or item.output.error is not None
            if over:
                self._live.discard(ticket)
                if self._watcher is not None:
                    self._watcher.forget([ticket])
            ticket.outbox.put(item)

    # in the worker's thread

    def _work(self) -> None:
        try:
            llm = self._load(self.loading)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the model is told
            self.loading.phase, self._error = "failed", error
            return
        with llm:
            self.loading.phase, self._llm = "ready", llm
            while self._serve(llm.engine):
                pass

    def _serve(self, engine: "Engine") -> bool:
        """Take commands, run a step, hand outputs out; False once the thread is to end."""
        commands = [] if engine.unfinished else [self._inbox.get()]
        with suppress(Empty):
            while True:
                commands.append(self._inbox.get_nowait())
        for command in commands:
            if command is None:
                return False
            command(engine)
        self._snapshots.show(wait=False)
        if engine.unfinished:
            self._step(engine)
        self._hand_out()
        self._snapshots.show(wait=True)
        return True

    def _step(self, engine: "Engine") -> None:
        try:
            engine.advance()
            self._faults = 0
        except Exception as error:  # noqa: BLE001 - the clients are told, and the server goes on
            _log.error("a step failed", exc_info=error)
            self._faults = (self._faults + 1) % _FAULTS
            for number, ticket in list(self._running.items()):
                if self._faults == 0 or not engine.knows(number):
                    self._give_up(ticket, error)
                    engine.cancel(number)

    def _add(self, tickets: Sequence[Ticket], engine: "Engine") -> None:
        for ticket in tickets:
            if ticket.dropped:
                continue
            try:
                ticket.number = engine.add(ticket.request, partial(self._take, ticket))
                self._running[ticket.number] = ticket
            except Exception as error:  # noqa: BLE001 - the client is told
                self._give_up(ticket, error)

    def _cancel(self, tickets: Sequence[Ticket], engine: "Engine") -> None:
        for ticket in tickets:
            if ticket.number is not None and self._running.pop(ticket.number, None) is not None:
                engine.cancel(ticket.number)

    def _read(self, found: "Future[None]", engine: "Engine") -> None:  # noqa: ARG002 - a command's signature
        assert self._llm is not None
        self._snapshots.ask(found, self._llm)

    def _take(self, ticket: Ticket, output: "StreamOutput") -> None:
        """The engine's channel of a ticket."""
        if output.output is not None or output.error is not None:
            assert ticket.number is not None
            self._running.pop(ticket.number, None)
        self._fresh.append((ticket, Item(ticket.choice, output, output.error)))

    def _give_up(self, ticket: Ticket, error: BaseException) -> None:
        self._fresh.append((ticket, Item(ticket.choice, None, error)))
        if ticket.number is not None:
            self._running.pop(ticket.number, None)

    def _hand_out(self) -> None:
        """Send what is new to the event loops: one call a loop, and there is one loop but in tests."""
        fresh, self._fresh = self._fresh, []
        for loop in {ticket.outbox.loop for ticket, _ in fresh}:
            with suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(self._deliver, [one for one in fresh if one[0].outbox.loop is loop])
