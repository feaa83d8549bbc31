"""Answers of `/v1/chat/completions`. Must not know HTTP."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from expertflow.serve.writers.likelihoods import Texts, in_chat, of_prompt
from expertflow.serve.writers.parts import Answer, Part
from expertflow.serve.writers.writer import Frame, Head, OpenAIWriter

if TYPE_CHECKING:
    from expertflow.engine.request import RequestOutput, StreamOutput


class ChatWriter(OpenAIWriter):
    """Makes chat completions.

    Args:
        head: what is the same in all parts.
        answers: one a choice, empty.
        texts: gives the text of a token; None: no log-probabilities are wanted.
        prompt: whether the prompt's own are wanted in vLLM's shape.
    """

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(
        self, head: Head, answers: Sequence[Answer], texts: Texts | None = None, *, prompt: bool = False
    ) -> None:
        """Begin with empty messages."""
        super().__init__(head, len(answers))
        self._answers, self._texts, self._prompt = answers, texts, prompt
        self._listed: list[list[dict[str, Any]]] = [[] for _ in answers]
        self._ended: list[RequestOutput | None] = [None] * self.count

    def begin(self) -> list[Frame]:
        """The role of each choice."""
        return [self._delta(choice, {"role": "assistant", "content": ""}) for choice in range(self.count)]

    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The new parts, and why the choice ended."""
        answer, reason = self._answers[choice], self.reasons[choice]
        before, new = len(answer.calls), self._likely(choice, outputs)
        deltas = []
        for part in answer.feed([output.text for output in outputs], last=reason is not None):
            deltas.append(self._new(answer, part, before))
            before += part.call is not None
        if new and not deltas:
            deltas.append({"content": ""})
        frames = [self._delta(choice, delta, None, None if place else new) for place, delta in enumerate(deltas)]
        return frames if reason is None else [*frames, self._delta(choice, {}, self._reason(choice))]

    def _likely(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[dict[str, Any]] | None:
        """Log-probabilities of new tokens, if they are wanted."""
        self._ended[choice] = outputs[-1].output
        if self._texts is None or outputs[0].logprobs is None:
            return None
        new = in_chat(self._texts, [output.logprobs or () for output in outputs])
        self._listed[choice] += new
        return new

    @staticmethod
    def _new(answer: Answer, part: Part, number: int) -> dict[str, Any]:
        if part.call is not None:
            return {"tool_calls": [{"index": number, **_tool_call(*answer.calls[number])}]}
        if part.kind == "reasoning":
            return {"reasoning_content": part.text, "reasoning": part.text}
        return {"content": part.text}

    def _reason(self, choice: int) -> str | None:
        """Why a choice ended: calls count more than that the model stopped behind them."""
        return "tool_calls" if self._answers[choice].calls and self.reasons[choice] == "stop" else self.reasons[choice]

    def _delta(
        self, choice: int, delta: Mapping[str, Any], reason: str | None = None, new: Sequence[Any] | None = None
    ) -> Frame:
        likely = None if new is None else {"content": new, "refusal": None}
        return self.chunk([{"index": choice, "delta": delta, "logprobs": likely, "finish_reason": reason}])

    @property
    def usage(self) -> dict[str, Any]:
        """Counted tokens, those of reasoning too."""
        thought = sum(answer.reasoning_tokens for answer in self._answers)
        return {**super().usage, "completion_tokens_details": {"reasoning_tokens": thought}}

    def whole(self) -> dict[str, Any]:
        """The messages."""
        choices = [
            {
                "index": choice,
                "message": _message(answer),
                "logprobs": {"content": self._listed[choice], "refusal": None} if self._listed[choice] else None,
                "finish_reason": self._reason(choice),
                **self._of_prompt(choice),
            }
            for choice, answer in enumerate(self._answers)
        ]
        return {**self.body(choices, self.kind), "usage": self.usage}

    def _of_prompt(self, choice: int) -> dict[str, Any]:
        output = self._ended[choice]
        if not self._prompt or self._texts is None or output is None:
            return {}
        return {"prompt_logprobs": of_prompt(self._texts, output.prompt_logprobs or ())}


def _message(answer: Answer) -> dict[str, Any]:
    said = None if answer.calls and not answer.text else answer.text
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
    if answer.reasoning:
        message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
    if answer.calls:
        message["tool_calls"] = [_tool_call(*call) for call in answer.calls]
    return message


def _tool_call(number: str, call: Any) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
