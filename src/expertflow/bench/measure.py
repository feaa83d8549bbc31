"""The measurement: every strategy on the same prompts, tokens and weights, alternating, beside its bounds.

For each number of slots all contenders are made. Each is run once with an empty cache (cold), and once for every batch
size to warm up. Then the timed runs alternate, forwards and backwards, so that a machine that slows down slows all of
them. Every run's greedy tokens are compared with those of the model with all experts in slots. Must not know how a
contender works and how results are shown.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from expertflow.bench.about import about
from expertflow.bench.presets import Settings
from expertflow.bench.recorded import BeladyBound, Recording, belady, read_recording
from expertflow.bench.result import COLD, LONG, RESIDENT, WARM, ModelFacts, Result, Row
from expertflow.bench.rows import Bounds, belady_row, resident_row, strategy_row
from expertflow.bench.shared_host import Contender, Run, SharedHost
from expertflow.bench.workload import PromptSet, Tokens, read_prompt_set
from expertflow.cache.strategy import find_strategy
from expertflow.engine.llm import shipped_model
from expertflow.engine.text import load_tokenizer
from expertflow.errors import BudgetError, ConfigError, PredictorError
from expertflow.models.files.checkpoint import resolve
from expertflow.models.weights.sources import WeightsSource
from expertflow.units import parse_slots

Report = Callable[[str, int, int], None]
"""Called with the progress: what is being done, runs done, runs in all."""


def measure(settings: Settings, command: str, report: Report, weights: WeightsSource | None = None) -> Result:
    """Run everything in the settings.

    Args:
        settings: the run.
        command: makes it again; for the result.
        report: called with the progress.
        weights: where the weights come from; None: the folder's files.

    Raises:
        ExpertFlowError: for a model, prompts or options that cannot be used; before anything long begins.
    """
    began = time.perf_counter()
    folder = resolve(shipped_model() if settings.model is None else settings.model)
    workload = read_prompt_set(
        settings.prompts_file, load_tokenizer(folder), long_prompt=settings.long_prompt, seed=settings.seed
    )
    host = SharedHost(folder, settings, workload, weights)
    try:
        _check_slots(settings, host)
        measuring = _Measuring(host, settings, workload, report, began)
        measuring.bounds()
        for slots in settings.slots:
            measuring.strategies(slots)
        measuring.close()
        plan = host.plan
        name = Path(settings.model or folder).absolute().name  # a Hugging Face id lies in a folder with another name
        facts = ModelFacts(
            name=name, model_type=plan.shape.model_type, layers=plan.shape.layers, experts=plan.shape.experts,
            top_k=plan.shape.top_k, dtype=plan.shape.dtype, row_bytes=plan.record_bytes, dense_bytes=plan.dense,
            fingerprint=host.fingerprint, predictor_bytes=measuring.predictor_bytes,
        )  # fmt: skip
        config = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
        found = about(plan.device)
        return Result(
            preset=settings.preset, command=command, date=found.date, commit=found.commit, seed=settings.seed,
            config={**config, "model": name, "predictor": Path(settings.predictor).name, "prompts": workload.source},
            machine=found.machine, versions=found.versions, model=facts, link_gbps=measuring.link_gbps,
            rows=tuple(measuring.rows), complete=not measuring.left_out, left_out=tuple(measuring.left_out),
            seconds=round(time.perf_counter() - began, 1),
        )  # fmt: skip
    finally:
        host.close()


def _check_slots(settings: Settings, host: SharedHost) -> None:
    """Refuse numbers of slots that cannot hold one token's experts, before anything long begins.

    Raises:
        ConfigError: then.
    """
    shape = host.plan.shape
    for text in settings.slots:
        if parse_slots(text, shape.layers - len(host.plan.slot_layout.large), shape.experts) < shape.top_k:
            raise ConfigError(
                f"slots={text!r} is less than one layer's need: a token uses {shape.top_k} experts a layer",
                f"Use {shape.top_k} or more.",
            )


class _Whole(NamedTuple):
    """A model with every expert in a slot: its memory, and its timed runs by batch."""

    contender: Contender
    peak: int
    runs: dict[int, list[Run]]


class _Measuring:
    """Rows and references measured so far."""

    def __init__(self, host: SharedHost, settings: Settings, workload: PromptSet, report: Report, began: float) -> None:
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.predictor_bytes = 0
        self._host, self._settings, self._workload = host, settings, workload
        self._report, self._began, self._done, self._besides = report, began, 0, 0
        self._batches = sorted(settings.batches)
        self._runs = settings.repeats + 1 + (1 if settings.long_prompt else 0)  # the first warms up
        self._recordings: dict[int, Recording] = {}
        self._truth: dict[tuple[str, int, int], tuple[Tokens, ...]] = {}
        self._whole: dict[str, _Whole] = {}
        self.link_gbps = host.link_gbps()

    # --- what bounds the rest

    def bounds(self) -> None:
        """Measure what bounds all rows: every expert resident. Record the routing of every run."""
        for execution in self._settings.executions:
            self._reference(execution)

    def _reference(self, execution: str) -> None:
        """The model with every expert in a slot: its tokens are the truth, its speed is a bound."""
        try:
            contender = self._host.contender("next-use", "100%", execution)
        except BudgetError as error:
            self._leave_out(f"{RESIDENT}: {error.what}")
            self._stand_in()
            return
        if contender.plan.execution in self._whole:
            contender.close()
            return
        self._find_truth(contender)
        self._whole[contender.plan.execution] = _Whole(contender, contender.peak, {})

    def _stand_in(self) -> None:
        """Compare with the tokens of on-demand loading, where the device cannot hold every expert."""
        self._find_truth(self._host.owner)

    def _find_truth(self, contender: Contender) -> None:
        """Every run of every batch, once; a run that is recorded is the host execution's truth as well."""
        for batch in self._batches:
            if batch not in self._recordings:
                self._record(contender, batch)
            if (contender.plan.execution, batch, 0) not in self._truth:
                self._besides += self._runs
                for number in range(self._runs):
                    self._truth[contender.plan.execution, batch, number] = self._run(contender, batch, number).tokens

    def _record(self, contender: Contender, batch: int) -> None:
        """The routing of every run of a batch, in order; it also brings every expert that will be used to its slot."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "runs.trace"
            with contender.record(path):
                for number in range(self._runs):
                    self._truth["host", batch, number] = self._run(contender, batch, number).tokens
            self._recordings[batch] = read_recording(path)

    def close(self) -> None:
        """Write the all-resident models' rows and close them."""
        for execution, (contender, peak, timed) in list(self._whole.items()):
            for batch in self._batches:
                runs = timed.get(batch, [])
                if not runs and not self._late():  # it is closed before it was timed
                    runs = [self._run(contender, batch, number) for number in range(1, self._settings.repeats + 1)]
                if runs:
                    self.rows.append(resident_row(contender.plan, batch, runs, peak))
            del self._whole[execution]
            contender.close()

    # --- the strategies

    def strategies(self, slots: str) -> None:
        """Every strategy with so many slots."""
        if self._late():
            self.left_out.append(f"slots {slots}: the deadline")
            return
        contenders: list[tuple[Contender, dict[int, int]]] = []
        try:
            for strategy, execution in self._columns():
                if self._late():
                    self.left_out.append(f"{strategy}, slots {slots}: the deadline")
                    continue
                contender = self._contender(strategy, slots, execution)
                if contender is not None:
                    contenders.append((contender, {}))
                    self._first_contact(*contenders[-1])
            if contenders:
                for batch in self._batches:
                    plan = contenders[0][0].plan
                    least = belady(self._recordings[batch], plan.slots, self._settings.repeats, plan.slot_layout.large)
                    self._take_turns(contenders, batch, least)
                self._after_long(contenders)
        finally:
            for contender, _ in contenders:
                contender.close()

    def _contender(self, strategy: str, slots: str, execution: str) -> Contender | None:
        """A contender; where the device is full, the all-resident model makes room and is not measured beside it any more."""
        try:
            contender = self._host.contender(strategy, slots, execution)
            if (contender.plan.execution, self._batches[0], 0) not in self._truth:
                contender.close()  # the reference must not be made beside it: its peak would count the reference's memory
                self._reference(contender.plan.execution)
                contender = self._host.contender(strategy, slots, execution)
        except BudgetError as error:
            if self._whole:
                self.close()
                self._leave_out(f"{RESIDENT} beside {slots} slots: the device cannot hold both")
                return self._contender(strategy, slots, execution)
            self._leave_out(f"{strategy}, slots {slots}: {error.what}")
            return None
        return contender

    def _columns(self) -> Iterator[tuple[str, str]]:
        """Strategy and execution of every contender."""
        for execution in self._settings.executions:
            for name in self._settings.strategies:
                strategy = find_strategy(name)
                if strategy.predicted and not self._has_predictor():
                    self._leave_out(f"{name}: the model has no predictor")
                else:
                    yield name, execution

    def _has_predictor(self) -> bool:
        if not self.predictor_bytes and self._settings.predictor != "none":
            self.predictor_bytes = self._host.predictor_bytes()
        return self.predictor_bytes > 0

    def _leave_out(self, what: str) -> None:
        if what not in self.left_out:
            self.left_out.append(what)

    def _first_contact(self, contender: Contender, peaks: dict[int, int]) -> None:
        """Once with an empty cache, once for every batch: what is measured here is the peak, and the cold run."""
        nothing = Bounds(None, None, self.link_gbps)
        for batch in self._batches:
            run = self._run(contender, batch, 0)
            peaks[batch] = contender.peak
            if batch == self._batches[0]:
                self.rows.append(self._row(contender, batch, COLD, [(0, run)], peaks[batch], nothing))

    def _take_turns(self, contenders: list[tuple[Contender, dict[int, int]]], batch: int, least: BeladyBound) -> None:
        """The timed runs, forwards and backwards, the all-resident model among them."""
        used = {contender.plan.execution for contender, _ in contenders}
        whole = [found for execution, found in self._whole.items() if execution in used]
        alternating = [*(found.contender for found in whole), *(contender for contender, _ in contenders)]
        timed: list[list[tuple[int, Run]]] = [[] for _ in alternating]
        for repeat in range(1, self._settings.repeats + 1):
            order = range(len(alternating))
            for number in order if repeat % 2 else reversed(order):
                if not self._late():
                    timed[number].append((repeat, self._run(alternating[number], batch, repeat)))
        resident = {row.execution: row for row in self.rows if row.strategy == RESIDENT and row.batch == batch}
        for found, runs in zip(whole, timed, strict=False):
            if runs:
                found.runs.setdefault(batch, []).extend(run for _, run in runs)
                row = resident_row(found.contender.plan, batch, [run for _, run in runs], found.peak)
                resident[found.contender.plan.execution] = row
        self.rows.append(belady_row(contenders[0][0].plan, batch, least))
        for (contender, peaks), runs in zip(contenders, timed[len(whole) :], strict=True):
            if len(runs) < self._settings.repeats:
                name = f"{contender.plan.strategy}, slots {contender.plan.slots}, batch {batch}"
                self.left_out.append(f"{name}: {len(runs)} of {self._settings.repeats} repeats before the deadline")
            if runs:
                limits = Bounds(resident.get(contender.plan.execution), least, self.link_gbps)
                self.rows.append(self._row(contender, batch, WARM, runs, peaks[batch], limits))

    def _after_long(self, contenders: list[tuple[Contender, dict[int, int]]]) -> None:
        """The smallest batch behind one long prompt, which has filled the cache with its own."""
        if not self._workload.long:
            return
        batch, last, nothing = self._batches[0], self._runs - 1, Bounds(None, None, self.link_gbps)
        for contender, _ in contenders:
            if self._late():
                self.left_out.append(f"{contender.plan.strategy}, slots {contender.plan.slots}, {LONG}: the deadline")
                continue
            if contender.gate is not None:
                contender.gate.follow(None)
            contender.run([self._workload.long], 2)
            run = self._run(contender, batch, last)
            self.rows.append(self._row(contender, batch, LONG, [(last, run)], contender.peak, nothing))

    def _row(
        self, contender: Contender, batch: int, state: str, numbered: list[tuple[int, Run]], peak: int, limits: Bounds
    ) -> Row:
        if contender.llm.predictor_failure:
            raise PredictorError(
                f"the predictor failed: {contender.llm.predictor_failure}", "Leave it out, or mend it."
            )
        note = f"no graph: {contender.plan.graph_unavailable_reason}" if contender.plan.graph_unavailable_reason else ""
        if contender.gate is not None:
            note = contender.gate.note + self._agreement(contender.plan.execution)
        exact: bool | None = None
        if (contender.plan.execution, batch, 0) in self._truth:
            exact = all(run.tokens == self._truth[contender.plan.execution, batch, number] for number, run in numbered)
        else:
            note = "; ".join(
                filter(None, [note, "the device cannot hold a model to compare this execution's tokens with"])
            )
        runs = [run for _, run in numbered]
        return strategy_row(contender.plan, batch, state, runs, peak, limits, exact=exact, note=note)

    def _agreement(self, execution: str) -> str:
        """How far answers of this execution are those of the host's steps, whose routing was recorded."""
        mine = {key[1:]: tokens for key, tokens in self._truth.items() if key[0] == execution != "host"}
        pairs = [pair for key, tokens in mine.items() for pair in zip(tokens, self._truth["host", *key], strict=True)]
        if not pairs:
            return ""
        same = sum(one == other for one, other in pairs) / len(pairs)
        return f"; it was recorded on the host, whose answers are the same in {same:.0%} of the sequences"

    def _run(self, contender: Contender, batch: int, number: int) -> Run:
        """One run; a simulated gate gets its recording."""
        name = f"{contender.plan.strategy}, {contender.plan.slots} slots, batch {batch}"
        self._report(name, self._done, self._total)
        self._done += 1
        if contender.gate is not None:
            recording = self._recordings[batch]
            contender.gate.follow(recording.needed[recording.runs[number]])
        return contender.run(self._workload.batch(batch, number), self._settings.tokens)

    @property
    def _total(self) -> int:
        """Estimated number of runs in all."""
        contenders = len(self._settings.slots) * len(self._settings.strategies) * len(self._settings.executions)
        whole = 1 + len(self._settings.slots) * len(self._settings.executions)
        return (whole + contenders) * len(self._batches) * self._runs + self._besides

    def _late(self) -> bool:
        deadline = self._settings.deadline
        return deadline is not None and time.perf_counter() - self._began > deadline
