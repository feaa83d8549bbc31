"""Read and write routing traces: every token's experts, as arrays in a zip file that any tool can read.

A trace is a zip archive:

* `header.json`: `format` ("expertflow-trace"), `version` (1), `layers`, `experts`, `top_k`, `model` (a name),
  `fingerprint` (of the model's weights; may be empty), `source` and `licence` (free text), `record_bytes` (all tensors
  of one expert; 0 or absent: unknown), `layer_bytes` (a list: those of each layer, if they differ).
* `NNNNNN/<column>.npy`, chunk by chunk, n rows each; a row is one token in one forward pass:
  `experts` `[n, L, K]` uint8 or uint16, descending router weight, the value E means none;
  `weights` `[n, L, K]` float16; `tokens` `[n]` int32, the token fed in, -1 unknown; `phase` `[n]` uint8, 0 prefill,
  1 decode; `sequence` `[n]` int32; `step` `[n]` int32, the forward pass (in imported traces: the row's place in its
  sequence).
* `footer.json`, written last: `rows`, `chunks` (rows of each), `sequences` (a list of objects, one a sequence, free
  keys beside `sequence`), `vocabulary` (token texts by id, may be empty).

Rows are written as they come, a chunk at a time, and read chunk by chunk. Must not know models and caches.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from expertflow import outside
from expertflow.errors import TraceError

FORMAT = "expertflow-trace"
VERSION = 1
CHUNK_ROWS = 8192
PREFILL, DECODE = 0, 1
UNKNOWN_TOKEN = -1
_SIZES = MappingProxyType({
    "layers": (1, 1 << 10), "experts": (1, (1 << 16) - 2), "top_k": (1, 1 << 10), "record_bytes": (0, 1 << 53),
})  # fmt: skip
"""Numbers of a header, and what they can be."""
_MOST_EXPERTS = 1 << 20
_MOST_ROWS = (1 << 31) - 1
_MOST_RATIO = 1100
"""Bytes that deflate makes of one byte at most (zlib's technical details: 1032), and a little."""
_NPY_HEADER = 10_128
_COLUMNS = ("experts", "weights", "tokens", "phase", "sequence", "step")
_FOREIGN = "Give a file written by `expertflow trace`, or convert yours with `expertflow trace import`."
_TRUNCATED = "The recording was cut off or the copy is incomplete: record or copy it again."


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a trace is of.

    Attributes:
        layers: MoE layers.
        experts: experts a layer.
        top_k: experts a token uses in a layer.
        model: name of the model.
        fingerprint: of the model's weights; empty if unknown.
        source: where the data comes from.
        licence: terms of the data.
        record_bytes: bytes of one expert's record in the model that ran; 0 if unknown.
        layer_bytes: the same of each layer, if they differ; then `record_bytes` is the largest that a slot holds.
    """

    layers: int
    experts: int
    top_k: int
    model: str = ""
    fingerprint: str = ""
    source: str = ""
    licence: str = ""
    record_bytes: int = 0
    layer_bytes: tuple[int, ...] = ()

    @property
    def dtype(self) -> npt.DTypeLike:
        """The smallest type that holds every expert and the value E for none."""
        return np.uint8 if self.experts < 256 else np.uint16


class Rows(NamedTuple):
    """Columns of `n` rows; see the module's docstring for shapes and types."""

    experts: npt.NDArray[Any]
    weights: npt.NDArray[np.float16]
    tokens: npt.NDArray[np.int32]
    phase: npt.NDArray[np.uint8]
    sequence: npt.NDArray[np.int32]
    step: npt.NDArray[np.int32]

    def take(self, index: Any) -> "Rows":
        """Return some of the rows, by anything that indexes an array."""
        return Rows(*(column[index] for column in self))


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace in memory.

    Attributes:
        header: what it is of.
        rows: the columns.
        sequences: one mapping a sequence, with the key `sequence` and whatever the source knew.
        vocabulary: token texts by id; empty if the source had ids.
    """

    header: Header
    rows: Rows
    sequences: tuple[dict[str, Any], ...] = ()
    vocabulary: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows.tokens)

    def without(self, flag: str) -> "Trace":
        """Return the trace without sequences whose mapping has a true `flag`, such as `repetition`."""
        dropped = [entry["sequence"] for entry in self.sequences if entry.get(flag)]
        kept = tuple(entry for entry in self.sequences if not entry.get(flag))
        return replace(self, rows=self.rows.take(~np.isin(self.rows.sequence, dropped)), sequences=kept)


class TraceWriter:
    """Writes a trace chunk by chunk; use as a context manager.

    Args:
        path: file to write; an unfinished one is left behind as `path` + `.part`.
        header: what it is of.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open the file and write the header."""
        self.header = header
        self._path, self._part = path, path.with_name(path.name + ".part")
        with self._written():
            self._zip = zipfile.ZipFile(self._part, "w", zipfile.ZIP_DEFLATED)
            known = {name: value for name, value in asdict(header).items() if value != ()}
            self._write_json("header.json", {"format": FORMAT, "version": VERSION, **known})
        self._waiting: list[Rows] = []
        self._chunks: list[int] = []
        self.sequences: list[dict[str, Any]] = []
        self.vocabulary: Sequence[str] = ()

    @property
    def rows(self) -> int:
        """Rows appended so far."""
        return sum(self._chunks) + sum(len(rows.tokens) for rows in self._waiting)

    def append(self, rows: Rows) -> None:
        """Append rows; a full chunk goes to disk.

        Raises:
            TraceError: if the disk is full, or the file cannot be written for another reason.
        """
        self._waiting.append(rows)
        if sum(len(part.tokens) for part in self._waiting) >= CHUNK_ROWS:
            with self._written():
                self._flush()

    def __enter__(self) -> Self:
        """Write inside a with block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the file, or keep the unfinished part if the block failed."""
        if kind is not None:
            with suppress(OSError):  # the block's own error is the one to show
                self._zip.close()
            return
        with self._written():
            self._flush()
            footer = {
                "rows": sum(self._chunks), "chunks": self._chunks, "sequences": self.sequences,
                "vocabulary": list(self.vocabulary),
            }  # fmt: skip
            self._write_json("footer.json", footer)
            self._zip.close()
            self._part.replace(self._path)

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError, AttributeError):  # there may be no archive yet
                self._zip.close()
            raise TraceError(
                f"{self._path} cannot be written: {error.strerror or error}", "Make room, or choose another place."
            ) from error

    def _flush(self) -> None:
        if not self._waiting:
            return
        joined = Rows(*(np.concatenate(parts) for parts in zip(*self._waiting, strict=True)))
        types = (self.header.dtype, np.float16, np.int32, np.uint8, np.int32, np.int32)
        for name, column, dtype in zip(_COLUMNS, joined, types, strict=True):
            buffer = BytesIO()
            np.save(buffer, np.ascontiguousarray(column, dtype=dtype), allow_pickle=False)
            self._zip.writestr(f"{len(self._chunks):06d}/{name}.npy", buffer.getvalue())
        self._chunks.append(len(joined.tokens))
        self._waiting = []

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self._zip.writestr(name, json.dumps(content, ensure_ascii=False))


@dataclass(kw_only=True)
class TraceFile:
    """A trace on disk, opened: header, footer, and the rows chunk by chunk.

    Attributes:
        path: the file.
        header: what it is of.
        chunks: rows of each chunk.
        sequences: as in `Trace`.
        vocabulary: as in `Trace`.
    """

    path: Path
    header: Header
    chunks: tuple[int, ...]
    sequences: tuple[dict[str, Any], ...]
    vocabulary: tuple[str, ...]
    _names: frozenset[str] = field(repr=False)

    def __len__(self) -> int:
        """Rows."""
        return sum(self.chunks)

    def read(self) -> Iterator[Rows]:
        """Yield the rows, one chunk at a time.

        Raises:
            TraceError: if a chunk is damaged or does not fit the header.
        """
        with outside.open_zip(self.path) as archive:
            for chunk, count in enumerate(self.chunks):
                shape = (count, self.header.layers, self.header.top_k)
                yield Rows(*(self._column(archive, f"{chunk:06d}/{name}.npy", name, shape) for name in _COLUMNS))

    def _column(self, archive: zipfile.ZipFile, member: str, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Read one column of a chunk, of its documented type.

        Args:
            archive: open.
            member: name in it.
            name: of the column.
            shape: of the column `experts`; columns of one number a row have its first dimension.

        Raises:
            TraceError: if it is damaged, of another shape or kind, or a value is out of range.
        """
        kinds, dtype, least, most = _limits(self.header, len(self.vocabulary))[name]
        shape = shape if name in {"experts", "weights"} else shape[:1]
        if member not in self._names:
            raise TraceError(f"{self.path} lacks {member}", _TRUNCATED)
        try:
            raw = outside.member(archive, member, prod(shape) * 8 + _NPY_HEADER)
            column = outside.parse_column(raw, shape, kinds)
        except ValueError as error:
            raise TraceError(f"{self.path}: {member} is damaged: {error}", _TRUNCATED) from error
        if column.size and not (least <= column.min() and column.max() <= most):  # a NaN is in no range
            raise TraceError(
                f"{self.path}: {member} holds {column.min()} to {column.max()}; {least} to {most} can be, by the header",
                "It is damaged, or the header is of another model: record or convert the trace again.",
            )
        with np.errstate(over="ignore"):  # a weight beyond float16 becomes infinite
            return column.astype(dtype, copy=False)


def _limits(header: Header, vocabulary: int) -> dict[str, tuple[str, npt.DTypeLike, float, float]]:
    """Return, for each column, the kinds of numbers it may hold, its documented type, and the least and largest value.

    Args:
        header: of the trace.
        vocabulary: its texts; 0 if its tokens are ids of the model.
    """
    largest = 2**31 - 1
    return {
        "experts": ("iu", header.dtype, 0, header.experts),
        "weights": ("f", np.float16, -np.inf, np.inf),
        "tokens": ("iu", np.int32, UNKNOWN_TOKEN, vocabulary - 1 if vocabulary else largest),
        "phase": ("iu", np.uint8, PREFILL, DECODE),
        "sequence": ("iu", np.int32, -1, largest),
        "step": ("iu", np.int32, 0, largest),
    }


def open_trace(path: Path) -> TraceFile:
    """Open a trace without reading its rows.

    Raises:
        TraceError: if the file is missing, truncated, foreign, or of a newer version.
    """
    try:
        with outside.open_zip(path) as archive:
            names = frozenset(archive.namelist())
            if "header.json" not in names:
                raise TraceError(f"{path} is no routing trace: it has no header.json", _FOREIGN)
            header = outside.parse_json(outside.member(archive, "header.json", outside.SMALL))
            last = outside.member(archive, "footer.json", outside.LARGE) if "footer.json" in names else b"null"
            footer = outside.parse_json(last)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}", "Give an existing trace file.") from error
    except zipfile.BadZipFile as error:
        if _begins_as_zip(path):  # the archive's directory stands at its end
            raise TraceError(f"{path} is truncated", _TRUNCATED) from error
        raise TraceError(f"{path} is no routing trace: it is no zip archive", _FOREIGN) from error
    except ValueError as error:
        raise TraceError(
            f"{path} is no routing trace: its header or footer is no JSON within bounds: {error}", _FOREIGN
        ) from error
    parsed = _parse_header(path, header)
    if not isinstance(footer, dict):
        raise TraceError(f"{path} is truncated: it has no footer.json", _TRUNCATED)
    _check_footer(path, parsed, footer)
    return TraceFile(
        path=path, header=parsed, chunks=tuple(footer["chunks"]),
        sequences=tuple(footer["sequences"]), vocabulary=tuple(footer["vocabulary"]), _names=names,
    )  # fmt: skip


