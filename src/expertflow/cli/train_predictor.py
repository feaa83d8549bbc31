"""`expertflow train-predictor`: a routing trace in, a trained predictor out."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from expertflow.config import EngineConfig
from expertflow.engine.prepare import Prepared, prepare
from expertflow.engine.stepping.threads import limit_threads
from expertflow.engine.text import load_tokenizer
from expertflow.errors import ConfigError, PredictorError, TraceError
from expertflow.predict.artifact import Artifact, load_artifact, save_artifact
from expertflow.predict.dataset import Passage, leave_out, mark, passages, shape_of, split
from expertflow.predict.network import PredictorConfig
from expertflow.predict.options import PATH, TrainConfig
from expertflow.predict.train import Epoch, Trained, train
from expertflow.progress import Progress
from expertflow.trace.format import Trace, check_model, load_trace
from expertflow.units import format_bytes

_LARGEST_VOCABULARY = 1 << 22
_UNFINISHED = ".unfinished-training"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is trained on.

    Attributes:
        trace: the file.
        model: checkpoint the trace is of, or None.
        skip: flag of sequences to leave out; empty: none.
        leave_out: `key=text` of sequences kept for a test of another domain; empty: none.
        validation: share of the others that chooses the epoch.
    """

    trace: Path
    model: str | None
    skip: str
    leave_out: str
    validation: float


def main(*, source: Source, out: Path, kind: str, options: dict[str, Any]) -> None:
    """Train a predictor, write it, and print what it reached.

    Raises:
        ConfigError: for an impossible option.
        PredictorError: if the folder cannot be written, or holds the checkpoint of another training.
        TraceError: if the trace is of another model than stated.
    """
    console, started = Console(stderr=True), time.perf_counter()
    limit_threads()
    settings = TrainConfig(**options)
    if not 0 < source.validation < 1:
        raise ConfigError(f"validation={source.validation} is no share", "Use one between 0 and 1, such as 0.1.")
    trace, prepared = _load(source)
    items = passages(trace)
    if source.leave_out:
        items, _ = leave_out(items, source.leave_out)
    training, validation = split(items, source.validation, settings.seed)
    config = _sizes(trace, kind, _vocabulary(trace, prepared))
    console.print(
        f"{sum(map(len, training))} tokens of {len(training)} sequences to learn from, {sum(map(len, validation))} of "
        f"{len(validation)} to validate"
    )
    try:
        (out / _UNFINISHED).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PredictorError(f"{out} cannot be written: {error.strerror}", "Choose another place.") from error
    result = _train(config, training, validation, settings, out / _UNFINISHED)
    best = min(result.curve, key=lambda epoch: epoch.validation)
    artifact = Artifact(
        model=result.model, memory=result.memory, calibration=result.calibration,
        fingerprint=trace.header.fingerprint or (prepared.fingerprint if prepared else ""),
        made_for=trace.header.model, vocabulary=() if prepared and trace.vocabulary else trace.vocabulary,
        about={
            "trace": source.trace.name, "source": trace.header.source, "licence": trace.header.licence,
            "training_tokens": sum(map(len, training)), "seen": [mark(item) for item in (*training, *validation)],
            "validation_sequences": [_number(item) for item in validation],
            "left_out": source.leave_out, "options": options, "epoch": best.number, "recall": round(result.recall, 4),
            "next_recall": round(result.next_recall, 4), "torch": torch.__version__,
            "curve": [[round(value, 4) for value in epoch] for epoch in result.curve],
        },
    )  # fmt: skip
    size = _save(artifact, out)
    console.print(
        f"{escape(str(out))}: {format_bytes(size)}, epoch {best.number} of {settings.epochs}: of the experts a validation token "
        f"uses, {result.recall:.1%} are among its {config.top_k} best guesses a layer, {result.next_recall:.1%} a step "
        f"ahead; {time.perf_counter() - started:.0f} s"
    )
    if not artifact.fingerprint:
        console.print(
            "[yellow]the trace does not say which checkpoint it is of: name it with --model to serve it with this predictor[/]"
        )


