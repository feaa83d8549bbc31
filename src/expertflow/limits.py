"""How many processors and how much memory this process may use: limits of its own, of its control group and of all above.

Reads `/proc` and `/sys`. Must not know threads and torch. Sources: kernel documents admin-guide/cgroup-v2 (`cpu.max`,
`memory.max`), scheduler/sched-bwc (`cpu.cfs_quota_us`) and admin-guide/cgroup-v1/memory (`memory.limit_in_bytes`);
setrlimit(2).
"""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

from expertflow.errors import HostMemoryError

_ROOT = Path("/")
_CAP_IPC_LOCK = 14
_REFUSED = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "unable to mmap",
    "can't start new thread",
    "failed to map segment",
)
"""Error texts of torch, safetensors and Python when the system gives them no memory."""


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


def free_memory(root: Path = _ROOT) -> int:
    """Bytes of host memory that new pages may take: what the machine has, within every control group's limit.

    Args:
        root: where `proc` and `sys` are.
    """
    return max(0, min([int(psutil.virtual_memory().available), *_memory_left(root)]))


def check_room(needed: int, what: str, remedy: str) -> None:
    """Refuse an array that the host has no memory for.

    Args:
        needed: its bytes.
        what: what it is, such as `the replay`.
        remedy: what to do.

    Raises:
        HostMemoryError: then.
    """
    if needed > (free := free_memory()):
        raise HostMemoryError(
            f"{what} takes {needed / 2**30:.1f} GiB of host memory, {free / 2**30:.1f} are free", remedy
        )


def free_addresses(root: Path = _ROOT) -> int | None:
    """Bytes that new mappings may have under the process's limit on address space (`ulimit -v`); None: no limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = next((line for line in (_text(root / "proc/self/status") or "").splitlines() if line[:7] == "VmSize:"), "")
    return max(0, limit - (int(used.split()[1]) * 1024 if used else 0))


def lockable_memory(root: Path = _ROOT) -> int | None:
    """Bytes that this process may lock in memory (`ulimit -l`); None: no limit, as for a privileged process."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    rights = next((line for line in (_text(root / "proc/self/status") or "").splitlines() if line[:7] == "CapEff:"), "")
    privileged = bool(rights) and bool(int(rights.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return None if privileged or limit == resource.RLIM_INFINITY else limit


def lacks_memory(error: BaseException) -> bool:
    """Whether an error of a library means that an allocation or a mapping was refused."""
    short = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return short or isinstance(error, MemoryError) or any(words in str(error) for words in _REFUSED)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _quotas(root: Path) -> Iterator[float]:
    """Processors of every quota that binds this process."""
    for folder, version in _own_groups(root, "cpu"):
        if version == 2:
            yield from _quota((_text(folder / "cpu.max") or "").split())
        else:
            yield from _quota([_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period")])


def _memory_left(root: Path) -> Iterator[int]:
    """Bytes left within every group that binds this process; page cache is freed on demand, so it counts as free."""
    for folder, version in _own_groups(root, "memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_text(folder / name) or "" for name in names)
        if limit.isdecimal() and used.isdecimal():
            lines = (_text(folder / "memory.stat") or "").splitlines()
            stat = {
                words[0]: int(words[1]) for line in lines if len(words := line.split()) == 2 and words[1].isdecimal()
            }
            total = "total_" if version == 1 else ""  # with groups below, as the usage is
            cached = sum(stat.get(f"{total}{name}", 0) for name in ("inactive_file", "active_file"))
            yield int(limit) - max(0, int(used) - cached)


def _own_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of this process's groups and of all above them, and the version of their files."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from ((folder, 2) for folder in _groups(root, path, ("", "unified")))
        elif controller in controllers.split(","):
            yield from ((folder, 1) for folder in _groups(root, path, (controller, controllers)))


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
