"""Files that are written whole or not at all, and pictures with a line about their data.

If a command fails or is interrupted while it writes, the old file stays, or none. Must not know what is written.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; it takes the name `path` when the block ends well, and goes if it does not.

    A device, pipe or socket is written to as it is.

    Raises:
        OSError: if the file cannot be renamed.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    target = path.resolve()
    ending = target.suffix if len(target.suffix) < 20 else ""  # a picture's format is its ending
    part = target.with_name(f"{target.stem[:50]}.{os.getpid()}.part{ending}")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file as UTF-8, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with whole_file(path) as place:
        place.write_text(text, encoding="utf-8")


def save_picture(picture: Any, path: Path, about: str, dpi: int) -> None:
    """Write a picture with a small line below it.

    Args:
        picture: a matplotlib figure in constrained layout.
        path: of the file; its ending is the format.
        about: model, machine and date.
        dpi: dots an inch.

    Raises:
        OSError: if it cannot be written.
        ValueError: if the ending names no format of pictures.
    """
    picture.supxlabel(about, fontsize="x-small", color="gray", x=0.01, ha="left")
    with whole_file(path) as place:
        picture.savefig(place, dpi=dpi)


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
