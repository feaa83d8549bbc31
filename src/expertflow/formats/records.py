"""Records: all parts of an expert's tensors as one contiguous block of bytes, each on a 256-byte boundary.

Must not know models, files and devices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Protocol, Self

import torch
from torch import Tensor

from expertflow.formats.dtypes import DTYPES
from expertflow.formats.format import Part, TensorSpec
from expertflow.formats.plain import PLAIN
from expertflow.types import large_layers

ALIGNMENT = 256
"""Bytes. Matrix products depend on pointer alignment on CPUs, and vector loads need it on GPUs."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _view(record: Tensor, part: Part, offset: int) -> Tensor:
    return record[offset : offset + part.nbytes].view(getattr(torch, part.dtype)).view(part.shape)


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Which bytes of a record are which part of which tensor.

    Attributes:
        specs: the tensors, in the order of the record.
        offsets: byte offset of each part, tensor by tensor.
        record_bytes: bytes from one record to the next, a multiple of 256.
    """

    specs: tuple[TensorSpec, ...]
    offsets: tuple[tuple[int, ...], ...]
    record_bytes: int

    @classmethod
    def of(cls, specs: Sequence[TensorSpec]) -> Self:
        """Lay out the given tensors in the given order."""
        offsets, end = [], 0
        for spec in specs:
            places = []
            for part in spec.parts:
                places.append(end)
                end += _aligned(part.nbytes)
            offsets.append(tuple(places))
        return cls(specs=tuple(specs), offsets=tuple(offsets), record_bytes=end)

    @cached_property
    def used_bytes(self) -> int:
        """Bytes of the parts with their alignment: `record_bytes`, or less where another layer's records are larger."""
        ends = [
            at + _aligned(part.nbytes)
            for spec, places in zip(self.specs, self.offsets, strict=True)
            for part, at in zip(spec.parts, places, strict=True)
        ]
        return max(ends, default=0)

    @cached_property
    def is_plain(self) -> bool:
        """Whether every tensor is stored as plain numbers, so that nothing is decoded."""
        return all(spec.format is PLAIN for spec in self.specs)

    @cached_property
    def decoded_bytes(self) -> int:
        """Bytes of the numbers of all tensors that are not stored as plain ones."""
        return sum(prod(spec.shape) * DTYPES[spec.dtype].nbytes for spec in self.specs if spec.format is not PLAIN)

    @cached_property
    def decode_bytes(self) -> int:
        """Bytes that decoding a whole record takes at most: its numbers, and what a strip of them is made from."""
        return self.decoded_bytes + max((spec.format.strip_bytes(spec) for spec in self.specs), default=0)

    def part(self, record: Tensor, name: str, part: str) -> Tensor:
        """One part of one tensor of a record, uint8 `[record_bytes]`, without copying."""
        return self.parts(record, name)[part]

    def parts(self, record: Tensor, name: str) -> dict[str, Tensor]:
        """All of them by name."""
        found = next((spec, at) for spec, at in zip(self.specs, self.offsets, strict=True) if spec.name == name)
        return self._parts(record, *found)

    def weights(self, record: Tensor) -> dict[str, Tensor]:
        """A record's tensors by name, in numbers; without copying where they are plain.

        Args:
            record: uint8 `[record_bytes]`, on any device.
        """
        return {spec.name: self._tensor(record, spec, at) for spec, at in zip(self.specs, self.offsets, strict=True)}

    def tensor(self, record: Tensor, name: str) -> Tensor:
        """One tensor of a record, in numbers."""
        found = next((spec, at) for spec, at in zip(self.specs, self.offsets, strict=True) if spec.name == name)
        return self._tensor(record, *found)

    @staticmethod
    def _tensor(record: Tensor, spec: TensorSpec, offsets: tuple[int, ...]) -> Tensor:
        return spec.format.decode(spec, RecordLayout._parts(record, spec, offsets))

    @staticmethod
    def _parts(record: Tensor, spec: TensorSpec, offsets: tuple[int, ...]) -> dict[str, Tensor]:
        return {part.name: _view(record, part, at) for part, at in zip(spec.parts, offsets, strict=True)}


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """The records of a model: a layout a layer. Any slot holds any record but those of large layers, which need no slot.

    Attributes:
        layers: layout of each MoE layer's records; layers of the same formats share one.
        record_bytes: bytes of a slot: of the largest record of all layers that are not large.
    """

    layers: tuple[RecordLayout, ...]
    record_bytes: int

    @classmethod
    def of(cls, specs: Sequence[Sequence[TensorSpec]]) -> Self:
        """Lay out the given tensors of each layer. A large layer's records have a size of their own."""
        distinct: dict[tuple[TensorSpec, ...], RecordLayout] = {}
        for layer in specs:
            if tuple(layer) not in distinct:
                distinct[tuple(layer)] = RecordLayout.of(layer)
        sizes = [distinct[tuple(layer)].record_bytes for layer in specs]
        large = large_layers(sizes)
        slot = max(size for layer, size in enumerate(sizes) if layer not in large)
        fitted = {key: replace(one, record_bytes=max(slot, one.record_bytes)) for key, one in distinct.items()}
        return cls(layers=tuple(fitted[tuple(layer)] for layer in specs), record_bytes=slot)

    @classmethod
    def uniform(cls, specs: Sequence[TensorSpec], layers: int = 1) -> Self:
        """The same tensors in every layer."""
        return cls.of([tuple(specs)] * layers)

    @cached_property
    def large(self) -> tuple[int, ...]:
        """The large layers: their records are larger than a slot, and their experts are always resident."""
        return tuple(layer for layer, layout in enumerate(self.layers) if layout.record_bytes > self.record_bytes)

    @cached_property
    def large_bytes(self) -> int:
        """Bytes of one record of each large layer together."""
        return sum(self.layers[layer].record_bytes for layer in self.large)

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of each layer's records, which a load of one moves; a slot may have more."""
        return tuple(layout.used_bytes for layout in self.layers)

    @cached_property
    def equal(self) -> bool:
        """Whether every load moves as many bytes."""
        return set(self.layer_bytes) == {self.record_bytes}

    def store_bytes(self, experts: int) -> int:
        """Bytes of all records of `experts` experts a layer in host memory."""
        return experts * sum(layout.record_bytes for layout in self.layers)

    @cached_property
    def decoded(self) -> "StoreLayout":
        """The same tensors as plain numbers; this layout itself if they are."""
        if all(layout.is_plain for layout in self.layers):
            return self
        as_numbers = {"format": PLAIN, "joined": 1, "interleaved": False}
        return StoreLayout.of([[replace(spec, **as_numbers) for spec in layout.specs] for layout in self.layers])  # type: ignore[arg-type]  # of mixed types

    @cached_property
    def distinct(self) -> Mapping[int, RecordLayout]:
        """The layouts that differ, by `id`."""
        return {id(layout): layout for layout in self.layers}

    @cached_property
    def decoded_bytes(self) -> int:
        """Bytes of the numbers that one record is decoded to, at most."""
        return max(layout.decoded_bytes for layout in self.layers)

    @cached_property
    def decode_bytes(self) -> int:
        """Bytes that decoding one record takes at most, its numbers among them."""
        return max(layout.decode_bytes for layout in self.layers)


class ExpertStore(Protocol):
    """The records of all experts, as sources fill them and transfers and kernels read them. One kind exists: `memory.store.HostStore`.

    Attributes:
        layout: what a record of each layer holds.
        buffer: uint8 `[L * E, record_bytes]`, the records that slots hold; rows of large layers stay unused.
    """

    layout: StoreLayout
    buffer: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""

    @property
    def memory(self) -> Sequence[Tensor]:
        """Every block of memory of the store."""

    def record(self, number: int) -> Tensor:
        """Return one record, uint8 `[record_bytes]` of its layer; `number` is `layer * E + expert`."""

    def lock(self) -> None:
        """Make the filled records readable by the device.

        Raises:
            HostMemoryError: if the driver refuses.
        """

    def close(self) -> None:
        """Free the memory; later use of a record is an error."""
