"""The server as OpenAI's own client sees it: answers, streams, and what a client gets when something is wrong."""

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertflow import SamplingParams
from expertflow.serve import answers, worker
from expertflow.serve.app import make_app
from expertflow.serve.guard import Rules
from expertflow.serve.live import snapshots
from expertflow.serve.worker import Bounds
from helpers import GUARD
from serving import NAMES, Leaving, frames, until

if TYPE_CHECKING:
    from serving import Served

CHAT = [{"role": "user", "content": "hello there"}]
RENDERED = "[user]hello there[end][assistant]"
GREEDY = {"temperature": 0, "max_tokens": 6, "extra_body": {"ignore_eos": True}}


def expected(served: "Served", prompt: str, **params: Any) -> str:
    """The engine's own answer to a prompt."""
    options = {"max_tokens": 6, "ignore_eos": True, **params}
    return served.llm.generate(prompt, SamplingParams(**options))[0].text


def test_a_chat_gets_the_engines_answer_and_counts_its_tokens(served: "Served") -> None:
    """The template renders, the engine answers; tokens are the tokenizer's."""
    found = served.run(lambda client: client.chat.completions.create(model=NAMES[0], messages=CHAT, **GREEDY))
    assert found.choices[0].message.content == expected(served, RENDERED)
    assert (found.choices[0].message.role, found.choices[0].finish_reason) == ("assistant", "length")
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(served.llm.tokenizer(RENDERED)["input_ids"]), 6)
    assert usage.total_tokens == usage.prompt_tokens + 6
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert (found.object, found.model, found.id[:9]) == ("chat.completion", NAMES[0], "chatcmpl-")


@pytest.mark.parametrize("count", [1, 3])
def test_a_streamed_chat_says_what_a_whole_one_says(count: int, served: "Served") -> None:
    """Role first, the text in pieces, a reason in a piece of its own, the tokens last, and then the end."""
    fields = {"model": NAMES[0], "messages": CHAT, "n": count, "temperature": 1.5, "seed": 7, "max_tokens": 6}

    async def both(client: openai.AsyncOpenAI) -> tuple[Any, list[Any]]:
        whole = await client.chat.completions.create(**fields)
        stream = await client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
        return whole, [chunk async for chunk in stream]

    whole, chunks = served.run(both)
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert [(piece.delta.role, piece.index) for piece in pieces[:count]] == [("assistant", n) for n in range(count)]
    for choice in whole.choices:
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.delta.content or "" for piece in mine) == choice.message.content
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        params = SamplingParams(max_tokens=6, temperature=1.5, seed=7 + choice.index)
        assert choice.message.content == served.llm.generate(RENDERED, params)[0].text, "a choice has a seed of its own"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({choice.message.content for choice in whole.choices}) == count


