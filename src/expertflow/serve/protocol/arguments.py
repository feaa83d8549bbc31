"""Arguments of a call that a model writes one by one, each between marks: a text as it is, anything else as JSON.

Grammar and reader ask here which of both an argument is, so that what is written one way is read the same way. Must not know
marks and grammars.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from expertflow.serve.protocol.errors import bad
from expertflow.serve.protocol.tools import Function

_NAME = re.compile(r"[^\s\"<>](?:[^\"<>\n]*[^\s\"<>])?")
"""Names that no mark of a model mistakes for its own end."""
_SAID = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$schema",
    "$id",
}
"""Keywords of JSON Schema that restrict nothing."""
_SHARED = {"$defs", "definitions"}
_OBJECT = {"type", "properties", "required", "additionalProperties", *_SHARED, *_SAID}
_TEXT = {"type", "enum", "const", "minLength", "maxLength", "pattern", *_SAID}


class Argument(NamedTuple):
    """What a function takes under one name.

    Attributes:
        name: of the argument.
        required: whether every call has it.
        schema: of its value, with the definitions of the whole.
        text: whether it is written as it is.
    """

    name: str
    required: bool
    schema: Any
    text: bool


def is_text(schema: Any) -> bool:
    """Whether a value of a JSON schema is always text, by what stands in the schema itself."""
    if not isinstance(schema, Mapping) or schema.get("nullable"):
        return False
    chosen = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(chosen, list):
        return bool(chosen) and all(isinstance(one, str) for one in chosen)
    return schema.get("type") == "string"


def arguments_of(function: Function) -> Iterator[Argument]:
    """The arguments of a function, in the order of its schema; it gets no others.

    Raises:
        ApiError: for a name that cannot stand between marks; in a strict function also for a keyword that cannot be kept.
    """
    schema = function.schema
    properties, required = schema.get("properties", {}), schema.get("required", ())
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        raise bad(
            function.param, f"{function.param} describes no object", '"properties" is an object, "required" a list.'
        )
    _keep(function, schema, _OBJECT)
    shared = {key: schema[key] for key in _SHARED & schema.keys()}
    for name in dict.fromkeys([*properties, *required]):
        own = properties.get(name, True)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise bad(
                function.param, f"{function.param} has the name {name!r}", "Use letters, digits, and any of _ . -"
            )
        if text := is_text(own):
            _keep(function, own, _TEXT)
        yield Argument(name, name in required, {**own, **shared} if isinstance(own, Mapping) else own, text)


def _keep(function: Function, schema: Mapping[str, Any], known: set[str]) -> None:
    left = sorted(schema.keys() - known) if function.strict else []
    if left:
        what = f"{function.param} cannot be kept: this model's calls know no {left[0]!r} there"
        raise bad(function.param, what, "Change it, or leave out strict.")
