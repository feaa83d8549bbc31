"""What every kind of predictor network is: its sizes, its interface, and the token ids it knows.

Shapes: B sequences, T or N tokens, L layers, E experts, K experts a token, O = `OUTPUTS`. Must not know a kind of network.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expertflow.errors import ConfigError
from expertflow.predict.state import Pieces, State
from expertflow.types import HORIZONS

OUTPUTS = 1 + len(HORIZONS)
"""Outputs of a network: used in this step, and within each horizon behind it."""


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """Size and shape of a predictor; every field is stored in its file.

    Attributes:
        kind: entry of `kinds.KINDS`.
        layers: MoE layers of the model it predicts for.
        experts: experts a layer.
        top_k: experts a token uses in a layer.
        vocabulary: token ids there are.
        table: entries of the embedding table; a larger vocabulary is hashed onto it, two entries a token.
        embedding: width of an entry.
        width: of the network.
        heads: retrieval heads.
        key: width of a retrieval key.
        matches: past positions each head looks at.
        window: past positions it can choose from, plus one.
        decays: of the faded averages of past routing; the first few steps weigh most.
        dropout: while training.
        memory: bytes of the counts of frequent tokens and pairs (`counts.py`) beside the network; 0: none.
    """

    kind: str = "path"
    layers: int
    experts: int
    top_k: int
    vocabulary: int
    table: int = 32768
    embedding: int = 96
    width: int = 192
    heads: int = 4
    key: int = 16
    matches: int = 8
    window: int = 256
    decays: tuple[float, ...] = (0.5, 0.8, 0.95, 0.99)
    dropout: float = 0.2
    memory: int = 3_000_000

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ConfigError: if a size, a share or the number of matches is impossible.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in {"kind", "decays", "dropout", "memory"} and not (
                type(value) is int and 1 <= value < 1 << 24
            ):
                raise ConfigError(
                    f"a predictor's {field.name}={value!r} is no size", "Use a whole number of 1 or more."
                )
        if not all(isinstance(decay, float | int) and 0 <= decay <= 1 for decay in (*self.decays, self.dropout)):
            raise ConfigError(
                f"a predictor's decays={self.decays!r} or dropout={self.dropout!r} is no share", "Use 0 to 1."
            )
        if not self.matches < self.window <= 1 << 16:
            raise ConfigError(
                f"matches={self.matches} of window={self.window} positions cannot be found",
                "Use a window of at most 65536 that is larger than the matches.",
            )


class Predictor(Protocol):
    """What every kind of predictor offers. A state has a row for each sequence; rows are named by number."""

    config: PredictorConfig
    vocabulary: "Vocabulary"

    def step_bytes(self, rows: int) -> int:
        """Upper bound on the working memory of a step of that many rows, probabilities included, in bytes."""

    def prompt_bytes(self, tokens: int) -> int:
        """Upper bound on the working memory of that many tokens of prompts, in bytes."""

    def forward(self, tokens: Int[Tensor, "B T"], routes: Int[Tensor, "B T L K"]) -> Float[Tensor, "B T O L E"]:
        """Logits of every token of whole sequences, each computed from what is known before its step."""

    def blind(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T L E"]:
        """Logits of this step's output where no routing is known yet: a prompt."""

    def fresh(self, rows: int, device: torch.device) -> State:
        """Allocate a state for that many sequences."""

    def feed(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> Float[Tensor, "B O L E"]:
        """One step: update the state with the tokens, and compute the logits that `forward` gives for them."""

    def update(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> None:
        """Take the tokens in as `feed` does, and compute no logits."""

    def absorb(self, state: State, pieces: Pieces, tokens: Int[Tensor, " N"], routes: Int[Tensor, "N L K"]) -> None:
        """Update the state with tokens of several sequences, each with the routing of the token before it; compute no logits."""


class Vocabulary(nn.Module):
    """Which token ids were seen in training; the others count as unknown."""

    def __init__(self, size: int) -> None:
        """Start with no token seen."""
        super().__init__()
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(size + 1, dtype=torch.bool))

    def learn(self, tokens: Int[Tensor, " N"]) -> None:
        """Mark tokens as seen; -1 is skipped."""
        self.seen[tokens[tokens >= 0]] = True

    def forward(self, tokens: Int[Tensor, "*T"]) -> Int[Tensor, "*T"]:
        """Replace ids that were never seen, or are out of range, by -1."""
        last = self.seen.shape[0] - 1
        inside = (tokens >= 0) & (tokens < last)
        return torch.where(self.seen[torch.where(inside, tokens, last)], tokens, -1)
