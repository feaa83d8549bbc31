"""The block formats of GGUF files: the numbers of a row in blocks of 32 or 256, each with its own scales.

A record holds the blocks as the file does. Numbers are those of the package `gguf` (`gguf.quants.dequantize`) in float32,
rounded once to the run's dtype. MXFP4 is the exception: a record holds it as `formats.published.mxfp4` does, so that kernels read both
alike. Source: ggml's `ggml-common.h` and `gguf/quants.py` (0.19.0). Must not know files, and names of tensors in them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.published.mxfp4 import GROUP, Mxfp4
from expertflow.formats.words import pack_words

METHOD = "gguf"
"""What the configs that are made for GGUF files state as `quant_method`."""
BLOCKS = "blocks"
_MXFP4_BYTES = 17


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of blocks `[B, bytes]`, in float32: `[B, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """Codes of bytes, 4 bits each: of every `width` bytes first the low halves, then the high ones; `[B, 2 * bytes]`."""
    each = codes.view(len(codes), -1, 1, width)
    return torch.cat([each & 15, each >> 4], dim=2).flatten(1)


def _bits(codes: Tensor, width: int, each: int) -> Tensor:
    """Codes of `each` bits: of every `width` bytes first the lowest bits of all, then the next ones; `[B, codes]`."""
    shifts = torch.arange(0, 8, each, dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    return ((codes.view(len(codes), -1, 1, width) >> shifts) & ((1 << each) - 1)).flatten(1)


def _fifth_bit(blocks: Tensor, at: int) -> Tensor:
    """Bit 4 of 32 codes: one bit each of the four bytes from `at` on, `[B, 32]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, at : at + 4, None] >> shifts) & 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:], 16) | _fifth_bit(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:], 16) | _fifth_bit(blocks, 4)).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of eight groups of 32, float32 `[B, 8, 1]` each: two float16, then 6 bits for each."""
    low, high, rest = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = torch.cat([low & 63, (rest & 15) | ((low >> 2) & 48)], dim=1)
    minima = torch.cat([high & 63, (rest >> 4) | ((high >> 2) & 48)], dim=1)
    return (_half(blocks, 0) * scales.float())[..., None], (_half(blocks, 2) * minima.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    return (scales * _nibbles(blocks[:, 16:], 32).view(-1, 8, 32).float() - minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32, 1) << 4
    return (scales * codes.view(-1, 8, 32).float() - minima).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    codes = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, 2) << 4
    return (scales[..., None] * (codes.view(-1, 16, 16).float() - 32)).flatten(1)


def _as(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: blocks.contiguous().view(dtype).float()


@dataclass(frozen=True, kw_only=True)
class GgufBlocks(Format):
    """Rows of blocks, uint8 `[N, K / per * size]`: one part, which is as in the file.

    Attributes:
        name: `gguf-` and the type in lower case.
        type: as GGUF names it.
        per: numbers of a block.
        size: bytes of a block.
        scales: byte offsets of the block's float16 scales.
        values: numbers `[B, per]` in float32 of blocks `[B, size]`.
    """

    name: str
    type: str
    per: int
    size: int
    scales: tuple[int, ...]
    values: Callable[[Tensor], Tensor]
    repacked = frozenset({BLOCKS})
    tiles = "gguf"
    decode_bytes_each = 24  # blocks, codes, their parts, and copies in float32

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """The blocks."""
        shape = (spec.outputs, spec.inputs // self.per * self.size)
        return (Part(name=BLOCKS, shape=shape, dtype="uint8", stored=shape),)

    def numbers(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """In float32, then rounded."""
        values = self.values(parts[BLOCKS].reshape(-1, self.size))
        return values.view(spec.outputs, spec.inputs).to(getattr(torch, spec.dtype))

    def constants(self, spec: TensorSpec) -> tuple[Any, ...]:
        """Type, numbers and bytes of a block, joined tensors, whether they alternate."""
        return self.type, self.per, self.size, spec.joined, spec.interleaved

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """All formats of GGUF: a file may mix them."""
        return tuple(GGUF.values()) if quantization.get("quant_method") == METHOD else ()

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """Keys of GGUF tensors end with their type."""
        return _split(key, stored, self.type, BLOCKS)

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Outputs, and the numbers of a row's blocks."""
        outputs, nbytes = stored[BLOCKS]
        return outputs, nbytes // self.size * self.per

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        """The blocks, checked.

        Raises:
            ValueError: if a scale is not finite.
        """
        del spec, part
        blocks = stored.reshape(-1, self.size)
        for at in self.scales:
            if bool(((blocks[:, at + 1] & 0x7C) == 0x7C).any()):
                raise ValueError("a scale is not a number")
        return stored

    def draw(self, spec: TensorSpec, generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Equally likely codes, scaled."""
        (part,) = self.parts(spec)
        device = generator.device
        if not self.scales:
            plain = torch.randn(spec.outputs * spec.inputs, device=device, generator=generator) * std
            return {BLOCKS: plain.to(_PLAIN[self.type]).view(torch.uint8).view(part.shape)}
        blocks = torch.randint(0, 256, part.shape, dtype=torch.uint8, device=device, generator=generator)
        each = blocks.view(-1, self.size)
        self._scale(each, 1.0)
        self._scale(each, std / float(self.values(each[:4096]).std()))
        return {BLOCKS: blocks}

    def _scale(self, blocks: Tensor, scale: float) -> None:
        for at in self.scales:
            blocks[:, at : at + 2] = torch.tensor([scale], dtype=torch.float16, device=blocks.device).view(torch.uint8)


def _split(key: str, stored: str, type_: str, part: str) -> tuple[str, str] | None:
    plain = key.removesuffix(f".{type_}")
    return (plain, part) if stored == "U8" and plain != key else None


@cache
def _halves() -> npt.NDArray[np.uint8]:
    """For each two bytes, 16 bits, one byte of their low halves and one of their high ones, without negative zeros: `[2, 65536]`."""
    each = np.arange(1 << 16) >> np.array([[[0], [8]], [[4], [12]]]) & 15  # half, byte, two bytes
    each[each == 8] = 0  # the code of negative zero
    halves: npt.NDArray[np.uint8] = (each[:, 0] | each[:, 1] << 4).astype(np.uint8)
    return halves


def _pairs(codes: Tensor) -> Tensor:
    """Adjacent codes in a byte, without negative zeros: uint8 `[N, 16 * groups]` from `[N, groups, 16]`, low halves first."""
    two = codes.contiguous().numpy().reshape(-1).view(np.uint16)
    pairs = np.empty((len(two) // 8, 2), np.uint64)  # eight bytes of low halves, and eight of high ones
    for half in range(2):
        pairs[:, half] = np.take(_halves()[half], two).view(np.uint64)
    return torch.from_numpy(pairs.view(np.uint8)).view(len(codes), -1)


@dataclass(frozen=True, kw_only=True)
class GgufMxfp4(Mxfp4):
    """MXFP4 of GGUF files: blocks of a scale and 16 bytes, whose low halves are the inputs 0 to 15. Records are those of mxfp4.

    The library decodes a negative zero as zero: such codes become positive ones. It reads the scale 255, which is no number in
    the standard, as 2^127 times two: such blocks are refused.
    """

    name = "gguf-mxfp4"
    packed_anywhere = frozenset()  # codes are looked up with NumPy
    type = "MXFP4"
    per, size = GROUP, _MXFP4_BYTES

    def parts(self, spec: TensorSpec) -> tuple[Part, ...]:
        """Codes and scales, both from the same blocks."""
        stored = (spec.outputs, spec.inputs // GROUP * _MXFP4_BYTES)
        codes, scales = self.word_parts(spec, stored, stored)
        return codes, Part(name=scales.name, shape=scales.shape, dtype="uint8", stored=stored, source=codes.name)

    def claim(self, quantization: Mapping[str, Any]) -> tuple[Format, ...]:
        """As the other formats of GGUF do."""
        return tuple(GGUF.values()) if quantization.get("quant_method") == METHOD else ()

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """Keys of GGUF tensors end with their type."""
        return _split(key, stored, self.type, "codes")

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Outputs, and 32 inputs for each block."""
        outputs, nbytes = stored["codes"]
        return outputs, nbytes // _MXFP4_BYTES * GROUP

    def repack(self, spec: TensorSpec, part: str, stored: Tensor) -> Tensor:
        """Words of codes; scales by steps.

        Raises:
            ValueError: if a scale is not a number.
        """
        blocks = stored.reshape(spec.outputs, -1, _MXFP4_BYTES)
        if part == "scales":
            return super().repack(spec, part, blocks[..., 0].contiguous())
        return pack_words(_pairs(blocks[..., 1:]), self.code_map)


_PLAIN: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
"""Types of plain numbers, by their names in GGUF and in safetensors headers."""


def _blocks(type_: str, per: int, size: int, scales: tuple[int, ...], values: Callable[[Tensor], Tensor]) -> GgufBlocks:
    return GgufBlocks(name=f"gguf-{type_.lower()}", type=type_, per=per, size=size, scales=scales, values=values)


_ALL: tuple[GgufBlocks | GgufMxfp4, ...] = (
    _blocks("Q4_0", 32, 18, (0,), _q4_0),
    _blocks("Q4_1", 32, 20, (0, 2), _q4_1),
    _blocks("Q5_0", 32, 22, (0,), _q5_0),
    _blocks("Q5_1", 32, 24, (0, 2), _q5_1),
    _blocks("Q8_0", 32, 34, (0,), _q8_0),
    _blocks("Q4_K", 256, 144, (0, 2), _q4_k),
    _blocks("Q5_K", 256, 176, (0, 2), _q5_k),
    _blocks("Q6_K", 256, 210, (208,), _q6_k),
    GgufMxfp4(),
    *(_blocks(type_, 1, dtype.itemsize, (), _as(dtype)) for type_, dtype in _PLAIN.items()),
)
GGUF: Mapping[str, GgufBlocks | GgufMxfp4] = MappingProxyType({format_.type: format_ for format_ in _ALL})
"""The formats of GGUF, by type. Plain numbers are among them for experts whose module has them in another order."""
