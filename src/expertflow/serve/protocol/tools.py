"""Tools that a client offers, and how it wants them called. Must not know templates."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from expertflow.serve.protocol.errors import bad
from expertflow.serve.protocol.forms import check_beside, schema_of

_NAME = re.compile(r"[\w.-]{1,128}")
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""Parameters of a function that has none."""


class Function(NamedTuple):
    """A function whose call a grammar can force.

    Attributes:
        name: of the function.
        schema: of its arguments.
        strict: whether a keyword of the schema that cannot be kept is an error.
        param: the field that holds the schema.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool
    param: str


class Tools(NamedTuple):
    """What a request says of tools.

    Attributes:
        given: functions for the chat template, as OpenAI's API describes them.
        left_out: types of tools, and wishes, that were left out.
        single: whether one call at a time is wanted.
        functions: those that may be called, where a grammar has to know them.
        demanded: whether one of them has to be called.
    """

    given: Sequence[dict[str, Any]] = ()
    left_out: Sequence[str] = ()
    single: bool = False
    functions: Sequence[Function] = ()
    demanded: bool = False


def tools_of(fields: Mapping[str, Any], *, shaped: bool = False) -> Tools:
    """The tools of a chat request.

    Args:
        fields: honoured fields: `tools`, `tool_choice`, `parallel_tool_calls`.
        shaped: whether the answer has a form of its own, so that calls need a grammar too.

    Raises:
        ApiError: if a function is described wrongly, or a call is demanded that cannot be.
    """
    choice = fields.get("tool_choice", "auto")
    if choice == "none":
        return Tools()
    given, left_out, functions = [], [], []
    demanded = choice != "auto"
    for place, tool in enumerate(fields.get("tools", ())):
        if tool.get("type") != "function":
            left_out.append(str(tool.get("type")))
            continue
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad(
                f"tools[{place}]",
                f"tools[{place}] is no function with a name",
                'It takes {"type", "function": {"name", ...}}.',
            )
        if demanded or shaped:
            functions.append(_function(function, f"tools[{place}].function"))
        elif function.get("strict"):
            left_out.append("strict")
        given.append(
            {"type": "function", "function": {key: value for key, value in function.items() if key != "strict"}}
        )
    if demanded:
        functions = _chosen(choice, functions)
        check_beside(fields, "tool_choice")
    single = fields.get("parallel_tool_calls", True) is False or isinstance(choice, dict)
    return Tools(given, list(dict.fromkeys(left_out)), single, functions, demanded)


def _chosen(choice: Any, functions: Sequence[Function]) -> list[Function]:
    """The functions of which one has to be called."""
    if choice == "required":
        if not functions:
            raise bad("tool_choice", "tool_choice='required' needs tools", "Send at least one function.")
        return list(functions)
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(named, dict):
        raise bad(
            "tool_choice", f"tool_choice={choice!r} is not supported",
            'It takes auto, none, required, or {"type": "function", "function": {"name"}}.', code="unsupported_parameter",
        )  # fmt: skip
    found = [function for function in functions if function.name == named.get("name")]
    if not found:
        raise bad("tool_choice", f"tool_choice names {named.get('name')!r}, which is no function of tools")
    return found[:1]


def _function(function: Mapping[str, Any], place: str) -> Function:
    name, param = function["name"], f"{place}.parameters"
    if not _NAME.fullmatch(name):
        raise bad(f"{place}.name", f"{place}.name={name[:80]!r} is no name", "Use letters, digits, and any of _ . -")
    given = function.get("parameters")
    schema = _NOTHING if given is None else schema_of(given, param)
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise bad(param, f"{param} describes no object", 'Its type is "object".')
    return Function(name, {"type": "object", **schema}, function.get("strict") is True, param)
