"""Seeded hostile inputs, and the guard every one of them runs under: our error, or a right answer, in bounded time and memory."""

import json
import os
import random
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from expertflow.errors import ExpertFlowError, HostMemoryError

MANY = int(os.environ.get("EXPERTFLOW_FUZZ", "1"))
"""Times as many cases as CI runs."""
_MEMORY = 3 << 30
"""Bytes of address space that a case may take."""
_SECONDS = 60
"""Of a case: a machine may be slow, a hang is longer."""
_RAW = {
    "@digits@": "9" * 5000,
    "@deep@": "[" * 200_000 + "]" * 200_000,
    "@open@": "{" * 2000,
    "@huge@": "1e999",
    "@zero@": "-0",
}
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 10**9, 10**12, 10**30, -(2**63), 0.5, 1.0, -1.5,
    1e308, float("nan"), float("inf"), "", "x", "0", "16", "[/b]x", "a" * 5000, "../x", "/etc/passwd", "\0", "é", "\ud800", "float16", "float64",
    [], {}, [1], [None], [[[]]], ["x"] * 9, {"x": 1}, {"x": {"y": []}}, *_RAW,
)  # fmt: skip


def hostile(value: Any, random_: random.Random) -> str:
    """JSON text of a value with one to three places of it changed."""
    value = json.loads(json.dumps(value))
    for _ in range(random_.choice((1, 1, 1, 2, 3))):
        value = _changed(value, random_)
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(f'"{mark}"', raw)
    if random_.random() < 0.1:
        return spoilt(text.encode(), random_).decode("latin-1")
    return text


def _changed(value: Any, random_: random.Random) -> Any:
    """The value with one place changed, deep or not."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or random_.random() < 0.05:
        return deepcopy(random_.choice(VALUES))
    key, what = random_.choice(inside), random_.random()
    if isinstance(value[key], dict | list) and value[key] and what < 0.7:
        value[key] = _changed(value[key], random_)
    elif what < 0.85:
        value[key] = deepcopy(random_.choice(VALUES))
    elif what < 0.92:
        del value[key]
    elif isinstance(value, dict):
        value[random_.choice(("", "x", "a" * 300, f"{key}x"))] = deepcopy(value[key])
    else:
        value.append(deepcopy(value[key]))
    return value


def spoilt(raw: bytes, random_: random.Random) -> bytes:
    """Bytes with some changed, cut off or doubled."""
    place, what = random_.randrange(len(raw) + 1), random_.random()
    if what < 0.25:
        return raw[:place]
    if what < 0.4:
        return raw[:place] + raw[random_.randrange(len(raw)) :]
    changed = bytearray(raw)
    for _ in range(random_.choice((1, 1, 2, 8))):
        changed[random_.randrange(len(raw))] = random_.choice((0, 255, 34, 91, 123, random_.randrange(256)))
    return bytes(changed)


def with_header(header: str, data: bytes) -> bytes:
    """A safetensors file."""
    raw = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or our error. Anything else fails: other errors, unbounded memory, a hang."""
    try:
        with _guarded():
            return call()
    except ExpertFlowError as error:
        if isinstance(error, HostMemoryError) and "refused memory" in str(error):
            raise AssertionError("memory without bound") from error
        return error


@contextmanager
def _guarded() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"longer than {_SECONDS} seconds")

    status = Path("/proc/self/status").read_text(encoding="ascii")
    used = int(status.partition("VmSize:")[2].split()[0]) << 10
    before, limit = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, limit[1]))
    old = signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(old)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limit)
