"""Read a checkpoint's headers, choose device, strategy, predictor and execution, then plan; nothing is loaded.

Every error that would make loading or running fail later is raised here. Must not load weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expertflow.cache.forecast import Forecast
from expertflow.cache.strategy import DEFAULT, PREDICTED_DEFAULT, Strategy, find_strategy
from expertflow.config import EngineConfig
from expertflow.engine.plan import Plan, make_plan
from expertflow.engine.planning.pass_size import SMALLEST
from expertflow.errors import ConfigError, DeviceError
from expertflow.execution.captured.capturable import graph_refusal
from expertflow.execution.replay import Replay
from expertflow.execution.rope import by_length
from expertflow.formats.table import FORMATS, Formats
from expertflow.memory.devices import resolve_device
from expertflow.memory.store import memory_reported
from expertflow.models.bounds import describing
from expertflow.models.files.checkpoint import resolve
from expertflow.models.places import described_by
from expertflow.models.shape import ModelShape, shape_of
from expertflow.models.skeleton import Skeleton, build_skeleton
from expertflow.models.weights.sources import FileWeights, Located, WeightsSource
from expertflow.predict.artifact import Artifact, load_artifact
from expertflow.predict.dataset import Shape
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor
from expertflow.predict.options import ABOUT_NAME
from expertflow.schedule.scheduler import check_schedule

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED_MODEL, SHIPPED_PREDICTOR = ASSETS / "novella", ASSETS / "novella_predictor"
"""Model and predictor that come with the package."""


def check_default_device() -> None:
    """Refuse to load where torch makes new tensors elsewhere than in host memory.

    Raises:
        DeviceError: inside `with torch.device(...)` or after `torch.set_default_device(...)` of another device.
    """
    if (default := torch.get_default_device().type) != "cpu":
        raise DeviceError(
            f"torch's default device is {default!r}, and a model is loaded through host memory",
            "Load outside `with torch.device(...)`, or call `torch.set_default_device('cpu')`; `device=` states where it runs.",
        )


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What a run uses, chosen before the plan and carried from then on.

    Attributes:
        device: with its index if it is a CUDA device.
        strategy: entry of the strategy table.
        predictor: the predictor that is used, or None.
        no_graph: why decode steps cannot run as graphs; empty if they can.
    """

    device: torch.device
    strategy: Strategy
    predictor: Artifact | None = None
    no_graph: str = ""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checkpoint that was read but not loaded: skeleton, where its weights are, choices, and the plan.

    Attributes:
        skeleton: the model.
        weights: the source of its weights.
        located: where they are.
        choices: device, strategy, predictor, and whether decode steps can be graphs.
        plan: what goes where.
    """

    skeleton: Skeleton
    weights: WeightsSource
    located: Located
    choices: Choices
    plan: Plan

    @property
    def predictor(self) -> Artifact | None:
        """The predictor that is used, or None."""
        return self.choices.predictor

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights, sampled."""
        return self.located.fingerprint


@memory_reported()
def prepare(  # noqa: PLR0913 - the last ones by keyword
    model: str | Path,
    config: EngineConfig,
    forecast: Forecast | None = None,
    *,
    weights: WeightsSource | None = None,
    routing: Replay | None = None,
    formats: Formats = FORMATS,
    fetch: bool = True,
    own_cache: bool = False,
) -> Prepared:
    """Read config and shard headers, check them against each other, and plan. Loads no weights.

    Args:
        model: checkpoint folder, GGUF file, or a Hugging Face id.
        config: the options.
        forecast: the caller's own; it replaces the predictor.
        weights: where the weights come from; None: the folder's files.
        routing: recorded routing that is replayed; None: the router decides.
        formats: how weights may be stored.
        fetch: whether an id that is not in the local cache may be fetched.
        own_cache: whether the caller brings the cache of keys and values, as programs of transformers do.

    Raises:
        ExpertFlowError: for anything that would make loading or running fail later.
    """
    check_default_device()
    if config.strategy is not None and forecast is None:
        find_strategy(config.strategy).check_future(None)  # before anything is read
    skeleton = build_skeleton(resolve(model, fetch=fetch), config.dtype, formats)
    if config.expert_format is not None:
        skeleton = replace(skeleton, expert_format=FORMATS[config.expert_format])
    weights = FileWeights() if weights is None else weights
    located = weights.locate(skeleton, convert=config.dtype != "auto")
    with describing(described_by(skeleton.folder), "describes no model that can be run"):
        shape = shape_of(skeleton, located.layers)
    if own_cache:
        shape = shape.without_pages()
    if routing is not None:
        shape = routing.counted(shape)
    predictor = None if forecast is not None else _choose_predictor(config, skeleton.folder)
    if predictor is not None:
        wanted = Shape(shape.layers, shape.experts, skeleton.top_k)
        predictor.check_model(located.fingerprint, wanted, str(skeleton.folder))
    choices = choose(config, skeleton, shape, predictor, forecast)
    reserved = predictor_bytes(choices.predictor, choices.device, *predictor_load(config))
    plan = make_plan(
        config, shape, choices.device.type, choices.strategy.name, choices.no_graph, predictor=reserved,
        no_prefix=prefix_refusal(skeleton, routing),
    )  # fmt: skip
    return Prepared(skeleton=skeleton, weights=weights, located=located, choices=choices, plan=plan)


