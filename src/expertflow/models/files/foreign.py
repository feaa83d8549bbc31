"""Places that hold no model that can be read: what they hold, and how to make one of it.

Looks at names of files only. Must not import torch, so that a command can refuse such a place at once.
"""

from pathlib import Path

from expertflow.errors import CheckpointError

ADAPTER_NAME = "adapter_config.json"


def refuse_foreign(place: Path) -> None:
    """Refuse a place that holds something else than a model in transformers' format or a GGUF file.

    Args:
        place: a file, or a folder; a GGUF file and a folder with a config.json are left to later checks.

    Raises:
        CheckpointError: for another file, an adapter, or a folder of GGUF files.
    """
    if place.is_file():
        if place.suffix.lower() == ".gguf":
            return
        raise CheckpointError(
            f"{place} is a file, and a checkpoint is a folder or a GGUF file",
            "Give the folder that holds config.json and the weights, or a file that ends with .gguf.",
        )
    folder = place
    if (folder / "config.json").is_file():
        return
    if (folder / ADAPTER_NAME).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER_NAME}) and no model",
            "Merge it into its base model (pip install peft), then give the new folder:\n"
            + lines(
                "from peft import AutoPeftModelForCausalLM",
                f"model = AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').merge_and_unload()",
                "model.save_pretrained('merged', save_original_format=False)",
            ),
        )
    if files := sorted(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds GGUF files and no config.json", f"Give the path of one of them, such as {files[0]}."
        )


def lines(*code: str) -> str:
    """Lines of Python for an error message, indented so that they stand apart."""
    return "\n".join(f"    {line}" for line in code)
