"""The header of a GGUF file: its metadata, and where its tensors are. Files that were split are read as one.

Own code in place of `gguf.GGUFReader`, which makes an object of every string, and for some damaged counts never ends. Nothing is
allocated or repeated before a count is compared with the bytes that are left. Must not know models.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expertflow import outside
from expertflow.errors import CheckpointError, UnsupportedModelError
from expertflow.formats.published.gguf import GGUF

ENDING = ".gguf"
_AGAIN = "The file is damaged or incomplete: fetch it again."
_OTHER_TYPE = f"Take a file whose tensors are {', '.join(sorted(GGUF))}, such as Q4_K_M, Q8_0 or MXFP4."
_SCALARS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
"""Codes of `struct` by the number of a metadata type."""
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 16
"""Bytes of a string, and entries of a list of numbers, that are kept. Longer ones, such as vocabularies, are passed over."""
_DIMENSIONS = 4
_INFO_BYTES = 24
"""Bytes that the description of a tensor has at least, and more than an entry of metadata has."""
TYPES: Mapping[int, str] = MappingProxyType({
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
})  # fmt: skip
"""Names of tensor types by their numbers."""
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor as the file describes it.

    Attributes:
        name: in the file.
        file: that it is in.
        type: a key of `formats.published.gguf.GGUF`.
        shape: dimensions, the slowest one first; the file states them the other way round.
        start: absolute byte offset.
    """

    name: str
    file: Path
    type: str
    shape: tuple[int, ...]
    start: int

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Shape of its bytes: blocks of a row lie one after another."""
        format_ = GGUF[self.type]
        return (*self.shape[:-1], self.shape[-1] // format_.per * format_.size)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file, or all parts of a split one, say of themselves.

    Attributes:
        metadata: scalars, short strings and short lists of numbers, by key; of the first part.
        tensors: by name.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def is_gguf(place: Path) -> bool:
    """Whether a place is a GGUF file, by its name."""
    return place.suffix.lower() == ENDING and outside.is_file(place)


def read_header(path: Path) -> Header:
    """Read the header of a file and, if it was split, of the others.

    Args:
        path: the file; of a split one, the first part.

    Raises:
        CheckpointError: if a file is missing, damaged, or ends early, or parts disagree.
        UnsupportedModelError: if a tensor is of a type that is not decoded.
    """
    first = _read_file(path)
    parts = [first, *(_read_file(other) for other in _others(path, first.metadata))]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        if number and (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, len(parts)):
            raise CheckpointError(
                f"the parts of {path.name} disagree: part {number + 1} of {len(parts)} says that it is part "
                f"{part.metadata.get('split.no')} (from 0) of {part.metadata.get('split.count')}",
                "Fetch all parts again.",
            )
        if again := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{path.name} has the tensor {again[0]!r} twice", _AGAIN)
        tensors |= part.tensors
    stated = first.metadata.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and stated != len(tensors):
        raise CheckpointError(
            f"the parts of {path.name} hold {len(tensors)} tensors, and it says {stated}", "Fetch all parts again."
        )
    return Header(metadata=first.metadata, tensors=tensors)


def _others(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The further parts of a split file."""
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return []
    named = _SPLIT.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(
            f"{path.name} is one of {count} parts of a GGUF file, and its name does not say which",
            f"Give the parts the names they had, NAME-00001-of-{count:05}.gguf and so on.",
        )
    if int(named["number"]) != 1 or metadata.get("split.no", 0) != 0:
        raise CheckpointError(
            f"{path.name} is a later part of a GGUF file",
            f"Give the first one, {named['stem']}-00001-of-{count:05}.gguf.",
        )
    return [path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]


def _read_file(path: Path) -> Header:
    try:
        outside.check_regular(path)
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _Reader(path, data).header()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing", "Fetch the missing part.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Check the file and its permissions.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} is no whole GGUF file: {error}", _AGAIN) from error


