"""The routes. What they do is in `service` and `answers`; what stands before them in `guard`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from expertflow import __version__
from expertflow.serve.answers import GoneError, Json, answer, as_api_error, refusal
from expertflow.serve.guard import Guard, Rules
from expertflow.serve.live.routes import add_live
from expertflow.serve.metrics import CONTENT_TYPE
from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.protocol.openapi import operation
from expertflow.serve.service import Service

_BODY_SECONDS = 60.0
"""Time that a client has to send a request body."""
_CLIENT_GONE = 499
_REFUSALS = {
    400: "a field is wrong, unknown or not supported",
    401: "the key is missing or wrong",
    403: "Host or Origin is not this server's",
    404: "no such model",
    408: "the body did not come in time",
    413: "the body is too long",
    415: "the body is no JSON",
    500: "an error of the server",
    503: "loading, overloaded or shutting down",
}
Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, rules: Rules) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        service: makes calls of bodies; its worker starts with the application and ends with it.
        rules: who may use it.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.close()
        service.close()

    app = FastAPI(
        title="ExpertFlow", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )  # fmt: skip
    app.add_exception_handler(HTTPException, _no_route)
    _add_models(app, service)
    _add_calls(app, service)
    return Guard(app, rules)


def _add_models(app: FastAPI, service: Service) -> None:
    """Routes that say what is served, and how it is."""

    @_route(app, "GET", "/health", statuses=(503,))
    async def health(_: Request) -> Response:
        loading, worker = service.worker.loading, service.worker
        status = "draining" if worker.draining else "ok" if loading.phase == "ready" else loading.phase
        body: dict[str, Any] = {
            "status": status, "phase": loading.phase, "loaded_bytes": loading.done, "total_bytes": loading.total,
            "running": worker.running, "waiting": worker.waiting,
        }  # fmt: skip
        if status == "ok":
            return Json(body)
        error = ApiError(503, f"the server is not ready: {status}", code=status, retry=2)
        return Json({**body, **error.body}, status_code=503, headers=dict(error.headers))

    @_route(app, "GET", "/metrics")
    async def metrics(_: Request) -> Response:
        return Response(await service.metrics.text(service.worker), media_type=CONTENT_TYPE)

    add_live(partial(_route, app, "GET", listed=False), service)

    def about(name: str) -> dict[str, Any]:
        llm = service.worker.llm
        return {
            "id": name, "object": "model", "created": service.created, "owned_by": "expertflow", "root": llm.name,
            "max_model_len": llm.plan.max_length,
        }  # fmt: skip

    @_route(app, "GET", "/v1/models")
    async def models(_: Request) -> Response:
        return Json({"object": "list", "data": [about(name) for name in service.names.served]})

    @_route(app, "GET", "/v1/models/{name:path}", statuses=(404,))
    async def model(request: Request) -> Response:
        return Json(about(service.names.check(request.path_params["name"])))


def _add_calls(app: FastAPI, service: Service) -> None:
    """Routes that take a body."""

    @_route(app, "POST", "/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, service.worker, await service.aside(service.chat, await _body(request)))

    @_route(app, "POST", "/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, service.worker, await service.aside(service.complete, await _body(request)))

    @_route(app, "POST", "/v1/responses")
    async def responses(request: Request) -> Response:
        return await answer(request, service.worker, await service.aside(service.respond, await _body(request)))

    @_route(app, "POST", "/v1/messages")
    async def messages(request: Request) -> Response:
        return await answer(request, service.worker, await service.aside(service.message, await _body(request)))

    @_route(app, "POST", "/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        return Json(await service.aside(service.count, await _body(request)))

    @_route(app, "POST", "/tokenize")
    async def tokenize(request: Request) -> Response:
        return Json(await service.aside(service.tokenize, await _body(request)))

    @_route(app, "POST", "/detokenize")
    async def detokenize(request: Request) -> Response:
        return Json(await service.aside(service.detokenize, await _body(request)))


def _route(
    app: FastAPI, method: str, path: str, statuses: tuple[int, ...] = (), *, listed: bool = True
) -> Callable[[Handler], Handler]:
    """Add a route whose errors have the shape of OpenAI's; `statuses`: those it can answer with beside the usual ones; `listed`: in /openapi.json."""

    def add(handler: Handler) -> Handler:
        async def handled(request: Request) -> Response:
            try:
                return await handler(request)
            except GoneError:
                return Response(status_code=_CLIENT_GONE)  # nobody reads it
            except Exception as error:  # noqa: BLE001 - the client gets what is known of it, the log the rest
                return refusal(as_api_error(error), path)

        usual = _REFUSALS if method == "POST" else {status: _REFUSALS[status] for status in (401, 403, 503, *statuses)}
        app.add_api_route(
            path, handled, methods=[method], name=handler.__name__, response_class=Response, include_in_schema=listed,
            openapi_extra=operation(path.replace(":path", ""), usual) if listed else None,
        )  # fmt: skip
        return handler

    return add


async def _body(request: Request) -> bytes:
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await request.body()
    except ClientDisconnect as error:
        raise GoneError from error
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} s", "Send it again.") from error


async def _no_route(request: Request, error: Exception) -> Response:
    """What Starlette raises itself: no such route, or another method."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    what = f"the route {where} does not exist" if error.status_code == 404 else f"{where}: {error.detail}"
    found = refusal(ApiError(error.status_code, what, "See /openapi.json.", code="unknown_url"), request.url.path)
    found.headers.update(error.headers or {})
    return found
