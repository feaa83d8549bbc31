"""The paper's predictor, as the reference: a T5-style encoder-decoder that reads tokens and no routing.

arXiv 2410.17954, section 3.2: d_model 32, d_ff 2048, one head of E logits for each MoE layer on the decoder's output,
binary cross-entropy. The paper predicts for encoder-decoder models. A decoder-only model's tokens come one by one. So
the encoder here reads the last full block of `BLOCK` tokens and the decoder, causally, the running one. Must not know
traces, files and engines. Shape letters as in `network.py`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import T5Config, T5Model

from expertflow.predict.network import OUTPUTS, PredictorConfig, Vocabulary
from expertflow.predict.state import Pieces, State, empty_state

BLOCK = 64
"""Tokens of the encoder's and of the decoder's window."""


class T5Predictor(nn.Module):
    """Six layers each side as in T5-small; routing is not read."""

    def __init__(self, config: PredictorConfig) -> None:
        """Make an untrained network."""
        super().__init__()
        self.config = c = config
        self.vocabulary, self.ids = Vocabulary(c.vocabulary), min(c.vocabulary, c.table)
        self.t5 = T5Model(
            T5Config(
                vocab_size=self.ids + 1, d_model=32, d_ff=2048, d_kv=16, num_heads=4, num_layers=6,
                dropout_rate=c.dropout / 2, decoder_start_token_id=self.ids, use_cache=False,
            )
        )  # fmt: skip
        self.heads = nn.Linear(32, OUTPUTS * c.layers * c.experts)

    def step_bytes(self, rows: int) -> int:
        """Upper bound on the bytes that a step works in: two whole blocks a sequence, and the logits of one of them."""
        return self.prompt_bytes(rows * BLOCK)

    def prompt_bytes(self, tokens: int) -> int:
        """The same of that many tokens of prompts: feed-forward blocks, attention, logits and probabilities, in whole blocks."""
        return (tokens + 2 * BLOCK) * (
            2048 * 4 * 6 + 32 * 4 * 64 + 4 * OUTPUTS * self.config.layers * self.config.experts * 4
        )

    def forward(self, tokens: Int[Tensor, "B T"], routes: Int[Tensor, "B T L K"]) -> Float[Tensor, "B T O L E"]:  # noqa: ARG002 - the interface
        """Logits of every token of whole sequences, block by block."""
        batch, length = tokens.shape
        blocks = -(-length // BLOCK)
        padded = functional.pad(tokens, (BLOCK, blocks * BLOCK - length), value=-1).view(batch, blocks + 1, BLOCK)
        logits = self._blocks(padded[:, :-1].reshape(-1, BLOCK), padded[:, 1:].reshape(-1, BLOCK))
        return logits.view(batch, blocks * BLOCK, *logits.shape[2:])[:, :length]

    def blind(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T L E"]:
        """Logits of this step's output for a prompt: those of `forward`, because routing is not read."""
        return self.forward(tokens, tokens)[:, :, 0]

    def fresh(self, rows: int, device: torch.device) -> State:
        """Allocate a state for that many sequences."""
        return empty_state(self.config, rows, device)

    def feed(
        self, state: State, rows: Int[Tensor, " B"], tokens: Int[Tensor, " B"], routes: Int[Tensor, "B L K"]
    ) -> Float[Tensor, "B O L E"]:
        """One step: update the state, and compute both blocks anew; the logits are those of `forward`."""
        ring, count = state.tokens.shape[1], state.taken[rows]
        self.update(state, rows, tokens, routes)
        begin = count // BLOCK * BLOCK
        offset = torch.arange(-BLOCK, BLOCK, device=tokens.device)
        place = begin[:, None] + offset
        seen = torch.gather(state.tokens[rows], 1, place % ring)
        seen = torch.where((place >= 0) & (place <= count[:, None]), seen, -1)
        logits = self._blocks(seen[:, :BLOCK], seen[:, BLOCK:])
        return logits[torch.arange(len(rows), device=rows.device), count - begin]

    def update(
        self,
        state: State,
        rows: Int[Tensor, " B"],
        tokens: Int[Tensor, " B"],
        routes: Int[Tensor, "B L K"],  # noqa: ARG002 - the interface
    ) -> None:
        """Take the tokens in as `feed` does, and compute no logits."""
        count = state.taken[rows]
        state.tokens[rows, count % state.tokens.shape[1]] = tokens
        state.taken[rows] = count + 1

    def absorb(self, state: State, pieces: Pieces, tokens: Int[Tensor, " N"], routes: Int[Tensor, "N L K"]) -> None:  # noqa: ARG002 - the interface
        """Update the state with tokens of several sequences, and compute no logits."""
        kept = slice(None) if pieces.newest is None else pieces.newest
        owner = pieces.owner[kept]
        place = state.taken[pieces.rows][owner] + pieces.place[kept]
        state.tokens[pieces.rows[owner], place % state.tokens.shape[1]] = tokens[kept]
        state.taken[pieces.rows] += pieces.counts

    def _blocks(self, context: Tensor, running: Tensor) -> Tensor:
        """`[N, BLOCK]` twice to `[N, BLOCK, O, L, E]`."""
        c = self.config
        context, running = self.vocabulary(context), self.vocabulary(running)
        first, second = (torch.where(ids >= 0, ids % self.ids, self.ids) for ids in (context, running))
        hidden = self.t5(input_ids=first, decoder_input_ids=second).last_hidden_state
        logits: Tensor = self.heads(hidden).view(*running.shape, OUTPUTS, c.layers, c.experts)
        return logits
