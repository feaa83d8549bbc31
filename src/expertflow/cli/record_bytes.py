"""How many bytes one expert's record has in a replay: the model's, the option's, the trace's, or an assumption that is shown.

Must not load torch, unless a model is named.
"""

from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from expertflow.errors import ConfigError
from expertflow.trace.format import open_trace

ASSUMED_BYTES = 49_800_000
"""An expert of gpt-oss-20b in bf16: what is taken where nothing is known."""
_LARGEST_MB = 1e9
_ORIGINS = {
    "model": "the model's",
    "option": "as stated",
    "trace": "the trace's",
    "assumed": "assumed: the trace does not state it",
}


class Record(NamedTuple):
    """Bytes of one expert's record, and where the number comes from.

    Attributes:
        size: bytes; where layers differ, of the largest record that slots hold.
        source: a key of `_ORIGINS`.
        layer_bytes: bytes of each layer's records, if they differ.
    """

    size: int
    source: str
    layer_bytes: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The size and its source, to be shown."""
        about = "; other layers differ" if self.layer_bytes else ""
        return f"{self.size / 1e6:.4g} MB ({_ORIGINS[self.source]}{about})"

    def as_json(self) -> dict[str, int | str]:
        """For the result file."""
        return {"record_bytes": self.size, "record_bytes_from": self.source}


def bytes_of(record_mb: float) -> int:
    """Megabytes (10^6) as bytes.

    Raises:
        ConfigError: if it is not positive and finite.
    """
    if not 0 < record_mb < _LARGEST_MB or round(record_mb * 1e6) < 1:
        raise ConfigError(
            f"record_mb={record_mb} is no size of an expert", "Give a number above 0 and below 10^9, such as 49.8."
        )
    return round(record_mb * 1e6)


def find_record(trace: Path, model: str | None, record_mb: float | None) -> Record:
    """What a replay takes for one expert. Prints on stderr what it assumes, and which option it does not use.

    Args:
        trace: the trace file.
        model: checkpoint the trace is of; decides if it is given.
        record_mb: 10^6 bytes; decides over the trace's own.

    Raises:
        ConfigError: if `record_mb` is no size.
        TraceError: if the trace cannot be read, or is of another model.
        ExpertFlowError: if the model cannot be planned.
    """
    stated = None if record_mb is None else bytes_of(record_mb)
    console = Console(stderr=True)
    if model is not None:
        size, layer_bytes = import_module("expertflow.cli.stated").record_bytes_of(model, trace)
        record = Record(size, "model", layer_bytes)
        if stated is not None and stated != record.size:
            console.print(
                f"not used: --record-mb {record_mb:g}, since --model has {record.size / 1e6:.4g} MB an expert"
            )
        return record
    if stated is not None:
        return Record(stated, "option")
    header = open_trace(trace).header
    if header.record_bytes:
        return Record(header.record_bytes, "trace", header.layer_bytes)
    console.print(
        f"assumed: {ASSUMED_BYTES / 1e6:g} MB an expert, as gpt-oss-20b has in bf16. The trace does not state it: give "
        "--record-mb, or --model with the checkpoint the trace is of."
    )
    return Record(ASSUMED_BYTES, "assumed")
