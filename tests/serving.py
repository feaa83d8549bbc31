"""A server in this process for tests: one engine a session, clients without a network, and an ASGI client that can leave."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai

from expertflow import LLM
from expertflow.serve.app import make_app
from expertflow.serve.guard import Rules
from expertflow.serve.load import load
from expertflow.serve.metrics import Metrics
from expertflow.serve.service import Names, Service
from expertflow.serve.worker import Worker
from helpers import GUARD

NAMES = ("tiny", "also-tiny")
TEMPLATE = (
    "{%- if tools %}[tools {{ tools | map(attribute='function.name') | join(' ') }}]{% endif -%}"
    "{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% if not (loop.last and continue_final_message) %}[end]{% endif %}"
    "{%- endfor %}{% if loud is defined %}{{ loud }}{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Of the tests' own: roles, ends, and a variable."""


class Served:
    """A server around a small model.

    Args:
        folder: the model.
    """

    def __init__(self, folder: Path) -> None:
        self.metrics = Metrics(NAMES[0])
        options = {"device": "cpu", "max_batch": 4, "max_live": 8, "prefix_memory": "16MiB"}
        self.worker = Worker(partial(load, str(folder), options), watcher=self.metrics)
        self.service = Service(self.worker, Names(served=NAMES), self.metrics)
        self.app = make_app(self.service, Rules())
        self.worker.start()
        while self.worker.loading.phase not in {"ready", "failed"}:
            time.sleep(0.01)
        assert self.worker.error is None, self.worker.error

    @property
    def llm(self) -> LLM:
        return self.worker.llm

    def close(self) -> None:
        asyncio.run(self.worker.close())
        self.service.close()

    def run(self, work: Callable[[openai.AsyncOpenAI], Awaitable[Any]], app: Any = None, key: str = "none") -> Any:
        """What a client gets, with the official client of OpenAI."""

        async def main() -> Any:
            async with self.http(app) as http:
                client = openai.AsyncOpenAI(
                    api_key=key, base_url="http://localhost/v1", http_client=http, max_retries=0
                )
                return await asyncio.wait_for(work(client), GUARD)

        return asyncio.run(main())

    def http(self, app: Any = None) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(app or self.app), base_url="http://localhost")

    def send(self, path: str, body: Any = None, app: Any = None, method: str = "", **options: Any) -> httpx2.Response:
        """Send one request without a client's help."""

        async def main() -> httpx2.Response:
            async with self.http(app) as http:
                given = {"json": body} if body is not None else {}
                return await http.request(method or ("GET" if body is None else "POST"), path, **given, **options)

        return asyncio.run(main())

    @contextmanager
    def halted(self) -> Iterator[None]:
        """No step runs inside."""
        begun, over = threading.Event(), threading.Event()

        def hold() -> None:
            with self.llm.engine.lock:
                begun.set()
                over.wait(GUARD)

        thread = threading.Thread(target=hold)
        thread.start()
        begun.wait(GUARD)
        try:
            yield
        finally:
            over.set()
            thread.join()


class Leaving:
    """One request over ASGI whose client leaves when it wants to.

    Args:
        app: the server.
        path: of the route.
        body: of the request.
        method: of it.
        more: whether something is missing of the body.
    """

    def __init__(self, app: Any, path: str, body: Any, method: str = "POST", *, more: bool = False) -> None:
        self.sent: list[dict[str, Any]] = []
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": json.dumps(body).encode(), "more_body": more})
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1), "server": ("localhost", 80),
        }  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._messages.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another thread."""
    async with asyncio.timeout(GUARD):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.002)


def frames(text: str) -> list[dict[str, Any]]:
    """The objects of a stream; its end has to be there."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