def test_completions_take_texts_and_ids_and_repeat_them(served: "Served") -> None:
    """Choices come in the order of prompts, each prompt's together; 16 tokens unless stated; `echo` puts the prompt first."""
    prompts = ["one", "two"]
    ids = [served.llm.tokenizer(prompt)["input_ids"] for prompt in prompts]
    greedy = {"model": NAMES[1], "temperature": 0, "extra_body": {"ignore_eos": True}}

    async def three(client: openai.AsyncOpenAI) -> list[Any]:
        given = [{"prompt": prompts, "n": 2}, {"prompt": ids}]
        echoed = [await client.completions.create(**one, max_tokens=4, echo=True, **greedy) for one in given]
        return [*echoed, await client.completions.create(prompt=ids[1], **greedy)]

    texts, tokens, single = served.run(three)
    wanted = [prompt + expected(served, prompt, max_tokens=4) for prompt in prompts]
    assert [(choice.index, choice.text) for choice in texts.choices] == list(
        enumerate(wanted[n // 2] for n in range(4))
    )
    assert [choice.text for choice in tokens.choices] == wanted
    assert [choice.text for choice in single.choices] == [expected(served, prompts[1], max_tokens=16)]
    assert texts.usage.prompt_tokens == sum(map(len, ids))
    assert (texts.usage.completion_tokens, single.usage.completion_tokens) == (4 * 4, 16)
    assert texts.model == NAMES[1]


def test_a_streamed_completion_says_what_a_whole_one_says(served: "Served") -> None:
    """The prompt that is echoed comes first; the last piece of a choice has its reason."""
    body = {"prompt": ["one", "two"], "echo": True, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    whole = served.send("/v1/completions", body).json()
    streamed = [frame["choices"][0] for frame in frames(served.send("/v1/completions", {**body, "stream": True}).text)]
    for choice in whole["choices"]:
        mine = [piece for piece in streamed if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "length"


def test_an_unstated_temperature_is_one_and_the_models_own_counts_more(
    served: "Served", monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chat without `temperature` draws as with 1; with a generation config that says 0.5 as with that."""
    body = {"messages": CHAT, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    for stated, temperature in ((None, 1.0), (0.5, 0.5)):
        monkeypatch.setattr(served.llm.model.generation_config, "temperature", stated)
        text = served.send("/v1/chat/completions", body).json()["choices"][0]["message"]["content"]
        assert text == expected(served, RENDERED, seed=3, temperature=temperature)


def test_models_tokens_and_texts(served: "Served") -> None:
    """Every name is listed with the longest sequence; tokenising and back gives the text, special tokens as asked for."""
    listed = served.run(lambda client: client.models.list()).data
    assert [(model.id, model.max_model_len) for model in listed] == [(name, 512) for name in NAMES]
    found = served.send("/tokenize", {"prompt": "hello", "return_token_strs": True}).json()
    assert found["tokens"] == served.llm.tokenizer("hello")["input_ids"]
    assert (found["count"], found["max_model_len"], len(found["token_strs"])) == (5, 512, 5)
    assert served.send("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hello"}
    chat = served.send("/tokenize", {"messages": CHAT}).json()["tokens"]
    assert chat == served.llm.tokenizer(RENDERED)["input_ids"]
    assert served.send("/health").json()["status"] == "ok"


ONE = {"messages": CHAT}
WRONG = {
    "no messages": ("/v1/chat/completions", {}, 400, "messages", "missing_required_parameter"),
    "unknown field": ("/v1/chat/completions", {**ONE, "temprature": 1}, 400, "temprature", "unknown_parameter"),
    "refused field": ("/v1/chat/completions", {**ONE, "audio": {}}, 400, "audio", "unsupported_parameter"),
    "wrong type": ("/v1/chat/completions", {**ONE, "temperature": "hot"}, 400, "temperature", None),
    "true is no number": ("/v1/chat/completions", {**ONE, "max_tokens": True}, 400, "max_tokens", None),
    "too cold": ("/v1/chat/completions", {**ONE, "temperature": 1e-9}, 400, "temperature", None),
    "too many": ("/v1/chat/completions", {**ONE, "n": 17}, 400, "n", None),
    "long stop": ("/v1/chat/completions", {**ONE, "stop": ["ok", "x" * 1001]}, 400, "stop[1]", None),
    "bad role": ("/v1/chat/completions", {"messages": [{"role": "boss"}]}, 400, "messages[0].role", None),
    "picture": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400, "messages[0].content[0]", None,
    ),
    "template variable": ("/v1/chat/completions", {**ONE, "chat_template_kwargs": {"tokenize": 1}}, 400, "messages", None),
    "template": ("/v1/chat/completions", {**ONE, "chat_template": "x"}, 400, "chat_template", "unsupported_parameter"),
    "stream options": ("/v1/chat/completions", {**ONE, "stream_options": {}, "stream": False}, 200, None, None),
    "option inside": (
        "/v1/chat/completions", {**ONE, "stream": True, "stream_options": {"usage": True}}, 400, "stream_options.usage",
        "unknown_parameter",
    ),
    "long prompt": ("/v1/completions", {"prompt": "x" * 512}, 400, "prompt", "context_length_exceeded"),
    "unknown token": ("/v1/completions", {"prompt": [10**6]}, 400, "prompt", None),
    "empty prompt": ("/v1/completions", {"prompt": ""}, 400, "prompt", None),
    "unknown model": ("/v1/completions", {"prompt": "x", "model": "gpt"}, 404, "model", "model_not_found"),
    "detokenize": ("/detokenize", {"tokens": [10**6]}, 400, "tokens", None),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(case: str, served: "Served") -> None:
    """Errors have OpenAI's shape, the field and a word for programs."""
    path, body, status, param, code = WRONG[case]
    found = served.send(path, {"max_tokens": 1, **body} if path.startswith("/v1") else body)
    assert found.status_code == status, found.text
    if status != 200:
        error = found.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["param"], error["code"]) == (param, code)
        assert error["message"]


def test_too_long_a_prompt_names_both_numbers(served: "Served") -> None:
    """How many tokens it has, and how many fit."""
    message = served.send("/v1/completions", {"prompt": "x" * 600}).json()["error"]["message"]
    assert "600" in message
    assert "512" in message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v2", 404),
        ("POST", "/v1/models", 405),
        ("GET", "/v1/models/x", 404),
    ],
)
def test_no_such_route(method: str, path: str, status: int, served: "Served") -> None:
    """Routes and methods that do not exist are refused in the same shape."""
    found = served.send(path, {} if method == "POST" else None, method=method)
    assert found.status_code == status
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"[]", {"content-type": "application/json"}, 400),
        (b'{"prompt": NaN}', {"content-type": "application/json"}, 400),
        (b"\xff", {"content-type": "application/json"}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {}, 415),
    ],
)
def test_a_body_that_is_no_json_is_refused(
    content: bytes, headers: dict[str, str], status: int, served: "Served"
) -> None:
    """By its type, which a form of a foreign page cannot have, and by its content."""
    found = served.send("/v1/completions", method="POST", content=content, headers=headers)
    assert found.status_code == status
    assert found.json()["error"]["type"] == "invalid_request_error"


