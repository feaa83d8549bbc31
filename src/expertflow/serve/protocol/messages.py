"""Chat messages as clients send them, made into what chat templates want.

Templates differ from clients: they want text where clients may send parts, mappings where clients send JSON texts, and one
system message at the beginning. Must not know templates and tokenizers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from expertflow.serve.protocol.errors import bad

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = {"text", "input_text", "output_text"}
_KNOWN = {
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "refusal", "audio",
    "annotations", "function_call", "cache_control", "id", "type", "status",
}  # fmt: skip


def messages_of(given: Sequence[Mapping[str, Any]], name: str = "messages") -> list[dict[str, Any]]:
    """Messages for a chat template.

    Leading system and developer messages become one system message. Text parts are joined by line ends. `arguments` of tool
    calls become mappings. Earlier reasoning is there under the names that templates know.

    Args:
        given: the messages.
        name: of the field that they are in, for errors.

    Raises:
        ApiError: if there is none, or one has a role, a part or a call that cannot be read; it names the place.
    """
    if not given:
        raise bad(name, f"{name} is empty", "Send at least one message.")
    found = [_message(one, f"{name}[{place}]") for place, one in enumerate(given)]
    leading = next((place for place, one in enumerate(found) if one["role"] != "system"), len(found))
    if leading > 1:
        joined = "\n\n".join(one["content"] for one in found[:leading] if one["content"])
        found[:leading] = [{"role": "system", "content": joined}]
    return found


def _message(one: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = one.get("role")
    if role not in ROLES:
        raise bad(f"{place}.role", f"{place}.role={role!r} is unknown", f"Known: {', '.join(ROLES)}.")
    if unknown := [key for key in one if key not in _KNOWN]:
        raise bad(f"{place}.{unknown[0]}", f"the field {place}.{unknown[0]} is unknown", "Leave it out.")
    for key in ("audio", "function_call"):
        if one.get(key) is not None:
            raise bad(f"{place}.{key}", f"the field {place}.{key} is not supported", "Leave it out.")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    message["content"] = text_of(one.get("content"), f"{place}.content")
    for key in ("name", "tool_call_id"):
        if one.get(key) is not None:
            message[key] = one[key]
    if reasoning := one.get("reasoning_content") or one.get("reasoning"):
        message["reasoning_content"] = message["thinking"] = text_of(reasoning, f"{place}.reasoning_content")
    if calls := one.get("tool_calls"):
        message["tool_calls"] = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)]
    return message


def text_of(content: Any, place: str) -> str:
    """Text of a message's content: text, a list of text parts, or null.

    Raises:
        ApiError: for anything else, such as a picture.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(place, f"{place} is no text", "Send text, or a list of text parts.")
    texts = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
            texts.append(part["refusal"])
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise bad(f"{place}[{number}]", f"{place}[{number}] is of type {kind!r}", "Models here read text only.")
    return "\n".join(texts)


def _call(call: Any, place: str) -> dict[str, Any]:
    """A tool call of the history, its arguments a mapping; text that is no JSON object stays text, as the model wrote it."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(place, f"{place} is no call of a function", 'It takes {"id", "type": "function", "function": {...}}.')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            read = orjson.loads(arguments or "{}")
        except orjson.JSONDecodeError:
            read = arguments
        arguments = read if isinstance(read, dict) else arguments
    named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"id": call.get("id"), "type": "function", "function": named}
