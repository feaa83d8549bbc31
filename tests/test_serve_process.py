"""The commands `serve` and `chat`: options, files of options, one server as a process, and a chat in a terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request

import httpx2
import pytest
from typer.testing import CliRunner

from expertflow import LLM, SamplingParams
from expertflow.cli import serve as serve_command
from expertflow.cli.chat import Chat, Server
from expertflow.cli.main import app
from expertflow.config import EngineConfig
from expertflow.engine.plan import DEFAULT_CONTEXT, make_plan
from expertflow.engine.planning.length import KEPT, ROOM, longest
from expertflow.engine.prepare import prepare
from expertflow.errors import BudgetError, ConfigError, PromptError
from expertflow.execution.kv.layout import PAGE
from expertflow.serve.options import ServeConfig
from helpers import GUARD, MakeCheckpoint
from serving import TEMPLATE

if TYPE_CHECKING:
    from serving import Served


def served_options(*words: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command `serve` would serve."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(serve_command, "main", lambda **options: found.update(options))
    done = CliRunner().invoke(app, ["serve", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return found


def test_options_have_vllms_names_too_and_may_come_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file gives defaults under any name of an option; the command line counts more."""
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: here\nmax-num-seqs: 3\nserved_model_name: [a, b]\nport: 9\ndevice: cpu\nany-model: true\nslots: 7\n"
    )
    found = served_options("--config", str(file), "--port", "10", "--max-model-len", "2k", monkeypatch=monkeypatch)
    assert found["model"] == "here"
    assert found["engine"]["max_batch"] == 3
    assert (found["engine"]["slots"], found["engine"]["device"]) == ("7", "cpu")
    server = ServeConfig.from_mapping(found["server"])
    assert (server.port, server.served_model_name, server.any_model, server.length) == (10, ("a", "b"), True, 2000)
    other = served_options("there", "--max-batch", "2", "--max-num-batched-tokens", "64", monkeypatch=monkeypatch)
    assert (other["model"], other["engine"]["max_batch"], other["engine"]["prefill_chunk"]) == ("there", 2, 64)
    assert ServeConfig.from_mapping(other["server"]).length is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["--config", "list.yaml"], "no options"),
        (["--config", "wrong.yaml"], "unknown option 'prot'.*'port'"),
        (["--max-model-len", "long"], "max_model_len='long'"),
        (["--max-model-len", "0"], "max_model_len='0'"),
        (["--port", "70000"], "port=70000"),
        (["--gpu-memory-utilization", "2"], "gpu_memory_utilization=2"),
        (["--api-key", ""], "api_key contains an empty text"),
        (["--gpu-memory", "1GiB", "--gpu-memory-utilization", "0.5"], "one budget"),
        (["--max-batch", "0"], "max_batch=0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the value and a remedy."""
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- port\n")
    Path("wrong.yaml").write_text("prot: 1\n")
    monkeypatch.setattr(serve_command, "main", lambda **_: pytest.fail("it would have been served"))
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["serve", *words], catch_exceptions=False)