def prefix_refusal(skeleton: Skeleton, routing: Replay | None) -> str:
    """Why a prompt cannot begin with another one's keys and values; empty if it can, where they lie in pages."""
    if routing is not None:
        return "recorded routing is replayed from the beginning of each prompt"
    if skeleton.reread_length is not None or any(by_length(module) for module in skeleton.model.modules()):
        return f"rotary tables of {skeleton.config.model_type!r} depend on the length of a sequence"
    return ""


def choose(
    config: EngineConfig, skeleton: Skeleton, shape: ModelShape, found: Artifact | None, forecast: Forecast | None
) -> Choices:
    """Choose device, strategy, predictor, and whether decode steps can be graphs; reads no file.

    Args:
        config: the options.
        skeleton: the model.
        shape: the model's figures.
        found: the predictor that was named or is the model's own, or None.
        forecast: the caller's own, or None.

    Raises:
        ConfigError: if strategy, predictor and schedule exclude each other.
        DeviceError: if the device is not visible.
    """
    strategy = find_strategy(config.strategy or (DEFAULT if found is None else PREDICTED_DEFAULT))
    if not strategy.predicted:
        _refuse_unused(found, config, strategy)
        found = None
    check_schedule(config.schedule, predicted=found is not None)
    device = resolve_device(config.device)
    no_graph = graph_refusal(
        skeleton,
        shape.records,
        strategy,
        device.type,
        rows=config.max_batch,
        forecast=forecast,
        predicted=found is not None,
    )
    return Choices(device=device, strategy=strategy, predictor=found, no_graph=no_graph)


def predictor_bytes(predictor: Artifact | None, device: torch.device, live: int, batch: int, chunk: int) -> int:
    """Return the bytes a predictor takes on a device, with the kernels it gets there; 0 without one."""
    if predictor is None:
        return 0
    kernels = step_kernels(device)
    twin = kernels is not None and kernels(predictor) is not None
    return OnlinePredictor.nbytes(predictor, live, batch, chunk, twin=twin)


def predictor_load(config: EngineConfig) -> tuple[int, int, int]:
    """Return how many sequences a predictor has state for, how many it updates at once, and the prompts' tokens it takes in at once."""
    live = config.max_live or config.max_batch
    return live, live, min(SMALLEST, config.prefill_chunk or SMALLEST)


def _choose_predictor(config: EngineConfig, folder: Path) -> Artifact | None:
    """Load the predictor that was named, or the model's own: its folder `predictor`, or the one shipped with the package.

    Raises:
        PredictorError: if it is damaged, or named and missing.
    """
    if config.predictor == "none":
        return None
    if config.predictor != "auto":
        return load_artifact(Path(config.predictor))
    own = SHIPPED_PREDICTOR if folder.resolve() == SHIPPED_MODEL.resolve() else folder / "predictor"
    return load_artifact(own) if (own / ABOUT_NAME).is_file() else None


def _refuse_unused(predictor: Artifact | None, config: EngineConfig, strategy: Strategy) -> None:
    """Refuse a named predictor with a strategy that uses none; the model's own is not used then.

    Raises:
        ConfigError: if a predictor was named.
    """
    if predictor is not None and config.predictor != "auto":
        raise ConfigError(
            f"strategy {strategy.name!r} does not use a predictor, and predictor={config.predictor!r} was given",
            f"Use strategy {PREDICTED_DEFAULT!r}, or leave the predictor out.",
        )
