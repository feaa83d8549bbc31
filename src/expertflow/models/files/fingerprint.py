"""The fingerprint of a checkpoint's weights: a short name of their content, cheap to compute.

Traces and predictors carry it, so that what was learned from one model is not used on another. Hashes tensor names,
dtypes, shapes and a sample of bytes; the same weights in other shards have the same fingerprint.
"""

import hashlib
from collections.abc import Mapping

from expertflow.errors import CheckpointError
from expertflow.models.files.checkpoint import StoredTensor

_SAMPLED = 64
_BYTES = 4096


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Sixteen hexadecimal digits.

    Args:
        tensors: of a checkpoint, as `checkpoint.walk` lists them.

    Raises:
        CheckpointError: if a shard cannot be read.
    """
    digest = hashlib.sha256()
    keys = sorted(tensors)
    for key in keys:
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tensor.shape}\n".encode())
    for number in range(min(_SAMPLED, len(keys))):
        tensor = tensors[keys[number * len(keys) // min(_SAMPLED, len(keys))]]
        try:
            with tensor.file.open("rb") as file:
                file.seek(tensor.start + max(0, tensor.nbytes - _BYTES) // 2)
                digest.update(file.read(min(_BYTES, tensor.nbytes)))
        except OSError as error:
            raise CheckpointError(
                f"{tensor.file} cannot be read: {error}", "Check the file and its permissions."
            ) from error
    return digest.hexdigest()[:16]