def _sizes(trace: Trace, kind: str, vocabulary: int) -> PredictorConfig:
    """Sizes of a predictor for the trace's model."""
    shape = shape_of(trace)
    return PredictorConfig(
        kind=kind, layers=shape.layers, experts=shape.experts, top_k=shape.top_k, vocabulary=vocabulary,
        memory=PredictorConfig.memory if kind == PATH else 0,  # the paper's predictor has no counts
    )  # fmt: skip


def _save(artifact: Artifact, out: Path) -> int:
    """Write the predictor, check that it can be read, and remove the checkpoint of the training; bytes written."""
    size = save_artifact(artifact, out)
    load_artifact(out)
    for name in ("checkpoint.safetensors", "checkpoint.part"):
        (out / _UNFINISHED / name).unlink(missing_ok=True)
    with suppress(OSError):  # the user keeps files there
        (out / _UNFINISHED).rmdir()
    return size


def _load(source: Source) -> tuple[Trace, Prepared | None]:
    """Load the trace, with the model's token ids if a model is stated.

    Raises:
        TraceError: if it is of another model than stated.
    """
    trace = load_trace(source.trace)
    if source.skip:
        trace = trace.without(source.skip)
    if source.model is None:
        return trace, None
    prepared = prepare(source.model, EngineConfig(device="cpu"), fetch=False)
    shape = prepared.plan.shape
    check_model(trace.header, layers=shape.layers, experts=shape.experts, top_k=prepared.skeleton.top_k)
    if trace.header.fingerprint not in {"", prepared.fingerprint}:
        raise TraceError(
            f"the trace was recorded from a checkpoint with fingerprint {trace.header.fingerprint}, {source.model} has "
            f"{prepared.fingerprint}",
            "Give a trace recorded from this model.",
        )
    return (_as_ids(trace, prepared) if trace.vocabulary else trace), prepared


def _as_ids(trace: Trace, prepared: Prepared) -> Trace:
    """Replace token texts by the model's ids; a text that is no single token of it becomes unknown.

    Raises:
        PredictorError: if the checkpoint has no tokenizer.
    """
    tokenizer = load_tokenizer(prepared.skeleton.folder)
    if tokenizer is None:
        raise PredictorError(
            f"the trace has token texts, and {prepared.skeleton.folder} has no tokenizer", "Fetch its tokenizer files."
        )
    ids = torch.tensor([*(_single(tokenizer, text) for text in trace.vocabulary), -1]).numpy()
    rows = trace.rows._replace(tokens=ids[trace.rows.tokens].astype(trace.rows.tokens.dtype))
    return Trace(header=trace.header, rows=rows, sequences=trace.sequences, vocabulary=trace.vocabulary)


def _single(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else -1


def _vocabulary(trace: Trace, prepared: Prepared | None) -> int:
    """Number of token ids.

    Raises:
        TraceError: if the trace has ids beyond them.
    """
    largest = int(trace.rows.tokens.max())
    size = largest + 1 if prepared is None else prepared.plan.shape.vocabulary
    size = len(trace.vocabulary) if trace.vocabulary and prepared is None else size
    if largest >= size or size > _LARGEST_VOCABULARY:
        raise TraceError(
            f"the trace has token {largest}, with a vocabulary of {min(size, _LARGEST_VOCABULARY)}",
            "It is damaged, or of another model: record or import it again.",
        )
    return size


def _number(item: Passage) -> int:
    return int(item.about.get("sequence", -1))


def _train(
    config: PredictorConfig,
    training: Sequence[Passage],
    validation: Sequence[Passage],
    settings: TrainConfig,
    folder: Path,
) -> Trained:
    with Progress("epochs", settings.epochs) as bar:

        def report(epoch: Epoch) -> None:
            losses = f"loss {epoch.loss:.3f}, validation {epoch.validation:.3f}, recall {epoch.recall:.3f}"
            bar.update(epoch.number, settings.epochs, losses)

        return train(config, training, validation, settings, folder, report)
