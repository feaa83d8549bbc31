"""What requests are likely to use, for groups by route. Must not know schedules."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expertflow.engine.build import OffloadedModel
from expertflow.engine.stepping.running import Running
from expertflow.predict.online import PREVIEW


class Routes:
    """Asks the predictor of a model.

    Args:
        offloaded: the model.
        running: requests by their numbers.
    """

    def __init__(self, offloaded: OffloadedModel, running: Mapping[int, Running]) -> None:
        """Keep both."""
        self._offloaded, self._running = offloaded, running

    def paths(self, numbers: Sequence[int]) -> npt.NDArray[np.floating] | None:
        """How likely the next token of live sequences uses each expert: float [sequences, layers, experts], or None."""
        assert self._offloaded.live_predictor is not None
        with self._offloaded.passes.lock:
            self._offloaded.controller.end_step()  # the predictor is updated with the last host pass first
        return self._offloaded.live_predictor.paths(numbers)

    def usual(self, numbers: Sequence[int]) -> npt.NDArray[np.floating] | None:
        """What requests, live or waiting, are likely to use by their prompts: float [requests, layers, experts], or None."""
        found = []
        for number in numbers:
            one = self._running[number]
            if one.usual is None:
                assert self._offloaded.live_predictor is not None
                one.usual = self._offloaded.live_predictor.usual(one.request.prompt_token_ids[-PREVIEW:])
            if one.usual is None:
                return None
            found.append(one.usual)
        return np.stack(found)
