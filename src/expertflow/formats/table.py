"""The formats that a checkpoint may be stored in. A new format is one more entry."""

from collections.abc import Mapping
from types import MappingProxyType

from expertflow.formats.awq import AWQ
from expertflow.formats.format import Format
from expertflow.formats.gguf import GGUF
from expertflow.formats.gptq import GPTQ
from expertflow.formats.int4 import INT4
from expertflow.formats.mxfp4 import MXFP4
from expertflow.formats.plain import PLAIN

Formats = Mapping[str, Format]
"""Formats by name; `plain` is always one of them."""
FORMATS: Formats = MappingProxyType(
    {format_.name: format_ for format_ in (PLAIN, MXFP4, INT4, GPTQ, AWQ, *GGUF.values())}
)
