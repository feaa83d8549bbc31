"""How the expert kernels read a format: its product loop and its tile loader, by name. A new format's entry goes here.

Must not know experts and slots.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from expertflow.formats.format import Format
from expertflow.formats.plain import PLAIN
from expertflow.kernels.reading.bytes import load_bytes, multiply_bytes
from expertflow.kernels.reading.gguf import load_gguf
from expertflow.kernels.reading.tiles import load_plain, multiply_tiles
from expertflow.kernels.reading.words import load_words, multiply_words


class Reader(NamedTuple):
    """Triton functions that read a format.

    Attributes:
        multiply: the product of a weight and tokens, as `kernels.reading.tiles.multiply_tiles`.
        load: the tile loader that it is given.
    """

    multiply: Any
    load: Any


READERS: Mapping[str, Reader] = MappingProxyType(
    {
        PLAIN.name: Reader(multiply_tiles, load_plain),
        "words": Reader(multiply_words, load_words),
        "gguf": Reader(multiply_tiles, load_gguf),
        "bytes": Reader(multiply_bytes, load_bytes),
    }
)
"""By a format's `tiles`, or its name."""


def reader(format_: Format) -> Reader | None:
    """How a format is read; None: kernels do not read it."""
    if format_.tile_loader is not None:
        return Reader(multiply_tiles, format_.tile_loader)
    return READERS.get(format_.tiles or format_.name)


def reads(format_: Format) -> bool:
    """Whether the expert kernels read a format."""
    return reader(format_) is not None
