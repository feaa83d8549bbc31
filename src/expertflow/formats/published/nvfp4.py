"""NVFP4: codes of FP4 (E2M1), an E4M3 scale for each 16 inputs, and a float32 factor for each tensor.

compressed-tensors divides a scale by the factor, modelopt multiplies; both in float32. Gate and up have factors of their own.
Source: compressed-tensors' `nvfp4-pack-quantized`; modelopt's `NVFP4QTensor`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.pairs import MISSING, OCTAVES, find_pairs
from expertflow.formats.published.described import algorithms, require, weight_groups
from expertflow.formats.published.fp8 import check_e4m3, e4m3_numbers
from expertflow.formats.words import E2M1, Words, pack_words

GROUP = 16
_MINUS_ZERO = 8
_PAIR_SHIFT = 8
"""The exponent that pairs have more: kernels have codes' numbers times 2 ** -126, and scales times 2 ** 118."""
_NORMAL = (0x08, 0x7E)
"""The least and the largest code of an E4M3 number above 0 that is not subnormal."""
_DIVISORS = 2.0**64
"""Largest number that divides scales, and its reciprocal the least: kernels divide by a way that is exact there."""


@dataclass(frozen=True, kw_only=True)
class _Nvfp4(Words):
    """What both kinds have in common. Parts: `codes`, `scales`; `globals`, one for each joined tensor, and their `pairs`.

    Attributes:
        ends: how keys end that hold a part, the parts' names, and the number type they are stored in.
    """

    repacked = frozenset({"codes", "scales", "globals", "pairs"})
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
        """Codes, scales and the factor; its shape in a checkpoint is `[1]` or `[]`; and the factor as `formats.pairs` has it."""
        codes, scales = self.word_parts(spec, (spec.outputs, spec.inputs // 2), (spec.outputs, self.groups_of(spec)))
        one = (spec.joined,)
        factor = Part(name="globals", shape=one, dtype="float32", stored=one)
        return codes, scales, factor, Part(name="pairs", shape=one, dtype="int32", stored=one, source=factor.name)

    def in_range(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> bool:
        """Whether each factor has a pair, and all scales are normal and above 0; behind the last input they may be anything."""
        if bool((parts["pairs"] == MISSING).any()):
            return False
        scales = parts["scales"].view(torch.uint8).numpy().reshape(spec.joined, -1, *parts["scales"].shape[1:])
        last = scales[:, -1, :, : -(-spec.inputs // GROUP) - (scales.shape[1] - 1) * scales.shape[3]]
        return all(
            _NORMAL[0] <= part.min() and part.max() <= _NORMAL[1] for part in (scales[:, :-1], last) if part.size
        )

    def _pairs(self, factors: Tensor) -> Tensor:
        """The pairs of factors float32 `[n]`."""
        scales = torch.from_numpy(OCTAVES).float()[:, None]
        scaled = scales / factors if self.divides else scales * factors
        wanted = torch.cat([scaled, 1.5 * scaled]).to(torch.bfloat16)
        exact = factors.double().numpy()
        return find_pairs(
            np.reciprocal(exact) if self.divides else exact, [*OCTAVES, *(1.5 * OCTAVES)], wanted, _PAIR_SHIFT
        )

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
        """Words of codes; scales by steps; the factor, and its pair.

        Raises:
            ValueError: if a scale or the factor is not finite, or scales are to be divided by 0 or by a number beyond `_DIVISORS`.
        """
        if part == "codes":
            return pack_words(self.pairs(stored.reshape(spec.outputs, -1)), self.code_map)
        if part == "scales":
            check_e4m3(stored)
            return self.in_steps(spec, stored.view(torch.uint8)).view(stored.dtype)
        if part == "pairs":  # behind the factor, which was checked
            return self._pairs(stored.reshape(-1))
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
        _, scales, factor, _ = self.parts(spec)
        spread, device = float(torch.tensor(E2M1).square().mean().sqrt()), generator.device
        unit = std / spread
        drawn = torch.full(factor.shape, 1 / unit if self.divides else unit)
        return {
            "codes": self.random_codes(spec, generator),
            "scales": torch.ones(scales.shape, device=device).to(torch.float8_e4m3fn),
            "globals": drawn.to(device),
            "pairs": self._pairs(drawn).to(device),
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
