"""Prompts of a measurement: short openings of our own, or a file's prompts, and which run together in which repeat.

Must not know models beyond their tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from expertflow.errors import PromptError
from expertflow.prompts import read_texts_or_tokens

Tokens = tuple[int, ...]

OPENINGS = (
    "The old house stood at the end of the lane, and",
    "When the letter came at last, my sister",
    "There was no wind that morning, and the boats",
    "He counted the coins twice before he",
    "In the winter of that year the river",
    "The doctor shut the door behind him and said",
    "Nobody in the village remembered who had",
    "She had never cared for the city, but",
    "It rained for three days, and on the fourth",
    "The captain looked at the sky and",
    "My grandmother kept a garden where",
    "At the top of the hill they found",
    "The two brothers had not spoken since",
    "A light still burned in the kitchen when",
    "The judge put down his spectacles and asked",
    "We walked along the shore until",
    "The shop had been closed for years, yet",
    "On the evening of the ball, Margaret",
    "The horses were tired, and the road",
    "His uncle was a man of few words, who",
    "Behind the church there is a path which",
    "The train was late, so the travellers",
    "I woke before dawn with the feeling that",
    "The king's messenger bowed low and",
    "From the window she could see the harbour, where",
    "After the war the soldiers came home to",
    "The schoolmaster wrote a single word upon the board:",
    "There were seven of us at the table, and",
    "The cat sat by the fire as though",
    "He opened the box with great care; inside",
    "All summer long the children had waited for",
    "The last guest had gone, and the candles",
    "It was not the money that troubled him, but",
    "Across the valley a bell began to ring, and",
    "The sailor told them of an island where",
    "Her voice was quiet, but everyone in the room",
    "The snow had covered every trace of",
    "Before he left, the stranger gave the boy",
    "They had been married in the spring, when",
    "The lawyer unfolded the paper slowly, and",
)
"""Openings in plain English prose, written for this file."""


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts in the order they are used.

    Attributes:
        prompts: token ids, none empty.
        long: one long prompt for every sequence of a batch, or empty.
        source: where they come from.
    """

    prompts: tuple[Tokens, ...]
    long: Tokens
    source: str

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, the long one left aside."""
        return max(len(prompt) for prompt in self.prompts)

    def batch(self, size: int, run: int) -> list[Tokens]:
        """The prompts of run `run`: other ones in every run as long as there are enough, so that nothing has been seen."""
        count = len(self.prompts)
        return [self.prompts[(run * size + place) % count] for place in range(size)]


def read_prompt_set(
    path: Path | None, tokenizer: PreTrainedTokenizerBase | None, *, long_prompt: int, seed: int
) -> PromptSet:
    """Read and shuffle.

    Args:
        path: a prompt a line, or JSON lines with `prompt` (a text) or `tokens` (ids); None: our own openings.
        tokenizer: of the model; None if it has none.
        long_prompt: tokens of the long prompt, made of prompts one after another; 0: none.
        seed: of the order.

    Raises:
        PromptError: if the file is unreadable, empty or malformed, or texts are given and there is no tokenizer.
    """
    items: Sequence[str | Tokens] = OPENINGS if path is None else read_texts_or_tokens(path)
    prompts = [_ids(item, tokenizer) for item in items]
    if not all(prompts):
        raise PromptError(f"prompt {prompts.index(())} is empty", "Give at least one token.")
    order = np.random.default_rng(seed).permutation(len(prompts))
    shuffled = tuple(prompts[index] for index in order)
    text = [token for prompt in shuffled for token in prompt]
    repeated = text * (1 + long_prompt // max(len(text), 1))
    source = "the openings in bench/workload.py" if path is None else path.name
    return PromptSet(prompts=shuffled, long=tuple(repeated[:long_prompt]), source=source)


def _ids(item: str | Tokens, tokenizer: PreTrainedTokenizerBase | None) -> Tokens:
    if not isinstance(item, str):
        return item
    if tokenizer is None:
        raise PromptError(
            "the model's folder has no tokenizer", "Give --prompts-file with JSON lines that hold 'tokens'."
        )
    return tuple(int(token) for token in tokenizer(item)["input_ids"])
