"""Pictures and JSON files that a command is to write: what cannot be written is refused before the work."""

from importlib.util import find_spec
from pathlib import Path

from expertflow.errors import ConfigError
from expertflow.outside import is_folder, name_fault


def check_outputs(plot: Path | None, json_file: Path | None) -> None:
    """Refuse what could not be written.

    Args:
        plot: a picture, drawn with matplotlib, or None.
        json_file: a JSON file, or None.

    Raises:
        ConfigError: if a folder is missing or named as the file, the ending is no picture's, or matplotlib is missing.
    """
    for path in (plot, json_file):
        if path is not None and not is_folder(path.parent):
            raise ConfigError(f"the folder {path.parent} does not exist", "Make it, or choose another place.")
        if path is not None and is_folder(path):
            raise ConfigError(f"{path} cannot be written: it is a folder", "Name a file in it.")
        if path is not None and (fault := name_fault(path, ".part")):
            raise ConfigError(f"{path} cannot be written: {fault}", "Choose another name.")
    if plot is None:
        return
    if plot.suffix not in {".png", ".svg", ".pdf"}:
        raise ConfigError(f"{plot} names no picture", "Let it end in .png, .svg or .pdf.")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib", "Install it: pip install 'expertflow-moe[plot]'.")
