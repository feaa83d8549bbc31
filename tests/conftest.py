"""Fixtures of several test modules; the environment of a test run; tensor shapes are checked in every test."""

import gc
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# before anything of torch or expertflow is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OPENBLAS_CORETYPE"] = "Sandybridge"  # Haswell's products give a row other bits by its place in a tile
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: spinning threads would starve each other
if os.environ.get("EXPERTFLOW_CHECK_SHAPES", "1") == "1":
    from jaxtyping import install_import_hook

    WITH_SHAPES = [
        "models.experts",
        "models.switch",
        "execution.runner",
        "execution.sampler",
        "kernels.sampling.reference",
    ]
    install_import_hook([f"expertflow.{name}" for name in WITH_SHAPES], "beartype.beartype")

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors; read when they are imported
from transformers.utils import logging

from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.models.weights import packing
from expertflow.predict.artifact import Artifact, save_artifact
from expertflow.predict.counts import SOURCES, remember
from expertflow.predict.dataset import Shape
from expertflow.predict.kinds import make as make_network
from expertflow.predict.network import OUTPUTS, PredictorConfig
from expertflow.trace.format import Trace, load_trace
from helpers import EXCERPT, MakeCheckpoint, MakePredictor, save_checkpoint

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

    from serving import Served

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # how long an example takes is the machine's affair
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
packing._LEAST = 0  # parts of the tests' checkpoints are small: a GPU packs them all the same


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> "LoadScopeScheduling | None":
    """Groups of tests go to one worker each, with `--dist loadgroup`."""
    from sharing import Sharing  # noqa: PLC0415 - a run of one process needs no xdist

    return Sharing(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports and tests are a million objects that stay: Python's collector would read all of them again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Save a small random model of a family, once for each set of arguments."""
    made: dict[tuple, Path] = {}

    def make(
        model_type: str = "qwen3_moe",
        dtype: str = "float32",
        *,
        shard: str = "5GB",
        spread: float = 0,
        **overrides: object,
    ) -> Path:
        """`spread`: standard deviation of the weights, wide enough that tokens depend on all that is seen; 0: as drawn."""
        key = (model_type, dtype, shard, json.dumps(overrides, sort_keys=True), *([spread] if spread else []))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{model_type}-{dtype}")
            seed = zlib.crc32(repr(key).encode())  # the same weights, whichever tests ran before
            save_checkpoint(folder, model_type, dtype, overrides, seed=seed, shard=shard, spread=spread)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="module")
def make_predictor(tmp_path_factory: pytest.TempPathFactory) -> MakePredictor:
    """A predictor with random weights for a checkpoint."""

    def build(model: Path, **changes: object) -> Path:
        prepared = prepare(model, EngineConfig(device="cpu", predictor="none"))
        shape = prepared.plan.shape
        torch.manual_seed(0)
        config = PredictorConfig(
            layers=shape.layers, experts=shape.experts, top_k=prepared.skeleton.top_k, vocabulary=shape.vocabulary,
            width=16, embedding=8, window=32,
        )  # fmt: skip
        network = make_network(config).eval()
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        network.vocabulary.learn(torch.arange(shape.vocabulary))
        size = Shape(shape.layers, shape.experts, prepared.skeleton.top_k)
        artifact = Artifact(
            model=network, memory=remember((), size, shape.vocabulary, 0),
            calibration=torch.ones(2 + SOURCES, OUTPUTS, shape.layers, 1),
            **{"fingerprint": prepared.fingerprint, "made_for": "tiny", **changes},
        )  # fmt: skip
        folder = tmp_path_factory.mktemp("predictor")
        save_artifact(artifact, folder)
        return folder

    return build


@pytest.fixture(scope="session")
def served(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Served"]:
    """A server around a small model with a chat template and 512 tokens of context."""
    from serving import TEMPLATE, Served  # noqa: PLC0415 - FastAPI and clients are of use to few tests

    made, folder = (
        make_checkpoint("qwen3_moe", spread=0.3, max_position_embeddings=512, vocab_size=259),
        tmp_path_factory.mktemp("served"),
    )
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    server = Served(folder)
    yield server
    server.close()


@pytest.fixture(scope="module")
def real() -> Trace:
    """The recorded excerpt without the condition of repetition."""
    return load_trace(EXCERPT).without("repetition")


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
