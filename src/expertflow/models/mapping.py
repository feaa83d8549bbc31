"""Which checkpoint bytes are which expert's: keys, resolved through transformers' own conversion table.

Handles experts stored one tensor each, in parts to be joined (gate and up), or stacked over all experts. Reads no
data. Knows nothing of where the bytes will go beyond tensor name and offset.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from expertflow.models.files.checkpoint import FLOAT_NAMES, StoredTensor
from expertflow.models.files.identity import Span
from expertflow.models.refusals import converted_experts, lost_experts
from expertflow.models.skeleton import Skeleton
from expertflow.types import TensorSpec


@dataclass(frozen=True, kw_only=True)
class ExpertPiece:
    """Bytes of one expert's tensor, contiguous both in a file and in the tensor.

    Attributes:
        row: flat number of the expert, `layer * E + index`.
        name: tensor of the expert.
        begin: first element within that tensor.
        source: the checkpoint tensor.
        offset: first byte within the checkpoint tensor.
        nbytes: bytes in the file.
    """

    row: int
    name: str
    begin: int
    source: StoredTensor
    offset: int
    nbytes: int

    @property
    def span(self) -> Span:
        """The part of the checkpoint tensor that it is."""
        return Span(self.source, self.offset, self.nbytes)


def map_experts(skeleton: Skeleton, tensors: Mapping[str, StoredTensor], *, convert: bool) -> list[ExpertPiece]:
    """Find every expert tensor of the model in the checkpoint.

    Args:
        skeleton: the model.
        tensors: the checkpoint.
        convert: whether expert tensors may be of another float dtype than the model runs in.

    Returns:
        Pieces that together cover every tensor of every expert exactly once, in file order.

    Raises:
        CheckpointError: if a tensor is missing, is there under two names, or has another shape or dtype than the config says.
        UnsupportedModelError: if the family stores experts in a way that has to be computed.
    """
    found = _collect(skeleton, tensors)
    specs = {spec.name: spec for spec in skeleton.specs}
    pieces: list[ExpertPiece] = []
    for layer, module in enumerate(skeleton.expert_modules):
        for spec in specs.values():
            stored = found.pop((module, spec.name), None)
            if stored is None:
                if lost := next((key for key in tensors if key.endswith("$")), None):
                    raise lost_experts(skeleton.folder, lost)
                raise CheckpointError(
                    f"the checkpoint holds no {spec.name} for {module}", "It does not match its config: fetch it again."
                )
            pieces += _pieces(skeleton, layer, spec, stored)
    for piece in pieces:
        _check_dtype(piece.source, skeleton, convert=convert)
    return sorted(pieces, key=lambda piece: (piece.source.file, piece.source.start + piece.offset))


def check_dense(skeleton: Skeleton, tensors: Mapping[str, StoredTensor], *, convert: bool) -> None:
    """Hold every tensor that is no expert's against the model, from headers alone.

    Tensors that transformers computes from several others are left to its own checks on loading. float32 is accepted
    for any dtype, as transformers does: checkpoints keep some router biases in it.

    Args:
        skeleton: the model.
        tensors: the checkpoint.
        convert: whether tensors may be of another float dtype than the model runs in.

    Raises:
        CheckpointError: if a tensor has another shape or dtype than the config says.
        UnsupportedModelError: if weights are stored as integers.
    """
    wanted = dict([*skeleton.model.named_parameters(), *skeleton.model.named_buffers()])
    transforms = get_model_conversion_mapping(skeleton.model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    for key, tensor in tensors.items():
        renamed, pattern = rename_source_key(key, renamings, converters)
        named = renamed if renamed in wanted else f"{skeleton.model.base_model_prefix}.{renamed}"
        if pattern is None and named in wanted:
            _check_shape(tensor, tuple(wanted[named].shape))
            if wanted[named].is_floating_point():
                _check_dtype(tensor, skeleton, convert=convert or tensor.dtype == "F32")


_Stored = dict[tuple[int, int], StoredTensor]
"""(expert, part) -> tensor; expert -1 holds all experts stacked."""


def _collect(skeleton: Skeleton, tensors: Mapping[str, StoredTensor]) -> dict[tuple[str, str], _Stored]:
    targets = {(path, spec.name) for path in skeleton.expert_modules for spec in skeleton.specs}
    found: dict[tuple[str, str], _Stored] = {}
    for key, module, name, where in _resolve(skeleton, tensors):
        if (module, name) in targets:
            stored = found.setdefault((module, name), {})
            same = next((place for place in stored if place == where or -1 in (place[0], where[0])), None)
            if same is not None:
                raise CheckpointError(
                    f"{stored[same].key!r} and {key!r} are both {name} of {module}",
                    "One of them is stale: fetch the checkpoint again into an empty folder.",
                )
            stored[where] = tensors[key]
    return found


def _resolve(skeleton: Skeleton, keys: Iterable[str]) -> Iterable[tuple[str, str, str, tuple[int, int]]]:
    """For each key that may be an expert's: module path, tensor name, (expert, part)."""
    family = skeleton.family
    if family is not None and family.expert_key is not None:
        for key in keys:
            if match := re.fullmatch(family.expert_key, key):
                yield key, match["module"], match["tensor"], (int(match["expert"]), 0)
        return
    transforms = get_model_conversion_mapping(skeleton.model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    for key in keys:
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


def _pieces(skeleton: Skeleton, layer: int, spec: TensorSpec, stored: _Stored) -> list[ExpertPiece]:
    pieces = []
    for expert in range(skeleton.experts):
        row = layer * skeleton.experts + expert
        if (-1, 0) in stored:
            whole = stored[-1, 0]
            _check_shape(whole, (skeleton.experts, *spec.shape))
            size = whole.nbytes // skeleton.experts
            pieces.append(
                ExpertPiece(row=row, name=spec.name, begin=0, source=whole, offset=expert * size, nbytes=size)
            )
            continue
        parts = [stored[place] for place in sorted(stored) if place[0] == expert]
        if not parts or sum(part.shape[0] for part in parts) != spec.shape[0]:
            have = [f"{part.key} {list(part.shape)}" for part in parts]
            raise CheckpointError(
                f"{spec.name} of expert {expert} in {skeleton.expert_modules[layer]} should be {list(spec.shape)}, the "
                f"checkpoint has {have or 'nothing'}",
                "Checkpoint and config.json disagree: fetch both again.",
            )
        begin = 0
        for part in parts:
            _check_shape(part, (part.shape[0], *spec.shape[1:]))
            pieces.append(ExpertPiece(row=row, name=spec.name, begin=begin, source=part, offset=0, nbytes=part.nbytes))
            begin += prod(part.shape)
    return pieces


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.key!r} is {list(tensor.shape)}, the config says {list(shape)}",
            "Checkpoint and config.json disagree: fetch both again.",
        )


def _check_dtype(tensor: StoredTensor, skeleton: Skeleton, *, convert: bool) -> None:
    dtype = skeleton.dtype
    stored = FLOAT_NAMES.get(tensor.dtype)
    if stored is None:
        raise UnsupportedModelError(
            f"{tensor.key!r} is stored as {tensor.dtype}", "Only float32, bfloat16 and float16 weights run exactly."
        )
    if stored != dtype and not convert:
        raise CheckpointError(
            f"{tensor.key!r} is stored as {stored}, {skeleton.dtype_source} {dtype}",
            f"State the dtype to run in (--dtype {stored} or --dtype {dtype}); weights are then converted on loading.",
        )
