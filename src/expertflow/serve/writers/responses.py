"""`/v1/responses` as OpenAI's API has it, without state: requests become those of a chat, answers come in its shapes.

Must not know HTTP.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expertflow.serve.protocol.errors import ApiError, bad
from expertflow.serve.protocol.fields import RESPONSES, read_fields, required
from expertflow.serve.protocol.forms import format_of
from expertflow.serve.protocol.messages import text_of
from expertflow.serve.writers.parts import Answer, Part
from expertflow.serve.writers.writer import Frame, Head, Writer

if TYPE_CHECKING:
    from expertflow.engine.request import StreamOutput

_SAME = ("model", "temperature", "top_p", "stream", "tool_choice", "parallel_tool_calls")
_UNDONE = {"item_reference", "compaction"}
"""Items that speak of what only a server with a memory has."""


def chat_fields(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of the chat that a request body asks for, and what was left out of it.

    Raises:
        ApiError: if a field is unknown, refused or wrong; it names the field.
    """
    given = read_fields(body, RESPONSES)
    left_out: list[str] = []
    found = {name: given[name] for name in _SAME if name in given}
    if "max_output_tokens" in given:
        found["max_tokens"] = given["max_output_tokens"]
    wanted = required(given, "input")
    items = [{"role": "user", "content": wanted}] if isinstance(wanted, str) else wanted
    first = [{"role": "system", "content": given["instructions"]}] if given.get("instructions") else []
    found["messages"] = first + _messages(items, left_out)
    if "tools" in given:
        found["tools"] = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(given["tools"])]
    choice = found.get("tool_choice")
    if isinstance(choice, dict):
        found["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    if effort := given.get("reasoning", {}).get("effort"):
        found["reasoning_effort"] = effort
    left_out += [
        f"reasoning.{name}" for name, value in given.get("reasoning", {}).items() if name != "effort" and value
    ]
    if form := given.get("text", {}).get("format"):
        found["form"] = format_of(form, "text.format")
    left_out += [f"text.{name}" for name, value in given.get("text", {}).items() if name != "format" and value]
    return found, left_out


def _messages(items: Sequence[Mapping[str, Any]], left_out: list[str]) -> list[dict[str, Any]]:
    """Items of an input as messages: reasoning, text and calls that follow one another are one message of the model's."""
    found: list[dict[str, Any]] = []

    def mine() -> dict[str, Any]:
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        return found[-1]

    for place, item in enumerate(items):
        kind, where = item.get("type", "message"), f"input[{place}]"
        if kind == "message" and item.get("role") == "assistant":
            message = mine()
            message["content"] += text_of(item.get("content"), f"{where}.content")
        elif kind == "message":
            found.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            mine().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            said = text_of(item.get("output"), f"{where}.output")
            found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": said})
        elif kind == "reasoning":
            texts = [str(part.get("text", "")) for part in item.get("content") or item.get("summary") or ()]
            found.append({"role": "assistant", "content": "", "reasoning_content": "\n".join(texts)})
        elif kind in _UNDONE:
            raise bad(where, f"{where} is of type {kind!r}", "Nothing is kept here: send the whole chat.")
        else:
            left_out.append(str(kind))
    return found


def _tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A tool as chats describe it; others than functions keep their type, and are left out later."""
    if tool.get("type") != "function":
        return {"type": tool.get("type")}
    if not isinstance(tool.get("name"), str):
        raise bad(place, f"{place} has no name", "Give one.")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


class ResponseWriter(Writer):
    """Makes responses.

    Args:
        head: what is the same in all parts.
        answers: one.
        asked: the request's body, of which a response repeats some fields.
    """

    last = b""

    def __init__(self, head: Head, answers: Sequence[Answer], asked: Mapping[str, Any]) -> None:
        """Begin with an empty response."""
        super().__init__(head, len(answers))
        self._answer, self._asked = answers[0], asked
        self._items: list[dict[str, Any]] = []
        self._sent = 0

    def begin(self) -> list[Frame]:
        """The response without output."""
        return [
            self._frame(f"response.{name}", response=self._response("in_progress"))
            for name in ("created", "in_progress")
        ]

    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The new parts: items that begin, grow and end."""
        frames: list[Frame] = []
        for part in self._answer.feed([output.text for output in outputs], last=self.reasons[choice] is not None):
            frames += self._part(part)
        return frames

    def end(self) -> list[Frame]:
        """The end of the last item, and the whole response."""
        closed = self._close()
        return [*closed, self._frame(f"response.{self._status}", response=self._response(self._status))]

    @property
    def _status(self) -> str:
        return "incomplete" if self.reasons[0] == "length" else "completed"

    def _part(self, part: Part) -> list[Frame]:
        if part.call is not None:
            number, call = self._answer.calls[sum(item["type"] == "function_call" for item in self._items)]
            item = {"type": "function_call", "call_id": number, "name": call.name, "arguments": ""}
            frames = [*self._close(), *self._open("fc", item)]
            self._items[-1]["arguments"] = call.arguments
            return [*frames, self._about("response.function_call_arguments.delta", delta=call.arguments)]
        kind, name = ("reasoning", "reasoning_text") if part.kind == "reasoning" else ("message", "output_text")
        frames = []
        if not self._items or self._items[-1]["type"] != kind:
            begun = (
                {"type": "reasoning", "summary": []}
                if kind == "reasoning"
                else {"type": "message", "role": "assistant"}
            )
            frames = [*self._close(), *self._open("rs" if kind == "reasoning" else "msg", {**begun, "content": []})]
            empty = {"type": name, "text": "", **({} if kind == "reasoning" else {"annotations": [], "logprobs": []})}
            self._items[-1]["content"].append(empty)
            frames.append(self._about("response.content_part.added", content_index=0, part=dict(empty)))
        self._items[-1]["content"][0]["text"] += part.text
        more: dict[str, Any] = {} if kind == "reasoning" else {"logprobs": []}
        return [*frames, self._about(f"response.{name}.delta", content_index=0, delta=part.text, **more)]

    def _open(self, prefix: str, item: dict[str, Any]) -> list[Frame]:
        self._items.append({"id": f"{prefix}_{secrets.token_hex(12)}", **item, "status": "in_progress"})
        shown = {**self._items[-1], **({"content": []} if "content" in item else {})}
        return [self._frame("response.output_item.added", output_index=len(self._items) - 1, item=shown)]

    def _close(self) -> list[Frame]:
        """End the item that is open, if there is one."""
        if not self._items:
            return []
        item, frames = self._items[-1], []
        cut = self.reasons[0] == "length" and item["type"] != "function_call"
        item["status"] = "incomplete" if cut else "completed"
        if item["type"] == "function_call":
            frames.append(
                self._about("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"])
            )
        else:
            part = item["content"][0]
            more: dict[str, Any] = {} if part["type"] == "reasoning_text" else {"logprobs": []}
            frames.append(self._about(f"response.{part['type']}.done", content_index=0, text=part["text"], **more))
            frames.append(self._about("response.content_part.done", content_index=0, part=part))
        return [*frames, self._frame("response.output_item.done", output_index=len(self._items) - 1, item=dict(item))]

    def _about(self, event: str, **data: Any) -> Frame:
        """A frame about the item that is open."""
        return self._frame(event, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **data)

    def _frame(self, event: str, **data: Any) -> Frame:
        self._sent += 1
        return Frame({"type": event, "sequence_number": self._sent - 1, **data}, event)

    def _response(self, status: str) -> dict[str, Any]:
        asked, over = self._asked, status != "in_progress"
        usage = {
            "input_tokens": self.head.prompt_tokens, "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": sum(self.tokens), "output_tokens_details": {"reasoning_tokens": self._answer.reasoning_tokens},
            "total_tokens": self.head.prompt_tokens + sum(self.tokens),
        }  # fmt: skip
        return {
            "id": f"resp_{self.head.number}", "object": "response", "created_at": self.head.created, "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.get("instructions"), "max_output_tokens": asked.get("max_output_tokens"),
            "model": self.head.model, "output": list(self._items), "previous_response_id": None, "store": False,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True), "reasoning": asked.get("reasoning") or {},
            "temperature": asked.get("temperature"), "top_p": asked.get("top_p"),
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": asked.get("tool_choice") or "auto", "tools": asked.get("tools") or [], "truncation": "disabled",
            "metadata": asked.get("metadata") or {}, "usage": usage if over else None,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """The response."""
        self._close()
        return self._response(self._status)

    def fail(self, error: ApiError) -> Frame:
        """The frame of an error after the stream has begun."""
        return self._frame("error", code=error.code or error.kind, message=str(error), param=error.param)
