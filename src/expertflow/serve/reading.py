"""Takes answers of models apart: reasoning, text, and tool calls. One template a model type, for transformers' parser.

A template says by which marks a model begins and ends each part. A tokenizer's own `response_template` counts more than the
table. Imports transformers, so it is itself imported where the model is loaded. Must not know requests and APIs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_parsing import ResponseParser

from expertflow.serve.protocol.arguments import is_text
from expertflow.serve.writers.parts import Call, CallMarks, Marks, Part, Reader, Shaper

if TYPE_CHECKING:
    from expertflow.engine.llm import LLM

_TEXT = {"content": "text", "content_args": {"strip": False}}
_NOTHING = {"close_pattern": r"(?=.|\n)", "repeats": True, **_TEXT}
_JSON = {"content": "json", "content_args": {"allow_non_json": True}}
_THINK = {"open": "<think>", "close": "</think>", **_TEXT}
_AS_IT_IS = {"type": "function", "function": "{content}"}
_NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_TAGGED: Mapping[str, Any] = MappingProxyType({
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": _THINK,
        "tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "repeats": True, **_JSON, "transform": _AS_IT_IS},
        "content": {"close": ["<|im_end|>", "<|endoftext|>"], **_TEXT},
    },
})  # fmt: skip
_TO = r" to=functions\.(?P<name>[\w.-]+)"
_CHANNELS: Mapping[str, Any] = MappingProxyType({
    "start_anchor": "<|start|>assistant",
    "fields": {
        "thinking": {
            "open": "<|channel|>analysis<|message|>", "close": ["<|end|>", "<|return|>"], "repeats": True, "join": "\n", **_TEXT,
        },
        "tool_calls": {
            "open_pattern": rf"(?:{_TO}<\|channel\|>commentary|<\|channel\|>commentary{_TO})[^<]*(?:<\|constrain\|>\w+)?<\|message\|>",
            "close": ["<|call|>", "<|end|>"], "repeats": True, **_JSON, "transform": _NAMED,
        },
        "content": {
            "open_pattern": r"<\|channel\|>(?:final|commentary)<\|message\|>", "close": ["<|end|>", "<|return|>"],
            "repeats": True, "join": "", **_TEXT,
        },
    },
})  # fmt: skip
_DEEPSEEK: Mapping[str, Any] = MappingProxyType({
    "start_anchor": "<｜Assistant｜>",
    "fields": {
        "thinking": _THINK,
        "tool_calls": {
            "open_pattern": r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>(?!function<)[\w.-]+)(?:\n```json\n|<｜tool▁sep｜>)",
            "close_pattern": r"(?:\n```)?<｜tool▁call▁end｜>", "repeats": True, **_JSON, "transform": _NAMED,
        },
        "marks": {"open": ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"], **_NOTHING},
        "content": {"close": "<｜end▁of▁sentence｜>", **_TEXT},
    },
})  # fmt: skip
_GLM: Mapping[str, Any] = MappingProxyType({
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": _THINK,
        "tool_calls": {
            "open_pattern": r"<tool_call>\s*(?P<name>[\w.-]+)\s*(?=<)", "close": "</tool_call>", "repeats": True,
            "content": "xml-inline", "transform": _NAMED,
            "content_args": {
                "tag_pattern": r"<arg_key>\s*(?P<key>.*?)\s*</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
            },
        },
        "content": {"close": ["<|user|>", "<|observation|>", "<|endoftext|>"], **_TEXT},
    },
})  # fmt: skip
_MINIMAX: Mapping[str, Any] = MappingProxyType({
    "start_anchor": "]~b]ai\n",
    "fields": {
        "thinking": _THINK,
        "tool_calls": {
            "open_pattern": r"<invoke name=\"(?P<name>[^\"]+)\">",
            "close": "</invoke>", "repeats": True, "content": "xml-inline", "transform": _NAMED,
            "content_args": {"tag_pattern": r"<parameter name=\"(?P<key>[^\"]+)\">(?P<value>.*?)</parameter>"},
        },
        "marks": {"open": ["<minimax:tool_call>", "</minimax:tool_call>"], **_NOTHING},
        "content": {"close": "[e~[", **_TEXT},
    },
})  # fmt: skip
TEMPLATES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "qwen2_moe": _TAGGED,
    "qwen3_moe": _TAGGED,
    "qwen3_next": _TAGGED,
    "gpt_oss": _CHANNELS,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _GLM,
    "minimax_m2": _MINIMAX,
})  # fmt: skip
"""How models mark the parts of an answer, by `model_type`. Sources: the chat templates of the models."""
_TAGGED_CALLS = CallMarks('<tool_call>\n{"name": "%s", "arguments": ', "}\n</tool_call>", between="\n")
_CHANNEL_CALLS = CallMarks("<|channel|>commentary to=functions.%s <|constrain|>json<|message|>", most=1)
_ROUND = CallMarks("", first="<｜tool▁calls▁begin｜>", last="<｜tool▁calls▁end｜>")
_FENCED = _ROUND._replace(
    begins="<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n", ends="\n```<｜tool▁call▁end｜>", between="\n"
)
_BARE = _ROUND._replace(begins="<｜tool▁call▁begin｜>%s<｜tool▁sep｜>", ends="<｜tool▁call▁end｜>")
_KEYS = CallMarks(
    "<tool_call>%s\n",
    "</tool_call>",
    between="\n",
    argument="<arg_key>%s</arg_key>\n<arg_value>",
    behind="</arg_value>\n",
)
_TIGHT_KEYS = CallMarks(
    "<tool_call>%s", "</tool_call>", argument="<arg_key>%s</arg_key><arg_value>", behind="</arg_value>"
)
_INVOKED = CallMarks(
    '<invoke name="%s">\n', "</invoke>\n", first="<minimax:tool_call>\n", last="</minimax:tool_call>",
    argument='<parameter name="%s">', behind="</parameter>\n",
)  # fmt: skip
_THINKS = Marks("<think>", "</think>")
MARKS: Mapping[str, Marks] = MappingProxyType({
    "qwen2_moe": _THINKS._replace(calls=_TAGGED_CALLS),
    "qwen3_moe": _THINKS._replace(calls=_TAGGED_CALLS),
    "qwen3_next": _THINKS._replace(calls=_TAGGED_CALLS),
    "gpt_oss": Marks(
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>", _CHANNEL_CALLS
    ),
    "deepseek_v2": _THINKS._replace(calls=_FENCED),
    "deepseek_v3": _THINKS._replace(calls=_FENCED),
    "glm4_moe": _THINKS._replace(calls=_KEYS),
    "minimax_m2": _THINKS._replace(calls=_INVOKED),
})  # fmt: skip
"""How grammars write answers of these models."""
_REASONING, _CALLS, _CONTENT = {"thinking", "reasoning", "reasoning_content"}, "tool_calls", "content"


def shaper_of(llm: "LLM") -> Shaper:
    """What the server has to know of a model's answers: how to take them apart, and whether its template takes tools."""
    tokenizer: Any = llm.tokenizer
    chat = "" if tokenizer is None else str(tokenizer.chat_template or "")
    own = getattr(tokenizer, "response_template", None)
    template = TEMPLATES.get(llm.model.config.model_type) if own is None else own
    marked = own is not None or any(
        mark in chat for mark in ("<think>", "<tool_call>", "<|channel|>", "｜tool", "<invoke")
    )
    if template is None or not marked:
        return Shaper(None, tools=False)
    marks = None if own is not None else marks_of(llm.model.config.model_type, chat)
    return Shaper(partial(_make, template), tools="tools" in chat, marks=marks)


