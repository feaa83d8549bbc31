"""What /openapi.json says of a route: its request body, from the table of its fields, and its answers. Must not know HTTP servers."""

from collections.abc import Mapping
from typing import Any

from expertflow.serve.protocol.fields import TABLES, Use

Schema = Mapping[str, Any]
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(**properties: Schema) -> Schema:
    """An object that has at least these properties."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _several(one: Schema) -> Schema:
    return {"type": "array", "items": one}


def _is(word: str) -> Schema:
    return {"const": word}


_ERROR = _object(
    error=_object(
        message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]},
    )
)  # fmt: skip
_MESSAGE_ERROR = _object(type=_is("error"), error=_object(type=_TEXT, message=_TEXT))
_MODEL = _object(id=_TEXT, object=_is("model"), created=_COUNT, owned_by=_TEXT, root=_TEXT, max_model_len=_COUNT)
_HEALTH = _object(status=_TEXT, phase=_TEXT, loaded_bytes=_COUNT, total_bytes=_COUNT, running=_COUNT, waiting=_COUNT)
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_REASON = {"type": ["string", "null"]}


def _choices(kind: str, **properties: Schema) -> Schema:
    choice = _object(index=_COUNT, finish_reason=_REASON, **properties)
    return _object(id=_TEXT, object=_is(kind), created=_COUNT, model=_TEXT, choices=_several(choice), usage=_USAGE)


_ANSWERS: Mapping[str, Schema] = {
    "/health": _HEALTH,
    "/v1/models": _object(object=_is("list"), data=_several(_MODEL)),
    "/v1/models/{name}": _MODEL,
    "/v1/chat/completions": _choices("chat.completion", message=_object(role=_is("assistant"))),
    "/v1/completions": _choices("text_completion", text=_TEXT),
    "/v1/responses": _object(
        id=_TEXT, object=_is("response"), status=_TEXT, model=_TEXT, output=_several(_object(type=_TEXT, id=_TEXT)),
        usage=_object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "/v1/messages": _object(
        id=_TEXT, type=_is("message"), role=_is("assistant"), model=_TEXT, content=_several(_object(type=_TEXT)),
        stop_reason=_REASON, usage=_object(input_tokens=_COUNT, output_tokens=_COUNT),
    ),
    "/v1/messages/count_tokens": _object(input_tokens=_COUNT),
    "/tokenize": _object(count=_COUNT, max_model_len=_COUNT, tokens=_several(_COUNT)),
    "/detokenize": _object(prompt=_TEXT),
}  # fmt: skip
"""What a route answers with status 200."""
_PLAIN = {"/metrics": "text/plain"}
"""Routes whose answer is no JSON."""
_FIELDS_OF = {"/v1/messages/count_tokens": "/v1/messages"}
"""Routes that take the fields of another one."""
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("messages",),
    "/v1/completions": ("prompt",),
    "/v1/responses": ("input",),
    "/v1/messages": ("messages", "max_tokens"),
    "/v1/messages/count_tokens": ("messages",),
    "/detokenize": ("tokens",),
}


def operation(path: str, refusals: Mapping[int, str]) -> dict[str, Any]:
    """What the document says of a route.

    Args:
        path: of the route; a parameter in braces.
        refusals: what each status of an error means.
    """
    error = _MESSAGE_ERROR if path.startswith("/v1/messages") else _ERROR
    answers = {_PLAIN[path]: {"schema": _TEXT}} if path in _PLAIN else {"application/json": {"schema": _ANSWERS[path]}}
    if path in TABLES and "stream" in TABLES[path]:
        answers["text/event-stream"] = {"schema": _TEXT}
    found: dict[str, Any] = {
        "responses": {"200": {"description": "the answer", "content": answers}}
        | {
            str(status): {"description": text, "content": {"application/json": {"schema": error}}}
            for status, text in refusals.items()
        }
    }
    if path.endswith("{name}"):
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    if (of := _FIELDS_OF.get(path, path)) in TABLES:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _body(of, path)}}}
    return found


def _body(fields: str, path: str) -> Schema:
    """Schema of a request body: every field that is not refused; null is as if it were not there."""
    needed = _REQUIRED.get(path, ())
    properties = {}
    for name, field in TABLES[fields].items():
        if field.use is Use.REFUSED:
            continue
        about = {"description": f"{field.use}{field.why and f': {field.why}'}"}
        free = not field.read.schema or name in needed
        properties[name] = about | (
            dict(field.read.schema) if free else {"anyOf": [field.read.schema, {"type": "null"}]}
        )
    return {"type": "object", "additionalProperties": False, "required": list(needed), "properties": properties}
