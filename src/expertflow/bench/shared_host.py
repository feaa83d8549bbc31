"""One checkpoint's experts in host memory once, the models that compute with them, and timed runs.

All contenders of a host have the same weights, dtype, batch and length, so that only slots, strategy and execution
differ. On CUDA the allocator's peak is of the whole process. A contender's own peak is the rise since the contender was
made, so read it before the next contender is made.
"""

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from expertflow.bench.presets import Settings
from expertflow.bench.recorded import RecordedForecast, RecordedGate, RecordedLayers
from expertflow.bench.workload import PromptSet, Tokens
from expertflow.cache.policy import layer_order
from expertflow.cache.strategy import find_strategy
from expertflow.config import EngineConfig, SamplingParams
from expertflow.engine.llm import LLM
from expertflow.engine.prepare import prepare
from expertflow.events import CacheCounters
from expertflow.models.weights.sources import WeightsSource

_PROBES, _PROBE_BYTES = 5, 1 << 28
_LARGEST_PASS = 512


class Run(NamedTuple):
    """One timed run; counts are of its decoding steps, unless stated otherwise.

    Attributes:
        tokens: what was generated, sequence by sequence.
        first_seconds: until every sequence had its first token.
        decode_seconds: from there to the end.
        decoded: tokens in that time.
        hits: needs that were in their slot when their layer ran.
        kept: of these, those no load was made for.
        needed: needs.
        moved: bytes moved.
        kept_all: as `kept`, prompts included.
        needed_all: as `needed`, prompts included.
    """

    tokens: tuple[Tokens, ...]
    first_seconds: float
    decode_seconds: float
    decoded: int
    hits: int
    kept: int
    needed: int
    moved: int
    kept_all: int
    needed_all: int


def _kept(cache: CacheCounters) -> int:
    return cache.hits - cache.prefetch_hits


class Contender:
    """A loaded model with its slots and its strategy."""

    def __init__(self, llm: LLM, gate: RecordedForecast | None, others: int) -> None:
        """Wrap a model that was just loaded.

        Args:
            llm: the model.
            gate: the forecast that reads a recording, if its strategy has one.
            others: bytes of device memory that were in use before and stay so.
        """
        self.llm, self.gate, self._others = llm, gate, others
        self.plan = llm.plan

    @property
    def peak(self) -> int:
        """Device memory in use at most, bytes, of this contender alone; read it before the next contender is made."""
        return self.llm.stats.peak_bytes - self._others

    def run(self, prompts: Sequence[Tokens], tokens: int) -> Run:
        """Generate greedily, to the last token, and count.

        Args:
            prompts: token ids, at most `max_batch`.
            tokens: new tokens of each sequence.
        """
        out: list[list[int]] = [[] for _ in prompts]
        start, began = self.llm.stats.cache, time.perf_counter()
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        middle, before = began, CacheCounters()
        for count, item in enumerate(self.llm.stream(prompts, params), 1):
            out[item.index].append(item.token_id)
            if count == len(prompts):
                before, middle = self.llm.stats.cache, time.perf_counter()
        ended = time.perf_counter()
        after = self.llm.stats.cache
        return Run(
            tokens=tuple(map(tuple, out)),
            first_seconds=middle - began,
            decode_seconds=ended - middle,
            decoded=sum(map(len, out)) - len(prompts),
            hits=after.hits - before.hits,
            kept=_kept(after) - _kept(before),
            needed=after.accesses - before.accesses,
            moved=after.bytes_moved - before.bytes_moved,
            kept_all=_kept(after) - _kept(start),
            needed_all=after.accesses - start.accesses,
        )

    def record(self, path: Path) -> AbstractContextManager[None]:
        """Record the routing of what runs inside; the host execution then shows it."""
        return self.llm.record(path)

    def close(self) -> None:
        """Free the device memory."""
        self.llm.close()
        del self.llm
        release()


