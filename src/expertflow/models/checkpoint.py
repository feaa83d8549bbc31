"""A safetensors checkpoint folder as a list of tensors and where their bytes are.

Reads headers only. Refuses pickles, damaged shards and shards that are not there. Knows no model family.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from expertflow.errors import CheckpointError
from expertflow.models.foreign import ADAPTER_NAME, refuse_foreign

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 1 << 22
"""Bytes read at a time where a tensor is only looked at."""
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]
_LARGEST_HEADER = 100_000_000
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
}  # fmt: skip
FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Safetensors dtypes an expert may have, and our names for them."""


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
    """The checkpoint folder for a path, or for a Hugging Face id.

    Args:
        model: folder or id.
        fetch: whether an id that is not in the local cache may be fetched into it.

    Raises:
        CheckpointError: if there is no such folder, and no such model in the cache or on the hub; or if it holds something
            else than a model.
    """
    folder = Path(model)
    if folder.exists():
        refuse_foreign(folder)
    if folder.is_dir():
        return folder
    name = str(model)
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{name!r} is not a folder", "Give a checkpoint folder or a Hugging Face id.")
    try:
        return Path(
            snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, local_files_only=not fetch)
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise CheckpointError(
            f"{name!r} is neither a folder nor in the Hugging Face cache"
            + (f", and cannot be fetched: {str(error).splitlines()[0]}" if fetch else ""),
            "Give a checkpoint folder, or fetch the model with `hf download` where there is a network.",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        remedy = "Fetch the checkpoint again; a repository of GGUF files or of an adapter is none."
        raise CheckpointError(f"{path} is missing", remedy) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object", "Fetch the checkpoint again.")
    return value


def context_of(folder: Path) -> int | None:
    """The longest sequence the config allows, or None if it sets no bound.

    Raises:
        CheckpointError: if the config cannot be read.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")  # of a model that reads other things too
    length = config.get(
        "max_position_embeddings", text.get("max_position_embeddings") if isinstance(text, dict) else None
    )
    return length if isinstance(length, int) else None


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
        if not (folder / shard).is_file():
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
    inside = isinstance(named, str) and (folder / named).resolve().is_relative_to(folder.resolve())
    if not inside or not named.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{folder / 'config.json'} says transformers_weights={named!r}, which is no safetensors file in the folder",
            "Correct the config, or fetch it again.",
        )
    return _indexed_files(folder / named) if named.endswith(".index.json") else ({}, [named])


def _indexed_files(index: Path) -> tuple[dict[str, str], list[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map", "Fetch the checkpoint again.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} names shards that are no text", "Fetch the checkpoint again.")
    return weight_map, sorted(set(weight_map.values()))


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
    remedy = "The file is damaged or incomplete: fetch it again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{path.name} has no safetensors header ({size} bytes in all)", remedy)
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "Check the file and its permissions.") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path.name} has an unreadable header: {error}", remedy) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name} has an unreadable header: no JSON object", remedy)
    tensors = [_entry(path, key, entry, 8 + length) for key, entry in header.items() if key != "__metadata__"]
    for tensor in tensors:
        bits = _BITS.get(tensor.dtype)
        if bits is None or prod(tensor.shape) * bits != tensor.nbytes * 8:
            raise CheckpointError(
                f"{path.name}: {tensor.key!r} says {tensor.dtype} {list(tensor.shape)} in {tensor.nbytes} bytes", remedy
            )
        if tensor.start + tensor.nbytes > size:
            raise CheckpointError(
                f"{path.name} is truncated: {tensor.key!r} ends at byte {tensor.start + tensor.nbytes} of {size}",
                remedy,
            )
    return tensors


def _entry(path: Path, key: str, entry: Any, base: int) -> StoredTensor:
    try:
        begin, end = (int(offset) for offset in entry["data_offsets"])
        if not 0 <= begin <= end or not isinstance(entry["dtype"], str):
            raise ValueError(entry)  # noqa: TRY301 - one message for every kind of malformed entry
        return StoredTensor(
            key=key,
            file=path,
            dtype=entry["dtype"],
            shape=tuple(int(n) for n in entry["shape"]),
            start=base + begin,
            nbytes=end - begin,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.name}: header entry {key!r} is malformed", "The file is damaged: fetch it again."
        ) from error
