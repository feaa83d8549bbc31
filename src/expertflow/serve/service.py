"""What routes share: the names of the model, its defaults, and how a request body becomes a call.

Bodies are read, rendered and tokenised in threads of their own, before the first byte of an answer is sent: an error there
still has a status. Must not know HTTP.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from expertflow.errors import ConfigError, PromptError
from expertflow.serve.answers import Call
from expertflow.serve.grammar import Task
from expertflow.serve.protocol.errors import ApiError, bad
from expertflow.serve.protocol.fields import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    STREAM_OPTIONS,
    TOKENIZE,
    read_fields,
    required,
)
from expertflow.serve.protocol.forms import Form, form_of
from expertflow.serve.protocol.messages import messages_of
from expertflow.serve.protocol.sampling import choices, sampling
from expertflow.serve.protocol.tools import Tools, tools_of
from expertflow.serve.writers import anthropic, responses
from expertflow.serve.writers.chat import ChatWriter
from expertflow.serve.writers.completions import CompletionWriter, Wanted
from expertflow.serve.writers.likelihoods import Texts
from expertflow.serve.writers.parts import Answer, Shaper
from expertflow.serve.writers.writer import Head, Writer

if TYPE_CHECKING:
    from expertflow.config import SamplingParams
    from expertflow.engine.inputs import Prompt
    from expertflow.engine.llm import LLM
    from expertflow.engine.request import Request, RequestOutput
    from expertflow.execution.sampling.masks import TokenMask
    from expertflow.serve.metrics import Metrics
    from expertflow.serve.worker import Worker

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_READERS = 2
"""Threads that read bodies and tokenise."""
_COMPLETION_TOKENS = 16
"""Tokens of a completion where the request does not say it, as in OpenAI's API."""


@dataclass(frozen=True, kw_only=True)
class Names:
    """Under which names the model is served.

    Attributes:
        served: at least one; answers carry the first where the request names none of them.
        anything: whether any name is taken.
    """

    served: Sequence[str]
    anything: bool = False

    def check(self, wanted: str | None) -> str:
        """The name that the answer carries.

        Raises:
            ApiError: if the model is not served under that name.
        """
        if wanted is None or wanted in self.served:
            return wanted or self.served[0]
        if self.anything:
            return self.served[0]
        raise ApiError(
            404,
            f"the model {wanted!r} does not exist",
            f"Served: {', '.join(self.served)}.",
            param="model",
            code="model_not_found",
        )


