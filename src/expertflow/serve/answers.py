"""From outputs to HTTP answers: whole ones, and streams of server-sent events. A client that leaves cancels its requests.

Must not know routes and fields.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertflow.errors import ExpertFlowError, NonFiniteError, RequestError
from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.worker import Item, Outbox, Worker
from expertflow.serve.writers import anthropic
from expertflow.serve.writers.writer import Frame, Writer

if TYPE_CHECKING:
    from expertflow.engine.request import Request as Sequence_

_log = logging.getLogger(__name__)
KEEP_ALIVE_SECONDS = 15.0
"""Silence after which a stream gets a comment, so that no proxy and no client gives it up."""
_STREAM_HEADERS = {
    "cache-control": "no-store",
    "x-accel-buffering": "no",
    "content-type": "text/event-stream; charset=utf-8",
}


@dataclass(kw_only=True)
class Call:
    """What a request body became: sequences to generate, and what makes an answer of them.

    Attributes:
        requests: one a choice.
        writer: makes the answer.
        stream: whether it is streamed.
        headers: of the answer, such as what was left out.
    """

    requests: "Sequence[Sequence_]"
    writer: Writer
    stream: bool
    headers: dict[str, str] = field(default_factory=dict)


class GoneError(Exception):
    """The client closed its connection."""


class Json(Response):
    """A JSON body."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Bytes of the body."""
        return orjson.dumps(content)


def refusal(error: ApiError, path: str) -> Json:
    """The answer to a request that is refused or has failed, in the shape that its route's clients know."""
    body = anthropic.error_body(error) if path.startswith("/v1/messages") else error.body
    return Json(body, status_code=error.status, headers=dict(error.headers))


def as_api_error(error: BaseException) -> ApiError:
    """An error as the client is told of it. What is our mistake goes to the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        code = "not_finite" if isinstance(error, NonFiniteError) else "mask_failed"
        return ApiError(500, error.what, error.remedy, code=code)
    if isinstance(error, ExpertFlowError):
        return ApiError(500, error.what, error.remedy)
    _log.error("a request failed: %s", error, exc_info=error)
    return ApiError(500, f"{type(error).__name__} in the server", "See its log.")


async def beside_client(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work until it is over or the client leaves.

    Raises:
        GoneError: if the client left first; the work is cancelled.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise GoneError
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def take_frames(outbox: Outbox, writer: Writer, show: Callable[[Sequence[Frame]], Awaitable[None]]) -> None:
    """Give every output of an outbox to the writer, until all its choices are over.

    Args:
        outbox: of the request.
        writer: of the answer.
        show: gets the new frames of all outputs that wait; an empty list after `KEEP_ALIVE_SECONDS` of silence.

    Raises:
        ApiError: if a choice failed.
    """
    left = writer.count
    while left:
        items = await outbox.take(KEEP_ALIVE_SECONDS)
        if not items:
            await show([])
        frames: list[Frame] = []
        for choice, group in groupby(items, key=lambda item: item.choice):
            outputs = [_output(item) for item in group]
            frames += writer.take(choice, outputs)
            left -= outputs[-1].output is not None
        if frames:
            await show(frames)


def _output(item: Item) -> Any:
    if item.error is not None:
        raise as_api_error(item.error)
    return item.output


async def answer(request: Request, worker: Worker, call: Call) -> Response:
    """The answer to a call: a stream, or the whole once it is there.

    Raises:
        ApiError: if it is refused, or failed before its first byte was sent.
        GoneError: if the client left before the whole was there.
    """
    outbox = worker.submit(call.requests)
    if call.stream:
        return EventStream(worker, outbox, call)
    began = time.perf_counter()

    async def nothing(_: Sequence[Frame]) -> None:
        pass

    try:
        await beside_client(request.receive, take_frames(outbox, call.writer, nothing))
    finally:
        worker.cancel(outbox)
    took = {"x-processing-ms": f"{(time.perf_counter() - began) * 1e3:.0f}"}
    return Json(call.writer.whole(), headers={**call.headers, **took})


class EventStream(Response):
    """A streamed answer. However it ends, what is left of its requests is cancelled."""

    def __init__(self, worker: Worker, outbox: Outbox, call: Call) -> None:
        """Keep what the stream is made of."""
        super().__init__(headers={**_STREAM_HEADERS, **call.headers})
        del self.headers["content-length"]
        self._worker, self._outbox, self._call = worker, outbox, call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        """Send it."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await beside_client(receive, self._write(send))
        except (GoneError, OSError):
            pass  # nobody reads any more
        finally:
            self._worker.cancel(self._outbox)

    async def _write(self, send: Send) -> None:
        writer = self._call.writer

        async def show(frames: Sequence[Frame]) -> None:
            data = b"".join(frame.encoded for frame in frames) or b": waiting\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        if begin := writer.begin():
            await show(begin)
        try:
            await take_frames(self._outbox, writer, show)
            last = b"".join(frame.encoded for frame in writer.end())
        except ApiError as error:
            last = writer.fail(error).encoded
        await send({"type": "http.response.body", "body": last + writer.last, "more_body": False})
