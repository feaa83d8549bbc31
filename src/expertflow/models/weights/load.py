"""Weights from a checkpoint folder or a GGUF file: the dense part into a transformers model, experts straight into host records.

Expert tensors are read from the file into their place in the record, by several threads, without a memory map and
without a second copy. Dense tensors are handed to transformers by key, so that it looks for no file by itself.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from expertflow.errors import CheckpointError, UnreadWarning
from expertflow.formats.dtypes import BY_STORED_NAME
from expertflow.formats.format import Part
from expertflow.formats.plain import PLAIN
from expertflow.formats.records import ExpertStore
from expertflow.models.bounds import check_config, describing
from expertflow.models.context import ForwardContext
from expertflow.models.experts import Binding, ExpertProvider
from expertflow.models.files.checkpoint import StoredTensor, read_json
from expertflow.models.files.identity import ContentHash, Span, in_threads
from expertflow.models.gguf.header import is_gguf
from expertflow.models.gguf.view import GgufStored
from expertflow.models.places import described_by
from expertflow.models.skeleton import Skeleton
from expertflow.models.weights.dense import DecodedOnRead, PackedTensor
from expertflow.models.weights.encode import encode_piece
from expertflow.models.weights.mapping import ExpertPiece
from expertflow.models.weights.packing import Packing

_NAMED = 5
"""Tensors that a warning names."""
_Advance = Callable[[int], None]


def load_dense(
    skeleton: Skeleton,
    dense: Mapping[str, StoredTensor],
    packed: Mapping[str, PackedTensor],
    device: torch.device,
) -> PreTrainedModel:
    """Load everything but the experts through transformers, then move it to the device.

    Args:
        skeleton: the model.
        dense: the checkpoint's tensors without its experts, by key.
        packed: those that are packed, by the key of an unpacked checkpoint.
        device: where the weights go.

    Raises:
        CheckpointError: if a dense weight is missing, has another shape than in the config, or cannot be read.
    """
    dtype = getattr(torch, skeleton.dtype)
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with ExitStack() as files:
            state = _dense_state(files, dense, packed)
            model, report = skeleton.model_class.from_pretrained(
                None, config=skeleton.config, state_dict=state, dtype=dtype, output_loading_info=True
            )
        _load_generation_config(model, skeleton.folder)
    except (RuntimeError, OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{skeleton.folder} cannot be loaded: {str(error).splitlines()[0]}",
            "Checkpoint and config.json disagree: fetch both again.",
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} weights, first {missing[0]!r}", "Fetch the checkpoint again."
        )
    if unread := sorted(report["unexpected_keys"]):
        named = ", ".join(unread[:_NAMED]) + (", ..." if len(unread) > _NAMED else "")
        warnings.warn(
            f"the model that {described_by(skeleton.folder)} describes has no place for {len(unread)} of the checkpoint's "
            f"tensors, which are not used: {named}",
            UnreadWarning,
            stacklevel=2,
        )
    model.eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        # out of the file's memory map: there it is 16-byte aligned only, and results depend on alignment
        tensor.data = tensor.data.to(device) if device.type != "cpu" else tensor.data.clone()
    return model


def _dense_state(
    files: ExitStack, dense: Mapping[str, StoredTensor], packed: Mapping[str, PackedTensor]
) -> dict[str, Any]:
    """What transformers reads in place of files: slices of them, and packed tensors that are decoded when they are read."""
    paths = {tensor.file for tensor in dense.values() if not isinstance(tensor, GgufStored)}
    opened = {path: files.enter_context(safe_open(path, framework="pt")) for path in paths}
    # threads of transformers read them: each its own slice, since a file cannot be asked by two at once
    slices: dict[str, Any] = {
        key: tensor.read() if isinstance(tensor, GgufStored) else opened[tensor.file].get_slice(key)
        for key, tensor in dense.items()
    }

    def read(tensor: StoredTensor) -> Tensor:
        whole: Tensor = slices[tensor.key][...]
        return whole

    parts = {tensor.key for one in packed.values() for tensor in one.parts.values()}
    state = {key: one for key, one in slices.items() if key not in parts}
    return state | {key: DecodedOnRead(one, read) for key, one in packed.items()}


def _load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """The folder's generation config, or the part of the config that speaks of generation, as transformers has it."""
    model.name_or_path = model.config.name_or_path = str(folder)
    if is_gguf(folder):
        model.generation_config = GenerationConfig.from_model_config(model.config)
        return
    path, known = folder / "generation_config.json", {}
    if path.is_file():
        check_config(path, read_json(path))
    else:
        path, known = folder / "config.json", {"_from_model_config": True, "config_file_name": "config.json"}
    with describing(path, "says nothing of generation that can be used"):
        model.generation_config = GenerationConfig.from_pretrained(folder, **known)


