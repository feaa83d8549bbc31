"""The predictor while serving: what it remembers of live sequences, and what it says before each step.

A sequence is a row number that the caller chooses. `start` gives the demand of a prompt's prefill, `observe` takes the
prompt's true routing in, `step` takes the just-sampled tokens and the last step's true routing and gives the demand of
all layers; `note` takes the same in and says nothing. The engine asks about decode steps only; `start` and `prefill` are for whoever
wants to know of prompts. Regrouping moves nothing: rows may come in any order and any subset; `free` forgets a sequence, `split` and
`join` carry one from one predictor to another. A step has static shapes, no synchronisation and no branch on data, so it can be
captured in a CUDA graph. Knows artifacts and networks; refuses to know batches, requests and caches.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from expertflow.errors import PredictorError
from expertflow.predict.artifact import Artifact
from expertflow.predict.draft import Draft, look_up
from expertflow.predict.model import OUTPUTS, Pieces, Predictor, State, empty_state, sent

_PADDING = -2
"""In the place of a token behind a piece's end; an unknown one is -1."""
PREVIEW = 32
"""Tokens at a prompt's end that say which experts a waiting request is likely to use: what `usual` is asked about at most."""
_TOLD_ROUTE, _TOLD_TOKEN = 16, 128
"""Bytes of one expert of one token, and of what else there is to a token: as it comes, behind the one before, and packed."""
_SLACK = 4096
"""Bytes an allocator may add to a tensor, and then some."""


