"""Sizes and shares as users write them: `6GiB`, `500MB`, `25%`. Must not know what is measured."""

import math
import re
from fractions import Fraction

from expertflow.errors import ConfigError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}
_LARGEST = 2.0**60
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int, option: str = "size") -> int:
    """Read a size such as `6GiB`, `500MB` or `1024` into bytes.

    Args:
        text: the size; a bare number is bytes, `K/M/G/T` alone mean KiB and so on.
        option: the option's name, for the message.

    Raises:
        ConfigError: if the text is no size, or the size is not positive.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None or match[2].lower() not in _FACTORS:
        raise ConfigError(f"{option}={text!r} is not a size", "Write it like 6GiB, 500MB or 1073741824.")
    number = float(match[1]) * _FACTORS[match[2].lower()]
    if number >= _LARGEST:
        raise ConfigError(f"{option}={str(text)[:40]!r} is more than any machine has", "Write it like 6GiB or 500MB.")
    size = int(number)
    if size <= 0:
        raise ConfigError(f"{option}={text!r} must be more than zero bytes", "Write it like 6GiB or 500MB.")
    return size


def format_bytes(size: float) -> str:
    """Bytes as text, in binary units with two or three digits that matter."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def read_slots(text: str | int) -> tuple[Fraction, str]:
    """A number of slots, before the model is known: a number, and its unit `%`, `/layer` or none.

    Raises:
        ConfigError: if the text is no number of slots, or not more than zero.
    """
    raw = str(text).strip()
    unit = next((unit for unit in ("%", "/layer") if raw.endswith(unit)), "")
    digits = raw.removesuffix(unit)
    pattern = r"-?[0-9]{1,12}(\.[0-9]{0,12})?" if unit == "%" else "-?[0-9]{1,12}"
    if not re.fullmatch(pattern, digits):
        raise ConfigError(
            f"slots={str(text)[:40]!r} is neither a count nor a share", "Write it like 96, 25% or 16/layer."
        )
    number = Fraction(digits)
    if number <= 0:
        raise ConfigError(f"slots={text!r} is less than one slot", "State at least one (1, or a larger share).")
    return number, unit


def parse_slots(text: str | int, layers: int, experts: int) -> int:
    """Read a number of expert slots: `96`, a share of all experts such as `25%`, or `16/layer`.

    Args:
        text: the count, the share, or the slots a layer (what the ExpertFlow paper calls the cache size).
        layers: MoE layers of the model.
        experts: experts a layer.

    Raises:
        ConfigError: if the text is none of these, or means less than one slot.
    """
    number, unit = read_slots(text)
    total = layers * experts
    factors = {"": Fraction(1), "%": Fraction(total, 100), "/layer": Fraction(layers)}
    slots = math.floor(number * factors[unit])
    if slots < 1:
        raise ConfigError(
            f"slots={text!r} gives {slots} slots of {total} experts",
            "State at least one slot (1, or a larger share).",
        )
    return min(slots, total)
