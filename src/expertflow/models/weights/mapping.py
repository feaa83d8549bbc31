"""Which checkpoint bytes belong to which expert: keys, resolved through transformers' own conversion table.

Handles experts stored one tensor each, in several to be joined (gate and up), or stacked over all experts; each in any format.
Reads no data. Must not know where the bytes will go beyond tensor, part and offset.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from expertflow.errors import CheckpointError, UnsupportedModelError
from expertflow.formats.dtypes import run_dtype
from expertflow.formats.format import Format, Part, TensorSpec
from expertflow.formats.plain import PLAIN
from expertflow.models.files.checkpoint import StoredTensor
from expertflow.models.files.identity import Span
from expertflow.models.gguf.header import is_gguf
from expertflow.models.gguf.view import joined
from expertflow.models.refusals import converted_experts, lost_experts
from expertflow.models.skeleton import Skeleton
from expertflow.models.weights.dense import PackedTensor, check_part_dtype, check_shape, find_packed, format_of


@dataclass(frozen=True, kw_only=True)
class ExpertPiece:
    """Bytes of one part of an expert's tensor, contiguous both in a file and in the part.

    Attributes:
        record: flat number of the expert, `layer * E + index`.
        layer: MoE layer.
        spec: tensor of the expert.
        part: the part of it.
        begin: first number within that part.
        count: numbers in that part.
        source: the checkpoint tensor.
        stored: shape that the bytes have in the checkpoint.
        offset: first byte within the checkpoint tensor.
        nbytes: bytes in the file.
        encoded: the tensor in the format that its numbers are quantised to while they are read; None: they are not.
    """

    record: int
    layer: int
    spec: TensorSpec
    part: Part
    begin: int
    count: int
    source: StoredTensor
    stored: tuple[int, ...]
    offset: int
    nbytes: int
    encoded: TensorSpec | None = None

    @property
    def joined(self) -> bool:
        """Whether it is one of several tensors that are joined."""
        return self.spec.joined > 1

    @property
    def span(self) -> Span:
        """The bytes of the checkpoint tensor that it is."""
        return Span(self.source, self.offset, self.nbytes)


@dataclass(frozen=True, kw_only=True)
class ExpertMap:
    """Where a model's experts are in its checkpoint.

    Attributes:
        pieces: together they cover every part of every tensor of every expert exactly once, in file order.
        layers: the tensors of one expert of each MoE layer, in the formats they are stored in.
    """

    pieces: list[ExpertPiece]
    layers: tuple[tuple[TensorSpec, ...], ...]


def map_experts(skeleton: Skeleton, tensors: Mapping[str, StoredTensor], *, convert: bool) -> ExpertMap:
    """Find every expert tensor of the model in the checkpoint.

    Args:
        skeleton: the model.
        tensors: the checkpoint.
        convert: whether expert tensors may be of another float dtype than the model runs in.

    Raises:
        CheckpointError: if a tensor is missing, is there twice, or has another shape or dtype than in the config.
        UnsupportedModelError: if the family stores experts in a way that has to be computed.
    """
    found = _collect(skeleton, tensors)
    pieces: list[ExpertPiece] = []
    layers = []
    for layer, module in enumerate(skeleton.expert_modules):
        specs = []
        for plain_spec in skeleton.specs:
            stored = found.get((module, plain_spec.name))
            if stored is None:
                if lost := next((key for key in tensors if key.endswith("$")), None):
                    raise lost_experts(skeleton.folder, lost)
                raise CheckpointError(
                    f"the checkpoint holds no {plain_spec.name} for {module}",
                    "It does not match its config: fetch it again.",
                )
            spec = _packed_spec(skeleton, plain_spec, stored)
            specs.append(spec)
            check_parts(spec, f"{plain_spec.name} of {module}", stored.parts.keys())
            for part in (part for part in spec.parts if not part.source):
                pieces += _pieces(skeleton, layer, spec, part, stored.parts.get(part.name, {}))
        layers.append(tuple(specs))
    for piece in pieces:
        _check_piece(piece, skeleton, convert=convert)
    pieces.sort(key=lambda piece: (piece.source.file, piece.source.start + piece.offset))
    return ExpertMap(pieces=pieces, layers=tuple(layers))


def _packed_spec(skeleton: Skeleton, spec: TensorSpec, found: "_Found") -> TensorSpec:
    """A tensor of an expert as the checkpoint stores it."""
    joined = max(len({place for _, place in stored}) for stored in found.parts.values())
    module = skeleton.model.get_submodule(skeleton.expert_modules[0])
    interleaved = joined > 1 and not getattr(module, "is_concatenated", True)
    if found.format is PLAIN and not interleaved:  # joined plain numbers are one after another, as in the module
        return spec
    types = {
        part: Counter(tensor.dtype for tensor in stored.values()).most_common(1)[0][0]
        for part, stored in found.parts.items()
    }
    return replace(spec, format=found.format.of_types(types), joined=joined, interleaved=interleaved)


def check_parts(spec: TensorSpec, name: str, found: Collection[str]) -> None:
    """Check that a checkpoint has no parts of a packed tensor that its format does not decode.

    Raises:
        UnsupportedModelError: if it has.
    """
    if unknown := sorted(set(found) - {part.name for part in spec.parts}):
        raise UnsupportedModelError(
            f"{name} has a part {unknown[0]!r} that the format {spec.format.name} does not decode",
            "Fetch the model in another format.",
        )


def check_dense(skeleton: Skeleton, tensors: Mapping[str, StoredTensor], *, convert: bool) -> dict[str, PackedTensor]:
    """Check every tensor that is no expert's against the model, from headers alone.

    Tensors that transformers computes from several others are left to its own checks on loading. float32 is accepted
        for any dtype, as in transformers: checkpoints keep some router biases in it.

    Args:
        skeleton: the model.
        tensors: the checkpoint without its experts, by key.
        convert: whether tensors may be of another float dtype than the model runs in.

    Returns:
        The tensors that are packed, by the key that an unpacked checkpoint has for them.

    Raises:
        CheckpointError: if a tensor has another shape or dtype than in the config, or lacks a part.
        UnsupportedModelError: if weights are stored as integers that no format reads.
    """
    wanted = dict([*skeleton.model.named_parameters(), *skeleton.model.named_buffers()])
    transforms = get_model_conversion_mapping(skeleton.model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    found, packed = find_packed(skeleton, tensors), {}
    parts = {tensor.key for one in found.values() for tensor in one.parts.values()}
    for key in (*found, *(key for key in tensors if key not in parts)):
        renamed, pattern = rename_source_key(key, renamings, converters)
        named = renamed if renamed in wanted else f"{skeleton.model.base_model_prefix}.{renamed}"
        if named not in wanted:
            continue
        if key in found:
            packed[key] = found[key].tensor(key, skeleton.dtype)
            check_parts(packed[key].spec, repr(key), found[key].parts)
            packed[key].check(None if pattern is not None else tuple(wanted[named].shape))
        elif pattern is None:
            check_shape(tensors[key], tuple(wanted[named].shape))
            if wanted[named].is_floating_point():
                _check_dtype(tensors[key], skeleton, convert=convert or tensors[key].dtype == "F32")
    return packed


_Stored = dict[tuple[int, int], StoredTensor]
"""(expert, place among those to be joined) -> tensor; expert -1 holds all experts stacked."""


@dataclass(frozen=True)
class _Found:
    """What the checkpoint holds of one tensor of one layer's experts: its format, and by part where it is."""

    format: Format
    parts: dict[str, _Stored] = field(default_factory=dict)


