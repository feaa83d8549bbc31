"""`expertflow chat`: talk in the terminal to a model that is loaded here, or to a server.

Must not know how requests run.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console
from rich.markup import escape

from expertflow.errors import ConfigError, ExpertFlowError

with suppress(ImportError):
    import readline  # noqa: F401 - importing it gives `input` a history and line editing

_HELP = """/reset          forget the chat
/undo           forget the last message and its answer
/system TEXT    set the system message and forget the chat
/save FILE      write the chat as JSON
/load FILE      go on with a saved chat
/exit           end (Ctrl-D too); Ctrl-C stops an answer
A line that ends with \\ goes on in the next one."""
_LOOK_SECONDS = 0.5
Messages = list[dict[str, str]]


class Backend(Protocol):
    """What answers."""

    name: str

    def answer(self, messages: Messages) -> Iterator[str]:
        """The pieces of an answer.

        Raises:
            ExpertFlowError: if there is none.
        """


class Server:
    """A server with OpenAI's API.

    Args:
        url: with or without `/v1`.
        key: that it needs, or None.
        fields: of every request.
        opens: opens a request, as `urllib.request.urlopen` does.

    Raises:
        ConfigError: if it cannot be reached.
    """

    def __init__(
        self, url: str, key: str | None, fields: Mapping[str, Any], opens: Callable[[Request], Any] = urlopen
    ) -> None:
        """Ask for its model, once that is loaded."""
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        if not self._base.startswith(("http://", "https://")):
            raise ConfigError(f"url={url!r} is no address of a server", "Write it like http://127.0.0.1:8000.")
        self._headers = {"content-type": "application/json"} | (
            {} if key is None else {"authorization": f"Bearer {key}"}
        )
        self._fields, self._opens = dict(fields), opens
        waits = False
        while (found := self._models()) is None:
            if not waits:
                Console(stderr=True).print("The server is loading its model.")
            waits = True
            time.sleep(_LOOK_SECONDS)
        self.name = found

    def _models(self) -> str | None:
        """The first model's name; None while it is being loaded."""
        try:
            with self._open("/models") as answer:
                return str(json.load(answer)["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(f"{self._base} is no server with OpenAI's API", "Give its address.") from error
        except _LoadingError:
            return None

    @contextmanager
    def _open(self, path: str, body: Any = None) -> Iterator[Any]:
        """An answer, open; its errors as ours."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with self._opens(Request(self._base + path, data, self._headers)) as answer:  # noqa: S310 - http and https alone
                yield answer
        except HTTPError as error:
            told = _error_of(error)
            if told.get("code") == "loading":
                raise _LoadingError from error
            raise ConfigError(f"the server refused: {told.get('message', error.reason)}", "") from error
        except (URLError, HTTPException, OSError) as error:
            why = getattr(error, "reason", error)
            raise ConfigError(f"{self._base} does not answer: {why}", "Is the server running there?") from error

    def answer(self, messages: Messages) -> Iterator[str]:
        """Stream an answer; leaving the iterator ends the request at the server."""
        body = {"model": self.name, "messages": messages, "stream": True, **self._fields}
        with self._open("/chat/completions", body) as answer:
            for line in answer:
                text = line.decode().rstrip()
                if text.startswith("data: ") and text != "data: [DONE]":
                    yield from _piece(json.loads(text[6:]))


class _LoadingError(Exception):
    """The server loads its model."""


def _error_of(error: HTTPError) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.load(error)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found


def _piece(chunk: Mapping[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise ConfigError(f"the server failed: {chunk['error'].get('message')}", "")
    for choice in chunk["choices"]:
        delta = choice["delta"]
        if text := (delta.get("reasoning_content") or "") + (delta.get("content") or ""):
            yield text


class Chat:
    """One chat in a terminal.

    Args:
        backend: answers.
        system: message that the chat begins with; empty: none.
        read: a line of the user's.
        write: shows text.
    """

    def __init__(
        self,
        backend: Backend,
        system: str,
        read: Callable[[str], str] = input,
        write: Callable[[str], object] | None = None,
    ) -> None:
        """Begin without messages."""
        self._backend, self._system, self._read = backend, system, read
        self._write = write or self._show
        self._commands: Mapping[str, Callable[[str], object]] = {
            "/reset": lambda _: self.reset(), "/undo": lambda _: self.undo(), "/system": self.begin, "/save": self.save,
            "/load": self.load, "/help": lambda _: self._write(f"{_HELP}\n"),
        }  # fmt: skip
        self.reset()

    @staticmethod
    def _show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: Messages = [{"role": "system", "content": self._system}] if self._system else []

    def begin(self, system: str) -> None:
        """Begin anew with another system message."""
        self._system = system
        self.reset()

    def undo(self) -> None:
        """Forget the last message of the user and what came after it."""
        users = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        del self.messages[users[-1] if users else len(self.messages) :]

    def save(self, name: str) -> None:
        """Write the chat to a file."""
        text = json.dumps({"model": self._backend.name, "messages": self.messages}, ensure_ascii=False, indent=1)
        Path(name).write_text(text + "\n", encoding="utf-8")

    def load(self, name: str) -> None:
        """Go on with a chat from a file."""
        found = json.loads(Path(name).read_text(encoding="utf-8"))
        self.messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in found["messages"]]

    def run(self) -> None:
        """Read messages and show answers until the user ends."""
        while True:
            try:
                line = self._line()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return
            word, _, rest = line.partition(" ")
            if word in {"/exit", "/quit", "/bye"}:
                return
            if word.startswith("/"):
                self._command(word, rest.strip())
            elif line.strip():
                self._turn(line)

    def _line(self) -> str:
        lines = [self._read("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(". "))
        return "\n".join(lines)

    def _command(self, word: str, rest: str) -> None:
        try:
            self._commands.get(word, self._commands["/help"])(rest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._write(f"{word} {rest} failed: {error}\n")

    def _turn(self, text: str) -> None:
        """Send a message and show the answer as it comes. One that was stopped stays as far as it came."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with _stoppable() as stopped:
                for piece in self._backend.answer(self.messages):
                    pieces.append(piece)
                    self._write(piece)
                    if stopped():
                        break
        except ExpertFlowError as error:
            self._write(f"\n{error} (/undo or /reset shortens the chat.)\n")
        self._write("\n")
        if pieces:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            self.undo()


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside is noted, not raised; a second one is raised."""
    pressed: list[bool] = []

    def press(*_: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def talk(backend: Backend, system: str) -> None:
    """Greet and chat."""
    console = Console(stderr=True)
    console.print(f"{escape(backend.name)}; /help lists commands.", highlight=False)
    Chat(backend, system).run()


def main(
    *,
    model: str | None,
    server: tuple[str, str | None] | None,
    system: str,
    engine: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Chat with a server, or load a model and chat with that."""
    if server is not None:
        talk(Server(*server, sampling), system)
    else:
        import_module("expertflow.cli.chat_here").main(model, system, engine, sampling, talk)
