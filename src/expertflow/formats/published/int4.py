"""Codes of four bits that are integers, each with a scale for a group of inputs; and compressed-tensors' way to store them.

A number is `(code - zero) * scale`, computed and rounded in the scale's own number type, as every library of these formats does.
Therefore records keep scales as they are stored. Must not know other publishers' layouts: `gptq` and `awq` have theirs.

Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self

import torch
from torch import Tensor

from expertflow.errors import UnsupportedModelError
from expertflow.formats.dtypes import BY_STORED_NAME, RUN_DTYPES
from expertflow.formats.format import Format, Part, TensorSpec, check_finite
from expertflow.formats.words import PER_WORD, ROW, STEP, Words, as_bytes, nibbles, pack_words

MIDDLE = 8
"""The code of zero where all groups have the same."""
_MOST = 0x3F00
"""The bits of 1/2 in bfloat16: scales below it leave a product with 2 ** 129 below infinity."""
_LEVELS = 7.5
"""Half the distance between the largest and the smallest code."""
_SPREAD = 4.6
"""Standard deviation of codes that are equally likely."""
_SMALL_GROUPS = (32, 64)
_REMEDY = "Fetch the model with 4-bit weights in groups of 32, 64 or 128 inputs, or in bfloat16."


def refuse(what: str) -> NoReturn:
    """Refuse a variant that is not decoded.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(what, _REMEDY)


def group_size(stated: Any, method: str) -> int:
    """The group that a config states: inputs that share a scale; -1 stands for all of them.

    Raises:
        UnsupportedModelError: if there is no kernel for it.
    """
    if stated == -1:
        return ROW
    if not isinstance(stated, int) or stated <= 0 or (stated not in _SMALL_GROUPS and stated % STEP):
        refuse(f"the checkpoint is quantised by {method} in groups of {stated!r} inputs")
    return stated


