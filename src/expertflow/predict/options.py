"""Names and options of predictors that need no torch: the kinds, the file, and how to train one.

Must not know networks.
"""

from dataclasses import dataclass

from expertflow.config import check_device, nearest
from expertflow.errors import ConfigError

ABOUT_NAME = "predictor.json"
"""The file in a predictor's folder that describes it."""
PATH, T5 = "path", "t5"
KIND_NAMES = (PATH, T5)


def check_kind(kind: str) -> None:
    """Check that a kind of predictor exists.

    Raises:
        ConfigError: if it does not; names the nearest.
    """
    if kind not in KIND_NAMES:
        raise ConfigError(f"unknown predictor kind {kind!r}", nearest(kind, KIND_NAMES))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training passages.
        batch: windows a step.
        length: tokens a window at most.
        rate: highest learning rate; it warms up, then falls along a cosine.
        decay: weight decay.
        hide: share of token ids hidden, so that unknown tokens are learned too.
        blind: share of windows without any routing, as a prompt is seen.
        later: weight of each horizon output beside this step's.
        average: share of the averaged weights that a step keeps.
        seed: of everything random.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    epochs: int = 100
    batch: int = 16
    length: int = 512
    rate: float = 2e-3
    decay: float = 0.05
    hide: float = 0.05
    blind: float = 0.1
    later: float = 0.3
    average: float = 0.995
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: if one is out of range.
        """
        for name in ("epochs", "batch", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small", "Use 1 or more.")
            if getattr(self, name) > 2**20:
                raise ConfigError(f"{name}={getattr(self, name)} is too large", f"Use {2**20} or less.")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} is out of range", "Use 0 to 4294967295.")
        if not self.rate > 0:
            raise ConfigError(f"rate={self.rate} is no learning rate", "Use one above 0, such as 0.002.")
        check_device(self.device)
