"""The Python front door: `LLM(model, gpu_memory="6GiB").generate([...])` and `.stream(...)`.

Loads a model, makes requests of prompts, and drives the engine until they are over. Must not know batches and tensors.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expertflow.cache.forecast import Forecast
from expertflow.config import EngineConfig, SamplingParams
from expertflow.engine.build import OffloadedModel
from expertflow.engine.engine import Engine
from expertflow.engine.inputs import is_messages, split_prompts
from expertflow.engine.plan import Plan
from expertflow.engine.prepare import SHIPPED_MODEL, prepare
from expertflow.engine.request import Request, RequestOutput, StreamOutput, Totals
from expertflow.engine.stepping.threads import limit_threads
from expertflow.engine.text import ModelText, RequestFactory, end_tokens
from expertflow.errors import CancelledError, ConfigError, PromptError, RequestError, UnsupportedModelError
from expertflow.events import CacheCounters, EventStream
from expertflow.execution.captured.view import CacheView, Coming
from expertflow.execution.replay import Replay
from expertflow.execution.sampling.masks import TokenMask
from expertflow.formats.table import FORMATS, Formats
from expertflow.models.weights.sources import SharedWeights, WeightsSource
from expertflow.predict.artifact import Artifact
from expertflow.progress import Progress
from expertflow.schedule.admission import check_admission
from expertflow.trace.format import Header, TraceWriter
from expertflow.trace.recorder import Recorder

_SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of a generation config that say how to choose tokens, and mean the same in `SamplingParams`."""


def shipped_model() -> Path:
    """The folder of the model that comes with the package."""
    return SHIPPED_MODEL


@dataclass(kw_only=True)
class RunStats(Totals):
    """What generation cost so far: the engine's totals, device memory and the expert cache.

    Attributes:
        peak_bytes: measured peak of device memory.
        cache: what the expert cache did.
    """

    peak_bytes: int = 0
    cache: CacheCounters

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def link_gbps(self) -> float:
        """GB (10^9) a second over the link, on average of all that time."""
        return self.cache.bytes_moved / self.seconds / 1e9 if self.seconds else 0.0