@dataclass(frozen=True, kw_only=True)
class Int4(Words):
    """What int4 formats have in common. A subclass says where a checkpoint has codes, scales and zeros."""

    repacked = frozenset({"codes", "scales", "zeros", "g_idx"})
    code_map: str = "int4"
    group: int = STEP
    scale_dtype: str = "bfloat16"
    scaling: str = "number"

    def of_types(self, stored: Mapping[str, str]) -> Self:
        """With scales of the type they are stored in: the numbers are rounded to it."""
        dtype = BY_STORED_NAME.get(stored.get("scales", ""))
        return replace(self, scale_dtype=dtype) if dtype in RUN_DTYPES else self

    def in_range(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> bool:
        """Whether scales, times the 2 ** 129 that codes lack in a kernel, are numbers of bfloat16."""
        del spec
        if self.scale_dtype != "bfloat16" or self.zeros:
            return False
        sizes = parts["scales"].view(torch.int16).numpy() & 0x7FFF
        return int(sizes.max()) < _MOST

    def numbers(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """`(code - zero) * scale` in the scale's number type, then in `spec.dtype`."""
        dtype = getattr(torch, self.scale_dtype)
        values = self.codes_of(spec, parts).to(dtype)
        values -= self.by_input(spec, parts["zeros"]).to(dtype) if self.zeros else MIDDLE
        values *= self.by_input(spec, parts["scales"])
        return values.to(getattr(torch, spec.dtype))

    def order_part(self, spec: TensorSpec, *, optional: bool) -> Part:
        """The part `g_idx`, the group of each input, which is only checked."""
        return Part(
            name="g_idx",
            shape=(spec.joined, 0),
            dtype="int32",
            stored=(spec.inputs,),
            joined=None,
            optional=optional,
        )

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        """Words of codes; scales and zeros by steps; nothing of `g_idx`.

        Raises:
            ValueError: if a scale is not finite, a zero is none, or inputs are not in order.
        """
        if part == "codes":
            return pack_words(self.pairs(stored), self.code_map)
        if part == "g_idx":
            in_order = torch.arange(spec.inputs, dtype=stored.dtype) // self.group
            if not torch.equal(stored, in_order):
                raise ValueError(
                    "its inputs are in order of activation, in groups that are not of neighbours (act-order)"
                )
            return stored[:0]
        if part == "scales":
            if not bool(torch.isfinite(stored).all()):
                raise ValueError("a scale is not finite")
            return self.in_steps(spec, self.by_output(stored))
        if stored.dtype != torch.int32:
            raise ValueError("zeros are not packed in 32-bit words")
        zeros = self.zero_codes(spec, stored)
        return self.in_steps(spec, zeros) if self.zeros else zeros[:0]

    def pairs(self, stored: Tensor) -> Tensor:
        """Codes uint8 `[N, K / 2]` of words as a checkpoint holds them, the earlier input in the lower half."""
        raise NotImplementedError

    def by_output(self, stored: Tensor) -> Tensor:
        """Scales `[N, groups]`, of what a checkpoint holds."""
        raise NotImplementedError

    def zero_codes(self, spec: TensorSpec, stored: Tensor) -> Tensor:
        """The codes that stand for zero: uint8 `[N, groups]`, of words as a checkpoint holds them.

        Raises:
            ValueError: if they cannot be explained.
        """
        raise NotImplementedError

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Codes that are equally likely, one scale, and the middle code for zero."""
        device, parts = generator.device, {part.name: part for part in self.parts(spec)}
        drawn = {
            name: torch.full(part.shape, MIDDLE, dtype=getattr(torch, part.dtype), device=device)
            for name, part in parts.items()
        }
        drawn["codes"].random_(-(1 << 31), 1 << 31, generator=generator)
        drawn["scales"].fill_(std / _SPREAD)
        return drawn


@dataclass(frozen=True, kw_only=True)
class PackedInt4(Int4):
    """compressed-tensors' `pack-quantized`: `weight_packed` int32 `[N, K / 8]` and `weight_scale` `[N, groups]`.

    Element `8 j + i` of a row is in bits `4 i` and up of its word j. Where groups have zeros, those are in `weight_zero_point`
    int32 `[N / 8, groups]`, packed along outputs.

    Attributes:
        ordered: whether the config says that inputs are in order of activation; `weight_g_idx` tells whether they are.
    """

    name = "int4"
    ignored = (".weight_shape",)
    ordered: bool = False

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of the method `compressed-tensors`, if every group of the config is stored `pack-quantized`, all alike."""
        if quantization.get("quant_method") != "compressed-tensors":
            return ()
        groups, top = quantization.get("config_groups"), str(quantization.get("format"))
        schemes = list(groups.values()) if isinstance(groups, Mapping) else []
        if top == _PACKED and not (schemes and all(isinstance(scheme, Mapping) for scheme in schemes)):
            refuse(f"the `config_groups` of the quantisation config name no weights: {groups!r}")
        described = [scheme for scheme in schemes if isinstance(scheme, Mapping)]
        formats = [str(scheme.get("format") or top) for scheme in described]
        if _PACKED not in formats:
            return ()
        if other := next((name for name in formats if name != _PACKED), None):
            refuse(f"the checkpoint mixes weights stored as {_PACKED!r} and as {other!r}, which is not decoded")
        _check_plain_weights(quantization)
        found = {self._scheme(scheme["weights"]) for scheme in described if scheme.get("weights")}
        if not found:
            refuse(f"the `config_groups` of the quantisation config name no weights: {groups!r}")
        if len(found) > 1:
            refuse(f"the groups of the quantisation config differ in how weights are packed ({len(found)} ways)")
        return (found.pop(),)

    def _scheme(self, weights: Mapping[str, Any]) -> "PackedInt4":
        """The format that a group of the config describes."""
        bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
        if bits != 4 or kind != "int":
            refuse(f"the checkpoint has weights of {bits} bits of the type {kind!r}, {_PACKED!r} of compressed-tensors")
        size = weights.get("group_size")
        if strategy not in {"group", "channel", None}:
            refuse(f"the checkpoint has weights quantised by {strategy!r}, {_PACKED!r} of compressed-tensors")
        return replace(
            self,
            group=group_size(-1 if strategy == "channel" and size is None else size, "compressed-tensors"),
            zeros=weights.get("symmetric", True) is False,
            ordered=weights.get("actorder") in {"group", "dynamic", True},
        )

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The keys `<name>.weight_packed` and those beside it."""
        del stored  # the names say enough
        stem, _, end = key.rpartition(".")
        return (f"{stem}.weight", _ENDINGS[end]) if stem and end in _ENDINGS else None

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes, scales, zeros if there are any, and the order of inputs, which only some checkpoints state."""
        groups, words = self.groups_of(spec), -(-spec.outputs // spec.joined // PER_WORD) * spec.joined
        zeros = (self.zero_part(spec, (words, groups), 0),) if self.zeros else ()
        return (
            *self.word_parts(spec, (spec.outputs, spec.inputs // PER_WORD), (spec.outputs, groups)),
            *zeros,
            self.order_part(spec, optional=not self.ordered),
        )

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Of the words of codes."""
        return stored["codes"][0], stored["codes"][1] * PER_WORD

    def quantise(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """As compressed-tensors does without zeros: the scale is the largest number of a group, divided by 7.5, in its number type.

        Raises:
            NotImplementedError: for zeros.
            ValueError: if a number is not finite.
        """
        if self.zeros:
            raise NotImplementedError
        largest = groups.abs().amax(-1)
        check_finite(largest)
        scales = (largest / _LEVELS).to(getattr(torch, self.scale_dtype))
        exact = scales.to(torch.float32)
        divided = groups / torch.where(exact == 0, 1.0, exact)[..., None]
        return divided.round_().clamp_(-MIDDLE, MIDDLE - 1).add_(MIDDLE).to(torch.int8).view(torch.uint8), scales

    def pairs(self, stored: Tensor) -> Tensor:
        """The bytes of the words."""
        return as_bytes(stored)

    def by_output(self, stored: Tensor) -> Tensor:
        """As they are stored."""
        return stored

    def zero_codes(self, spec: TensorSpec, stored: Tensor) -> Tensor:
        """Eight outputs a word; the last word may have fewer."""
        return nibbles(stored.t())[:, : spec.outputs].t()


_PACKED = "pack-quantized"
_ENDINGS = {
    "weight_packed": "codes",
    "weight_scale": "scales",
    "weight_zero_point": "zeros",
    "weight_g_idx": "g_idx",
}


def _check_plain_weights(quantization: Mapping[str, Any]) -> None:
    """Refuse what changes packed weights once more: sparsity, and rotations."""
    sparsity, transform = quantization.get("sparsity_config"), quantization.get("transform_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        refuse(f"the checkpoint has packed weights that are also sparse ({sparsity['format']!r})")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        refuse("the checkpoint has weights that were rotated (`transform_config`)")


INT4 = PackedInt4()
