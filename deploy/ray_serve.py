"""`expertflow serve` as a Ray Serve deployment: several replicas of one model, each the same application with its own engine.

Install: pip install '.[serve,scale]'
Usage: serve run deploy.ray_serve:build model=/models/Qwen1.5-MoE-A2.7B replicas=3 gpus=1 gpu_memory=10GiB

Arguments are `model`, `replicas`, `cpus` and `gpus` of a replica, and options of `expertflow serve` by their names with
underscores. Without `model` the shipped one is served. Where to listen and how long to wait at the end are Ray's own options.
"""

import asyncio
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from ray import serve
from starlette.types import ASGIApp

from expertflow.cli.arguments import check_serve
from expertflow.cli.serve import SWITCH_SECONDS, assemble
from expertflow.config import EngineConfig, nearest, options_of
from expertflow.errors import ConfigError
from expertflow.serve.options import ServeConfig

NOT_OURS = {"host": "http_options", "port": "http_options", "grace": "graceful_shutdown_timeout_s"}
"""Options of `expertflow serve` that are Ray's here, and where it has them."""
MOST_REQUESTS = 4096
"""Requests that Ray hands to a replica at once; the replica's own bounds refuse earlier, with an error in their shape."""
LOOK_SECONDS = 0.05


@serve.ingress()
class Replica:
    """One replica.

    Args:
        model: checkpoint folder, GGUF file or Hugging Face id, on the replica's machine; None: the shipped model.
        engine: fields of `EngineConfig`.
        server: fields of `ServeConfig`.
    """

    def __init__(self, model: str | None, engine: dict[str, Any], server: dict[str, Any]) -> None:
        """Make the application; the model is loaded when it starts."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._served = assemble(model, engine, ServeConfig.from_mapping(server))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application, which Ray asks for."""
        return self._served.app

    async def check_health(self) -> None:
        """Wait for the model: Ray sends a replica no request before its first check is over.

        Raises:
            BaseException: what loading the model raised.
            RuntimeError: if the engine's thread has ended.
        """
        worker = self._served.worker
        while worker.loading.phase not in {"ready", "failed"}:  # noqa: ASYNC110 - another thread writes it
            await asyncio.sleep(LOOK_SECONDS)
        if worker.error is not None:
            raise worker.error
        if not worker.alive:
            raise RuntimeError("the engine's thread has ended")


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve run` and a configuration file of Ray Serve name.

    Args:
        arguments: see above; values may be texts.

    Raises:
        ConfigError: for an argument that does not exist, is Ray's, or means nothing.
    """
    given = dict(arguments)
    model = given.pop("model", None)
    replicas, cpus, gpus = (_read(given.pop(name, one)) for name, one in (("replicas", 1), ("cpus", 1), ("gpus", 0)))
    servers = {option.name: option for option in options_of(ServeConfig)}
    engines = {option.name: option for option in options_of(EngineConfig) if option.name != "max_length"}
    engine, server = {"prefix_memory": "auto"}, dict[str, Any]()
    for name, value in given.items():
        if name in NOT_OURS:
            raise ConfigError(f"{name} is no option of a replica", f"Ray Serve has {NOT_OURS[name]}.")
        option = servers.get(name) or engines.get(name)
        if option is None:
            raise ConfigError(f"unknown argument {name!r}", nearest(name, [*servers, *engines]))
        texts = option.kind is str and not option.several
        (server if name in servers else engine)[name] = str(value) if texts else _read(value)
    check_serve(server, engine)
    deployment = serve.deployment(
        Replica, name="ExpertFlow", num_replicas=replicas, max_ongoing_requests=MOST_REQUESTS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )  # fmt: skip
    return deployment.bind(model, engine, server)


def _read(value: Any) -> Any:
    """A value that may be written as text."""
    return yaml.safe_load(value) if isinstance(value, str) else value
