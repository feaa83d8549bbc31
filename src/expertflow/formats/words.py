"""What all formats of four bits have in common: records of 32-bit words, scales by step, and the numbers of both.

A word holds eight codes of one output, arranged so that a kernel takes two out with few instructions. Words and scales lie by steps of 128
inputs: what a kernel needs for a step is contiguous. Must not know how checkpoints store any of this: a subclass gives codes and
scales in plain order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from expertflow.errors import UnsupportedModelError
from expertflow.formats.format import Format, Part, TensorSpec, blocks_of_rows

STEP = 128
"""Inputs whose scales lie side by side in a record."""
PER_WORD = 8
"""Codes of a word."""
RUN = 32
"""Inputs that four words hold: a row of codes is padded to a multiple of them."""
ROW = 1 << 30
"""The group of a format that has one scale for an output, however many inputs there are; a multiple of a step."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Numbers of the codes of the OCP format FP4: a sign, two bits of exponent, one of mantissa."""
_BLOCK: Mapping[str, int] = MappingProxyType({"cpu": 1 << 21, "cuda": 1 << 24})
"""Bytes of codes that are packed at a time: near the caches of a core; on a GPU few launches, with memory for some times as much."""
_PLACES: Mapping[str, tuple[tuple[int, ...], ...]] = MappingProxyType(
    {
        # where the four bits of a pair's first code go in a word, lowest bit first; those of its second: 16 further, in a circle
        "int4": tuple(tuple(range(4 * pair, 4 * pair + 4)) for pair in range(4)),
        # shifted left by 0, by 4, and in a circle by 10, a code has its sign at 15 and its other bits at 6 to 8, where bfloat16 has
        # them; of the last pair, shifts by 6 and by -2 bring them there
        "e2m1": ((6, 7, 8, 15), (2, 3, 4, 11), (28, 29, 30, 5), (0, 1, 10, 9)),
    }
)
"""Arrangements of codes in a word, by code map."""


