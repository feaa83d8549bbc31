"""Grammars of answers without a model: which texts a mask lets through, family by family, and how they are taken apart."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertflow.serve.grammar import GrammarMask, Grammars, Task
from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.protocol.fields import CHAT, read_fields
from expertflow.serve.protocol.forms import Form, form_of
from expertflow.serve.protocol.tools import tools_of
from expertflow.serve.reading import MARKS, TEMPLATES, AnswerReader, marks_of
from expertflow.serve.writers.parts import Answer, FormReader, Marks

SPECIAL = [
    "<|channel|>",
    "<|message|>",
    "<|start|>",
    "<|constrain|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<｜tool▁sep｜>",
]
POINT = {"$ref": "#/$defs/p"}
PLACE = {
    "type": "object", "properties": {"at": POINT}, "required": ["at"], "additionalProperties": False,
    "$defs": {"p": {"type": "integer", "minimum": 0, "maximum": 9}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "look", "strict": True, "parameters": PLACE}},
    {"type": "function", "function": {"name": "wait"}},
]
ASKED = {"type": "json_schema", "json_schema": {"name": "n", "schema": PLACE}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a token that runs over a mark's end, and marks that are special tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), ">{"]
    made = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    made.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    """With two tokens that end an answer, and more logits than tokens."""
    return Grammars(tokenizer, len(tokenizer) + 40, tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))


def task(fields: dict[str, Any], marks: Marks, prompt: str = "") -> Task:
    """What the server makes of a request's fields."""
    found = read_fields(fields, CHAT)
    form = form_of(found)
    tools = tools_of(found, shaped=form is not None)
    return Task("p", None if tools.demanded else form, tools.functions, tools.single, marks, prompt)


