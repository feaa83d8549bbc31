"""Plain experts of a checkpoint, quantised while they are read: which tensors become what, and their parts in a record.

This changes the model. Must not know files.
"""

from dataclasses import replace
from math import prod

from torch import Tensor

from expertflow.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import PLAIN
from expertflow.formats.records import RecordLayout
from expertflow.models.skeleton import Skeleton
from expertflow.models.weights.mapping import ExpertMap, ExpertPiece


def in_format(skeleton: Skeleton, spec: TensorSpec, format_: Format) -> TensorSpec:
    """A plain tensor of an expert as a record holds it in a format: weights are packed, gate and up apart; biases are not."""
    if len(spec.shape) == 1:
        return spec
    module = skeleton.model.get_submodule(skeleton.expert_modules[0])
    apart = spec.name == "gate_up_proj" and getattr(module, "is_concatenated", True)
    return replace(spec, format=format_, joined=2 if apart else 1)


def quantised(skeleton: Skeleton, found: ExpertMap) -> ExpertMap:
    """The experts of a checkpoint, to be quantised as the skeleton says; unchanged if it does not say so.

    Raises:
        ConfigError: if they are packed already.
        UnsupportedModelError: if a tensor is stored in pieces that cannot be quantised one by one.
    """
    if (format_ := skeleton.expert_format) is None:
        return found
    specs = {spec for layer in found.layers for spec in layer}
    if packed := next((spec.format.name for spec in specs if spec.format is not PLAIN), ""):
        raise packed_already(skeleton, packed)
    made = {spec: in_format(skeleton, spec, format_) for spec in specs}
    return ExpertMap(
        pieces=[_to_encode(piece, made[piece.spec]) for piece in found.pieces],
        layers=tuple(tuple(made[spec] for spec in layer) for layer in found.layers),
    )


def packed_already(skeleton: Skeleton, stored_as: str) -> ConfigError:
    """The refusal to quantise experts that are not plain numbers."""
    assert skeleton.expert_format is not None
    return ConfigError(
        f"expert_format={skeleton.expert_format.name!r} cannot be had: the experts of {skeleton.folder} are stored as {stored_as}",
        "Leave expert_format out: they run as they are stored.",
    )


def _to_encode(piece: ExpertPiece, spec: TensorSpec) -> ExpertPiece:
    """A piece of a plain tensor that becomes the parts of `spec`, or those of one of its joined tensors.

    Raises:
        UnsupportedModelError: if it is neither.
    """
    if spec.format is PLAIN:
        return piece
    pieces = prod(piece.spec.shape) // piece.count
    if pieces > 1 and (pieces != spec.joined or spec.transposed):
        raise UnsupportedModelError(
            f"{piece.source.key!r} is one of {pieces} pieces of {spec.name}, which cannot be quantised one by one",
            "Leave expert_format out.",
        )
    return replace(piece, encoded=spec)


def encode_piece(piece: ExpertPiece, numbers: Tensor, layout: RecordLayout, record: Tensor) -> None:
    """Quantise what was read of a checkpoint tensor, into its place in a record.

    Args:
        piece: what it is.
        numbers: as in the checkpoint, of the shape `piece.stored`.
        layout: of the record.
        record: uint8 `[record_bytes]`.

    Raises:
        CheckpointError: if a number is not finite.
    """
    spec = piece.encoded
    assert spec is not None
    each = (numbers.t().contiguous() if spec.transposed else numbers).split(spec.outputs // spec.joined)
    for place, one in enumerate(each, piece.begin // piece.count):
        try:
            parts = spec.format.encode(spec.one, one)
        except ValueError as error:
            raise CheckpointError(
                f"{piece.source.key!r} cannot be quantised to {spec.format.name}: {error}",
                "Fetch the checkpoint again, or leave expert_format out.",
            ) from error
        for name, part in parts.items():
            target = layout.part(record, spec.name, name)
            target.view(spec.joined, -1)[place].copy_(part.reshape(-1))
