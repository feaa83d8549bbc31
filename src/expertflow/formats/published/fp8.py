"""Weights of one byte, FP8 (E4M3) or int8, with a scale for each block, output, or tensor.

`fp8` is how DeepSeek-V3, Qwen3-FP8 and MiniMax-M2 are published: numbers are `float32(code) * float32(scale)`. The formats of
compressed-tensors multiply in the number type of the scale. Gate and up have blocks of their own. Source: transformers'
`fp8` method; compressed-tensors' `float-quantized` and `int-quantized`; modelopt's `FP8`.

A record has codes in the order in which threads of a tensor core take them, see `_steps`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from expertflow.errors import UnsupportedModelError
from expertflow.formats.dtypes import BY_STORED_NAME
from expertflow.formats.format import Format, Part, TensorSpec, check_finite
from expertflow.formats.pairs import MISSING, OCTAVES, find_pairs
from expertflow.formats.published.described import ELSEWHERE, algorithms, require, weight_groups
from expertflow.formats.published.mxfp4 import power_of_two

ALL = 0
"""In place of a block's size: all outputs, or all inputs, share a scale."""
_SCALE = re.compile(r"(?P<key>.*(?:\.weight|_proj))_scale(?:_inv)?")
_ZERO = re.compile(r"(?P<key>.*(?:\.weight|_proj))_zero_point")
_E8M0_NAN = 255
_LARGEST = 448.0
"""The largest number of an E4M3 code."""
STEP = 64
"""Inputs whose codes a record has thread by thread."""
RUN = 16
"""Inputs that a tensor core multiplies at once; rows of no multiple of them stay in plain order."""
_SPREAD = 4.0
"""Standard deviations at which drawn numbers are cut off."""


def e4m3_numbers(codes: Tensor) -> Tensor:
    """The numbers of E4M3 codes, uint8, in float32: bits are shifted to where float32 has them."""
    bits = codes.view(torch.int8).to(torch.int32)
    bits <<= 20
    bits &= 0x87F0_0000 - (1 << 32)  # the sign, four bits of exponent, three of mantissa
    values = bits.view(torch.float32)
    values *= 2.0**120  # the exponents' biases, 127 and 7
    return values


def check_e4m3(codes: Tensor) -> None:
    """Refuse E4M3 codes that are no numbers: 127 and 255. Reads bytes.

    Raises:
        ValueError: if there is one.
    """
    read = codes.contiguous().view(torch.uint8).numpy()
    if read.size and (read.max() == 0xFF or read.view(np.int8).max() == 0x7F):
        raise ValueError("a code is not a number (E4M3 127 or 255)")


