"""The table of predictor kinds, read by training, files and serving. A new kind is an entry here and a file."""

from collections.abc import Callable

from torch import nn

from expertflow.predict.model import PathPredictor
from expertflow.predict.network import PredictorConfig
from expertflow.predict.options import PATH, T5, check_kind
from expertflow.predict.t5 import T5Predictor

KINDS: dict[str, Callable[[PredictorConfig], nn.Module]] = {PATH: PathPredictor, T5: T5Predictor}
"""Name to class; every class offers `network.Predictor`."""


def make(config: PredictorConfig) -> nn.Module:
    """Make an untrained predictor.

    Raises:
        ConfigError: for an unknown kind; names the nearest.
    """
    check_kind(config.kind)
    return KINDS[config.kind](config)