class LLM:
    """A model inside a memory budget. Several threads may call it: their requests share its batches.

    The reference of its output is stock transformers with `experts_implementation="eager"`, which is not its default.

    Torch computes with no more threads than the process has processors (affinity and control groups), and with one where
    experts are small. `OMP_NUM_THREADS` or an earlier `torch.set_num_threads` is kept, see `engine.stepping.threads`.

    Args:
        model: checkpoint folder, GGUF file, or Hugging Face id; None: the shipped model.
        forecast: replaces the strategy's own source of expectations, such as a recorded future; steps are captured if it is
            `foreknown` (`cache.forecast.Forecast`).
        beside: the same model, loaded before and open as long as this one: its experts in host memory are used too. Short for
            `weights=beside.shared_weights`.
        weights: where the weights come from (`models.sources`): None: the folder's files; another model's `shared_weights`;
            `RandomWeights` for a folder with nothing but a config.
        formats: how weights may be stored (`formats.table`).
        routing: recorded sequences that requests replay (`execution.replay`); None: the router decides.
        admission: when waiting requests are admitted: when it `pays`, `at once`, or as `static` batches (`schedule.admission`).
        text: tokenizer of the same folder, loaded before; None: it is loaded now.
        options: fields of `EngineConfig`, such as `gpu_memory="6GiB"`, `slots="25%"`, `strategy="lru"`.

    Raises:
        ExpertFlowError: if model, budget, device or host memory cannot do it; nothing is loaded then.
    """

    def __init__(  # noqa: PLR0913 - all but the model by keyword
        self,
        model: str | Path | None = None,
        *,
        forecast: Forecast | None = None,
        beside: "LLM | None" = None,
        weights: WeightsSource | None = None,
        formats: Formats = FORMATS,
        routing: Replay | None = None,
        admission: str = "pays",
        text: ModelText | None = None,
        **options: Any,
    ) -> None:
        """Load the model."""
        self.config = EngineConfig.from_mapping(options)
        check_admission(admission)  # before anything is read
        limit_threads()
        if beside is not None:
            if weights is not None:
                raise ConfigError("beside and weights are both given", "They are two sources of weights: give one.")
            weights = beside.shared_weights
        folder = shipped_model() if model is None else model
        self._name = Path(folder).absolute().name
        prepared = prepare(folder, self.config, forecast, weights=weights, routing=routing, formats=formats)
        if text is not None and text.folder.resolve() != prepared.skeleton.folder.resolve():
            raise ConfigError(f"text is of {text.folder}, the model of {prepared.skeleton.folder}", "Leave text out.")
        if kinds := prepared.plan.shape.unserved:
            raise UnsupportedModelError(
                f"{prepared.skeleton.config.model_type!r} has layers of kind {', '.join(kinds)}, whose cache LLM cannot serve",
                "Use expertflow.from_pretrained and the model's own `generate`.",
            )
        text = text or ModelText(prepared.skeleton.folder, self.config.tokenizer)
        self._offloaded: OffloadedModel = OffloadedModel(prepared, self.config, forecast)
        self._requests = RequestFactory(text, prepared.plan, end_tokens(self._offloaded.model))
        self._engine = Engine(self._offloaded, admission, routing)

    @property
    def plan(self) -> Plan:
        """The plan: what goes where, in bytes."""
        return self._offloaded.plan

    @property
    def engine(self) -> Engine:
        """What runs requests; for programs that add and cancel them at any time. Make them with `request`."""
        return self._engine

    @property
    def requests(self) -> RequestFactory:
        """What makes requests of prompts; needs no `LLM`, so that other threads may use it."""
        return self._requests

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None if its folder has none."""
        return self._requests.text.tokenizer

    @property
    def events(self) -> EventStream:
        """Events of the expert cache. With a listener captured steps report single events and are slower."""
        return self._offloaded.events

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model behind it. Its passes and the engine's steps run one at a time."""
        return self._offloaded.model

    def request(
        self, prompt: Any, params: SamplingParams | None = None, *, index: int = 0, mask: TokenMask | None = None
    ) -> Request:
        """A request for `engine.add`.

        Args:
            prompt: text, token ids, chat messages, a `Prompt`, or a mapping with one of these, see `engine.inputs`.
            params: how to sample and stop; None: the defaults.
            index: a number of the caller's own, which the outputs carry; a replay takes the recording of this number.
            mask: restricts its tokens, such as a grammar's state; None: it may get any.

        Raises:
            PromptError: if the prompt is empty, too long, or of another kind.
            ConfigError: if `params` is no `SamplingParams`.
        """
        return self._requests.request(prompt, params, index, mask)

    @property
    def name(self) -> str:
        """The last part of the model's folder or id."""
        return self._name

    @property
    def threads(self) -> int:
        """Threads that a step computes with."""
        return self._engine.threads.number

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the model's weights, sampled: what traces and predictors carry."""
        return self._offloaded.fingerprint

    @property
    def identity(self) -> str:
        """Hash of every byte that answers depend on: weights, config, generation config and tokenizer."""
        return self._offloaded.identity

    @property
    def shared_weights(self) -> SharedWeights:
        """This model's experts in host memory, as `weights` of another `LLM` of the same checkpoint."""
        return self._offloaded.shared_weights

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """What the model's `generation_config.json` says of how to choose tokens, by names of `SamplingParams`."""
        generation = getattr(self.model, "generation_config", None)
        found = {name: getattr(generation, name, None) for name in _SAMPLING_DEFAULTS}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def predictor(self) -> Artifact | None:
        """The predictor at work, or None."""
        return None if self._offloaded.live_predictor is None else self._offloaded.live_predictor.artifact

    @property
    def predictor_failure(self) -> str | None:
        """Why the predictor was switched off, or None."""
        return None if self._offloaded.live_predictor is None else self._offloaded.live_predictor.failure

    @property
    def stats(self) -> RunStats:
        """What generation cost so far. A step that has begun before its tokens are known is counted."""
        return self._stats(self._offloaded.totals())

    def _stats(self, cache: CacheCounters) -> RunStats:
        return RunStats(**asdict(self._engine.totals), peak_bytes=self._offloaded.measure(), cache=cache)

    def look(self) -> Coming[tuple[RunStats, CacheView]]:
        """Begin to read `stats` and the expert cache's residency and uses, between two steps.

        For a reader in the thread that runs the steps. `stats` waits for the device; this does not, if the result is taken
        once it is ready, which it is behind the next step. Changes nothing.
        """
        stats, view = self._stats(CacheCounters()), self._offloaded.view()

        def finish() -> tuple[RunStats, CacheView]:
            found = view.result()
            return replace(stats, cache=found.counters), found

        return Coming(view.ready, finish)

    def link_speed(self) -> float:
        """Bytes a second that loads of experts into slots reach with nothing beside them, measured now; 0 once an expert is resident."""
        with self._engine.threads.step():
            return self._offloaded.link_speed()

    def generate(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt.

        Args:
            prompts: one or many: text, token ids (lists, arrays, tensors), what a tokenizer returned, `{"prompt": ...}`, or
                chat messages, which the model's chat template renders.
            params: for all, or one a prompt; None: greedy, 128 tokens. The model's `generation_config.json` gives the
                tokens that end a text, not how to sample.
            sampling_params: another name of `params`.

        Returns:
            Finished requests in the order of the prompts.

        Raises:
            PromptError: if a prompt is empty, too long, or of another kind; nothing is generated then.
            ConfigError: if `params` is no `SamplingParams`.
            RequestError: if a prompt's logits are no numbers, once the other prompts are over; its `outputs` holds theirs.
        """
        requests = self._requests.requests(split_prompts(prompts), _one_of(params, sampling_params))
        finished = []
        with Progress("requests", len(requests), show=self.config.progress and len(requests) > 1) as bar:
            try:
                for item in self._run(requests):
                    if item.output is not None:
                        finished.append(item.output)
                        bar.advance()
            except RequestError as error:
                error.outputs = tuple(sorted(finished, key=lambda output: output.index))
                raise
        return sorted(finished, key=lambda output: output.index)

    def stream(
        self,
        prompts: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamOutput]:
        """Like `generate`, token by token. Prompts are checked at the call, before the first token is taken.

        A `RequestError` of one prompt is raised when the others are over.
        """
        return self._run(self._requests.requests(split_prompts(prompts), _one_of(params, sampling_params)))

    def chat(self, messages: Any, params: SamplingParams | None = None) -> RequestOutput:
        """The answer to a chat, by the model's chat template.

        Args:
            messages: each with `role` and `content`.
            params: None: as the model's `generation_config.json` says (temperature 1 if it says nothing), to the end of the text.

        Raises:
            PromptError: if the model has no chat template, or it cannot render the messages.
        """
        if not is_messages(messages):
            raise PromptError("a chat is a list of messages", 'Give [{"role": "user", "content": "..."}].')
        return self.generate([messages], self.chat_params if params is None else params)[0]

    @property
    def chat_params(self) -> SamplingParams:
        """How `chat` samples if nothing is stated."""
        return SamplingParams.from_mapping({"max_tokens": None, "temperature": 1.0, **self.sampling_defaults})

    @contextmanager
    def record(self, path: str | Path) -> Iterator[None]:
        """Record the routing of everything generated in the block into a trace file, but for a step that began before it."""
        offloaded, shape = self._offloaded, self.plan.shape
        header = Header(
            layers=shape.layers, experts=shape.experts, top_k=offloaded.skeleton.top_k, model=self._name,
            fingerprint=offloaded.fingerprint, record_bytes=self.plan.record_bytes,
            layer_bytes=self.plan.unequal_bytes,
        )  # fmt: skip
        first = self._engine.begun
        with TraceWriter(Path(path), header) as writer:
            recorder = Recorder(writer)
            with self._engine.lock:
                offloaded.watch(recorder)
                self._engine.recorder = recorder
            try:
                yield
            finally:
                with self._engine.lock:
                    self._engine.recorder = None
                    offloaded.unwatch(recorder)
                    recorder.flush()
                writer.sequences = [{"sequence": number} for number in range(first, self._engine.begun)]

    def close(self) -> None:
        """Free the memory, once the step that runs is over; other threads' requests end with `ClosedError`."""
        with self._engine.lock:
            self._offloaded.close()
            self._engine.ahead.forget()

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _run(self, requests: list[Request]) -> Iterator[StreamOutput]:
        """Add the requests, and step until they are over; the steps serve other calls' requests, too."""
        arrived: deque[StreamOutput] = deque()
        mine: list[int] = []
        left, failed = len(requests), None
        try:
            with self._engine.lock:
                # one by one: if one is refused, those before it are cancelled
                mine.extend(self._engine.add(request, arrived.append) for request in requests)
            while left:
                self._step_for(arrived, mine, left)
                while arrived:
                    output = arrived.popleft()
                    if output.error is not None:
                        left -= 1
                        failed = failed or output.error
                        continue
                    if output.output is not None:
                        left -= 1
                    yield output
        finally:
            for number in mine:
                self._engine.cancel(number)
        if failed is not None:
            raise failed

    def _step_for(self, arrived: deque[StreamOutput], mine: Sequence[int], left: int) -> None:
        """Step once, unless another thread's step has brought outputs.

        Raises:
            CancelledError: if none of these requests waits or runs any more.
        """
        with self._engine.lock:
            if arrived:
                return
            if not any(self._engine.knows(number) for number in mine):
                raise CancelledError(
                    f"{left} of {len(mine)} requests were cancelled before they had finished",
                    "Send them again; they were cancelled through `LLM.engine`, or by an error in a step they took part in.",
                )
            self._engine.advance()


def _one_of(params: Any, sampling_params: Any) -> Any:
    """The parameters, given under one of two names.

    Raises:
        ConfigError: if they were given twice.
    """
    if params is not None and sampling_params is not None:
        raise ConfigError("params and sampling_params are both given", "They are two names of one option: give one.")
    return sampling_params if params is None else params