class _Reader:
    """Reads a header. Everything that cannot be is a ValueError."""

    def __init__(self, path: Path, data: mmap) -> None:
        self._path, self._data, self._size = path, data, len(data)
        self._at = 0

    def header(self) -> Header:
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            other = "of the other byte order" if version & 0xFFFF == 0 else f"of version {version}"
            raise ValueError(f"it is {other}, and versions 2 and 3 in little-endian order are read")
        tensors = self._count(_INFO_BYTES)
        entries = self._count(_INFO_BYTES // 2)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            if key in metadata:
                raise ValueError(f"it has the key {key!r} twice")
            metadata[key] = self._value(self._number("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}")
        return Header(metadata=metadata, tensors=self._placed(infos, -(-self._at // alignment) * alignment))

    def _placed(self, infos: list[tuple[str, int, tuple[int, ...], int]], begin: int) -> dict[str, GgufTensor]:
        """The tensors, once it is known where their bytes begin."""
        tensors: dict[str, GgufTensor] = {}
        end, before = begin, ""
        for name, number, shape, offset in sorted(infos, key=lambda info: info[3]):
            type_ = TYPES.get(number, f"number {number}")
            if type_ not in GGUF:
                raise UnsupportedModelError(
                    f"{self._path.name} stores {name!r} as {type_}, which is not decoded", _OTHER_TYPE
                )
            if name in tensors:
                raise ValueError(f"it has the tensor {name!r} twice")
            if not shape or min(shape) < 1 or shape[-1] % GGUF[type_].per:
                raise ValueError(f"{name!r} of type {type_} has the dimensions {list(shape)}")
            tensor = GgufTensor(name=name, file=self._path, type=type_, shape=shape, start=begin + offset)
            if tensor.start < end or tensor.start % 8:
                raise ValueError(
                    f"{name!r} begins at byte {tensor.start}, within {before or 'the header'!r} or unaligned"
                )
            end, before = tensor.start + prod(tensor.byte_shape), name
            if end > self._size:
                raise ValueError(f"{name!r} ends at byte {end}, and the file has {self._size}")
            tensors[name] = tensor
        return tensors

    def _info(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, number of the type, shape, and offset of a tensor."""
        name, dimensions = self._string(), self._number("I")
        if dimensions > _DIMENSIONS:
            raise ValueError(f"{name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        return name, self._number("I"), shape, self._number("Q")

    def _value(self, type_: int) -> Any:
        """A value of metadata; None for what is passed over."""
        if type_ in _SCALARS:
            return self._number(_SCALARS[type_])
        if type_ == _STRING:
            return self._string()
        if type_ != _ARRAY:
            raise ValueError(f"it has metadata of the unknown type {type_}")
        of = self._number("I")
        if of == _STRING:
            self._skip_strings(self._count(8))
            return None
        if of not in _SCALARS:
            raise ValueError(f"it has lists of the type {of}")
        size = struct.calcsize(_SCALARS[of])
        count = self._count(size)
        if count > _LONGEST:
            self._at += count * size
            return None
        return list(struct.unpack(f"<{count}{_SCALARS[of]}", self._bytes(count * size)))

    def _string(self) -> str:
        length = self._number("Q")
        if length > _LONGEST:  # such as a chat template with all its tools
            self._at += self._checked(length)
            return ""
        return self._bytes(length).decode()

    def _skip_strings(self, count: int) -> None:
        """Pass over strings: vocabularies have hundreds of thousands."""
        data, at, end, length = self._data, self._at, self._size - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > end:
                raise ValueError("it ends within its header")
            at += 8 + length(data, at)[0]
        self._at += self._checked(at - self._at)

    def _count(self, least: int) -> int:
        """A number of things of at least so many bytes each."""
        count: int = self._number("Q")
        self._checked(count * least)
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(code)))[0]

    def _bytes(self, count: int) -> bytes:
        self._at += self._checked(count)
        return self._data[self._at - count : self._at]

    def _checked(self, count: int) -> int:
        """So many bytes, if they are left."""
        if count > self._size - self._at:
            raise ValueError("it ends within its header")
        return count
