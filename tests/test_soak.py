"""The soak of `benchmarks/soak.py` on checkpoints of drawn formats: it runs, and it sees other bits."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import ROOT


def script(monkeypatch: pytest.MonkeyPatch, name: str, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(ROOT / name), run_name="__main__")


def test_a_soak_of_packed_checkpoints_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed inside a budget gives the decoded twin's bits; with one weight of the twin changed it ends in an error."""
    script(monkeypatch, "tests/write_models.py", tmp_path, "mxfp4 in", "gptq that")
    options = ("--models", tmp_path, "--tokens", 8)
    script(monkeypatch, "benchmarks/soak.py", *options, "--steps", 24)
    for folder in tmp_path.iterdir():
        path = folder / "decoded" / "model.safetensors"
        state = load_file(path)
        with torch.no_grad():
            state["model.embed_tokens.weight"][5:] *= 1.01
        save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="not exact"):
        script(monkeypatch, "benchmarks/soak.py", *options, "--steps", 8)
