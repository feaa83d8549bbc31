"""Every block of the README and the documents runs, word by word but for the model, on a small model with small settings."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import BatchEncoding
from typer.testing import CliRunner

from expertflow import LLM
from expertflow.cli.main import app
from helpers import ROOT, MakeCheckpoint

DOCUMENTS = ("README.md", "docs/how-it-works.md", "docs/benchmarks.md")
"""Where users find commands, in the order of reading."""
SETUP = {".", "source", "cd", "git", "export", "pip", "python", "python3"}
"""Words a line may begin with that prepares a shell or environment: what they do is tested where a fresh clone is."""
MODELS = r"/models/[\w.-]+|\bMODEL\b|\bFOLDER\b"
SMALLEST = {
    "run": ["--device", "cpu", "--max-tokens", "2"],
    "plan": ["--device", "cpu"],
    "trace": ["--device", "cpu", "--max-tokens", "4", "--max-length", "64"],
    "simulate": ["--slots", "50%", "--batch", "1", "--strategy", "next-use"],
    "train-predictor": ["--device", "cpu", "--epochs", "1", "--validation", "0.3"],
    "eval-predictor": ["--slots", "50%", "--batch", "1", "--steps", "3"],
    "bench": ["--device", "cpu", "--slots", "50%", "--batches", "1", "--tokens", "2", "--repeats", "1", "--strategies", "lru",
              "--long-prompt", "0"],
}  # fmt: skip
"""Options that are put behind each command's own; the last one given counts."""
NUMBERS = {
    r"max_tokens=\d+": "max_tokens=2",
    r"max_new_tokens=\d+": "max_new_tokens=2",
    r"max_length=\d+": "max_length=64",
}


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block."""
    text = "\n".join((ROOT / name).read_text() for name in DOCUMENTS)
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines() -> list[list[str]]:
    """The words of every line of a shell block, without comments and what sets the environment of a command."""
    texts = [text for language, text in blocks() if language in {"", "sh", "bash", "console"}]
    lines = [shlex.split(line.removeprefix("$ "), comments=True) for text in texts for line in text.splitlines()]
    lines = [part for line in lines for part in split_at(line, "&&")]
    return [line for line in lines if line]


def split_at(words: list[str], mark: str) -> list[list[str]]:
    """The words between the marks."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == mark:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def command_of(line: list[str]) -> list[str] | None:
    """The arguments of an `expertflow` line, however it is started; None for another program's."""
    if Path(line[0]).name == "expertflow":
        return line[1:]
    return line[3:] if line[1:3] == ["-m", "expertflow"] else None


def needs_gpu(words: list[str]) -> bool:
    """Whether a command needs one."""
    options = set(pairwise(words))
    return bool(options & {("--device", "cuda"), ("--execution", "graph")}) and not torch.cuda.is_available()


def parse(words: list[str]) -> None:
    """Take the options apart as the command does, without running it."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if words[0] not in command.commands:
            words = ["record", *words]  # `trace MODEL` is `trace record MODEL`
        command, words = command.commands[words[0]], words[1:]
    command.make_context("expertflow", list(words))


@pytest.fixture(scope="module")
def place(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the lines take for granted: a model, prompts, and a trace of other prompts of the same model."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "model").symlink_to(make_checkpoint("qwen3_moe"))
    (folder / "prompts.txt").write_text("\n".join(letter * 5 for letter in "abcdefgh"))
    with LLM(folder / "model", device="cpu", max_length=64) as llm, llm.record(folder / "other.trace"):
        llm.generate([letter * 6 for letter in "ABCDEFGH"])
    return folder


def test_every_line_is_known() -> None:
    """A line is a `make` target that exists, one of ours that parses, or sets up a shell. There are enough of them."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    seen = set()
    for line in shell_lines():
        words = command_of(line)
        if words is not None:
            parse(words)
            seen.add(words[0])
        elif line[0] == "make":
            assert set(line[1:]) <= targets, line
        else:
            assert line[0] in SETUP, line
    assert seen >= set(SMALLEST)


def test_every_command_line_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the documents' order, in one folder, each on what the lines before it wrote."""
    monkeypatch.chdir(place)
    for line in shell_lines():
        words = command_of(line)
        if words is None or needs_gpu(words):
            continue
        words = [re.sub(MODELS, "model", word) for word in words] + SMALLEST.get(words[0], [])
        if words[0] == "bench" and "--model" not in words:
            words += ["--model", "model"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert done.exit_code == 0, (line, done.output)


def test_every_python_block_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pasted one after another in one namespace; only `inputs` is there before, and holds token ids."""
    sources = [text for language, text in blocks() if language == "python"]
    assert len(sources) >= 3
    names: dict[str, Any] = {"inputs": BatchEncoding({"input_ids": torch.tensor([[5, 6, 7]])})}
    for source in sources:
        text = re.sub(MODELS, str(place / "model"), source)
        for pattern, small in NUMBERS.items():
            text = re.sub(pattern, small, text)
        exec(compile(text, "README.md", "exec"), names)  # noqa: S102 - our own text
    assert capsys.readouterr().out.count("\n") > 3
