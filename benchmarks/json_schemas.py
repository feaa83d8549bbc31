"""Fifty JSON schemas: every answer that ends by itself fits its schema, whatever the model would say, and what a mask costs.

The model draws at temperature 1 from seeds. Answers are judged by a small checker of JSON Schema's own words, written here, that
shares nothing with the grammars. Schemas of bounded answers have to end; of the others those that ran out of tokens are counted.

Usage: python benchmarks/json_schemas.py --out benchmarks/results/json_schemas_cpu.json
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.engine.text import end_tokens
from expertflow.serve.grammar import Grammar, GrammarMask, Grammars, Task
from expertflow.serve.protocol.forms import Form
from expertflow.serve.writers.parts import Marks

PROMPT = "The old house stood at the end of the lane. In short: "
_WIDE, _SEED = 151_936, 0


def record(**properties: Any) -> dict[str, Any]:
    """An object that has these members and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def text(most: int, **more: Any) -> dict[str, Any]:
    """Text of at most that many characters."""
    return {"type": "string", "maxLength": most, **more}


def whole(low: int, high: int, **more: Any) -> dict[str, Any]:
    """A whole number within bounds."""
    return {"type": "integer", "minimum": low, "maximum": high, **more}


def several(items: Any, most: int, least: int = 0) -> dict[str, Any]:
    """A list of bounded length."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


FLAG, COLOUR = {"type": "boolean"}, {"enum": ["red", "green", "blue"]}
POINT = record(x=whole(-9, 9), y=whole(-9, 9))
TREE = {
    "$defs": {"leaf": record(v=whole(0, 9))},
    **record(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
}
SHAPE = {
    "oneOf": [
        record(kind={"const": "circle"}, r=whole(1, 9)),
        record(kind={"const": "box"}, w=whole(1, 9), h=whole(1, 9)),
    ]
}
PERSON = {
    "type": "object", "properties": {"name": text(12), "age": whole(0, 120), "mail": text(9)}, "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip
BOUNDED: Mapping[str, Any] = {
    "flag": FLAG, "nothing": {"type": "null"}, "colour": COLOUR, "constant": {"const": {"a": [1, None]}},
    "mixed choice": {"enum": ["a", 1, None, True, [1, 2], {"b": "c"}]}, "short text": text(8), "long text": text(40, minLength=20),
    "one letter": text(1, minLength=1), "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "either pattern": {"type": "string", "pattern": "^(yes|no|may ?be)$"}, "digit": whole(0, 9), "negative": whole(-120, -7),
    "over a thousand": whole(999, 20_001), "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 17},
    "multiple": whole(0, 100, multipleOf=5), "text or nothing": {"type": ["string", "null"], "maxLength": 5},
    "number or flag": {"anyOf": [whole(1, 3), FLAG]}, "point": POINT, "person": PERSON, "colours": several(COLOUR, 4),
    "some colours": several(COLOUR, 5, 3), "empty list": several(FLAG, 0), "matrix": several(several(whole(0, 1), 2, 2), 2, 2),
    "tuple": {"type": "array", "prefixItems": [FLAG, whole(0, 9), COLOUR], "items": False, "minItems": 3},
    "points": several(POINT, 3, 1), "nested": record(a=record(b=record(c=record(d=FLAG)))), "reference": TREE, "shape": SHAPE,
    "shapes": several(SHAPE, 2, 1), "all of": {"allOf": [whole(0, 50), {"type": "integer", "minimum": 40}]},
    "joined": {"allOf": [{"type": "object", "properties": {"a": FLAG}, "required": ["a"]}, record(a=FLAG, b=COLOUR)]},
    "day": {"type": "string", "format": "date"}, "identity": {"type": "string", "format": "uuid"},
    "address": {"type": "string", "format": "ipv4"}, "key of quotes": record(**{'a "b"\\c': FLAG, "ü — ☃": COLOUR}),
    "all optional": {"type": "object", "properties": {"a": FLAG, "b": COLOUR, "c": whole(0, 9)}, "additionalProperties": False},
    "order": record(id=whole(1, 999), lines=several(record(item=text(6), count=whole(1, 9)), 2, 1), paid=FLAG),
    "verdict": record(reason=text(30), score=whole(1, 5), tags=several(text(4), 2)),
    "call": record(name={"enum": ["look", "add"]}, arguments=record(at=text(5), n=whole(0, 9))),
    "weather": record(place=text(10), unit={"enum": ["C", "F"]}, days=several(whole(-40, 50), 3)),
}  # fmt: skip
"""Schemas whose answers have a longest one."""
OPEN: Mapping[str, Any] = {
    "any text": {"type": "string"}, "any number": {"type": "number"}, "any whole number": {"type": "integer", "minimum": 5},
    "any list": {"type": "array", "items": whole(0, 9)}, "any object": {"type": "object"},
    "map": {"type": "object", "additionalProperties": whole(0, 9)},
    "patterned map": {"type": "object", "patternProperties": {"^k[0-9]$": FLAG}, "additionalProperties": False},
    "letter": record(to={"type": "string"}, body={"type": "string"}), "mail": {"type": "string", "format": "email"},
    "tree": {
        "$defs": {"n": record(v=whole(0, 9), next={"type": "array", "items": {"$ref": "#/$defs/n"}})}, "$ref": "#/$defs/n",
    },
}  # fmt: skip
"""Schemas that an answer may go on with for ever."""
TYPES: Mapping[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str), "boolean": lambda value: isinstance(value, bool), "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value == int(value),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "array": lambda value: isinstance(value, list), "object": lambda value: isinstance(value, dict),
}  # fmt: skip
FORMATS: Mapping[str, Callable[[str], Any]] = {
    "date": date.fromisoformat, "date-time": datetime.fromisoformat, "uuid": UUID, "ipv4": IPv4Address, "ipv6": IPv6Address,
    "email": lambda value: value.index("@", 1) < len(value) - 1 or int(""),
}  # fmt: skip
NOTES = {"$defs", "required"}


def fits(value: Any, schema: Any, root: Any = None) -> bool:
    """Whether a value is of a schema, by the meaning of each of its words.

    Raises:
        KeyError: for a word that is not known here.
    """
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    return all(_keeps(value, word, schema, root) for word in schema if word not in NOTES)


def _keeps(value: Any, word: str, schema: Mapping[str, Any], root: Any) -> bool:
    wanted = schema[word]
    if word == "$ref":
        inner = root
        for step in wanted.removeprefix("#/").split("/"):
            inner = inner[step]
        return fits(value, inner, root)
    if word == "type":
        return any(TYPES[name](value) for name in ([wanted] if isinstance(wanted, str) else wanted))
    if word in ("enum", "const"):
        return any(_same(value, each) for each in (wanted if word == "enum" else [wanted]))
    if word not in ("anyOf", "oneOf", "allOf"):
        return _keeps_own(value, word, schema, root)
    count = sum(fits(value, inner, root) for inner in wanted)
    return {"anyOf": count >= 1, "oneOf": count == 1, "allOf": count == len(wanted)}[word]


def _keeps_own(value: Any, word: str, schema: Mapping[str, Any], root: Any) -> bool:
    """Words that speak of one type of values."""
    if isinstance(value, dict):
        return _keeps_members(value, word, schema, root)
    if isinstance(value, list):
        return _keeps_items(value, word, schema, root)
    if isinstance(value, str):
        return _keeps_text(value, word, schema[word])
    return _keeps_number(value, word, schema[word]) if TYPES["number"](value) else True


def _same(left: Any, right: Any) -> bool:
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def _keeps_members(value: Mapping[str, Any], word: str, schema: Mapping[str, Any], root: Any) -> bool:
    named, patterned = schema.get("properties", {}), schema.get("patternProperties", {})
    if word == "properties":
        needed = set(schema.get("required", ())) <= set(value)
        return needed and all(fits(value[name], inner, root) for name, inner in named.items() if name in value)
    if word == "patternProperties":
        return all(fits(each, inner, root) for key, inner in patterned.items() for name, each in value.items() if re.search(key, name))  # fmt: skip
    if word == "additionalProperties":
        rest = (name for name in value if name not in named and not any(re.search(key, name) for key in patterned))
        return all(fits(value[name], schema[word], root) for name in rest)
    return word in _ELSEWHERE["object"] or _unknown(word)


def _keeps_items(value: list[Any], word: str, schema: Mapping[str, Any], root: Any) -> bool:
    wanted, first = schema[word], len(schema.get("prefixItems", ()))
    if word == "prefixItems":
        return all(fits(each, inner, root) for each, inner in zip(value, wanted, strict=False))
    if word == "items":
        return all(fits(each, wanted, root) for each in value[first:])
    known = {"minItems": lambda: len(value) >= wanted, "maxItems": lambda: len(value) <= wanted}
    return known[word]() if word in known else word in _ELSEWHERE["array"] or _unknown(word)


def _keeps_text(value: str, word: str, wanted: Any) -> bool:
    if word == "format":
        try:
            FORMATS[wanted](value)
        except ValueError:
            return False
        return True
    known = {
        "minLength": lambda: len(value) >= wanted,
        "maxLength": lambda: len(value) <= wanted,
        "pattern": lambda: re.search(wanted, value, re.ASCII) is not None,
    }
    return known[word]() if word in known else word in _ELSEWHERE["string"] or _unknown(word)


def _keeps_number(value: float, word: str, wanted: Any) -> bool:
    known = {
        "minimum": lambda: value >= wanted, "maximum": lambda: value <= wanted, "multipleOf": lambda: value % wanted == 0,
        "exclusiveMinimum": lambda: value > wanted, "exclusiveMaximum": lambda: value < wanted,
    }  # fmt: skip
    return known[word]() if word in known else word in _ELSEWHERE["number"] or _unknown(word)


_WORDS = {
    "object": {"properties", "patternProperties", "additionalProperties"}, "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum"},
}  # fmt: skip
_ELSEWHERE = {kind: set().union(*(words for other, words in _WORDS.items() if other != kind)) for kind in _WORDS}
"""Words that say nothing of values of a kind."""


def _unknown(word: str) -> bool:
    raise KeyError(word)


class Timed:
    """A mask whose two methods are timed.

    Args:
        mask: the grammar's.
        fills: gets seconds of each mask.
        accepts: gets seconds of each token that it learned.
    """

    def __init__(self, mask: GrammarMask, fills: list[float], accepts: list[float]) -> None:
        """Keep where times go."""
        self._mask, self._fills, self._accepts = mask, fills, accepts

    def fill(self, row: Any) -> None:
        """Fill it."""
        began = time.perf_counter()
        self._mask.fill(row)
        self._fills.append(time.perf_counter() - began)

    def accept(self, token: int) -> None:
        """Go on."""
        began = time.perf_counter()
        self._mask.accept(token)
        self._accepts.append(time.perf_counter() - began)


def task(schema: Any) -> Task:
    """An answer of a schema."""
    return Task("schema", Form("json", schema, "schema"), (), False, Marks(), PROMPT)


def answer_all(
    llm: LLM, grammars: Grammars, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """An answer of each schema and seed, and what masks cost."""
    fills, accepts, compiles, outputs = list[float](), list[float](), list[float](), dict[tuple[str, int], Any]()
    schemas = {**BOUNDED, **OPEN}
    for name, schema in schemas.items():
        began = time.perf_counter()
        grammar: Grammar = grammars.compile(task(schema))
        compiles.append(time.perf_counter() - began)
        for seed in range(options.seeds):
            params = SamplingParams(temperature=1.0, seed=seed, max_tokens=options.max_tokens)
            request = llm.request(PROMPT, params, mask=Timed(grammar.mask(), fills, accepts))

            def keep(output: Any, key: tuple[str, int] = (name, seed)) -> None:
                if output.output is not None or output.error is not None:
                    outputs[key] = output.output or output.error

            llm.engine.add(request, keep)
    began = time.perf_counter()
    while llm.engine.unfinished:
        llm.engine.advance()
    seconds = time.perf_counter() - began
    rows = [
        {"schema": name, "seed": seed, **judged(schemas[name], found)}
        for (name, seed), found in sorted(outputs.items())
    ]
    cost = {"compile": summary(compiles), "mask": summary(fills), "accept": summary(accepts), "seconds": seconds}
    return rows, cost


def judged(schema: Any, found: Any) -> dict[str, Any]:
    """What became of an answer."""
    if isinstance(found, BaseException):
        return {"reason": "error", "tokens": 0, "fits": False, "text": str(found)}
    try:
        valid = fits(json.loads(found.text), schema)
    except ValueError:
        valid = False
    return {"reason": found.finish_reason, "tokens": len(found.token_ids), "fits": valid, "text": found.text[:200]}


def summary(seconds: list[float]) -> dict[str, float]:
    """Microseconds."""
    ordered = sorted(seconds)
    return {
        "mean_us": statistics.fmean(ordered) * 1e6, "p50_us": ordered[len(ordered) // 2] * 1e6,
        "p95_us": ordered[int(len(ordered) * 0.95)] * 1e6, "most_us": ordered[-1] * 1e6,
    }  # fmt: skip


def wide_tokenizer() -> PreTrainedTokenizerFast:
    """As many tokens as Qwen's, of random letters: masks cost by their number."""
    rng = random.Random(_SEED)
    words = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    while len(words) < _WIDE - 1:
        words.setdefault(
            rng.choice(["", "Ġ"]) + "".join(rng.choices("etaoinshrdlucm", k=rng.randint(2, 8))), len(words)
        )
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=made)


