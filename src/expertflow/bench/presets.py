"""What a run measures: settings, and the presets for those that the user does not state.

Must not know models and devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from expertflow.bench.result import RESIDENT
from expertflow.cache.strategy import find_strategy
from expertflow.config import EXECUTIONS, nearest
from expertflow.errors import ConfigError

SIMULATED = ("pregated",)
"""Strategies that are run with a forecast made from a recording."""

_RANGES = (
    ("batches", 1, 2**20), ("repeats", 1, 2**20), ("seed", 0, 2**63 - 1), ("long_prompt", 0, 2**20), ("tokens", 2, 2**20),
)  # fmt: skip
"""Numbers of the settings, and the least and most they can be."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run.

    Attributes:
        preset: where other values come from.
        model: checkpoint folder or id; None: the shipped model.
        predictor: folder, `auto` or `none`, as for `LLM`.
        strategies: entries of the strategy table, in the order of the report.
        slots: counts, shares or `N/layer`.
        batches: sequences together.
        tokens: new tokens of a sequence.
        repeats: timed runs of each configuration.
        executions: `auto`, `host`, `graph`; several are measured side by side.
        long_prompt: tokens of the long prompt; 0: leave that state out.
        prompts_file: prompts in place of the shipped ones.
        deadline: seconds after which nothing new is begun; None: no limit.
        device: `auto`, `cuda` or `cpu`.
        dtype: `auto` or a type.
        expert_format: format that experts are quantised to, as for `LLM`; None: they stay as they are stored.
        gate_recall: share of a layer's experts that the simulated gate of `pregated` foresees.
        seed: of what is drawn: the simulated gate's mistakes, the order of prompts.
    """

    preset: str
    model: str | None = None
    predictor: str = "auto"
    strategies: tuple[str, ...]
    slots: tuple[str, ...]
    batches: tuple[int, ...]
    tokens: int
    repeats: int = 3
    executions: tuple[str, ...] = ("auto",)
    long_prompt: int = 0
    prompts_file: Path | None = None
    deadline: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    expert_format: str | None = None
    gate_recall: float = 0.85
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: for an unknown strategy or execution, or a number out of range.
        """
        for name in self.strategies:
            _check_strategy(name)
        for name in self.executions:
            if name not in EXECUTIONS:
                raise ConfigError(f"execution={name!r} is unknown", nearest(name, EXECUTIONS))
        for label, least, most in _RANGES:
            values = self.batches if label == "batches" else (getattr(self, label),)
            if not values or min(values) < least:
                more = ": the first ends the prompt" if label == "tokens" else ""
                raise ConfigError(f"{label}={','.join(map(str, values))} is too small", f"Use {least} or more{more}.")
            if max(values) > most:
                raise ConfigError(f"{label}={','.join(map(str, values))} is too large", f"Use {most} or less.")
        if not self.strategies or not self.slots:
            raise ConfigError("there is nothing to measure", "Name at least one strategy and one number of slots.")
        if self.deadline is not None and not 0 < self.deadline < inf:
            raise ConfigError(f"deadline={self.deadline} is no time", "Give seconds, more than 0.")


def _check_strategy(name: str) -> None:
    """Refuse a strategy that cannot be run.

    Raises:
        ConfigError: then.
    """
    if name == RESIDENT:
        raise ConfigError("strategy 'resident' is no strategy", "It is always measured, as the bound.")
    if find_strategy(name).needs_future and name not in SIMULATED:
        raise ConfigError(f"strategy {name!r} is counted, not run", "Belady is always beside the others.")


PRESETS: Mapping[str, Settings] = {
    "quick": Settings(
        preset="quick", strategies=("on-demand", "lru", "lru-global", "ring", "next-use", "plec"),
        slots=("12.5%", "25%", "50%"), batches=(1, 4), tokens=6,
    ),
    "paper": Settings(
        preset="paper", strategies=("on-demand", "lru", "ring", "pregated", "next-use", "plec"),
        slots=("4/layer", "8/layer", "16/layer"), batches=(4, 8, 16, 32), tokens=32, long_prompt=512,
    ),
}  # fmt: skip
"""`quick`: a few minutes on a CPU with the shipped model. `paper`: the conditions of the paper's figures 6, 8 and 10."""


def make_settings(preset: str, options: Mapping[str, Any]) -> Settings:
    """A preset with the user's own options in place of its.

    Args:
        preset: name of the preset.
        options: fields of `Settings`; None leaves the preset's.

    Raises:
        ConfigError: for an unknown preset or option, or an impossible value.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r} is unknown", nearest(preset, PRESETS))
    known = [entry.name for entry in fields(Settings)]
    for key in options:
        if key not in known:
            raise ConfigError(f"unknown option {key!r}", nearest(key, known))
    return replace(PRESETS[preset], **{key: value for key, value in options.items() if value is not None})


def names(text: str | None) -> tuple[str, ...] | None:
    """`a,b,c` as names; None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """`1,4,8` as numbers; None stays None.

    Raises:
        ConfigError: for anything that is no whole number.
    """
    parts = names(text)
    if parts is None:
        return None
    if bad := [part for part in parts if not (part.isdecimal() and len(part) < 10)]:
        raise ConfigError(f"{option}={bad[0]!r} is no whole number below 10^9", "Write it like 1,4,8.")
    return tuple(int(part) for part in parts)
