"""The parts that an answer is made of, and what takes it apart. Must not know models."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class Call(NamedTuple):
    """A call of a tool.

    Attributes:
        name: of the function.
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str


class Part(NamedTuple):
    """A piece of an answer.

    Attributes:
        kind: `content`, `reasoning` or `call`.
        text: of content or reasoning.
        call: of a tool.
    """

    kind: str
    text: str = ""
    call: Call | None = None


class Reader(Protocol):
    """Takes one answer apart as it comes."""

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is reasoning."""

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain with this text."""

    def finish(self) -> list[Part]:
        """What is left at the end of the answer."""


class PlainReader:
    """Of a model whose answers have no parts: all is text."""

    reasoning = False

    def feed(self, text: str) -> list[Part]:
        """The text."""
        return [Part("content", text)] if text else []

    def finish(self) -> list[Part]:
        """Nothing."""
        return []


class Shaper(NamedTuple):
    """What is known of a model's answers.

    Attributes:
        make: a reader of one answer, from the prompt and the tools that were given; None: answers have no parts.
        tools: whether the chat template takes tools.
    """

    make: Callable[[str, Sequence[Any]], Reader] | None = None
    tools: bool = False


@dataclass
class Answer:
    """One choice as it comes together.

    Args:
        reader: takes its text apart.
        most_calls: calls that are kept; further ones are dropped, because the client asked for one at a time.

    Attributes:
        text: content so far.
        reasoning: reasoning so far.
        calls: calls with their ids.
        reasoning_tokens: tokens that came while the model was reasoning.
    """

    reader: Reader
    most_calls: int | None = None
    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Call]] = field(default_factory=list)
    reasoning_tokens: int = 0

    def feed(self, texts: Sequence[str], *, last: bool) -> list[Part]:
        """Add the texts of tokens; what is new, neighbours of one kind joined."""
        parts = []
        for text in texts:
            parts += self.reader.feed(text)
            self.reasoning_tokens += self.reader.reasoning
        if last:
            parts += self.reader.finish()
        kept: list[Part] = []
        for part in parts:
            if part.call is not None:
                if self.most_calls is not None and len(self.calls) >= self.most_calls:
                    continue
                self.calls.append((f"call_{secrets.token_hex(12)}", part.call))
            elif part.kind == "reasoning":
                self.reasoning += part.text
            else:
                self.text += part.text
            if kept and part.call is None and kept[-1].kind == part.kind:
                kept[-1] = Part(part.kind, kept[-1].text + part.text)
            else:
                kept.append(part)
        return kept
