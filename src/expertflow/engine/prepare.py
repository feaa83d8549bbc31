"""A checkpoint looked at and planned, with nothing loaded: device, strategy, predictor, execution, then the plan.

Raises whatever would make loading or running fail later. Must not load weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import DEFAULT, PREDICTED_DEFAULT, Strategy, find_strategy
from expertflow.config import EngineConfig
from expertflow.engine.plan import Plan, make_plan, sequence_length
from expertflow.errors import ConfigError, DeviceError
from expertflow.execution.captured.capturable import graph_refusal
from expertflow.memory.store import memory_reported
from expertflow.models.bounds import describing
from expertflow.models.files.checkpoint import StoredTensor, resolve, walk
from expertflow.models.files.fingerprint import fingerprint
from expertflow.models.mapping import ExpertPiece, check_dense, map_experts
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import Skeleton, build_skeleton
from expertflow.predict.artifact import Artifact, load_artifact
from expertflow.predict.dataset import Shape
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor
from expertflow.predict.options import ABOUT_NAME

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED_MODEL, SHIPPED_PREDICTOR = ASSETS / "novella", ASSETS / "novella_predictor"
"""What comes with the package."""


def resolve_device(device: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, or `cuda:N` where N is torch's current device.

    Raises:
        DeviceError: if CUDA is asked for and not there, or another device than the current one.
    """
    available, (kind, _, index) = torch.cuda.is_available(), device.partition(":")
    if kind == "cuda" and not available:
        raise DeviceError(
            f"device={device!r}, but torch sees no CUDA device", "Use --device cpu, or install a CUDA build of torch."
        )
    if kind == "cuda" and index and int(index) != (current := torch.cuda.current_device()):
        raise DeviceError(
            f"device={device!r} is not torch's current device, which is 'cuda:{current}'",
            f"Call `torch.cuda.set_device({index})` first, or start with CUDA_VISIBLE_DEVICES={index} and device='cuda'.",
        )
    return torch.device("cuda" if available and kind != "cpu" else "cpu")


def check_default_device() -> None:
    """Refuse to load where torch makes new tensors elsewhere than in host memory.

    Raises:
        DeviceError: inside `with torch.device(...)` or after `torch.set_default_device(...)` of another device.
    """
    if (default := torch.get_default_device().type) != "cpu":
        raise DeviceError(
            f"torch's default device is {default!r}, and a model is loaded through host memory",
            "Load outside `with torch.device(...)`, or call `torch.set_default_device('cpu')`; `device=` says where it runs.",
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checkpoint that was looked at but not loaded: skeleton, where its experts are, the plan, and which weights.

    Attributes:
        skeleton: the model.
        pieces: where its experts are.
        plan: what goes where.
        fingerprint: sampled, of the weights.
        predictor: of the model, or None.
        tensors: the checkpoint, by key.
    """

    skeleton: Skeleton
    pieces: list[ExpertPiece]
    plan: Plan
    fingerprint: str
    predictor: Artifact | None = None
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def mapped(self) -> int:
        """Bytes of the files that dense weights are in: they are mapped while those are loaded."""
        return sum(file.stat().st_size for file in {tensor.file for tensor in self.dense.values()})

    @property
    def dense(self) -> dict[str, StoredTensor]:
        """The checkpoint without its experts, by key."""
        experts = {piece.source.key for piece in self.pieces}
        return {key: tensor for key, tensor in self.tensors.items() if key not in experts}


@memory_reported()
def prepare(
    model: str | Path, config: EngineConfig, forecast: Forecast | None = None, *, fetch: bool = True
) -> Prepared:
    """Read config and shard headers, check them against each other, and plan. Loads no weights.

    A forecast of the caller's own takes the predictor's place.

    Raises:
        ExpertFlowError: for anything that would make loading or running fail later.
    """
    check_default_device()
    if config.strategy is not None and forecast is None:
        find_strategy(config.strategy).check_future(None)  # before anything is read
    skeleton = build_skeleton(resolve(model, fetch=fetch), config.dtype)
    tensors, convert = walk(skeleton.folder), config.dtype != "auto"
    pieces = map_experts(skeleton, tensors, convert=convert)
    check_dense(skeleton, tensors, convert=convert)
    with describing(skeleton.folder / "config.json", "describes no model that can be run"):
        shape = shape_of(skeleton)
    mark = fingerprint(tensors)
    predictor = None if forecast is not None else _choose_predictor(config, skeleton.folder)
    if predictor is not None:
        wanted = Shape(shape.layers, shape.experts, skeleton.top_k)
        predictor.check_model(mark, wanted, str(skeleton.folder))
    strategy = find_strategy(config.strategy or (DEFAULT if predictor is None else PREDICTED_DEFAULT))
    if not strategy.predicted:
        _refuse_unused(predictor, config, strategy)
        predictor = None
    if config.schedule == "group" and predictor is None:
        raise ConfigError(
            "schedule='group' divides sequences by predicted route, and there is no predictor here",
            "Train one (`expertflow train-predictor`), or use schedule='auto' or 'fifo'.",
        )
    device = resolve_device(config.device)
    no_graph = graph_refusal(
        skeleton,
        strategy,
        device.type,
        rows=config.max_batch,
        forecast=forecast,
        predicted=predictor is not None,
    )
    live, batch, chunk = predictor_load(config)
    if shape.encoder_decoder:  # it reads a prompt in one pass
        chunk = max(chunk, sequence_length(config, shape))
    thinks = predictor_bytes(predictor, device, live, batch, chunk)
    plan = make_plan(config, shape, device.type, strategy.name, no_graph, predictor=thinks)
    return Prepared(skeleton=skeleton, pieces=pieces, plan=plan, fingerprint=mark, predictor=predictor, tensors=tensors)


def predictor_bytes(predictor: Artifact | None, device: torch.device, rows: int, batch: int, chunk: int) -> int:
    """What a predictor takes on a device, with the kernels it gets there; 0 without one. See `OnlinePredictor.nbytes`."""
    if predictor is None:
        return 0
    kernels = step_kernels(device)
    twin = kernels is not None and kernels(predictor) is not None
    return OnlinePredictor.nbytes(predictor, rows, batch, chunk, twin=twin)


def predictor_load(config: EngineConfig) -> tuple[int, int, int]:
    """Sequences the predictor remembers, how many it is told of at once, and the tokens of a pass."""
    live = config.max_live or config.max_batch
    return live, live, config.prefill_chunk


def _choose_predictor(config: EngineConfig, folder: Path) -> Artifact | None:
    """The predictor that was named, or the model's own: its folder `predictor`, or what ships with the shipped model.

    Raises:
        PredictorError: if it is damaged, or named and not there.
    """
    if config.predictor == "none":
        return None
    if config.predictor != "auto":
        return load_artifact(Path(config.predictor))
    own = SHIPPED_PREDICTOR if folder.resolve() == SHIPPED_MODEL.resolve() else folder / "predictor"
    return load_artifact(own) if (own / ABOUT_NAME).is_file() else None


def _refuse_unused(predictor: Artifact | None, config: EngineConfig, strategy: Strategy) -> None:
    """A strategy without predictions leaves the model's own predictor alone; one that was named is an error.

    Raises:
        ConfigError: then.
    """
    if predictor is not None and config.predictor != "auto":
        raise ConfigError(
            f"strategy {strategy.name!r} does not use a predictor, and predictor={config.predictor!r} was given",
            f"Use strategy {PREDICTED_DEFAULT!r}, or leave the predictor out.",
        )
