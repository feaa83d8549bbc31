"""Grammars that answers have to follow: JSON schemas and calls of tools, as masks of tokens by llguidance.

A mask may wait for a mark first, such as the end of the reasoning; until then the model is free, but cannot end. Imports
llguidance, so it is itself imported where the model is loaded. Must not know requests and APIs.
"""

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import fill_next_token_bitmask

from expertflow.engine.request import Decoder
from expertflow.engine.text import end_tokens
from expertflow.serve.protocol.errors import ApiError, bad
from expertflow.serve.protocol.forms import Form

if TYPE_CHECKING:
    from expertflow.engine.llm import LLM

_COMPACT = {"x-guidance": {"whitespace_pattern": " ?", "lenient": False}}
"""At most one blank between the parts of JSON: a model could go on with blanks for ever."""


class Grammars:
    """Makes masks for one model. Several threads may use it.

    Args:
        llm: the model.
        calls: how its calls are written: what stands before and behind an object with `name` and `arguments`; None: unknown.
        opens: mark behind which content begins in every answer; empty: content needs none.
    """

    def __init__(self, llm: "LLM", calls: tuple[str, str] | None, opens: str = "") -> None:
        """Keep the model's text side; the tokenizer is read at the first use, because that takes seconds."""
        self._tokenizer, self._vocabulary = llm.tokenizer, llm.plan.shape.vocabulary
        self._decoder = llm.requests.text.decoder
        self._ends = sorted({token for token in end_tokens(llm.model) if token < self._vocabulary})
        self._calls, self._opens, self._lock = calls, opens, Lock()

    @cached_property
    def _tokens(self) -> LLTokenizer:
        return from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends)

    def masks(self, form: Form, count: int, *, reasoning: bool) -> "list[GrammarMask]":
        """Masks of `count` answers.

        Args:
            form: that they have.
            count: of them.
            reasoning: whether the prompt has begun a reasoning, which comes to its end first.

        Raises:
            ApiError: if the model's tokenizer cannot do that, the calls of this model cannot be demanded, or the schema is wrong.
        """
        if self._tokenizer is None or self._decoder is None or not self._ends or not self._tokenizer.is_fast:
            raise bad(
                form.param, "this model's tokenizer knows no grammars", "Leave it out.", code="unsupported_parameter"
            )
        mark = self._opens or ("</think>" if reasoning else "")
        grammar = self._lark(form, blank=bool(reasoning and mark == "</think>"))
        with self._lock:
            tokens = self._tokens
        found = []
        for _ in range(count):
            matcher = LLMatcher(tokens, grammar, log_level=0)
            if matcher.is_error():
                raise bad(form.param, f"the schema cannot be used: {_line(matcher.get_error())}", "Correct it.")
            found.append(GrammarMask(matcher, self._ends, _Waiting(self._decoder, mark) if mark else None))
        return found

    def _lark(self, form: Form, *, blank: bool) -> str:
        """The grammar: an answer, calls, or either."""
        starts = (["answer"] if form.schema is not None else []) + (["calls"] if form.functions else [])
        rules = [f"start: {'BLANK ' if blank else ''}({' | '.join(starts)})"]
        rules += ["BLANK: /\\n{0,2}/"] if blank else []
        if form.schema is not None:
            rules.append(f"answer: %json {json.dumps({**form.schema, **_COMPACT})}")
        if form.functions:
            if self._calls is None or self._opens:
                raise bad(
                    form.param,
                    "calls of this model cannot be demanded",
                    "Use tool_choice auto.",
                    code="unsupported_parameter",
                )
            before, behind = (json.dumps(text) for text in self._calls)
            one = {"anyOf": [_call(function) for function in form.functions]}
            rules.append(f"calls: call{'' if form.single else ' (NEXT call)*'}")
            rules.append(f"call: {before} object {behind}")
            rules += [] if form.single else ['NEXT: "\\n"']
            rules.append(f"object: %json {json.dumps({**one, **_COMPACT})}")
        return "\n".join(rules)


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object", "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"], "additionalProperties": False,
    }  # fmt: skip


def _line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:300]


class _Waiting:
    """Looks for a mark in the text of tokens."""

    def __init__(self, decoder: Decoder, mark: str) -> None:
        self._decoder, self._mark, self._tail = decoder, mark, list[int]()

    def found(self, token: int) -> bool:
        """Whether the mark ends with this token, or within it."""
        self._tail = [*self._tail[-len(self._mark) :], token]
        return self._mark in self._decoder.decode(self._tail, skip_special_tokens=False)


class GrammarMask:
    """Restricts the tokens of one request to a grammar; see `TokenMask`.

    Args:
        matcher: where in the grammar the answer is.
        ends: tokens that end an answer.
        waiting: for the mark that the grammar begins behind; None: it begins at once.
    """

    def __init__(self, matcher: LLMatcher, ends: Collection[int], waiting: _Waiting | None) -> None:
        """Begin."""
        self._matcher, self._ends, self._waiting = matcher, ends, waiting

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next."""
        if self._waiting is not None:
            row[:] = -1
            for token in self._ends:
                row.view(np.uint32)[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        elif self._matcher.is_stopped():
            for token in self._ends:
                row.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)
        else:
            fill_next_token_bitmask(self._matcher, row[None], 0)

    def accept(self, token: int) -> None:
        """Learn the token that was chosen.

        Raises:
            ApiError: if the grammar does not allow it, which is a mistake of ours.
        """
        if self._waiting is not None:
            self._waiting = None if self._waiting.found(token) else self._waiting
        elif not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise ApiError(500, f"the grammar does not allow token {token}: {_line(self._matcher.get_error())}")
