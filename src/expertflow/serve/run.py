"""Runs the server: binds first, then loads; SIGTERM and SIGINT let running requests end.

1. The socket listens before the model is loaded, and `/health` answers.
2. At the first signal new requests are refused; those that run have some seconds, then they are cancelled.
3. A second signal cancels them at once.

Must not know routes.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from expertflow.errors import ConfigError
from expertflow.serve.worker import Worker

_HEADER_BYTES = 64 * 2**10
_IDLE_SECONDS = 75
_CLOSE_SECONDS = 5
_LOOK_SECONDS = 0.05


class _Server(uvicorn.Server):
    """Leaves signals to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: name or address.
        port: 0: any free one.

    Raises:
        ConfigError: if that cannot be.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"the server cannot listen at {host}, port {port}: {error.strerror or error}", "Choose another --port."
        ) from error
    return bound


def run(app: ASGIApp, worker: Worker, bound: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serve until a signal comes.

    Args:
        app: answers.
        worker: of the application.
        bound: where clients come.
        grace: seconds that running requests have after the first signal.
        ready: called once the model is loaded.

    Raises:
        BaseException: what loading the model raised.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", server_header=False, lifespan="off",
        timeout_keep_alive=_IDLE_SECONDS, timeout_graceful_shutdown=_CLOSE_SECONDS, h11_max_incomplete_event_size=_HEADER_BYTES,
    )  # fmt: skip
    asyncio.run(_run(_Server(config), worker, bound, grace, ready))
    if worker.error is not None:
        raise worker.error


async def _run(
    server: uvicorn.Server, worker: Worker, bound: socket.socket, grace: float, ready: Callable[[], None]
) -> None:
    stop, loop, ends = asyncio.Event(), asyncio.get_running_loop(), list[asyncio.Task[None]]()

    def stopped() -> None:
        if stop.is_set():
            worker.hurry()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped)

    async def end() -> None:
        await stop.wait()
        await worker.drain(grace)
        server.should_exit = True

    async def watch() -> None:
        while worker.loading.phase not in {"ready", "failed"}:  # noqa: ASYNC110 - another thread writes it
            await asyncio.sleep(_LOOK_SECONDS)
        if worker.error is None:
            ready()
        else:
            server.should_exit = True

    ends += [asyncio.ensure_future(end()), asyncio.ensure_future(watch())]
    worker.start()
    try:
        await server.serve(sockets=[bound])
        await worker.close()
    finally:
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