def _steps(inputs: int) -> list[tuple[int, int, int]]:
    """Steps of 64 inputs that are alike: the first input, how many, and runs of 16 inputs in each. The last step may be shorter.

    A tensor core takes from thread q of four, of 16 inputs, number 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. So a word holds these four codes,
    and the words of a step lie thread by thread: a thread reads its four words at once, and decodes in its registers.
    """
    whole, rest = divmod(inputs, STEP)
    steps = [(0, whole, STEP // RUN), (inputs - rest, 1, rest // RUN)]
    return [(begin, count, wide) for begin, count, wide in steps if count and wide]


def _by_step(codes: Tensor) -> list[Tensor]:
    """Pairs of codes of a tensor `[N, K / 2]` as a record has them: of each step, those of all outputs; `[steps, N, pairs of a step]`.

    What a program reads for a step is one run of memory, so that requests are whole lines and few pages are open.
    """
    outputs, flat, views = codes.shape[0], codes.view(-1), []
    for begin, steps, wide in _steps(2 * codes.shape[1]):
        first, pairs = begin // 2 * outputs, wide * (RUN // 2)
        views.append(flat[first : first + steps * outputs * pairs].view(steps, outputs, pairs))
    return views


def _moved(codes: Tensor, *, back: bool) -> Tensor:
    """Codes `[N, K]` put into a record's order, or `back`: as a copy, on the device of the codes; themselves if rows stay as they are."""
    outputs, inputs = codes.shape
    if inputs % RUN:
        return codes
    if codes.storage_offset() % 2:
        codes = codes.clone()
    pairs = codes.contiguous().view(torch.int16)  # two codes that always lie together
    moved = torch.empty_like(pairs)
    record = pairs if back else moved
    for (begin, count, wide), view in zip(_steps(inputs), _by_step(record), strict=True):
        plain = (moved if back else pairs)[:, begin // 2 : begin // 2 + count * wide * (RUN // 2)]
        plain = plain.view(outputs, count, wide, 2, 4).permute(1, 0, 4, 2, 3)
        threads = view.view(count, outputs, 4, wide, 2)
        source, target = (threads, plain) if back else (plain, threads)
        if codes.device.type == "cpu":  # three times as fast as torch
            np.copyto(target.numpy(), source.numpy())
        else:
            target.copy_(source)
    return moved.view(codes.dtype)


def _some_outputs(codes: Tensor, rows: slice) -> Tensor:
    """Codes of some outputs, as those of a tensor of its own."""
    if codes.shape[1] % RUN:
        return codes[rows]
    views = _by_step(codes.view(torch.int16))
    return torch.cat([view[:, rows].reshape(-1) for view in views]).view(codes.dtype).view(-1, codes.shape[1])


@dataclass(frozen=True, kw_only=True)
class Bytes(Format):
    """A format of one byte a weight. Its parts: `codes` `[N, K]`, by steps; `scales`, a grid for each joined tensor, and their `pairs`.

    Attributes:
        block: outputs and inputs that share a scale; `ALL`: as many as the tensor has.
        scale_dtype: number type of the scales in a record, a key of `DTYPES`.
        scales_also: further number types that a checkpoint may hold them in, as safetensors names them.
        rounds: whether a number is rounded to the scale's number type first.
        quick: as of `Format.in_range`.
    """

    repacked = frozenset({"codes", "scales", "pairs"})
    decode_bytes_each = 14
    ignored = (
        ".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".activation_scale", ".input_zero_point",
        ".k_zero_point", ".v_zero_point",
    )  # fmt: skip
    tiles = "bytes"
    code_dtype = "uint8"
    stored_codes = ("F8_E4M3",)
    block: tuple[int, int] = (128, 128)
    scale_dtype: str = "float32"
    scales_also: tuple[str, ...] = ()
    rounds: bool = False
    quick: bool = False

    def grid(self, spec: TensorSpec) -> tuple[int, int]:
        """Rows and columns of the scales of one of the joined tensors."""
        (rows, cols), one = self.block, (spec.outputs // spec.joined, spec.inputs)
        return (1 if rows == ALL else -(-one[0] // rows), 1 if cols == ALL else -(-one[1] // cols))

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes as they are stored, and scales; where a tensor has a single one, its shape in a checkpoint is `[1]` or `[]`.

        And scales as `formats.pairs` has them.
        """
        rows, cols = self.grid(spec)
        whole = (spec.outputs, spec.inputs)
        scales = (spec.joined * rows, cols)
        stored = scales[:1] if self.block == (ALL, ALL) else scales
        return (
            Part(name="codes", shape=whole, dtype=self.code_dtype, stored=whole, also=self.stored_codes),
            Part(name="scales", shape=scales, dtype=self.scale_dtype, stored=stored, also=self.scales_also),
            Part(name="pairs", shape=scales, dtype="int32", stored=stored, source="scales"),
        )

    def in_range(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> bool:
        """Whether each scale has a pair."""
        del spec
        return not bool((parts["pairs"] == MISSING).any())

    def pairs_of(self, scales: Tensor) -> Tensor:
        """Pairs of scales, int32 in their shape; where another rounding lies between, or for integers, there are none."""
        if self.code_dtype == "int8" or (self.rounds and scales.dtype == torch.float16):
            return torch.full(scales.shape, MISSING, dtype=torch.int32)
        flat = scales.flatten().float()
        wanted = (torch.from_numpy(OCTAVES).float()[:, None] * flat).to(torch.bfloat16)
        return find_pairs(flat.double().numpy(), list(OCTAVES), wanted).view(scales.shape)

    def constants(self, spec: TensorSpec) -> tuple[Any, ...]:
        """For the tile loader: outputs of one tensor, outputs and inputs of a block, rows and columns of its scales.

        Behind them: whether codes are int8, the scales' number type, and whether numbers are rounded to it; joined tensors,
        whether their outputs alternate; the largest power of two that divides a block's inputs; and whether all scales have pairs.
        """
        one, (rows, cols) = spec.outputs // spec.joined, self.block
        return (
            one, rows or one, cols or spec.inputs, *self.grid(spec), self.code_dtype == "int8", self.scale_dtype,
            self.rounds, spec.joined, spec.interleaved, cols & -cols, self.quick,
        )  # fmt: skip

    def check_codes(self, codes: Tensor) -> None:
        """Refuse codes that are no numbers.

        Raises:
            ValueError: if there is one.
        """
        check_e4m3(codes)

    def code_numbers(self, codes: Tensor) -> Tensor:
        """The numbers of codes, in float32."""
        return e4m3_numbers(codes)

    def rows_alike(self, spec: TensorSpec) -> int:
        """Those of a block."""
        del spec
        return self.block[0] or 1

    def strip(self, spec: TensorSpec, parts: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """A copy of the outputs' codes, and scales of their blocks, or those of all."""
        size, scales = self.block[0], parts["scales"].view(self.grid(spec))
        blocks = slice(rows.start // size, -(-rows.stop // size)) if size else slice(None)
        return {"codes": _some_outputs(parts["codes"], rows), "scales": scales[blocks]}

    def numbers(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes times scales."""
        values = self.code_numbers(_moved(parts["codes"], back=True))
        rows, cols = self.grid(spec)
        scales = parts["scales"].view(rows, cols).to(torch.float32)
        if cols > 1:
            scales = scales.repeat_interleave(self.block[1], 1)[:, : spec.inputs]
        if rows in {1, spec.outputs}:
            values *= scales
        else:
            for place, strip in enumerate(values.split(self.block[0])):
                strip.mul_(scales[place])
        if self.rounds:
            values = values.to(getattr(torch, self.scale_dtype))
        return values.to(getattr(torch, spec.dtype))

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The keys `<name>` of codes, `<name>_scale` or `<name>_scale_inv`, and `<name>_zero_point`, which is not decoded."""
        if found := _SCALE.fullmatch(key):
            known = BY_STORED_NAME.get(stored) == self.scale_dtype or stored in self.scales_also
            return (found["key"], "scales") if known else None
        if found := _ZERO.fullmatch(key):
            return found["key"], "zeros"
        return (key, "codes") if stored in self.stored_codes else None

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """That of the codes."""
        return stored["codes"][0], stored["codes"][1]

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        """Codes in a record's order and scales as they are, after a check; and scales' pairs.

        Raises:
            ValueError: if one is not a number, or a scale is not finite.
        """
        del spec
        if part == "codes":
            self.check_codes(stored)
            return _moved(stored.view(getattr(torch, self.code_dtype)), back=False)
        scales = _checked_scales(stored)
        return self.pairs_of(scales) if part == "pairs" else scales

    def draw_codes(self, values: Tensor) -> tuple[Tensor, float]:
        """Codes of numbers of standard deviation 1, none beyond `_SPREAD`; and what to divide their numbers by."""
        most = _LARGEST / _SPREAD
        return (values * most).to(torch.float8_e4m3fn).view(torch.uint8), most

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Normally distributed numbers, and one scale."""
        codes, scales, _ = self.parts(spec)
        device = generator.device
        values = torch.randn(codes.shape, device=device, generator=generator).clamp_(-_SPREAD, _SPREAD)
        drawn, unit = self.draw_codes(values)
        one = torch.full(scales.shape, std / unit, dtype=getattr(torch, self.scale_dtype))
        return {"codes": drawn, "scales": one.to(device), "pairs": self.pairs_of(one).to(device)}


def _checked_scales(stored: Tensor) -> Tensor:
    """Scales as they are stored; powers of two in float32.

    Raises:
        ValueError: if one is not finite.
    """
    if stored.dtype == torch.float8_e8m0fnu:
        bits = stored.view(torch.uint8)
        if bool((bits == _E8M0_NAN).any()):
            raise ValueError("a scale is not a number (E8M0 255)")
        return power_of_two(bits)
    if not bool(stored.isfinite().all()):
        raise ValueError("a scale is not finite")
    return stored


@dataclass(frozen=True, kw_only=True)
class Fp8(Bytes):
    """E4M3 codes and scales for blocks, `weight_scale_inv`, or for whole tensors, also `weight_scale`; multiplied in float32."""

    name = "fp8"
    scales_also: tuple[str, ...] = ("BF16", "F8_E8M0")

    def encode(self, spec: TensorSpec, numbers: Tensor) -> dict[str, Tensor]:
        """The scale of a block is its largest number divided by 448, the largest code; the last blocks may be short."""
        outputs, inputs = numbers.shape
        rows, cols = (size or whole for size, whole in zip(self.block, numbers.shape, strict=True))
        codes = torch.empty(outputs, inputs, dtype=torch.float8_e4m3fn)
        scales = torch.empty(self.grid(spec), dtype=torch.float32)
        for place, strip in enumerate(numbers.split(rows)):
            padded = functional.pad(strip.to(torch.float32), (0, -inputs % cols)).view(len(strip), -1, cols)
            largest = padded.abs().amax(-1).amax(0)
            check_finite(largest)
            scales[place] = largest / _LARGEST
            values = padded / torch.where(scales[place] == 0, 1.0, scales[place])[:, None]
            codes[place * rows : place * rows + len(strip)] = values.clamp_(-_LARGEST, _LARGEST).flatten(1)[:, :inputs]
        return {"codes": _moved(codes, back=False).view(torch.uint8), "scales": scales, "pairs": self.pairs_of(scales)}

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of the method `fp8`, with `weight_block_size` or a scale a tensor; of modelopt's, with the algorithm `FP8`.

        Raises:
            UnsupportedModelError: if codes are no E4M3, or the size of blocks is none.
        """
        if "FP8" in algorithms(quantization):
            return (replace(self, block=(ALL, ALL)),)
        if quantization.get("quant_method") != "fp8":
            return ()
        if (code := quantization.get("fmt", "e4m3")) not in {"e4m3", "float8_e4m3fn"}:
            raise UnsupportedModelError(f"codes of the kind {code!r} in quantization_config are not decoded", ELSEWHERE)
        block = quantization.get("weight_block_size")
        return (replace(self, block=(ALL, ALL) if block is None else block_size(block, "weight_block_size")),)


@dataclass(frozen=True, kw_only=True)
class FloatQuantized(Bytes):
    """E4M3 codes of compressed-tensors: a scale an output, a block or a tensor; multiplied in the scale's number type."""

    name = "float-quantized"
    kind = "float"
    scale_dtype: str = "bfloat16"
    scales_also: tuple[str, ...] = ("F32", "F16")
    rounds: bool = True

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """Of groups of its name, or of the older one `naive-quantized`.

        Raises:
            UnsupportedModelError: if weights of a group are stored in a way that is not decoded, or groups differ.
        """
        groups = list(weight_groups(quantization, {"float-quantized", "int-quantized", "naive-quantized"}))
        found = {(weights.get("type", "int"), self._block(weights)) for weights in groups}
        if len(found) > 1:
            raise UnsupportedModelError(
                "groups of weights of one byte in quantization_config differ in their type or in what shares a scale: "
                + ", ".join(f"{kind} {block}" for kind, block in sorted(found)),
                ELSEWHERE,
            )
        return tuple(replace(self, block=block) for kind, block in found if kind == self.kind)

    def of_types(self, stored: Mapping[str, str]) -> Format:
        """Scales are kept in the number type that they are stored in."""
        found = BY_STORED_NAME.get(stored.get("scales", ""), self.scale_dtype)
        return replace(self, scale_dtype=found, scales_also=())

    @staticmethod
    def _block(weights: Mapping[str, Any]) -> tuple[int, int]:
        require(weights, {"num_bits": (8,), "symmetric": (True,), "dynamic": (False,)})
        strategy = weights.get("strategy")
        if strategy == "block":
            return block_size(weights.get("block_structure"), "block_structure")
        require({"strategy": strategy}, {"strategy": ("channel", "tensor")})
        return (1, ALL) if strategy == "channel" else (ALL, ALL)


@dataclass(frozen=True, kw_only=True)
class IntQuantized(FloatQuantized):
    """int8 codes of compressed-tensors, symmetric."""

    name = "int-quantized"
    kind = "int"
    code_dtype = "int8"
    stored_codes = ("I8",)

    def check_codes(self, codes: Tensor) -> None:
        """All are numbers."""

    def code_numbers(self, codes: Tensor) -> Tensor:
        """Integers."""
        return codes.to(torch.float32)

    def draw_codes(self, values: Tensor) -> tuple[Tensor, float]:
        """Rounded to integers."""
        most = 127.0 / _SPREAD
        return (values * most).round().to(torch.int8), most


def block_size(stated: Any, key: str) -> tuple[int, int]:
    """Outputs and inputs of a block.

    Raises:
        UnsupportedModelError: if it is no pair of sizes.
    """
    sizes = tuple(stated) if isinstance(stated, list | tuple) else ()
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UnsupportedModelError(f"{key} {stated!r} in quantization_config is no pair of sizes", ELSEWHERE)
    return sizes[0], sizes[1]


FP8 = Fp8()
FLOAT_QUANTIZED = FloatQuantized()
INT_QUANTIZED = IntQuantized()
