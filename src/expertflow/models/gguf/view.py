"""A GGUF file as transformers would have it: a config, and tensors by the names that they have in the module.

Must not know how weights are loaded and run.
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertflow.errors import CheckpointError
from expertflow.formats.dtypes import BY_STORED_NAME
from expertflow.models.files.checkpoint import StoredTensor
from expertflow.models.gguf.architectures import Architecture, architecture_of, config_of, key_of
from expertflow.models.gguf.header import GgufTensor, read_header

_PLAIN = ("F32", "F16", "BF16")
_JOINED = re.compile(r"(?P<module>.+\.experts)\.(?P<tensor>\w+)\.(?P<place>\d)")


@dataclass(frozen=True, kw_only=True)
class GgufStored(StoredTensor):
    """A tensor of a GGUF file. Its key is the module's name for it; packed, that is followed by its type, and `dtype` is U8.

    Attributes:
        heads: where rows alternate between the halves of each head: how many heads there are; else 0.
    """

    heads: int = 0

    def read(self) -> Tensor:
        """Its bytes or numbers as the module has them, mapped from the file.

        Raises:
            CheckpointError: if the file cannot be mapped.
        """
        try:
            mapped = np.memmap(self.file, dtype=np.uint8, mode="c", offset=self.start, shape=(self.nbytes,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} cannot be read: {error}", "Fetch the file again.") from error
        whole = torch.from_numpy(mapped).view(getattr(torch, BY_STORED_NAME[self.dtype])).view(self.shape)
        if not self.heads:
            return whole
        return whole.view(self.heads, -1, 2, *self.shape[1:]).transpose(1, 2).reshape(self.shape)


def read_config(path: Path) -> dict[str, Any]:
    """What config.json of the model would say, made from a file's metadata.

    Raises:
        CheckpointError: if the file is damaged.
        UnsupportedModelError: if it is of an architecture or of types that do not run.
    """
    header = read_header(path)
    return config_of(architecture_of(header, path.name), header, path.name)


def walk(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file, by key. Reads headers only.

    Raises:
        CheckpointError: if the file is damaged.
        UnsupportedModelError: if it is of an architecture or of types that do not run, or has tensors of another kind.
    """
    header = read_header(path)
    architecture = architecture_of(header, path.name)
    config = config_of(architecture, header, path.name)
    stored = [_stored(architecture, config, tensor) for tensor in header.tensors.values()]
    return {tensor.key: tensor for tensor in stored}


def _stored(architecture: Architecture, config: dict[str, Any], tensor: GgufTensor) -> GgufStored:
    key = key_of(architecture, tensor.name, int(config["num_hidden_layers"]))
    # experts whose module has them in another order are decoded, also from plain numbers; biases are read as they are
    plain = tensor.type in _PLAIN and not (architecture.reordered and tensor.name.endswith("_exps.weight"))
    shape = tensor.shape if plain else tensor.byte_shape
    if key.endswith(".shared_expert_gate.weight") and len(shape) == 1:  # one output, which files leave out
        shape = (1, *shape)
    heads = 0
    if architecture.permuted and tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
        heads = int(config["num_attention_heads" if ".attn_q." in tensor.name else "num_key_value_heads"])
        if tensor.shape[0] % (2 * max(heads, 1)):
            raise CheckpointError(
                f"{tensor.name!r} has {tensor.shape[0]} rows, which are no whole heads", "Fetch the file again."
            )
    return GgufStored(
        key=key if plain else f"{key}.{tensor.type}",
        file=tensor.file,
        dtype=tensor.type if plain else "U8",
        shape=shape,
        start=tensor.start,
        nbytes=prod(tensor.byte_shape),
        heads=heads,
    )


def joined(key: str) -> tuple[str, str, int] | None:
    """Module path, tensor name and place of a tensor that holds one of several joined ones of all experts; None: another key."""
    found = _JOINED.fullmatch(key)
    return None if found is None else (found["module"], found["tensor"], int(found["place"]))
