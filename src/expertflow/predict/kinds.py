"""The table of predictor kinds: a new one is a row here and a file. Training, files and serving read the table."""

from collections.abc import Callable

from torch import nn

from expertflow.predict.model import PathPredictor, PredictorConfig
from expertflow.predict.options import PATH, T5, check_kind
from expertflow.predict.t5 import T5Predictor

KINDS: dict[str, Callable[[PredictorConfig], nn.Module]] = {PATH: PathPredictor, T5: T5Predictor}
"""Name to class; every class offers `model.Predictor`."""


def make(config: PredictorConfig) -> nn.Module:
    """An untrained predictor.

    Raises:
        ConfigError: for an unknown kind; names the nearest.
    """
    check_kind(config.kind)
    return KINDS[config.kind](config)
