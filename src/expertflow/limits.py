"""Which processors this process may use: its affinity, and the quota of its control group and of all groups above it.

Reads `/proc` and `/sys`; knows nothing of threads and torch.
Sources: kernel documents admin-guide/cgroup-v2 (`cpu.max`) and scheduler/sched-bwc (`cpu.cfs_quota_us`).
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors that this process can keep busy, 1 or more.

    Args:
        root: where `proc` and `sys` are.
    """
    return max(1, min([len(_affinity()), *(int(share) for share in _quotas(root))]))


def default_threads(root: Path = _ROOT) -> set[int]:
    """Numbers of threads that torch may choose by itself: processors or cores, of the machine or of the affinity."""
    allowed = _affinity()
    cores = {
        _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed
    }
    return {len(allowed), len(cores), os.cpu_count() or 1, psutil.cpu_count(logical=False) or 1}


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quotas(root: Path) -> Iterator[float]:
    """Processors of every quota that binds this process."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            for folder in _groups(root, path, ("", "unified")):
                yield from _quota((_text(folder / "cpu.max") or "").split())
        elif "cpu" in controllers.split(","):
            for folder in _groups(root, path, ("cpu", controllers)):
                yield from _quota([_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")])


def _quota(words: list[str]) -> Iterator[float]:
    """Quota and period as processors; none for `max`, -1, or a file that is not there."""
    if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
        yield int(words[0]) / int(words[1])


def _groups(root: Path, path: str, mounts: tuple[str, ...]) -> Iterator[Path]:
    """Folders of a group and of all above it, wherever its tree may be mounted; some are not there."""
    inner = PurePosixPath(path.lstrip("/"))
    steps = () if ".." in inner.parts else (inner, *inner.parents)
    for mount in mounts:
        for step in {*steps, PurePosixPath(".")}:
            yield root / "sys/fs/cgroup" / mount / step


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
