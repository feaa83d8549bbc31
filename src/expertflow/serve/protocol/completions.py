"""Answers of `/v1/completions`. Must not know HTTP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expertflow.serve.protocol.writer import Frame, Head, OpenAIWriter

if TYPE_CHECKING:
    from expertflow.engine.request import StreamOutput


class CompletionWriter(OpenAIWriter):
    """Makes text completions.

    Args:
        head: what is the same in all parts.
        echoes: what each choice begins with: its prompt if that was asked for, else nothing.
    """

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, head: Head, echoes: Sequence[str]) -> None:
        """Begin with the prompts that are echoed."""
        super().__init__(head, len(echoes))
        self._texts: list[list[str]] = [[echo] for echo in echoes]

    def begin(self) -> list[Frame]:
        """The prompts that are echoed."""
        return [self._piece(choice, echo) for choice, (echo,) in enumerate(self._texts) if echo]

    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The new text, and why the choice ended."""
        text, reason = "".join(output.text for output in outputs), self.reasons[choice]
        self._texts[choice].append(text)
        return [self._piece(choice, text, reason)] if text or reason else []

    def _piece(self, choice: int, text: str, reason: str | None = None) -> Frame:
        return self.chunk([{"index": choice, "text": text, "logprobs": None, "finish_reason": reason}])

    def whole(self) -> dict[str, Any]:
        """The texts."""
        choices = [
            {"index": choice, "text": "".join(texts), "logprobs": None, "finish_reason": self.reasons[choice]}
            for choice, texts in enumerate(self._texts)
        ]
        return {**self.body(choices, self.kind), "usage": self.usage}
