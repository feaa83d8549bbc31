"""Many prompts, and a file of results that survives a crash: finished requests are appended, and skipped on restart.

JSON lines: a header that names prompts, model and sampling, then a line for each finished request. When the last one is there,
the file is written again in the order of the prompts. Must not know how requests run.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, Self

from expertflow import outside
from expertflow.config import SamplingParams
from expertflow.engine.inputs import Prompt
from expertflow.engine.llm import LLM
from expertflow.engine.request import RequestOutput, StreamOutput
from expertflow.errors import NonFiniteError, ResultsError
from expertflow.execution.sampler import draw_seed
from expertflow.files import write_whole

_FORMAT = 2


def seeded(params: SamplingParams, seed: int | None, places: Iterable[int]) -> list[SamplingParams]:
    """Parameters of the prompts at these places. Each has its own seed: that of the run plus its place; None: as they are."""
    return [params if seed is None else replace(params, seed=(seed + place) % 2**63) for place in places]


def finish(
    llm: LLM, prompts: Sequence[str | Prompt], params: SamplingParams, results: "Results"
) -> Iterator[StreamOutput]:
    """Generate what a results file lacks, and append each finished request to it.

    Args:
        llm: the model that the file is of.
        prompts: all of the file.
        params: how all are sampled, but for the seed, which is the file's.
        results: the file.

    Yields:
        Every output, token by token; a finished request once it is in the file, with its place among all prompts.

    Raises:
        NonFiniteError: if a prompt's logits are no numbers, once the other prompts are over.
        ResultsError: if the file cannot be written.
    """
    left = results.left
    if not left:
        return
    try:
        for item in llm.stream([prompts[index] for index in left], seeded(params, results.seed, left)):
            index, output = left[item.index], item.output
            if output is not None:
                results.add(index, output)
                output = replace(output, index=index)
            yield replace(item, index=index, output=output)
    except NonFiniteError as error:
        raise NonFiniteError(left[error.index], error.token) from error


class Results:
    """A results file, open for appending.

    Args:
        path: an existing file is resumed; else it is created.
        prompts: all of them.
        params: how they are sampled.
        model: its identity, then what else its tokens depend on, such as dtype and the longest sequence.

    Attributes:
        done: finished requests by index, as dictionaries.
        seed: of the whole file: the one stated, that of the file that is resumed, or a new one; None if greedy.

    Raises:
        ResultsError: if the file holds something else, is damaged before its last line, or cannot be written. It is not changed.
    """

    def __init__(self, path: Path, prompts: Sequence[str], params: SamplingParams, model: str) -> None:
        """Read what is there."""
        self._path, self._count = path, len(prompts)
        same = json.dumps([list(prompts), asdict(replace(params, seed=None)), model])
        self._drawn = params.seed is None
        self._header: dict[str, Any] = {
            "expertflow_results": _FORMAT, "prompts": len(prompts), "model": model,
            "of": hashlib.sha256(same.encode()).hexdigest(),
            "seed": None if not params.temperature else draw_seed() if self._drawn else params.seed,
        }  # fmt: skip
        self.done: dict[int, dict[str, Any]] = {}
        whole = 0
        try:
            if there := path.exists():
                if not path.is_file():
                    raise ResultsError(f"{path} is no regular file", "Name a file.")
                whole = self._read(path.read_bytes())
            # unbuffered: what a full disk refuses is not written again when the file is closed
            self._file: IO[bytes] = path.open("r+b" if there else "xb", buffering=0)
            self._lock()
            self._file.truncate(whole)  # a line that a crash cut in two
            self._file.seek(whole)
        except (OSError, ValueError) as error:
            raise ResultsError(
                f"{path} cannot be used: {error}", "Name a file in a folder you can write to."
            ) from error
        if not whole:
            self._write(self._header)

    def _lock(self) -> None:
        """Keep other processes from writing, until this one ends in any way.

        Raises:
            OSError: if another process has the lock.
        """
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise

    def _read(self, raw: bytes) -> int:
        """Read the finished lines.

        Returns:
            How many bytes they have.
        """
        *lines, rest = raw.split(b"\n")
        for number, line in enumerate(lines):
            try:
                entry = outside.parse_json(line)
            except ValueError as error:
                raise ResultsError(
                    f"{self._path}, line {number + 1} is no JSON", "Mend or remove it, or name another file."
                ) from error
            if number == 0:
                self._check(entry)
            elif isinstance(entry, dict) and outside.whole(entry.get("index"), 0, self._count - 1):
                self.done[entry["index"]] = entry
            else:
                raise ResultsError(
                    f"{self._path}, line {number + 1} is no result of these prompts", "Mend or remove it."
                )
        if not lines and rest and not json.dumps(self._header).encode().startswith(rest):
            raise ResultsError(f"{self._path} is no results file", "Name another file.")
        return len(raw) - len(rest)

    def _check(self, entry: Any) -> None:
        if not isinstance(entry, dict) or "expertflow_results" not in entry:
            raise ResultsError(f"{self._path} is no results file", "Name another file.")
        seed = entry.get("seed")
        if self._drawn and outside.whole(seed, 0, 2**63 - 1) and entry == self._header | {"seed": seed}:
            self._header = entry
        if entry != self._header:
            identities = [str(header.get("model")).partition(" ")[0] for header in (entry, self._header)]
            raise ResultsError(
                f"{self._path} holds results of "
                + (
                    "another model, or of this one before its files changed"
                    if identities[0] != identities[1]
                    else "other prompts, other sampling, another dtype or another longest sequence"
                )
                + f" ({entry.get('prompts')} prompts, model {entry.get('model')}; now {self._header['model']})",
                "Name another file, or remove it.",
            )

    @property
    def seed(self) -> int | None:
        """Seed of the whole file; None if it is greedy."""
        seed: int | None = self._header["seed"]
        return seed

    @property
    def left(self) -> list[int]:
        """Prompts that are not finished."""
        return [index for index in range(self._count) if index not in self.done]

    def add(self, index: int, output: RequestOutput) -> None:
        """Append a finished request; it is in the file when this returns."""
        entry = asdict(output) | {"index": index}
        self._write(entry)
        self.done[index] = entry

    def _write(self, entry: dict[str, Any]) -> None:
        left = memoryview(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ResultsError:
        return ResultsError(
            f"{self._path} cannot be written: {error.strerror}",
            "What is in it stays: make room, and give the same command again to go on.",
        )

    def close(self) -> None:
        """If all are there, write them in order. The file is complete at every moment."""
        self._file.close()
        if self.left:
            return
        entries = [self._header, *(self.done[index] for index in range(self._count))]
        try:
            write_whole(self._path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
        except OSError as error:
            raise self._unwritable(error) from error

    def __enter__(self) -> Self:
        """Use as a context manager."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()
