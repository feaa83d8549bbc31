"""One request while it runs: its tokens, its text so far, and when it is over.

Text is decoded token by token, so it can be streamed. A token that ends inside a character is kept back until the
character is complete, and text that may begin a stop text until that is decided. Must not know models and batches.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from expertflow.config import SamplingParams
from expertflow.errors import MaskError, NonFiniteError, RequestError
from expertflow.execution.sampler import NO_CHOICE, NO_TOKEN, Draw, draw_seed
from expertflow.execution.sampling.edits import TokenEdits
from expertflow.execution.sampling.logprobs import Logprob, log_probabilities
from expertflow.execution.sampling.masks import TokenMask

_UNFINISHED = "\ufffd"
_CONTEXT = 6
"""Prompt tokens that generated text is decoded behind: some tokenizers drop the space a text begins with."""
_LONGEST_CHARACTER = 4
"""Tokens of one character at most, where every byte of it is one."""


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A finished request.

    Attributes:
        index: position of the prompt in the call.
        prompt: text, or None if token ids were given.
        prompt_token_ids: tokens of the prompt.
        token_ids: generated tokens, the ending one included.
        text: generated text without special tokens and without the stop text.
        finish_reason: `stop` or `length`.
        first_token_seconds: from the request's arrival to its first token, waiting included.
        token_seconds: mean time of a later token; 0 if there is none.
        seed: seed of its random numbers, stated or drawn; None if it was greedy.
        cached_tokens: tokens of the prompt that were not read, because an earlier prompt began with them.
        logprobs: of each generated token, see `StreamOutput`; None if they were not asked for.
        prompt_logprobs: the same of each prompt token but the first, which has None; None if they were not asked for.
    """

    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    first_token_seconds: float = field(default=0.0, compare=False)
    token_seconds: float = field(default=0.0, compare=False)
    seed: int | None = field(default=None, compare=False)
    cached_tokens: int = field(default=0, compare=False)
    logprobs: tuple[tuple[Logprob, ...], ...] | None = None
    prompt_logprobs: tuple[tuple[Logprob, ...] | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StreamOutput:
    """One step of one request.

    Attributes:
        index: position of the prompt in the call.
        token_id: the new token.
        text: new text that is certain; may be empty.
        output: the whole request, once it has finished.
        error: why the request ended without a result; then there is no new token.
        cached_tokens: as of `RequestOutput`.
        logprobs: the new token's log-probability by the model's own logits, then those of the most probable tokens, which may have it
            again; None if they were not asked for.
    """

    index: int
    token_id: int
    text: str
    output: RequestOutput | None = None
    error: RequestError | None = None
    cached_tokens: int = 0
    logprobs: tuple[Logprob, ...] | None = None


Channel = Callable[[StreamOutput], None]
"""Where the outputs of a request go: called with each, in order, in the thread that steps, under the engine's lock."""


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that turns tokens into text."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of the tokens."""


class TextStream:
    """Makes text of tokens as they come: by the tokenizers library's own stream where the decoder is one of its.

    Any other decoder is called twice a token. No piece ends inside a character; `flush` gives the text of an unfinished
    last one.

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
        return end  # these bytes begin no character

    def _text(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(list(ids), skip_special_tokens=self._skip)

    def push(self, token: int) -> str:
        """Add a token.

        Returns:
            The text that is certain now and was not before; often empty inside a character.
        """
        self._ids.append(token)
        if self._library is None:
            return self._more(last=False)
        try:
            piece = self._stream.step(self._library, token)
        except Exception:  # noqa: BLE001 - the library raises plain Exception where an id changes earlier text
            self._library = None  # the rest goes by two calls of `decode` a token
            return self._more(last=False)
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


@dataclass(kw_only=True)
class Request:
    """Mutable state of a request.

    Args:
        index: position of the prompt in the call.
        prompt: text, if there was one.
        prompt_token_ids: tokens of the prompt.
        params: how to sample and stop.
        ends: token ids that end it.
        limit: tokens it may generate at most.
        decoder: makes text of tokens; None if the model has no tokenizer.
        continues: whether the text continues the prompt (decoder-only) or stands by itself.
        cached_tokens: as of `RequestOutput`; known once it is admitted.
        mask: restricts its tokens; None: it may get any.

    Attributes:
        seed: of its random numbers, stated or drawn.
        logprobs: of the tokens so far, where they are asked for.
        prompt_logprobs: of the prompt's tokens that were read so far, where they are asked for; None for the first.
        begun: when the first pass over its prompt began, by `time.perf_counter`; 0: not yet.
    """

    index: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    ends: Collection[int]
    limit: int
    decoder: Decoder | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    continues: bool = True
    cached_tokens: int = 0
    mask: TokenMask | None = None
    begun: float = 0.0
    _shown: int = 0
    _free: int = 0
    """Where text begins that a stop text may end: behind the first `min_tokens` tokens."""

    def __post_init__(self) -> None:
        """Draw a seed, unless one is stated; list the logits that change; begin decoding at the prompt's end."""
        params = self.params
        self.seed = draw_seed() if params.seed is None else params.seed
        before = self.prompt_token_ids if self.continues else ()
        self._edits = TokenEdits(params, before, self.ends) if params.changes_logits else None
        self.logprobs: list[tuple[Logprob, ...]] = []
        self.prompt_logprobs: list[tuple[Logprob, ...] | None] = [None]
        skip = self.params.skip_special_tokens
        self._stream = None if self.decoder is None else TextStream(self.decoder, before, skip_special=skip)

    @property
    def read_ids(self) -> tuple[int, ...]:
        """The tokens a pass over the prompt reads: with those generated so far, where the sequence is read anew."""
        return (*self.prompt_token_ids, *self.token_ids) if self.continues else self.prompt_token_ids

    @property
    def read_length(self) -> int:
        """How many `read_ids` are."""
        return self.position if self.continues else len(self.prompt_token_ids)

    @property
    def fed(self) -> int:
        """Position of its newest token, which the next step is fed."""
        return self.position - 1 if self.continues else len(self.token_ids)

    @property
    def goes_on(self) -> bool:
        """Whether another token follows its next one, as far as is known."""
        return len(self.token_ids) + 1 < self.limit

    @property
    def kept(self) -> int:
        """Tokens whose keys and values it needs at most: the last one's are never read."""
        return (len(self.prompt_token_ids) if self.continues else 1) + self.limit - 1

    @property
    def position(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    def draw(self) -> Draw:
        """What its next token is chosen by."""
        return Draw(
            params=self.params, seed=self.seed, position=self.position, generated=len(self.token_ids), edits=self._edits,
            mask=self.mask,
        )  # fmt: skip

    def unscored(self, begin: int, end: int) -> range:
        """Positions from `begin` to before `end` whose next token's log-probability is wanted and not there yet."""
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(begin, len(self.prompt_logprobs) - 1), min(end, len(self.prompt_token_ids) - 1))

    def score(self, begin: int, logits: Tensor) -> None:
        """Keep the log-probabilities of the prompt's tokens behind positions from `begin` on; logits `[n, V]`."""
        tokens = self.prompt_token_ids[begin + 1 : begin + 1 + len(logits)]
        self.prompt_logprobs += log_probabilities(logits, tokens, [self.params.prompt_logprobs] * len(tokens))

    def fail(self, fault: str | None = None) -> StreamOutput:
        """End without a result: the logits of the next token are no numbers, or what is wrong with its mask."""
        number = len(self.token_ids) + 1
        error = NonFiniteError(self.index, number) if fault is None else MaskError(self.index, number, fault)
        token = NO_TOKEN if fault is None else NO_CHOICE
        return StreamOutput(index=self.index, token_id=token, text="", error=error)

    def accept(self, token: int) -> str | None:
        """Show the mask the token that was chosen; what went wrong there, or None."""
        if self.mask is not None:
            try:
                self.mask.accept(token)
            except Exception as error:  # noqa: BLE001 - a mask may be anybody's code; its request alone fails
                return f"its mask did not accept token {token}: {error!r}"
        return None

    def append(
        self, token: int, *, waited: float = 0.0, lasted: float = 0.0, logprobs: tuple[Logprob, ...] | None = None
    ) -> StreamOutput:
        """Add the next token.

        Args:
            token: the token.
            waited: seconds from the request's arrival to its first token.
            lasted: seconds from its arrival to this one.
            logprobs: the token's, and of others; None if they are not asked for.

        Returns:
            What is new; with the whole request, if this token ends it.
        """
        self.token_ids.append(token)
        if self._edits is not None:
            self._edits.add(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self._decode(token)
        if len(self.token_ids) <= self.params.min_tokens:
            self._free = len(self.text)
        if token in self.ends:
            self.finish_reason = "stop"
        elif (cut := self._stop_position()) is not None:
            self.text, self.finish_reason = self.text[:cut], "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"
        sure = len(self.text) if self.finish_reason else self._certain()
        fresh = self.text[self._shown : sure]
        self._shown = max(self._shown, sure)
        output = self._output(waited, lasted)
        return StreamOutput(
            index=self.index,
            token_id=token,
            text=fresh,
            output=output,
            logprobs=logprobs,
            cached_tokens=self.cached_tokens,
        )

    def _decode(self, token: int) -> None:
        """Extend the text. Where special tokens are kept, the token that ends the request is left out."""
        if self._stream is None:
            return
        ended = token in self.ends
        if not ended or self.params.skip_special_tokens:
            self.text += self._stream.push(token)
        if ended or len(self.token_ids) >= self.limit:
            self.text += self._stream.flush()

    def _stop_position(self) -> int | None:
        if not self.params.stop:
            return None
        found = [self.text.find(stop, self._free) for stop in self.params.stop]
        return min((position for position in found if position >= 0), default=None)

    def _certain(self) -> int:
        """How much of the text cannot be the beginning of a stop text."""
        if not self.params.stop:
            return len(self.text)
        longest = max(len(stop) for stop in self.params.stop)
        for size in range(min(longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.params.stop):
                return len(self.text) - size
        return len(self.text)

    def _output(self, waited: float, lasted: float) -> RequestOutput | None:
        if self.finish_reason is None:
            return None
        later, params = len(self.token_ids) - 1, self.params
        return RequestOutput(
            index=self.index,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            token_ids=tuple(self.token_ids),
            text=self.text,
            finish_reason=self.finish_reason,
            first_token_seconds=waited,
            token_seconds=(lasted - waited) / later if later else 0.0,
            cached_tokens=self.cached_tokens,
            seed=self.seed if params.temperature else None,
            logprobs=None if params.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=None if params.prompt_logprobs is None else tuple(self.prompt_logprobs),
        )


@dataclass(kw_only=True)
class Totals:
    """What an engine has done so far.

    Attributes:
        tokens: generated tokens.
        prompt_tokens: tokens of the prompts that were added.
        seconds: time in steps.
        first_token_seconds: time to the first token of the request that finished last, waiting included.
        finished: requests that ended with a result.
        prefix_cache_queries: tokens of prompts whose beginnings were looked up.
        prefix_cache_hits: of these, tokens that were not read again.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    finished: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
