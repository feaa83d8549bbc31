"""A safetensors checkpoint folder as a list of tensors and where their bytes are.

Reads headers only. Refuses pickles, damaged shards and shards that are not there. Knows no model family.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from expertflow.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
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
        CheckpointError: if there is no such folder, and no such model in the cache or on the hub.
    """
    folder = Path(model)
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
        raise CheckpointError(f"{path} is missing", "Fetch the checkpoint again.") from error
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
    length = read_json(folder / "config.json").get("max_position_embeddings")
    return length if isinstance(length, int) else None


def walk(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, by key, from the shard headers alone.

    Raises:
        CheckpointError: for pickles, a missing or truncated shard, a damaged header, or an index that lies.
    """
    if (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map", "Fetch the checkpoint again.")
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX_NAME} names shards that are no text", "Fetch the checkpoint again.")
        shards = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        weight_map, shards = None, [SINGLE_NAME]
    else:
        _refuse_without_safetensors(folder)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"the index names shard {shard}, which is not in {folder}", "Fetch the missing shard."
            )
        tensors.update((tensor.key, tensor) for tensor in _read_header(folder / shard))
    for key in weight_map or ():
        if key not in tensors:
            raise CheckpointError(
                f"the index names tensor {key!r}, which no shard holds", "Fetch the checkpoint again."
            )
    return tensors


def _refuse_without_safetensors(folder: Path) -> NoReturn:
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code when loaded and are never read",
            "Convert it with `save_pretrained(..., safe_serialization=True)` where you trust it.",
        )
    raise CheckpointError(f"{folder} holds no safetensors weights", f"It needs {SINGLE_NAME} or {INDEX_NAME}.")


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
