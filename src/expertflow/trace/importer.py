"""Convert a folder of recorded router decisions into a trace.

The layout, documented so that others can produce it (or call `TraceWriter` themselves):

* `routing.npz`: `experts` `[T, L, K]` integers in descending router weight, `weights` `[T, L, K]` floats;
* `sequences.json`: a list, one object a sequence, with `offset` and `n_rows` (its rows) and any other keys
  (`repetition` true marks looping text);
* optional `decoded_tokens.jsonl.gz`: a line a sequence, `{"offset": ..., "tokens": [text, ...]}`, the texts aligned
  with the sequence's rows; ids are given to the texts in sorted order.

Such a folder holds generated tokens only, so every row is of the decode phase.
"""

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expertflow import outside
from expertflow.errors import TraceError
from expertflow.trace.format import DECODE, UNKNOWN_TOKEN, Header, Rows, Trace, check_sizes

_MOST_BYTES = 1 << 34
"""Bytes of one array at most."""
_LAYOUT = "The folder needs routing.npz and sequences.json; see expertflow.trace.importer."


def import_folder(
    folder: Path, *, model: str = "", experts: int | None = None, source: str = "", record_bytes: int = 0
) -> Trace:
    """Read the folder.

    Args:
        folder: see the module's docstring.
        model: name for the header; default: the folder's name.
        experts: experts a layer; default: the smallest power of two that holds every index.
        source: where the data comes from, and its licence.
        record_bytes: bytes of one expert's record; 0 if unknown.

    Raises:
        TraceError: if a file is missing, damaged, or disagrees with another.
    """
    ids, weights = _read_arrays(folder / "routing.npz")
    sequences = _read_sequences(folder / "sequences.json", len(ids))
    largest = int(ids.max(initial=0))
    count = experts or 1 << largest.bit_length()
    if largest >= count:
        raise TraceError(f"{folder} names expert {largest}, but {count} a layer are stated", "State the right number.")
    header = Header(
        layers=ids.shape[1], experts=count, top_k=ids.shape[2], model=model or folder.name, source=source,
        record_bytes=record_bytes,
    )  # fmt: skip
    check_sizes(header, folder)
    texts = _read_texts(folder / "decoded_tokens.jsonl.gz", sequences)
    vocabulary = tuple(sorted({text for line in texts.values() for text in line}))
    number = {text: token for token, text in enumerate(vocabulary)}
    sequence = np.full(len(ids), -1, dtype=np.int32)
    step = np.zeros(len(ids), dtype=np.int32)
    tokens = np.full(len(ids), UNKNOWN_TOKEN, dtype=np.int32)
    for index, entry in enumerate(sequences):
        place = slice(entry["offset"], entry["offset"] + entry["n_rows"])
        sequence[place], step[place] = index, np.arange(entry["n_rows"])
        if line := texts.get(entry["offset"]):
            tokens[place] = [number[text] for text in line]
    listed = sequence >= 0
    rows = Rows(
        ids.astype(header.dtype), weights.astype(np.float16), tokens,
        np.full(len(ids), DECODE, dtype=np.uint8), sequence, step,
    ).take(listed)  # fmt: skip
    if not len(rows.tokens):
        raise TraceError(f"{folder} is empty: it has no rows", _LAYOUT)
    entries = tuple({"sequence": index, **entry} for index, entry in enumerate(sequences))
    return Trace(header=header, rows=rows, sequences=entries, vocabulary=vocabulary)


def _read_arrays(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    try:
        with outside.open_zip(path) as archive:
            ids = outside.parse_column(outside.member(archive, "experts.npy", _MOST_BYTES), None, "iu")
            weights = outside.parse_column(outside.member(archive, "weights.npy", _MOST_BYTES), None, "f")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise TraceError(f"{path} cannot be read: {error}", _LAYOUT) from error
    if ids.ndim != 3 or ids.shape != weights.shape:
        raise TraceError(f"{path}: experts {ids.shape} {ids.dtype} and weights {weights.shape} do not fit", _LAYOUT)
    if ids.size and ids.min() < 0:
        raise TraceError(f"{path} names expert {ids.min()}", "Experts are numbered from 0: convert the data again.")
    return ids, weights


def _read_sequences(path: Path, rows: int) -> list[dict[str, Any]]:
    try:
        sequences = outside.read_json(path)
        if not all(outside.whole(entry[name], 0, 2**31 - 1) for entry in sequences for name in ("offset", "n_rows")):
            raise ValueError("an offset or n_rows is no number of rows")  # noqa: TRY301 - one message for all that is malformed
        ends = [entry["offset"] + entry["n_rows"] for entry in sequences]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} cannot be read: {error}", _LAYOUT) from error
    if max(ends, default=0) > rows:
        raise TraceError(f"{path} lists rows up to {max(ends)}, routing.npz has {rows}", "Fetch both files again.")
    return list(sequences)


def _read_texts(path: Path, sequences: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Return token texts by offset, for sequences whose texts are aligned with their rows."""
    if not path.exists():
        return {}
    try:
        with gzip.open(path, "rb") as stream:
            raw = stream.read(outside.LARGE)
        lines = [outside.parse_json(line) for line in raw.splitlines() if line.strip()]
        texts = {int(line["offset"]): [str(text) for text in line["tokens"]] for line in lines}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise TraceError(f"{path} cannot be read: {error}", "Fetch it again, or remove it.") from error
    rows = {entry["offset"]: entry["n_rows"] for entry in sequences}
    return {offset: line for offset, line in texts.items() if rows.get(offset) == len(line)}
