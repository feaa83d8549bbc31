"""A safetensors checkpoint folder as a list of tensors and where their bytes are.

Reads headers only. Refuses pickles, damaged shards and shards that are not there. Must not know model families.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from expertflow import outside
from expertflow.errors import CheckpointError
from expertflow.models.files.foreign import ADAPTER_NAME, refuse_foreign

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 1 << 22
"""Bytes read at a time where a tensor is only looked at."""
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]
_LARGEST_SETTINGS = 1 << 24
"""Bytes of a config; an index may have more."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor's bytes are.

    Attributes:
        key: name in the checkpoint.
        file: shard.
        dtype: safetensors name, such as `BF16`.
        shape: dimensions.
        start: absolute byte offset in the file.
        nbytes: bytes of the data.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def resolve(model: str | Path, *, fetch: bool = True) -> Path:
    """The checkpoint folder or GGUF file for a path, or the folder for a Hugging Face id.

    Args:
        model: folder, GGUF file, or id.
        fetch: whether an id that is not in the local cache may be fetched into it.

    Raises:
        CheckpointError: if there is no such folder, and no such model in the cache or on the hub; or if it holds something
            else than a model.
    """
    folder = Path(model)
    if os.path.exists(folder):  # noqa: PTH110 - pathlib raises for names that are too long
        refuse_foreign(folder)
    if outside.is_folder(folder) or outside.is_file(folder):  # a GGUF file, as others were refused
        return folder
    name = str(model)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name!r} is not a folder, and no GGUF file",
            "Give a checkpoint folder, a GGUF file, or a Hugging Face id.",
        )
    try:
        fetched = Path(
            snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=not fetch)
        )
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{name!r} is neither a folder nor in the Hugging Face cache"
            + (
                f", and cannot be fetched: {next(iter(str(error).splitlines()), type(error).__name__)}" if fetch else ""
            ),
            "Give a checkpoint folder, or fetch the model with `hf download` where there is a network.",
        ) from error
    refuse_foreign(fetched)
    return fetched


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. NaN and infinity are floats in it: transformers writes them in some configs.

    Raises:
        CheckpointError: if the file is missing, too large, malformed or no JSON object.
    """
    most = outside.LARGE if path.name.endswith(".index.json") else _LARGEST_SETTINGS
    try:
        value = outside.read_json(path, most, finite=False)
    except FileNotFoundError as error:
        remedy = "Fetch the checkpoint again. Of a repository of GGUF files, fetch one file and give its path."
        raise CheckpointError(f"{path} is missing", remedy) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", "Fetch the checkpoint again.")
    return value


def walk(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by key, from the shard headers alone.

    The one view of a folder: experts, dense weights, hashes and plan all come from it. What it takes is what transformers takes:
    the file that the config names as `transformers_weights`, else `model.safetensors`, else the shards of the index.

    Raises:
        CheckpointError: for pickles, a missing or truncated shard, a damaged header, an index that lies, two different copies
            of a tensor, or an adapter beside the weights.
    """
    if (folder / ADAPTER_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_NAME}), which is not applied here", "Merge it into the weights first."
        )
    weight_map, shards = _files_of(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not outside.is_file(folder / shard):
            raise CheckpointError(
                f"the index names shard {shard}, which is not in {folder}", "Fetch the missing shard."
            )
        for tensor in _read_header(folder / shard):
            if (other := tensors.get(tensor.key)) is not None:
                _refuse_other_copy(other, tensor)
            tensors[tensor.key] = tensor
    for key in weight_map:
        if key not in tensors:
            raise CheckpointError(
                f"the index names tensor {key!r}, which no shard holds", "Fetch the checkpoint again."
            )
    return tensors


def _files_of(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The index's map of tensors to shards, empty without an index, and the files in the order in which they are read."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = config.get("transformers_weights")
    if named is not None:
        return _named_files(folder, named)
    if (folder / SINGLE_NAME).is_file():
        return {}, [SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        return _indexed_files(folder / INDEX_NAME)
    raise _no_safetensors(folder)


def _named_files(folder: Path, named: Any) -> tuple[dict[str, str], list[str]]:
    """What the config's `transformers_weights` names."""
    if not _inside(named) or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{folder / 'config.json'} names transformers_weights={named!r}, which is no safetensors file in the folder",
            "Correct the config, or fetch it again.",
        )
    return _indexed_files(folder / named) if named.endswith(".index.json") else ({}, [named])


def _indexed_files(index: Path) -> tuple[dict[str, str], list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "Fetch the checkpoint again.")
    for shard in weight_map.values():
        if not _inside(shard):
            raise CheckpointError(
                f"{index} names a shard {str(shard)[:200]!r}, which is no file of the folder",
                "Fetch the checkpoint again.",
            )
    return weight_map, sorted(set(weight_map.values()))


def _inside(name: Any) -> bool:
    """Whether a name leads to a place in the folder. Links are followed: the cache of the hub is made of them."""
    if not isinstance(name, str):
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _refuse_other_copy(one: StoredTensor, other: StoredTensor) -> None:
    """Two shards hold a tensor of one name: the index names one, transformers reads the last, so they must be equal.

    Raises:
        CheckpointError: if they differ.
    """
    same = (one.dtype, one.shape, one.nbytes) == (other.dtype, other.shape, other.nbytes)
    if not same or any(ours != theirs for ours, theirs in zip(chunks_of(one), chunks_of(other), strict=True)):
        raise CheckpointError(
            f"{one.file.name} and {other.file.name} hold different copies of {one.key!r}",
            "One of them is stale: fetch the checkpoint again into an empty folder.",
        )


def chunks_of(tensor: StoredTensor, offset: int = 0, nbytes: int | None = None) -> Iterator[bytes]:
    """The bytes of a tensor, or of a part of it, in pieces of at most `CHUNK_BYTES`.

    Raises:
        CheckpointError: if the file ends early or cannot be read.
    """
    left = tensor.nbytes - offset if nbytes is None else nbytes
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.start + offset)
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(
                        f"{tensor.file.name} ended while reading {tensor.key!r}", "Fetch the file again."
                    )
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(
            f"{tensor.file} cannot be read: {error}", "Check the file and its permissions."
        ) from error


def _no_safetensors(folder: Path) -> CheckpointError:
    """Why a folder without safetensors weights is refused."""
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        return CheckpointError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when loaded and are never read",
            "Convert it with `save_pretrained(..., safe_serialization=True)` where you trust it.",
        )
    return CheckpointError(f"{folder} holds no safetensors weights", f"It needs {SINGLE_NAME} or {INDEX_NAME}.")


def _read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a shard.

    The safetensors library checks the header first: types, sizes, no overlaps, no holes. Then only offsets are read here.
    """
    remedy = "The file is damaged or incomplete: fetch it again."
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = outside.parse_json(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Check the file and its permissions.") from error
    except (SafetensorError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path.name} is no whole safetensors file: {error}", remedy) from error
    tensors = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if not isinstance(entry, dict):  # the library takes a list of the values too
            raise CheckpointError(f"{path.name}: header entry {key!r} is malformed", remedy)
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors.append(
            StoredTensor(
                key=key, file=path, dtype=entry["dtype"], shape=shape, start=8 + length + begin, nbytes=end - begin
            )
        )
    return tensors