def test_clients_raise_their_own_errors(served: "Served") -> None:
    """OpenAI's client knows our errors by its own classes."""
    for fields, error in (({"model": "x"}, openai.NotFoundError), ({"n": 0}, openai.BadRequestError)):
        with pytest.raises(error):
            served.run(
                lambda client, fields=fields: client.chat.completions.create(
                    **{"model": NAMES[0], "messages": CHAT, **fields}
                )
            )


def test_keys_hosts_origins_and_lengths_are_checked_first(served: "Served") -> None:
    """Before any route; `/health` alone needs no key. A page of another name cannot reach the server."""
    app = make_app(served.service, Rules(keys=["one", "two"], hosts=["box.example"], most_bytes=100))
    for key, status in (("one", 200), ("two", 200), ("three", 401), ("", 401), ("oné", 401)):
        for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
            encoded = {name: value.encode() for name, value in headers.items()}
            assert served.send("/v1/models", app=app, headers=encoded).status_code == status
    assert served.send("/health", app=app).status_code == 200
    right = {"x-api-key": "one"}
    for name, status in (
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("box.example", 200), ("BOX.example", 200),
        ("evil.example", 403), ("localhost.evil.example", 403), ("", 403),
    ):  # fmt: skip
        assert served.send("/v1/models", app=app, headers={**right, "host": name}).status_code == status, name
        if name:
            origin = served.send("/v1/models", app=app, headers={**right, "origin": f"http://{name}"})
            assert origin.status_code == status, name
    assert served.send("/v1/models", app=app, headers={**right, "origin": "null"}).status_code == 403
    assert served.send("/tokenize", {"prompt": "x" * 100}, app=app, headers=right).status_code == 413

    async def pieces() -> Any:
        for _ in range(3):
            yield b'{"prompt": "' + b"x" * 90

    long = served.send(
        "/tokenize", method="POST", app=app, content=pieces(), headers={**right, "content-type": "application/json"}
    )
    assert long.status_code == 413, "also where no length is stated"
    with pytest.raises(openai.AuthenticationError):
        served.run(lambda client: client.models.list(), app=app, key="wrong")


