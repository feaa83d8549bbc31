"""Every field of every request body, and what becomes of it: one table a route.

A field is *honoured*, *accepted without effect* because it cannot change the answer, or *refused* by name. A field that no
table has is refused too. So no field is dropped silently. Must not know HTTP and engines.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from expertflow.config import nearest
from expertflow.serve.protocol.errors import bad
from expertflow.serve.protocol.readers import (
    MESSAGE,
    Reader,
    anything,
    biases,
    boolean,
    integer,
    mapping,
    number,
    prompts,
    several,
    short_text,
    text,
    text_or_blocks,
    text_or_mapping,
)

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_STOP_TOKENS, MOST_MESSAGES, MOST_TOOLS = 16, 128, 16, 1024, 10_000, 512
"""Bounds of lists in a request body."""
MOST_LOGPROBS, MOST_BIASES = 20, 1024
"""Tokens of which a request may ask for log-probabilities, or change them."""
LONGEST_STOP = 1_000
"""Characters of a stop text, or of a text to choose, at most."""
LONGEST_PATTERN, MOST_TEXTS = 100_000, 1_000
"""Characters of a regular expression or grammar, and texts to choose from, at most."""
_WHOLE = 2**31 - 1


class Use(StrEnum):
    """What becomes of a field."""

    HONOURED = "honoured"
    NO_EFFECT = "accepted without effect"
    REFUSED = "refused"


class Field(NamedTuple):
    """One field of a request body.

    Attributes:
        use: what becomes of it.
        read: takes its value apart; of honoured fields only.
        why: why it cannot change the answer; or what to do where it is refused.
        harmless: values of a refused field that ask for nothing.
    """

    use: Use
    read: Reader[Any] = anything
    why: str = ""
    harmless: tuple[Any, ...] = ()


Table = Mapping[str, Field]
"""The fields of a route by name."""


def _honoured(read: Reader[Any]) -> Field:
    return Field(Use.HONOURED, read)


def _no_effect(why: str) -> Field:
    return Field(Use.NO_EFFECT, why=why)


def _refused(why: str, *harmless: Any) -> Field:
    return Field(Use.REFUSED, why=why, harmless=harmless)


_NOTE = "a note to the caller's own service"
_KEPT = "nothing is kept here"
_SPEED = "it speaks of speed or cost, not of the answer"
_SAMPLING: Table = {
    "temperature": _honoured(number(0, 100)),
    "top_p": _honoured(number(0, 1)),
    "top_k": _honoured(integer(-1, _WHOLE)),
    "seed": _honoured(integer(-(2**63), 2**64 - 1)),
    "stop": _honoured(several(short_text(LONGEST_STOP), MOST_STOPS, single=True)),
    "stop_token_ids": _honoured(several(integer(0, _WHOLE), MOST_STOP_TOKENS)),
    "ignore_eos": _honoured(boolean),
    "skip_special_tokens": _honoured(boolean),
    "max_tokens": _honoured(integer(1, _WHOLE)),
    "min_p": _honoured(number(0, 1)),
    "presence_penalty": _honoured(number(-2, 2)),
    "frequency_penalty": _honoured(number(-2, 2)),
    "repetition_penalty": _honoured(number(0.001, 1000)),
    "logit_bias": _honoured(biases(MOST_BIASES)),
    "prompt_logprobs": _honoured(integer(0, MOST_LOGPROBS)),
    "min_tokens": _honoured(integer(0, _WHOLE)),
    "bad_words": _refused("Leave it out.", []),
    "typical_p": _refused("Leave it out.", 1),
    "mirostat": _refused("Leave it out.", 0),
    "include_stop_str_in_output": _refused("Stop texts are left out of the answer.", False),
    "spaces_between_special_tokens": _refused("Leave it out.", True),
    "use_beam_search": _refused("There is no beam search.", False),
    "best_of": _refused("Use n, and choose.", 1),
    "length_penalty": _refused("There is no beam search.", 1),
    "truncate_prompt_tokens": _refused("Shorten the prompt."),
    "logits_processors": _refused("Code from a request is never run.", []),
    "response_format": _honoured(mapping),
    "structured_outputs": _honoured(mapping),
    "guided_json": _honoured(text_or_mapping),
    "guided_regex": _honoured(short_text(LONGEST_PATTERN)),
    "guided_choice": _honoured(several(short_text(LONGEST_STOP), MOST_TEXTS)),
    "guided_grammar": _honoured(short_text(LONGEST_PATTERN)),
    "guided_decoding_backend": _no_effect("there is one"),
    "return_token_ids": _refused("Ask /tokenize.", False),
}
_REQUEST: Table = {
    "model": _honoured(text),
    "n": _honoured(integer(1, MOST_CHOICES)),
    "stream": _honoured(boolean),
    "stream_options": _honoured(mapping),
    "user": _no_effect(_NOTE),
    "metadata": _no_effect(_NOTE),
    "request_id": _no_effect(_NOTE),
    "priority": _no_effect(_SPEED),
    "cache_salt": _no_effect(_SPEED),
    "cache_prompt": _no_effect(_SPEED),
}
CHAT: Table = {
    **_REQUEST,
    **_SAMPLING,
    "messages": _honoured(several(MESSAGE, MOST_MESSAGES)),
    "max_completion_tokens": _honoured(integer(1, _WHOLE)),
    "add_generation_prompt": _honoured(boolean),
    "continue_final_message": _honoured(boolean),
    "chat_template_kwargs": _honoured(mapping),
    "reasoning_effort": _honoured(text),
    "logprobs": _honoured(boolean),
    "top_logprobs": _honoured(integer(0, MOST_LOGPROBS)),
    "tools": _honoured(several(mapping, MOST_TOOLS)),
    "tool_choice": _honoured(text_or_mapping),
    "parallel_tool_calls": _honoured(boolean),
    "functions": _refused("Use tools.", []),
    "function_call": _refused("Use tool_choice.", "none", "auto"),
    "modalities": _refused("Answers are text.", ["text"]),
    "audio": _refused("Answers are text."),
    "web_search_options": _refused("There is no search."),
    "moderation": _refused("There is no moderation here."),
    "verbosity": _refused("Ask for it in a message.", "medium"),
    "chat_template": _refused("A template from a request is never run; the server's own is used."),
    "documents": _refused("Put them into a message.", []),
    "echo": _refused("Use /v1/completions.", False),
    "store": _no_effect(_KEPT),
    "include": _no_effect("what it can ask for is not made here"),
    "client_metadata": _no_effect(_NOTE),
    "safety_identifier": _no_effect(_NOTE),
    "service_tier": _no_effect(_SPEED),
    "prompt_cache_key": _no_effect(_SPEED),
    "prompt_cache_options": _no_effect(_SPEED),
    "prompt_cache_retention": _no_effect(_SPEED),
    "prediction": _no_effect(_SPEED),
}
COMPLETION: Table = {
    **_REQUEST,
    **_SAMPLING,
    "prompt": _honoured(prompts(MOST_PROMPTS)),
    "echo": _honoured(boolean),
    "logprobs": _honoured(integer(0, MOST_LOGPROBS)),
    "suffix": _refused("Models here continue a text; they do not fill gaps.", ""),
}
ANTHROPIC: Table = {
    **{
        name: CHAT[name]
        for name in ("model", "messages", "stream", "temperature", "top_p", "top_k", "max_tokens", "tools")
    },
    "system": _honoured(text_or_blocks),
    "stop_sequences": _honoured(several(short_text(LONGEST_STOP), MOST_STOPS)),
    "tool_choice": _honoured(mapping),
    "thinking": _honoured(mapping),
    "output_config": _honoured(mapping),
    "metadata": _no_effect(_NOTE),
    "cache_control": _no_effect(_SPEED),
    "service_tier": _no_effect(_SPEED),
    "speed": _no_effect(_SPEED),
    "inference_geo": _no_effect("there is one place"),
    "diagnostics": _no_effect(_NOTE),
    "user_profile_id": _no_effect(_NOTE),
    "workspace_id": _no_effect(_NOTE),
    "context_management": _no_effect("nothing of a chat is removed here"),
    "container": _refused("No code is run here."),
    "mcp_servers": _refused("No server is called from here.", []),
}
_STATE = "Nothing is kept here: send the whole chat."
RESPONSES: Table = {
    **{name: CHAT[name] for name in ("model", "stream", "temperature", "top_p", "tools", "tool_choice", "parallel_tool_calls")},
    "input": _honoured(text_or_blocks),
    "instructions": _honoured(text),
    "max_output_tokens": _honoured(integer(1, _WHOLE)),
    "reasoning": _honoured(mapping),
    "text": _honoured(mapping),
    **{
        name: CHAT[name]
        for name in (
            "user", "metadata", "store", "include", "client_metadata", "safety_identifier", "service_tier", "prompt_cache_key",
            "prompt_cache_options", "prompt_cache_retention", "moderation",
        )
    },
    "stream_options": _no_effect("it pads what is sent"),
    "truncation": _refused("A prompt that is too long is an error.", "disabled"),
    "previous_response_id": _refused(_STATE),
    "conversation": _refused(_STATE),
    "prompt": _refused("There are no stored prompts."),
    "background": _refused(_STATE, False),
    "background_options": _refused(_STATE),
    "context_management": _refused(_STATE, []),
    "max_tool_calls": _refused("Tools run at the client."),
    "top_logprobs": _refused("Use /v1/chat/completions.", 0),
    "image": _refused("Answers are text."),
    "access_programs": _refused("Tools run at the client."),
}  # fmt: skip
TOKENIZE: Table = {
    "model": _honoured(text),
    "prompt": _honoured(text),
    "messages": _honoured(several(MESSAGE, MOST_MESSAGES)),
    "add_special_tokens": _honoured(boolean),
    "add_generation_prompt": _honoured(boolean),
    "continue_final_message": _honoured(boolean),
    "chat_template_kwargs": _honoured(mapping),
    "return_token_strs": _honoured(boolean),
    "tools": CHAT["tools"],
    "chat_template": CHAT["chat_template"],
}
DETOKENIZE: Table = {"model": _honoured(text), "tokens": _honoured(several(integer(0, _WHOLE), 2**24))}
STREAM_OPTIONS: Table = {
    "include_usage": _honoured(boolean),
    "continuous_usage_stats": _honoured(boolean),
    "include_obfuscation": _no_effect("it pads what is sent"),
}
STRUCTURED: Table = {
    "json": CHAT["guided_json"],
    "json_object": _honoured(boolean),
    "regex": CHAT["guided_regex"],
    "choice": CHAT["guided_choice"],
    "grammar": CHAT["guided_grammar"],
    "structural_tag": _refused("Use tools and tool_choice."),
    "disable_any_whitespace": _refused("Blanks are bounded here.", False),
    "disable_additional_properties": _refused("Say it in the schema.", False),
    "whitespace_pattern": _refused("Blanks are bounded here."),
    "disable_fallback": _no_effect("there is one way"),
}
"""What vLLM's `structured_outputs` holds."""
TABLES: Mapping[str, Table] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSES,
    "/v1/messages": ANTHROPIC,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
"""Tables by route."""


def read_fields(body: Mapping[str, Any], table: Table, inside: str = "") -> dict[str, Any]:
    """The honoured fields of a request body that were given; null means not given.

    Args:
        body: what was sent.
        table: the route's.
        inside: name of the field that `body` is the value of, with a point behind it; empty: the whole body.

    Raises:
        ApiError: for a field that is unknown, refused, or has a bad value; it names the field.
    """
    found = {}
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            raise bad(
                inside + name, f"the field {inside + name!r} is unknown", nearest(name, table), code="unknown_parameter"
            )
        if value is None or field.use is Use.NO_EFFECT:
            continue
        if field.use is Use.HONOURED:
            found[name] = field.read(inside + name, value)
        elif not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in field.harmless):
            raise bad(
                inside + name, f"the field {inside + name!r} is not supported", field.why, code="unsupported_parameter"
            )
    return found


def required(fields: Mapping[str, Any], name: str) -> Any:
    """A field that a route cannot do without.

    Raises:
        ApiError: if it was not given.
    """
    if name not in fields:
        raise bad(name, f"the field {name!r} is missing", code="missing_required_parameter")
    return fields[name]
