"""The identity of a model: a hash of every byte its answers depend on.

Decides what may share experts in host memory and what a results file may be continued with. It covers each tensor by key,
so that the same weights in other shards have the same identity, and the files of config, generation config and tokenizer.
`models.files.fingerprint` is the cheap sample, for plans, traces and predictors. Must not know models and devices.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from expertflow.errors import CheckpointError
from expertflow.limits import usable_cpus
from expertflow.models.files.checkpoint import StoredTensor, chunks_of

SETTING_FILES = (
    "config*.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json",
    "vocab*", "merges.txt", "*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
"""Patterns of the files beside the weights that answers depend on; config and tokenizer may come in several versions."""
_SPAN_BYTES = 1 << 26
"""Bytes of a dense tensor that are hashed by one thread."""
READERS = min(16, usable_cpus())
"""Threads that read and hash: one hashes 1 to 2 GB a second."""


class Span(NamedTuple):
    """A part of a checkpoint tensor."""

    tensor: StoredTensor
    offset: int
    nbytes: int


class ContentHash:
    """Collects the hashes of a checkpoint's spans, in any order and from several threads."""

    def __init__(self) -> None:
        """Start with no span read."""
        self._digests: dict[tuple[str, int], bytes] = {}

    def take(self, span: Span, data: Iterable[bytes | memoryview]) -> None:
        """Hash a span's bytes, given in one or several pieces."""
        digest = hashlib.sha256(span.nbytes.to_bytes(8, "little"))
        for part in data:
            digest.update(part)
        self._digests[span.tensor.key, span.offset] = digest.digest()

    def read(self, spans: Iterable[Span]) -> None:
        """Read spans from their files, and hash them.

        Raises:
            CheckpointError: if a file ends early or cannot be read.
        """
        in_threads(lambda span: self.take(span, chunks_of(*span)), spans)

    def identity(self, tensors: Mapping[str, StoredTensor], folder: Path) -> str:
        """64 hexadecimal digits over all spans taken, the tensors' types and shapes, and the files of settings.

        Raises:
            CheckpointError: if a file cannot be read.
        """
        whole = hashlib.sha256()
        for key in sorted(tensors):
            whole.update(f"{key} {tensors[key].dtype} {tensors[key].shape}\n".encode())
        for place in sorted(self._digests):
            whole.update(f"{place[0]} {place[1]} ".encode() + self._digests[place])
        if folder.is_file():  # its header holds what config.json does
            begin = min((t.start for t in tensors.values() if t.file == folder), default=folder.stat().st_size)
            header = StoredTensor(key="header", file=folder, dtype="U8", shape=(begin,), start=0, nbytes=begin)
            whole.update(hashlib.sha256(b"".join(chunks_of(header))).digest())
        for path in setting_files(folder):
            try:
                content = hashlib.sha256(path.read_bytes()).digest()
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be read: {error}", "Check the file and its permissions."
                ) from error
            whole.update(f"{path.relative_to(beside(folder))} ".encode() + content)
        return whole.hexdigest()


def in_threads(work: Callable[[Span], None], spans: Iterable[Span]) -> None:
    """Call `work` for each span, in several threads; the first error ends it."""
    with ThreadPoolExecutor(READERS) as pool:
        jobs = [pool.submit(work, span) for span in spans]
        try:
            for job in jobs:
                job.result()
        except BaseException:  # an error or Ctrl-C does not wait for the rest of the files
            pool.shutdown(cancel_futures=True)
            raise


def spans_of(tensors: Mapping[str, StoredTensor]) -> list[Span]:
    """Whole tensors as spans that one thread reads in little time."""
    return [
        Span(tensor, begin, min(_SPAN_BYTES, tensor.nbytes - begin))
        for tensor in tensors.values()
        for begin in range(0, tensor.nbytes, _SPAN_BYTES)
    ]


def setting_files(folder: Path) -> list[Path]:
    """The files beside the weights that answers depend on, by name; of a folder, or beside a GGUF file."""
    return sorted({path for pattern in SETTING_FILES for path in beside(folder).glob(pattern) if path.is_file()})


def beside(place: Path) -> Path:
    """The folder where a model's setting files are: the checkpoint folder, or the one that a GGUF file is in."""
    return place.parent if place.is_file() else place


def stamps(tensors: Mapping[str, StoredTensor], folder: Path) -> tuple[tuple[str | int, ...], ...]:
    """Size and times of every file that an identity covers: while they stay, so does the identity.

    Raises:
        CheckpointError: if a file is gone.
    """
    try:
        weights = {t.file for t in tensors.values()} | ({folder} if folder.is_file() else set())
        found = {path: path.stat() for path in (*setting_files(folder), *weights)}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error}", "Check the file.") from error
    # the time of the last change to the file's entry (ctime) cannot be set back, unlike that of its content
    return tuple(
        sorted((str(p), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in found.items())
    )
