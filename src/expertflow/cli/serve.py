"""`expertflow serve`: an HTTP server with OpenAI's API in front of a model."""

import logging
import os
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from starlette.types import ASGIApp

from expertflow.errors import ConfigError
from expertflow.outside import read_bytes
from expertflow.serve.app import make_app
from expertflow.serve.guard import Rules
from expertflow.serve.metrics import Metrics
from expertflow.serve.options import ServeConfig
from expertflow.serve.run import listen, run
from expertflow.serve.service import Names, Service
from expertflow.serve.worker import Bounds, Loading, Worker
from expertflow.units import format_bytes

_SHIPPED = "novella"
SWITCH_SECONDS = 5e-4
"""How long the thread that writes answers may keep the engine's waiting: Python's own 5 ms are longer than a step on a GPU."""
KEY_VARIABLE = "EXPERTFLOW_API_KEY"
"""Variable of the environment that holds a key."""


class Assembled(NamedTuple):
    """A server that does not run yet.

    Attributes:
        app: answers; its worker starts with it, or is started before.
        worker: loads the model and owns the engine.
        names: under which the model is served.
    """

    app: ASGIApp
    worker: Worker
    names: Names


def assemble(model: str | None, engine: dict[str, Any], options: ServeConfig) -> Assembled:
    """The server of a model.

    Args:
        model: checkpoint folder, GGUF file or Hugging Face id; None: the shipped model.
        engine: fields of `EngineConfig`.
        options: of the server.

    Raises:
        ConfigError: if a file of keys cannot be read.
    """
    if options.length is not None:
        engine = {**engine, "max_length": options.length}
    names = Names(served=options.served_model_name or [default_name(model)], anything=options.any_model)
    rules = Rules(keys=keys_of(options), hosts=options.allowed_host)
    metrics = Metrics(names.served[0])
    worker = Worker(
        partial(_load, model, engine, options.gpu_memory_utilization),
        Bounds(options.max_waiting, options.max_waiting_tokens),
        metrics,
    )
    return Assembled(make_app(Service(worker, names, metrics), rules), worker, names)


def main(*, model: str | None, engine: dict[str, Any], server: dict[str, Any]) -> None:
    """Listen, load, serve until a signal comes."""
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    console = Console(stderr=True)
    options = ServeConfig.from_mapping(server)
    app, worker, names = assemble(model, engine, options)
    bound = listen(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    where = f"http://{host}:{bound.getsockname()[1]}"
    console.print(f"Listening at {where}; loading {escape(names.served[0])}.", highlight=False, soft_wrap=True)

    def ready() -> None:
        plan = worker.llm.plan
        console.print(
            f"Ready: {where}/v1, model {escape(', '.join(names.served))}, sequences of {plan.max_length} tokens, "
            f"{plan.slots} of {plan.competing} experts in slots on {plan.device} ({format_bytes(plan.total)} planned).",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    run(app, worker, bound, options.grace, ready)
    if worker.alive:  # a model is still being loaded: nothing can be lost, and nothing ends it but the process's end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _load(model: str | None, engine: dict[str, Any], share: float | None, loading: Loading) -> Any:
    """Load in the worker's thread; torch is imported there, while the server answers already."""
    return import_module("expertflow.serve.load").load(model, engine, loading, share)


def default_name(model: str | None) -> str:
    """The name under which a model is served if none is stated: a folder's or file's own, or the id."""
    if model is None:
        return _SHIPPED
    return Path(model).absolute().name if Path(model).exists() else model


def keys_of(options: ServeConfig) -> list[str]:
    """All keys that open the server: those stated, that of the environment, and one a line of a file.

    Raises:
        ConfigError: if the file cannot be read or holds none.
    """
    keys = [key for key in (*options.api_key, os.environ.get(KEY_VARIABLE, "")) if key]
    if options.api_key_file is None:
        return keys
    file = options.api_key_file
    try:
        lines = read_bytes(Path(file)).decode().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}", "Give a text file with a key a line.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ConfigError(f"{file} holds no key", "Put one a line.")
    return keys + found
