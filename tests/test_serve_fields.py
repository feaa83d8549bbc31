"""What becomes of each field of a request, and of messages, without a server."""

from typing import Any

import pytest
from anthropic.types import message_create_params
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from expertflow import SamplingParams
from expertflow.serve.protocol.errors import ApiError
from expertflow.serve.protocol.fields import ANTHROPIC, CHAT, COMPLETION, RESPONSES, TABLES, Use, read_fields
from expertflow.serve.protocol.messages import messages_of
from expertflow.serve.protocol.sampling import choices, sampling

FIELDS = [(route, name) for route, table in TABLES.items() for name in table]
SAMPLES: dict[str, Any] = {
    "echo": True, "suffix": "x", "response_format": {"type": "json_object"}, "best_of": 2,
}  # fmt: skip
"""Values that ask for something, where any text or number would not."""


@pytest.mark.parametrize(
    ("table", "params"),
    [
        (CHAT, chat_create_params.CompletionCreateParamsBase),
        (COMPLETION, completion_create_params.CompletionCreateParamsBase),
        (RESPONSES, response_create_params.ResponseCreateParamsBase),
        (ANTHROPIC, message_create_params.MessageCreateParamsBase),
    ],
)
def test_every_field_of_the_clients_has_a_class(table: dict[str, Any], params: type) -> None:
    """What the official clients can send is in the table: honoured, without effect, or refused with a remedy."""
    known = set(params.__annotations__) | {"stream"}
    assert known - set(table) == set()


@pytest.mark.parametrize(("route", "name"), FIELDS)
def test_a_field_is_what_its_class_says(route: str, name: str) -> None:
    """Refused ones are named with a remedy unless they ask for nothing; those without effect may hold anything."""
    table = TABLES[route]
    field = table[name]
    assert read_fields({name: None}, table) == {}, "null is not given"
    if field.use is Use.HONOURED:
        with pytest.raises(ApiError) as wrong:
            read_fields({name: object()}, table)
        assert wrong.value.param.startswith(name)
        return
    assert field.why
    asked = SAMPLES.get(name, "something")
    if field.use is Use.NO_EFFECT:
        assert read_fields({name: asked}, table) == read_fields({name: {"a": [1]}}, table) == {}
        return
    with pytest.raises(ApiError) as refused:
        read_fields({name: asked}, table)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, name, "unsupported_parameter")
    for harmless in field.harmless:
        assert read_fields({name: harmless}, table) == {}


def test_false_is_not_zero() -> None:
    """A refused field whose harmless value is 0 does not take false, and the other way round."""
    with pytest.raises(ApiError):
        read_fields({"top_logprobs": False}, {"top_logprobs": CHAT["best_of"]})


@pytest.mark.parametrize(
    ("field", "value", "option", "found"),
    [
        ("temperature", 0.3, "temperature", 0.3),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 9, "top_k", 9),
        ("top_k", -1, "top_k", 0),
        ("seed", 5, "seed", 5),
        ("seed", -1, "seed", 2**63 - 1),
        ("stop", "end", "stop", ("end",)),
        ("stop", ["a", "b"], "stop", ("a", "b")),
        ("stop_token_ids", [3], "stop_token_ids", (3,)),
        ("min_p", 0.1, "min_p", 0.1),
        ("presence_penalty", -1, "presence_penalty", -1),
        ("frequency_penalty", 2, "frequency_penalty", 2),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("logit_bias", {"3": -100}, "logit_bias", {3: -100}),
        ("min_tokens", 2, "min_tokens", 2),
        ("logprobs", True, "logprobs", 0),
        ("prompt_logprobs", 1, "prompt_logprobs", 1),
        ("ignore_eos", True, "ignore_eos", True),
        ("skip_special_tokens", False, "skip_special_tokens", False),
        ("max_tokens", 7, "max_tokens", 7),
        ("max_completion_tokens", 7, "max_tokens", 7),
    ],
)
def test_a_field_reaches_the_sampler(field: str, value: Any, option: str, found: Any) -> None:
    """Each changes its option and nothing else."""
    plain, params = (
        sampling(read_fields(body, CHAT), {"top_k": 4}, 20) for body in ({"max_tokens": None}, {field: value})
    )
    changed = {name for name in vars(plain) if getattr(plain, name) != getattr(params, name)}
    assert changed == {option}
    assert getattr(params, option) == found


def test_defaults_are_the_routes_the_models_and_openais() -> None:
    """In that order: what the model says, then temperature 1; the newer name of the most tokens counts more."""
    assert sampling({}, {}, None) == SamplingParams(temperature=1, max_tokens=None)
    assert sampling({"max_tokens": 3, "max_completion_tokens": 5}, {"temperature": 0.6}, 16).max_tokens == 5
    assert sampling({}, {"temperature": 0.6, "top_k": 20}, 16) == SamplingParams(
        temperature=0.6, top_k=20, max_tokens=16
    )
    assert [one.seed for one in choices(SamplingParams(seed=2**63 - 1), 2)] == [2**63 - 1, 0]


def test_messages_become_what_templates_want() -> None:
    """One system message first, texts in place of parts and null, mappings in place of JSON texts."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": [1, "é"]}'}}
    found = messages_of(
        [
            {"role": "developer", "content": "be brief"},
            {"role": "system", "content": [{"type": "text", "text": "be kind"}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}],
                "name": "x",
            },
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "seen"},
            {"role": "system", "content": "later"},
        ]
    )
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "system"]
    assert found[0]["content"] == "be brief\n\nbe kind"
    assert found[1] == {"role": "user", "content": "a\nb", "name": "x"}
    assert found[2]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": [1, "é"]}}
    assert (found[2]["content"], found[2]["reasoning_content"]) == ("", "hm")
    assert found[3] == {"role": "tool", "tool_call_id": "c1", "content": "seen"}


@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": 3}, "content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "content[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "tool_calls[0]"),
        ({"role": "assistant", "audio": {"id": "x"}}, "audio"),
        ({"role": "user", "content": "x", "colour": 1}, "colour"),
        ({"content": "x"}, "role"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(message: dict[str, Any], place: str) -> None:
    """By its place in the list."""
    with pytest.raises(ApiError) as wrong:
        messages_of([{"role": "user", "content": "x"}, message])
    assert wrong.value.param == f"messages[1].{place}"
