"""`/v1/messages` as Anthropic's API has it: requests become those of a chat, answers come in its shapes.

Must not know HTTP.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from expertflow.serve.protocol.errors import ApiError, bad
from expertflow.serve.protocol.fields import ANTHROPIC, read_fields, required
from expertflow.serve.protocol.forms import format_of
from expertflow.serve.protocol.messages import text_of
from expertflow.serve.writers.parts import Answer, Part
from expertflow.serve.writers.writer import Frame, Head, Writer

if TYPE_CHECKING:
    from expertflow.engine.request import RequestOutput, StreamOutput

_BILLING = "x-anthropic-billing-header:"
"""Begins a system block that changes with every request and says nothing to a model: with it no prompt begins like another."""
_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")
_CHOICES = {"auto": "auto", "none": "none", "any": "required"}
_REASONS = {"stop": "end_turn", "length": "max_tokens"}
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          405: "not_found_error", 413: "request_too_large", 503: "overloaded_error"}  # fmt: skip


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in the shape of Anthropic's API."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the chat that a request body asks for.

    Raises:
        ApiError: if a field is unknown, refused or wrong; it names the field.
    """
    given = read_fields(body, ANTHROPIC)
    found = {name: given[name] for name in _SAME if name in given}
    system = given.get("system", "")
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system
    told = text_of([block for block in blocks if not str(block.get("text", "")).startswith(_BILLING)], "system")
    messages = [{"role": "system", "content": told}] if told else []
    for place, message in enumerate(required(given, "messages")):
        messages += _messages(message, f"messages[{place}]")
    found["messages"] = messages
    if "stop_sequences" in given:
        found["stop"] = given["stop_sequences"]
    if "tools" in given:
        found["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(given["tools"])]
    choice = given.get("tool_choice", {})
    if choice:
        named = {"type": "function", "function": {"name": choice.get("name")}}
        found["tool_choice"] = _CHOICES.get(str(choice.get("type")), named)
        found["parallel_tool_calls"] = not choice.get("disable_parallel_tool_use", False)
    if "thinking" in given:
        found["chat_template_kwargs"] = {"enable_thinking": given["thinking"].get("type") != "disabled"}
    if effort := given.get("output_config", {}).get("effort"):
        found["reasoning_effort"] = effort
    if form := given.get("output_config", {}).get("format"):
        found["form"] = format_of(form, "output_config.format")
    if more := sorted(given.get("output_config", {}).keys() - {"effort", "format"}):
        raise bad(
            f"output_config.{more[0]}", f"the field output_config.{more[0]} is unknown", "It takes effort and format."
        )
    return found


def _messages(message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """One message as those of a chat: results of tools stand in messages of their own there."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    results, texts, calls, thoughts = [], [], [], []
    for number, block in enumerate(content):
        where = f"{place}.content[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            said = text_of(block.get("content"), f"{where}.content")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": said})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(text_of([block], where))
    one: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if calls:
        one["tool_calls"] = calls
    if thoughts:
        one["reasoning_content"] = "\n".join(thoughts)
    return results + ([one] if texts or calls or thoughts or not results else [])


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A tool as chats describe it; those that run at Anthropic's keep their type, and are left out later."""
    if tool.get("type", "custom") != "custom":
        return {"type": tool["type"]}
    if not isinstance(tool.get("name"), str):
        raise bad(place, f"{place} has no name", "Give one.")
    schema = tool.get("input_schema", {"type": "object"})
    return {
        "type": "function",
        "function": {"name": tool["name"], "description": tool.get("description", ""), "parameters": schema},
    }


class MessageWriter(Writer):
    """Makes Anthropic's messages.

    Args:
        head: what is the same in all parts.
        answers: one.
        stopped_by: the stop text that ended an output, or None.
    """

    last = b""

    def __init__(
        self, head: Head, answers: Sequence[Answer], stopped_by: "Callable[[RequestOutput], str | None]"
    ) -> None:
        """Begin with an empty message."""
        super().__init__(head, len(answers))
        self._answer, self._stopped_by = answers[0], stopped_by
        self._blocks: list[dict[str, Any]] = []
        self._ended: RequestOutput | None = None

    def begin(self) -> list[Frame]:
        """The message without content."""
        return [self._frame("message_start", message=self._message([]))]

    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The new parts: blocks that begin, grow and end."""
        self._ended = outputs[-1].output
        frames: list[Frame] = []
        for part in self._answer.feed([output.text for output in outputs], last=self.reasons[choice] is not None):
            frames += self._part(part)
        return frames

    def end(self) -> list[Frame]:
        """The end of the last block, and why the message ended."""
        ended = {"stop_reason": self._reason, "stop_sequence": self._stop}
        usage = {
            "input_tokens": self.head.prompt_tokens - self.cached, "output_tokens": sum(self.tokens),
            "cache_read_input_tokens": self.cached,
        }  # fmt: skip
        return [*self._close(), self._frame("message_delta", delta=ended, usage=usage), self._frame("message_stop")]

    def _part(self, part: Part) -> list[Frame]:
        if part.call is not None:
            number, call = self._answer.calls[sum(block["type"] == "tool_use" for block in self._blocks)]
            block = {"type": "tool_use", "id": number.replace("call_", "toolu_"), "name": call.name}
            filled = {**block, "input": orjson.loads(call.arguments)}
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            return [*self._close(), *self._open(filled, {**block, "input": {}}), self._grow(delta)]
        kind, key = ("thinking", "thinking") if part.kind == "reasoning" else ("text", "text")
        frames = []
        if not self._blocks or self._blocks[-1]["type"] != kind:
            empty = {"type": kind, key: "", **({"signature": ""} if kind == "thinking" else {})}
            frames = [*self._close(), *self._open(dict(empty), empty)]
        self._blocks[-1][key] += part.text
        return [*frames, self._grow({"type": f"{kind}_delta", key: part.text})]

    def _open(self, block: dict[str, Any], shown: Mapping[str, Any]) -> list[Frame]:
        self._blocks.append(block)
        return [self._frame("content_block_start", index=len(self._blocks) - 1, content_block=shown)]

    def _grow(self, delta: Mapping[str, Any]) -> Frame:
        return self._frame("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> list[Frame]:
        """End the block that is open, if there is one; reasoning is signed with nothing."""
        if not self._blocks:
            return []
        signed = self._blocks[-1]["type"] == "thinking"
        signs = [self._grow({"type": "signature_delta", "signature": ""})] if signed else []
        return [*signs, self._frame("content_block_stop", index=len(self._blocks) - 1)]

    @staticmethod
    def _frame(event: str, **data: Any) -> Frame:
        return Frame({"type": event, **data}, event)

    @property
    def _stop(self) -> str | None:
        return None if self._ended is None else self._stopped_by(self._ended)

    @property
    def _reason(self) -> str | None:
        reason = self.reasons[0]
        if reason == "stop" and self._answer.calls:
            return "tool_use"
        return "stop_sequence" if self._stop is not None else _REASONS.get(reason or "")

    def _message(self, content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        usage = {
            "input_tokens": self.head.prompt_tokens - self.cached, "output_tokens": sum(self.tokens),
            "cache_read_input_tokens": self.cached, "cache_creation_input_tokens": 0,
        }  # fmt: skip
        return {
            "id": f"msg_{self.head.number}", "type": "message", "role": "assistant", "model": self.head.model,
            "content": list(content), "stop_reason": self._reason, "stop_sequence": self._stop, "usage": usage,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The message."""
        return self._message(self._blocks)

    def fail(self, error: ApiError) -> Frame:
        """The frame of an error after the stream has begun."""
        return Frame(error_body(error), "error")
