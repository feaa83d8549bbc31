"""One batch through the model: prefill in chunks, then one token a step. Tensors in, logits out.

Decoder-only prompts are padded on the left, encoder prompts on the right. Knows nothing of text and sampling.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel


@runtime_checkable
class Batch(Protocol):
    """Sequences that step together."""

    def prefill(self) -> Float[Tensor, "B V"]:
        """Run the prompts; logits of each sequence's next token."""

    def decode(self, tokens: Sequence[int]) -> Float[Tensor, "B V"]:
        """Run one new token a sequence; logits of the next."""

    def best(self) -> Int[Tensor, " B"] | None:
        """The most probable next tokens, if the last step has them ready."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order."""

    def close(self) -> None:
        """The batch is over, however it ended."""


def make_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], chunk: int) -> Batch:
    """A batch for the model's kind.

    Args:
        model: loaded model.
        prompts: token ids, none empty.
        chunk: tokens of one prefill pass over all sequences (decoder-only models).
    """
    if model.config.is_encoder_decoder:
        return EncoderDecoderBatch(model, prompts)
    return DecoderBatch(model, prompts, chunk)


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids.to(device), mask.to(device)


def _pad_id(model: PreTrainedModel) -> int:
    pad = model.config.get_text_config(decoder=True).pad_token_id
    return pad if isinstance(pad, int) and pad >= 0 else 0


class DecoderBatch:
    """Sequences of a decoder-only model."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], chunk: int, cache: Cache | None = None
    ) -> None:
        """Pad the prompts and start an empty cache, or fill the one given."""
        self._model = model
        self._ids, self._mask = _padded(prompts, _pad_id(model), model.device, left=True)
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._columns = max(1, chunk // len(prompts))
        self._cache = DynamicCache(config=model.config) if cache is None else cache

    @torch.inference_mode()
    def prefill(self) -> Float[Tensor, "B V"]:
        """Run the prompts, `chunk` tokens a pass."""
        width = self._ids.shape[1]
        for begin in range(0, width, self._columns):
            end = min(begin + self._columns, width)
            logits = self._forward(self._ids[:, begin:end], self._positions[:, begin:end], self._mask[:, :end])
        self._positions = self._positions[:, -1:]
        return logits

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Float[Tensor, "B V"]:
        """Run one token a sequence."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        self._positions = self._positions + 1
        return self._forward(ids, self._positions, self._mask)

    def best(self) -> None:
        """Not computed on the way."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other sequences' keys, values and masks."""
        index = torch.tensor(rows, device=self._mask.device)
        self._mask, self._positions = self._mask[index], self._positions[index]
        self._cache.batch_select_indices(index)

    def close(self) -> None:
        """Nothing to give back."""

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        out: Any = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        last: Tensor = out.logits[:, -1]
        return last


class EncoderDecoderBatch:
    """Sequences of an encoder-decoder model: the prompts are what the encoder reads."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        """Pad the prompts and start empty caches."""
        self._model = model
        self._ids, self._mask = _padded(prompts, _pad_id(model), model.device, left=False)
        self._cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))

    @torch.inference_mode()
    def prefill(self) -> Float[Tensor, "B V"]:
        """Run the encoder, then the decoder's start token."""
        encoder: Any = self._model.get_encoder()
        self._encoded: Any = encoder(input_ids=self._ids, attention_mask=self._mask)
        config = self._model.config
        start = getattr(config, "decoder_start_token_id", None)
        return self._forward([config.pad_token_id if start is None else start] * len(self._ids))

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int]) -> Float[Tensor, "B V"]:
        """Run one token a sequence through the decoder."""
        return self._forward(tokens)

    def best(self) -> None:
        """Not computed on the way."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the other sequences' caches and encoder states."""
        index = torch.tensor(rows, device=self._mask.device)
        self._mask = self._mask[index]
        self._encoded.last_hidden_state = self._encoded.last_hidden_state[index]
        self._cache.batch_select_indices(index)

    def close(self) -> None:
        """Nothing to give back."""

    def _forward(self, tokens: Sequence[int]) -> Tensor:
        out: Any = self._model(
            decoder_input_ids=torch.tensor(tokens, device=self._mask.device)[:, None],
            encoder_outputs=self._encoded,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
        )
        last: Tensor = out.logits[:, -1]
        return last
