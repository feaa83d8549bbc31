"""MXFP4, as gpt-oss is published: codes of FP4 (E2M1), a power of two for each 32 inputs. Every number is exact in bfloat16.

Source: OCP Microscaling Formats (MX) 1.0; checkpoints as transformers' `mxfp4` method has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec, check_finite
from expertflow.formats.words import E2M1, Words, by_steps, pack_words

GROUP = 32
_NAN = 255
_BIAS = 127
_MOST = _BIAS + 1
"""The largest scale, 2, that leaves a product with 2 ** 126 below infinity."""
_MANTISSA = 23
"""Bits of a float32 below its exponent."""
_LARGEST_EXPONENT = 2
"""Of a code's number: 4 and 6 are between 2 ** 2 and 2 ** 3."""


def power_of_two(scales: Tensor) -> Tensor:
    """`2 ** (scale - 127)` of E8M0 scales, uint8, in float32; exact, the smallest one being subnormal."""
    bits = scales.to(torch.int32) << 23
    return torch.where(scales == 0, 1 << 22, bits).view(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Words):
    """Experts stacked over a layer: `<name>_blocks` uint8 `[E, N, K / 32, 16]`, adjacent codes a byte, and `<name>_scales`."""

    name = "mxfp4"
    repacked = frozenset({"codes", "scales"})
    codes_also: tuple[str, ...] = ("U8",)
    scales_also: tuple[str, ...] = ("F8_E8M0",)

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales."""
        groups = spec.inputs // GROUP
        return self.word_parts(spec, (spec.outputs, groups, GROUP // 2), (spec.outputs, groups))

    def in_range(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> bool:
        """Whether scales, times the 2 ** 126 that codes lack in a kernel, are numbers of bfloat16."""
        del spec
        return int(parts["scales"].numpy().max()) <= _MOST  # far faster than torch's

    def numbers(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times powers of two."""
        values = torch.tensor(E2M1, device=parts["codes"].device)[self.codes_of(spec, parts).int()]
        values *= power_of_two(self.by_input(spec, parts["scales"]))
        return values.to(getattr(torch, spec.dtype))

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of the method `mxfp4`."""
        return (self,) if quantization.get("quant_method") == "mxfp4" else ()

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The keys `<name>_blocks` and `<name>_scales`."""
        if stored not in {"U8", "F8_E8M0"}:
            return None
        for suffix, part in (("_blocks", "codes"), ("_scales", "scales")):
            if key.endswith(suffix):
                return key.removesuffix(suffix), part
        return None

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Outputs, and 32 inputs for each group."""
        return stored["codes"][0], stored["codes"][1] * GROUP

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        """Words of codes; scales by steps.

        Raises:
            ValueError: if a scale is not a number.
        """
        if part == "codes":
            return pack_words(stored.reshape(spec.outputs, -1), self.code_map)
        scales = stored.view(torch.uint8)
        if bool((scales == _NAN).any()):
            raise ValueError("a scale is not a number (E8M0 255)")
        return by_steps(scales, GROUP)

    def quantise(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """By the rule of the specification: the scale is the power of two of a group's largest number, less two.

        Codes are rounded to the nearest, half to even, and at most 6 times the scale: a number of 7 times it becomes 6.
        """
        largest = groups.abs().amax(-1)
        check_finite(largest)
        scales = ((largest.view(torch.int32) >> _MANTISSA) - _LARGEST_EXPONENT).clamp_min_(0)
        inverse = ((2 * _BIAS - scales) << _MANTISSA).view(torch.float32)
        values = groups * inverse[..., None]
        signs = values.view(torch.int32) >> 28 & 8
        sizes = values.abs_().clamp_max_(E2M1[7])
        # 0 below 2, then 1, then 2: what the exponent adds to a number of half units
        octaves = (sizes.view(torch.int32) >> _MANTISSA).clamp_min_(_BIAS).sub_(_BIAS)
        halves = ((_BIAS + 1 - octaves) << _MANTISSA).view(torch.float32)
        codes = sizes.mul_(halves).round_().to(torch.int32)
        return codes.add_(octaves, alpha=2).bitwise_or_(signs).to(torch.uint8), scales.to(torch.uint8)

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Codes that are equally likely, and one scale."""
        _, scales = self.parts(spec)
        spread = torch.tensor(E2M1).square().mean().sqrt()
        exponent = round(float(torch.log2(std / spread)))
        device = generator.device
        return {
            "codes": self.random_codes(spec, generator),
            "scales": torch.full(scales.shape, _BIAS + exponent, dtype=torch.uint8, device=device),
        }


MXFP4 = Mxfp4()
