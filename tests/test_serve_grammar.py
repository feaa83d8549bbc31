"""Answers of a demanded form: whatever a random model would say, JSON fits its schema and calls are calls of offered tools."""

import asyncio
import json
import random
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from expertflow.serve.grammar import Grammars, Task
from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.protocol.forms import Form
from expertflow.serve.protocol.tools import Function, tools_of
from expertflow.serve.reading import MARKS, TEMPLATES, AnswerReader, marks_of, shaper_of
from expertflow.serve.worker import Loading
from test_serve_agents import TEMPLATE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from json_schemas import BOUNDED, OPEN
from json_schemas import fits as fits_schema

if TYPE_CHECKING:
    from serving import Served

USER = {"role": "user", "content": "see"}
SCHEMA = {
    "type": "object", "required": ["a", "b"], "additionalProperties": False,
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yes"]}},
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
LOOK = {
    "name": "look",
    "parameters": {
        "type": "object",
        "required": ["at"],
        "additionalProperties": False,
        "properties": {"at": {"enum": ["x"]}},
    },
}
ADD = {"name": "add", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": one} for one in (LOOK, ADD)]
WILD = {"temperature": 5, "seed": 0, "n": 3, "max_tokens": 120}


def fits(found: Any) -> bool:
    """Whether something is of `SCHEMA`, by its meaning."""
    return set(found) == {"a", "b"} and type(found["a"]) is int and 0 <= found["a"] <= 99 and found["b"] in {"x", "yes"}


SEVERAL = {
    "name": "all.of-it",
    "strict": True,
    "parameters": {
        "type": "object", "required": ["city", "count", "place", "code"], "additionalProperties": False,
        "$defs": {"place": {"type": "object", "required": ["x"], "additionalProperties": False, "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}}},
        "properties": {
            "city": {"type": "string", "minLength": 2, "maxLength": 6},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "way": {"enum": ["on foot", "12"]},
            "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "place": {"$ref": "#/$defs/place"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]$"},
        },
    },
}  # fmt: skip
"""Arguments of every kind; all answers are bounded."""


def fits_several(found: dict[str, Any]) -> bool:
    """Whether arguments are of `SEVERAL`, by its meaning."""
    return (
        {"city", "count", "place", "code"} <= set(found) <= set(SEVERAL["parameters"]["properties"])
        and isinstance(found["city"], str) and 2 <= len(found["city"]) <= 6
        and type(found["count"]) is int and 0 <= found["count"] <= 99
        and found.get("way", "12") in ("on foot", "12")
        and found.get("maybe") in (True, False, None)
        and set(found["place"]) == {"x"} and found["place"]["x"] in range(10)
        and re.fullmatch(r"[A-Z]{2}/[0-9]", found["code"]) is not None
    )  # fmt: skip


@pytest.fixture
def agent(served: "Served", monkeypatch: pytest.MonkeyPatch) -> Loading:
    """The model with a template that takes tools."""
    loading = served.worker.loading
    monkeypatch.setattr(served.llm.tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setattr(loading, "shaper", shaper_of(served.llm))
    return loading


def test_json_fits_its_schema(served: "Served") -> None:
    """Every answer of a bounded schema ends, and fits; in each API's way to say it."""
    found = served.send("/v1/chat/completions", {"messages": [USER], "response_format": FORMAT, **WILD}).json()[
        "choices"
    ]
    assert len({choice["message"]["content"] for choice in found}) > 1, "the model is free within the schema"
    one = {key: value for key, value in WILD.items() if key == "temperature"}
    form = {"type": "json_schema", "name": "n", "schema": SCHEMA}
    said = served.send("/v1/responses", {"input": "see", "text": {"format": form}, **one}).json()["output"][0][
        "content"
    ][0]
    body = {
        "messages": [USER],
        "max_tokens": 120,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        **one,
    }
    block = served.send("/v1/messages", body).json()["content"][0]
    assert all(choice["finish_reason"] == "stop" for choice in found)
    assert all(
        fits(json.loads(text)) for text in (*(one["message"]["content"] for one in found), said["text"], block["text"])
    )


def test_answers_of_other_schemas_fit_them(served: "Served") -> None:
    """References, alternatives, formats, odd names; by a checker of its own. All fifty: `benchmarks/json_schemas.py`."""
    chosen = ["person", "reference", "shape", "mixed choice", "day", "key of quotes", "map", "any text"]
    schemas = [({**BOUNDED, **OPEN})[name] for name in chosen]

    async def all_of_them() -> list[Any]:
        async with served.http() as http:
            bodies = [
                {"prompt": "x", "seed": 1, "max_tokens": 120 if name in BOUNDED else 30, "guided_json": schema}
                for name, schema in zip(chosen, schemas, strict=True)
            ]
            found = await asyncio.gather(*(http.post("/v1/completions", json=body, timeout=300) for body in bodies))
            return [one.json()["choices"][0] for one in found]

    for name, schema, found in zip(chosen, schemas, asyncio.run(all_of_them()), strict=True):
        if name in BOUNDED or found["finish_reason"] == "stop":
            assert found["finish_reason"] == "stop", name
            assert fits_schema(json.loads(found["text"]), schema), (name, found["text"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("person", {"age": 3}), ("person", {"name": "x", "more": 1}), ("reference", {"left": {"v": 1}, "right": {"v": 10}}),
        ("shape", {"kind": "box", "w": 1}), ("mixed choice", 0), ("mixed choice", False), ("day", "2026-02-30"), ("map", {"a": 10}),
        ("multiple", 7), ("tuple", [True, 1]), ("some colours", ["red"]), ("pattern", "AB-1234"), ("digit", True),
    ],
)  # fmt: skip
def test_the_checker_finds_what_is_wrong(name: str, wrong: Any) -> None:
    """It would say nothing of answers if it took everything."""
    assert not fits_schema(wrong, {**BOUNDED, **OPEN}[name])


def test_any_json_begins_as_an_object(served: "Served") -> None:
    """Without a schema an answer may be cut off, but what ended is an object."""
    body = {"messages": [USER], "response_format": {"type": "json_object"}, **WILD, "max_tokens": 20}
    for choice in served.send("/v1/chat/completions", body).json()["choices"]:
        text = choice["message"]["content"]
        assert text.startswith("{")
        assert choice["finish_reason"] == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("choice", "names"), [("required", {"look", "add"}), ({"type": "function", "function": {"name": "add"}}, {"add"})]
)
def test_a_demanded_call_is_one_of_an_offered_tool(
    choice: Any, names: set[str], agent: Loading, served: "Served"
) -> None:
    """With arguments of its schema, and nothing beside it."""
    assert agent.grammars is not None
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, **WILD}
    for one in served.send("/v1/chat/completions", body).json()["choices"]:
        (call,) = one["message"]["tool_calls"]
        assert (one["finish_reason"], one["message"]["content"]) == ("tool_calls", None)
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        assert arguments == {"at": "x"} if call["function"]["name"] == "look" else fits(arguments)


FAMILIES = ["glm4_moe", "glm4_moe, tight", "minimax_m2"]
"""Those whose calls have arguments one by one."""
MARKED = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
]


def chat_of(family: str) -> str:
    """A template that shows by its text how the family writes calls."""
    return TEMPLATE + f"{{# </arg_key>{'' if family.endswith('tight') else chr(10)}<arg_value> #}}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_demanded_call_may_be_of_keys_and_values(
    family: str, agent: Loading, served: "Served", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model writes arguments one by one: texts as they are, all else as JSON."""
    monkeypatch.setattr(served.llm.tokenizer, "chat_template", chat_of(family))
    monkeypatch.setattr(served.llm.model.config, "model_type", family.partition(",")[0])
    monkeypatch.setattr(agent, "shaper", shaper_of(served.llm))
    body = {
        "messages": [USER],
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        **WILD,
        "max_tokens": 300,
    }
    called = set()
    for one in served.send("/v1/chat/completions", body).json()["choices"]:
        (call,) = one["message"]["tool_calls"]
        assert (one["finish_reason"], one["message"]["content"]) == ("tool_calls", None)
        called.add(name := call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        assert arguments == {"at": "x"} if name == "look" else fits(arguments)
    assert len(called) > 1


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_grammar_lets_be_written_is_read_so(family: str, special: bool, served: "Served") -> None:
    """Random walks through it, with marks that are tokens of their own and without: calls with arguments of their schemas."""
    tokenizer = deepcopy(served.llm.tokenizer)
    tokenizer.add_tokens(MARKED if special else [])
    kind, draw, names = family.partition(",")[0], random.Random(0), set[str]()
    marks = marks_of(kind, chat_of(family))
    functions = tools_of({"tools": [{"type": "function", "function": SEVERAL}], "tool_choice": "required"}).functions
    grammar = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]).compile(
        Task("x", None, functions, False, marks, "<think></think>")
    )
    for _ in range(8):
        mask, tokens = grammar.mask(), list[int]()
        while tokens[-1:] != [tokenizer.eos_token_id]:
            row = np.zeros(-(-len(tokenizer) // 32), np.int32)
            mask.fill(row)
            allowed = [token for token in range(len(tokenizer)) if row[token // 32] >> token % 32 & 1]
            tokens.append(draw.choice(allowed))
            mask.accept(tokens[-1])
        text = tokenizer.decode(tokens[:-1])
        reader = AnswerReader(dict(TEMPLATES[kind]), "", [{"function": SEVERAL}])
        calls = [part.call for part in (*reader.feed(text), *reader.finish())]
        assert calls
        for call in calls:
            assert call is not None, text
            found = json.loads(call.arguments)
            assert fits_several(found), text
            names |= set(found)
    assert names == set(SEVERAL["parameters"]["properties"])


@pytest.mark.parametrize(
    ("text", "letter", "schema", "allowed"),
    [
        ("less < more </p>, </invoke", ">", {}, False), ("less < more </p>, </invoke", "x", {}, True),
        ("less < more </p>, </parameter", ">", {}, True), ("less", "<", {"minLength": 5, "maxLength": 9000}, False),
        ("lesser", "<", {"minLength": 5, "maxLength": 9000}, True), ("lesser</", "x", {"maxLength": 10**6}, False),
        ("", "<", {"minLength": 1}, False), ("12", "3", {"maxLength": 2}, False), ("12", "<", {"pattern": "3"}, False),
    ],
)  # fmt: skip
def test_a_text_ends_where_a_reader_ends_it(
    text: str, letter: str, schema: dict[str, Any], allowed: bool, served: "Served"
) -> None:
    """It holds no mark at which the reader would stop, and its bounds hold, however large they are."""
    tokenizer = served.llm.tokenizer
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "string", **schema}}}
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    task = Task("x", None, [Function("f", schema, True, "p")], True, MARKS["minimax_m2"], "")
    mask, row = grammars.compile(task).mask(), np.zeros(-(-len(tokenizer) // 32), np.int32)
    begin = '<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">'
    for token in tokenizer.encode(begin + text, add_special_tokens=False):
        mask.fill(row)
        mask.accept(token)
    mask.fill(row)
    (token,) = tokenizer.encode(letter, add_special_tokens=False)
    assert bool(row[token // 32] >> token % 32 & 1) == allowed


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "format"),
        ({"properties": {"a": {"type": "string"}}, "minProperties": 1}, "minProperties"),
        ({"properties": {'a"': {"type": "string"}}}, "name"),
        ({"properties": {"a": {"enum": ["x</parameter>"]}}}, "mark"),
        ({"properties": {"a": {"type": "string", "pattern": "a^b"}}}, "anchors"),
        ({"properties": {"a": {"type": "string", "pattern": "("}}}, "pattern"),
        ({"properties": {"a": {"type": "string", "minLength": 4, "maxLength": 3}}}, "cannot be kept"),
        ({"properties": []}, "object"),
    ],
)
def test_an_argument_that_cannot_be_kept_is_named(schema: Any, named: str, served: "Served") -> None:
    """In a strict function, before anything is generated; one that is not strict goes without the keyword."""
    function = Function("f", {"type": "object", "required": ["a"], **schema}, True, "tools[0].function.parameters")
    grammars = Grammars(served.llm.tokenizer, len(served.llm.tokenizer), [0])
    with pytest.raises(ApiError, match=named) as found:
        grammars.compile(Task("x", None, [function], True, MARKS["minimax_m2"], ""))
    assert (found.value.status, found.value.param) == (400, function.param)
    if named in {"format", "minProperties"}:
        assert grammars.compile(Task("x", None, [function._replace(strict=False)], True, MARKS["minimax_m2"], ""))


def test_an_answer_of_a_form_may_call_tools_too(agent: Loading, served: "Served") -> None:
    """With tools and a schema an answer is one or the other."""
    assert agent.shaper.tools
    body = {
        "messages": [USER],
        "tools": TOOLS,
        "response_format": FORMAT,
        "parallel_tool_calls": False,
        **WILD,
        "n": 6,
    }
    kinds = set()
    for one in served.send("/v1/chat/completions", body).json()["choices"]:
        kinds.add(one["finish_reason"])
        assert one["message"].get("tool_calls") or fits(json.loads(one["message"]["content"]))
    assert kinds == {"stop", "tool_calls"}


def test_a_grammar_waits_for_the_end_of_the_reasoning(agent: Loading, served: "Served") -> None:
    """Until then any text is allowed, and no end; then the form alone, and at its end the end alone."""
    tokenizer, vocabulary = served.llm.tokenizer, served.llm.plan.shape.vocabulary
    marks = MARKS["qwen3_moe"]
    mask = agent.grammars.compile(Task("x", Form("json", SCHEMA, "x"), (), False, marks, "<think>\n")).mask()

    def allowed() -> set[int]:
        row = np.zeros(-(-vocabulary // 32), np.int32)
        mask.fill(row)
        return {token for token in range(vocabulary) if row[token // 32] >> token % 32 & 1}

    end, letters = tokenizer.eos_token_id, set(tokenizer.encode("".join(map(chr, range(32, 127)))))
    text = 'so {"a": 5} </think>\n\n{"a": 17,"b":"yes"}'
    for place, token in enumerate(tokenizer.encode(text, add_special_tokens=False)):
        if place < text.index("\n\n"):
            assert letters < allowed()
            assert end not in allowed()
        else:
            assert token in allowed()
            assert len(allowed()) <= 15
        mask.accept(token)
    assert allowed() == {end}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 2**17}}}},
            "response_format",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
@pytest.mark.usefixtures("agent")
def test_a_form_that_cannot_be_is_named(fields: dict[str, Any], param: str, served: "Served") -> None:
    """Before anything is generated."""
    found = served.send("/v1/chat/completions", {"messages": [USER], **fields})
    assert (found.status_code, found.json()["error"]["param"].startswith(param)) == (400, True)
