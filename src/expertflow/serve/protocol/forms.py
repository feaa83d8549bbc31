"""The form that an answer has to have: a JSON schema, a regular expression, a choice or a grammar. Must not know grammars' syntax.

OpenAI asks for it by `response_format`, vLLM by `structured_outputs` and, before that, by `guided_json` and the like.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from expertflow.serve.protocol.errors import bad
from expertflow.serve.protocol.fields import STRUCTURED, read_fields

_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
_FORMATS = "text, json_object, json_schema"


class Form(NamedTuple):
    """A form of an answer.

    Attributes:
        kind: `json`, `regex`, `choice` or `grammar`.
        value: a JSON schema; a regular expression; texts; a grammar in Lark's or GBNF's notation.
        param: the field that asks for it.
    """

    kind: str
    value: Any
    param: str


def form_of(fields: Mapping[str, Any]) -> Form | None:
    """The form that a request asks for, or None.

    Args:
        fields: honoured fields of the request; `form` is one that another API's field gave.

    Raises:
        ApiError: if it is described wrongly, asked for twice, or contradicts another field.
    """
    found = [fields.get("form")]
    if "response_format" in fields:
        found.append(format_of(fields["response_format"], "response_format"))
    if "structured_outputs" in fields:
        given = read_fields(fields["structured_outputs"], STRUCTURED, "structured_outputs.")
        if given.pop("json_object", False):
            found.append(Form("json", {"type": "object"}, "structured_outputs.json_object"))
        found += [_form(kind, value, f"structured_outputs.{kind}") for kind, value in given.items()]
    found += [_form(kind, fields[name], name) for name, kind in _GUIDED.items() if name in fields]
    forms = [form for form in found if form is not None]
    if len(forms) > 1:
        raise bad(forms[1].param, f"{forms[0].param} and {forms[1].param} ask for two forms", "Leave one out.")
    if forms:
        check_beside(fields, forms[0].param)
    return forms[0] if forms else None


def format_of(given: Any, param: str) -> Form | None:
    """The form of a `response_format`, or of what other APIs have in its place; None: text.

    Args:
        given: its schema is in `json_schema`, or beside its type.
        param: the field.

    Raises:
        ApiError: if it is described wrongly.
    """
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Form("json", {"type": "object"}, param)
    if kind != "json_schema":
        what = f"{param}.type={kind!r} is not supported"
        raise bad(f"{param}.type", what, f"Supported: {_FORMATS}.", code="unsupported_parameter")
    nested = "json_schema" in given
    inner, param = (given["json_schema"], f"{param}.json_schema") if nested else (given, param)
    if not isinstance(inner, dict) or inner.get("schema") is None:
        raise bad(f"{param}.schema", f"{param} holds no schema", 'It takes {"name", "schema"}.')
    return Form("json", schema_of(inner["schema"], f"{param}.schema"), f"{param}.schema")


def check_beside(fields: Mapping[str, Any], param: str) -> None:
    """Refuse what a grammar cannot keep to.

    Args:
        fields: honoured fields of the request.
        param: the field that makes the grammar.

    Raises:
        ApiError: naming the field that stands against it.
    """
    for name in ("ignore_eos", "min_tokens", "continue_final_message"):
        if fields.get(name):
            raise bad(name, f"{name} cannot be kept beside {param}", "Leave one out.", code="unsupported_parameter")


def schema_of(value: Any, param: str) -> dict[str, Any] | bool:
    """A JSON schema: an object, or its JSON text.

    Raises:
        ApiError: if it is neither.
    """
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise bad(param, f"{param} is no JSON: {error}", "Send a JSON schema.") from error
    if not isinstance(value, dict | bool):
        raise bad(param, f"{param} is no JSON schema", "A schema is an object.")
    return value


def _form(kind: str, value: Any, param: str) -> Form:
    if kind == "choice" and not value:
        raise bad(param, f"{param} is empty", "Give at least one text.")
    return Form(kind, schema_of(value, param) if kind == "json" else value, param)
