"""Answers of `/v1/chat/completions`. Must not know HTTP."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expertflow.serve.protocol.writer import Frame, Head, OpenAIWriter

if TYPE_CHECKING:
    from expertflow.engine.request import StreamOutput


class ChatWriter(OpenAIWriter):
    """Makes chat completions."""

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, head: Head, count: int) -> None:
        """Begin with empty messages."""
        super().__init__(head, count)
        self._texts: list[list[str]] = [[] for _ in range(count)]

    def begin(self) -> list[Frame]:
        """The role of each choice."""
        return [self._delta(choice, {"role": "assistant", "content": ""}) for choice in range(self.count)]

    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The new text, and why the choice ended."""
        text, reason = "".join(output.text for output in outputs), self.reasons[choice]
        self._texts[choice].append(text)
        frames = [self._delta(choice, {"content": text})] if text else []
        return frames if reason is None else [*frames, self._delta(choice, {}, reason)]

    def _delta(self, choice: int, delta: Mapping[str, Any], reason: str | None = None) -> Frame:
        return self.chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def whole(self) -> dict[str, Any]:
        """The messages."""
        choices = [
            {
                "index": choice,
                "message": {"role": "assistant", "content": "".join(self._texts[choice]), "refusal": None},
                "logprobs": None,
                "finish_reason": self.reasons[choice],
            }
            for choice in range(self.count)
        ]
        return {**self.body(choices, self.kind), "usage": self.usage}
