"""NVFP4: codes of FP4 (E2M1), an E4M3 scale for each 16 inputs, and a float32 factor for each tensor.

compressed-tensors divides a scale by the factor, modelopt multiplies; both in float32. Gate and up have factors of their own.
Source: compressed-tensors' `nvfp4-pack-quantized`; modelopt's `NVFP4QTensor`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.published.described import algorithms, require, weight_groups
from expertflow.formats.published.fp8 import check_e4m3, e4m3_numbers
from expertflow.formats.words import E2M1, Words, pack_words

GROUP = 16
_MINUS_ZERO = 8
_DIVISORS = 2.0**64
"""Largest number that divides scales, and its reciprocal the least: kernels divide by a way that is exact there."""


@dataclass(frozen=True, kw_only=True)
class _Nvfp4(Words):
    """What both kinds have in common. Parts: `codes`, `scales`, and `globals`, one for each joined tensor.

    Attributes:
        ends: how keys end that hold a part, the parts' names, and the number type they are stored in.
    """

    repacked = frozenset({"codes", "scales", "globals"})
    ends: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    group: int = GROUP
    scale_dtype: str = "float8_e4m3fn"
    codes_also: tuple[str, ...] = ("U8",)
    scaling: str = "e4m3*"

    @property
    def divides(self) -> bool:
        """Whether scales are divided by the factor."""
        return self.scaling == "e4m3/"

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, scales and the factor; its shape in a checkpoint is `[1]` or `[]`."""
        codes, scales = self.word_parts(spec, (spec.outputs, spec.inputs // 2), (spec.outputs, self.groups_of(spec)))
        return codes, scales, Part(name="globals", shape=(spec.joined,), dtype="float32", stored=(spec.joined,))

    def numbers(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times what scale and factor give."""
        scales, factor = e4m3_numbers(parts["scales"].view(torch.uint8)), parts["globals"]
        scales = scales / factor if self.divides else scales * factor
        values = torch.tensor(E2M1, device=scales.device)[self.codes_of(spec, parts).int()]
        values *= self.by_input(spec, scales)
        return values.to(getattr(torch, spec.dtype))

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """By the ends of keys and number types."""
        for end, part, dtype in self.ends:
            if stored == dtype and key.endswith(end):
                return f"{key.removesuffix(end)}.weight", part
        return None

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Outputs, and two inputs a byte."""
        return stored["codes"][0], stored["codes"][1] * 2

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        """Words of codes; scales by steps.

        Raises:
            ValueError: if a scale or the factor is not finite, or scales are to be divided by 0 or by a number beyond `_DIVISORS`.
        """
        if part == "codes":
            return pack_words(self.pairs(stored.reshape(spec.outputs, -1)), self.code_map)
        if part == "scales":
            check_e4m3(stored)
            return self.in_steps(spec, stored.view(torch.uint8)).view(stored.dtype)
        if not bool(stored.isfinite().all()) or (self.divides and not bool(stored.all())):
            raise ValueError("the factor of its scales is 0 or not finite")
        if self.divides and bool(((stored.abs() < 1 / _DIVISORS) | (stored.abs() > _DIVISORS)).any()):
            raise ValueError(
                f"its scales are to be divided by a number beyond {_DIVISORS:.0e} or below {1 / _DIVISORS:.0e}"
            )
        return stored

    def pairs(self, stored: Tensor) -> Tensor:
        """Bytes of two codes, as they are decoded."""
        return stored

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Codes that are equally likely, one scale, and the factor."""
        _, scales, factor = self.parts(spec)
        spread, device = float(torch.tensor(E2M1).square().mean().sqrt()), generator.device
        unit = std / spread
        return {
            "codes": self.random_codes(spec, generator),
            "scales": torch.ones(scales.shape, device=device).to(torch.float8_e4m3fn),
            "globals": torch.full(factor.shape, 1 / unit if self.divides else unit, device=device),
        }


@dataclass(frozen=True, kw_only=True)
class Nvfp4(_Nvfp4):
    """Of compressed-tensors: `weight_packed`, `weight_scale`, and `weight_global_scale`, which divides."""

    name = "nvfp4-pack-quantized"
    ignored = (".input_global_scale", ".k_scale", ".v_scale", ".q_scale")
    ends = (
        (".weight_packed", "codes", "U8"),
        (".weight_scale", "scales", "F8_E4M3"),
        (".weight_global_scale", "globals", "F32"),
    )
    scaling: str = "e4m3/"

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of groups of its name.

        Raises:
            UnsupportedModelError: if weights of a group are stored in a way that is not decoded.
        """
        groups = list(weight_groups(quantization, {self.name}))
        for weights in groups:
            require(weights, {"num_bits": (4,), "group_size": (GROUP,), "symmetric": (True,), "dynamic": (False,)})
        return (self,) if groups else ()


@dataclass(frozen=True, kw_only=True)
class ModeloptNvfp4(_Nvfp4):
    """Of modelopt: `weight`, `weight_scale`, and `weight_scale_2`, which multiplies. The code of -0 stands for +0."""

    name = "modelopt-nvfp4"
    ignored = (".input_scale", ".k_scale", ".v_scale", ".q_scale")
    ends = (
        (".weight", "codes", "U8"),
        (".weight_scale", "scales", "F8_E4M3"),
        (".weight_scale_2", "globals", "F32"),
    )

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of its algorithms.

        Raises:
            UnsupportedModelError: if weights are quantised by an algorithm that is not decoded.
        """
        return (self,) if algorithms(quantization) & {"NVFP4", "W4A16_NVFP4"} else ()

    def pairs(self, stored: Tensor) -> Tensor:
        """-0 is stored as 0."""
        low = torch.where(stored & 15 == _MINUS_ZERO, stored & 240, stored)
        return torch.where(low >> 4 == _MINUS_ZERO, low & 15, low)


NVFP4 = Nvfp4()
MODELOPT_NVFP4 = ModeloptNvfp4()
