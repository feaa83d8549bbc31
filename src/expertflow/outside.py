"""Reads what other programs wrote, within bounds: bytes of a file, JSON, members of a zip archive, columns of numbers.

Everything malformed is a ValueError here; the caller makes its own error of it, with file and remedy. Nothing is built
from the content before its size, nesting and digits are checked. Must not know our own formats.
"""

import errno
import json
import lzma
import math
import os
import stat
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL = 1 << 20
"""Bytes of a file that a person could write, such as a header."""
LARGE = 1 << 30
"""Bytes of the largest file that is read whole."""
_STREAM = 1 << 26
"""Bytes taken at most from a pipe or a device, which have no size."""
_DEEPEST = 64
"""Levels of nested lists and objects."""
_DIGITS = 40
"""Digits of a number; a 64-bit integer has 20."""
_MOST_RATIO = 1100
"""Bytes that deflate makes of one byte at most (zlib's technical details: 1032), and a little."""
_NPY_HEADER = 10_000
"""Bytes of the header of a column."""


def is_file(path: Path) -> bool:
    """Whether there is a regular file; False also for a name that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113 - pathlib raises for names that are too long


def is_folder(path: Path) -> bool:
    """Whether there is a folder; False also for a name that no folder can have."""
    return os.path.isdir(path)  # noqa: PTH112 - pathlib raises for names that are too long


def check_regular(path: Path) -> None:
    """Refuse what is no file: opening a pipe can wait for ever, a device need not end.

    Raises:
        OSError: then, or if there is nothing.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def name_fault(path: Path, ending: str = "") -> str:
    """Why no file can have a name; empty if one can.

    Args:
        path: of the file.
        ending: what is added to the name while the file is written.
    """
    try:
        path.with_name(path.name + ending).lstat()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""


def read_bytes(path: Path, most: int = LARGE, *, stream: bool = False) -> bytes:
    """The content of a file.

    Args:
        path: of the file.
        most: bytes it may have; of a pipe or a device at most 64 MiB.
        stream: read a pipe or a device as well, however long that takes.

    Raises:
        OSError: if it cannot be read, or is no regular file.
        ValueError: if it is larger.
    """
    if not stream:
        check_regular(path)
    elif not is_file(path):
        most = min(most, _STREAM)
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it has more than {most} bytes")
    return raw


def read_text(path: Path, most: int = LARGE) -> str:
    """The content of a UTF-8 file. See `read_bytes`."""
    return read_bytes(path, most).decode()


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """JSON as Python objects.

    Args:
        text: UTF-8.
        finite: refuse NaN and infinity; else they are floats, as transformers writes them in some configs.

    Raises:
        ValueError: if it is malformed, nested deeper than 64 levels, or a number has more than 40 digits.
    """
    try:
        value = json.loads(
            text.decode() if isinstance(text, bytes) else text,
            parse_int=_integer,
            parse_float=_finite if finite else _float,
            parse_constant=_constant if finite else None,
        )
    except RecursionError:
        raise ValueError(f"lists and objects are nested deeper than {_DEEPEST} levels") from None
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            part
            for entry in level
            if isinstance(entry, dict | list)
            for part in (entry.values() if isinstance(entry, dict) else entry)
        ]
        if not level:
            return value
    raise ValueError(f"lists and objects are nested deeper than {_DEEPEST} levels")


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    return float(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {text[:_DIGITS]} is too large")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def read_json(path: Path, most: int = LARGE, *, finite: bool = True) -> Any:
    """A JSON file as Python objects. See `parse_json`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than `most` bytes, or malformed.
    """
    return parse_json(read_bytes(path, most), finite=finite)


def whole(value: Any, least: int, most: int) -> bool:
    """Whether a value is an integer (no truth value, no float) within bounds."""
    return type(value) is int and least <= value <= most


def member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """One member of a zip archive.

    Args:
        archive: open for reading.
        name: of the member.
        most: bytes it may have once it is unpacked.

    Raises:
        ValueError: if it is not there, larger, damaged, encrypted, or packed in an unusual way.
    """
    try:
        info = archive.getinfo(name)
        if info.file_size > most:
            raise ValueError(f"it unpacks to {info.file_size} bytes, {most} at most are right")
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} or info.flag_bits & 1:
            raise ValueError("it is encrypted, or packed in another way than deflate")
        if info.file_size > _MOST_RATIO * (info.compress_size + 1):
            raise ValueError(f"{info.compress_size} bytes cannot unpack to {info.file_size}")
        return archive.read(info)
    except KeyError:
        raise ValueError("it is missing") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip archive, opened for reading.

    Raises:
        OSError: if it cannot be read.
        zipfile.BadZipFile: if it is none, or its directory is damaged.
    """
    check_regular(path)
    try:
        return zipfile.ZipFile(path)
    except (struct.error, ValueError, OverflowError, RuntimeError) as error:
        raise zipfile.BadZipFile(str(error)) from error


def parse_column(raw: bytes, shape: tuple[int, ...] | None, kinds: str) -> npt.NDArray[Any]:
    """An array of NumPy's `.npy` format, of a shape that is known beforehand.

    Args:
        raw: header and data.
        shape: what it has to be; None: whatever its data have room for.
        kinds: allowed kinds of its type, such as `iu`; see `numpy.dtype.kind`.

    Raises:
        ValueError: if it is malformed, or of another shape or kind.
    """
    stream = BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the npy format is unknown")
        found, by_column, dtype = readers[version](stream, max_header_size=_NPY_HEADER)
    except (TokenError, SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise ValueError(f"its header is malformed: {error}") from error
    if dtype.kind not in kinds or dtype.itemsize > 8:
        raise ValueError(f"it holds numbers of type {dtype}")
    if (shape is not None and found != shape) or not all(whole(size, 0, LARGE) for size in found) or len(found) > 8:
        raise ValueError(f"it has shape {str(found)[:80]}, not {shape or 'one of up to 8 sizes'}")
    data = memoryview(raw)[stream.tell() :]
    if by_column or len(data) != math.prod(found) * dtype.itemsize:
        raise ValueError(f"it holds {len(data)} bytes, shape {found} of {dtype} needs another number or order of them")
    return np.frombuffer(data, dtype).reshape(found)