def release() -> None:
    """Free memory that no object uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class SharedHost:
    """Where contenders are made.

    Args:
        folder: the checkpoint.
        settings: the run.
        workload: what will be generated from.
        weights: where the weights come from; None: the folder's files.
    """

    def __init__(
        self, folder: Path, settings: Settings, workload: PromptSet, weights: WeightsSource | None = None
    ) -> None:
        """Load the experts."""
        self.folder, self.settings, self._weights = folder, settings, weights
        batch, longest = max(settings.batches), max(workload.longest, len(workload.long))
        self._library = library_bytes(settings.device)
        self._common: dict[str, Any] = {
            "max_batch": batch, "max_length": longest + settings.tokens, "device": settings.device, "dtype": settings.dtype,
            "expert_format": settings.expert_format,
            "prefill_chunk": min(_LARGEST_PASS, workload.longest * batch),
        }  # fmt: skip
        self._owner = LLM(
            folder,
            strategy="on-demand",
            slots="1/layer",
            execution="host",
            predictor="none",
            progress=True,
            weights=weights,
            **self._common,
        )
        self.plan = self._owner.plan

    @property
    def owner(self) -> Contender:
        """The contender that holds the experts: on-demand, a slot a layer. It lives as long as the host."""
        return Contender(self._owner, None, 0)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint."""
        return self._owner.fingerprint

    def contender(self, strategy: str, slots: str, execution: str) -> Contender:
        """A model with these slots, strategy and execution.

        Raises:
            ExpertFlowError: as `LLM`.
        """
        release()
        others = torch.cuda.memory_allocated() - self._library if self.plan.device == "cuda" else 0
        entry = find_strategy(strategy)
        gate: RecordedForecast | None = None
        if entry.needs_future:
            gate = RecordedGate(self.settings.gate_recall, self.settings.seed)
        predictor = self.settings.predictor if entry.predicted else "none"
        options = {"strategy": strategy, "slots": slots, "execution": execution, "predictor": predictor, **self._common}
        if entry.policy is layer_order and self.plan.shape.encoder_decoder:
            config = EngineConfig.from_mapping(options)
            if (
                prepare(self.folder, config, weights=self._weights).plan.execution == "host"
            ):  # a graph is made for the layers its steps reach
                gate = RecordedLayers()
        return Contender(LLM(self.folder, forecast=gate, beside=self._owner, **options), gate, others)

    def predictor_bytes(self) -> int:
        """The network of the predictor that strategies with one would use, in memory; 0 if the model has none.

        Raises:
            PredictorError: if it is damaged, of another model, or named and not there.
        """
        config = EngineConfig.from_mapping({**self._common, "predictor": self.settings.predictor, "strategy": "plec"})
        artifact = prepare(self.folder, config, weights=self._weights).predictor
        return 0 if artifact is None else sum(int(value.nbytes) for value in artifact.model.state_dict().values())

    def link_gbps(self) -> float:
        """Copies of one record's size to the device, back to back, 10^9 bytes a second; the best of a few tries."""
        plan, store = (
            self.plan,
            self._owner.shared_weights.store.buffer,
        )  # page-locked records, as the engine moves them
        first = next(layer for layer in range(plan.shape.layers) if layer not in plan.shape.records.large)
        store = store[first * plan.shape.experts :][: plan.shape.experts if plan.shape.records.large else None]
        records = max(1, min(len(store), _PROBE_BYTES // self.plan.record_bytes))
        room = torch.empty(self.plan.record_bytes, dtype=torch.uint8, device=self.plan.device)
        best = 0.0
        for _ in range(_PROBES):
            _wait(self.plan.device)
            began = time.perf_counter()
            for number in range(records):
                room.copy_(store[number], non_blocking=True)
            _wait(self.plan.device)
            best = max(best, records * self.plan.record_bytes / (time.perf_counter() - began) / 1e9)
        return best

    def close(self) -> None:
        """Free everything; every contender has to be closed before."""
        self._owner.close()
        release()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def library_bytes(device: str) -> int:
    """Bytes that the matrix library keeps in the allocator from its first call on.

    They belong to no model, but every model needs them. 0 on a CPU.
    """
    if device == "cpu" or not torch.cuda.is_available():
        return 0
    before = torch.cuda.memory_allocated()
    square = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    product = square @ square
    del square, product
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before
