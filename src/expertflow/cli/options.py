"""Options of the commands: those of `EngineConfig` and `SamplingParams` from their fields, and others that several commands have.

A command takes a group of options as one parameter, annotated with `Fields`; `@grouped` turns it into one option a field.
An option is declared in `config` alone: name, type, default and help are read from there. Must not know what options do.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from expertflow.config import EngineConfig, Option, options_of


@dataclass(frozen=True)
class Fields:
    """Annotation of a command's parameter that gets the options of a group which were given, by field.

    Args:
        of: `EngineConfig` or `SamplingParams`.
        without: fields that are no options of this command.
        defaults: other defaults than the fields', by field.
        chosen: what the command chooses where an option is not given, by field; the field is then left out.
        aliases: further names of options, by field.
    """

    of: type
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> list[Option]:
        """The options of the command, in the order of the fields."""
        return [option for option in options_of(self.of) if option.typed and option.name not in self.without]

    def parameter(self, option: Option) -> inspect.Parameter:
        """What typer reads: name, type, default and help of an option."""
        if option.off:
            name, text = option.off
            shown = typer.Option(f"--{name.replace('_', '-')}", help=text)
            return _keyword(name, Annotated[bool, shown], default=False)
        kind: Any = list[option.kind] if option.several else option.kind  # type: ignore[name-defined]  # known when it runs
        text = f"{option.text} May be given several times." if option.several else option.text
        default = self.defaults.get(option.name, option.default)
        if option.several or option.name in self.chosen:
            default = None
        if default is None:
            kind, none = kind | None, self.chosen.get(option.name, option.none)
            text += f" Default: {none}." if none else ""
        alias = self.aliases.get(option.name)
        names = [] if alias is None else [f"--{option.name.replace('_', '-')}", alias]
        return _keyword(option.name, Annotated[kind, typer.Option(*names, help=as_typed(text))], default=default)

    def given(self, values: dict[str, Any]) -> dict[str, Any]:
        """Take this group's values out of a command's, and return those that were given, by field."""
        found = {}
        for option in self.options():
            value = values.pop(option.off[0] if option.off else option.name)
            if value is not None:
                found[option.name] = not value if option.off else tuple(value) if option.several else value
        return found


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of its groups; every other parameter stays as it is."""
    own = inspect.signature(command)
    groups = {name: group for name, one in own.parameters.items() if (group := _group_of(one)) is not None}

    @wraps(command)
    def run(**values: Any) -> None:
        found = {name: group.given(values) for name, group in groups.items()}
        command(**values, **found)

    parameters = [
        each
        for name, one in own.parameters.items()
        for each in (map(groups[name].parameter, groups[name].options()) if name in groups else [one])
    ]
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what `inspect` and typer read
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _group_of(parameter: inspect.Parameter) -> Fields | None:
    return next((part for part in get_args(parameter.annotation) if isinstance(part, Fields)), None)


def _keyword(name: str, annotation: Any, *, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def as_typed(text: str) -> str:
    """A text of `config` for the command line: options in backticks become --options."""
    return re.sub("`([a-z_]+)`", lambda found: f"--{found[1].replace('_', '-')}", text)


def _help(name: str) -> str:
    """Help of an option of another command that means a field of `EngineConfig`."""
    return as_typed(next(option.text for option in options_of(EngineConfig) if option.name == name))


Given = dict[str, Any]
"""Options that were given, by field."""
Model = Annotated[
    str | None,
    typer.Argument(help="Checkpoint folder, GGUF file, or Hugging Face id. Default: the shipped model."),
]
PREDICTOR, DEVICE, DTYPE, EXPERT_FORMAT = (_help(name) for name in ("predictor", "device", "dtype", "expert_format"))
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
PromptsFile = Annotated[Path, typer.Option(help="A prompt a line, or JSON lines with a field 'prompt'.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")]
TraceArgument = Annotated[Path, typer.Argument(help="A trace file.")]
TraceModel = Annotated[
    str | None, typer.Option(help="Checkpoint the trace is of: checks that, and takes the size of an expert.")
]
Skip = Annotated[str, typer.Option(help="Leave out sequences with this flag; empty: none.")]
RecordMb = Annotated[
    float | None,
    typer.Option(
        "--record-mb",
        "--row-mb",
        help="One expert, MB (10^6 bytes), where no model is stated. Default: the trace's own.",
    ),
]