def test_log_probabilities_are_the_engines_in_both_shapes(served: "Served") -> None:
    """Chats list them a token; completions as four lists, with the prompt's where it is echoed, as evaluations read them."""
    fields = {"model": NAMES[0], "temperature": 0, "max_tokens": 4}
    kept = {"ignore_eos": True, "skip_special_tokens": False}

    async def three(client: openai.AsyncOpenAI) -> list[Any]:
        chat = client.chat.completions.create
        stream = await chat(**fields, messages=CHAT, logprobs=True, top_logprobs=2, stream=True, extra_body=kept)
        return [
            await chat(
                **fields, messages=CHAT, logprobs=True, top_logprobs=2, extra_body={**kept, "prompt_logprobs": 1}
            ),
            [chunk async for chunk in stream],
            await client.completions.create(**fields, prompt="some", logprobs=1, echo=True, extra_body=kept),
        ]

    chat, chunks, completion = served.run(three)
    params = SamplingParams(max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True, skip_special_tokens=False)
    wanted = served.llm.generate(RENDERED, params)[0]
    listed = chat.choices[0].logprobs.content
    assert [one.logprob for one in listed] == [found[0].logprob for found in wanted.logprobs]
    assert [[top.logprob for top in one.top_logprobs] for one in listed] == [
        [top.logprob for top in found[1:]] for found in wanted.logprobs
    ]
    assert [one.token for one in listed] == [served.llm.tokenizer.decode([token]) for token in wanted.token_ids]
    assert [one.bytes for one in listed] == [
        None if "\ufffd" in one.token else list(one.token.encode()) for one in listed
    ], "half a character has no bytes here"
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert streamed == listed
    of_prompt = chat.choices[0].prompt_logprobs
    assert of_prompt[0] is None
    assert of_prompt[1][str(wanted.prompt_token_ids[1])]["logprob"] == wanted.prompt_logprobs[1][0].logprob
    wanted = served.llm.generate("some", params)[0]
    lists = completion.choices[0].logprobs
    assert completion.choices[0].text == "some" + wanted.text
    assert lists.tokens == [*"some", *(served.llm.tokenizer.decode([token]) for token in wanted.token_ids)]
    assert lists.text_offset == [len("".join(lists.tokens[:place])) for place in range(8)]
    own = [None, *(found[0].logprob for found in (*wanted.prompt_logprobs[1:], *wanted.logprobs))]
    assert lists.token_logprobs == own
    assert lists.top_logprobs[0] is None
    greedy = [max(top, key=top.get) for top in lists.top_logprobs[4:]]
    assert greedy == lists.tokens[4:], "what is greedy is the most probable"


