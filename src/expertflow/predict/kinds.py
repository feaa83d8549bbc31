"""The table of predictor kinds: a new one is a row here and a file. Training, files and serving read the table."""

from collections.abc import Callable

from torch import nn

from expertflow.config import nearest
from expertflow.errors import ConfigError
from expertflow.predict.model import PathPredictor, PredictorConfig
from expertflow.predict.t5 import T5Predictor

KINDS: dict[str, Callable[[PredictorConfig], nn.Module]] = {"path": PathPredictor, "t5": T5Predictor}
"""Name to class; every class offers `model.Predictor`."""


def make(config: PredictorConfig) -> nn.Module:
    """An untrained predictor.

    Raises:
        ConfigError: for an unknown kind; names the nearest.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"unknown predictor kind {config.kind!r}", nearest(config.kind, KINDS))
    return KINDS[config.kind](config)
