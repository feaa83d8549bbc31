"""Packed weights that are no expert's: found by key, and decoded one by one while transformers loads them.

They run as plain numbers of the model's dtype. Must not know experts and records.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertflow.errors import CheckpointError
from expertflow.formats.dtypes import BY_STORED_NAME, DTYPES
from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.plain import PLAIN, VALUES
from expertflow.models.files.checkpoint import StoredTensor
from expertflow.models.skeleton import Skeleton

SINGLE = {(), (1,)}
"""Shapes of a single number."""
_DISAGREE = "Checkpoint and config.json disagree: fetch both again."


def format_of(skeleton: Skeleton, tensor: StoredTensor) -> tuple[Format, str, str]:
    """The format of a checkpoint tensor, the key it would have if it were plain, and the part it holds."""
    for format_ in skeleton.packed:
        if (split := format_.split_key(tensor.key, tensor.dtype)) is not None:
            return (format_, *split)
    return PLAIN, tensor.key, VALUES


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A packed weight of the dense part.

    Attributes:
        key: that an unpacked checkpoint has for it.
        spec: what it is.
        parts: where its parts are, by name.
    """

    key: str
    spec: TensorSpec
    parts: Mapping[str, StoredTensor]

    def check(self, shape: tuple[int, ...] | None) -> None:
        """Check it against the model, which has this shape for it; None: it makes other tensors of it.

        Raises:
            CheckpointError: if its shape is another one, or a part is missing, or has another shape or number type.
        """
        if shape is not None and self.spec.shape != shape:
            raise CheckpointError(f"{self.key!r} is {list(self.spec.shape)}, the config says {list(shape)}", _DISAGREE)
        for part in self.spec.parts:
            name = part.source or part.name
            if name not in self.parts:
                if part.optional:
                    continue
                raise CheckpointError(
                    f"{self.key!r} is stored as {self.spec.format.name} and lacks its {name}",
                    "Fetch the checkpoint again.",
                )
            check_shape(self.parts[name], part.stored)
            if not part.source:
                check_part_dtype(self.parts[name], self.spec.format, part)

    def decode(self, read: Callable[[StoredTensor], Tensor]) -> Tensor:
        """Its numbers.

        Args:
            read: gives a checkpoint tensor.

        Raises:
            CheckpointError: if the stored numbers cannot be decoded.
        """
        parts = {}
        for part in self.spec.parts:
            name = part.source or part.name
            if name not in self.parts:
                continue  # an optional one: `check` saw it
            source = self.parts[name]
            parts[part.name] = pack_part(self.spec, part, source, read(source).view(part.stored)).view(part.shape)
        return self.spec.format.decode(self.spec, parts)


@dataclass(frozen=True)
class FoundParts:
    """Parts that a checkpoint holds of one packed tensor: its format, and where they are, by name."""

    format: Format
    parts: dict[str, StoredTensor]

    def tensor(self, key: str, dtype: str) -> PackedTensor:
        """The tensor that they are parts of.

        Raises:
            CheckpointError: if the part that says its shape is missing.
        """
        try:
            shape = self.format.logical_shape({name: tensor.shape for name, tensor in self.parts.items()})
        except (KeyError, IndexError) as error:
            raise CheckpointError(
                f"{key!r} is stored as {self.format.name}, and of its parts there is only {', '.join(sorted(self.parts))}",
                "Fetch the checkpoint again.",
            ) from error
        format_ = self.format.of_types({name: tensor.dtype for name, tensor in self.parts.items()})
        spec = TensorSpec(name=key, shape=shape, dtype=dtype, format=format_)
        return PackedTensor(key=key, spec=spec, parts=self.parts)


def find_packed(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> dict[str, FoundParts]:
    """The packed ones among a checkpoint's tensors that are no experts', by the key of an unpacked checkpoint.

    Raises:
        CheckpointError: if a tensor is there in two formats.
    """
    found: dict[str, FoundParts] = {}
    for tensor in tensors.values():
        format_, key, part = format_of(skeleton, tensor)
        if format_ is PLAIN:
            continue
        entry = found.setdefault(key, FoundParts(format_, {}))
        if entry.format != format_:
            raise CheckpointError(
                f"{key!r} is there as {entry.format.name} and as {format_.name}",
                "One of them is stale: fetch the checkpoint again into an empty folder.",
            )
        entry.parts[part] = tensor
    for key, entry in found.items():
        if key in tensors and all(tensors[key] is not tensor for tensor in entry.parts.values()):
            raise CheckpointError(
                f"{key!r} is there as {entry.format.name} and as plain numbers",
                "One of them is stale: fetch the checkpoint again into an empty folder.",
            )
    return found


def pack_part(spec: TensorSpec, part: Part, source: StoredTensor, stored: Tensor) -> Tensor:
    """The numbers of a part as a record holds them, flat in the part's dtype.

    Args:
        spec: the tensor; one of them where several are joined.
        part: the part.
        source: the checkpoint tensor that they come from.
        stored: as in the checkpoint.

    Raises:
        CheckpointError: if they cannot be decoded.
    """
    if part.name in spec.format.repacked:
        try:
            stored = spec.format.repack(spec, part.name, stored)
        except ValueError as error:
            raise CheckpointError(
                f"{source.key!r} cannot be decoded as {spec.format.name}: {error}",
                "Fetch the checkpoint again, or the model in another format.",
            ) from error
    dtype = getattr(torch, part.dtype)
    if dtype == torch.uint8 and stored.dtype.itemsize == 1:
        return stored.reshape(-1).view(torch.uint8)
    return stored.reshape(-1).to(dtype)


def check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Check a tensor's shape. A single number may be stored as `[1]` or as `[]`.

    Raises:
        CheckpointError: if it is another one.
    """
    if tensor.shape != shape and {tensor.shape, shape} != SINGLE:
        raise CheckpointError(f"{tensor.key!r} is {list(tensor.shape)}, the config says {list(shape)}", _DISAGREE)


def check_part_dtype(tensor: StoredTensor, format_: Format, part: Part) -> None:
    """Check the number type that a part is stored in.

    Raises:
        CheckpointError: if it is one that the format does not have there.
    """
    wanted = (DTYPES[part.dtype].stored, *part.also)
    if tensor.dtype not in wanted or tensor.dtype not in BY_STORED_NAME:
        raise CheckpointError(
            f"{tensor.key!r} is stored as {tensor.dtype}, the format {format_.name} has {' or '.join(wanted)} there",
            _DISAGREE,
        )


class DecodedOnRead:
    """Stands for a packed weight where transformers expects a slice of a file: decoded when it is read."""

    def __init__(self, packed: PackedTensor, read: Callable[[StoredTensor], Tensor]) -> None:
        """Decode `packed` from what `read` gives."""
        self._packed, self._read = packed, read

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._packed.spec.shape)

    def get_dtype(self) -> str:
        """Its number type, as safetensors names it."""
        return DTYPES[self._packed.spec.dtype].stored

    def __getitem__(self, place: Any) -> Tensor:
        """Decode it, and take a part."""
        return self._packed.decode(self._read)[place]
