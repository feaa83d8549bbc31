"""A trained predictor as a folder: `predictor.json` (what it is, of which model) and `predictor.safetensors` (weights).

Large matrices are kept as int8 with a float32 scale a line, all others as float16, so that a predictor is a few
megabytes. The JSON holds a checksum of the weights and the fingerprint of the model the predictor was made for. So a
damaged artifact, or one of another model, is refused with the reason. Must not know how weights were found.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from expertflow import outside
from expertflow.errors import ConfigError, PredictorError
from expertflow.files import whole_file
from expertflow.predict.calibration import weigh
from expertflow.predict.counts import SOURCES, Memory
from expertflow.predict.dataset import Shape
from expertflow.predict.kinds import make
from expertflow.predict.network import OUTPUTS, PredictorConfig
from expertflow.predict.options import ABOUT_NAME

FORMAT = "expertflow-predictor"
VERSION = 1
WEIGHTS_NAME = "predictor.safetensors"
_LARGEST_ABOUT = 1 << 28
"""Bytes of the JSON; a vocabulary of texts is the largest part."""
_WORTH_PACKING = 4096
_SCALE = ".scale"
_CALIBRATION = "calibration"
_MEMORY = "memory."
_AGAIN = "Copy the folder again, or train it anew with `expertflow train-predictor`."


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A trained predictor.

    Attributes:
        model: the network, in evaluation mode.
        memory: counts of frequent tokens and pairs.
        calibration: `[2 + SOURCES, O, L, 1]` float32: weights of the logits and of the counts, and a shift (Platt
            scaling with more than one score).
        fingerprint: of the model it was made for; empty if its trace has none.
        made_for: name of that model.
        vocabulary: token texts by id if its trace had texts instead of the model's ids; else empty.
        about: how it was trained and what it reached; read by users, not by code.
    """

    model: nn.Module
    memory: Memory
    calibration: Tensor
    fingerprint: str = ""
    made_for: str = ""
    vocabulary: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> PredictorConfig:
        """The network's sizes."""
        config: PredictorConfig = self.model.config  # type: ignore[assignment]  # every kind has one
        return config

    @property
    def shape(self) -> Shape:
        """What it predicts for."""
        return Shape(self.config.layers, self.config.experts, self.config.top_k)

    def probabilities(
        self, logits: Float[Tensor, "*B O L E"], tokens: Int[Tensor, "*B"], before: Int[Tensor, "*B"]
    ) -> Float[Tensor, "*B O L E"]:
        """Calibrated probabilities: of the experts with probability p, a share of p is used.

        Args:
            logits: of the network; O may be fewer outputs than it has, the first ones.
            tokens: the token of each step.
            before: the token before it.
        """
        return torch.sigmoid(weigh(self.calibration, logits, self.memory(tokens, before)))

    def to(self, device: torch.device) -> "Artifact":
        """Move everything to a device; the network itself moves, all else is copied."""
        return replace(
            self, model=self.model.to(device), memory=self.memory.to(device), calibration=self.calibration.to(device)
        )

    def check_model(self, fingerprint: str, shape: Shape, name: str) -> None:
        """Check that the predictor was made for a model.

        Raises:
            PredictorError: if it was not; gives the reason.
        """
        self.check_shape(shape, name)
        if not self.fingerprint:
            raise PredictorError(
                "the predictor does not say which checkpoint it was made for",
                "Train it with `expertflow train-predictor --model CHECKPOINT`.",
            )
        if self.fingerprint != fingerprint:
            raise PredictorError(
                f"the predictor was made for {self.made_for or 'a model'} with fingerprint {self.fingerprint}, "
                f"{name} has {fingerprint}",
                "Train one from a trace of this model.",
            )

    def check_shape(self, shape: Shape, name: str) -> None:
        """Check that the predictor's layers, experts and experts a token are those of a model.

        Raises:
            PredictorError: if one differs.
        """
        if self.shape != shape:
            raise PredictorError(
                f"the predictor is for (layers, experts, top-k) = {tuple(self.shape)}, {name} has {tuple(shape)}",
                "Use a predictor that was trained from a trace of this model.",
            )


def save_artifact(artifact: Artifact, folder: Path) -> int:
    """Write the folder.

    Returns:
        Bytes of both files.

    Raises:
        PredictorError: if it cannot be written.
    """
    tensors = {name: value.detach().cpu() for name, value in artifact.model.state_dict().items()}
    kept = {_MEMORY + name: value.cpu().contiguous() for name, value in artifact.memory.state_dict().items()}
    packed = save_tensors({**_pack(tensors), **kept, _CALIBRATION: artifact.calibration.cpu().contiguous()})
    about = {
        "format": FORMAT, "version": VERSION, "config": asdict(artifact.config), "fingerprint": artifact.fingerprint,
        "made_for": artifact.made_for, "sha256": hashlib.sha256(packed).hexdigest(), "about": dict(artifact.about),
        "vocabulary": list(artifact.vocabulary),
    }  # fmt: skip
    text = json.dumps(about, ensure_ascii=False, indent=None).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / WEIGHTS_NAME) as weights, whole_file(folder / ABOUT_NAME) as rest:
            weights.write_bytes(packed)
            rest.write_bytes(text)
    except OSError as error:
        raise PredictorError(f"{folder} cannot be written: {error.strerror}", "Choose another place.") from error
    return len(packed) + len(text)


