"""Whether Triton is installed, and a folder in which it can keep what it compiles. Must not know any kernel."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

HAS_TRITON = find_spec("triton") is not None


def ensure_kernel_folder() -> None:
    """Let Triton keep what it compiles in a new temporary folder if its own cannot be written to."""
    from triton import knobs  # noqa: PLC0415 - a machine without a GPU need not have it

    place = Path(knobs.cache.dir)
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="expertflow-triton-")