def fill_records(
    pieces: Sequence[ExpertPiece], records: ExpertStore, content: ContentHash, device: torch.device, advance: _Advance
) -> None:
    """Read every part of every expert into its record.

    Args:
        pieces: what to read, in file order.
        records: where it goes.
        device: of the model; a GPU helps to pack.
        content: takes the hash of every piece.
        advance: called with the bytes read, from several threads.

    Raises:
        CheckpointError: if a file ends early or cannot be read.
    """
    descriptors: dict[Path, int] = {}
    by_span, packing = {piece.span: piece for piece in pieces}, Packing(device)

    def read(span: Span) -> None:
        _read_piece(descriptors[span.tensor.file], by_span[span], records, content, packing)
        advance(span.nbytes)

    try:
        for path in {piece.source.file for piece in pieces}:
            descriptors[path] = os.open(path, os.O_RDONLY)
        with _one_thread_each():
            in_threads(read, by_span)
    except OSError as error:
        raise CheckpointError(f"expert weights cannot be read: {error}", "Check the files and the disk.") from error
    finally:
        packing.close()
        for descriptor in descriptors.values():
            os.close(descriptor)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Threads that are started inside compute by themselves: else each would start as many as torch has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read_piece(
    descriptor: int, piece: ExpertPiece, records: ExpertStore, content: ContentHash, packing: Packing
) -> None:
    source, part, spec = piece.source, piece.part, piece.spec
    stored = getattr(torch, BY_STORED_NAME[source.dtype])
    if piece.encoded is not None:
        read = packing.landing(piece.nbytes)
        _read_hashed(descriptor, read, piece, content)
        numbers = read.view(stored).view(piece.stored)
        encode_piece(piece, numbers, records.layout.layers[piece.layer], records.record(piece.record))
        return
    target = _target(records, piece, part)
    also = [other for other in spec.parts if other.source == part.name]
    exact = target.dtype == stored and target.is_contiguous()
    if exact and part.name not in spec.format.repacked and not also:
        _read_hashed(descriptor, target.view(torch.uint8), piece, content)
        return
    read = packing.landing(piece.nbytes)
    _read_hashed(descriptor, read, piece, content)
    one = spec.one if piece.joined else spec
    for each in (part, *also):
        where = partial(_target, records, piece, each)
        packing.pack(one, each, source, read.view(stored).view(piece.stored), where)


def _target(records: ExpertStore, piece: ExpertPiece, part: Part) -> Tensor:
    """Where a piece goes within a part of its record: that of the piece, or one that its checkpoint tensor holds as well."""
    spec = piece.spec
    whole = records.layout.layers[piece.layer].part(records.record(piece.record), spec.name, part.name).view(-1)
    if spec.format is PLAIN and spec.interleaved:  # biases, which kernels read in the module's order
        return whole.view(-1, spec.joined)[:, piece.begin // piece.count]
    begin, end = (
        place * whole.numel() // max(prod(piece.part.shape), 1) for place in (piece.begin, piece.begin + piece.count)
    )
    return whole[begin:end]


def _read_hashed(descriptor: int, target: Tensor, piece: ExpertPiece, content: ContentHash) -> None:
    _read_into(descriptor, target, piece.source, piece.offset)
    content.take(piece.span, [memoryview(target.numpy().data)])


def _read_into(descriptor: int, target: Tensor, source: StoredTensor, offset: int) -> None:
    view = memoryview(target.numpy().data)
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], source.start + offset + done)
        if count == 0:
            raise CheckpointError(f"{source.file.name} ended while reading {source.key!r}", "Fetch the file again.")
        done += count


def bind_experts(
    model: nn.Module, skeleton: Skeleton, provider: ExpertProvider, context: ForwardContext | None = None
) -> None:
    """Give every experts module of a loaded model its layer, where its weights come from, and what passes carry."""
    context = context or ForwardContext()
    for layer, path in enumerate(skeleton.expert_modules):
        module = model.get_submodule(path)
        module.expertflow = Binding(  # type: ignore[assignment]  # plain data on a module
            layer=layer, provider=provider, own_forward=skeleton.family is None, context=context
        )


def unbind_experts(model: nn.Module, skeleton: Skeleton) -> None:
    """Make the experts modules forget their provider, so that its memory can go."""
    for path in skeleton.expert_modules:
        del model.get_submodule(path).expertflow
