"""The measurement: every strategy on the same prompts, tokens and weights, in turns, beside its bounds.

For each number of slots all seats are made; each is run once with an empty cache (cold) and once for every batch size to warm
up; then the timed runs take turns, forwards and backwards, so that a machine that slows down slows everybody. Every run's
greedy tokens are compared with those of the model with all experts in slots. Knows what is measured and in which order;
refuses to know how a seat works and how results are shown.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from expertflow.bench.about import commit, machine, versions
from expertflow.bench.bed import Bed, Run, Seat
from expertflow.bench.presets import Settings
from expertflow.bench.recorded import Least, Recording, belady, read_recording
from expertflow.bench.result import COLD, LONG, RESIDENT, WARM, ModelFacts, Result, Row
from expertflow.bench.rows import Bounds, belady_row, resident_row, strategy_row
from expertflow.bench.workload import Tokens, Workload, make_workload
from expertflow.cache.strategy import find_strategy
from expertflow.engine.llm import shipped_model
from expertflow.engine.text import load_tokenizer
from expertflow.errors import BudgetError, ConfigError, PredictorError
from expertflow.models.files.checkpoint import resolve
from expertflow.units import parse_slots

Tell = Callable[[str, int, int], None]
"""Told of progress: what is being done, runs done, runs in all."""


def measure(settings: Settings, command: str, tell: Tell) -> Result:
    """Run everything the settings ask for.

    Args:
        settings: the run.
        command: makes it again; for the result.
        tell: told of progress.

    Raises:
        ExpertFlowError: for a model, prompts or options that cannot be used; before anything long begins.
    """
    began = time.perf_counter()
    folder = resolve(shipped_model() if settings.model is None else settings.model)
    workload = make_workload(
        settings.prompts_file, load_tokenizer(folder), long_prompt=settings.long_prompt, seed=settings.seed
    )
    bed = Bed(folder, settings, workload)
    try:
        _check_slots(settings, bed)
        measuring = _Measuring(bed, settings, workload, tell, began)
        measuring.bounds()
        for slots in settings.slots:
            measuring.strategies(slots)
        measuring.close()
        plan = bed.plan
        name = Path(settings.model or folder).absolute().name  # a Hugging Face id lies in a folder with another name
        facts = ModelFacts(
            name=name, model_type=plan.shape.model_type, layers=plan.shape.layers, experts=plan.shape.experts,
            top_k=plan.shape.top_k, dtype=plan.shape.dtype, row_bytes=plan.record_bytes, dense_bytes=plan.dense,
            fingerprint=bed.fingerprint, predictor_bytes=measuring.predictor_bytes,
        )  # fmt: skip
        config = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
        return Result(
            preset=settings.preset, command=command, date=time.strftime("%Y-%m-%d"), commit=commit(), seed=settings.seed,
            config={**config, "model": name, "predictor": Path(settings.predictor).name, "prompts": workload.source},
            machine=machine(plan.device), versions=versions(), model=facts, link_gbps=measuring.link_gbps,
            rows=tuple(measuring.rows), complete=not measuring.left_out, left_out=tuple(measuring.left_out),
            seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
    finally:
        bed.close()


def _check_slots(settings: Settings, bed: Bed) -> None:
    """Refuse numbers of slots that cannot hold one token's experts, before anything long begins.

    Raises:
        ConfigError: then.
    """
    shape = bed.plan.shape
    for text in settings.slots:
        if parse_slots(text, shape.layers, shape.experts) < shape.top_k:
            raise ConfigError(
                f"slots={text!r} is less than one layer's need: a token uses {shape.top_k} experts a layer",
                f"Use {shape.top_k} or more.",
            )


class _Whole(NamedTuple):
    """A model with every expert in a slot: its memory, and its timed runs by batch."""

    seat: Seat
    peak: int
    runs: dict[int, list[Run]]


class _Measuring:
    """What is known so far."""

    def __init__(self, bed: Bed, settings: Settings, workload: Workload, tell: Tell, began: float) -> None:
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.predictor_bytes = 0
        self._bed, self._settings, self._workload = bed, settings, workload
        self._tell, self._began, self._done, self._besides = tell, began, 0, 0
        self._batches = sorted(settings.batches)
        self._runs = settings.repeats + 1 + (1 if settings.long_prompt else 0)  # the first warms up
        self._recordings: dict[int, Recording] = {}
        self._truth: dict[tuple[str, int, int], tuple[Tokens, ...]] = {}
        self._whole: dict[str, _Whole] = {}
        self.link_gbps = bed.link_gbps()

    # --- what bounds the rest

    def bounds(self) -> None:
        """Everybody's bound: all experts resident; and the routing of every run, recorded."""
        for execution in self._settings.executions:
            self._reference(execution)

    def _reference(self, execution: str) -> None:
        """The model with every expert in a slot: its tokens are the truth; its speed, measured in turns, is a bound."""
        try:
            seat = self._bed.seat("next-use", "100%", execution)
        except BudgetError as error:
            self._leave_out(f"{RESIDENT}: {error.what}")
            self._stand_in()
            return
        if seat.plan.execution in self._whole:
            seat.close()
            return
        self._find_truth(seat)
        self._whole[seat.plan.execution] = _Whole(seat, seat.peak, {})

    def _stand_in(self) -> None:
        """Where the device cannot hold every expert, on-demand loading gives the tokens to compare with."""
        self._find_truth(self._bed.owner)

    def _find_truth(self, seat: Seat) -> None:
        """Every run of every batch, once; a run that is recorded is the host execution's truth as well."""
        for batch in self._batches:
            if batch not in self._recordings:
                self._record(seat, batch)
            if (seat.plan.execution, batch, 0) not in self._truth:
                self._besides += self._runs
                for number in range(self._runs):
                    self._truth[seat.plan.execution, batch, number] = self._run(seat, batch, number).tokens

    def _record(self, seat: Seat, batch: int) -> None:
        """The routing of every run of a batch, in order; it also brings every expert that will be used to its slot."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "runs.trace"
            with seat.record(path):
                for number in range(self._runs):
                    self._truth["host", batch, number] = self._run(seat, batch, number).tokens
            self._recordings[batch] = read_recording(path)

    def close(self) -> None:
        """Let the all-resident models go, their rows written."""
        for execution, (seat, peak, timed) in list(self._whole.items()):
            for batch in self._batches:
                runs = timed.get(batch, [])
                if not runs and not self._late():  # it has to go before its turns came
                    runs = [self._run(seat, batch, number) for number in range(1, self._settings.repeats + 1)]
                if runs:
                    self.rows.append(resident_row(seat.plan, batch, runs, peak))
            del self._whole[execution]
            seat.close()

    # --- the strategies

    def strategies(self, slots: str) -> None:
        """Every strategy with so many slots."""
        if self._late():
            self.left_out.append(f"slots {slots}: the deadline")
            return
        seats: list[tuple[Seat, dict[int, int]]] = []
        try:
            for strategy, execution in self._columns():
                if self._late():
                    self.left_out.append(f"{strategy}, slots {slots}: the deadline")
                    continue
                seat = self._seat(strategy, slots, execution)
                if seat is not None:
                    seats.append((seat, {}))
                    self._first_contact(*seats[-1])
            if seats:
                for batch in self._batches:
                    least = belady(self._recordings[batch], seats[0][0].plan.slots, self._settings.repeats)
                    self._take_turns(seats, batch, least)
                self._after_long(seats)
        finally:
            for seat, _ in seats:
                seat.close()

    def _seat(self, strategy: str, slots: str, execution: str) -> Seat | None:
        """A seat; where the device is full, the all-resident model makes room and is not measured beside it any more."""
        try:
            seat = self._bed.seat(strategy, slots, execution)
            if (seat.plan.execution, self._batches[0], 0) not in self._truth:
                seat.close()  # the reference must not be made beside it: its peak would count the reference's memory
                self._reference(seat.plan.execution)
                seat = self._bed.seat(strategy, slots, execution)
        except BudgetError as error:
            if self._whole:
                self.close()
                self._leave_out(f"{RESIDENT} beside {slots} slots: the device cannot hold both")
                return self._seat(strategy, slots, execution)
            self._leave_out(f"{strategy}, slots {slots}: {error.what}")
            return None
        return seat

    def _columns(self) -> Iterator[tuple[str, str]]:
        """Strategy and execution of every seat."""
        for execution in self._settings.executions:
            for name in self._settings.strategies:
                row = find_strategy(name)
                if row.predicted and not self._has_predictor():
                    self._leave_out(f"{name}: the model has no predictor")
                else:
                    yield name, execution

    def _has_predictor(self) -> bool:
        if not self.predictor_bytes and self._settings.predictor != "none":
            self.predictor_bytes = self._bed.predictor_bytes()
        return self.predictor_bytes > 0

    def _leave_out(self, what: str) -> None:
        if what not in self.left_out:
            self.left_out.append(what)

    def _first_contact(self, seat: Seat, peaks: dict[int, int]) -> None:
        """Once with an empty cache, once for every batch: what is measured here is the peak, and the cold run."""
        nothing = Bounds(None, None, self.link_gbps)
        for batch in self._batches:
            run = self._run(seat, batch, 0)
            peaks[batch] = seat.peak
            if batch == self._batches[0]:
                self.rows.append(self._row(seat, batch, COLD, [(0, run)], peaks[batch], nothing))

    def _take_turns(self, seats: list[tuple[Seat, dict[int, int]]], batch: int, least: Least) -> None:
        """The timed runs, forwards and backwards, the all-resident model among them."""
        used = {seat.plan.execution for seat, _ in seats}
        whole = [found for execution, found in self._whole.items() if execution in used]
        everybody = [*(found.seat for found in whole), *(seat for seat, _ in seats)]
        timed: list[list[tuple[int, Run]]] = [[] for _ in everybody]
        for repeat in range(1, self._settings.repeats + 1):
            order = range(len(everybody))
            for number in order if repeat % 2 else reversed(order):
                if not self._late():
                    timed[number].append((repeat, self._run(everybody[number], batch, repeat)))
        resident = {row.execution: row for row in self.rows if row.strategy == RESIDENT and row.batch == batch}
        for found, runs in zip(whole, timed, strict=False):
            if runs:
                found.runs.setdefault(batch, []).extend(run for _, run in runs)
                row = resident_row(found.seat.plan, batch, [run for _, run in runs], found.peak)
                resident[found.seat.plan.execution] = row
        self.rows.append(belady_row(seats[0][0].plan, batch, least))
        for (seat, peaks), runs in zip(seats, timed[len(whole) :], strict=True):
            if len(runs) < self._settings.repeats:
                name = f"{seat.plan.strategy}, slots {seat.plan.slots}, batch {batch}"
                self.left_out.append(f"{name}: {len(runs)} of {self._settings.repeats} repeats before the deadline")
            if runs:
                limits = Bounds(resident.get(seat.plan.execution), least, self.link_gbps)
                self.rows.append(self._row(seat, batch, WARM, runs, peaks[batch], limits))

    def _after_long(self, seats: list[tuple[Seat, dict[int, int]]]) -> None:
        """The smallest batch behind one long prompt, which has filled the cache with its own."""
        if not self._workload.long:
            return
        batch, last, nothing = self._batches[0], self._runs - 1, Bounds(None, None, self.link_gbps)
        for seat, _ in seats:
            if self._late():
                self.left_out.append(f"{seat.plan.strategy}, slots {seat.plan.slots}, {LONG}: the deadline")
                continue
            if seat.gate is not None:
                seat.gate.follow(None)
            seat.run([self._workload.long], 2)
            run = self._run(seat, batch, last)
            self.rows.append(self._row(seat, batch, LONG, [(last, run)], seat.peak, nothing))

    def _row(
        self, seat: Seat, batch: int, state: str, numbered: list[tuple[int, Run]], peak: int, limits: Bounds
    ) -> Row:
        if seat.llm.predictor_failure:
            raise PredictorError(f"the predictor failed: {seat.llm.predictor_failure}", "Leave it out, or mend it.")
        note = f"no graph: {seat.plan.graph_unavailable_reason}" if seat.plan.graph_unavailable_reason else ""
        if seat.gate is not None:
            note = seat.gate.note + self._agreement(seat.plan.execution)
        exact: bool | None = None
        if (seat.plan.execution, batch, 0) in self._truth:
            exact = all(run.tokens == self._truth[seat.plan.execution, batch, number] for number, run in numbered)
        else:
            note = "; ".join(
                filter(None, [note, "the device cannot hold a model to compare this execution's tokens with"])
            )
        runs = [run for _, run in numbered]
        return strategy_row(seat.plan, batch, state, runs, peak, limits, exact=exact, note=note)

    def _agreement(self, execution: str) -> str:
        """How far answers of this execution are those of the host's steps, whose routing was recorded."""
        mine = {key[1:]: tokens for key, tokens in self._truth.items() if key[0] == execution != "host"}
        pairs = [pair for key, tokens in mine.items() for pair in zip(tokens, self._truth["host", *key], strict=True)]
        if not pairs:
            return ""
        same = sum(one == other for one, other in pairs) / len(pairs)
        return f"; it was recorded on the host, whose answers are the same in {same:.0%} of the sequences"

    def _run(self, seat: Seat, batch: int, number: int) -> Run:
        """One run; a simulated gate is told which."""
        name = f"{seat.plan.strategy}, {seat.plan.slots} slots, batch {batch}"
        self._tell(name, self._done, self._total)
        self._done += 1
        if seat.gate is not None:
            recording = self._recordings[batch]
            seat.gate.follow(recording.needed[recording.runs[number]])
        return seat.run(self._workload.batch(batch, number), self._settings.tokens)

    @property
    def _total(self) -> int:
        """Runs in all, as far as one can say."""
        seats = len(self._settings.slots) * len(self._settings.strategies) * len(self._settings.executions)
        whole = 1 + len(self._settings.slots) * len(self._settings.executions)
        return (whole + seats) * len(self._batches) * self._runs + self._besides

    def _late(self) -> bool:
        deadline = self._settings.deadline
        return deadline is not None and time.perf_counter() - self._began > deadline
