"""Answers of a demanded form: whatever a random model would say, JSON fits its schema and calls are calls of offered tools."""

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from expertflow.serve.grammar import Task
from expertflow.serve.protocol.forms import Form
from expertflow.serve.reading import MARKS, shaper_of
from expertflow.serve.worker import Loading
from test_serve_agents import TEMPLATE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from json_schemas import BOUNDED, OPEN
from json_schemas import fits as fits_schema

if TYPE_CHECKING:
    from serving import Served

pytestmark = pytest.mark.xdist_group("serve")
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
