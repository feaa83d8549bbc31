"""Grammars: which tokens may come next so that an answer has the form it was asked for. The library is llguidance.

1. At loading the model's tokenizer becomes the library's: seconds for a large vocabulary, and no other thread runs meanwhile.
2. A request's form and functions become one grammar, around it the marks with which the model thinks and calls.
3. Each choice gets a mask on a copy of its state, which the engine asks before each token.

Must not know HTTP and engines.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import llguidance
import numpy as np
import numpy.typing as npt
import orjson

from expertflow.serve.protocol.arguments import arguments_of
from expertflow.serve.protocol.errors import ApiError, bad
from expertflow.serve.protocol.forms import Form
from expertflow.serve.protocol.tools import Function
from expertflow.serve.writers.parts import CallMarks, Marks

LARGEST = 128 * 1024
"""Bytes of a request's schemas at most."""
_STATES = 50_000
"""States of a lexer at most, of about 2 kB each."""
_BLANKS = r"([ \t]{1,2}|\r?\n[ \t]{0,32})"
"""Between two marks of JSON at most, so that a bounded schema has bounded answers: two blanks, or a line's end and an indent."""
_LONGEST_REASON = 300
_ANY = r"(.|\n)*"
_BOUNDS = {"minLength", "maxLength", "pattern"}
"""Keywords with which a text holds no first letter of a mark: to count letters and look for marks at once takes too many states."""


class Task(NamedTuple):
    """What an answer has to be.

    Attributes:
        param: the field that wants it.
        form: of its text; None: it has to be calls.
        functions: that it may call in place of text.
        single: whether one call is enough.
        marks: how the model writes it.
        prompt: what it continues.
    """

    param: str
    form: Form | None
    functions: Sequence[Function]
    single: bool
    marks: Marks
    prompt: str


class GrammarMask:
    """A `TokenMask` that lets an answer keep to a grammar.

    Args:
        matcher: the grammar's state; belongs to this mask alone.
    """

    def __init__(self, matcher: Any) -> None:
        """Keep the state."""
        self._matcher = matcher

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next.

        Raises:
            RuntimeError: if the grammar needs more than its bounds allow.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def accept(self, token: int) -> None:
        """Learn the token that was chosen.

        Raises:
            RuntimeError: if it was not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(_short(self._matcher.get_error()))


class Grammar:
    """A grammar of one request.

    Args:
        matcher: its state at the beginning.
    """

    def __init__(self, matcher: Any) -> None:
        """Keep the state."""
        self._matcher = matcher

    def mask(self) -> GrammarMask:
        """A mask for one choice."""
        return GrammarMask(self._matcher.deep_copy())


class Grammars:
    """Makes grammars for one model.

    Args:
        tokenizer: of transformers; None: the model has none.
        vocabulary: logits of a token.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Sequence[int]) -> None:
        """Build the library's tokenizer. Why that cannot be is told to whoever asks for a grammar."""
        ends = [token for token in ends if token < vocabulary]
        self._special: dict[str, int] = {}
        self._tokenizer: Any = None
        self._failure = "" if ends else "the model has no token that ends an answer"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            self._failure = "the model has no fast tokenizer"
        if self._failure:
            return
        self._read(tokenizer, backend, vocabulary, ends)

    def _read(self, tokenizer: Any, backend: Any, vocabulary: int, ends: list[int]) -> None:
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        try:
            self._tokenizer = llguidance.LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=ends)
        except ValueError as error:
            self._failure = f"the model's tokenizer is of another kind ({_short(str(error))})"
            return
        known = tokenizer.added_tokens_decoder.items()
        self._special = {token.content: number for number, token in known if self._tokenizer.is_special_token(number)}

    def compile(self, task: Task) -> Grammar:
        """The grammar of an answer.

        Args:
            task: what the answer has to be.

        Raises:
            ApiError: if the model cannot be held to a grammar, or this one is too large, wrong, or cannot be kept.
        """
        if self._failure:
            raise bad(task.param, f"{task.param} cannot be kept: {self._failure}", code="unsupported_parameter")
        writer = _Rules(self._special)
        rules = "\n".join(writer.write(task))
        entries = [entry for entry, _ in writer.entries]
        if sum(map(len, map(orjson.dumps, entries))) > LARGEST:
            raise bad(task.param, f"the request's schemas have more than {LARGEST:,} bytes", "Make them smaller.")
        for entry, param in writer.entries:
            self._matcher([entry], param)
        return Grammar(self._matcher([{"lark_grammar": rules}, *_named(entries)], task.param))

    def _matcher(self, entries: Sequence[Mapping[str, Any]], param: str) -> Any:
        """A state at the beginning of a grammar; whether its first token can be told is tried."""
        limits = llguidance.LLParserLimits(max_lexer_states=_STATES, verbose_errors=False)
        text = orjson.dumps({"grammars": entries}).decode()
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        tried = matcher.deep_copy()
        if not tried.is_error():
            tried.compute_bitmask()
        if tried.is_error():
            raise _wrong(param, tried.get_error())
        return matcher


