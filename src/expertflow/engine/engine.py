"""The engine: a service that runs requests, which come and go between its steps.

A request's life:
1. `RequestFactory` makes it of a prompt (`engine.text`).
2. `add` queues it and notes its channel.
3. The scheduler gives it a KV row, when one is free (`schedule.scheduler`).
4. Prefill passes read its prompt, a chunk each; the last one gives the first token.
5. Each decode step gives one more token to every sequence of its batch (`execution.runner`).
6. Every token goes to the channel as a `StreamOutput`; `step` returns those of requests that were added without a channel.
7. The last `StreamOutput` carries the finished request; the KV row is free again.
8. `cancel` ends a request earlier.

A step that raises gives no token: its sequences step again later, except those of a cohort, which are cancelled. The tokens of the step
before one that was begun ahead are sent in any case. Must not know how scheduler, executor and predictor work.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from expertflow.engine.build import OffloadedModel
from expertflow.engine.plan import rates
from expertflow.engine.request import Channel, Request, StreamOutput, Totals
from expertflow.engine.stepping.ahead import UNKNOWN, Ahead, Begun, Read, Unsent, inputs_behind
from expertflow.engine.stepping.lock import FairLock
from expertflow.engine.stepping.routes import Routes
from expertflow.engine.stepping.running import Running, keep, weakly
from expertflow.engine.stepping.threads import Threads
from expertflow.errors import ConfigError
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.replay import Replay
from expertflow.execution.runner import PromptChunk
from expertflow.execution.sampler import Chosen, Sampler
from expertflow.memory.store import memory_reported
from expertflow.schedule.admission import check_admission, make_admission
from expertflow.schedule.cost import Durations
from expertflow.schedule.scheduler import Decode, Prefill, Scheduler, check_schedule
from expertflow.trace.owners import NextBatch
from expertflow.trace.recorder import Recorder


class Engine:
    """Runs requests on a loaded model. Several threads may add, cancel and step.

    Args:
        offloaded: the model.
        admission: when waiting requests get KV rows, an entry of `schedule.admission.ADMISSIONS`.
        routing: recorded sequences that requests replay, by their `index`; None: the router decides, and tokens are the model's.

    Attributes:
        lock: taken during a step or an addition; threads get it in the order in which they came.
        threads: how many the steps use.
        recorder: gets the tokens of every step; None: no trace is recorded.
        ahead: the step that has begun before the tokens of the one before are known.
    """

    def __init__(self, offloaded: OffloadedModel, admission: str = "pays", routing: Replay | None = None) -> None:
        """Create an engine without requests."""
        self._offloaded, plan = offloaded, offloaded.plan
        self._executor, self._prefixes = offloaded.executor(), offloaded.prefixes
        self._playback = None if routing is None else offloaded.playback(routing)
        self._sampler = Sampler(offloaded.device)
        self._watcher: Callable[[Sequence[int], Tensor], None] | None = None
        self.threads = Threads(plan.record_bytes)
        self._running: dict[int, Running] = {}
        self._routes = Routes(offloaded, self._running)
        self._begin(plan.schedule, admission)
        self._outbox: list[tuple[int, StreamOutput]] = []
        self._totals = Totals()
        self._stepping, self.ahead = False, Ahead()
        self._to_cancel: deque[int] = deque()
        self.lock = FairLock()
        self._next = 0
        self._reread = offloaded.skeleton.reread_length
        self.recorder: Recorder | None = None

    def _begin(self, schedule: str, admission: str) -> None:
        """Make a scheduler; durations of passes and steps are not known yet."""
        plan, predicts = self._offloaded.plan, self._offloaded.live_predictor is not None and schedule != "fifo"
        self._durations = Durations()
        self._scheduler = Scheduler(
            rows=plan.max_live,
            batch=plan.max_batch,
            chunk=plan.prefill_chunk,
            policy=schedule,  # type: ignore[arg-type]  # checked when it was stated
            joins=self._executor.joins,
            whole=self._executor.whole,
            unequal=self._executor.unpadded,
            prompts=1 if plan.batch_invariant else plan.max_batch,
            even=not plan.batch_invariant,
            top_k=plan.shape.top_k,
            rates=rates(plan),
            expected=weakly(self._routes.paths) if predicts else None,
            preview=weakly(self._routes.usual) if predicts else None,
            admission=make_admission(admission, self._durations.costs),
            pages=None if plan.kv_layout is None else plan.kv_layout.pages,
            page=1 if plan.kv_layout is None else plan.kv_layout.page,
            beginnings=self._prefixes,
            pace=plan.pace,
        )

    def reschedule(self, schedule: str = "fifo", admission: str = "pays") -> None:
        """Begin anew with other rules, while no request waits or runs. The cache keeps its residents.

        Args:
            schedule: how live sequences are grouped, as in `EngineConfig`.
            admission: an entry of `schedule.admission.ADMISSIONS`.

        Raises:
            ConfigError: for an unknown rule, one that needs a predictor where there is none, or while requests run.
        """
        with self.lock:
            if self.unfinished:
                raise ConfigError(f"{self.unfinished} requests are in the engine", "Change its rules when it is idle.")
            check_schedule(schedule, predicted=self._offloaded.live_predictor is not None)
            check_admission(admission)
            self._begin(schedule, admission)

    @property
    def begun(self) -> int:
        """Requests added so far; the next one's number."""
        return self._next

    @property
    def unfinished(self) -> int:
        """Requests that wait or run, or have tokens that `step` has not returned yet."""
        live = self._running.keys() - set(self._to_cancel)
        return len(live | {number for number, _ in self._outbox})

    @property
    def totals(self) -> Totals:
        """Totals so far, as a copy. Reading them waits for no step and changes nothing."""
        found = self._prefixes
        return replace(self._totals, prefix_cache_queries=found.queries, prefix_cache_hits=found.hits)

    @property
    def step_seconds(self) -> float:
        """Median time of the last decode steps, at most 64, in seconds; 0 if there was none. First steps of a shape weigh little."""
        return self._durations.step_seconds

    @property
    def kv_share(self) -> float:
        """Share of the pages of keys and values that live requests have, 0 to 1; of the rows where there are no pages."""
        return self._scheduler.taken

    def watch_logits(self, watcher: Callable[[Sequence[int], Tensor], None] | None) -> None:
        """Call `watcher` with requests' numbers and their logits `[B, V]`, before the next tokens are chosen; None: no more.

        The logits are valid inside the call only, and must not be changed. Memory that the watcher takes on a CPU is not counted.
        """
        self._watcher = watcher

    def knows(self, number: int) -> bool:
        """Whether a request waits or runs."""
        return number in self._running and number not in self._to_cancel

    def add(self, request: Request, channel: Channel | None = None) -> int:
        """Queue a request.

        Args:
            request: not added before.
            channel: called with each of its outputs, in the thread that steps, under the lock; None: `step` returns them.

        Returns:
            Its number, by which it can be cancelled.

        Raises:
            ConfigError: if it has no recording to replay, or runs beyond its end; or if its keys and values can never fit.
        """
        if self._playback is not None:
            self._playback.check(request.index, len(request.prompt_token_ids) + request.limit - 1)
        with self.lock:
            number = self._next
            self._scheduler.add(number, len(request.prompt_token_ids), request.kept)
            self._prefixes.expect(number, request)
            self._next += 1
            channel = partial(keep, self._outbox, number) if channel is None else channel
            self._running[number] = Running(request=request, added=time.perf_counter(), channel=channel)
            self._totals.prompt_tokens += len(request.prompt_token_ids)
        return number

    def cancel(self, number: int) -> bool:
        """End a request, waiting or running. Waits for nothing but, behind the last request, for a step that has begun.

        While a step runs, in this thread or another, it takes effect after that step.

        Returns:
            False if the request is over, or unknown.
        """
        if not self.knows(number):
            return False
        self._to_cancel.append(number)
        self._drop_cancelled()
        return True

    def _drop_cancelled(self) -> None:
        """Remove cancelled requests, unless a step runs: it removes them at its end."""
        while self._to_cancel and self.lock.acquire(wait=False):
            try:
                if self._stepping:
                    return
                number = self._to_cancel.popleft()
                self._outbox[:] = [entry for entry in self._outbox if entry[0] != number]
                if number in self._running:
                    self._remove(number)
                    self._settle()
            finally:
                self.lock.release()

    def _remove(self, number: int) -> None:
        row = self._scheduler.row(number) if self._scheduler.lives(number) else None
        self._scheduler.remove(number)
        self._prefixes.leave(number, self._running[number].request.read_ids[:-1])
        if row is not None:
            self._executor.leave(row)
        del self._running[number]
        if self._offloaded.live_predictor is not None:
            self._offloaded.live_predictor.leave([number])

    def _settle(self) -> None:
        """Without requests, totals and tables are the host's again, and nothing has begun."""
        if not self._running:
            self.ahead.forget()
            self._offloaded.settle()

    def step(self) -> list[tuple[int, StreamOutput]]:
        """Run the next pass or step.

        Returns:
            New outputs of requests that were added without a channel, with their numbers; also those that came while another
            thread called `advance`. Empty if there was nothing to do, or after a pass that ended no prompt.

        Raises:
            ClosedError: if the model was closed.
        """
        with self.lock:
            self.advance()
            outputs, self._outbox[:] = list(self._outbox), []
        return outputs

    def advance(self) -> int:
        """Run the next pass or step, one thread at a time, and send the tokens to their channels.

        Returns:
            How many tokens there were.

        Raises:
            ClosedError: if the model was closed.
        """
        try:
            with self.lock, self._offloaded.on_device():
                began = time.perf_counter()
                try:
                    return self._advance()
                finally:
                    self._totals.seconds += time.perf_counter() - began
        finally:
            self._drop_cancelled()

    def _advance(self) -> int:
        self._offloaded.check_open()
        if (unsent := self.ahead.unsent) is not None:  # what was interrupted comes first
            return self._stepped(partial(self._send_unsent, unsent))
        begun, left = self.ahead.take(self._running)
        task = Decode((left,)) if left else self._scheduler.next()
        if task is None:
            return 0
        began = time.perf_counter()
        try:
            if isinstance(task, Prefill):
                count = self._stepped(partial(self._prefill, task))
            else:
                count = self._stepped(partial(self._decode, task, begun))
        except BaseException:
            if not self._executor.joins:  # a cohort's cache may contain half of the step
                self._to_cancel += task.sequences
                self._drop_cancelled()
            raise
        lasted = time.perf_counter() - began
        if isinstance(task, Prefill):
            self._durations.add_pass(lasted)
        else:
            self._durations.add_step(len(task.sequences), lasted, steps_a_round=len(task.groups))
        return count

    def _stepped(self, work: Callable[[], int]) -> int:
        """Do the work of a pass or step; cancelled requests leave behind it."""
        self._stepping = True
        try:
            with memory_reported(), self._offloaded.meter.watch(), self.threads.step():
                return work()
        finally:
            self._stepping = False
            self._drop_cancelled()
            self._settle()

    def _prefill(self, task: Prefill) -> int:
        chunks = []
        for part in task.parts:
            request, row = self._running[part.sequence].request, self._scheduler.row(part.sequence)
            tokens, request.begun = request.read_ids, request.begun or time.perf_counter()
            read = tokens[part.begin : part.end]
            if self._playback is not None and part.begin == 0:
                self._playback.begin(request.index, row)
            scored = request.unscored(part.begin, part.end)
            chunks.append(
                PromptChunk(part.sequence, read, row, part.begin, len(tokens) - part.end, request.kept, scored)
            )
        batch = NextBatch(
            [chunk.sequence for chunk in chunks], [len(chunk.tokens) for chunk in chunks], padded_left=self._executor.padded_left,
            rows=[chunk.row for chunk in chunks], joined=self._executor.unpadded, begins=[chunk.begin for chunk in chunks],
        )  # fmt: skip
        self._announce(batch)
        with self._offloaded.passes.lock:  # callers of the model itself wait
            logits = self._executor.prefill(chunks, partial(self._score, task))
        ended = [place for place, part in enumerate(task.parts) if part.last]
        numbers = [task.parts[place].sequence for place in ended]
        chosen = self._choose(numbers, logits[ended], self._executor.best()) if ended else None
        self._scheduler.done(task)
        if chosen is not None:
            self.ahead.unsent = Unsent(numbers, [self._running[one].request.position for one in numbers], Read(chosen))
        return 0 if self.ahead.unsent is None else self._send_unsent(self.ahead.unsent)

    def _score(self, task: Prefill, place: int, begin: int, logits: Tensor) -> None:
        self._running[task.parts[place].sequence].request.score(begin, logits)

    def _decode(self, task: Decode, begun: Begun | None) -> int:
        numbers = task.sequences
        requests = {number: self._running[number].request for number in numbers}
        rows = [self._scheduler.row(number) for number in numbers]
        if begun is None:
            inputs = zip(requests.items(), rows, strict=True)
            fed = [DecodeInput(number, one.token_ids[-1], row, one.fed) for (number, one), row in inputs]
            begun = self._begin_step(task, fed)
        begun, behind = begun.of(numbers), None
        if self._watcher is None and self.recorder is None and len(task.groups) == 1 and not self._to_cancel:
            behind = inputs_behind(numbers, requests, rows, self._playback, self._reread)
        if behind is None or not (self._executor.ready(behind) and self._scheduler.repeat(numbers)):
            return self._send(numbers, self._choose(numbers, begun.logits, begun.best))
        return self._run_on(task, begun, behind)

    def _begin_step(self, task: Decode, fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> Begun:
        self._announce(NextBatch(task.sequences, following=task.groups[1:], rows=[one.row for one in fed]))
        with self._offloaded.passes.lock:
            logits = self._executor.decode(fed, tokens)
        return Begun(task.sequences, logits, self._executor.best())

    def _run_on(self, task: Decode, begun: Begun, behind: Sequence[DecodeInput]) -> int:
        """Choose a step's tokens on the device, queue the next step with them, and send them when they are known."""
        numbers, predictor = task.sequences, self._offloaded.live_predictor
        requests = [self._running[number].request for number in numbers]
        most = [one.params.logprobs for one in requests]
        unread = self._sampler.begin(begun.logits, [one.draw() for one in requests], begun.best, most)
        self.ahead.unsent = unsent = Unsent(numbers, [self._running[one].request.position for one in numbers], unread)
        try:
            if predictor is not None:
                predictor.sampled(numbers, [max(one.token, 0) for one in behind])
            self.ahead.begun = self._begin_step(task, behind, unread.tokens if behind[0].token == UNKNOWN else None)
        finally:
            count = self._send_unsent(unsent)
        return count

    def _send_unsent(self, unsent: Unsent) -> int:
        """Send the tokens that a step has chosen on the device; again, those that nobody got before an interrupt."""
        numbers, chosen = unsent.left({number: one.request.position for number, one in self._running.items()})
        predictor = self._offloaded.live_predictor
        taken = predictor is not None and not isinstance(unsent.unread, Read) and predictor.took(numbers)
        try:
            count = self._send(numbers, self._replayed(numbers, chosen), taken=taken)
        except Exception:
            self.ahead.unsent = None  # each has its token
            raise
        self.ahead.unsent = None
        return count

    def _announce(self, batch: NextBatch) -> None:
        for listener in (self.recorder, self._offloaded.live_predictor):
            if listener is not None:
                listener.expect(batch)

    def _choose(self, numbers: Sequence[int], logits: Tensor, best: Tensor | None) -> Chosen:
        """The next token of each request. If that fails, nothing is used up."""
        requests = [self._running[number].request for number in numbers]
        if self._watcher is not None:
            with self._offloaded.meter.aside():
                self._watcher(numbers, logits)
        chosen = self._replayed(numbers, self._sampler.choose(logits, [one.draw() for one in requests], best))
        return self._sampler.weighed(chosen, logits, [one.params.logprobs for one in requests])

    def _replayed(self, numbers: Sequence[int], chosen: Chosen) -> Chosen:
        """Recorded tokens in place of chosen ones."""
        if self._playback is None:
            return chosen
        pairs = zip((self._running[number].request for number in numbers), chosen.tokens, strict=True)
        return chosen._replace(tokens=[self._playback.token(one.index, one.position, token) for one, token in pairs])

    def _send(self, numbers: Sequence[int], found: Chosen, *, taken: bool = False) -> int:
        """Add tokens to their requests, and send the outputs to the channels. `taken`: the predictor has them.

        Returns:
            How many tokens there were.

        Raises:
            Exception: the first that a tokenizer or a channel raised, once every token is sent; its request is cancelled.
        """
        now, errors, tokens = time.perf_counter(), [], found.tokens
        if self._offloaded.live_predictor is not None and not taken:
            real = [place for place, token in enumerate(tokens) if token >= 0]
            self._offloaded.live_predictor.sampled(
                [numbers[place] for place in real], [tokens[place] for place in real]
            )
        for place, number in enumerate(numbers):
            try:
                self._send_one(number, found, place, now)
            except Exception as error:  # noqa: BLE001 - a tokenizer's or a channel's; raised below
                errors.append(error)
                if number in self._running:
                    self._to_cancel.append(number)
        if errors:
            raise errors[0]
        return len(tokens)

    def _send_one(self, number: int, found: Chosen, place: int, now: float) -> None:
        one, token = self._running[number], found.tokens[place]
        one.first = one.first or now
        fault = one.request.accept(token) if token >= 0 else found.faults.get(place)
        if token < 0 or fault is not None:
            output = one.request.fail(fault)
        else:
            waited, lasted = one.first - one.added, now - one.added
            output = one.request.append(token, waited=waited, lasted=lasted, logprobs=found.logprobs[place])
            self._totals.tokens += 1
        if output.output is not None or output.error is not None:
            self._remove(number)
        elif one.request.read_length == self._reread:
            self._read_anew(number, self._reread)
        if output.output is not None:
            self._totals.finished += 1
            self._totals.first_token_seconds = output.output.first_token_seconds
        one.channel(output)

    def _read_anew(self, number: int, length: int) -> None:
        """Queue a sequence to be read again from its beginning, because its rotary table changes at this length."""
        self._scheduler.reread(number, length)
        if self._offloaded.live_predictor is not None:
            self._offloaded.live_predictor.leave([number])
