"""What a trained predictor predicts for recorded passages, each token from what was known before its step.

The offline twin of `online`: the same logits, many tokens at a time. For evaluation and for the simulator.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from expertflow.predict.artifact import Artifact
from expertflow.predict.dataset import Passage, windows
from expertflow.predict.network import OUTPUTS

_LENGTH = 512
_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of one pass."""


@torch.inference_mode()
def score(
    artifact: Artifact, items: Sequence[Passage], report: Callable[[int], None] = lambda tokens: None  # noqa: ARG005 - a listener
) -> list[npt.NDArray[np.float16]]:  # fmt: skip
    """Probabilities for every token of every passage.

    Args:
        artifact: trained predictor; runs where its weights are.
        items: passages with the predictor's token ids.
        report: called with the number of tokens done since the last call.

    Returns:
        `[n, O, L, E]` float16 a passage: used in this step, and within the horizons behind it.
    """
    device = artifact.calibration.device
    shape = artifact.shape
    result = []
    for item in items:
        length = min(_LENGTH, -(-len(item) // 64) * 64)
        cut = windows([item], length, shape.experts)
        found = np.empty((len(item), OUTPUTS, shape.layers, shape.experts), dtype=np.float16)
        done = 0
        for chosen in np.array_split(np.arange(len(cut.tokens)), -(-len(cut.tokens) * length // _TOKENS[device.type])):
            tokens, routes = (torch.from_numpy(column[chosen]).to(device) for column in (cut.tokens, cut.routes))
            before = functional.pad(tokens, (1, 0), value=-1)[:, :-1]
            chances = artifact.probabilities(artifact.model(tokens, routes), tokens, before)
            counted = chances[torch.from_numpy(cut.counts[chosen]).to(device)].half().cpu().numpy()
            found[done : done + len(counted)] = counted
            done += len(counted)
        report(len(item))
        result.append(found)
    return result
