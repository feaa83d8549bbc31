"""The format of plain numbers: float32, bfloat16 or float16, as a model computes with them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec

VALUES = "values"
"""The one part of plain numbers."""


class Plain(Format):
    """Plain numbers: one part, which needs no decoding."""

    name = "plain"

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """One array of the tensor's own shape."""
        return (Part(name=VALUES, shape=spec.shape, dtype=spec.dtype, stored=spec.shape),)

    def decode(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """The array itself."""
        del spec
        return parts[VALUES]

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Normally distributed numbers."""
        values = torch.randn(spec.shape, device=generator.device, dtype=getattr(torch, spec.dtype), generator=generator)
        return {VALUES: values * std}


PLAIN = Plain()


def plain(name: str, shape: tuple[int, ...], dtype: str, *, transposed: bool = False) -> TensorSpec:
    """A tensor of plain numbers; arguments as in `TensorSpec`."""
    return TensorSpec(name=name, shape=shape, dtype=dtype, format=PLAIN, transposed=transposed)
