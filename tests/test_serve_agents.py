"""Agents: tool loops and reasoning through the real engine, whose tokens a mask forces, by OpenAI's and Anthropic's clients."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import anthropic
import numpy as np
import openai
import pytest

from expertflow.serve.app import make_app
from expertflow.serve.guard import Rules
from expertflow.serve.reading import shaper_of
from serving import NAMES, Leaving, frames, until

if TYPE_CHECKING:
    from serving import Served

TEMPLATE = (
    "{%- for t in tools or [] %}[can:{{ t.function.name }}]{% endfor -%}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments.at }}</tool_call>{% endfor %}"
    "{%- endfor %}<|im_start|>assistant\n{% if enable_thinking is defined %}[thinks:{{ enable_thinking }}]{% endif %}"
)
"""Calls show one argument, which only a mapping has."""
SAID = '<think>Hm.</think>Look:<tool_call>{"name":"look","arguments":{"at":"x"}}</tool_call>'
LOOK = {
    "name": "look",
    "description": "looks",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}
USER = {"role": "user", "content": "see"}


class Script:
    """A mask that leaves one token a step: those of a text, then the end."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def fill(self, row: np.ndarray) -> None:
        token = self._tokens[0]
        row[token // 32] = np.array(1 << token % 32, np.uint32).astype(np.int32)

    def accept(self, token: int) -> None:
        assert self._tokens.pop(0) == token


Says = Callable[[str], None]


@pytest.fixture
def says(served: "Served", monkeypatch: pytest.MonkeyPatch) -> Says:
    """Make the model an agent of Qwen's kind that says a text, whatever it is asked."""
    llm = served.llm
    request, encode = llm.request, partial(llm.tokenizer.encode, add_special_tokens=False)
    monkeypatch.setattr(llm.tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(served.worker.loading, "shaper", shaper_of(llm))

    def say(text: str) -> None:
        tokens = [*encode(text), llm.tokenizer.eos_token_id]
        assert llm.tokenizer.decode(tokens[:-1]) == text

        def scripted(prompt: Any, params: Any, *, index: int, mask: Any) -> Any:
            return request(prompt, params, index=index, mask=mask or Script([*tokens]))

        monkeypatch.setattr(llm, "request", scripted)

    say(SAID)
    return say


def prompt_of(served: "Served", body: dict[str, Any]) -> str:
    """What the template makes of a chat, as far as the small tokenizer can write it."""
    ids = served.send("/tokenize", body).json()["tokens"]
    return served.send("/detokenize", {"tokens": ids}).json()["prompt"]


def test_a_tool_loop_of_openais_client(says: Says, served: "Served") -> None:
    """Reasoning, text and call, streamed and whole; the second turn shows the template what was called and what came of it."""
    tools = [{"type": "function", "function": LOOK}]

    async def both(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.chat.completions.create(model=NAMES[0], messages=[USER], tools=tools)
        stream = await client.chat.completions.create(model=NAMES[0], messages=[USER], tools=tools, stream=True)
        return whole, [chunk.choices[0] async for chunk in stream]

    whole, chunks = served.run(both)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == chunks[-1].finish_reason == "tool_calls"
    assert (message.content, message.reasoning_content, message.reasoning) == ("Look:", "Hm.", "Hm.")
    call = message.tool_calls[0]
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", "look", {"at": "x"})
    assert whole.usage.completion_tokens_details.reasoning_tokens == len(">Hm.</think"), "until the mark is whole"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Look:"
    assert "".join(getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks) == "Hm."
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [(one.index, one.function.name, one.function.arguments) for one in calls] == [
        (0, "look", call.function.arguments)
    ]
    history = [USER, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "seen"}]
    shown = prompt_of(served, {"messages": history, "tools": tools})
    assert "[can:look]" in shown
    assert "<tool_call>look:x</tool_call><|im_start|>tool:seen" in shown
    says("Done.")
    found = served.send("/v1/chat/completions", {"messages": history, "tools": tools}).json()["choices"][0]
    assert (found["message"]["content"], found["finish_reason"]) == ("Done.", "stop")


def test_a_tool_loop_over_responses(says: Says, served: "Served") -> None:
    """As Codex does it: instructions beside a developer message, items back as they came, tools of many types."""
    more = {"type": "custom", "name": "patch", "format": {"type": "text"}}
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "be brief"}]}
    options = {
        "model": NAMES[0], "instructions": "be kind", "store": False, "include": ["reasoning.encrypted_content"],
        "tools": [{"type": "function", "strict": False, **LOOK}, more, {"type": "web_search"}], "prompt_cache_key": "k",
        "reasoning": {"effort": "low", "summary": "auto"}, "extra_body": {"client_metadata": {"x": "y"}},
    }  # fmt: skip
    asked = [developer, {"role": "user", "content": [{"type": "input_text", "text": "see"}]}]

    async def both(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        raw = await client.responses.with_raw_response.create(input=asked, **options)
        async with await client.responses.create(input=asked, stream=True, **options) as stream:
            return raw, [event async for event in stream]

    raw, events = served.run(both)
    whole, final = raw.parse(), events[-1].response
    assert raw.headers["x-expertflow-left-out"] == "reasoning.summary, custom, web_search"
    reasoning, message, call = whole.output
    assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "Hm.")
    assert (message.type, message.status, message.content[0].text) == ("message", "completed", "Look:")
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"at": "x"})
    assert (whole.status, final.status, whole.output_text) == ("completed", "completed", "Look:")
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in final.output]
    assert [(item.type, item.status) for item in final.output] == [(item.type, item.status) for item in whole.output]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == "Look:"
    assert final.usage.output_tokens == whole.usage.output_tokens == len(SAID) + 1
    assert whole.usage.input_tokens_details.cached_tokens == 0
    seen = []

    def keep(prompt: Any, *rest: Any, **more: Any) -> Any:
        seen.append(prompt.text)
        return scripted(prompt, *rest, **more)

    says("Done.")
    scripted, served.llm.request = served.llm.request, keep
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "seen"}
    second = [*asked, *(item.to_dict() for item in whole.output), result]
    last = served.run(lambda client: client.responses.create(input=second, max_output_tokens=3, **options))
    assert (last.output_text, last.status, last.incomplete_details.reason) == ("Don", "incomplete", "max_output_tokens")
    assert "<|im_start|>system:be kind\n\nbe brief<|im_start|>user:see<|im_start|>assistant:Look:" in seen[0]
    assert "<tool_call>look:x</tool_call><|im_start|>tool:seen<|im_start|>assistant" in seen[0]
    for wrong, param in (
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ):
        assert served.send("/v1/responses", {"input": "x", **wrong}).json()["error"]["param"] == param


