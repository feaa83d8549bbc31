"""Train Novella's byte-level BPE tokenizer on a sample of the training text.

Run: ``PYTHONPATH=tools python -m novella.tokenizer --data DIR``
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from novella.constants import END_OF_TEXT, TOKENIZER_DIR, TRAIN_FILE, Shape

SAMPLE_CHARS = 24_000_000
SPLIT = r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s+"
PROBE = '"It\'s done," said Mr. Grey\u2014in 1842.\n\nCaf\u00e9  na\u00efve \u03b1\u03b2.'


def read_books(path: Path) -> Iterator[str]:
    """Yield the books of a corpus file one after another."""
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        text = stream.read()
    for book in text.split(END_OF_TEXT):
        if book.strip():
            yield book.strip("\n") + "\n\n"


def sample_text(path: Path, chars: int) -> Iterator[str]:
    """Yield an equal share of every book, from its middle, `chars` characters in all."""
    books = list(read_books(path))
    share = chars // max(1, len(books))
    for book in books:
        yield from book[: 2 * share].split("\n\n")[: max(1, share // 40)]


def train(texts: Iterator[str], vocab: int) -> PreTrainedTokenizerFast:
    """Train the BPE and wrap it as an ordinary fast tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text + "\n\n" for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=Shape().max_positions,
        clean_up_tokenization_spaces=False,
    )


def check(folder: Path, vocab: int) -> float:
    """Reload the tokenizer with AutoTokenizer, prove that it round-trips, return chars a token."""
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = loaded(PROBE)["input_ids"]
    if loaded.decode(ids) != PROBE:
        msg = f"tokenizer does not round-trip: {loaded.decode(ids)!r}"
        raise ValueError(msg)
    if len(loaded) != vocab or loaded.eos_token_id != 0:
        msg = f"tokenizer has {len(loaded)} entries and eos {loaded.eos_token_id}, not {vocab}, 0"
        raise ValueError(msg)
    return len(PROBE) / len(ids)


def main() -> None:
    """Read the command line, train, write and check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.txt.xz")
    parser.add_argument("--chars", type=int, default=SAMPLE_CHARS)
    options = parser.parse_args()
    console = Console(width=110)
    folder = options.data / TOKENIZER_DIR
    vocab = Shape().vocab
    tokenizer = train(sample_text(options.data / TRAIN_FILE, options.chars), vocab)
    tokenizer.save_pretrained(folder)
    check(folder, vocab)
    book = next(islice(read_books(options.data / TRAIN_FILE), 3, 4))[:200_000]
    ratio = len(book) / len(tokenizer(book, verbose=False)["input_ids"])
    size = sum(f.stat().st_size for f in folder.iterdir())
    console.log(f"{vocab} entries, {ratio:.2f} characters a token, {size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
