"""Arguments of the commands that import torch, checked before they do: a wrong one is refused at once.

The command checks what depends on the model or the machine. Must not import torch.
"""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expertflow.bench.presets import make_settings
from expertflow.cache.strategy import find_strategy
from expertflow.cli.evaluation import Test
from expertflow.cli.outputs import check_outputs
from expertflow.cli.record_bytes import bytes_of
from expertflow.config import EngineConfig, SamplingParams
from expertflow.errors import ConfigError, PredictorError
from expertflow.models.files.checkpoint import resolve
from expertflow.outside import is_file, name_fault
from expertflow.predict.dataset import read_condition
from expertflow.predict.options import ABOUT_NAME, TrainConfig, check_kind
from expertflow.prompts import read_texts_or_tokens
from expertflow.serve.options import ServeConfig
from expertflow.sim.sweep import AS_RECORDED, strategy_names
from expertflow.trace.format import open_trace
from expertflow.units import read_slots

_SERVE_NEEDS = ("fastapi", "llguidance", "uvicorn", "orjson", "prometheus_client")
"""Modules of the extra `serve`."""


def check_run(engine: Mapping[str, Any], sampling: Mapping[str, Any], prompts: int, out: Path | None) -> None:
    """Refuse options that no model could run with.

    Args:
        engine: fields of `EngineConfig` that were given.
        sampling: fields of `SamplingParams`.
        prompts: how many there are; the default of `max_batch` depends on it.
        out: file to write, or None.

    Raises:
        ExpertFlowError: then.
    """
    SamplingParams.from_mapping(sampling)
    check_outputs(None, out)
    check_engine(engine, max_batch=min(prompts, EngineConfig.max_batch))


def check_engine(engine: Mapping[str, Any], max_batch: int) -> None:
    """Refuse engine options that mean nothing.

    Args:
        engine: fields of `EngineConfig` that were given.
        max_batch: where it is not given.

    Raises:
        ExpertFlowError: then.
    """
    config = EngineConfig.from_mapping({"max_batch": max_batch, **engine})
    if config.strategy is not None:
        find_strategy(config.strategy).check_future(None)
    if config.predictor not in {"auto", "none"}:
        check_predictor(Path(config.predictor))


def check_serve(server: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    """Refuse options that no model could be served with, and to serve without what that needs.

    Args:
        server: fields of `ServeConfig` that were given.
        engine: fields of `EngineConfig`.

    Raises:
        ExpertFlowError: then.
    """
    options = ServeConfig.from_mapping(server)
    check_engine(engine if options.length is None else {**engine, "max_length": options.length}, EngineConfig.max_batch)
    if options.gpu_memory_utilization is not None and "gpu_memory" in engine:
        raise ConfigError("gpu_memory and gpu_memory_utilization are both given", "They state one budget: give one.")
    if missing := [name for name in _SERVE_NEEDS if find_spec(name) is None]:
        raise ConfigError(f"serve needs {', '.join(missing)}", "Install it: pip install 'expertflow-moe[serve]'.")


def check_predictor(folder: Path) -> None:
    """Refuse a folder without a predictor.

    Raises:
        PredictorError: then.
    """
    if not is_file(folder / ABOUT_NAME):
        raise PredictorError(
            f"{folder} holds no predictor: {ABOUT_NAME} is missing",
            "Give a folder written by `expertflow train-predictor`.",
        )


def check_model(model: str | None, *, fetch: bool) -> None:
    """Refuse a checkpoint that is no folder, nor a model in the cache; None: the shipped model's.

    Args:
        model: folder or Hugging Face id.
        fetch: whether an id may be fetched into the cache.

    Raises:
        CheckpointError: then.
    """
    if model is not None:
        resolve(model, fetch=fetch)


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,4,recorded`: live sequences; 0 for the passes as they were recorded.

    Raises:
        ConfigError: if a part is no such thing.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part != "recorded" and not (part.isdecimal() and len(part) < 10 and int(part) >= 1):
            raise ConfigError(f"batch={part!r} is no number of sequences", "Write it like 1,4,8 or recorded.")
    return tuple(AS_RECORDED if part == "recorded" else int(part) for part in parts)


def check_simulate(
    trace: Path, slots: str, batch: str, strategy: str, outputs: tuple[Path | None, Path | None]
) -> None:
    """Refuse what cannot be replayed, and files that cannot be written.

    Raises:
        ExpertFlowError: then.
    """
    check_outputs(*outputs)
    parse_batches(batch)
    strategy_names(strategy)
    _check_slots(slots.split(","))
    open_trace(trace)


def check_evaluation(test: Test, predictor: Path, outputs: tuple[Path | None, Path | None]) -> None:
    """Refuse what cannot be measured, a folder without a predictor, and files that cannot be written.

    Raises:
        ExpertFlowError: then.
    """
    test.check()
    check_outputs(*outputs)
    check_predictor(predictor)
    check_model(test.model, fetch=False)


def check_record(record_mb: float | None) -> None:
    """Refuse what is no size of an expert.

    Raises:
        ConfigError: then.
    """
    if record_mb is not None:
        bytes_of(record_mb)


def check_bench(preset: str, options: Mapping[str, Any], out: Path | None) -> None:
    """Refuse settings that no machine can measure.

    Raises:
        ExpertFlowError: then.
    """
    settings = make_settings(preset, options)
    check_outputs(None, out)
    _check_slots(settings.slots)
    check_engine(
        {name: getattr(settings, name) for name in ("device", "dtype", "predictor", "expert_format")}, max_batch=1
    )
    if settings.prompts_file is not None:
        read_texts_or_tokens(settings.prompts_file)
    check_model(settings.model, fetch=True)


def _check_slots(texts: Iterable[str]) -> None:
    for text in texts:
        read_slots(text)


def check_training(trace: Path, out: Path, kind: str, options: Mapping[str, Any], validation: float) -> None:
    """Refuse training options, a trace or a folder that cannot be used.

    Raises:
        ExpertFlowError: then.
    """
    TrainConfig(**options)
    check_kind(kind)
    if not 0 < validation < 1:
        raise ConfigError(f"validation={validation} is no share", "Use one between 0 and 1, such as 0.1.")
    if is_file(out):
        raise PredictorError(f"{out} cannot be written: it is a file", "Choose another place.")
    if fault := name_fault(out):
        raise PredictorError(f"{out} cannot be written: {fault}", "Choose another place.")
    open_trace(trace)


def check_condition(condition: str) -> None:
    """Refuse a condition on sequences that is not like `category=physics`; empty: none.

    Raises:
        TraceError: then.
    """
    if condition:
        read_condition(condition)
