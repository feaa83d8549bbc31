"""Answers of `/v1/completions`. Must not know HTTP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from expertflow.serve.writers.likelihoods import Listed, Texts, of_prompt
from expertflow.serve.writers.writer import Frame, Head, OpenAIWriter

if TYPE_CHECKING:
    from expertflow.engine.request import RequestOutput, StreamOutput


class Wanted(NamedTuple):
    """What a completion holds beside text.

    Attributes:
        texts: gives the text of a token; None: no log-probabilities are wanted.
        logprobs: whether those of the answer's tokens are.
        echo: whether the prompt's tokens are among them.
        prompt: whether the prompt's own are wanted in vLLM's shape.
    """

    texts: Texts | None = None
    logprobs: bool = False
    echo: bool = False
    prompt: bool = False


class CompletionWriter(OpenAIWriter):
    """Makes text completions.

    Args:
        head: what is the same in all parts.
        echoes: what each choice begins with: its prompt if that was asked for, else nothing.
        wanted: beside text.
    """

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, head: Head, echoes: Sequence[str], wanted: Wanted | None = None) -> None:
        """Begin with the prompts that are echoed."""
        super().__init__(head, len(echoes))
        self._texts: list[list[str]] = [[echo] for echo in echoes]
        self._wanted = wanted or Wanted()
        texts = self._wanted.texts
        self._listed = None if texts is None or not self._wanted.logprobs else [Listed(texts) for _ in echoes]
        self._ended: list[RequestOutput | None] = [None] * self.count

    def begin(self) -> list[Frame]:
        """The prompts that are echoed."""
        return [self._piece(choice, echo, None) for choice, (echo,) in enumerate(self._texts) if echo]

    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The new text, and why the choice ended."""
        text, reason = "".join(output.text for output in outputs), self.reasons[choice]
        self._texts[choice].append(text)
        self._ended[choice] = outputs[-1].output
        new = None
        if self._listed is not None:
            listed = self._listed[choice]
            before = len(listed.tokens)
            for output in outputs:
                listed.add(output.token_id, output.logprobs)
            new = listed.since(before)
        return [self._piece(choice, text, reason, new)] if text or reason or new else []

    def _piece(self, choice: int, text: str, reason: str | None, new: dict[str, Any] | None = None) -> Frame:
        return self.chunk([{"index": choice, "text": text, "logprobs": new, "finish_reason": reason}])

    def whole(self) -> dict[str, Any]:
        """The texts."""
        choices = []
        for choice, texts in enumerate(self._texts):
            found = {"index": choice, "text": "".join(texts), "finish_reason": self.reasons[choice]}
            found["logprobs"] = None if self._listed is None else self._all(choice).since(0)
            output = self._ended[choice]
            if self._wanted.prompt and self._wanted.texts is not None and output is not None:
                found["prompt_logprobs"] = of_prompt(self._wanted.texts, output.prompt_logprobs or ())
            choices.append(found)
        return {**self.body(choices, self.kind), "usage": self.usage}

    def _all(self, choice: int) -> Listed:
        """The lists of a choice, with those of its prompt before them if that is echoed."""
        assert self._listed is not None
        output, own = self._ended[choice], self._listed[choice]
        if not self._wanted.echo or output is None:
            return own
        whole = Listed(own.texts)
        for token, found in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False):
            whole.add(token, found)
        for token, found in zip(output.token_ids, output.logprobs or (), strict=False):
            whole.add(token, found)
        return whole
