"""Text to tokens to span-corrupted batches, seeded; the held-out part becomes prompts."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from switch.constants import EOS, NAMES, PAD, SENTINELS, Recipe, Shape

Ids = NDArray[np.int64]
_PIECE = 200_000


def read_text(path: Path, limit: int) -> str:
    """Read a text, `.xz` or plain; at most `limit` characters."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as packed:
            return packed.read(limit)
    with path.open(encoding="utf-8") as stream:
        return stream.read(limit)


def excerpt(sources: list[Path], out: Path, characters: int) -> None:
    """Write the same number of characters from the middle of every source into one `.xz` file."""
    each = characters // len(sources)
    with lzma.open(out, "wt", encoding="utf-8", preset=9) as stream:
        for source in sources:
            text = read_text(source, 20 * each)
            begin = max(0, (len(text) - each) // 2)
            stream.write(text[begin : begin + each])


def make_tokenizer(text: str, shape: Shape) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer; sentinels follow its pieces."""
    tokenizer = Tokenizer(models.BPE(unk_token=NAMES[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.pieces, special_tokens=list(NAMES), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    pieces = [text[begin : begin + _PIECE] for begin in range(0, len(text), _PIECE)]
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(SENTINELS)])
    special = dict(zip(("pad_token", "eos_token", "unk_token"), NAMES, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and tokens never trained on, and the first sentinel's id."""

    train: Ids
    heldout: Ids
    sentinel: int


def make_corpus(text: str, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Corpus:
    """Tokenise on all cores; the last part is held out."""
    pieces = [text[begin : begin + _PIECE] for begin in range(0, len(text), _PIECE)]
    encoded = tokenizer.backend_tokenizer.encode_batch(pieces)
    ids = np.concatenate([np.asarray(piece.ids, dtype=np.int64) for piece in encoded])
    cut = int(len(ids) * (1 - recipe.heldout_share))
    return Corpus(ids[:cut], ids[cut:], tokenizer.convert_tokens_to_ids("<extra_id_0>"))


def _composition(random: np.random.Generator, rows: int, total: int, parts: int) -> Ids:
    """`[rows, parts]` positive whole numbers of sum `total`, every division as likely."""
    cuts = np.argsort(random.random((rows, total - 1)), axis=1)[:, : parts - 1] + 1
    edges = np.concatenate([np.zeros((rows, 1), np.int64), np.sort(cuts, axis=1), np.full((rows, 1), total)], axis=1)
    return np.diff(edges, axis=1)


def corrupt(raw: Ids, sentinel: int, recipe: Recipe, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Replace spans by sentinels (T5's objective).

    Args:
        raw: `[B, n]` tokens.
        sentinel: id of the first sentinel.
        recipe: share of noise and mean span.
        random: where the spans come from.

    Returns:
        What the encoder reads and what the decoder writes, both of one length for the whole batch, both ended by EOS.
    """
    rows, length = raw.shape
    noise = max(1, round(length * recipe.noise))
    spans = max(1, min(round(noise / recipe.span), SENTINELS))
    kept = _composition(random, rows, length - noise, spans)
    gone = _composition(random, rows, noise, spans)
    ends = np.stack([kept, gone], axis=2).reshape(rows, 2 * spans).cumsum(axis=1)
    starts = np.zeros((rows, length), dtype=np.int64)
    np.put_along_axis(starts, ends[:, :-1], 1, axis=1)
    part = starts.cumsum(axis=1)
    masked = part % 2 == 1
    first = masked & (starts == 1)
    marks = sentinel + part // 2
    eos = np.full((rows, 1), EOS)
    read = np.where(first, marks, raw)[~masked | first].reshape(rows, -1)
    place = np.arange(length)[None].repeat(rows, 0)
    keys = np.concatenate([2 * place[first].reshape(rows, -1), 2 * place[masked].reshape(rows, -1) + 1], axis=1)
    values = np.concatenate([marks[first].reshape(rows, -1), raw[masked].reshape(rows, -1)], axis=1)
    written = np.take_along_axis(values, np.argsort(keys, axis=1), axis=1)
    return np.concatenate([read, eos], axis=1), np.concatenate([written, eos], axis=1)


def draw(tokens: Ids, rows: int, length: int, random: np.random.Generator) -> Ids:
    """`[rows, length]` stretches from anywhere."""
    begins = random.integers(0, len(tokens) - length, rows)
    return tokens[begins[:, None] + np.arange(length)]


def write_prompts(path: Path, tokens: Ids, sentinel: int, recipe: Recipe, count: int) -> None:
    """Corrupted stretches as JSON lines with `tokens`, of several lengths in turn."""
    random = np.random.default_rng(recipe.seed)
    lines = []
    for number in range(count):
        length = recipe.prompt_lengths[number % len(recipe.prompt_lengths)]
        read, _ = corrupt(draw(tokens, 1, length, random), sentinel, recipe, random)
        lines.append(json.dumps({"tokens": read[0].tolist()}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shift_right(written: Ids) -> Ids:
    """The decoder's input: its output, one place later."""
    return np.concatenate([np.full((len(written), 1), PAD), written[:, :-1]], axis=1)