def scraped(served: "Served") -> dict[str, float]:
    """Every sample of `/metrics`, by name and labels but the model's."""
    text, found = served.send("/metrics").text, {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == NAMES[0]
            assert sample.labels.pop("engine") == "0"
            found[" ".join([sample.name, *sample.labels.values()])] = sample.value
    return found


def test_metrics_count_what_clients_got(served: "Served", monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, requests and times by vLLM's names; the cache's totals are the engine's; reading them changes nothing."""
    monkeypatch.setattr(snapshots, "SECONDS", 0.0)
    before = scraped(served)
    body = {"prompt": ["one", "three"], "max_tokens": 4, "ignore_eos": True, "temperature": 0}
    usage = served.send("/v1/completions", body).json()["usage"]
    served.send("/v1/completions", {**body, "max_tokens": 5, "stop_token_ids": list(range(500))})
    after = scraped(served)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["expertflow_prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert grown["expertflow_generation_tokens_total"] == usage["completion_tokens"] + 2
    assert grown["expertflow_request_success_total length"] == grown["expertflow_request_success_total stop"] == 2
    assert grown["expertflow_time_to_first_token_seconds_count"] == 4
    assert grown["expertflow_inter_token_latency_seconds_count"] == 2 * 3
    assert grown["expertflow_iteration_tokens_total_sum"] == usage["completion_tokens"] + 2
    assert grown["expertflow_e2e_request_latency_seconds_sum"] > 0
    assert after["expertflow_num_requests_running"] == after["expertflow_num_requests_waiting"] == 0
    assert after["expertflow_kv_cache_usage_perc"] == 0
    cache, plan = served.llm.stats.cache, served.llm.plan
    assert after["expertflow_expert_accesses_total hit"] == cache.hits > before["expertflow_expert_accesses_total hit"]
    assert after["expertflow_expert_loads_total correction"] == cache.loads
    assert after["expertflow_expert_slots"] == plan.slots
    assert scraped(served) == after

    async def main() -> dict[str, float]:
        client = Leaving(served.app, "/v1/completions", {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "n": 3})
        await until(lambda: served.worker.running == 3)
        found = await asyncio.to_thread(scraped, served)
        client.leave()
        await client.task
        return found

    live = asyncio.run(main())
    assert live["expertflow_num_requests_running"] == 3
    assert live["expertflow_kv_cache_usage_perc"] == pytest.approx(3 * 5 / (plan.kv_tokens // 64))
    assert served.metrics._times == {}, "nothing is kept of what is over"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["running", "waiting"])
def test_a_client_that_leaves_frees_the_engine(
    when: str, stream: bool, served: "Served", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed or not, queued or running: its requests are gone within two steps, and others go on."""
    engine, steps = served.llm.engine, [0]
    advance = engine.advance

    def counting() -> int:
        steps[0] += 1
        return advance()

    monkeypatch.setattr(engine, "advance", counting)

    async def main() -> None:
        body = {"prompt": "go on", "max_tokens": 400, "ignore_eos": True, "stream": stream, "n": 2}
        client = Leaving(served.app, "/v1/completions", body)
        if when == "waiting":
            with served.halted():
                await until(lambda: served.worker.waiting == 2)
                client.leave()
                await client.task
        else:
            await until(lambda: served.worker.running == 2)
            client.leave()
            await client.task
        left = steps[0]
        assert served.worker.running == served.worker.waiting == 0
        await until(lambda: not engine.unfinished)
        assert steps[0] <= left + 2
        assert '"finish_reason":"length"' not in client.text

    asyncio.run(main())
    assert served.run(lambda client: client.completions.create(model=NAMES[0], prompt="x", max_tokens=1)).usage


def test_half_a_body_is_no_fault_of_the_server(served: "Served", caplog: pytest.LogCaptureFixture) -> None:
    """A client that leaves while it sends says nothing worth a line of the log."""

    async def main() -> None:
        client = Leaving(served.app, "/v1/completions", {"prompt": "x"}, more=True)
        client.leave()
        await asyncio.wait_for(client.task, GUARD)
        assert [message["status"] for message in client.sent if "status" in message] == [499]

    asyncio.run(main())
    assert caplog.text == ""


def test_too_many_waiting_requests_are_refused(served: "Served", monkeypatch: pytest.MonkeyPatch) -> None:
    """With 503 and a time to wait; by number and by prompt tokens. What waits already is served."""
    monkeypatch.setattr(served.worker, "_bounds", Bounds(requests=3, tokens=50))

    async def main(client: openai.AsyncOpenAI) -> None:
        with served.halted():
            first = [
                asyncio.ensure_future(client.completions.create(model=NAMES[0], prompt="x" * 10, max_tokens=1))
                for _ in range(2)
            ]
            await until(lambda: served.worker.waiting == 2)
            for more in ({"prompt": "x", "n": 2}, {"prompt": "x" * 31}):
                with pytest.raises(openai.InternalServerError) as refused:
                    await client.completions.create(model=NAMES[0], max_tokens=1, **more)
                assert refused.value.status_code == 503
                assert refused.value.code == "overloaded"
                assert int(refused.value.response.headers["retry-after"]) >= 1
        assert [len((await each).choices) for each in first] == [1, 1]

    served.run(main)


def test_a_silent_stream_gets_comments(served: "Served", monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing comes from the engine, so that nobody gives the connection up; clients skip them."""
    monkeypatch.setattr(answers, "KEEP_ALIVE_SECONDS", 0.02)

    async def main() -> str:
        client = Leaving(served.app, "/v1/chat/completions", {"messages": CHAT, "max_tokens": 2, "stream": True})
        with served.halted():
            await until(lambda: client.text.count(": waiting\n\n") >= 3)
        await client.task
        return client.text

    assert frames(asyncio.run(main()))[-1]["choices"][0]["finish_reason"] is not None


@pytest.mark.parametrize("stream", [True, False])
def test_a_step_that_fails_is_told_and_does_not_end_the_server(
    stream: bool, served: "Served", monkeypatch: pytest.MonkeyPatch
) -> None:
    """One failure is tried again; from the second on the request ends with an error, and the next one is served."""
    engine, fails = served.llm.engine, [worker._FAULTS]
    advance = engine.advance

    def failing() -> int:
        if fails[0]:
            fails[0] -= 1
            raise RuntimeError("the device fell off")
        return advance()

    monkeypatch.setattr(engine, "advance", failing)
    body = {"prompt": "x", "max_tokens": 2, "ignore_eos": True, "stream": stream}
    found = served.send("/v1/completions", body)
    error = frames(found.text)[-1] if stream else found.json()
    assert error["error"]["type"] == "server_error"
    assert "fell off" not in error["error"]["message"], "what is inside the server is for its log"
    assert found.status_code == (200 if stream else 500)
    fails[0] = worker._FAULTS - 1
    assert served.send("/v1/completions", {**body, "stream": False}).json()["usage"]["completion_tokens"] == 2
