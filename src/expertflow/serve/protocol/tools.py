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
    """

    given: Sequence[dict[str, Any]] = ()
    left_out: Sequence[str] = ()
    single: bool = False


def tools_of(fields: Mapping[str, Any]) -> Tools:
    """The tools of a chat request.

    Args:
        fields: honoured fields: `tools`, `tool_choice`, `parallel_tool_calls`.

    Raises:
        ApiError: if a function is described wrongly, or a call is demanded.
    """
    choice = fields.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise bad(
            "tool_choice", f"tool_choice={choice!r} is not supported", "A model may be offered tools, not made to call them.",
            code="unsupported_parameter",
        )  # fmt: skip
    if choice == "none":
        return Tools()
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
    return Tools(given, list(dict.fromkeys(left_out)), single=fields.get("parallel_tool_calls", True) is False)