def _begins_as_zip(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(2) == b"PK"
    except OSError:
        return False


def _check_footer(path: Path, header: Header, footer: dict[str, Any]) -> None:
    for name in ("chunks", "sequences", "vocabulary"):
        if not isinstance(footer.get(name), list):
            raise TraceError(f"{path}: footer.json lacks {name!r}, or it is no list", _FOREIGN)
    if not all(outside.whole(count, 0, _MOST_ROWS) for count in footer["chunks"]):
        raise TraceError(f"{path}: footer.json lists chunks whose rows are no number", _FOREIGN)
    numbers = sum(footer["chunks"]) * header.layers * header.top_k
    if numbers > _MOST_RATIO * path.stat().st_size:
        raise TraceError(f"{path} is too small for the {sum(footer['chunks'])} rows that footer.json lists", _TRUNCATED)
    for entry in footer["sequences"]:
        if not isinstance(entry, dict) or not outside.whole(entry.get("sequence"), -1, 2**31 - 1):
            raise TraceError(f"{path}: footer.json lists sequences without a number", _FOREIGN)
    if not all(isinstance(text, str) for text in footer["vocabulary"]):
        raise TraceError(f"{path}: footer.json lists a vocabulary that is no text", _FOREIGN)


def _parse_header(path: Path, header: Any) -> Header:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"{path} is no routing trace: its header does not say {FORMAT!r}", _FOREIGN)
    if header.get("version") != VERSION:
        raise TraceError(
            f"{path} is of trace version {header.get('version')!r}, this program reads {VERSION}",
            "Update expertflow, or record the trace again.",
        )
    texts = {name: str(header.get(name, "")) for name in ("model", "fingerprint", "source", "licence")}
    sizes = {name: header.get(name) for name in ("layers", "experts", "top_k")}
    sizes["record_bytes"] = header.get("record_bytes", 0)
    each = header.get("layer_bytes", [])
    found = Header(**sizes, **texts, layer_bytes=tuple(each) if isinstance(each, list) else (-1,))  # type: ignore[arg-type]  # checked next
    check_sizes(found, path)
    return found


