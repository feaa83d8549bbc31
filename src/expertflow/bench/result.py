"""The one schema of measurements: what was run, on what, and every number beside its bound.

A result is a JSON file with `format` ("expertflow-bench") and `version` (1) beside the fields below. Must not know how
anything is measured or shown.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from expertflow import outside
from expertflow.errors import ResultError
from expertflow.files import write_whole

FORMAT = "expertflow-bench"
VERSION = 1
RESIDENT, BELADY = "resident", "oracle"
"""Names of the rows that are bounds: every expert in a slot, and every later use known (replayed, not run)."""
COLD, WARM, LONG = "cold", "warm", "after a long prompt"
"""States of the cache: empty, after other work of the same kind, after one long prompt."""
DECODE, WHOLE, FIRST = "decode tokens/s", "tokens/s", "first token"
HIT, KEPT, KEPT_ALL, MOVED = "hit ratio", "kept ratio", "kept ratio with prompts", "moved"
PEAK, SAVED = "peak memory", "memory saved"
"""Names of figures."""
_FOREIGN = "Give a file written by `expertflow bench --out`."


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number, measured once or several times.

    Attributes:
        values: every repeat's.
        unit: such as `tokens/s`.
        bound: what nothing under the same conditions can pass, or None where none is known.
        bound_is: what that bound is.
    """

    values: tuple[float, ...]
    unit: str
    bound: float | None = None
    bound_is: str = ""

    @property
    def median(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """Smallest of the repeats."""
        return min(self.values)

    @property
    def high(self) -> float:
        """Largest of the repeats."""
        return max(self.values)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One strategy under one condition.

    Attributes:
        strategy: entry of the strategy table, or `resident`.
        slots: expert slots.
        share: slots over experts.
        batch: sequences together.
        state: of the cache before: cold, warm, after a long prompt.
        execution: host, graph, or replay (decisions only, nothing generated).
        exact: whether every token equals the reference's; None where nothing was generated.
        figures: the numbers by name.
        note: remark for a reader.
    """

    strategy: str
    slots: int
    share: float
    batch: int
    state: str
    execution: str
    exact: bool | None
    figures: Mapping[str, Figure]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was run.

    Attributes:
        name: folder name, or the shipped model's.
        model_type: family.
        layers: MoE layers.
        experts: experts a layer.
        top_k: experts a token uses in a layer.
        dtype: of the weights.
        row_bytes: one expert.
        dense_bytes: everything but the experts.
        fingerprint: of the checkpoint.
        predictor_bytes: the predictor's network in memory, 0 without one.
    """

    name: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    dtype: str
    row_bytes: int
    dense_bytes: int
    fingerprint: str
    predictor_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run.

    Attributes:
        preset: what kind of run.
        command: makes it again.
        date: day of the run.
        commit: of the source, empty if it is not known.
        seed: of everything drawn.
        config: every setting.
        machine: what it ran on.
        versions: of what it ran with.
        model: which model.
        link_gbps: copies of one expert's size back to back, 10^9 bytes a second.
        rows: the measurements.
        complete: whether everything in the settings was measured.
        left_out: what was not, and why.
        seconds: the whole run, loading included.
    """

    preset: str
    command: str
    date: str
    commit: str
    seed: int
    config: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    model: ModelFacts
    link_gbps: float
    rows: tuple[Row, ...]
    complete: bool
    left_out: tuple[str, ...] = field(default=())
    seconds: float = 0.0

    def to_json(self, indent: int | None = None) -> str:
        """The document; one line without `indent`."""
        return json.dumps(
            {"format": FORMAT, "version": VERSION, **asdict(self)}, ensure_ascii=False, indent=indent, allow_nan=False
        )


def write_result(result: Result, path: Path) -> None:
    """Write a result file.

    Raises:
        ResultError: if the place cannot be written.
    """
    try:
        write_whole(path, result.to_json(indent=1) + "\n")
    except OSError as error:
        raise ResultError(f"{path} cannot be written: {error.strerror}", "Choose another place.") from error


def read_result(path: Path) -> Result:
    """Read a result file.

    Raises:
        ResultError: if it is missing, truncated, of another kind or version, or a field is absent or of a wrong type.
    """
    try:
        document = outside.read_json(path)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", "Give an existing result file.") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ResultError(f"{path} is no result file or is truncated: {error}", _FOREIGN) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ResultError(f"{path} is no result file: it does not say {FORMAT!r}", _FOREIGN)
    if document.get("version") != VERSION:
        raise ResultError(
            f"{path} is of result version {document.get('version')!r}, this program reads {VERSION}",
            "Update expertflow, or measure again.",
        )
    return _result(document, str(path))


def _result(document: dict[str, Any], where: str) -> Result:
    plain = _take(document, Result, where)
    rows = _list(plain["rows"], f"{where}: rows")
    if not rows:
        raise ResultError(f"{where} has no rows", "Measure again: the run ended before its first number.")
    plain["model"] = ModelFacts(**_take(plain["model"], ModelFacts, f"{where}: model"))
    plain["rows"] = tuple(_row(item, f"{where}: row {number}") for number, item in enumerate(rows))
    plain["left_out"] = tuple(str(item) for item in _list(plain["left_out"], f"{where}: left_out"))
    return Result(**plain)


def _row(item: Any, where: str) -> Row:
    plain = _take(item, Row, where)
    figures = {
        name: _figure(figure, f"{where} ({plain['strategy']}): {name}") for name, figure in plain["figures"].items()
    }
    return Row(**{**plain, "figures": figures})


def _figure(item: Any, where: str) -> Figure:
    plain = _take(item, Figure, where)
    values = _list(plain["values"], where)
    if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise ResultError(f"{where} holds no numbers: {values!r}", _FOREIGN)
    return Figure(**{**plain, "values": tuple(float(v) for v in values)})


_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (float, int),
    bool: (bool,),
    bool | None: (bool, type(None)),
    float | None: (float, int, type(None)),
    ModelFacts: (dict,),
    Mapping[str, Any]: (dict,),
    Mapping[str, str]: (dict,),
    Mapping[str, Figure]: (dict,),
    tuple[Row, ...]: (list,),
    tuple[str, ...]: (list,),
    tuple[float, ...]: (list,),
}


def _take(item: Any, kind: Any, where: str) -> dict[str, Any]:
    """The fields of a dataclass from a JSON object, each of its type.

    Raises:
        ResultError: for a field that is missing or of another type.
    """
    if not isinstance(item, dict):
        raise ResultError(f"{where} is no object: {item!r}", _FOREIGN)
    taken = {}
    for entry in fields(kind):
        if entry.name not in item:
            raise ResultError(f"{where} lacks {entry.name!r}", _FOREIGN)
        value, types = item[entry.name], _TYPES[entry.type]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ResultError(f"{where}: {entry.name} is {value!r}, not {_wanted(types)}", _FOREIGN)
        taken[entry.name] = value
    return taken


def _wanted(types: tuple[type, ...]) -> str:
    return " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in types)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ResultError(f"{where} is no list: {value!r}", _FOREIGN)
    return value
