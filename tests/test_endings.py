"""How commands end: clear lines, exit codes, full disks, and a traceback kept for what is our own mistake."""

import errno
import json
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertflow.cli.endings import reported
from expertflow.config import SamplingParams
from expertflow.engine.offline import Results
from expertflow.engine.request import RequestOutput
from expertflow.errors import ConfigError, ResultsError, TraceError, UnreadWarning
from expertflow.files import write_whole
from expertflow.trace.format import load_trace, save_trace
from helpers import make_trace


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond `size` bytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("slots='[/b]x' is wrong", "Mend [it]."), 2, "error: slots='[/b]x' is wrong. Mend [it]."),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), 2, "error: x.png cannot be written: No space left"),
        (MemoryError(), 2, "error: the host refused memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "error: the host refused memory"),
        (KeyError("[/b]"), 70, "internal error: KeyError: '[/b]'. Please report it with the file"),
        (OSError(errno.ENOENT, "No such file"), 70, "internal error: FileNotFoundError"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: Exception,
    code: int,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only what is our own mistake leaves a file, with the traceback in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as ended, reported():
        raise error
    shown = capsys.readouterr().err
    assert ended.value.code == code
    assert shown.startswith(line)
    assert len(shown.splitlines()) == 1
    kept = list(tmp_path.iterdir())
    assert len(kept) == (code == 70)
    if kept:
        assert str(kept[0]) in shown
        assert "Traceback" in kept[0].read_text()
        assert "test_endings.py" in kept[0].read_text()


def test_a_traceback_without_a_place_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no temporary file can be made, the traceback is not lost."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(SystemExit, match="70"), reported():
        raise KeyError("x")
    assert "Traceback" in capsys.readouterr().err


def test_warnings_of_ours_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A warning for the user names no source line; it ends nothing."""
    with reported():
        warnings.simplefilter("always")
        warnings.warn("a tensor [x] has no place", UnreadWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: a tensor [x] has no place\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_on_a_full_disk_is_one_clear_line() -> None:
    """The same for what a command prints."""
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "expertflow", "strategies"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: the output cannot be written: No space left on device. Make room, and give the command again.\n"
    )


def _finish(path: Path, finished: list[int]) -> None:
    """Generate, so to say, what is left of three prompts."""
    output = RequestOutput(
        index=0, prompt="x" * 500, prompt_token_ids=(1,), text="y", token_ids=(2,), finish_reason="length"
    )
    with Results(path, ["a", "b", "c"], SamplingParams(), "model") as results:
        for index in results.left:
            results.add(index, output)
            finished.append(index)


def test_results_go_on_behind_a_full_disk(tmp_path: Path) -> None:
    """What did not fit is one error; the whole lines stay, and the file is whole in the end."""
    path, finished, other = tmp_path / "r.jsonl", [], tmp_path / "other.jsonl"
    _finish(other, [])
    room = other.stat().st_size - 100  # within the last line
    other.unlink()
    with (
        full_disk(room),
        pytest.raises(ResultsError, match=r"r\.jsonl cannot be written: File too large.* same command"),
    ):
        _finish(path, finished)
    assert path.stat().st_size == room
    assert finished == [0, 1]
    _finish(path, finished)
    assert finished == [0, 1, 2]
    assert [json.loads(line).get("index") for line in path.read_text().splitlines()] == [None, 0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rows", [50, 9000])
def test_a_trace_on_a_full_disk_is_our_error(rows: int, tmp_path: Path) -> None:
    """Whether it ends in a chunk or in the footer, no trace stands under the name; written again there is one."""
    trace, path = make_trace(rows), tmp_path / "t.trace"
    with full_disk(2000), pytest.raises(TraceError, match=r"t\.trace cannot be written: File too large"):
        save_trace(trace, path)
    assert not path.exists()
    save_trace(trace, path)
    assert len(load_trace(path)) == rows


def test_a_file_on_a_full_disk_is_there_whole_or_not(tmp_path: Path) -> None:
    """JSON, pictures and pages: the old file stays, nothing is left beside it; names up to the longest work."""
    path = tmp_path / ("n" * 250 + ".json")
    write_whole(path, "old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_whole(path, "x" * 10_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
