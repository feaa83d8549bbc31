"""What stands before every route: foreign pages, missing keys, bodies that are too long or no JSON.

A page in a browser can reach a server on the loopback by a name of its own that it lets point there (DNS rebinding), so the
names in `Host` and `Origin` are checked. Must not know routes but those that need no key.
"""

import hashlib
import hmac
import socket
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertflow.serve.answers import refusal
from expertflow.serve.protocol.errors import ApiError

OPEN = frozenset({"/", "/health", "/ping"})
"""Routes that need no key; the live page holds nothing, and asks for a key where its data need one."""
_LOOPBACK = frozenset({"localhost"})


class Rules(NamedTuple):
    """What the guard lets pass.

    Attributes:
        keys: any of them opens the server; none: it needs no key.
        hosts: names under which the server may be reached, beside addresses, `localhost` and the machine's own name; `*`: any.
        most_bytes: of a request body.
    """

    keys: Sequence[str] = ()
    hosts: Collection[str] = ()
    most_bytes: int = 32 * 2**20


class Guard:
    """An ASGI application in front of another.

    Args:
        app: gets what passes.
        rules: what passes.
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        """Keep digests of the keys, not the keys."""
        self._app, self._most = app, rules.most_bytes
        self._digests = [_digest(key) for key in rules.keys]
        self._hosts = {*_LOOPBACK, socket.gethostname().lower(), *(host.lower() for host in rules.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except ApiError as error:
            await refusal(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        for name in ("host", "origin"):
            self._check_name(name, headers.get(name))
        if self._digests and scope["path"] not in OPEN and not self._opens(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong",
                "Send it as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > self._most):
            raise self._too_long()
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not kind.endswith("+json"):
                raise ApiError(415, f"the content type {kind!r} is not JSON", "Send `Content-Type: application/json`.")

    def _check_name(self, header: str, value: str | None) -> None:
        if value is None or "*" in self._hosts:
            return
        try:
            name = urlsplit(value if header == "origin" else f"//{value}").hostname or ""
        except ValueError:
            name = ""
        if name.rstrip(".") in self._hosts or name.endswith(".localhost") or _is_address(name):
            return
        raise ApiError(
            403,
            f"{header} {value!r} is not this server's",
            "Allow the name with --allowed-host.",
            code=f"{header}_not_allowed",
        )

    def _opens(self, headers: Headers) -> bool:
        """Whether a key is right. All keys are compared whole, so that the time taken tells nothing about them."""
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = [hmac.compare_digest(_digest(given), known) for known in self._digests]
        return any(found)

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self._most} bytes", "Send less.", code="body_too_long")

    def _bounded(self, receive: Receive) -> Receive:
        """Count the bytes of a body that comes without its length."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_long()
            return message

        return counted


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_address(name: str) -> bool:
    """Whether a name is an address: nobody can let that point elsewhere."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
