"""The form that a client wants an answer in: JSON, by a schema or without, or calls of tools. Must not know grammars."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from expertflow.serve.protocol.errors import bad
from expertflow.serve.protocol.tools import Tools

MOST_BYTES = 2**16
"""Of a schema at most, and of all tools of which one is demanded."""


class Form(NamedTuple):
    """What an answer has to be: JSON, or calls, or either where both are there.

    Attributes:
        param: the field that wants it.
        schema: of the JSON; None: no JSON.
        functions: that may be called, as OpenAI's API describes them.
        single: whether one call is wanted.
    """

    param: str
    schema: Mapping[str, Any] | None = None
    functions: Sequence[Mapping[str, Any]] = ()
    single: bool = False


def form_of(fields: Mapping[str, Any], tools: Tools) -> Form | None:
    """The form that a chat request wants, or None if any will do.

    Args:
        fields: honoured fields: `response_format`, `tool_choice`.
        tools: of the request.

    Raises:
        ApiError: if a form is unknown or too long, or a call is demanded and there is no such tool.
    """
    functions = [tool["function"] for tool in tools.given]
    if tools.demanded is not None:
        wanted = [one for one in functions if tools.demanded in ("", one["name"])]
        if not wanted:
            raise bad("tool_choice", f"there is no tool {tools.demanded!r} to call", "Describe it in tools.")
        _check_size("tools", wanted)
        return Form("tool_choice", None, wanted, single=tools.single or tools.demanded != "")
    schema = schema_of(fields.get("response_format", {}), "response_format")
    if schema is None:
        return None
    _check_size("response_format", [schema, *functions])
    return Form("response_format", schema, functions, tools.single)


def schema_of(form: Mapping[str, Any], param: str) -> Mapping[str, Any] | None:
    """The schema of an answer's form, or None if it is text.

    Raises:
        ApiError: if it is unknown, or has no schema.
    """
    kind = form.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = form.get("json_schema", form)
    if kind != "json_schema" or not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        what = f"{param} of type {kind!r} is unknown, or has no schema"
        raise bad(param, what, 'It takes {"type": "json_schema", "json_schema": {"schema": {...}}}.')
    found: Mapping[str, Any] = inner["schema"]
    return found


def _check_size(param: str, parts: Sequence[Any]) -> None:
    if (size := len(orjson.dumps(parts))) > MOST_BYTES:
        raise bad(param, f"{param} takes {size} bytes as a grammar", f"{MOST_BYTES} at most.")
