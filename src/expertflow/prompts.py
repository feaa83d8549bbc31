"""Prompts from a file: a prompt a line, or JSON lines. Knows files; refuses to know models and requests."""

from pathlib import Path

from expertflow import outside
from expertflow.errors import PromptError


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


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: JSON lines with a field `prompt` if it ends in .jsonl, otherwise a prompt a line.

    Raises:
        PromptError: if the file cannot be read, holds no prompt, or a line is malformed.
    """
    filled = prompt_lines(path)
    if path.suffix != ".jsonl":
        return [line for _, line in filled]
    return [_json_prompt(path, number, line) for number, line in filled]


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        prompt = outside.parse_json(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise PromptError(f"{path}, line {number} is no JSON object with a field 'prompt'", "Mend the line.") from error
    if not isinstance(prompt, str):
        raise PromptError(f"{path}, line {number}: 'prompt' is no text", "Mend the line.")
    return prompt