def check_sizes(header: Header, where: Path) -> None:
    """Refuse numbers that no model has.

    Args:
        header: of a trace.
        where: what to name in the message.

    Raises:
        TraceError: then.
    """
    for name, (least, most) in _SIZES.items():
        value = getattr(header, name)
        if not outside.whole(value, least, most):
            raise TraceError(f"{where}: the header states {name}={str(value)[:80]}, {least} to {most} can be", _FOREIGN)
    least, most = _SIZES["record_bytes"]
    each = header.layer_bytes
    if each and (len(each) != header.layers or not all(outside.whole(size, least + 1, most) for size in each)):
        raise TraceError(
            f"{where}: the header states layer_bytes={str(each)[:80]}, a size for each layer can be", _FOREIGN
        )
    if header.top_k > header.experts or header.layers * header.experts > _MOST_EXPERTS:
        raise TraceError(
            f"{where}: the header states {header.layers} x {header.experts} experts, top-{header.top_k}", _FOREIGN
        )


def load_trace(path: Path) -> Trace:
    """Read a whole trace.

    Raises:
        TraceError: as `open_trace`, or if it has no rows.
    """
    opened = open_trace(path)
    chunks = list(opened.read())
    if not sum(opened.chunks):
        raise TraceError(f"{path} is empty: it has no rows", "Record at least one token.")
    rows = Rows(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
    return Trace(header=opened.header, rows=rows, sequences=opened.sequences, vocabulary=opened.vocabulary)


def save_trace(trace: Trace, path: Path) -> None:
    """Write a whole trace.

    Raises:
        TraceError: if the file cannot be written.
    """
    with TraceWriter(path, trace.header) as writer:
        for begin in range(0, len(trace), CHUNK_ROWS):
            writer.append(trace.rows.take(slice(begin, begin + CHUNK_ROWS)))
        writer.sequences = list(trace.sequences)
        writer.vocabulary = trace.vocabulary


def check_model(header: Header, *, layers: int, experts: int, top_k: int) -> None:
    """Refuse a trace of another model than stated.

    Raises:
        TraceError: if layers, experts or experts a token differ.
    """
    stated, found = (layers, experts, top_k), (header.layers, header.experts, header.top_k)
    if stated != found:
        raise TraceError(
            f"the trace is of {header.model or 'a model'} with (layers, experts, top-k) = {found}, not {stated}",
            "Give a trace recorded from this model.",
        )
