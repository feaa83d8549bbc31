"""What a format is: the parts that a record holds for a tensor, the checkpoint tensors they come from, and their numbers.

Must not know models and devices: a tensor is a name, a shape and a format here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from expertflow.formats.dtypes import DTYPES

_BLOCK = 1 << 17
"""Numbers that are quantised at once."""
_STRIP = 1 << 21
"""Numbers that are decoded at once, about: vocabularies have hundreds of millions."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One array that a record holds for a tensor.

    Attributes:
        name: within the format, such as `codes`.
        shape: in the record. Tensors that are joined from several (gate and up) hold those one after another: the first dimension
            is a multiple of their number.
        dtype: a key of `DTYPES`.
        stored: shape in the checkpoint, for one expert, of all joined tensors together.
        joined: the dimension of `stored` along which joined tensors add up; None: each of them has the whole shape.
        also: names, as in safetensors headers, of further number types that a checkpoint may hold and `dtype` holds exactly.
        source: the part whose stored tensor holds this one as well; empty: it has a stored tensor of its own.
        optional: whether a checkpoint may lack it; the record has no bytes for it then.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[int, ...]
    joined: int | None = 0
    also: tuple[str, ...] = ()
    source: str = ""
    optional: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * DTYPES[self.dtype].nbytes


class Format:
    """A way to store a tensor. A new one is a subclass in a file of its own, an entry of `table.FORMATS`, and a tile loader.

    Two formats of the same values are equal: a subclass with fields is a frozen dataclass.

    Attributes:
        name: of the format; kernels find how to read it by it.
        ignored: how keys end that hold nothing `decode` needs, such as shapes.
        repacked: names of the parts whose stored numbers `repack` checks or rearranges; the others are read straight into the record.
        packed_anywhere: names of those whose `repack` computes on the device of what it is given, and needs little memory there.
        tiles: the entry of `kernels/reading/readers.py` by which kernels read it, if it is not `name`.
        tile_loader: the Triton twin of `decode`, if it has no entry there.
        quick: whether kernels may decode records by their shortest way, see `in_range`.
        decode_bytes_each: bytes that `numbers` takes at most for each number, the result and what it is made from.
    """

    name: str = ""
    tiles: str = ""
    ignored: tuple[str, ...] = ()
    repacked: frozenset[str] = frozenset()
    packed_anywhere: frozenset[str] = frozenset()
    tile_loader: Any = None
    quick: bool = False
    decode_bytes_each: int = 0

    def parts(self, spec: "TensorSpec") -> tuple[Part, ...]:
        """The arrays of a tensor."""
        raise NotImplementedError

    def numbers(self, spec: "TensorSpec", parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers of a tensor that is not joined, `[outputs, inputs]` in `spec.dtype`, on the device of the parts.

        They are the format's own library's, rounded as that rounds.
        """
        raise NotImplementedError

    def rows_alike(self, spec: "TensorSpec") -> int:
        """Outputs of a tensor that is not joined of which a strip has a multiple, but the last one."""
        del spec
        return 1

    def strip(self, spec: "TensorSpec", parts: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """The parts of some outputs of a tensor that is not joined, which begin at a multiple of `rows_alike`; views.

        As it stands here, the first dimension of every part counts outputs.
        """
        del spec
        return {name: part[rows] for name, part in parts.items()}

    def decode(self, spec: "TensorSpec", parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers, `spec.shape` in `spec.dtype`, contiguous, on the device of the parts; made strip by strip.

        Where the parts are the numbers, no copy is made.
        """
        by_one = {name: part.view(spec.joined, -1, *part.shape[1:]) for name, part in parts.items() if part.numel()}
        device = next(iter(by_one.values())).device
        whole = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
        target = whole.t() if spec.transposed else whole
        each = target.unflatten(0, (-1, spec.joined) if spec.interleaved else (spec.joined, -1))
        one, size = spec.one, self._strip_rows(spec.one)
        for place, numbers in enumerate(each.unbind(1 if spec.interleaved else 0)):
            mine = {name: part[place] for name, part in by_one.items()}
            for begin in range(0, one.outputs, size):
                rows = slice(begin, min(begin + size, one.outputs))
                some = replace(one, shape=(rows.stop - begin, one.inputs))
                numbers[rows] = self.numbers(some, self.strip(one, mine, rows))
        return whole

    def _strip_rows(self, one: "TensorSpec") -> int:
        alike = self.rows_alike(one)
        return max(1, _STRIP // (alike * one.inputs)) * alike

    def strip_bytes(self, spec: "TensorSpec") -> int:
        """Bytes that `decode` takes at most beside its result."""
        one = spec.one
        return min(self._strip_rows(one), one.outputs) * one.inputs * self.decode_bytes_each

    def claim(self, quantization: Mapping[str, Any]) -> "tuple[Format, ...]":
        """The formats that a checkpoint with this `quantization_config` is stored in; empty if it is of another kind.

        What the config states, such as a group size, is a field of what is returned.

        Raises:
            UnsupportedModelError: if it is of this kind, and of a variant that is not decoded.
        """
        del quantization
        return ()

    def of_types(self, stored: Mapping[str, str]) -> "Format":
        """This format for a tensor whose parts have the given number types in a checkpoint, by part, as safetensors names them.

        A format that keeps scales as they are stored, because its numbers depend on their type, says it here.
        """
        del stored
        return self

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The key that an unpacked checkpoint has for a tensor, and the part that this key holds; None: not this format's.

        Args:
            key: in the checkpoint.
            stored: number type of the tensor, as safetensors names it.
        """
        del key, stored
        return None

    def logical_shape(self, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        """Outputs and inputs of a tensor whose parts have the given shapes in a checkpoint.

        Raises:
            KeyError: if the part that says so is missing.
        """
        raise NotImplementedError

    def in_range(self, spec: "TensorSpec", parts: Mapping[str, Tensor]) -> bool:
        """Whether a record's parts of a tensor, in host memory, are such that kernels may decode them by their shortest way.

        Some scales forbid it. A format that ever says so has the field `quick`; where that is false, kernels take another way.
        """
        del spec, parts
        return False

    def quickened(self) -> "Format":
        """This format for records that are in range."""
        return replace(self, quick=True)  # type: ignore[type-var]  # one that has the field is a dataclass

    def constants(self, spec: "TensorSpec") -> tuple[Any, ...]:
        """What a tile loader has to know when it is compiled, such as the size of a group."""
        del spec
        return ()

    def repack(self, spec: "TensorSpec", part: str, stored: Tensor) -> Tensor:
        """The numbers of a part as a record holds them.

        Args:
            spec: of the tensor; of one of them where several are joined.
            part: its name.
            stored: as in the checkpoint, in the shape and number type that it has there.

        Raises:
            ValueError: if they cannot be decoded; the message says why.
        """
        del spec, part
        return stored

    def encode(self, spec: "TensorSpec", numbers: Tensor) -> dict[str, Tensor]:
        """The parts of a tensor that is not joined, quantised: every number becomes the nearest one that its scale allows.

        Args:
            spec: of the tensor.
            numbers: `[outputs, inputs]`, float32, bfloat16 or float16; computed with in float32.

        Returns:
            Parts by name, as a record holds them; a part without numbers may be missing.

        Raises:
            NotImplementedError: if the format only reads what others quantised.
            ValueError: if a number is not finite.
        """
        raise NotImplementedError

    def draw(self, spec: "TensorSpec", generator: torch.Generator, std: float) -> dict[str, Tensor]:
        """Random parts of a tensor, in the shapes of the record, whose numbers have about the given standard deviation."""
        raise NotImplementedError


def blocks_of_rows(numbers: Tensor, rows: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """A matrix `[N, K]` in float32, block by block, so that what is computed of a block stays in a processor's cache.

    Args:
        numbers: of any float type.
        rows: a block has a multiple of them, but the last one.

    Yields:
        The rows of a block, and its numbers.
    """
    size = max(1, _BLOCK // max(1, rows * numbers.shape[1])) * rows
    for begin in range(0, numbers.shape[0], size):
        place = slice(begin, begin + size)
        yield place, numbers[place].to(torch.float32)


def check_finite(largest: Tensor) -> None:
    """Refuse to quantise what is no number.

    Args:
        largest: magnitudes of which each is the largest of its group; NaN if one in the group is.

    Raises:
        ValueError: if one is not finite.
    """
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("a number is not finite")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of an expert, without its values.

    Attributes:
        name: parameter name in the experts module, such as `gate_up_proj`.
        shape: of the numbers for one expert (the expert dimension is gone), as the module computes with them.
        dtype: of the numbers, a name of `RUN_DTYPES`.
        format: how it is stored.
        transposed: whether the first dimension counts inputs instead of outputs.
        joined: tensors of equal size that it consists of and that are packed each by itself, such as gate and up.
        interleaved: whether outputs of the joined tensors alternate in `shape`; in a record only those of plain numbers do.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: Format
    transposed: bool = False
    joined: int = 1
    interleaved: bool = False

    @property
    def outputs(self) -> int:
        """Outputs of a weight, of all joined tensors together."""
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def inputs(self) -> int:
        """Inputs of a weight."""
        return self.shape[0] if self.transposed else self.shape[-1]

    @property
    def one(self) -> "TensorSpec":
        """One of the joined tensors, `[outputs, inputs]`."""
        return replace(
            self, shape=(self.outputs // self.joined, self.inputs), transposed=False, joined=1, interleaved=False
        )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The arrays that a record holds for it."""
        return self.format.parts(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts, without alignment."""
        return sum(part.nbytes for part in self.parts)
