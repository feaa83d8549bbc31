"""Readers of single values of a request body: each takes a field's name and value, and refuses what it cannot take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Generic, TypeVar

from expertflow.serve.protocol.errors import ApiError, bad

_T_co = TypeVar("_T_co", covariant=True)


@dataclass(frozen=True)
class Reader(Generic[_T_co]):
    """Takes a value apart.

    Args:
        take: takes name and value; gives the value that is used, or raises `ApiError`.
        schema: of JSON, what it takes; a value that fits may be refused all the same.
    """

    take: Callable[[str, Any], _T_co]
    schema: Mapping[str, Any]

    def __call__(self, name: str, value: Any) -> _T_co:
        """The value that is used.

        Raises:
            ApiError: if the field does not take that.
        """
        return self.take(name, value)


def _reads(**schema: Any) -> Callable[[Callable[[str, Any], _T_co]], Reader[_T_co]]:
    """Make a reader of a function; `schema`: as of `Reader`."""
    return lambda take: Reader(take, schema)


def _wrong(name: str, value: Any, wanted: str) -> ApiError:
    shown = repr(value)
    return bad(name, f"{name}={shown if len(shown) <= 80 else shown[:77] + '...'} is wrong", f"It takes {wanted}.")


@_reads()
def anything(_: str, value: Any) -> Any:
    """Any value."""
    return value


@_reads(type="boolean")
def boolean(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


@_reads(type="string")
def text(name: str, value: Any) -> str:
    """Text."""
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


@_reads(type="object")
def mapping(name: str, value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


@_reads(type=["string", "object"])
def text_or_mapping(name: str, value: Any) -> str | dict[str, Any]:
    """Text or an object."""
    if not isinstance(value, str | dict):
        raise _wrong(name, value, "text or an object")
    return value


@_reads(type=["string", "array"], items={"type": "object"})
def text_or_blocks(name: str, value: Any) -> str | list[dict[str, Any]]:
    """Text, or a list of objects."""
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return value
    return text(name, value)


MESSAGE = Reader(
    mapping.take,
    {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": ["string", "array", "null"], "items": {"type": "object"}},
        },
    },
)
"""A message of a chat, which `messages` takes apart."""


def integer(low: int, high: int) -> Reader[int]:
    """A whole number within bounds."""

    @_reads(type="integer", minimum=low, maximum=high)
    def read(name: str, value: Any) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not low <= value <= high:
            raise _wrong(name, value, f"a whole number from {low} to {high}")
        return int(value)

    return read


def number(low: float, high: float) -> Reader[float]:
    """A number within bounds."""

    @_reads(type="number", minimum=low, maximum=high)
    def read(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        if not low <= value <= high:
            raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return read


def several(one: Reader[Any], most: int, *, single: bool = False) -> Reader[tuple[Any, ...]]:
    """A list of at most `most` values; if `single`, one value without a list too."""
    schema = {"type": "array", "items": dict(one.schema), "maxItems": most}

    @_reads(**({"anyOf": [schema, dict(one.schema)]} if single else schema))
    def read(name: str, value: Any) -> tuple[Any, ...]:
        if single and not isinstance(value, list):
            return (one(name, value),)
        if not isinstance(value, list) or len(value) > most:
            raise _wrong(name, value, f"a list of at most {most}")
        return tuple(one(f"{name}[{place}]", each) for place, each in enumerate(value))

    return read


def biases(most: int) -> Reader[dict[int, float]]:
    """What `logit_bias` takes: token ids, as JSON writes keys, with numbers from -100 to 100."""
    amount, token = number(-100, 100), integer(0, 2**31 - 1)

    @_reads(
        type="object", maxProperties=most, propertyNames={"pattern": "^[0-9]{1,9}$"}, additionalProperties=amount.schema
    )
    def read(name: str, value: Any) -> dict[int, float]:
        if len(mapping(name, value)) > most:
            raise bad(name, f"{name} names {len(value)} tokens", f"It takes at most {most}.")
        found = {}
        for key, bias in value.items():
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise bad(name, f"{name} names {key!r}, which is no token id", "Token ids are whole numbers.")
            found[token(name, int(key))] = amount(f"{name}.{key}", bias)
        return found

    return read


def short_text(most: int) -> Reader[str]:
    """Text of at least one and at most `most` characters."""

    @_reads(type="string", minLength=1, maxLength=most)
    def read(name: str, value: Any) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= most:
            raise _wrong(name, value, f"text of 1 to {most} characters")
        return value

    return read


def prompts(most: int) -> Reader[Sequence[Any]]:
    """What `prompt` of a completion takes: text, token ids, or at most `most` of either; as a list of prompts."""

    @_reads(type=["string", "array"], items={"type": ["string", "integer", "array"], "items": {"type": "integer"}})
    def read(name: str, value: Any) -> Sequence[Any]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value and all(_is_token(each) for each in value):
            return [value]
        several_texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if not several_texts and not (isinstance(value, list) and all(_is_tokens(each) for each in value)):
            raise _wrong(name, value, "text, a list of token ids, or a list of either")
        if not 1 <= len(value) <= most:
            raise bad(name, f"{name} holds {len(value)} prompts", f"It takes 1 to {most}.")
        return list(value)

    return read


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(_is_token(each) for each in value)
