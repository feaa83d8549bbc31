"""Errors that a client gets, in the shape of OpenAI's API. Must not know HTTP servers."""

from collections.abc import Mapping
from typing import Any

from expertflow.errors import ExpertFlowError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
"""Names of kinds of errors by status; other refusals are `invalid_request_error`, and from 500 on `server_error`."""


class ApiError(ExpertFlowError):
    """A request is refused, or has failed.

    Args:
        status: of HTTP.
        what: what is wrong, naming the value.
        remedy: what to do; may be empty.
        param: the field that is wrong, or None.
        code: a word for programs, or None.
        retry: seconds after which the client may try again, or None.
    """

    def __init__(
        self,
        status: int,
        what: str,
        remedy: str = "",
        *,
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
    ) -> None:
        """Keep what the body says."""
        super().__init__(what.removesuffix("."), remedy)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def kind(self) -> str:
        """The kind of error, as clients know it."""
        return "server_error" if self.status >= 500 else TYPES.get(self.status, TYPES[400])

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the answer beside its type."""
        found = {} if self.retry is None else {"retry-after": str(self.retry)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def bad(param: str | None, what: str, remedy: str = "", *, code: str | None = None) -> ApiError:
    """The error of a field that is wrong: status 400, naming it."""
    return ApiError(400, what, remedy, param=param, code=code)
