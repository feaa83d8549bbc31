"""AWQ, as AutoAWQ stores it for its GEMM kernels: words of eight outputs, input-major, their fields in an order of their own.

Source: AutoAWQ 0.2, `version` `gemm`. Other versions (`gemv`, `gemv_fast`, `marlin`) arrange words otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.published.int4 import Int4, group_size, refuse
from expertflow.formats.words import PER_WORD, as_bytes, nibbles

FIELDS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output, of the eight of a word, in each field of four bits, lowest first."""
_ENDINGS = {"qweight": "codes", "scales": "scales", "qzeros": "zeros"}


@dataclass(frozen=True, kw_only=True)
class Awq(Int4):
    """`qweight` int32 `[K, N / 8]`, `scales` `[groups, N]` and `qzeros` int32 `[groups, N / 8]`.

    Zeros are always read, also where the config says that there is no zero point.
    """

    name = "awq"
    scale_dtype: str = "float16"
    zeros: bool = True

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of the method `awq`, in the version `gemm`."""
        if quantization.get("quant_method") != "awq":
            return ()
        bits = quantization.get("bits", quantization.get("w_bit"))
        stated = next(
            (quantization[name] for name in ("version", "checkpoint_format", "format") if quantization.get(name)),
            "gemm",
        )
        if bits != 4:
            refuse(f"the checkpoint is quantised by awq to {bits} bits")
        if str(stated).lower() != "gemm":
            refuse(f"the checkpoint is quantised by awq in the version {stated!r}, and only 'gemm' is decoded")
        size = quantization.get("group_size", quantization.get("q_group_size"))
        return (replace(self, group=group_size(size, "awq")),)

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The keys `<name>.qweight` and those beside it."""
        del stored  # the names say enough
        stem, _, end = key.rpartition(".")
        return (f"{stem}.weight", _ENDINGS[end]) if stem and end in _ENDINGS else None

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, scales and zeros."""
        groups, words = self.groups_of(spec), spec.outputs // PER_WORD
        return (
            *self.word_parts(spec, (spec.inputs, words), (groups, spec.outputs), 1),
            self.zero_part(spec, (groups, words), 1),
        )

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Of the words of codes."""
        return stored["codes"][1] * PER_WORD, stored["codes"][0]

    def pairs(self, stored: Tensor) -> Tensor:
        """Of inputs side by side, output by output."""
        inputs, words = stored.shape
        fields = as_bytes(stored).view(inputs, words, PER_WORD // 2)
        made = torch.empty(words, PER_WORD, inputs // 2, dtype=torch.uint8, device=stored.device)
        for byte in range(PER_WORD // 2):
            even, odd = fields[0::2, :, byte], fields[1::2, :, byte]
            made[:, FIELDS[2 * byte]] = (even & 15 | odd << 4).t()
            made[:, FIELDS[2 * byte + 1]] = (even >> 4 | odd & 240).t()
        return made.flatten(0, 1)

    def by_output(self, stored: Tensor) -> Tensor:
        """Turned round."""
        return stored.t()

    def zero_codes(self, spec: TensorSpec, stored: Tensor) -> Tensor:
        """In the order of outputs."""
        fields = nibbles(stored).view(stored.shape[0], -1, PER_WORD)
        zeros = torch.empty_like(fields)
        zeros[..., list(FIELDS)] = fields
        return zeros.view(stored.shape[0], spec.outputs).t()


AWQ = Awq()
