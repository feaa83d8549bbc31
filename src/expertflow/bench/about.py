"""What a result says of its circumstances: machine, versions, commit. Knows the machine; refuses to know the run."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil
import torch
import transformers

from expertflow import __version__
from expertflow.files import processor


def machine(device: str) -> dict[str, str | int]:
    """Processor, cores, memory, and the GPU if that is what ran."""
    about: dict[str, str | int] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": processor(),
        "system": platform.system(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "host_bytes": int(psutil.virtual_memory().total),
    }
    if device == "cuda":
        about["device_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return about


def versions() -> dict[str, str]:
    """Everything that a number may depend on."""
    found = {
        "expertflow": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """The commit of the source, with `+` if files differ from it; empty where there is no repository."""
    folder, git = Path(__file__).parents[3], shutil.which("git")
    if git is None or not (folder / ".git").exists():
        return ""

    def ask(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        return done.stdout.strip() if done.returncode == 0 else None

    head, changed = ask("rev-parse", "--short", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    return "" if head is None else head + ("+" if changed else "")
