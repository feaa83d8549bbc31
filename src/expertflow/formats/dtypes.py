"""The one table of number types: names, bytes, names in safetensors files. Must not import torch: options read it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Dtype(NamedTuple):
    """A number type.

    Attributes:
        nbytes: of one number.
        stored: name in safetensors headers.
        runs: whether a model may compute in it.
    """

    nbytes: int
    stored: str
    runs: bool = False


DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        "float32": Dtype(4, "F32", runs=True),
        "bfloat16": Dtype(2, "BF16", runs=True),
        "float16": Dtype(2, "F16", runs=True),
        "uint8": Dtype(1, "U8"),
        "int8": Dtype(1, "I8"),
        "int32": Dtype(4, "I32"),
        "float8_e4m3fn": Dtype(1, "F8_E4M3"),
        "float8_e8m0fnu": Dtype(1, "F8_E8M0"),
    }
)
"""By torch's name: `getattr(torch, name)` is the torch dtype."""
RUN_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.runs)
"""Dtypes that a model may run in."""
BY_STORED_NAME: Mapping[str, str] = MappingProxyType({dtype.stored: name for name, dtype in DTYPES.items()})
"""Names of this table by those in safetensors headers."""


def run_dtype(stored: str) -> str | None:
    """The dtype a model may run in that a safetensors header names; None if it is another one."""
    name = BY_STORED_NAME.get(stored, "")
    return name if name in RUN_DTYPES else None
