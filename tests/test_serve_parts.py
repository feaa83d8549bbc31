"""Answers are taken apart into reasoning, text and calls, by each family's marks, however their text comes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.protocol.fields import CHAT, read_fields
from expertflow.serve.protocol.tools import tools_of
from expertflow.serve.reading import TEMPLATES, AnswerReader
from expertflow.serve.writers.parts import Answer

TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}},
]  # fmt: skip
QWEN, HARMONY, DEEP, GLM, MINI = "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe", "minimax_m2"
LOOK, ADD = ("look", {"at": "a <b>"}), ("add", {"n": 2})
CASES = {
    "text": (QWEN, "", " Well,\n\nthat < is\nall. \n", "", " Well,\n\nthat < is\nall. \n", []),
    "thought": (QWEN, "", "<think>\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n", []),
    "the prompt began to think": (QWEN, "<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nYes.", "Hm.", "Yes.", []),
    "the prompt has thought": (QWEN, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", "", "Yes.", []),
    "still thinking": (QWEN, "", "<think>\nHm, le", "Hm, le", "", []),
    "calls": (
        QWEN, "",
        ('<think>x</think>\n\nLet me.\n<tool_call>\n{"name": "look", "arguments": {"at": "a <b>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"n": 2}}\n</tool_call>'),
        "x", "Let me.", [LOOK, ADD],
    ),
    "a call that was cut off": (
        QWEN, "", 'Let me.\n<tool_call>\n{"name": "look", "argum', "", 'Let me.\n{"name": "look", "argum', [],
    ),
    "no call": (QWEN, "", "<tool_call>nonsense</tool_call> and on", "", "nonsense and on", []),
    "channels": (
        HARMONY, "<|start|>assistant",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes. No.", "Hm.", "Yes. No.", [],
    ),
    "a call in a channel": (
        HARMONY, "<|start|>assistant",
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.look "
        '<|constrain|>json<|message|>{"at": "a <b>"}'),
        "Hm.", "", [LOOK],
    ),
    "a call to a recipient": (
        HARMONY, "<|start|>assistant", ' to=functions.add<|channel|>commentary json<|message|>{"n": 2}<|call|>', "", "", [ADD],
    ),
    "a preamble": (
        HARMONY, "<|start|>assistant",
        ("<|channel|>commentary<|message|>I shall look.<|end|><|start|>assistant<|channel|>commentary to=functions.look "
        '<|constrain|>json<|message|>{"at": "a <b>"}<|call|>'),
        "", "I shall look.", [LOOK],
    ),
    "fences": (
        DEEP, "<｜Assistant｜>",
        ("Let me.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
        '{"at": "a <b>"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"n": 2}\n```'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        "", "Let me.", [LOOK, ADD],
    ),
    "no fences": (
        DEEP, "<｜Assistant｜></think>",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"n": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "", "", [ADD],
    ),
    "keys and values": (
        GLM, "<|assistant|>",
        ("<think>Hm.</think>\nLet me.\n<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>a <b></arg_value>\n</tool_call>\n"
        "<tool_call>add\n<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"),
        "Hm.", "Let me.", [LOOK, ADD],
    ),
    "invoked": (
        MINI, "]~b]ai\n<think>\n",
        ('Hm.\n</think>\n\nLet me.\n<minimax:tool_call>\n<invoke name="look">\n<parameter name="at">a <b></parameter>\n</invoke>\n'
        '<invoke name="add">\n<parameter name="n">2</parameter>\n</invoke>\n</minimax:tool_call>'),
        "Hm.", "Let me.", [LOOK, ADD],
    ),
}  # fmt: skip


def read(family: str, prefix: str, pieces: list[str], most: int | None = None) -> Answer:
    """An answer that came in pieces; what was told on the way has to be all of it."""
    answer = Answer(AnswerReader(dict(TEMPLATES[family]), prefix, TOOLS), most)
    told = [part for place, piece in enumerate(pieces) for part in answer.feed([piece], last=place == len(pieces) - 1)]
    for kind, whole in (("content", answer.text), ("reasoning", answer.reasoning)):
        assert "".join(part.text for part in told if part.kind == kind) == whole
    assert [part.call for part in told if part.call is not None] == [call for _, call in answer.calls]
    return answer


@pytest.mark.parametrize("case", CASES)
@given(data=st.data())
def test_an_answer_is_taken_apart_however_it_comes(case: str, data: st.DataObject) -> None:
    """Whole, a letter at a time, and in any other pieces."""
    family, prefix, text, reasoning, content, calls = CASES[case]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for each in (pieces, list(text), [text]):
        answer = read(family, prefix, each)
        assert (answer.reasoning, answer.text) == (reasoning, content)
        assert [(call.name, json.loads(call.arguments)) for _, call in answer.calls] == calls
    assert len({number for number, _ in answer.calls}) == len(calls)


@pytest.mark.parametrize(
    "case",
    [name for name, case in CASES.items() if case[0] == QWEN and name not in ("a call that was cut off", "no call")],
)
def test_transformers_takes_qwen_apart_likewise(case: str) -> None:
    """By the template of its own server, but for blanks at the edges."""
    family, prefix, text, *_ = CASES[case]
    template = next(entry for types, entry in _RESPONSE_TEMPLATE_FALLBACKS.items() if family in types)
    theirs, ours = parse_response(text, template, prefix=prefix), read(family, prefix, [text])
    assert theirs.get("content", "") == ours.text.strip()
    assert theirs.get("thinking", "") == ours.reasoning
    functions = [call["function"] for call in theirs.get("tool_calls", [])]
    assert [(one["name"], one["arguments"]) for one in functions] == [
        (call.name, json.loads(call.arguments)) for _, call in ours.calls
    ]


@pytest.mark.parametrize(("family", "form"), [
    (GLM, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>"),
    (MINI, '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">%s</parameter>\n</invoke>\n</minimax:tool_call>'),
])  # fmt: skip
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12", "12"), ({"type": "string"}, " x\n", " x\n"), ({"enum": ["true", "x"]}, "true", "true"),
        ({"type": "integer"}, "12", 12), ({"type": ["string", "null"]}, "null", None), ({"type": ["string", "null"]}, '"12"', "12"),
        ({"type": "array"}, '["12", 3]', ["12", 3]), ({}, "12", 12), ({}, "a b", "a b"), (None, '{"x": 1}', {"x": 1}),
    ],
)  # fmt: skip
def test_arguments_that_are_written_one_by_one(family: str, form: str, schema: Any, text: str, value: Any) -> None:
    """A text stays as it is written where the schema wants a text, even if it looks like a number; all else is JSON where it can be."""
    properties = {} if schema is None else {"a": schema}
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}
    ]
    reader = AnswerReader(dict(TEMPLATES[family]), "", tools)
    (part,) = [*reader.feed(form % text), *reader.finish()]
    assert part.call is not None
    assert json.loads(part.call.arguments) == {"a": value}


def test_one_call_at_a_time() -> None:
    """The first one, where the client asked for that."""
    answer = read(QWEN, "", [CASES["calls"][2]], 1)
    assert [call.name for _, call in answer.calls] == ["look"]


def test_tokens_of_reasoning_are_counted() -> None:
    """Those behind the mark that opens it."""
    answer = Answer(AnswerReader(dict(TEMPLATES[QWEN]), "", ()))
    answer.feed(["<think>", "a", "b", "</think>", "c"], last=True)
    assert answer.reasoning_tokens == 3


def test_tools_of_other_types_are_left_out_by_name() -> None:
    """As agents send them; `strict` too, which nothing here guarantees. Without a choice of tools there are none."""
    body: dict[str, Any] = {
        "tools": [
            {"type": "web_search"}, {"type": "custom", "name": "x"},
            {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}},
        ],
        "parallel_tool_calls": False,
    }  # fmt: skip
    found = tools_of(read_fields(body, CHAT))
    assert found.given == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert found.left_out == ["web_search", "custom", "strict"]
    assert found.single
    assert tools_of(read_fields({**body, "tool_choice": "none"}, CHAT)).given == ()
    assert tools_of(read_fields({**body, "tool_choice": "required"}, CHAT)).demanded
    named = {"type": "function", "function": {"name": "f"}}
    assert [one.name for one in tools_of(read_fields({**body, "tool_choice": named}, CHAT)).functions] == ["f"]
    for wrong in ({"tool_choice": "maybe"}, {"tools": [{"type": "function", "function": {}}]}):
        with pytest.raises(ApiError) as refused:
            tools_of(read_fields({**body, **wrong}, CHAT))
        assert refused.value.param.startswith(next(iter(wrong)))
