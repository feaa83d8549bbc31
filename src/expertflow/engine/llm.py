"""The Python front door: `LLM(model, gpu_memory="6GiB").generate([...])` and `.stream(...)`.

Turns prompts into requests, requests into batches, logits into tokens.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from expertflow.cache.forecast import Forecast
from expertflow.config import EngineConfig, SamplingParams
from expertflow.engine.build import OffloadedModel
from expertflow.engine.engine import Engine
from expertflow.engine.inputs import PromptReader, split_prompts
from expertflow.engine.plan import Plan
from expertflow.engine.prepare import SHIPPED_MODEL, prepare
from expertflow.engine.request import Request, RequestOutput, StreamOutput
from expertflow.engine.text import Decoder
from expertflow.engine.threads import limit_threads
from expertflow.errors import (
    CancelledError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    PromptError,
    UnsupportedModelError,
)
from expertflow.events import CacheCounters
from expertflow.predict.artifact import Artifact
from expertflow.progress import Progress
from expertflow.trace.format import Header, TraceWriter
from expertflow.trace.recorder import Recorder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


def shipped_model() -> Path:
    """The folder of the model that comes with the package."""
    return SHIPPED_MODEL


@dataclass(kw_only=True)
class RunStats:
    """What generation cost so far.

    Attributes:
        tokens: generated tokens.
        prompt_tokens: tokens read.
        seconds: time in the engine's steps.
        first_token_seconds: time to the first token of the request that finished last, waiting included.
        finished: requests.
        peak_bytes: measured peak of device memory.
        cache: what the expert cache did.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    finished: int = 0
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
    experts are small. `OMP_NUM_THREADS` or an earlier `torch.set_num_threads` is kept, see `engine.threads`.

    Args:
        model: checkpoint folder or Hugging Face id; None: the shipped model.
        forecast: replaces the strategy's own source of expectations, such as a recorded future; steps are captured if it is
            `foreknown` (`cache.forecast.Forecast`).
        beside: the same model, loaded before and open as long as this one: its experts in host memory are used too.
        options: fields of `EngineConfig`, such as `gpu_memory="6GiB"`, `slots="25%"`, `strategy="lru"`.

    Raises:
        ExpertFlowError: if model, budget, device or host memory cannot do it; nothing is loaded then.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        forecast: Forecast | None = None,
        beside: "LLM | None" = None,
        **options: Any,
    ) -> None:
        """Load the model."""
        self.config = EngineConfig.from_mapping(options)
        limit_threads()
        other: OffloadedModel | None = None if beside is None else beside._offloaded  # noqa: SLF001 - of the same class
        folder = shipped_model() if model is None else model
        self._name = Path(folder).absolute().name
        prepared = prepare(folder, self.config, forecast)
        if kinds := prepared.plan.shape.unserved:
            raise UnsupportedModelError(
                f"{prepared.skeleton.config.model_type!r} has layers of kind {', '.join(kinds)}, whose cache LLM cannot serve",
                "Use expertflow.from_pretrained and the model's own `generate`.",
            )
        self._offloaded: OffloadedModel = OffloadedModel(prepared, self.config, forecast, other)
        self.tokenizer = load_tokenizer(self._offloaded.skeleton.folder)
        self._reader = PromptReader(self.tokenizer, prepared.plan.shape.vocabulary)
        self._ends = _end_tokens(self._offloaded.model)
        self._stats = RunStats(cache=self._offloaded.counters)
        self._engine = Engine(self._offloaded)

    @property
    def plan(self) -> Plan:
        """What goes where."""
        return self._offloaded.plan

    @property
    def engine(self) -> Engine:
        """What runs requests; for programs that add and cancel them at any time. Make them with `request`."""
        return self._engine

    def request(self, prompt: Any, params: SamplingParams | None = None) -> Request:
        """A request for `engine.add`.

        Args:
            prompt: text, token ids, chat messages, or a mapping with one of these, see `engine.inputs`.
            params: how to sample and stop.

        Raises:
            PromptError: if the prompt is empty, too long, or of another kind.
        """
        return self._requests([prompt], params)[0]

    @property
    def threads(self) -> int:
        """Threads that a step computes with."""
        return self._engine.threads.number

    @property
    def fingerprint(self) -> str:
        """Of the model's weights, sampled: what traces and predictors carry."""
        return self._offloaded.fingerprint

    @property
    def identity(self) -> str:
        """Hash of every byte that answers depend on: weights, config, generation config and tokenizer."""
        return self._offloaded.identity

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
        """What generation cost so far."""
        return replace(self._stats, peak_bytes=self._offloaded.measure(), cache=self._offloaded.totals())

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
            params: for all, or one a prompt; None: greedy, 128 tokens. The model's `generation_config.json` says where to
                stop, not how to sample.
            sampling_params: another name of `params`.

        Returns:
            Finished requests in the order of the prompts.

        Raises:
            PromptError: if a prompt is empty, too long, or of another kind; nothing is generated then.
            ConfigError: if `params` is none.
            NonFiniteError: if a prompt's logits are no numbers, behind the other prompts; its `outputs` holds theirs.
        """
        requests = self._requests(split_prompts(prompts), _one_of(params, sampling_params))
        finished = []
        with Progress("requests", len(requests), show=self.config.progress and len(requests) > 1) as bar:
            try:
                for item in self._run(requests):
                    if item.output is not None:
                        finished.append(item.output)
                        bar.advance()
            except NonFiniteError as error:
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
        """Like `generate`, token by token. Prompts are checked at the call, before the first token is asked for.

        A `NonFiniteError` of one prompt is raised when the others are over.
        """
        return self._run(self._requests(split_prompts(prompts), _one_of(params, sampling_params)))

    @contextmanager
    def record(self, path: str | Path) -> Iterator[None]:
        """Record the routing of everything generated in the block into a trace file."""
        offloaded, shape = self._offloaded, self.plan.shape
        header = Header(
            layers=shape.layers, experts=shape.experts, top_k=offloaded.skeleton.top_k, model=self._name,
            fingerprint=offloaded.fingerprint, record_bytes=self.plan.record_bytes,
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
        """Give the memory back, once the step that runs is over; other threads' requests end with `ClosedError`."""
        with self._engine.lock:
            self._offloaded.close()

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def _requests(
        self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[Request]:
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
            raise ConfigError(f"params={params!r} is no SamplingParams", "Make them: SamplingParams(max_tokens=64).")
        if len(params) != len(prompts):
            raise PromptError(
                f"{len(params)} sampling parameters for {len(prompts)} prompts", "Give one a prompt, or one for all."
            )
        if not prompts:
            raise PromptError("there is no prompt", "Give at least one.")
        return [self._request(i, prompt, p) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]

    def _request(self, index: int, prompt: Any, params: SamplingParams) -> Request:
        text, tokens = self._reader.read(index, prompt)
        room = self.plan.max_length if self.plan.shape.encoder_decoder else self.plan.max_length - len(tokens)
        if len(tokens) > self.plan.max_length or room < 1:
            raise PromptError(
                f"prompt {index} has {len(tokens)} tokens; with one to generate, {self.plan.max_length} fit",
                "Shorten it, or raise max_length (at most the model's context).",
            )
        stops = stop_tokens(self.tokenizer, params)
        ends = {*params.stop_token_ids, *stops, *(() if params.ignore_eos else self._ends)}
        return Request(
            index=index,
            prompt=text,
            prompt_token_ids=tokens,
            params=params,
            ends=ends,
            limit=room if params.max_tokens is None else min(params.max_tokens, room),
            decoder=decoder_of(self.tokenizer),
            continues=not self.plan.shape.encoder_decoder,
        )

    def _run(self, requests: list[Request]) -> Iterator[StreamOutput]:
        """Add the requests, and step until they are over; what other calls' requests get goes to those."""
        mail: deque[StreamOutput] = deque()
        mine: list[int] = []

        def take(item: StreamOutput) -> None:  # in the thread that steps, under the engine's lock
            if item.output is not None:
                self._stats.finished += 1
                self._stats.first_token_seconds = item.output.first_token_seconds
            mail.append(item)

        left, failed = len(requests), None
        try:
            with self._engine.lock:
                mine += [self._engine.add(request, take) for request in requests]
                self._stats.prompt_tokens += sum(len(request.prompt_token_ids) for request in requests)
            while left:
                self._bring(mail, mine, left)
                while mail:
                    output = mail.popleft()
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

    def _bring(self, mail: deque[StreamOutput], mine: Sequence[int], left: int) -> None:
        """Step once, unless another thread's step has brought something.

        Raises:
            CancelledError: if none of these requests waits or runs any more.
        """
        with self._engine.lock:
            if mail:
                return
            if not any(self._engine.knows(number) for number in mine):
                raise CancelledError(
                    f"{left} of {len(mine)} requests were cancelled before they had finished",
                    "Ask for them again; they were cancelled through `LLM.engine`, or by an error in a step they took part in.",
                )
            began = time.perf_counter()
            try:
                self._stats.tokens += self._engine.advance()
            finally:
                self._stats.seconds += time.perf_counter() - began


def _one_of(params: Any, sampling_params: Any) -> Any:
    """The parameters, under whichever of the two names they were given.

    Raises:
        ConfigError: if they were given twice.
    """
    if params is not None and sampling_params is not None:
        raise ConfigError("params and sampling_params are both given", "They are two names of one option: give one.")
    return sampling_params if params is None else params


def stop_tokens(tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> set[int]:
    """Ids of the stop texts that are special tokens, which never show in a text without them.

    Raises:
        ConfigError: if a stop text has a special token in it beside other text, and the text is without these.
    """
    if tokenizer is None or not params.stop or not params.skip_special_tokens:
        return set()
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in params.stop:
        inside = next((token for token in special if token in stop), None)
        if stop not in special and inside is not None:
            raise ConfigError(
                f"stop={stop!r} contains the special token {inside!r}, which is left out of the text",
                f"Stop at {inside!r} alone, or keep special tokens in the text (skip_special_tokens=False).",
            )
    return {special[stop] for stop in params.stop if stop in special}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, or None if it has none."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # settings of a wrong type are noticed at the first use, which may also change the tokenizer: later ones only read it
        tokenizer.decode(tokenizer("a")["input_ids"])
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: {error}", "Fetch it again; code of its own is never run."
        ) from error
    return tokenizer


def decoder_of(tokenizer: PreTrainedTokenizerBase | None) -> Decoder | None:
    """What makes text of a tokenizer's tokens: the library below it where that says the same, in a tenth of the time.

    Two calls a token through transformers take longer than everything else that the host does for a step of many sequences.
    """
    if tokenizer is None:
        return None
    fast, own = PreTrainedTokenizerFast, type(tokenizer)
    if getattr(own, "_decode", None) is not fast._decode or own.decode is not fast.decode:  # noqa: SLF001 - there is no public way to ask
        return tokenizer
    library = tokenizer.backend_tokenizer
    cleans = tokenizer.clean_up_tokenization_spaces and (
        type(library.model).__name__ != "BPE"  # where transformers does it only if told so
        or getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    )
    decoder: Decoder = tokenizer if cleans else library
    return decoder


def _end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config(decoder=True).eos_token_id
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
