"""Log-probabilities of tokens, in the shapes that chats and completions give them. Must not know tokenizers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertflow.execution.sampling.logprobs import Logprob

Texts = Callable[[int], str]
"""Gives the text of a token."""
_UNFINISHED = "\ufffd"


def in_chat(texts: Texts, tokens: "Sequence[Sequence[Logprob]]") -> list[dict[str, Any]]:
    """Tokens with their log-probabilities, as a chat's `logprobs.content` holds them.

    Args:
        texts: gives the text of a token.
        tokens: of each token its own log-probability, then those of the most probable ones.
    """
    return [{**_one(texts, own), "top_logprobs": [_one(texts, other) for other in others]} for own, *others in tokens]


def _one(texts: Texts, token: "Logprob") -> dict[str, Any]:
    text = texts(token.token_id)
    data = None if _UNFINISHED in text else list(text.encode())
    return {"token": text, "logprob": token.logprob, "bytes": data}


def of_prompt(texts: Texts, tokens: "Sequence[Sequence[Logprob] | None]") -> list[dict[str, Any] | None]:
    """Log-probabilities of a prompt, as vLLM gives them: by token id, the token's own among them; null for the first."""
    return [
        None
        if found is None
        else {
            str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": texts(one.token_id)}
            for one in found
        }
        for found in tokens
    ]


@dataclass
class Listed:
    """Log-probabilities of a completion so far: four lists of one length.

    Args:
        texts: gives the text of a token.

    Attributes:
        length: characters of the tokens so far.
    """

    texts: Texts
    length: int = 0
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, token: int, found: "Sequence[Logprob] | None") -> None:
        """Add a token; without log-probabilities if it has none, as the first one of a prompt."""
        text = self.texts(token)
        self.tokens.append(text)
        self.text_offset.append(self.length)
        self.length += len(text)
        self.token_logprobs.append(None if found is None else found[0].logprob)
        top: dict[str, float] = {}
        for one in sorted(found or (), key=lambda one: -one.logprob):
            top.setdefault(self.texts(one.token_id), one.logprob)
        self.top_logprobs.append(None if found is None else top)

    def since(self, place: int) -> dict[str, Any]:
        """The lists from a place on."""
        return {
            "tokens": self.tokens[place:],
            "token_logprobs": self.token_logprobs[place:],
            "top_logprobs": self.top_logprobs[place:],
            "text_offset": self.text_offset[place:],
        }
