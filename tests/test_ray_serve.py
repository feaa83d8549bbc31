"""The deployment for Ray Serve, with a stand-in for Ray: what it is told of a replica, and what a replica does. Ray itself runs by hand."""

import asyncio
import runpy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient

from expertflow.errors import CheckpointError, ConfigError
from helpers import GUARD, ROOT, MakeCheckpoint


class Application:
    """What Ray makes of a deployment that is bound to arguments."""

    def __init__(self, replica: type, options: dict[str, Any], arguments: tuple[Any, ...]) -> None:
        self.replica, self.options, self.arguments = replica, options, arguments

    def start(self) -> Any:
        return self.replica(*self.arguments)


class Deployment:
    """What Ray makes of a class."""

    def __init__(self, replica: type, **options: Any) -> None:
        self.replica, self.options = replica, options

    def bind(self, *arguments: Any) -> Application:
        return Application(self.replica, self.options, arguments)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Application]:
    """The function that `serve run` calls."""
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")
    serve.__dict__.update(deployment=Deployment, Application=Application, ingress=lambda: lambda kind: kind)
    ray.__dict__["serve"] = serve
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    return runpy.run_path(str(ROOT / "deploy" / "ray_serve.py"))["build"]


def test_a_replica_is_the_server(
    build: Callable[[dict[str, Any]], Application], make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With arguments as texts, as `serve run` gives them: it is healthy once the model is there, and answers as the server does."""
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    folder = make_checkpoint("qwen3_moe")
    given = {
        "device": "cpu",
        "max_batch": "2",
        "prefix_memory": "1MiB",
        "max_model_len": "64",
        "served_model_name": "[a, b]",
    }
    application = build({"model": str(folder), "replicas": "3", "cpus": "0.5", **given})
    assert application.options["num_replicas"] == 3
    assert application.options["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 0}
    replica = application.start()
    with TestClient(replica.__serve_build_asgi_app__(), base_url="http://localhost") as client:
        asyncio.run(asyncio.wait_for(replica.check_health(), GUARD))
        found = client.get("/v1/models").json()["data"]
        assert [(one["id"], one["max_model_len"]) for one in found] == [("a", 64), ("b", 64)]
        answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "ignore_eos": True})
        assert answer.json()["usage"]["completion_tokens"] == 3
    with pytest.raises(RuntimeError, match="has ended"):
        asyncio.run(asyncio.wait_for(replica.check_health(), GUARD))


def test_a_replica_without_a_model_is_not_healthy(
    build: Callable[[dict[str, Any]], Application], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray is told why."""
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)
    replica = build({"model": "/nowhere", "device": "cpu"}).start()
    with TestClient(replica.__serve_build_asgi_app__()), pytest.raises(CheckpointError, match="/nowhere"):
        asyncio.run(asyncio.wait_for(replica.check_health(), GUARD))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": "8000"}, "port is no option of a replica.*http_options"),
        ({"replcas": "3"}, "unknown argument 'replcas'"),
        ({"max_length": "5"}, "unknown argument 'max_length'"),
        ({"max_batch": "0"}, "max_batch=0"),
        ({"max_waiting": "many"}, "max_waiting"),
    ],
)
def test_wrong_arguments_are_refused_before_a_replica_starts(
    given: dict[str, str], message: str, build: Callable[[dict[str, Any]], Application]
) -> None:
    """By name."""
    with pytest.raises(ConfigError, match=message):
        build(given)
