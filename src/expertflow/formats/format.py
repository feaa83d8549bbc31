"""What a format is: the parts that a record holds for a tensor, the checkpoint tensors they come from, and their numbers.

Must not know models and devices: a tensor is a name, a shape and a format here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from expertflow.formats.dtypes import DTYPES


@dataclass(frozen=True, kw_only=True)
class Part:
    """One array that a record holds for a tensor.

    Attributes:
        name: within the format, such as `codes`.
        shape: in the record. Tensors that are joined from several (gate and up) are joined along the first dimension, part by
            part: it counts outputs, or blocks of them.
        dtype: a key of `DTYPES`.
        stored: shape in the checkpoint, for one expert; it has the same numbers in the same order, unless the format repacks them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * DTYPES[self.dtype].nbytes


class Format:
    """A way to store a tensor. A new one is a subclass in a file of its own, an entry of `table.FORMATS`, and a tile loader.

    Attributes:
        name: of the format; `kernels/tiles.py` finds the tile loader by it.
        ignored: how keys end that hold nothing `decode` needs, such as shapes.
        repacked: names of the parts whose stored numbers `repack` rearranges; the others are read straight into the record.
        tile_loader: the Triton twin of `decode`, if it is not in `kernels/tiles.py`.
    """

    name: str = ""
    ignored: tuple[str, ...] = ()
    repacked: frozenset[str] = frozenset()
    tile_loader: Any = None

    def parts(self, spec: "TensorSpec") -> tuple[Part, ...]:
        """The arrays of a tensor."""
        raise NotImplementedError

    def decode(self, spec: "TensorSpec", parts: Mapping[str, Tensor]) -> Tensor:
        """The numbers, `spec.shape` in `spec.dtype`, on the device of the parts.

        They are the format's own library's, rounded as that rounds. Where the parts are the numbers, no copy is made.
        """
        raise NotImplementedError

    def decode_bytes(self, spec: "TensorSpec") -> int:
        """Bytes that `decode` takes at most, the result and what it is made from."""
        raise NotImplementedError

    def claim(self, quantization: Mapping[str, Any]) -> "tuple[Format, ...]":
        """The formats that a checkpoint with this `quantization_config` is stored in; empty if it is of another kind.

        What the config states, such as a group size, is a field of what is returned: the same object for the same values.
        """
        del quantization
        return ()

    def split_key(self, key: str, stored: str) -> tuple[str, str] | None:
        """The key that an unpacked checkpoint has for a tensor, and the part that this key holds; None: not this format's.

        Args:
            key: in the checkpoint.
            stored: number type of the tensor, as safetensors names it.
        """
        del key, stored
        return None

    def repack(self, part: str, stored: Tensor) -> Tensor:
        """The numbers of a part as a record holds them: as many for each output as the checkpoint has.

        Args:
            part: its name.
            stored: `[outputs, *rest]`, as in the checkpoint; a part may be read in several pieces along its outputs.
        """
        del part
        return stored


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of an expert, without its values.

    Attributes:
        name: parameter name in the experts module, such as `gate_up_proj`.
        shape: of the numbers for one expert (the expert dimension is gone), as the module computes with them.
        dtype: of the numbers, a name of `RUN_DTYPES`.
        format: how it is stored.
        transposed: whether the first dimension counts inputs instead of outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: Format
    transposed: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The arrays that a record holds for it."""
        return self.format.parts(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts, without alignment."""
        return sum(part.nbytes for part in self.parts)
