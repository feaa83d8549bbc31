"""What a test needs of a way to store a packed checkpoint, and how it writes one beside the same numbers, decoded."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Pack = Callable[[str, Tensor, torch.Generator], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way to store a checkpoint.

    Attributes:
        family: of the model.
        quantization: the config's `quantization_config`.
        pack: gives packed tensors by key, and the numbers they stand for, in place of a weight. Takes its key, the weight
            `[outputs, inputs]`, or `[E, outputs, inputs]` where a family stacks experts, and a generator. The numbers are of the
            weight's shape and dtype, and decoded without our formats.
        dense: whether attention is packed, too.
        dtype: to run in.
        sizes: of the model, where they are not the family's tiny ones with two layers.
        plain_layers: layers that are left as they are.
        files: further files of the folder, by name.
    """

    family: str
    quantization: Mapping[str, Any]
    pack: Pack
    dense: bool = False
    dtype: str = "bfloat16"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    plain_layers: tuple[int, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def packs(self, key: str, weight: Tensor) -> bool:
        """Whether a tensor of the plain checkpoint is packed."""
        if weight.ndim < 2 or "bias" in key or any(f"layers.{layer}." in key for layer in self.plain_layers):
            return False
        return (
            weight.ndim == 3
            or ".experts." in key
            or (self.dense and re.search(r"attn\..*proj.*\.weight$", key) is not None)
        )


def write_twins(source: Path, place: Path, layout: Layout) -> tuple[Path, Path]:
    """The folder with random packed weights in place of those of `source`, and the folder with their numbers."""
    packed, decoded = {}, {}
    generator = torch.Generator().manual_seed(3)
    for key, value in load_file(source / "model.safetensors").items():
        if layout.packs(key, value):
            turned = value.ndim == 3 and not key.endswith("weight")  # gpt-oss has inputs first in its own parameters
            tensors, numbers = layout.pack(key, value.mT if turned else value, generator)
            assert numbers.shape == (value.mT if turned else value).shape
            assert numbers.dtype == value.dtype
            packed |= {name: tensor.contiguous() for name, tensor in tensors.items()}
            decoded[key] = (numbers.mT if turned else numbers).contiguous()
        else:
            packed[key] = decoded[key] = value
    folders = (place / "packed", place / "decoded")
    for folder, state in zip(folders, (packed, decoded), strict=True):
        folder.mkdir()
        for file in source.iterdir():
            if file.name != "model.safetensors":
                (folder / file.name).write_bytes(file.read_bytes())
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folders[0] / "config.json").read_text())
    if layout.quantization:
        config["quantization_config"] = layout.quantization
    (folders[0] / "config.json").write_text(json.dumps(config))
    for name, text in layout.files.items():
        (folders[0] / name).write_text(text)
    return folders