def test_what_is_left_out_of_a_request_is_named(says: Says, served: "Served", caplog: pytest.LogCaptureFixture) -> None:
    """Tools that are no functions, in a header and in the log; `strict` is kept where a call is demanded."""
    says("Done.")
    body = {
        "messages": [USER],
        "tools": [{"type": "web_search"}, {"type": "function", "function": {**LOOK, "strict": True}}],
    }
    found = served.send("/v1/chat/completions", body)
    assert found.headers["x-expertflow-left-out"] == "web_search, strict"
    assert "web_search, strict" in caplog.text
    found = served.send("/v1/chat/completions", {**body, "tool_choice": "required", "max_tokens": 1})
    assert found.headers["x-expertflow-left-out"] == "web_search"


def test_a_model_whose_template_takes_no_tools_refuses_them(served: "Served") -> None:
    """They would be dropped silently."""
    found = served.send("/v1/chat/completions", {"messages": [USER], "tools": [{"type": "function", "function": LOOK}]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tools")


def ask(served: "Served", work: Any, app: Any = None, key: str = "none") -> Any:
    """What Anthropic's official client gets."""

    async def main() -> Any:
        async with served.http(app) as http:
            client = anthropic.AsyncAnthropic(api_key=key, base_url="http://localhost", http_client=http, max_retries=0)
            return await work(client)

    return asyncio.run(main())


def test_a_tool_loop_of_anthropics_client(says: Says, served: "Served") -> None:
    """As with OpenAI's: blocks of thinking, text and tool use; the line that changes with every request is not shown."""
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=ab12"}
    options = {
        "model": NAMES[0], "max_tokens": 200, "messages": [USER], "system": [billing, {"type": "text", "text": "be kind"}],
        "tools": [{"name": "look", "description": "looks", "input_schema": LOOK["parameters"]}, {"type": "web_search_20250305", "name": "w"}],
    }  # fmt: skip

    counted = {name: value for name, value in options.items() if name != "max_tokens"}

    async def both(client: anthropic.AsyncAnthropic) -> tuple[Any, Any, list[str], int]:
        whole = await client.messages.create(**options)
        async with client.messages.stream(**options) as stream:
            events = [event.type async for event in stream]
            final = await stream.get_final_message()
        return (
            whole,
            final,
            events,
            (await client.messages.count_tokens(**counted)).input_tokens,
        )

    whole, final, events, tokens = ask(served, both)
    thinking, text, call = whole.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Hm.", "")
    assert (text.type, text.text) == ("text", "Look:")
    assert (call.type, call.name, call.input) == ("tool_use", "look", {"at": "x"})
    assert whole.stop_reason == final.stop_reason == "tool_use"
    assert [block.model_dump(exclude={"id", "parsed_output"}) for block in final.content] == [
        block.model_dump(exclude={"id", "parsed_output"}) for block in whole.content
    ]
    assert (events[0], events[-1]) == ("message_start", "message_stop")
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + usage.cache_read_input_tokens == tokens
    assert whole.usage.output_tokens == final.usage.output_tokens == len(SAID) + 1
    seen = []

    def keep(prompt: Any, *rest: Any, **more: Any) -> Any:
        seen.append(prompt.text)
        return scripted(prompt, *rest, **more)

    says("Done.")
    scripted, served.llm.request = served.llm.request, keep
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "seen"}]}
    second = [
        USER,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result, {"type": "text", "text": "so"}]},
    ]
    more = {"messages": second, "thinking": {"type": "disabled"}}
    last = ask(served, lambda client: client.messages.create(**{**options, **more}))
    assert (last.content[0].text, last.stop_reason) == ("Done.", "end_turn")
    assert "billing" not in seen[0]
    assert "<|im_start|>system:be kind" in seen[0]
    assert "<tool_call>look:x</tool_call><|im_start|>tool:seen<|im_start|>user:so" in seen[0]
    assert seen[0].endswith("[thinks:False]")


