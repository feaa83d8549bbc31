"""The predictor while serving: its state of live sequences, and its predictions before each step.

A sequence has a state row, whose number the caller chooses. `observe` takes a prompt's true routing in. `step` takes
the just-sampled tokens and the last step's true routing in, and gives the demand of all layers; `update` only takes
them in. Rows come in any order and any subset, so regrouping moves nothing; `free` forgets a sequence. A step has
static shapes, no synchronisation and no branch on data, so it can be captured in a CUDA graph. Must not know batches,
requests and caches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from expertflow.predict.artifact import Artifact
from expertflow.predict.network import OUTPUTS, Predictor
from expertflow.predict.state import Pieces, State, empty_state, to_device

PREVIEW = 32
"""Tokens at a prompt's end from which the experts of a waiting request are predicted, at most: what `usual` is given."""
_INPUT_ROUTE, _INPUT_TOKEN = 16, 128
"""Bytes that taking a token in needs for each of its experts, and besides: as given, shifted by one token, and packed."""
_SLACK = 4096
"""Upper bound on the bytes an allocator adds to a tensor."""


class Twin(Protocol):
    """A predictor's step as kernels of a device; arguments as in `OnlinePredictor.step`."""

    def __call__(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> Tensor:
        """Update the state with the tokens; probabilities `[B, O, L, E]`."""

    def update(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> None:
        """Update the state with the tokens."""

    def absorb(self, state: State, pieces: Pieces, tokens: Tensor, routes: Tensor) -> None:
        """Update the state with several tokens of each sequence; arguments as in `PathPredictor.absorb`."""


class Prediction(NamedTuple):
    """What each sequence is expected to use, as calibrated probabilities.

    Attributes:
        demand: `[B, L, E]` used in this step.
        within: `[B, H, L, E]` used within each of the H horizons behind it.
    """

    demand: Float[Tensor, "B L E"]
    within: Float[Tensor, "B H L E"]


class OnlinePredictor:
    """A predictor with a state row for each of a number of live sequences.

    Args:
        artifact: trained predictor.
        rows: sequences that may live at once.
        device: where to compute.
        twin: gives an artifact's step as kernels of that device, or None if it has none; None: no artifact has one.

    Attributes:
        spare: a state row of no sequence, which may be stepped as padding, also several times in a step.
    """

    def __init__(
        self,
        artifact: Artifact,
        rows: int,
        device: torch.device | None = None,
        twin: Callable[[Artifact], Twin | None] | None = None,
    ) -> None:
        """Allocate the state, with every row free."""
        self.device, self.rows, self.spare = device or torch.device("cpu"), rows, rows
        self.artifact = artifact.to(self.device)
        self._model: Predictor = artifact.model  # type: ignore[assignment]  # what every kind offers
        self.state: State = self._model.fresh(rows + 1, self.device)
        self._twin = None if twin is None else twin(self.artifact)

    @staticmethod
    def nbytes(artifact: Artifact, rows: int, batch: int, chunk: int, *, twin: bool = False) -> int:
        """Upper bound on the device memory of a predictor and of its kept predictions, in bytes, for a planner.

        Args:
            artifact: trained predictor.
            rows: sequences that may live at once.
            batch: sequences that step together at most.
            chunk: tokens of a prefill pass at most.
            twin: whether kernels take those tokens in, which need memory for their inputs only.
        """
        config, network = artifact.config, cast("Predictor", artifact.model)
        weights = [*artifact.model.state_dict().values(), *artifact.memory.state_dict().values(), artifact.calibration]
        tensors: list[Tensor] = [*weights, *empty_state(config, rows + 1, torch.device("meta"))]
        # a captured step keeps its memory while a prompt, or another step, takes as much again
        inputs = chunk * (config.layers * config.top_k * _INPUT_ROUTE + _INPUT_TOKEN)
        prompt = inputs + network.prompt_bytes(PREVIEW) if twin else network.prompt_bytes(chunk)
        step = network.step_bytes(batch)
        routes = (rows + 1) * config.layers * config.top_k * 4
        kept = (rows + 1) * OUTPUTS * config.layers * config.experts * 4
        return sum(int(t.nbytes) for t in tensors) + routes + kept + step + max(step, prompt) + _SLACK * len(tensors)

    @torch.inference_mode()
    def usual(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "L E"]:
        """Mean probability that one of N tokens uses each expert, predicted without any routing.

        Args:
            tokens: of one sequence, such as a prompt's end; -1 unknown.
        """
        before = functional.pad(tokens[None], (1, 0), value=-1)[:, :-1]
        logits = self._model.blind(tokens[None]).flatten(0, 1)[:, None]
        chances = self.artifact.probabilities(logits, tokens, before.flatten())
        return chances.view(len(tokens), *chances.shape[2:]).mean(0)

    def pieces(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> Pieces:
        """Layout of tokens for `observe`: the sequences' rows, each once, and how many tokens each has, at least 1."""
        return Pieces.of(rows, counts, self.state.tokens.shape[1], self.device)

    @torch.inference_mode()
    def observe(self, pieces: Pieces, tokens: Int[Tensor, " N"], routes: Int[Tensor, "N L K"]) -> None:
        """Take tokens in whose steps are done, such as those of prompts.

        Args:
            pieces: which sequence each token belongs to.
            tokens: the next tokens of each sequence, one sequence's after the other.
            routes: the true routing of the token before each of them (the last one's comes with the next `step`); E
                where there is none.
        """
        (self._model if self._twin is None else self._twin).absorb(self.state, pieces, tokens, routes)

    @torch.inference_mode()
    def step(self, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]) -> Prediction:
        """Before a decode step: take its tokens in, and predict the experts of all layers, in this step and behind it.

        Args:
            rows: state rows of the sequences that step, each once, in any order.
            tokens: the tokens just sampled.
            routes: the true routing of each sequence's last token; E where there is none or it is not known.
        """
        if self._twin is not None:
            each = self._twin(self.state, rows, tokens, routes)
        else:
            before = self.state.tokens[rows, (self.state.taken[rows] - 1) % self.state.tokens.shape[1]]
            logits = self._model.feed(self.state, rows, tokens, routes)
            each = self.artifact.probabilities(logits, tokens, before)
        return Prediction(each[:, 0], each[:, 1:])

    @torch.inference_mode()
    def update(self, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]) -> None:
        """Take tokens in as `step` does, and predict nothing."""
        (self._model if self._twin is None else self._twin).update(self.state, rows, tokens, routes)

    def free(self, rows: Sequence[int]) -> None:
        """Forget the sequences of these rows, which others may then use."""
        self.state.clear(to_device(np.array(rows, dtype=np.int64), self.device), self.artifact.config.experts)