def walk_wide(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What masks over a vocabulary of Qwen's size cost along the same answers, a letter a token."""
    tokenizer = wide_tokenizer()
    began = time.perf_counter()
    grammars = Grammars(tokenizer, _WIDE, [_WIDE - 1])
    built = time.perf_counter() - began
    fills, accepts, row = list[float](), list[float](), np.zeros(_WIDE // 32, np.int32)
    for one in rows:
        mask = Timed(grammars.compile(task({**BOUNDED, **OPEN}[one["schema"]])).mask(), fills, accepts)
        for token in tokenizer.encode(one["text"]) if one["fits"] else ():
            row[:] = 0
            mask.fill(row)
            mask.accept(token)
    return {"tokens": _WIDE, "tokenizer_seconds": built, "mask": summary(fills), "accept": summary(accepts)}


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The result in short."""
    found = result["answers"]
    yield f"{found['total']} answers of {result['schemas']} schemas: {found['stopped']} ended, {found['fit']} of these fit"
    yield f"bounded: {found['bounded_stopped']} of {found['bounded']} ended; cut off: {found['cut']}; errors: {found['errors']}"
    for name, cost in (("here", result["cost"]), (f"{_WIDE:,} tokens", result.get("wide"))):
        if cost:
            means = ", ".join(
                f"{kind} {cost[kind]['p50_us']:.0f} us (p95 {cost[kind]['p95_us']:.0f})" for kind in ("mask", "accept")
            )
            yield f"{name}: {means}"


def main() -> None:
    """Answer, judge, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint; default: the shipped model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--narrow", action="store_true", help="leave the vocabulary of Qwen's size out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    given = {"device": options.device, "max_batch": options.max_batch, "max_live": options.max_batch, "max_length": 512}
    with LLM(options.model, **given) if options.model else LLM(**given) as llm:
        grammars = Grammars(llm.tokenizer, llm.plan.shape.vocabulary, end_tokens(llm.model))
        rows, cost = answer_all(llm, grammars, options)
        vocabulary, name = llm.plan.shape.vocabulary, llm.name
    stopped = [row for row in rows if row["reason"] == "stop"]
    bounded = [row for row in rows if row["schema"] in BOUNDED]
    result = {
        "environment": about(options.device)._asdict(), "model": name, "vocabulary": vocabulary, "schemas": len(BOUNDED) + len(OPEN),
        "max_tokens": options.max_tokens, "seeds": options.seeds,
        "answers": {
            "total": len(rows), "stopped": len(stopped), "fit": sum(row["fits"] for row in stopped),
            "cut": sum(row["reason"] == "length" for row in rows), "errors": sum(row["reason"] == "error" for row in rows),
            "bounded": len(bounded), "bounded_stopped": sum(row["reason"] == "stop" for row in bounded),
            "tokens": sum(row["tokens"] for row in rows),
        },
        "cost": cost, "rows": rows,
    }  # fmt: skip
    if not options.narrow:
        result["wide"] = walk_wide(rows)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(*table(result), sep="\n")


if __name__ == "__main__":
    main()
