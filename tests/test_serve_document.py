"""What /openapi.json says: the routes' answers and errors have the shapes and kinds of content that it states."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from expertflow.serve.protocol.fields import TABLES, Use
from serving import NAMES

if TYPE_CHECKING:
    from serving import Served


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is as a schema says, as far as the document's answers use JSON Schema."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    kinds = schema.get("type", [])
    known = not kinds or isinstance(
        value, tuple(types[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds))
    )
    if not known or ("const" in schema and value != schema["const"]):
        return False
    if isinstance(value, list):
        return all(fits(one, schema.get("items", {})) for one in value)
    if not isinstance(value, dict):
        return True
    inside = schema.get("properties", {})
    return set(schema.get("required", ())) <= set(value) and all(
        fits(value[name], inside[name]) for name in inside if name in value
    )


def test_the_document_says_what_routes_take_and_answer(served: "Served") -> None:
    """Answers and errors have the stated shapes and types of content; a field has a type, and a body without it lacks what is required."""
    paths = served.send("/openapi.json").json()["paths"]
    ask = {"max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
    bodies = {
        "/v1/chat/completions": ask, "/v1/messages": ask, "/v1/messages/count_tokens": ask, "/v1/completions": {"prompt": [5, 6]},
        "/v1/responses": {"input": "x", "max_output_tokens": 2}, "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]},
    }  # fmt: skip
    for path, operations in paths.items():
        ((method, said),) = operations.items()
        body = bodies.get(path)
        found = served.send(path.replace("{name}", NAMES[0]), body, method=method.upper())
        assert found.status_code == 200, path
        ((kind, answer),) = [
            one for one in said["responses"]["200"]["content"].items() if one[0] != "text/event-stream"
        ]
        assert found.headers["content-type"].partition(";")[0] == kind
        assert fits(found.json() if kind == "application/json" else found.text, answer["schema"]), path
        assert ("{name}" in path) == ("parameters" in said)
        if body is None:
            continue
        streams = "text/event-stream" in said["responses"]["200"]["content"]
        assert streams == (
            path in TABLES and "stream" in said["requestBody"]["content"]["application/json"]["schema"]["properties"]
        )
        taken = said["requestBody"]["content"]["application/json"]["schema"]
        assert set(body) <= set(taken["properties"])
        for name in taken["required"]:
            wrong = served.send(path, {key: value for key, value in body.items() if key != name})
            assert wrong.status_code == 400
            assert fits(wrong.json(), said["responses"]["400"]["content"]["application/json"]["schema"])
    assert all(field.read.schema for table in TABLES.values() for field in table.values() if field.use is Use.HONOURED)
