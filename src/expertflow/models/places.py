"""Where a model lies: a checkpoint folder, or a GGUF file. What is read of it, whichever it is.

Must not know how a model is built from it.
"""

from pathlib import Path
from typing import Any

from expertflow.models.files import checkpoint
from expertflow.models.files.checkpoint import StoredTensor, read_json
from expertflow.models.gguf import view
from expertflow.models.gguf.header import is_gguf


def described_by(place: Path) -> Path:
    """The file that holds the config."""
    return place if is_gguf(place) else place / "config.json"


def raw_config(place: Path) -> dict[str, Any]:
    """What config.json says, or would say.

    Raises:
        CheckpointError: if it cannot be read.
        UnsupportedModelError: if a GGUF file is of a kind that does not run.
    """
    return view.read_config(place) if is_gguf(place) else read_json(place / "config.json")


def walk(place: Path) -> dict[str, StoredTensor]:
    """Every tensor, by key, from headers alone. See `files.checkpoint.walk` and `gguf.view.walk`."""
    return view.walk(place) if is_gguf(place) else checkpoint.walk(place)


def context_of(place: Path) -> int | None:
    """The longest sequence the config allows, or None if it sets no bound.

    Raises:
        CheckpointError: if the config cannot be read.
        UnsupportedModelError: as `raw_config`.
    """
    config = raw_config(place)
    text = config.get("text_config")  # of a model that reads other things too
    length = config.get(
        "max_position_embeddings", text.get("max_position_embeddings") if isinstance(text, dict) else None
    )
    return length if isinstance(length, int) else None
