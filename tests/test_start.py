"""What starts before torch: arguments are checked first, and nothing heavy is imported without need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expertflow import __version__, limits
from expertflow.engine.prepare import SHIPPED_PREDICTOR
from expertflow.engine.stepping import threads
from expertflow.limits import usable_cpus

FOLDER = Path(__file__).parent / "data"
TRACE = str(FOLDER / "gpt_oss_20b_excerpt" / "routing.trace")
PREDICTOR = str(SHIPPED_PREDICTOR)
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
        [PREDICTOR, TRACE, "--steps", "0"],
        [PREDICTOR, TRACE, "--record-mb", "-1"],
        [PREDICTOR, TRACE, "--only", "physics"],
        [PREDICTOR, TRACE, "--json", "missing/result.json"],
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


def python(script: str) -> str:
    """Output of a script in a process of its own."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
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
    """Numba, 200 MB, is imported to simulate or to group, not by every model."""
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


def _write_tree(root: Path, tree: dict[str, str]) -> None:
    for name, text in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


CGROUPS = [  # line of /proc/self/cgroup, files below /sys/fs/cgroup, processors
    ("0::/", {"cpu.max": "max 100000"}, None),
    ("0::/", {"cpu.max": "350000 100000"}, 3),
    ("0::/a/b", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
    ("0::/a/b", {"a/cpu.max": "max 100000", "a/b/cpu.max": "50000 100000"}, 1),
    ("0::/a", {"unified/a/cpu.max": "150000 100000"}, 1),
    ("0::/../..", {"cpu.max": "200000 100000"}, 2),
    ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
    ("1:cpu:/a", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "200000"}, 2),
    (
        "3:cpu,cpuacct:/docker/x",
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        3,
    ),
    ("2:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, None),
]


@pytest.mark.parametrize(("line", "files", "expected"), CGROUPS)
def test_a_quota_limits_the_processors(
    line: str, files: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest of affinity and the quotas of the process's group and all above it, rounded down; versions 1 and 2."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    _write_tree(tmp_path, {"proc/self/cgroup": line, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}})
    assert usable_cpus(tmp_path) == (expected or 8)


MEMORY = [  # line of /proc/self/cgroup, files below /sys/fs/cgroup, bytes that are left of 10,000
    ("0::/", {"memory.max": "max", "memory.current": "9000"}, 10_000),
    ("0::/", {"memory.max": "5000", "memory.current": "3000"}, 2000),
    ("0::/a/b", {"a/b/memory.max": "5000", "a/b/memory.current": "4000", "a/memory.max": "max"}, 1000),
    ("0::/a/b", {"a/memory.max": "5000", "a/memory.current": "4900", "a/b/memory.max": "max"}, 100),
    (
        "0::/a",
        {"a/memory.max": "5000", "a/memory.current": "4000", "a/memory.stat": "inactive_file 700\nactive_file 200"},
        1900,
    ),
    ("0::/a", {"a/memory.max": "5000", "a/memory.current": "6000"}, 0),
    ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "5000", "memory/a/memory.usage_in_bytes": "3000"}, 2000),
    ("4:memory:/docker/x", {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "3000"}, 2000),
    (
        "4:memory:/a",
        {
            "memory/a/memory.limit_in_bytes": "5000",
            "memory/a/memory.usage_in_bytes": "3000",
            "memory/a/memory.stat": "inactive_file 5\ntotal_inactive_file 500\ntotal_active_file 400",
        },
        2900,
    ),
    ("4:cpu:/a", {"memory/a/memory.limit_in_bytes": "5000", "memory/a/memory.usage_in_bytes": "3000"}, 10_000),
]


@pytest.mark.parametrize(("line", "files", "expected"), MEMORY)
def test_a_control_group_limits_the_memory(
    line: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the machine has, or what the process's group or one above it leaves, its page cache included."""
    monkeypatch.setattr(limits.psutil, "virtual_memory", type("Memory", (), {"available": 10_000}))
    _write_tree(tmp_path, {"proc/self/cgroup": line, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}})
    assert limits.free_memory(tmp_path) == expected


@pytest.mark.parametrize(
    ("rights", "limit", "expected"), [("0", 8192, 8192), ("1000", 8192, 8192), ("4000", 8192, None)]
)
def test_a_privileged_process_locks_what_it_wants(
    rights: str, limit: int, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right CAP_IPC_LOCK is bit 14 (capabilities(7)); without it the limit counts."""
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (limit, limit))
    _write_tree(tmp_path, {"proc/self/status": f"Name: x\nCapEff:\t{rights.zfill(16)}"})
    assert limits.lockable_memory(tmp_path) == expected


def test_the_limit_on_address_space_is_read() -> None:
    """What is left of it shrinks with what is mapped."""
    script = """
import mmap, resource
from expertflow.limits import free_addresses
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
before = free_addresses()
room = mmap.mmap(-1, 2**30)
assert 2**39 < before < 2**40 and abs(before - free_addresses() - 2**30) < 2**24
"""
    python(script)


def test_compiled_functions_need_no_place_to_be_kept() -> None:
    """A function whose file is nowhere (as where nothing can be written) runs all the same."""
    script = """
from expertflow.cache.shared import compiled
@compiled
def double(number):
    return 2 * number
assert double(21) == 42
"""
    python(script)


@pytest.mark.parametrize(
    ("variables", "before", "expected"),
    [({}, 4, (2, 1)), ({"OMP_NUM_THREADS": "4,2"}, 4, (4, 4)), ({"OMP_NUM_THREADS": ""}, 4, (2, 1)), ({}, 7, (7, 7))],
)
def test_a_number_of_threads_that_was_chosen_is_kept(
    variables: dict[str, str], before: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch would take 4, that is lowered to 2 processors, and to 1 in steps of small experts; a chosen number stays."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    monkeypatch.setattr(threads, "default_threads", lambda: {4})
    try:
        torch.set_num_threads(before)
        steps = threads.Threads(expert_bytes=1000)
        with steps.step():
            inside = torch.get_num_threads()
        assert (torch.get_num_threads(), inside) == expected
        assert steps.number == inside
        assert threads.Threads(expert_bytes=2**30).number == expected[0]
    finally:
        torch.set_num_threads(1)


def test_from_pretrained_sets_no_threads() -> None:
    """The program's model, the program's threads; `LLM` says how many its steps use."""
    script = """
import torch
torch.set_num_threads(3)
import expertflow
expertflow.from_pretrained(device="cpu", slots="25%").expertflow.close()
with expertflow.LLM(device="cpu", slots="25%") as llm:
    assert (torch.get_num_threads(), llm.threads) == (3, 3)
"""
    python(script)
