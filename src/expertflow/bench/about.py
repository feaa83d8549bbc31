"""The circumstances of a measurement: date, commit, machine and versions. Must not know what was measured."""

import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from expertflow import __version__
from expertflow.files import processor

_LIBRARIES = ("torch", "transformers", "triton", "numpy")


class About(NamedTuple):
    """The circumstances in a result; `_asdict` has the keys of every result file.

    Attributes:
        date: of the measurement, `YYYY-MM-DD`.
        commit: of the source, with `+` if files differ from it; empty where there is no repository.
        machine: processor, cores, memory in bytes, and the GPU if that is what ran.
        versions: of everything that a number may depend on, by name.
    """

    date: str
    commit: str
    machine: dict[str, str | int]
    versions: dict[str, str]


def about(device: str = "cpu") -> About:
    """The circumstances of a measurement that ran now.

    Args:
        device: `cuda` or `cpu`, where it ran.
    """
    machine: dict[str, str | int] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor(),
        "system": platform.system(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "host_bytes": int(psutil.virtual_memory().total),
    }
    if device == "cuda":
        machine["device_bytes"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    versions = {"expertflow": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # with the name of its CUDA build
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return About(time.strftime("%Y-%m-%d"), _commit(), machine, versions)


def _commit() -> str:
    folder, git = Path(__file__).parents[3], shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return ""

    def run(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        return done.stdout.strip() if done.returncode == 0 else None

    head, changed = run("rev-parse", "--short", "HEAD"), run("status", "--porcelain", "--untracked-files=no")
    return "" if head is None else head + ("+" if changed else "")
