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


class CallMarks(NamedTuple):
    """How a model writes a call.

    Attributes:
        begins: what stands before the arguments; `%s` is the function's name.
        ends: what stands behind them.
        first: before all calls.
        between: between two.
        last: behind all.
        most: calls of one answer.
        argument: before each argument; `%s` is its name. Empty: the arguments are one JSON object.
        behind: behind each argument.
    """

    begins: str
    ends: str = ""
    first: str = ""
    between: str = ""
    last: str = ""
    most: int = 8
    argument: str = ""
    behind: str = ""


class Marks(NamedTuple):
    """How a model writes an answer that a grammar shapes.

    Attributes:
        opens: begins reasoning; empty: it does not reason.
        closes: ends reasoning.
        says: begins text.
        calls: how it calls; None: it does not.
    """

    opens: str = ""
    closes: str = ""
    says: str = ""
    calls: CallMarks | None = None


class FormReader:
    """Of an answer that a grammar shapes: reasoning, then text, in which no marks count.

    Args:
        marks: of the model.
        prompt: which may have begun the reasoning.
    """

    def __init__(self, marks: Marks, prompt: str) -> None:
        """Read what the prompt has begun."""
        self._marks, self._held = marks, ""
        begun = bool(marks.opens) and prompt.rstrip().endswith(marks.opens)
        self._place, self._starts = "thinks" if begun else "begins", not marks.says

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is reasoning."""
        return self._place == "thinks"

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain with this text."""
        self._held += text
        parts: list[Part] = []
        while (part := self._next()) is not None:
            if part.text:
                parts.append(part)
        return parts

    def finish(self) -> list[Part]:
        """What is left, such as a mark that was cut off."""
        held, self._held = self._held.strip() if self.reasoning else self._held, ""
        return [Part("reasoning" if self.reasoning else "content", held)] if held else []

    def _next(self) -> Part | None:
        """The next part, empty for a mark; None: more text is needed."""
        if self._place == "thinks":
            return self._thought()
        if self._starts:
            self._held = self._held.lstrip("\n")
        marks = {"begins": (self._marks.opens, self._marks.says), "says": (self._marks.says,)}.get(self._place, ())
        for mark in filter(None, marks):
            if self._held.startswith(mark):
                self._held = self._held[len(mark) :]
                self._place = "thinks" if mark == self._marks.opens else "said"
                return Part("content")
            if mark.startswith(self._held):
                return None
        if not self._held:
            return None
        text, self._held = self._held, ""
        self._place, self._starts = "said", False
        return Part("content", text)

    def _thought(self) -> Part | None:
        """Reasoning without the blanks at its edges, and without what may be the mark that ends it."""
        text, mark, _ = self._held.partition(self._marks.closes)
        if mark:
            self._held = self._held[len(text) + len(mark) :]
            self._place = "says"
            return Part("reasoning", text.rstrip())
        kept = max(size for size in range(len(self._marks.closes)) if text.endswith(self._marks.closes[:size]))
        said = text[: len(text) - kept].rstrip()
        self._held = self._held[len(said) :]
        return Part("reasoning", said) if said else None


class Shaper(NamedTuple):
    """What is known of a model's answers.

    Attributes:
        make: a reader of one answer, from the prompt and the tools that were given; None: answers have no parts.
        tools: whether the chat template takes tools.
        marks: how answers of a form are written; None where that is not known.
    """

    make: Callable[[str, Sequence[Any]], Reader] | None = None
    tools: bool = False
    marks: Marks | None = Marks()

    def reader(self, prompt: str, tools: Sequence[Any], *, formed: bool) -> Reader:
        """What takes an answer apart.

        Args:
            prompt: that it continues.
            tools: that were given.
            formed: whether its text has a form of its own.
        """
        if self.make is None:
            return PlainReader()
        if formed and not tools and self.marks is not None:
            return FormReader(self.marks, prompt)
        return self.make(prompt, tools)


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