def test_anthropics_reasons_and_errors(says: Says, served: "Served") -> None:
    """Why a message ended, and its own shape of errors, also before a route and inside a stream."""
    says("one#two")
    body = {"messages": [USER], "max_tokens": 50}
    for more, reason, stop, text in (
        ({}, "end_turn", None, "one#two"),
        ({"max_tokens": 2}, "max_tokens", None, "on"),
        ({"stop_sequences": ["x", "#"]}, "stop_sequence", "#", "one"),
    ):
        found = served.send("/v1/messages", {**body, **more}).json()
        assert (found["stop_reason"], found["stop_sequence"], found["content"][0]["text"]) == (reason, stop, text)
    locked = make_app(served.service, Rules(keys=["k"]))
    for work, error in (
        (lambda client: client.messages.create(**body, model="gpt"), anthropic.NotFoundError),
        (lambda client: client.messages.create(**body, model=NAMES[0], mcp_servers=[1]), TypeError),
        (lambda client: client.messages.create(**{**body, "messages": []}, model=NAMES[0]), anthropic.BadRequestError),
    ):
        with pytest.raises(error):
            ask(served, work)
    with pytest.raises(anthropic.AuthenticationError):
        ask(served, lambda client: client.messages.create(**body, model=NAMES[0]), app=locked, key="wrong")
    assert ask(served, lambda client: client.messages.create(**body, model=NAMES[0]), app=locked, key="k").content
    for wrong, kind in (({**body, "foo": 1}, "invalid_request_error"), ({"messages": [USER]}, "invalid_request_error")):
        found = served.send("/v1/messages", wrong).json()
        assert (found["type"], found["error"]["type"], set(found["error"])) == ("error", kind, {"type", "message"})


def test_anthropics_client_leaves_too(served: "Served") -> None:
    """Its stream is one of ours."""

    async def main() -> str:
        client = Leaving(served.app, "/v1/messages", {"messages": [USER], "max_tokens": 400, "stream": True})
        await until(lambda: served.worker.running == 1)
        client.leave()
        await client.task
        await until(lambda: not served.llm.engine.unfinished)
        return client.text

    text = asyncio.run(main())
    assert text.startswith("event: message_start\n")
    assert "message_stop" not in text


@pytest.mark.usefixtures("says")
def test_a_stream_of_calls_is_a_stream(served: "Served") -> None:
    """Frames can be read one by one, and two answers have calls of their own."""
    body = {"messages": [USER], "tools": [{"type": "function", "function": LOOK}], "n": 2, "stream": True}
    found = frames(served.send("/v1/chat/completions", body).text)
    calls = [
        (frame["choices"][0]["index"], call["id"])
        for frame in found
        for call in frame["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert sorted(choice for choice, _ in calls) == [0, 1]
    assert len({number for _, number in calls}) == 2


def test_a_second_turn_reads_only_what_is_new(says: Says, served: "Served") -> None:
    """Tokens that an earlier prompt began with are reported by both APIs, and the answer is that of a fresh run."""
    says("Done.")
    first = [{"role": "user", "content": "see " * 40}]
    second = [*first, {"role": "assistant", "content": "Done."}, USER]
    prompt = len(served.send("/tokenize", {"messages": first}).json()["tokens"])
    fresh = served.send("/v1/chat/completions", {"messages": first}).json()
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    found = served.send("/v1/chat/completions", {"messages": second}).json()
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert 0 < prompt - 64 <= cached <= prompt
    usage = served.send("/v1/messages", {"messages": second, "max_tokens": 9}).json()["usage"]
    assert usage["cache_read_input_tokens"] >= cached
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == found["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_mask_that_fails_ends_its_request_alone(
    stream: bool, served: "Served", monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an error of the server that names it; the next request is served."""
    request, body = served.llm.request, {"prompt": "x", "max_tokens": 3, "ignore_eos": True, "stream": stream}
    with monkeypatch.context() as patch:
        patch.setattr(served.llm, "request", lambda *given, **more: request(*given, **{**more, "mask": Script([])}))
        found = served.send("/v1/completions", body)
    error = (frames(found.text)[-1] if stream else found.json())["error"]
    assert (found.status_code, error["type"], error["code"]) == (200 if stream else 500, "server_error", "mask_failed")
    assert served.send("/v1/completions", {**body, "stream": False}).json()["usage"]["completion_tokens"] == 3
