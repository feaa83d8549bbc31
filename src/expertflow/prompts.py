"""Prompts from the command line and from files: a prompt a line, or JSON lines. Must not know models and requests."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from expertflow import outside
from expertflow.errors import PromptError

_MOST_TOKEN = 2**31 - 1


def all_prompts(given: Iterable[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        PromptError: if there is none, or the file cannot be read.
    """
    prompts = [*given, *(read_prompts(file) if file is not None else ())]
    if not prompts:
        raise PromptError("there is no prompt", "Give --prompt TEXT or --prompts-file FILE.")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: JSON lines with a field `prompt` if it ends in .jsonl, otherwise a prompt a line.

    Raises:
        PromptError: if the file cannot be read, holds no prompt, or a line is malformed.
    """
    lines = prompt_lines(path)
    return [_text_of(path, *line) for line in lines] if path.suffix == ".jsonl" else [text for _, text in lines]


def read_texts_or_tokens(path: Path) -> list[str | tuple[int, ...]]:
    """As `read_prompts`; a JSON line may also hold token ids, in a field `tokens`.

    Raises:
        PromptError: if the file cannot be read, holds no prompt, or a line is malformed.
    """
    lines = prompt_lines(path)
    return [_text_or_tokens(path, *line) for line in lines] if path.suffix == ".jsonl" else [text for _, text in lines]


def prompt_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a file of prompts that are not blank, with their numbers.

    Raises:
        PromptError: if the file cannot be read, or holds none.
    """
    try:
        text = outside.read_bytes(path, stream=True).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} cannot be read: {error}", "Give a UTF-8 text file.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # other separators are part of a prompt
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise PromptError(f"{path} holds no prompt", "Put one prompt a line.")
    return filled


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        prompt = outside.parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{path}, line {number} is no JSON object with a field 'prompt'", "Mend the line.") from error
    if not isinstance(prompt, str):
        raise PromptError(f"{path}, line {number}: 'prompt' is no text", "Mend the line.")
    return prompt


def _text_or_tokens(path: Path, number: int, line: str) -> str | tuple[int, ...]:
    try:
        entry: Any = outside.parse_json(line)
    except ValueError as error:
        raise PromptError(f"{path}, line {number} is no JSON", "Mend the line.") from error
    value = entry.get("tokens", entry.get("prompt")) if isinstance(entry, dict) else None
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(outside.whole(token, 0, _MOST_TOKEN) for token in value):
        return tuple(value)
    raise PromptError(f"{path}, line {number} has neither 'prompt' (a text) nor 'tokens' (ids)", "Mend the line.")