def test_keys_and_names_are_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key a line, without blanks; a folder is served under its own name, an id under the whole id."""
    file = tmp_path / "keys"
    file.write_text(" one \n\ntwo\n")
    monkeypatch.setenv(serve_command.KEY_VARIABLE, "of the environment")
    options = {"api_key": "zero", "api_key_file": file}
    assert serve_command.keys_of(ServeConfig(**options)) == ["zero", "of the environment", "one", "two"]
    file.write_text("\n")
    for path in (file, tmp_path / "missing"):
        with pytest.raises(ConfigError):
            serve_command.keys_of(ServeConfig(api_key_file=path))
    assert serve_command.default_name(str(tmp_path)) == tmp_path.name
    assert serve_command.default_name("org/model") == "org/model"
    lengths = [ServeConfig(max_model_len=text).length for text in ("4096", "32k", "32K")]
    assert lengths == [4096, 32000, 32768]


@pytest.mark.parametrize("fits", [None, 1024, 3000])
def test_the_longest_sequence_leaves_half_of_the_slots(fits: int | None, make_checkpoint: MakeCheckpoint) -> None:
    """By its own rule, found here by trying every length. `fits`: a length that the budget holds with half of the slots."""
    folder = make_checkpoint("qwen3_moe", max_position_embeddings=8 * 1024)
    config = EngineConfig(device="cpu", max_batch=2, predictor="none", max_length=512)
    prepared = prepare(folder, config)
    shape, free = prepared.plan.shape, 2**23

    def plan(options: EngineConfig) -> Any:
        return make_plan(options, shape, "cpu", prepared.choices.strategy.name)

    def one(length: int, **changes: Any) -> Any:
        return plan(replace(config, max_length=length, kv_tokens=length, **changes))

    budget = None if fits is None else one(fits, slots="50%").total
    config = replace(config, gpu_memory=budget)
    found = longest(plan, replace(config, max_length=None), shape, DEFAULT_CONTEXT, free)

    def good(length: int) -> bool:
        try:
            tried = one(length)
        except BudgetError:
            return False
        return tried.kv <= free * ROOM if budget is None else tried.slots >= one(512).slots * KEPT

    assert found.max_length == max(length for length in range(PAGE, shape.context + 1, PAGE) if good(length))
    assert 512 < found.max_length < shape.context
    if fits is not None:
        assert found.max_length == fits // PAGE * PAGE
    whole = plan(replace(config, max_length=found.max_length, kv_tokens=found.kv_tokens))
    assert whole.kv_tokens >= found.max_length
    assert whole.kv <= free * ROOM if budget is None else whole.total <= budget


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, copied = (
        make_checkpoint("qwen3_moe", spread=0.3, max_position_embeddings=512, vocab_size=259),
        tmp_path_factory.mktemp("chat"),
    )
    for file in made.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    return copied


def test_a_server_is_there_while_it_loads_and_ends_politely(folder: Path, tmp_path: Path) -> None:
    """As a process: it answers before the model is loaded; at SIGTERM what runs is finished, and what comes is refused.

    It takes as long as importing torch in a new process.
    """
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    words = [str(folder), "--port", "0", "--device", "cpu", "--api-key-file", str(keys), "--grace", str(GUARD)]
    with subprocess.Popen(
        [sys.executable, "-m", "expertflow", "serve", *words],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "EXPERTFLOW_CHECK_SHAPES": "0"},
    ) as process:  # fmt: skip
        line = process.stderr.readline()
        url = re.search(r"http://\S+:\d+", line)[0]
        with httpx2.Client(base_url=url, timeout=GUARD, headers={"authorization": "Bearer secret"}) as client:
            early = client.get("/health")
            assert early.status_code == 503
            assert early.json()["error"]["code"] == early.json()["phase"] != "ready"
            assert client.get("/v1/models").json()["error"]["code"] == "loading"
            assert "Ready" in process.stderr.readline()
            assert client.get("/health").json()["loaded_bytes"] > 0
            assert httpx2.get(f"{url}/v1/models").status_code == 401
            body = {"prompt": "go on", "max_tokens": 60, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                assert "text_completion" in next(lines)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.1)
                refused = httpx2.get(f"{url}/v1/models", headers={"authorization": "Bearer secret"})
                rest = [line for line in lines if line]
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert process.wait(GUARD) == 0
        assert process.stderr.read() == ""


class Echo:
    """A backend that says what it was sent last, a word at a time."""

    name = "echo"

    def __init__(self) -> None:
        self.seen: list[list[dict[str, str]]] = []

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        self.seen.append([dict(message) for message in messages])
        if messages[-1]["content"] == "fail":
            raise PromptError("too long", "Shorten it.")
        if messages[-1]["content"].startswith("stop"):
            os.kill(os.getpid(), signal.SIGINT)
        yield from (f"{word} " for word in messages[-1]["content"].split())
        yield "done"


def typed(lines: list[str], backend: Any, system: str = "") -> tuple[Chat, str]:
    """A chat in which these lines were typed, and what was shown."""
    left, shown = iter(lines), list[str]()

    def read(_: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    talk = Chat(backend, system, read, shown.append)
    talk.run()
    return talk, "".join(shown)


def test_a_chat_keeps_its_history_and_takes_commands(tmp_path: Path) -> None:
    """Messages add up; what failed is forgotten; a saved chat goes on."""
    echo, file = Echo(), tmp_path / "chat.json"
    talk, shown = typed(["one \\", "two", "fail", "and it", f"/save {file}", "/nonsense"], echo, "be kind")
    assert echo.seen[0] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one \ntwo"}]
    assert [message["role"] for message in echo.seen[2]] == ["system", "user", "assistant", "user"]
    assert "too long" in shown
    assert "/reset" in shown
    assert talk.messages[-1] == {"role": "assistant", "content": "and it done"}
    assert json.loads(file.read_text())["messages"] == talk.messages
    again, _ = typed([f"/load {file}", "/undo", "more", "/save /missing/x", "/exit", "never"], echo)
    assert again.messages == [
        *talk.messages[:-2],
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "more done"},
    ]
    fresh, _ = typed(["one", "/system new", "two", "/reset"], echo, "old")
    assert fresh.messages == [{"role": "system", "content": "new"}]
    assert echo.seen[-1] == [{"role": "system", "content": "new"}, {"role": "user", "content": "two"}]


def test_a_stopped_answer_ends_the_request() -> None:
    """Ctrl-C while an answer comes closes what makes it, after the piece that is shown."""
    closed = []

    class Long(Echo):
        def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
            try:
                yield from super().answer(messages)
            finally:
                closed.append(len(messages))

    talk, _ = typed(["stop here now"], Long())
    assert talk.messages[-1]["content"] == "stop "
    assert closed == [1]


def test_a_chat_here_and_one_with_a_server_say_the_same(folder: Path, served: "Served") -> None:
    """`LLM.chat`, the command with a model, and the command with a server: one template, one answer."""
    words = ["--max-tokens", "5", "--temperature", "0", "--ignore-eos", "--system", "be kind"]
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with LLM(folder, device="cpu", max_length=64) as llm:
        wanted = llm.chat(messages, params).text
        assert wanted == llm.generate("[system]be kind[end][user]hello[end][assistant]", params)[0].text
        with pytest.raises(PromptError, match="list of messages"):
            llm.chat("hello")
        assert llm.chat_params.temperature == 1
    here = CliRunner().invoke(
        app, ["chat", str(folder), "--device", "cpu", *words], input="hello\n", catch_exceptions=False
    )
    assert wanted in here.stdout
    body = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}

    def pass_on(request: Request) -> BytesIO:
        path = request.full_url.removeprefix("http://localhost")
        found = served.send(
            path, method=request.get_method(), content=request.data, headers=dict(request.header_items())
        )
        if found.is_error:
            raise HTTPError(request.full_url, found.status_code, "", found.headers, BytesIO(found.content))
        return BytesIO(found.content)

    server = Server("http://localhost/v1/", "key", body, pass_on)
    assert server.name == "tiny"
    assert "".join(server.answer(messages)) == wanted
    with pytest.raises(ConfigError, match="messages is empty"):
        list(server.answer([]))


def test_an_address_without_a_server_is_named() -> None:
    """In one line, with what to do."""
    with pytest.raises(ConfigError, match=r"does not answer.*running"):
        CliRunner().invoke(app, ["chat", "--url", "http://127.0.0.1:9"], catch_exceptions=False)
