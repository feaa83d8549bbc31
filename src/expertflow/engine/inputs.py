"""What callers give as prompts, and the token ids they become.

Text, token ids (lists, arrays, tensors), what tokenizers return, `{"prompt": ...}`, a `Prompt` that was read before, and chat
messages, which the tokenizer's chat template renders. Everything else is refused by type. Must not know requests and models.
"""

import operator
from collections.abc import Mapping, Sequence
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from expertflow.errors import PromptError

_KINDS = "Give text, token ids, chat messages, or what a tokenizer returned."
_IDS, _PROMPT, _PROMPT_IDS = "input_ids", "prompt", "prompt_token_ids"
_TAKEN = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools",
    "truncation",
})  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that are no variables of a template."""


class Prompt(NamedTuple):
    """A prompt that was read; it can be given wherever a prompt can, and is not tokenised again.

    Attributes:
        text: as it was given, or as the chat template made it; None if token ids were given.
        token_ids: the prompt's token ids.
    """

    text: str | None
    token_ids: tuple[int, ...]


def split_prompts(given: Any) -> list[Any]:
    """One prompt or several, as a list.

    Args:
        given: text; token ids `[T]`; several of either `[B, T]`; a mapping; messages; a `Prompt`; or a sequence of these.

    Raises:
        PromptError: if it is nothing of that kind.
    """
    if isinstance(given, str | Prompt) or is_messages(given):
        return [given]
    if isinstance(given, Mapping):
        return _split_mapping(given)
    dimensions = getattr(given, "ndim", None)
    if dimensions is not None:
        if dimensions not in (1, 2):
            raise PromptError(f"prompts of {dimensions} dimensions cannot be read", "Give token ids [T] or [B, T].")
        return [given] if dimensions == 1 else list(given)
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise PromptError(f"a prompt of type {type(given).__name__} cannot be read", _KINDS)
    return [given] if given and all(_is_number(item) for item in given) else list(given)


def is_messages(given: Any) -> bool:
    """Whether something is a chat: a sequence of messages, each with a role."""
    listed = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    return listed and all(isinstance(item, Mapping) and "role" in item for item in given)


def _split_mapping(given: Mapping[str, Any]) -> list[Any]:
    if _IDS not in given:
        return [given]
    ids = given[_IDS]
    nested = ids.ndim == 2 if hasattr(ids, "ndim") else any(isinstance(entry, Sequence) for entry in ids)
    if not nested:
        return [ids]
    mask = given.get("attention_mask")
    if mask is None:
        return list(ids)
    return [
        [token for token, kept in zip(tokens, marks, strict=True) if int(kept)]
        for tokens, marks in zip(ids, mask, strict=True)
    ]


def _is_number(item: Any) -> bool:
    """Whether something stands for one number, be it a token id or not: no text, no sequence of its own."""
    return not isinstance(item, str | bytes | Mapping | Sequence) and item is not None and not getattr(item, "ndim", 0)


def clean_text(text: str) -> str:
    """Text without halves of surrogate pairs, which no encoding can write: replaced, or joined where both are there."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class PromptReader:
    """Reads prompts with one tokenizer; several threads may use it at once.

    Args:
        tokenizer: of the model, used once before, or None.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Keep the tokenizer."""
        self._tokenizer: Any = tokenizer
        self._lock = Lock()

    def read(self, index: int, prompt: Any, vocabulary: int | None = None) -> Prompt:
        """The token ids of a prompt.

        Args:
            index: its place in the call, for messages.
            prompt: one of those that `split_prompts` gives.
            vocabulary: the model knows tokens 0 to this number - 1; None: not checked.

        Raises:
            PromptError: if it is empty, of another kind, or holds tokens the model does not know.
        """
        if isinstance(prompt, Mapping):
            prompt = self._inside(index, prompt)
        text = None
        if isinstance(prompt, Prompt):
            text, ids = prompt
        elif isinstance(prompt, str):
            text = clean_text(prompt)
            ids = self.encode(index, text)
        elif is_messages(prompt):
            text, ids = self.chat(index, prompt)
        else:
            ids = _as_ids(index, prompt)
        if not ids:
            raise PromptError(f"prompt {index} is empty", "Give at least one token.")
        if vocabulary is not None and (bad := [token for token in ids if not 0 <= token < vocabulary]):
            raise PromptError(f"prompt {index} holds token {bad[0]}", f"The model knows tokens 0 to {vocabulary - 1}.")
        return Prompt(text, ids)

    def _inside(self, index: int, prompt: Mapping[str, Any]) -> Any:
        for key in (_PROMPT, _PROMPT_IDS, _IDS, "messages"):
            if key in prompt:
                return prompt[key]
        raise PromptError(
            f"prompt {index} is a mapping with {', '.join(map(repr, prompt)) or 'nothing'} in it",
            f"It needs {_PROMPT!r}, {_PROMPT_IDS!r}, 'messages', or what a tokenizer returns ({_IDS!r}).",
        )

    def _need_tokenizer(self) -> None:
        if self._tokenizer is None:
            raise PromptError(
                "the model has no tokenizer",
                "Put the original model's tokenizer.json beside it, give `tokenizer`, or token ids instead of text.",
            )

    def encode(self, index: int, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of text, with one beginning-of-text token where text and tokenizer both bring one.

        Args:
            index: its place in the call, for messages.
            text: any text.
            special: whether the tokenizer adds its special tokens, such as one that begins a text.

        Raises:
            PromptError: if there is no tokenizer, or it cannot read the text.
        """
        self._need_tokenizer()
        try:
            with self._lock:
                ids = tuple(self._tokenizer(text, add_special_tokens=special)[_IDS])
        except (TypeError, ValueError, UnicodeError) as error:
            raise PromptError(f"prompt {index} cannot be read by the tokenizer: {error}", _KINDS) from error
        begin = self._tokenizer.bos_token_id
        doubled = begin is not None and ids[:2] == (begin, begin) and text.startswith(self._tokenizer.bos_token)
        return ids[1:] if doubled else ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, special ones included.

        Raises:
            PromptError: if there is no tokenizer.
        """
        self._need_tokenizer()
        with self._lock:
            return str(self._tokenizer.decode(list(token_ids)))

    def chat(
        self,
        index: int,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        goes_on: bool = False,
        begins: bool | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> Prompt:
        """The prompt that the tokenizer's chat template makes of messages.

        Args:
            index: its place in the call, for messages.
            messages: each with a role.
            tools: that the model may call, as OpenAI's API describes them.
            goes_on: the answer continues the last message.
            begins: the prompt ends with what begins an answer; None: unless the last message is continued.
            variables: further variables of the template, such as `enable_thinking`.

        Raises:
            PromptError: if there is no template, or it cannot render this.
        """
        self._need_tokenizer()
        if not self._tokenizer.chat_template:
            raise PromptError(
                f"prompt {index} is a chat, and the model's tokenizer has no chat template",
                "Give text, or a model that was trained to chat.",
            )
        if taken := sorted(_TAKEN & variables.keys()):
            raise PromptError(f"{taken[0]!r} is no variable of a chat template here", "Leave it out.")
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(
                    list(messages), tools=list(tools) or None, tokenize=False, continue_final_message=goes_on,
                    add_generation_prompt=not goes_on if begins is None else begins, **variables,
                )  # fmt: skip
                text = clean_text(text)
                return Prompt(text, tuple(self._tokenizer(text, add_special_tokens=False)[_IDS]))
        except Exception as error:  # a template is a program: it can raise anything
            raise PromptError(
                f"prompt {index}: the chat template cannot render these messages: {error}", "Correct the messages."
            ) from error


def _as_ids(index: int, prompt: Any) -> tuple[int, ...]:
    """Token ids of a list, an array or a tensor.

    Raises:
        PromptError: if it holds anything but whole numbers.
    """
    listed = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(listed, Sequence) or isinstance(listed, str | bytes | bytearray):
        raise PromptError(f"prompt {index} is of type {type(prompt).__name__}", _KINDS)
    ids = []
    for item in listed:
        try:
            if isinstance(item, bool):
                raise TypeError  # noqa: TRY301 - one message for everything that is no token
            ids.append(operator.index(item))
        except TypeError:
            raise PromptError(
                f"prompt {index} holds {item!r}, which is no token id", "Token ids are whole numbers; text is no list."
            ) from None
    return tuple(ids)