def allowed(mask: GrammarMask, vocabulary: int) -> set[int]:
    row = np.zeros(-(-vocabulary // 32), np.int32)
    mask.fill(row)
    return {token for token in range(vocabulary) if row[token // 32] >> token % 32 & 1}


def walk(mask: GrammarMask, tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """What a mask lets through of some tokens; `.` at the end if the answer may end there."""
    passed, vocabulary = [], len(tokenizer) + 40
    for token in tokens:
        if token not in allowed(mask, vocabulary):
            return tokenizer.decode(passed)
        mask.accept(token)
        passed.append(token)
    ends = set(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))
    return tokenizer.decode(passed) + "." * (ends <= allowed(mask, vocabulary))


JSON, LOOK = '{"at": 7}', ("look", {"at": 7})
QWEN = '<tool_call>\n{"name": "look", "arguments": {"at": 7}}\n</tool_call>'
WAIT = '<tool_call>\n{"name": "wait", "arguments": {}}\n</tool_call>'
THOUGHT = "<|channel|>analysis<|message|>Hm {<|end|><|start|>assistant"
TO = "<|channel|>commentary to=functions.look <|constrain|>json<|message|>"
FENCE = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n{"at": 7}\n```<｜tool▁call▁end｜>'
)
BARE = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>{"at": 7}<｜tool▁call▁end｜>'
LAST = "<｜tool▁calls▁end｜>"
DEMAND: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required"}
NAMED: dict[str, Any] = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}}}
CASES: dict[str, tuple[str, str, dict[str, Any], str, str, str, list[Any]]] = {
    "a call": ("qwen3_moe", "<think>", DEMAND, "", QWEN, "", [LOOK]),
    "calls": ("qwen3_moe", "<think>", DEMAND, "", f"{QWEN}\n{WAIT}", "", [LOOK, ("wait", {})]),
    "a thought call": ("qwen3_moe", "<think>", DEMAND, "", f"<think>\nHm </th\n</think>\n\n{QWEN}", "", [LOOK]),
    "begun": ("qwen3_moe", "<think>", NAMED, "<|im_start|>assistant\n<think>\n", f"Hm\n</think>\n\n{QWEN}", "", [LOOK]),
    "a channel": ("gpt_oss", "", DEMAND, "<|start|>assistant", TO + JSON, "", [LOOK]),
    "a thought channel": ("gpt_oss", "", NAMED, "<|start|>assistant", THOUGHT + TO + JSON, "", [LOOK]),
    "fences": ("deepseek_v3", "```json", DEMAND, "<｜Assistant｜>", FENCE + LAST, "", [LOOK]),
    "no fences": ("deepseek_v3", "<think>", DEMAND, "<｜Assistant｜></think>", BARE + LAST, "", [LOOK]),
    "either: text": ("qwen3_moe", "<think>", {"tools": TOOLS, "response_format": ASKED}, "", JSON, JSON, []),
    "either: a call": ("qwen3_moe", "<think>", {"tools": TOOLS, "response_format": ASKED}, "", QWEN, "", [LOOK]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_family_calls_as_its_reader_reads(case: str, grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    """An answer as the family writes it passes whole, and may end at its end alone; its reader finds what was said."""
    family, chat, fields, prompt, text, said, calls = CASES[case]
    mask = grammars.compile(task(fields, marks_of(family, chat), prompt)).mask()
    tokens = tokenizer.encode(text)
    assert walk(mask, tokenizer, tokens) == text + "."
    mask = grammars.compile(task(fields, marks_of(family, chat), prompt)).mask()
    assert not walk(mask, tokenizer, tokens[:-1]).endswith(".")
    answer = Answer(AnswerReader(dict(TEMPLATES[family]), prompt, TOOLS))
    answer.feed([text], last=True)
    assert (answer.text, [(call.name, json.loads(call.arguments)) for _, call in answer.calls]) == (said, calls)


@pytest.mark.parametrize(
    ("fields", "text", "passed"),
    [
        (DEMAND, "Let me.", ""),
        (DEMAND, QWEN.replace("look", "lock"), QWEN[: QWEN.index("ok")]),
        (DEMAND, QWEN.replace("7", "17"), QWEN[: QWEN.index("7")] + "1"),
        (NAMED, WAIT, WAIT[: WAIT.index("wait")]),
        (NAMED, f"{QWEN}\n{QWEN}", QWEN),
        ({**DEMAND, "parallel_tool_calls": False}, f"{QWEN}\n{QWEN}", QWEN),
        (DEMAND, "<think></think><think>", "<think></think>"),
        (DEMAND, f"<think><|end|></think>{QWEN}", "<think>"),
        ({"response_format": ASKED}, JSON[:-1] + ', "b": 1}', JSON[:-1]),
        ({"response_format": ASKED}, '{"at":\n\n', '{"at":\n'),
    ],
)  # fmt: skip
def test_nothing_else_passes(
    fields: dict[str, Any], text: str, passed: str, grammars: Grammars, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Text before a call, other names, values and members, a second call where one was asked for."""
    mask = grammars.compile(task(fields, MARKS["qwen3_moe"])).mask()
    assert walk(mask, tokenizer, tokenizer.encode(text)) == passed


def test_a_token_may_run_over_the_end_of_a_mark(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    """What it holds behind the mark counts; a choice's state is its own."""
    grammar = grammars.compile(task({"response_format": ASKED}, Marks("<thought>", "</thought>"), "<thought>"))
    begin = tokenizer.encode("Hm.</thought")
    over = [*begin, *tokenizer.convert_tokens_to_ids([">{"])]
    assert walk(grammar.mask(), tokenizer, [*over, *tokenizer.encode('"at":7}')]) == 'Hm.</thought>{"at":7}.'
    assert walk(grammar.mask(), tokenizer, [*over, *tokenizer.encode("{")]) == "Hm.</thought>{"


SHAPED = {
    "plain": (Marks(), "", '{"a": "<think>"}', "", '{"a": "<think>"}'),
    "thought": (MARKS["qwen3_moe"], "", '<think>\nHm. <\n</think>\n\n["</think>", "<tool_call>"]', "\nHm. <", '["</think>", "<tool_call>"]'),
    "no thought": (MARKS["qwen3_moe"], "", '["<think>"]', "", '["<think>"]'),
    "begun": (MARKS["qwen3_moe"], "x<think>\n", "Hm.</think>1", "Hm.", "1"),
    "channels": (MARKS["gpt_oss"], "", THOUGHT + "<|channel|>final<|message|>[1]", "Hm {", "[1]"),
    "a channel": (MARKS["gpt_oss"], "", "<|channel|>final<|message|>[1]", "", "[1]"),
    "cut off": (MARKS["qwen3_moe"], "", "<think>Hm.</thi", "Hm.</thi", ""),
    "cut off at once": (MARKS["qwen3_moe"], "", "<thi", "", "<thi"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPED)
@given(data=st.data())
def test_marks_inside_a_form_are_text(case: str, data: st.DataObject) -> None:
    """Reasoning ends once, and what follows is the form's, however it comes."""
    marks, prompt, text, reasoning, said = SHAPED[case]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    answer = Answer(FormReader(marks, prompt))
    pieces = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for place, piece in enumerate(pieces):
        answer.feed([piece], last=place == len(pieces) - 1)
    assert (answer.reasoning, answer.text) == (reasoning, said)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"structured_outputs": {"json": json.dumps(PLACE)}}, JSON),
        ({"structured_outputs": {"json_object": True}}, '{"b": [1, {}]}'),
        ({"structured_outputs": {"choice": ['no "/', "yes"]}}, 'no "/'),
        ({"guided_regex": r"[a-c]{2}/\d"}, "ab/1"),
        ({"guided_grammar": 'root ::= "a" root | "b"'}, "aab"),
        ({"guided_grammar": 'start: "a" start | "b"'}, "aab"),
        ({"guided_json": PLACE}, JSON),
        ({"guided_choice": ["x"]}, "x"),
    ],
)
def test_vllms_names_are_taken(
    fields: dict[str, Any], text: str, grammars: Grammars, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The newer ones in one field, and the older ones: the text passes whole, and no other first letter does."""
    grammar = grammars.compile(task(fields, Marks()))
    assert walk(grammar.mask(), tokenizer, tokenizer.encode(text)) == text + "."
    assert walk(grammar.mask(), tokenizer, tokenizer.encode("#")) == ""


def product(size: int) -> dict[str, Any]:
    """A small schema that asks for `size ** size` alternatives."""
    choices = [{"anyOf": [{"properties": {f"{a}_{b}": {"type": "string"}}} for b in range(size)]} for a in range(size)]
    return {"allOf": choices}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "odd"}}, "guided_json"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json"),
        ({"guided_json": {"$ref": "#"}}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1:9/x"}}, "guided_json"),
        ({"guided_json": product(9)}, "guided_json"),
        ({"guided_json": nested(200)}, "guided_json"),
        ({"guided_json": {"enum": ["x" * 2**17]}}, "p"),
        ({"guided_regex": "(?<=a)b"}, "guided_regex"),
        ({"guided_grammar": "start: other"}, "guided_grammar"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({**DEMAND, "ignore_eos": True}, "ignore_eos"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}], "tool_choice": "required"}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}], "tool_choice": "required"}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True, "parameters": {"not": {}}}}], "tool_choice": "required"}, "tools[0].function.parameters"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_named(fields: dict[str, Any], param: str, grammars: Grammars) -> None:
    """Before an answer begins, whatever is wrong with it; no error shows more than a line."""
    with pytest.raises(ApiError) as wrong:
        grammars.compile(task(fields, MARKS["qwen3_moe"]))
    assert (wrong.value.status, wrong.value.param) == (400, param)
    assert len(str(wrong.value)) < 600


def test_a_keyword_of_a_tool_that_is_not_strict_may_be_left_out(grammars: Grammars) -> None:
    """Agents describe arguments by many keywords, and want a call rather than an error."""
    loose = {"type": "function", "function": {"name": "a", "parameters": {"not": {}, "format": "odd"}}}
    grammars.compile(task({"tools": [loose], "tool_choice": "required"}, MARKS["qwen3_moe"]))


@pytest.mark.parametrize("broken", ["tokenizer", "ends", "vocabulary"])
def test_a_model_that_cannot_be_held_says_why(broken: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """It serves everything else."""
    made = {
        "tokenizer": lambda: Grammars(None, 300, [1]),
        "ends": lambda: Grammars(tokenizer, len(tokenizer), []),
        "vocabulary": lambda: Grammars(tokenizer, 7, [1]),
    }[broken]()
    with pytest.raises(ApiError, match="cannot be kept: the model") as wrong:
        made.compile(Task("x", Form("json", {}, "x"), (), False, Marks(), ""))
    assert (wrong.value.param, wrong.value.code) == ("x", "unsupported_parameter")


def test_a_token_that_is_not_allowed_is_an_error(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    """And so is every later step: an answer that left its form never ends as if it had one."""
    mask = grammars.compile(task({"guided_choice": ["x"]}, Marks())).mask()
    with pytest.raises(RuntimeError):
        mask.accept(tokenizer.encode("y")[0])
    with pytest.raises(RuntimeError):
        mask.fill(np.zeros(-(-(len(tokenizer) + 40) // 32), np.int32))
