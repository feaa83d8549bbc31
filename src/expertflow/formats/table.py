"""The formats that a checkpoint may be stored in. A new format is one more entry."""

from collections.abc import Mapping
from types import MappingProxyType

from expertflow.formats.format import Format
from expertflow.formats.plain import PLAIN
from expertflow.formats.published.awq import AWQ
from expertflow.formats.published.fp8 import FLOAT_QUANTIZED, FP8, INT_QUANTIZED
from expertflow.formats.published.gguf import GGUF
from expertflow.formats.published.gptq import GPTQ
from expertflow.formats.published.int4 import INT4
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.published.nvfp4 import MODELOPT_NVFP4, NVFP4

Formats = Mapping[str, Format]
"""Formats by name; `plain` is always one of them."""
FORMATS: Formats = MappingProxyType(
    {
        format_.name: format_
        for format_ in (
            PLAIN,
            MXFP4,
            INT4,
            GPTQ,
            AWQ,
            NVFP4,
            MODELOPT_NVFP4,
            FP8,
            FLOAT_QUANTIZED,
            INT_QUANTIZED,
            *GGUF.values(),
        )
    }
)