class Twin(Protocol):
    """A predictor's step in kernels of a device; arguments as in `OnlinePredictor.step`."""

    def __call__(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> Tensor:
        """Chances `[B, O, L, E]`; the state takes the tokens in."""

    def note(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> None:
        """The state takes the tokens in."""

    def absorb(self, state: State, pieces: Pieces, tokens: Tensor, routes: Tensor) -> None:
        """The state takes several tokens of each sequence in; arguments as in `PathPredictor.absorb`."""


class Prediction(NamedTuple):
    """What is expected of each sequence, calibrated probabilities.

    Attributes:
        demand: `[B, L, E]` used in this step.
        within: `[B, len(HORIZONS), L, E]` used within the next 1, 2, 4, 8 steps behind it.
    """

    demand: Float[Tensor, "B L E"]
    within: Float[Tensor, "B H L E"]


class OnlinePredictor:
    """A predictor with room for a number of live sequences.

    Args:
        artifact: trained predictor.
        rows: sequences that may live at once.
        device: where to compute.
        twin: gives an artifact's step in kernels of that device, or None if it has none; None: no artifact has one.

    Attributes:
        spare: a row of nobody, which may be stepped as padding, also several times in a step.
    """

    def __init__(
        self,
        artifact: Artifact,
        rows: int,
        device: torch.device | None = None,
        twin: Callable[[Artifact], Twin | None] | None = None,
    ) -> None:
        """Every row free."""
        self.device, self.rows, self.spare = device or torch.device("cpu"), rows, rows
        self.artifact = artifact.to(self.device)
        self._model: Predictor = artifact.model  # type: ignore[assignment]  # what every kind offers
        self.state: State = self._model.fresh(rows + 1, self.device)
        self._twin = None if twin is None else twin(self.artifact)

    @staticmethod
    def nbytes(artifact: Artifact, rows: int, batch: int, chunk: int, *, twin: bool = False) -> int:
        """Upper bound on the device memory of one, and of what is kept of its answers: what a planner counts.

        Args:
            artifact: trained predictor.
            rows: sequences that may live at once.
            batch: sequences that step together at most.
            chunk: tokens of a prefill pass at most.
            twin: kernels take those in, which need no room but for what they are told.
        """
        config, network = artifact.config, cast("Predictor", artifact.model)
        held = [*artifact.model.state_dict().values(), *artifact.memory.state_dict().values(), artifact.calibration]
        tensors: list[Tensor] = [*held, *empty_state(config, rows + 1, torch.device("meta"))]
        # a captured step keeps its memory while a prompt, or another step, takes as much again
        told = chunk * (config.layers * config.top_k * _TOLD_ROUTE + _TOLD_TOKEN)
        prompt = told + network.prompt_bytes(PREVIEW) if twin else network.prompt_bytes(chunk)
        step = network.step_bytes(batch)
        routes = (rows + 1) * config.layers * config.top_k * 4
        said = (rows + 1) * OUTPUTS * config.layers * config.experts * 4
        return sum(int(t.nbytes) for t in tensors) + routes + said + step + max(step, prompt) + _SLACK * len(tensors)

    @torch.inference_mode()
    def start(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Float[Tensor, "B L E"]:
        """Begin sequences: forget what the rows held, and say what each one's prefill will use.

        Args:
            rows: a row for each sequence.
            prompts: their token ids; -1 unknown.

        Returns:
            `[B, L, E]` probability that any token of the prompt uses the expert.

        Raises:
            PredictorError: if there is no such row, or a row is named twice.
        """
        self._check(rows)
        self.free(rows)
        demand = [self.prefill(torch.tensor(list(prompt), device=self.device)) for prompt in prompts]
        return torch.stack(demand)

    @torch.inference_mode()
    def prefill(self, tokens: Int[Tensor, " N"], counts: Sequence[int] | None = None) -> Float[Tensor, "L E"]:
        """What any of N tokens uses whose routing is not known yet: prompts or parts of them.

        Args:
            tokens: one sequence's after the other.
            counts: tokens of each sequence; None: they are one's.
        """
        parts = sorted(tokens.split(list(counts or [len(tokens)])), key=len, reverse=True)
        nobody = torch.zeros(self.artifact.shape[:2], device=self.device)
        while parts and len(parts[0]):  # as many together as need no more room, padded, than all of them do
            together = max(1, len(tokens) // len(parts[0]))
            padded = pad_sequence(parts[:together], batch_first=True, padding_value=_PADDING)
            chances = self._blind(padded.clamp(min=-1))[padded != _PADDING]
            nobody += torch.log1p(-chances.clamp(max=1 - 1e-6)).sum(0)
            parts = parts[together:]
        return 1 - torch.exp(nobody)

    @torch.inference_mode()
    def usual(self, tokens: Int[Tensor, " N"]) -> Float[Tensor, "L E"]:
        """What one of N tokens uses on average whose routing is not known yet."""
        return self._blind(tokens[None])[0].mean(0)

    def _blind(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T L E"]:
        before = functional.pad(tokens, (1, 0), value=-1)[:, :-1]
        logits = self._model.blind(tokens).flatten(0, 1)[:, None]
        chances = self.artifact.probabilities(logits, tokens.flatten(), before.flatten())
        return chances.view(*tokens.shape, *chances.shape[2:])

    def pieces(self, rows: npt.ArrayLike, counts: npt.ArrayLike) -> Pieces:
        """Whose tokens `observe` is told of: the sequences' rows, each once, and how many tokens each has, at least 1."""
        return Pieces.of(rows, counts, self.state.tokens.shape[1], self.device)

    @torch.inference_mode()
    def observe(self, pieces: Pieces, tokens: Int[Tensor, " N"], routes: Int[Tensor, "N L K"]) -> None:
        """Take tokens in whose steps are done, such as those of prompts.

        Args:
            pieces: whose they are, as `pieces` says.
            tokens: the next tokens of each, one sequence's after the other.
            routes: the true routing of the token before each of them (the last one's comes with the next `step`); E
                where there is none.
        """
        (self._model if self._twin is None else self._twin).absorb(self.state, pieces, tokens, routes)

    @torch.inference_mode()
    def step(self, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]) -> Prediction:
        """Before a decode step: what its tokens will use, in all layers, and what comes after.

        Args:
            rows: the sequences that step, each once, in any order.
            tokens: the tokens just sampled.
            routes: the true routing of each sequence's last token; E where there is none or it is not known.
        """
        return self._feed(self.state, rows, tokens, routes)

    @torch.inference_mode()
    def note(self, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]) -> None:
        """What `step` takes in, without an answer."""
        (self._model if self._twin is None else self._twin).note(self.state, rows, tokens, routes)

    @torch.inference_mode()
    def draft(self, rows: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]) -> tuple[Draft, Prediction]:
        """After `step`: what the next one would say if the drafted tokens were sampled; nothing is taken in.

        Args:
            rows: the sequences that stepped, each once, in any order.
            routes: what the step that is under way is taken to use: its most probable experts, the truth if it is
                known by now, or E for unknown.

        Returns:
            The drafts, and the prediction of the step after this one; without meaning where there is no draft.
        """
        draft = look_up(self.state, rows)
        scratch = State(*(column[rows] for column in self.state))
        return draft, self._feed(scratch, torch.arange(len(rows), device=rows.device), draft.tokens, routes)

    def _feed(self, state: State, rows: Tensor, tokens: Tensor, routes: Tensor) -> Prediction:
        if self._twin is not None:
            each = self._twin(state, rows, tokens, routes)
        else:
            before = state.tokens[rows, (state.taken[rows] - 1) % state.tokens.shape[1]]
            each = self.artifact.probabilities(self._model.feed(state, rows, tokens, routes), tokens, before)
        return Prediction(each[:, 0], each[:, 1:])

    def free(self, rows: Sequence[int]) -> None:
        """Forget sequences; their rows may be used for others."""
        self.state.clear(sent(torch.tensor(list(rows)), self.device), self.artifact.config.experts)

    def split(self, rows: Sequence[int]) -> State:
        """Take sequences out: their state, one after the other; the rows are free afterwards."""
        index = torch.tensor(list(rows), device=self.device)
        taken = State(*(column[index].clone() for column in self.state))
        self.free(rows)
        return taken

    def join(self, rows: Sequence[int], state: State) -> None:
        """Take sequences in that `split` took out, here or elsewhere.

        Raises:
            PredictorError: if there is no such row, or their number is not that of the state.
        """
        self._check(rows)
        if len(rows) != len(state.taken):
            raise PredictorError(f"{len(rows)} rows for {len(state.taken)} sequences", "Give one a sequence.")
        index = torch.tensor(list(rows), device=self.device)
        for column, given in zip(self.state, state, strict=True):
            column[index] = given.to(self.device)

    def _check(self, rows: Sequence[int]) -> None:
        if len(set(rows)) != len(rows) or any(not 0 <= row < self.rows for row in rows):
            raise PredictorError(
                f"rows {list(rows)} are not distinct rows of {self.rows}", "Name free rows, each once."
            )
