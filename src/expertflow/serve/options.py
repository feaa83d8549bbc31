"""Options of a server that are no options of its engine: `ServeConfig`. Declared as `config` declares the others.

Must not import FastAPI and torch, so that wrong options are refused at once.
"""

from dataclasses import dataclass
from math import inf

from expertflow.config import _Checked, _documented, _read_several, _read_types, _require, doc


@_documented
@dataclass(frozen=True, kw_only=True)
class ServeConfig(_Checked):
    """How to serve a model over HTTP."""

    host: str = doc("Where to listen; 0.0.0.0: at every address of the machine.", default="127.0.0.1")
    port: int = doc("0: any free one.", default=8000)
    max_model_len: str = doc(
        "Tokens of a sequence, prompt included, such as 32k; auto: the longest that leaves half of the slots with one sequence.",
        default="auto",
    )
    served_model_name: tuple[str, ...] = doc("Name of the model for clients. Default: its own.", default=())
    any_model: bool = doc("Take every model name that a client asks for.", default=False)
    api_key: tuple[str, ...] = doc("Key that clients need; the variable EXPERTFLOW_API_KEY too.", default=())
    api_key_file: str | None = doc("File with a key a line.", default=None)
    allowed_host: tuple[str, ...] = doc(
        "Name under which clients may reach the server, *: any. Default: localhost, the machine's name, and addresses.",
        default=(),
    )
    max_waiting: int = doc("Sequences that may wait for their first token.", default=256)
    max_waiting_tokens: int = doc("Prompt tokens that may wait.", default=2_000_000)
    grace: float = doc("Seconds that running requests have after SIGTERM.", default=30.0)
    gpu_memory_utilization: float | None = doc("Share of the GPU's memory, in place of `gpu_memory`.", default=None)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        _read_types(self)
        for name in ("served_model_name", "api_key", "allowed_host"):
            object.__setattr__(self, name, _read_several(name, getattr(self, name), str))
        _require(0 <= self.port < 2**16, f"port={self.port} is no port", "Use 0 to 65535.")
        for name in ("max_waiting", "max_waiting_tokens"):
            value = getattr(self, name)
            _require(value >= 1, f"{name}={value} is too small", "Use 1 or more.")
        _require(0 <= self.grace < inf, f"grace={self.grace} is no number of seconds", "Use 0 or more.")
        share = self.gpu_memory_utilization
        _require(share is None or 0 < share <= 1, f"gpu_memory_utilization={share} is no share", "Use one in (0, 1].")
        for name in ("served_model_name", "api_key"):
            _require(all(one.strip() for one in getattr(self, name)), f"{name} contains an empty text", "Remove it.")
        _read_length(self.max_model_len)

    @property
    def length(self) -> int | None:
        """Tokens of a sequence; None: the longest that the memory affords."""
        return _read_length(self.max_model_len)


def _read_length(text: str) -> int | None:
    """`4096`, `32k` (32,000), `32K` (32,768), or `auto`, which is None."""
    if text == "auto":
        return None
    digits, scale = (text[:-1], 1000 if text[-1] == "k" else 1024) if text[-1:] in {"k", "K"} else (text, 1)
    number = int(digits) if digits.isdecimal() and digits.isascii() and len(digits) < 10 else 0
    _require(number > 0, f"max_model_len={text!r} is no number of tokens", "Write it like 4096, 32k or auto.")
    return number * scale
