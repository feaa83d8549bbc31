"""Places that hold no model in transformers' format: what they hold, and how to make one of it.

Looks at names of files only. Must not import torch, so that a command can refuse such a place at once.
"""

from pathlib import Path

from expertflow.errors import CheckpointError

ADAPTER_NAME = "adapter_config.json"


def refuse_foreign(place: Path) -> None:
    """Refuse a place that holds something else than a model in transformers' format.

    Args:
        place: a file, or a folder; a folder with a config.json is left to later checks.

    Raises:
        CheckpointError: for a file, an adapter, or a folder of GGUF files.
    """
    if place.is_file():
        raise (
            _gguf(place)
            if place.suffix == ".gguf"
            else CheckpointError(
                f"{place} is a file, and a checkpoint is a folder",
                "Give the folder that holds config.json and the weights.",
            )
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
        raise _gguf(files[0])


def _gguf(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a GGUF file, and only safetensors checkpoints in transformers' format run",
        "Give the checkpoint it was made from, which the GGUF model's page names, in bfloat16.",
    )


def lines(*code: str) -> str:
    """Lines of Python for an error message, indented so that they stand apart."""
    return "\n".join(f"    {line}" for line in code)