def needed(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The checkpoint without what its formats need nothing of, such as the shapes of packed tensors."""
    ends = tuple(end for format_ in skeleton.packed for end in format_.ignored)
    return {key: tensor for key, tensor in tensors.items() if not (ends and key.endswith(ends))}


def _collect(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> dict[tuple[str, str], _Found]:
    targets = {(path, spec.name) for path in skeleton.expert_modules for spec in skeleton.specs}
    found: dict[tuple[str, str], _Found] = {}
    by_plain_key: dict[str, list[tuple[str, Format, str]]] = {}
    for key, tensor in tensors.items():
        stored_as, plain_key, part = format_of(skeleton, tensor)
        by_plain_key.setdefault(plain_key, []).append((key, stored_as, part))
    for plain_key, module, name, where in _resolve(skeleton, by_plain_key):
        if (module, name) not in targets:
            continue
        for key, stored_as, part in by_plain_key[plain_key]:
            entry = found.setdefault((module, name), _Found(stored_as))
            if entry.format is not stored_as:
                raise CheckpointError(
                    f"{name} of {module} is stored as {entry.format.name} and, in {key!r}, as {stored_as.name}",
                    "All experts of a layer must be stored alike: fetch the checkpoint again.",
                )
            stored = entry.parts.setdefault(part, {})
            same = next((place for place in stored if place == where or (place[0] < 0) != (where[0] < 0)), None)
            if same is not None:
                raise CheckpointError(
                    f"{stored[same].key!r} and {key!r} are both {name} of {module}",
                    "One of them is stale: fetch the checkpoint again into an empty folder.",
                )
            stored[where] = tensors[key]
    return found


def _resolve(skeleton: Skeleton, keys: Iterable[str]) -> Iterable[tuple[str, str, str, tuple[int, int]]]:
    """For each key, as of a plain checkpoint, that may be an expert's: module path, tensor name, (expert, place)."""
    family = skeleton.family
    if family is not None and family.expert_key is not None:
        for key in keys:
            if match := re.fullmatch(family.expert_key, key):
                yield key, match["module"], match["tensor"], (int(match["expert"]), 0)
        return
    transforms = get_model_conversion_mapping(skeleton.model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    from_gguf = is_gguf(skeleton.folder)
    for key in keys:
        if from_gguf and (one := joined(key)) is not None:
            yield key, one[0], one[1], (-1, one[2])
            continue
        # keys of a bare base model lack its prefix: let transformers add it, as when it loads
        renamed, pattern = rename_source_key(key, renamings, converters)
        module, _, name = renamed.rpartition(".")
        prefix = skeleton.model.base_model_prefix
        if module not in skeleton.expert_modules and f"{prefix}.{module}" in skeleton.expert_modules:
            module = f"{prefix}.{module}"
        if module in skeleton.expert_modules:
            where = (-1, 0)
            if pattern is not None:  # it is a pattern of the name behind all renamings
                where = _place(rename_source_key(key, renamings, [])[0], pattern, converters)
            yield key, module, name, where


def _place(key: str, pattern: str, converters: list[Any]) -> tuple[int, int]:
    converter = next(c for c in converters if pattern in c.source_patterns)
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
        raise converted_experts(key, ", ".join(kind.__name__ for kind in kinds))
    regex = pattern.replace("*.", r"(\d+)\.")  # as transformers reads it, but only a number
    match = re.search(regex, key)
    if match is None or not match.groups():
        raise converted_experts(key, f"the pattern {pattern}")
    return int(match[1]), converter.source_patterns.index(pattern)


def _pieces(skeleton: Skeleton, layer: int, spec: TensorSpec, part: Part, stored: _Stored) -> list[ExpertPiece]:
    """The pieces of one part of a layer's tensor: one an expert, or several of equal size that are joined; none if it may lack."""
    if part.optional and not stored:
        return []
    pieces, total, places = [], prod(part.shape), len({place for _, place in stored})
    for expert in range(skeleton.experts):
        record = layer * skeleton.experts + expert
        if stacked := [stored[place] for place in sorted(stored) if place[0] < 0]:
            each = _stored_shape(part, len(stacked)) or part.stored
            for whole in stacked:
                check_shape(whole, (skeleton.experts, *each))
            size = stacked[0].nbytes // skeleton.experts
            found = [(whole, each, expert * size, size) for whole in stacked]
        else:
            apart = [stored[place] for place in sorted(stored) if place[0] == expert]
            wanted = _stored_shape(part, len(apart))
            if len(apart) < places or wanted is None or any(len(one.shape or (1,)) != len(wanted) for one in apart):
                have = [f"{one.key} {list(one.shape)}" for one in apart]
                name = spec.name if spec.format is PLAIN else f"the part {part.name!r} of {spec.name}"
                raise CheckpointError(
                    f"{name} of expert {expert} in {skeleton.expert_modules[layer]} should be {list(part.stored)}, the "
                    f"checkpoint has {have or 'nothing'}",
                    "Checkpoint and config.json disagree: fetch both again.",
                )
            for one in apart:
                check_shape(one, wanted)
            found = [(one, wanted, 0, one.nbytes) for one in apart]
        share = total // len(found)
        pieces += [
            ExpertPiece(
                record=record,
                layer=layer,
                spec=spec,
                part=part,
                begin=number * share,
                count=share,
                source=source,
                stored=shape,
                offset=offset,
                nbytes=nbytes,
            )
            for number, (source, shape, offset, nbytes) in enumerate(found)
        ]
    return pieces


def _stored_shape(part: Part, joined: int) -> tuple[int, ...] | None:
    """The shape of each of the tensors that a part is joined from; None if it cannot be divided among so many."""
    if joined == 0:
        return None
    if part.joined is None or joined == 1:
        return part.stored
    whole = part.stored[part.joined]
    return (
        None
        if whole % joined
        else tuple(size // joined if place == part.joined else size for place, size in enumerate(part.stored))
    )


def _check_piece(piece: ExpertPiece, skeleton: Skeleton, *, convert: bool) -> None:
    if piece.spec.format is PLAIN:
        _check_dtype(piece.source, skeleton, convert=convert)
    else:
        check_part_dtype(piece.source, piece.spec.format, piece.part)


def _check_dtype(tensor: StoredTensor, skeleton: Skeleton, *, convert: bool) -> None:
    dtype = skeleton.dtype
    stored = run_dtype(tensor.dtype)
    if stored is None:
        raise UnsupportedModelError(
            f"{tensor.key!r} is stored as {tensor.dtype}", "Only float32, bfloat16 and float16 weights run exactly."
        )
    if stored != dtype and not convert:
        raise CheckpointError(
            f"{tensor.key!r} is stored as {stored}, {skeleton.dtype_source} {dtype}",
            f"State the dtype to run in (--dtype {stored} or --dtype {dtype}); weights are then converted on loading.",
        )