class _Rules:
    """Writes the rules of an answer in Lark's notation; `@g0` and so on are its `entries`: forms, schemas, texts.

    The library takes added tokens such as `<think>` for special ones: no text holds them, and marks have to be these tokens.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._marks = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.entries: list[tuple[dict[str, Any], str]] = []

    def _add(self, entry: dict[str, Any], param: str) -> str:
        """Name an entry, which the field `param` holds."""
        self.entries.append((entry, param))
        return f"@g{len(self.entries) - 1}"

    def write(self, task: Task) -> Iterator[str]:
        """The rules' lines."""
        marks, prompt, answers = task.marks, task.prompt.rstrip(), []
        blank = "BLANK? " if marks.opens and not marks.says else ""
        begun = bool(marks.opens) and prompt.endswith(marks.opens)
        thinks = "thought " if begun else f"({self._text(marks.opens)} thought)? "
        if not marks.opens or (not begun and prompt.endswith(marks.closes)):
            thinks = ""
        yield f"start: {blank if thinks and not begun else ''}{thinks}{blank}answer"
        if task.form:
            answers.append(f"{self._text(marks.says)} {self._add(_form_entry(task.form), task.form.param)}")
        if task.functions:
            assert marks.calls is not None
            answers.append("calls")
            yield from self._calls(task, marks.calls)
        yield "answer: " + " | ".join(answers)
        if blank:
            yield r"BLANK: /\n{1,2}/"
        if thinks:
            yield from self._thought(marks.closes)

    def _calls(self, task: Task, marks: CallMarks) -> Iterator[str]:
        most = 1 if task.single else marks.most
        more = f" ({self._text(marks.between)} call){{0,{most - 1}}}" if most > 1 else ""
        yield f"calls: {self._text(marks.first)} call{more} {self._text(marks.last)}"
        write = self._arguments if marks.argument else self._object
        ends = self._text(marks.ends)
        yield "call: " + " | ".join(
            f"{self._text(marks.begins % one.name)} {write(one, marks)} {ends}" for one in task.functions
        )

    def _object(self, function: Function, _: CallMarks) -> str:
        """All arguments as one JSON object."""
        return self._add(_schema_entry(function.schema, function.param, lenient=not function.strict), function.param)

    def _arguments(self, function: Function, marks: CallMarks) -> str:
        """Arguments one by one, in the order of the schema."""
        found = []
        for one in arguments_of(function):
            if one.text:
                value = self._add({"lark_grammar": "\n".join(self._raw(one.schema, function, marks))}, function.param)
            else:
                entry = _schema_entry(one.schema, function.param, lenient=not function.strict)
                value = f"{self._add(entry, function.param)} {self._text(marks.behind)}"
            found.append(f"({self._text(marks.argument % one.name)} {value}){'' if one.required else '?'}")
        return " ".join(found)

    def _raw(self, schema: Mapping[str, Any], function: Function, marks: CallMarks) -> Iterator[str]:
        """A text as it is, up to what stands behind it; it holds no mark at which a reader would stop."""
        pieces, stops = self._pieces(marks.behind), [marks.behind.strip(), marks.ends.strip()]
        chosen = [schema["const"]] if "const" in schema else schema.get("enum")
        if chosen is not None:
            if found := next((one for one in chosen for stop in stops if stop in one), None):
                raise _wrong(function.param, f"{found!r} holds a mark that ends it")
            yield f"start: ({' | '.join(_quoted(one) for one in chosen)}) {' '.join(pieces)}"
            return
        bodies, empty = [f"/{_ANY}/", f"~/{_ANY}({'|'.join(map(_escaped, stops))}){_ANY}/"], True
        if schema.keys() & _BOUNDS:
            least = schema.get("minLength", 0)
            bodies = [f"/[^{''.join(re.escape(stop[0]) for stop in stops)}]{{{least},{schema.get('maxLength', '')}}}/"]
            empty = least == 0
        if "pattern" in schema:
            searched = _searched(schema["pattern"], function)
            bodies.append(f"/{searched}/")
            empty = empty and re.fullmatch(searched, "") is not None
        special = pieces[0].startswith("<[")
        yield f"start: text{'?' * (special and empty)} {' '.join(pieces[not special :])}"
        yield f"text{'' if special else f'[suffix={pieces[0]}]'}: TEXT"
        yield f"TEXT: {' & '.join(bodies)}"

    def _thought(self, closes: str) -> Iterator[str]:
        """Any text up to a mark: a special token, or a text, of which the first one counts."""
        pieces = self._pieces(closes)
        rest = " ".join(pieces)
        if pieces[0].startswith("<["):
            yield f"thought: THOUGHT? {rest}"
            yield r"THOUGHT: /(.|\n)+/"
            return
        mark = _escaped(orjson.loads(pieces[0]))
        yield f"thought: until {' '.join(pieces[1:])}"
        yield rf"until[lazy]: /(.|\n)*{mark}/"

    def _text(self, text: str) -> str:
        return " ".join(self._pieces(text)) or '""'

    def _pieces(self, text: str) -> list[str]:
        """A fixed text: special tokens by their numbers, the rest as it is."""
        pieces, begin = [], 0
        for found in self._marks.finditer(text):
            pieces += [_quoted(text[begin : found.start()]), f"<[{self._special[found[0]]}]>"]
            begin = found.end()
        return [piece for piece in (*pieces, _quoted(text[begin:])) if piece != '""']


