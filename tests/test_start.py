"""What starts before torch: arguments are checked first, and nothing heavy is imported without need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from expertflow import __version__

FOLDER = Path(__file__).parent / "data"
TRACE = str(FOLDER / "gpt_oss_20b_excerpt" / "routing.trace")
WRONG = {
    "run": [
        [],
        ["--prompts-file", "missing.txt"],
        ["--prompt", "x", "--slots", "many"],
        ["--prompt", "x", "--slots", "0"],
        ["--prompt", "x", "--gpu-memory", "6Gob"],
        ["--prompt", "x", "--strategy", "lruu"],
        ["--prompt", "x", "--strategy", "oracle"],
        ["--prompt", "x", "--predictor", "missing"],
        ["--prompt", "x", "--temperature", "-1"],
        ["--prompt", "x", "--max-batch", "2", "--max-live", "1"],
        ["--prompt", "x", "--results", "missing/out.jsonl"],
        ["./missing", "--prompt", "x"],
    ],
    "plan": [["--device", "tpu"], ["./missing"]],
    "trace": [["record", "--prompts-file", "missing.txt", "--out", "a.trace"]],
    "simulate": [
        ["missing.trace", "--model", "x"],
        [TRACE, "--model", "./missing"],
        [TRACE, "--model", "x", "--batch", "²"],
        [TRACE, "--model", "x", "--slots", "many"],
        [TRACE, "--model", "x", "--strategy", "lruu"],
    ],
    "train-predictor": [
        ["missing.trace", "--out", "p"],
        [TRACE, "--out", "p", "--epochs", "0"],
        [TRACE, "--out", "p", "--kind", "mlp"],
        [TRACE, "--out", "p", "--validation", "2"],
        [TRACE, "--out", "p", "--leave-out", "physics"],
        [TRACE, "--out", TRACE],
    ],
    "eval-predictor": [
        ["missing", TRACE],
        ["missing", TRACE, "--batch", "4x3"],
    ],
    "bench": [
        ["--preset", "slow"],
        ["--batches", "²"],
        ["--slots", "many"],
        ["--device", "tpu"],
        ["--prompts-file", "missing.txt"],
        ["--out", "missing/result.json"],
    ],
}
EVERY_WRONG = [[command, *rest] for command, cases in WRONG.items() for rest in cases]


def python(script: str, *, env: dict[str, str] | None = None) -> str:
    """Output of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wrong_arguments_are_refused_before_torch_is_imported() -> None:
    """Every command says what is wrong with its arguments within a second, not after seven of imports."""
    script = f"""
import sys
from expertflow.cli.main import app
from expertflow.errors import ExpertFlowError
for arguments in {EVERY_WRONG}:
    try:
        app(arguments, standalone_mode=False)
    except ExpertFlowError:
        pass
    else:
        raise AssertionError(f"accepted: {{arguments}}")
    assert not {{"torch", "transformers", "numba"}} & set(sys.modules), arguments
"""
    python(script)


@pytest.mark.parametrize("start", [["-m", "expertflow"], ["-m", "expertflow.cli.main"]])
def test_the_version_is_printed(start: list[str]) -> None:
    """`python -m expertflow` is the command, and says which version it is."""
    done = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"expertflow {__version__}\n"


def test_generating_needs_no_compiler() -> None:
    """Numba, 200 MB, is imported by whoever simulates or groups, not by every model."""
    script = """
import sys
from expertflow import LLM, SamplingParams
with LLM(device="cpu", slots="25%") as llm:
    llm.generate(["Once upon a time", "The sea"], SamplingParams(max_tokens=2))
assert "numba" not in sys.modules
import numpy as np
from expertflow.schedule.cluster import group
group(np.eye(4, dtype=bool)[:, None], 2)
assert "numba" in sys.modules
"""
    python(script)
