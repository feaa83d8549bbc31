"""Tools that a client offers, and how it wants them called. Must not know templates."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from expertflow.serve.protocol.errors import bad


class Tools(NamedTuple):
    """What a request says of tools.

    Attributes:
        given: functions for the chat template, as OpenAI's API describes them.
        left_out: types of tools, and wishes, that were left out.
        single: whether one call at a time is wanted.
        demanded: the function that has to be called; empty: any; None: none has to be.
    """

    given: Sequence[dict[str, Any]] = ()
    left_out: Sequence[str] = ()
    single: bool = False
    demanded: str | None = None


def tools_of(fields: Mapping[str, Any]) -> Tools:
    """The tools of a chat request.

    Args:
        fields: honoured fields: `tools`, `tool_choice`, `parallel_tool_calls`.

    Raises:
        ApiError: if a function or the choice is described wrongly.
    """
    choice = fields.get("tool_choice", "auto")
    if choice == "none":
        return Tools()
    demanded = None if choice == "auto" else "" if choice == "required" else _named(choice)
    given, left_out = [], []
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
        if function.get("strict"):
            left_out.append("strict")
        given.append(
            {"type": "function", "function": {key: value for key, value in function.items() if key != "strict"}}
        )
    return Tools(given, list(dict.fromkeys(left_out)), fields.get("parallel_tool_calls", True) is False, demanded)


def _named(choice: Any) -> str:
    """The name of the one function that has to be called."""
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        wanted = 'It takes "auto", "none", "required", or {"type": "function", "function": {"name": ...}}.'
        raise bad("tool_choice", f"tool_choice={choice!r} is unknown", wanted)
    return str(function["name"])
