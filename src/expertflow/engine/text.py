"""Text of a growing sequence of tokens, piece by piece.

The `tokenizers` library's own stream where the tokenizer is one of its, else two calls of `decode` a token. A piece never
ends inside a character; what an unfinished last one leaves comes from `flush`. Must not know requests and stop texts.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_UNFINISHED = "\ufffd"
_CONTEXT = 6
"""Prompt tokens that generated text is decoded behind: some tokenizers drop the space a text begins with."""
_LONGEST_CHARACTER = 4
"""Tokens of one character at most, where every byte of it is one."""


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens."""


class TextStream:
    """Makes text of tokens as they come.

    Args:
        decoder: makes text of tokens.
        prompt_ids: tokens that the text continues; they are no part of it, but for a character they do not finish.
        skip_special: leave special tokens out of the text.
    """

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[int], *, skip_special: bool) -> None:
        """Begin at the prompt's end, or at the character that it does not finish."""
        self._decoder, self._skip = decoder, skip_special
        self._library = decoder if isinstance(decoder, Tokenizer) else None
        whole = self._whole(prompt_ids)
        self._ids, self._read = list(prompt_ids[max(0, whole - _CONTEXT) :]), min(whole, _CONTEXT)
        self._done = 0
        if self._library is None:
            return
        self._stream = DecodeStream(ids=self._ids[: self._read], skip_special_tokens=skip_special)
        for token in self._ids[self._read :]:
            self._stream.step(self._library, token)

    def _whole(self, prompt_ids: Sequence[int]) -> int:
        """Tokens of the prompt up to its last finished character."""
        end = len(prompt_ids)
        for back in range(min(_LONGEST_CHARACTER, end)):
            if not self._text(prompt_ids[max(0, end - back - _CONTEXT) : end - back]).endswith(_UNFINISHED):
                return end - back
        return end  # no beginning of a character: these bytes are none

    def _text(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(list(ids), skip_special_tokens=self._skip)

    def push(self, token: int) -> str:
        """Take a token; the text that is certain now and was not before, often empty inside a character."""
        self._ids.append(token)
        if self._library is None:
            return self._more(last=False)
        piece = self._stream.step(self._library, token)
        if piece is None:
            return ""
        self._done, self._read = self._read, len(self._ids)
        return str(piece)

    def flush(self) -> str:
        """The text of tokens that finished no character; call once, behind the last token."""
        return self._more(last=True)

    def _more(self, *, last: bool) -> str:
        """What the tokens that are not read yet add to those before them."""
        if self._read == len(self._ids):
            return ""
        before, after = self._text(self._ids[self._done : self._read]), self._text(self._ids[self._done :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not last):
            return ""
        self._done, self._read = self._read, len(self._ids)
        return after[len(before) :]