def _quoted(text: str) -> str:
    return orjson.dumps(text).decode()


def _escaped(text: str) -> str:
    """A text as a regular expression between slashes."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


def _searched(pattern: Any, function: Function) -> str:
    """A pattern that a text has to hold somewhere, as an expression for the whole text.

    Raises:
        ApiError: if it is none, or holds `^` or `$` anywhere but at its ends.
    """
    text = str(pattern)
    begins, ends = text.startswith("^"), text.endswith("$") and not text.endswith(r"\$")
    inner = text[begins : len(text) - ends]
    anchors = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "", inner)
    if "^" in anchors or "$" in anchors or ((begins or ends) and "|" in anchors):
        raise _wrong(function.param, f"the pattern {text!r} has anchors in its middle")
    try:
        re.compile(inner)
    except re.error as error:
        raise _wrong(function.param, f"the pattern {text!r} is none: {error}") from error
    inner = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", inner)
    return f"{'' if begins else _ANY}({inner}){'' if ends else _ANY}"


def _named(entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for place, entry in enumerate(entries):
        yield {**entry, "name": f"g{place}"}


def _form_entry(form: Form) -> dict[str, Any]:
    """A form as the library's grammars know it."""
    if form.kind == "json":
        return _schema_entry(form.value, form.param, lenient=False)
    if form.kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(_quoted, form.value))}
    if form.kind == "regex":
        return _entry(llguidance.LLMatcher.grammar_from_regex(form.value))
    try:
        return {"lark_grammar": llguidance.grammar_from("grammar", form.value)}
    except ValueError as error:
        raise _wrong(form.param, str(error)) from error


def _schema_entry(schema: Any, param: str, *, lenient: bool) -> dict[str, Any]:
    """A JSON schema as the library's grammars know it.

    Args:
        schema: of JSON.
        param: the field that holds it.
        lenient: whether keywords that cannot be kept are left out.
    """
    options: Any = {"whitespace_pattern": _BLANKS, "lenient": lenient, "coerce_one_of": lenient}
    try:
        text = orjson.dumps(schema).decode()
        return _entry(llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options))
    except (TypeError, ValueError) as error:
        raise _wrong(param, str(error)) from error


def _entry(text: str) -> dict[str, Any]:
    """The one grammar of a text of the library's."""
    found: dict[str, Any] = orjson.loads(text)["grammars"][0]
    return found


def _wrong(param: str, reason: str) -> ApiError:
    return bad(param, f"{param} cannot be kept: {_short(reason)}", "Change it.")


def _short(reason: str) -> str:
    """The line of the library's reason that says most."""
    lines = reason.strip().splitlines() or [""]
    line = next((line for line in lines if line.startswith("error:")), lines[0]).rstrip(" .")
    if line.startswith("NoExtension"):
        line = "nothing has that form"
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."
