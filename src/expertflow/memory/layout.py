"""One expert as one contiguous record: which bytes of a row are which tensor.

Knows tensor specs; refuses to know models, files and devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from expertflow.types import TensorSpec

ALIGNMENT = 256
"""Bytes. GEMM results depend on pointer alignment on CPUs, and vector loads need it on GPUs."""
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _align(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """The tensors of one expert laid end to end, each on a 256-byte boundary.

    Attributes:
        specs: the tensors, in row order.
        offsets: byte offset of each tensor in the row.
        record_bytes: bytes of a row, padded to the alignment.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    record_bytes: int

    @classmethod
    def of(cls, specs: Sequence[TensorSpec]) -> Self:
        """Lay out the given tensors in the given order."""
        offsets, end = [], 0
        for spec in specs:
            offsets.append(end)
            end += _align(spec.nbytes)
        return cls(specs=tuple(specs), offsets=tuple(offsets), record_bytes=end)

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """The row's tensors by name, without copying.

        Args:
            row: uint8 `[record_bytes]`, on any device.
        """
        return {
            spec.name: row[offset : offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
            for spec, offset in zip(self.specs, self.offsets, strict=True)
        }