class Service:
    """Makes calls of request bodies, for one worker.

    Args:
        worker: owns the engine.
        names: of the model.
        metrics: the worker's watcher.

    Attributes:
        created: when it began to be served, in seconds since 1970.
    """

    def __init__(self, worker: "Worker", names: Names, metrics: "Metrics") -> None:
        """Start the threads that read."""
        self.metrics, self.created = metrics, int(time.time())
        self.worker, self.names = worker, names
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read")

    async def aside(self, work: "Callable[[LLM, dict[str, Any]], _T]", body: bytes) -> _T:
        """Do work on a body in a thread that reads.

        Raises:
            ApiError: if the model is not there, or the body is bad.
        """
        llm = self.worker.llm
        return await asyncio.get_running_loop().run_in_executor(self._readers, lambda: work(llm, read_body(body)))

    def close(self) -> None:
        """End the threads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def chat(self, llm: "LLM", body: dict[str, Any]) -> Call:
        """A call of `/v1/chat/completions`.

        Raises:
            ApiError: if the body is bad.
        """
        fields = read_fields(body, CHAT)

        def write(head: Head, answers: Sequence[Answer], params: "SamplingParams") -> ChatWriter:
            return ChatWriter(head, answers, token_texts(llm, params), prompt=params.prompt_logprobs is not None)

        return self.answer(llm, fields, write)

    def answer(
        self,
        llm: "LLM",
        fields: Mapping[str, Any],
        write: "Callable[[Head, Sequence[Answer], SamplingParams], Writer]",
        left_out: Sequence[str] = (),
    ) -> Call:
        """A call that answers a chat, in any API's shape.

        Args:
            llm: the model.
            fields: honoured fields of `CHAT`.
            write: makes the writer.
            left_out: of the request, beside what `tools_of` leaves out.

        Raises:
            ApiError: if the fields are bad.
        """
        form = form_of(fields)
        tools = tools_of(fields, shaped=form is not None)
        model, shaper = self.names.check(fields.get("model")), self.worker.loading.shaper
        if tools.given and not (shaper.tools and shaper.make):
            what = "this model's chat template takes no tools"
            raise bad("tools", what, "Leave them out.", code="unsupported_parameter")
        prompt = render(llm, fields, tools.given)
        options = sampling(fields, llm.sampling_defaults, None)
        if shaper.make is not None:  # marks of an answer's parts are special tokens in some models
            options = replace(options, skip_special_tokens=False)
        params = choices(options, fields.get("n", 1))
        begun = prompt.text or ""
        mask = self._masks(form, tools, shaper, begun)
        requests = [make_request(llm, prompt, one, place, "messages", mask()) for place, one in enumerate(params)]
        readers = [shaper.reader(begun, tools.given, formed=form is not None) for _ in params]
        answers = [Answer(reader, 1 if tools.single else None) for reader in readers]
        return Call(
            requests=requests,
            writer=write(self._head(llm, fields, model, [prompt]), answers, options),
            stream=fields.get("stream", False),
            headers=left_out_header([*left_out, *tools.left_out]),
        )

    def _masks(self, form: Form | None, tools: Tools, shaper: Shaper, prompt: str) -> "Callable[[], TokenMask | None]":
        """What makes a mask for a choice.

        Raises:
            ApiError: if the model cannot be held to what is asked.
        """
        if form is None and not tools.demanded:
            return lambda: None
        form = None if tools.demanded else form
        param, marks, grammars = form.param if form else "tool_choice", shaper.marks, self.worker.loading.grammars
        if marks is None:
            what = "how this model writes its answers is not known"
            remedy = "Leave out tool_choice." if tools.demanded else ""
            raise bad(param, f"{param} cannot be kept: {what}", remedy, code="unsupported_parameter")
        assert grammars is not None
        return grammars.compile(Task(param, form, tools.functions, tools.single, marks, prompt)).mask

    def message(self, llm: "LLM", body: dict[str, Any]) -> Call:
        """A call of `/v1/messages`.

        Raises:
            ApiError: if the body is bad.
        """
        fields = anthropic.chat_fields(body)
        required(fields, "max_tokens")

        def write(head: Head, answers: Sequence[Answer], params: "SamplingParams") -> Writer:
            return anthropic.MessageWriter(head, answers, partial(stopped_by, llm, params))

        return self.answer(llm, fields, write)

    def respond(self, llm: "LLM", body: dict[str, Any]) -> Call:
        """A call of `/v1/responses`.

        Raises:
            ApiError: if the body is bad.
        """
        fields, left_out = responses.chat_fields(body)
        return self.answer(
            llm, fields, lambda head, answers, _: responses.ResponseWriter(head, answers, body), left_out
        )

    def count(self, llm: "LLM", body: dict[str, Any]) -> dict[str, int]:
        """The answer of `/v1/messages/count_tokens`.

        Raises:
            ApiError: if the body is bad.
        """
        fields = anthropic.chat_fields(body)
        self.names.check(fields.get("model"))
        return {"input_tokens": len(render(llm, fields, tools_of(fields).given).token_ids)}

    def complete(self, llm: "LLM", body: dict[str, Any]) -> Call:
        """A call of `/v1/completions`.

        Raises:
            ApiError: if the body is bad.
        """
        fields = read_fields(body, COMPLETION)
        model, count = self.names.check(fields.get("model")), fields.get("n", 1)
        options = sampling(fields, llm.sampling_defaults, _COMPLETION_TOKENS)
        params = choices(options, count)
        prompts = [read_prompt(llm, given, place) for place, given in enumerate(required(fields, "prompt"))]
        mask = self._masks(form_of(fields), Tools(), Shaper(), "")
        requests = [
            make_request(llm, prompt, one, place * count + choice, "prompt", mask())
            for place, prompt in enumerate(prompts)
            for choice, one in enumerate(params)
        ]
        echoes = [_echo(llm, prompt) if fields.get("echo") else "" for prompt in prompts for _ in params]
        wanted = Wanted(
            token_texts(llm, options),
            options.logprobs is not None,
            fields.get("echo", False),
            "prompt_logprobs" in fields,
        )
        writer = CompletionWriter(self._head(llm, fields, model, prompts), echoes, wanted)
        return Call(requests=requests, writer=writer, stream=fields.get("stream", False))

    def tokenize(self, llm: "LLM", body: dict[str, Any]) -> dict[str, Any]:
        """The answer of `/tokenize`.

        Raises:
            ApiError: if the body is bad.
        """
        fields = read_fields(body, TOKENIZE)
        self.names.check(fields.get("model"))
        if "messages" in fields:
            ids = render(llm, fields, tools_of(fields).given).token_ids
        else:
            with_special = fields.get("add_special_tokens", True)
            ids = _refusing(
                lambda: llm.requests.text.reader.encode(0, required(fields, "prompt"), special=with_special), "prompt"
            )
        found = {"count": len(ids), "max_model_len": llm.plan.max_length, "tokens": list(ids)}
        if fields.get("return_token_strs") and llm.tokenizer is not None:
            found["token_strs"] = llm.tokenizer.convert_ids_to_tokens(list(ids))
        return found

    def detokenize(self, llm: "LLM", body: dict[str, Any]) -> dict[str, Any]:
        """The answer of `/detokenize`.

        Raises:
            ApiError: if the body is bad.
        """
        fields = read_fields(body, DETOKENIZE)
        self.names.check(fields.get("model"))
        tokens = required(fields, "tokens")
        if unknown := [token for token in tokens if token >= llm.plan.shape.vocabulary]:
            raise bad("tokens", f"tokens holds {unknown[0]}", f"The model knows 0 to {llm.plan.shape.vocabulary - 1}.")
        return {"prompt": _refusing(lambda: llm.requests.text.reader.decode(tokens), "tokens")}

    def _head(self, llm: "LLM", fields: Mapping[str, Any], model: str, prompts: "Sequence[Prompt]") -> Head:
        options = read_fields(fields.get("stream_options", {}), STREAM_OPTIONS, "stream_options.")
        if options and not fields.get("stream"):
            raise bad("stream_options", "stream_options are given and stream is not true", "Leave them out.")
        return Head(
            model=model,
            fingerprint=f"expertflow-{llm.fingerprint[:12]}",
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            prompts=len(prompts),
            usage=options.get("include_usage", False) or options.get("continuous_usage_stats", False),
            always=options.get("continuous_usage_stats", False),
        )


def left_out_header(left_out: Sequence[str]) -> dict[str, str]:
    """A header that names what of a request was left out, which goes to the log too."""
    if not left_out:
        return {}
    named = ", ".join(one.encode("ascii", "replace").decode()[:100] for one in left_out)
    _log.warning("left out of a request: %s", named)
    return {"x-expertflow-left-out": "".join(letter if letter.isprintable() else "?" for letter in named)}


def read_body(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        ApiError: if it is no JSON, or no object.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad(None, f"the body is no JSON: {error}", "Send a JSON object.") from error
    if not isinstance(found, dict):
        raise bad(None, "the body is no JSON object", "Send one.")
    return found


def render(llm: "LLM", fields: Mapping[str, Any], tools: Sequence[Any] = ()) -> "Prompt":
    """The prompt that the chat template makes of a request's messages.

    Raises:
        ApiError: if the messages are bad, or the template cannot render them.
    """
    messages = messages_of(required(fields, "messages"))
    variables = dict(fields.get("chat_template_kwargs", {}))
    if "reasoning_effort" in fields:
        variables["reasoning_effort"] = fields["reasoning_effort"]
    goes_on = fields.get("continue_final_message", False)
    return _refusing(
        lambda: llm.requests.text.reader.chat(
            0, messages, tools=list(tools), variables=variables, goes_on=goes_on,
            begins=fields.get("add_generation_prompt", not goes_on),
        ),
        "messages",
    )  # fmt: skip


def read_prompt(llm: "LLM", given: Any, place: int) -> "Prompt":
    """A prompt of a completion.

    Raises:
        ApiError: if it is empty, or holds tokens the model does not know.
    """
    return _refusing(lambda: llm.requests.text.reader.read(place, given, llm.plan.shape.vocabulary), "prompt")


def token_texts(llm: "LLM", params: "SamplingParams") -> Texts | None:
    """What gives the text of a token, where log-probabilities are wanted: as it stands behind another token."""
    decoder = llm.requests.text.decoder
    if decoder is None or (params.logprobs is None and params.prompt_logprobs is None):
        return None
    before = list(llm.requests.text.reader.encode(0, "a", special=False))
    start = len(decoder.decode(before, skip_special_tokens=False))

    @cache
    def text(token: int) -> str:
        return decoder.decode([*before, token], skip_special_tokens=False)[start:]

    return text


def stopped_by(llm: "LLM", params: "SamplingParams", output: "RequestOutput") -> str | None:
    """The stop text that ended an output, or None if another thing did."""
    decoder = llm.requests.text.decoder
    if not params.stop or output.finish_reason != "stop" or decoder is None:
        return None
    whole = decoder.decode(list(output.token_ids), skip_special_tokens=params.skip_special_tokens)
    behind = whole[len(output.text) :] if whole.startswith(output.text) else ""
    return next((stop for stop in params.stop if behind.startswith(stop)), None)


def _echo(llm: "LLM", prompt: "Prompt") -> str:
    return llm.requests.text.reader.decode(prompt.token_ids) if prompt.text is None else prompt.text


def make_request(
    llm: "LLM", prompt: "Prompt", params: "SamplingParams", place: int, param: str, mask: "TokenMask | None" = None
) -> "Request":
    """The engine's request.

    Args:
        llm: the model.
        prompt: its prompt.
        params: how to sample and stop.
        place: among the choices of the request body.
        param: the field that the prompt came in.
        mask: restricts its tokens; None: it may get any.

    Raises:
        ApiError: if the prompt leaves no room for a token, or a stop text cannot be found in text.
    """
    tokens, most = len(prompt.token_ids), llm.plan.max_length
    if tokens >= most and not llm.plan.shape.encoder_decoder:
        raise bad(
            param,
            f"the prompt has {tokens} tokens, and the model's longest sequence is {most} tokens, answer included",
            "Shorten it, or serve with a larger --max-model-len.",
            code="context_length_exceeded",
        )
    return _refusing(lambda: llm.request(prompt, params, index=place, mask=mask), "stop")


def _refusing(work: Callable[[], _T], param: str) -> _T:
    """Do work whose errors are the caller's.

    Raises:
        ApiError: in place of an error of the prompt or an option.
    """
    try:
        return work()
    except (PromptError, ConfigError) as error:
        named = re.match(r"(\w+)(?:=| names)", error.what)
        raise bad(named[1] if named and named[1] in CHAT else param, error.what, error.remedy) from error
