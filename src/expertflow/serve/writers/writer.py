"""What all answers have in common: who answers, how many tokens there were, and how an answer becomes frames of a stream.

A writer gets every output of its requests. It makes the frames of a streamed answer or the body of a whole one; both come
from the same state. Must not know HTTP.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from expertflow.serve.protocol.errors import ApiError

if TYPE_CHECKING:
    from expertflow.engine.request import StreamOutput


class Frame(NamedTuple):
    """One event of a stream.

    Attributes:
        data: becomes JSON.
        event: its name; empty: it has none.
    """

    data: Mapping[str, Any]
    event: str = ""

    @property
    def encoded(self) -> bytes:
        """The bytes of a server-sent event."""
        name = f"event: {self.event}\n".encode() if self.event else b""
        return name + b"data: " + orjson.dumps(self.data) + b"\n\n"


@dataclass(frozen=True, kw_only=True)
class Head:
    """What is the same in every part of an answer.

    Attributes:
        model: name that the answer carries.
        fingerprint: of the model's weights.
        prompt_tokens: of all prompts of the request, each counted once.
        prompts: how many there are; each has as many choices as the others.
        usage: whether a stream tells its tokens at its end.
        always: whether every frame of a stream tells them.
        number: 24 hexadecimal digits, the answer's own.
        created: seconds since 1970.
    """

    model: str
    fingerprint: str = ""
    prompt_tokens: int = 0
    prompts: int = 1
    usage: bool = False
    always: bool = False
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))


class Writer(ABC):
    """Makes an answer of the outputs of one or several requests, its *choices*.

    Args:
        head: what is the same in all parts.
        count: how many choices there are.

    Attributes:
        last: what a stream ends with, after its last frame.
    """

    last = b"data: [DONE]\n\n"

    def __init__(self, head: Head, count: int) -> None:
        """Begin with no output."""
        self.head, self.count = head, count
        self.tokens = [0] * count
        self.reasons: list[str | None] = [None] * count
        self._cached = [0] * count

    def take(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """Add outputs of one choice, in order; the frames that tell what is new."""
        self.tokens[choice] += len(outputs)
        self._cached[choice] = outputs[0].cached_tokens
        if (output := outputs[-1].output) is not None:
            self.reasons[choice] = output.finish_reason
        return self.add(choice, outputs)

    @property
    def cached(self) -> int:
        """Tokens of the prompts that were not read, because an earlier one began with them: of each prompt by the answer with least."""
        each = self.count // self.head.prompts
        return sum(min(self._cached[first : first + each]) for first in range(0, self.count, each))

    @property
    def usage(self) -> dict[str, Any]:
        """Counted tokens, as OpenAI's API names them."""
        prompt, answer = self.head.prompt_tokens, sum(self.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    @abstractmethod
    def begin(self) -> list[Frame]:
        """The frames before the first token."""

    @abstractmethod
    def add(self, choice: int, outputs: Sequence["StreamOutput"]) -> list[Frame]:
        """The frames of new outputs of one choice."""

    @abstractmethod
    def end(self) -> list[Frame]:
        """The frames behind the last token of the last choice."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed, once all choices are over."""

    def fail(self, error: ApiError) -> Frame:
        """The frame of an error after the stream has begun."""
        return Frame(error.body)


class OpenAIWriter(Writer):
    """What chat completions and completions have in common."""

    kind, prefix = "", ""

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> Frame:
        """A frame with these choices."""
        return Frame(self.body(choices, f"{self.kind}.chunk" if self.kind.startswith("chat") else self.kind))

    def body(self, choices: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any]:
        """What frames and whole answers have in common."""
        head = self.head
        found: dict[str, Any] = {
            "id": f"{self.prefix}-{head.number}",
            "object": kind,
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
            "choices": list(choices),
        }
        if head.usage:
            found["usage"] = self.usage if head.always else None
        return found

    def end(self) -> list[Frame]:
        """The tokens, if they were asked for."""
        if not self.head.usage:
            return []
        return [Frame({**self.chunk([]).data, "usage": self.usage})]