@cache
def _tables(code_map: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each two bytes of two codes, 16 bits, what they are in a word: as its pairs 0 and 1, and as 2 and 3."""
    first, second = (torch.from_numpy(_table(code_map, half)).to(device) for half in range(2))
    return first, second


def forget_tables() -> None:
    """Free the memory of what `pack_words` looks up; it is made again at the next use."""
    _tables.cache_clear()


def _table(code_map: str, half: int) -> npt.NDArray[np.int32]:
    codes = np.arange(1 << 16, dtype=np.int64)
    word = np.zeros_like(codes)
    for nibble in range(4):
        pair, shift = nibble // 2 + 2 * half, 16 * (nibble % 2)
        for bit, target in enumerate(_PLACES[code_map][pair]):
            word |= (codes >> (4 * nibble + bit) & 1) << (shift + target) % 32
    return word.astype(np.uint32).view(np.int32)


def pack_words(pairs: Tensor, code_map: str) -> Tensor:
    """Words of codes, step by step, ordered as tensor cores take them: see `_steps`.

    Args:
        pairs: uint8 `[N, K / 2]`, two codes a byte, the earlier input in the lower half.
        code_map: a key of the arrangements: `int4` or `e2m1`.

    Returns:
        int32 `[N, K / 8]`, K rounded up to a multiple of 32, codes behind the last one being 0. In memory it is the views of `_by_step`.
    """
    if missing := -pairs.shape[1] % (RUN // 2):
        pairs = functional.pad(pairs, (0, missing))
    outputs, count = pairs.shape
    words = torch.empty(outputs, count // 4, dtype=torch.int32, device=pairs.device)
    rows = max(1, _BLOCK[pairs.device.type] // max(count, 1))
    tables = _tables(code_map, pairs.device)
    if pairs.is_cuda:  # they were made on another stream, and may be forgotten while this one still reads them
        for table in tables:
            table.record_stream(torch.cuda.current_stream(pairs.device))
    for first in range(0, outputs, rows):
        for (begin, steps, wide), target in zip(_steps(2 * count), _by_step(words), strict=True):
            part = pairs[first : first + rows, begin // 2 : begin // 2 + 16 * steps * wide]
            ordered = part.reshape(len(part), steps, wide, 2, 2, 4).permute(0, 1, 5, 2, 3, 4).contiguous()
            halves = ordered.view(torch.int16).view(len(part), -1, 2)  # two bytes of four codes each
            found = _look_up(halves, tables).view(len(part), steps, 4 * wide)
            target[:, first : first + rows] = found.transpose(0, 1)
    return words


def _by_step(words: Tensor) -> list[Tensor]:
    """Words of a tensor `[N, W]` as a record has them: of each step, those of all outputs; `[steps, N, words of a step]`.

    What a program reads for a step is one run of memory, so that requests are whole lines and few pages are open.
    """
    outputs, flat, views = words.shape[0], words.view(-1), []
    for begin, steps, wide in _steps(words.shape[1] * PER_WORD):
        first = begin // PER_WORD * outputs
        views.append(flat[first : first + steps * outputs * 4 * wide].view(steps, outputs, 4 * wide))
    return views


def _some_outputs(words: Tensor, rows: slice) -> Tensor:
    """Words of some outputs, as those of a tensor of its own."""
    return torch.cat([view[:, rows].reshape(-1) for view in _by_step(words)]).view(-1, words.shape[1])


def _look_up(halves: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """Words `[N, W]` of halves int16 `[N, W, 2]`, by a table for each half."""
    index = halves.to(torch.int32) & 0xFFFF
    found = [table.index_select(0, index[..., half].flatten()) for half, table in enumerate(tables)]
    return torch.bitwise_or(*found).view(halves.shape[:2])


@cache
def _runs(code_map: str, pair: int) -> tuple[tuple[int, int, int], ...]:
    """The bits of a pair's first code, by runs that lie together: first bit in the code, place in the word, mask."""
    places = _PLACES[code_map][pair]
    begins = [bit for bit in range(4) if bit == 0 or places[bit] != places[bit - 1] + 1]
    return tuple(
        (begin, places[begin], (1 << (end - begin)) - 1) for begin, end in zip(begins, [*begins[1:], 4], strict=True)
    )


def unpack_words(words: Tensor, code_map: str) -> Tensor:
    """Codes of words: int32 `[N, K / 8]` to uint8 `[N, K]`, on the device of the words."""
    outputs, count = words.shape
    codes = torch.empty(outputs, count * PER_WORD, dtype=torch.uint8, device=words.device)
    for (begin, steps, wide), view in zip(_steps(count * PER_WORD), _by_step(words), strict=True):
        mine = view.transpose(0, 1).reshape(outputs, steps, 4, wide)
        target = codes[:, begin : begin + 32 * steps * wide].view(outputs, steps, wide, 4, 4, 2)
        for place in range(PER_WORD):
            pair, half = place // 2, 16 * (place % 2)
            bits = [(mine >> (half + source) % 32 & mask) << bit for bit, source, mask in _runs(code_map, pair)]
            target[..., pair, :, place % 2] = reduce(torch.bitwise_or, bits).transpose(2, 3)
    return codes


def _steps(inputs: int) -> list[tuple[int, int, int]]:
    """Steps of 128 inputs that are alike: the first input, how many, and words for each thread. The last step may be shorter.

    A tensor core takes from thread q of four, of 16 inputs, number 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. So a word holds these of 32
    inputs, and the words of a step lie thread by thread: a thread reads its four words at once, and decodes in its registers.
    """
    whole, rest = divmod(inputs, STEP)
    steps = [(0, whole, STEP // 32), (inputs - rest, 1, rest // 32)]
    return [(begin, count, wide) for begin, count, wide in steps if count and wide]


def as_bytes(numbers: Tensor) -> Tensor:
    """The bytes of each row: `[..., W]` to uint8 `[..., W * size]`."""
    # flat first: a dimension of one number may have any stride
    return numbers.contiguous().view(-1).view(torch.uint8).view(*numbers.shape[:-1], -1)


def nibbles(words: Tensor) -> Tensor:
    """The eight fields of four bits of each word, lowest bits first: int32 `[..., W]` to uint8 `[..., 8 * W]`."""
    pairs = as_bytes(words)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def by_steps(scales: Tensor, group: int, steps: int | None = None) -> Tensor:
    """Scales as a record holds them: `[N, groups]` to `[steps, N, groups of a step]`, the last ones zero if K ends within a step.

    Groups that are longer than a step have their scale once for each step.

    Args:
        scales: of each output and group.
        group: inputs of a group, or `ROW`.
        steps: of K inputs; needed where the last group may be shorter than the others by a step or more.
    """
    outputs, groups = scales.shape
    if group >= STEP:
        each = group // STEP if steps is None else min(group // STEP, steps)
        return scales.repeat_interleave(each, 1)[:, :steps].t()[..., None].contiguous()
    per = STEP // group
    steps = -(-groups // per)
    padded = torch.zeros(outputs, steps * per, dtype=scales.dtype)
    as_bytes(padded)[:, : groups * scales.itemsize] = as_bytes(scales)
    return padded.view(outputs, steps, per).transpose(0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Words(Format):
    """A format of four bits. Its parts in a record, in this order: `codes`, `scales`, `zeros` and `globals`, the last two where it has them.

    Attributes:
        code_map: `e2m1`, or `int4` for codes of 0 to 15.
        group: inputs that share a scale: 16, 32, 64, a multiple of 128, or `ROW`.
        scale_dtype: number type of the scales in a record, a key of `DTYPES`.
        scaling: how a scale is meant: `e8m0`, a power of two; `number`, the number itself; `e4m3*` or `e4m3/`, an FP8 number that is
            multiplied with the tensor's part `globals`, float32 `[joined]`, or divided by it.
        zeros: whether codes have a zero point for each group: uint8, by steps as the scales.
        quick: as of `Format.in_range`.
        codes_also: number types besides I32 that a checkpoint may hold codes in, as safetensors names them.
        scales_also: further ones that it may hold scales in.
    """

    code_map: str = "e2m1"
    group: int = 32
    scale_dtype: str = "uint8"
    codes_also: tuple[str, ...] = ()
    scales_also: tuple[str, ...] = ()
    scaling: str = "e8m0"
    zeros: bool = False
    quick: bool = False
    tiles = "words"
    packed_anywhere = frozenset({"codes"})
    decode_bytes_each = (
        21  # words of a strip, codes as int32 while they are taken out, uint8, and two copies in float32
    )

    def scales_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Shape of the scales in a record: `[joined * steps, N of one, groups of a step]`."""
        steps = -(-spec.inputs // STEP)
        return (spec.joined * steps, spec.outputs // spec.joined, max(1, STEP // self.group))

    def groups_of(self, spec: TensorSpec) -> int:
        """Groups of an output; the last one may be short."""
        return -(-spec.inputs // self.group)

    def word_parts(
        self, spec: TensorSpec, codes: tuple[int, ...], scales: tuple[int, ...], joined: int = 0
    ) -> tuple[Part, Part]:
        """The parts `codes` and `scales`, stored in the given shapes, of which the dimension `joined` counts outputs."""
        return (
            Part(
                name="codes",
                shape=(spec.outputs, -(-spec.inputs // RUN) * (RUN // PER_WORD)),
                dtype="int32",
                stored=codes,
                joined=joined,
                also=self.codes_also,
            ),
            Part(
                name="scales",
                shape=self.scales_shape(spec),
                dtype=self.scale_dtype,
                stored=scales,
                joined=joined,
                also=self.scales_also,
            ),
        )

    def zero_part(self, spec: TensorSpec, stored: tuple[int, ...], joined: int) -> Part:
        """The part `zeros`, stored in words; empty in a record if all are the same, so that they are only checked."""
        shape = self.scales_shape(spec) if self.zeros else (spec.joined, 0)
        return Part(name="zeros", shape=shape, dtype="uint8", stored=stored, joined=joined, also=("I32",))

    def in_steps(self, spec: TensorSpec, each: Tensor) -> Tensor:
        """Scales or zeros `[N, groups]` of a tensor that is not joined, as a record holds them."""
        return by_steps(each, self.group, -(-spec.inputs // STEP))

    def constants(self, spec: TensorSpec) -> tuple[Any, ...]:
        """Code map, group, scaling, number type of scales, whether there are zeros, joined tensors, whether they alternate, `quick`.

        Raises:
            UnsupportedModelError: if a row's last words are not whole.
        """
        if spec.inputs % RUN:
            raise UnsupportedModelError(
                f"experts have {spec.inputs} inputs, and kernels read packed ones of a multiple of {RUN}",
                'Run them with execution="host".',
            )
        return (
            self.code_map,
            self.group,
            self.scaling,
            self.scale_dtype,
            self.zeros,
            spec.joined,
            spec.interleaved,
            self.quick,
        )

    def encode(self, spec: TensorSpec, numbers: Tensor) -> dict[str, Tensor]:
        """Codes and scales of the nearest numbers; the last group of an output may be short."""
        (outputs, inputs), group = numbers.shape, min(self.group, numbers.shape[1])
        codes = torch.zeros(outputs, inputs + inputs % 2, dtype=torch.uint8)
        scales = torch.empty(outputs, self.groups_of(spec), dtype=getattr(torch, self.scale_dtype))
        for rows, block in blocks_of_rows(numbers):
            padded = functional.pad(block, (0, -inputs % group)).view(len(block), -1, group)
            found, scales[rows] = self.quantise(padded)
            codes[rows, :inputs] = found.flatten(1)[:, :inputs]
        pairs = codes.view(torch.int16)
        return {
            "codes": pack_words((pairs & 15 | pairs >> 4).to(torch.uint8), self.code_map),
            "scales": self.in_steps(spec, scales),
        }

    def quantise(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[R, G, group]`, uint8, and scales `[R, G]` of groups of float32 numbers `[R, G, group]`.

        Raises:
            ValueError: if a number is not finite.
        """
        raise NotImplementedError

    def random_codes(self, spec: TensorSpec, generator: torch.Generator) -> Tensor:
        """Codes that are equally likely, in words as a record holds them."""
        shape = next(part.shape for part in self.parts(spec) if part.name == "codes")
        return torch.randint(
            -(1 << 31), 1 << 31, shape, dtype=torch.int32, device=generator.device, generator=generator
        )

    def strip(self, spec: TensorSpec, parts: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """Everything but factors lies by steps; a copy of the codes."""
        del spec
        cut = {name: part[:, rows] if name in {"scales", "zeros"} else part for name, part in parts.items()}
        return {**cut, "codes": _some_outputs(parts["codes"], rows)}

    def codes_of(self, spec: TensorSpec, parts: Mapping[str, Tensor]) -> Tensor:
        """The codes of a tensor that is not joined: uint8 `[N, K]`."""
        return unpack_words(parts["codes"], self.code_map)[:, : spec.inputs]

    def by_input(self, spec: TensorSpec, part: Tensor) -> Tensor:
        """What a record holds by steps, such as scales, for each input of a tensor that is not joined: `[N, K]`."""
        steps, outputs = part.shape[0], spec.outputs
        in_order = part.view(steps, outputs, -1).transpose(0, 1).reshape(outputs, -1)
        return in_order.repeat_interleave(STEP // (in_order.shape[1] // steps), 1)[:, : spec.inputs]

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Of codes stored output-major, eight in four bytes."""
        raise NotImplementedError