def marks_of(model_type: str, chat: str) -> Marks:
    """How a model with this chat template writes what a grammar shapes."""
    marks = MARKS[model_type]
    if marks.opens == _THINKS.opens and marks.opens not in chat:
        marks = marks._replace(opens="", closes="")
    if marks.calls is _KEYS and "</arg_key><arg_value>" in chat:  # since GLM-4.7
        marks = marks._replace(calls=_TIGHT_KEYS)
    return marks._replace(calls=_BARE) if marks.calls is _FENCED and "```json" not in chat else marks


def _make(template: Mapping[str, Any], prefix: str, tools: Sequence[Any]) -> Reader:
    return AnswerReader(dict(template), prefix, tools)


class AnswerReader:
    """Takes one answer apart as it comes.

    Args:
        template: of the model's marks.
        prefix: the prompt, which may have begun the answer.
        tools: that the model may call; their types make numbers of texts.
    """

    def __init__(self, template: dict[str, Any], prefix: str, tools: Sequence[Any]) -> None:
        """Read what the prompt has begun."""
        self._parser: ResponseParser | None = ResponseParser(template, prefix=prefix, tools=list(tools))
        field = template["fields"].get(_CALLS, {})
        one_by_one = field.get("content") == "xml-inline" and "value_parser" not in field.get("content_args", {})
        self._properties = _properties(tools) if one_by_one else None
        self._field, self._raw, self._held = "", "", ""
        self._parted = False
        for event in self._parser.initial_events:
            self._field = event["field"] if event["type"] != "region_close" else ""
            self._parted = self._parted or event["type"] == "region_close" or event["field"] in _REASONING

    @property
    def reasoning(self) -> bool:
        """Whether what comes now is reasoning."""
        return self._field in _REASONING

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain with this text."""
        return list(self._read(lambda parser: parser.feed(text), text))

    def finish(self) -> list[Part]:
        """What is left at the end of the answer. A call that was cut off is text."""
        parts = list(self._read(lambda parser: parser.finalize()[1], ""))
        return parts if not self._held or self.reasoning else [*parts, Part("content", self._held)]

    def _read(self, step: Callable[[ResponseParser], list[dict[str, Any]]], text: str) -> Iterator[Part]:
        if self._parser is None:
            yield from self._text("content", text)
            return
        try:
            events = step(self._parser)
        except (ValueError, KeyError):  # marks that the template cannot make sense of: the rest is text
            self._parser = None
            yield from self._text("content", self._raw + text)
            return
        for event in events:
            yield from self._take(event)

    def _take(self, event: dict[str, Any]) -> Iterator[Part]:
        field, kind = event["field"], event["type"]
        if kind == "region_open":
            if field == _CALLS:
                self._held = ""
            self._parted = self._parted or field in _REASONING
            self._field, self._raw = field, ""
        elif kind == "region_chunk":
            if field == _CALLS:
                self._raw += event["text"]
            elif field in _REASONING or field == _CONTENT:
                yield from self._text("content" if field == _CONTENT else "reasoning", event["text"])
        else:
            found = _calls(event["value"], self._properties) if field == _CALLS else ()
            if found is None:
                yield from self._text("content", self._raw)
            elif field != _CONTENT:
                yield from found
                self._held, self._parted = "", True
            self._field, self._raw = "", ""

    def _text(self, kind: str, text: str) -> Iterator[Part]:
        """Text without the blanks between parts: those before the first letter behind a mark, and those before a mark."""
        if self._parted:
            text = text.lstrip()
            self._parted = not text
        whole = self._held + text
        said = whole.rstrip()
        self._held = whole[len(said) :]
        if said:
            yield Part(kind, said)


def _properties(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """The schemas of the arguments that each function takes."""
    functions = [tool["function"] for tool in tools]
    schemas = [(one["name"], one.get("parameters")) for one in functions]
    found = {name: schema.get("properties") for name, schema in schemas if isinstance(schema, Mapping)}
    return {name: properties for name, properties in found.items() if isinstance(properties, Mapping)}


def _calls(value: Any, properties: Mapping[str, Mapping[str, Any]] | None) -> list[Part] | None:
    """Calls of a closed region; None if it holds anything else.

    Args:
        value: of the region.
        properties: schemas of arguments by function, where each argument is still as it was written; None: they are read.
    """
    found = []
    for one in value if isinstance(value, list) else [value]:
        function = one.get("function") if isinstance(one, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
            return None
        given = function.get("arguments", function.get("parameters", {}))
        if not isinstance(given, dict) and not _is_object(given):
            return None
        if properties is not None and isinstance(given, dict):
            known = properties.get(name, {})
            given = {key: argument if is_text(known.get(key)) else _value(argument) for key, argument in given.items()}
        found.append(
            Part("call", call=Call(name, given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)))
        )
    return found


def _value(argument: Any) -> Any:
    """What an argument is that may be JSON."""
    try:
        return json.loads(argument) if isinstance(argument, str) else argument
    except ValueError:
        return argument


def _is_object(text: Any) -> bool:
    try:
        return isinstance(text, str) and isinstance(json.loads(text), dict)
    except ValueError:
        return False
