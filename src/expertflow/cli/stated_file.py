"""`--config FILE`: options of a command from a YAML file. Options on the command line count more.

Must not know commands.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from expertflow.config import nearest
from expertflow.errors import ConfigError
from expertflow.outside import read_bytes


def take_defaults(context: typer.Context, file: Path | None) -> Path | None:
    """Callback of the option: make what the file says the command's defaults.

    Raises:
        ConfigError: if the file cannot be read, is no mapping, or names what is no option.
    """
    if file is not None:
        context.default_map = {**(context.default_map or {}), **read_options(context, file)}
    return file


def read_options(context: typer.Context, file: Path) -> dict[str, Any]:
    """The options of a file, by the names of the command's parameters."""
    if find_spec("yaml") is None:
        raise ConfigError("--config needs PyYAML", "Install it: pip install 'expertflow-moe[serve]'.")
    yaml = __import__("yaml")
    try:
        found = yaml.safe_load(read_bytes(file))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "Give a YAML file of options.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} holds no options", "Write `name: value`, one a line.")
    known = {
        word.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for word in (*parameter.opts, *parameter.secondary_opts)
    }
    options = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        parameter = known.get(name)
        if parameter is None or parameter.name is None or name in {"config", "help"}:
            words = [word.replace("_", "-") for word in known]
            raise ConfigError(f"{file}: unknown option {key!r}", nearest(str(key), words))
        several = getattr(parameter, "multiple", False)
        options[parameter.name] = [value] if several and not isinstance(value, list) else value
    return options
