"""How a command ends: our errors in one clear line (exit 2), a full disk too, and everything else as an internal error (70).

An internal error is a mistake of ours. Its traceback goes to a file. Must not know commands.
"""

import errno
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from expertflow.errors import ExpertFlowError, QuantisedWarning, UnreadWarning
from expertflow.limits import lacks_memory

WRONG, INTERNAL = 2, 70
"""Exit codes: an error that the user can mend; a mistake of ours (EX_SOFTWARE of sysexits.h)."""
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


@contextmanager
def reported() -> Iterator[None]:
    """Run a command inside.

    Raises:
        SystemExit: with the exit code, for every error that the command ends with.
    """
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                yield
        finally:
            sys.stdout.flush()
    except ExpertFlowError as error:
        _print("error", str(error))
        raise SystemExit(WRONG) from None
    except BrokenPipeError:  # the output is no longer read
        _drop_output()
        raise SystemExit(1) from None
    except Exception as error:  # noqa: BLE001 - the last resort
        if isinstance(error, OSError) and error.errno in _DISK:
            _drop_output()
            place = f"{error.filename} " if error.filename else "the output "
            _print("error", f"{place}cannot be written: {error.strerror}. Make room, and give the command again.")
            raise SystemExit(WRONG) from None
        if lacks_memory(error):
            _print("error", f"the host refused memory: {_line(error)}. Free memory, or raise its limits (ulimit -v).")
            raise SystemExit(WRONG) from None
        _print("internal error", f"{type(error).__name__}: {_line(error)}. {_keep_traceback()}")
        raise SystemExit(INTERNAL) from None


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:300]


def _print(kind: str, text: str) -> None:
    Console(stderr=True).print(f"[bold red]{kind}:[/] {escape(text)}", soft_wrap=True, highlight=False)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    """Show our own warnings as they are, and others with the place they come from."""
    ours = issubclass(category, UnreadWarning | QuantisedWarning)
    _print("warning", str(message) if ours else f"{filename}:{lineno}: {category.__name__}: {message}")


def _keep_traceback() -> str:
    """Write the traceback of the current error to a new file, or to stderr where that fails.

    Returns:
        What the user can do with it.
    """
    text = f"{sys.version}\n{' '.join(sys.argv)}\n\n{traceback.format_exc()}"
    try:
        handle, name = tempfile.mkstemp(prefix="expertflow-", suffix=".txt")
        os.close(handle)
        Path(name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError:
        sys.stderr.write(text)
        return "Please report it with the lines above."
    return f"Please report it with the file {name}."


def _drop_output() -> None:
    """Discard the remaining output, because Python writes it once more when it ends."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:  # a program's own stream has no number
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