def load_artifact(folder: Path, device: torch.device | None = None) -> Artifact:
    """Read and check a folder.

    Raises:
        PredictorError: if it is missing, foreign, damaged, or of a newer version.
    """
    about = _read_about(folder / ABOUT_NAME)
    try:
        packed = outside.read_bytes(folder / WEIGHTS_NAME)
    except (OSError, ValueError) as error:
        raise PredictorError(f"{folder / WEIGHTS_NAME} cannot be read: {error}", _AGAIN) from error
    if hashlib.sha256(packed).hexdigest() != about.get("sha256"):
        raise PredictorError(f"{folder / WEIGHTS_NAME} is damaged: its checksum is not the one stated", _AGAIN)
    try:
        config = PredictorConfig(**{**about["config"], "decays": tuple(about["config"]["decays"])})
        tensors = load_tensors(packed)
        _check_room(config, tensors)
        model = make(config)
        calibration = tensors.pop(_CALIBRATION)
        kept = {name.removeprefix(_MEMORY): tensors.pop(name) for name in list(tensors) if name.startswith(_MEMORY)}
        memory = _memory(config, kept)
        words, details = about.get("vocabulary", []), about.get("about", {})
        if not (_are_texts(words) and isinstance(details, dict) and _are_texts(details.get("seen", []))):
            raise TypeError("vocabulary or about")  # noqa: TRY301 - one message for every malformed part
        model.load_state_dict(_unpack(tensors))
        numbers = [calibration, *model.state_dict().values()]
        if not all(bool(value.isfinite().all()) for value in numbers):
            raise ValueError("a weight is not finite")  # noqa: TRY301 - see above
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        MemoryError,
        ConfigError,
    ) as error:
        raise PredictorError(f"{folder} is no usable predictor: {str(error).splitlines()[0]}", _AGAIN) from error
    if calibration.shape != (2 + SOURCES, OUTPUTS, config.layers, 1):
        raise PredictorError(f"{folder}: its calibration has shape {tuple(calibration.shape)}", _AGAIN)
    artifact = Artifact(
        model=model.eval().requires_grad_(requires_grad=False), memory=memory, calibration=calibration,
        fingerprint=str(about.get("fingerprint", "")), made_for=str(about.get("made_for", "")),
        vocabulary=tuple(words), about=details,
    )  # fmt: skip
    return artifact.to(device or torch.device("cpu"))


def _check_room(config: PredictorConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that the weights have the sizes stated, before memory is allocated for them.

    Raises:
        ValueError: if the weights are fewer.
    """
    stored = sum(value.numel() for value in tensors.values())
    with torch.device("meta"):
        needed = sum(value.numel() for value in make(config).state_dict().values())
    if max(needed, config.vocabulary + 1) > stored:
        raise ValueError(f"the sizes stated need {max(needed, config.vocabulary + 1)} numbers, {stored} are stored")


def _memory(config: PredictorConfig, tensors: Mapping[str, Tensor]) -> Memory:
    entries = len(tensors["token_odds"]) - 1, len(tensors["pair_odds"]) - 1
    memory = Memory(Shape(config.layers, config.experts, config.top_k), config.vocabulary, *entries)
    memory.load_state_dict(dict(tensors))
    if memory.token_row.min() < 0 or memory.token_row.max() > entries[0] or bool((memory.pair_key.diff() < 0).any()):
        raise ValueError("the counts name an entry that is missing, or their pairs are out of order")
    return memory


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = outside.read_json(path, _LARGEST_ABOUT)
    except OSError as error:
        raise PredictorError(
            f"{path} cannot be read: {error.strerror or error}",
            "Give a folder written by `expertflow train-predictor`.",
        ) from error
    except ValueError as error:
        raise PredictorError(f"{path} is damaged: {error}", _AGAIN) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise PredictorError(f"{path} is no predictor", "Give a folder written by `expertflow train-predictor`.")
    if about.get("version") != VERSION:
        raise PredictorError(
            f"{path} is of predictor version {about.get('version')!r}, this program reads {VERSION}",
            "Update expertflow, or train it anew.",
        )
    return about


def _pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.ndim == 2 and value.numel() >= _WORTH_PACKING:
            scale = value.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            packed[name] = torch.round(value / scale).to(torch.int8).contiguous()
            packed[name + _SCALE] = scale.to(torch.float32).contiguous()
        else:
            packed[name] = value.to(torch.float16 if value.is_floating_point() else value.dtype).contiguous()
    return packed


def _unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names: Sequence[str] = [name for name in tensors if not name.endswith(_SCALE)]
    return {
        name: tensors[name].float() * tensors[name + _SCALE] if name + _SCALE in tensors else _widen(tensors[name])
        for name in names
    }


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
