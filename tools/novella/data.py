"""Token arrays and seeded batches for training and evaluation."""

from __future__ import annotations

import hashlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from novella.constants import HELDOUT_FILE, TOKENIZER_DIR, TRAIN_FILE
from novella.tokenizer import read_books

Ids = NDArray[np.uint16]


def encode(item: tuple[str, str]) -> Ids:
    """Tokenise one book, its end-of-text marker first (a worker's job)."""
    tokenizer_file, book = item
    tokenizer = Tokenizer.from_file(tokenizer_file)
    pieces = [np.zeros(1, dtype=np.uint16)]
    cuts = book.split("\n\n")
    for start in range(0, len(cuts), 2_000):
        text = "\n\n".join(cuts[start : start + 2_000])
        last = start + 2_000 >= len(cuts)
        ids = tokenizer.encode(text if last else text + "\n\n").ids
        pieces.append(np.asarray(ids, dtype=np.uint16))
    return np.concatenate(pieces)


def tokenise(source: Path, tokenizer_file: Path, cache: Path, workers: int) -> Ids:
    """Return the tokens of a corpus file, from the cache when neither input changed."""
    inputs = source.read_bytes() + tokenizer_file.read_bytes()
    digest = hashlib.sha256(inputs).hexdigest()[:16]
    path = cache / f"{source.name.split('.')[0]}-{digest}.npy"
    if path.is_file():
        return np.asarray(np.load(path), dtype=np.uint16)
    items = [(str(tokenizer_file), book) for book in read_books(source)]
    items.sort(key=lambda item: hashlib.sha256(item[1].encode()).digest())
    with ProcessPoolExecutor(workers) as pool:
        ids = np.concatenate(list(pool.map(encode, items, chunksize=2)))
    cache.mkdir(parents=True, exist_ok=True)
    np.save(path, ids)
    return ids


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens, and how many held-out characters these stand for."""

    train: Ids
    heldout: Ids
    heldout_chars: int


def load_corpus(data: Path, cache: Path, workers: int) -> Corpus:
    """Tokenise (or load) both parts of the corpus."""
    tokenizer_file = data / TOKENIZER_DIR / "tokenizer.json"
    for needed in (data / TRAIN_FILE, data / HELDOUT_FILE, tokenizer_file):
        if not needed.is_file():
            msg = f"missing {needed.name} in the data folder: run novella.corpus and .tokenizer"
            raise FileNotFoundError(msg)
    chars = sum(len(book) for book in read_books(data / HELDOUT_FILE))
    train = tokenise(data / TRAIN_FILE, tokenizer_file, cache, workers)
    return Corpus(train, tokenise(data / HELDOUT_FILE, tokenizer_file, cache, workers), chars)


class Batches:
    """Batches as a pure function of the step: resuming needs the step number and nothing else."""

    def __init__(self, tokens: Ids, batch: int, sequence: int, seed: int, device: torch.device) -> None:
        """Put the whole token array on the device."""
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)
        self.batch, self.sequence, self.seed, self.device = batch, sequence, seed, device
        self.steps_per_epoch = (len(tokens) - 1 - sequence) // (batch * sequence)
        if self.steps_per_epoch < 1:
            msg = f"{len(tokens)} tokens are too few for one batch of {batch} x {sequence}"
            raise ValueError(msg)
        self.epoch = -1
        self.starts = torch.empty(0, dtype=torch.int64)

    def enter_epoch(self, epoch: int) -> None:
        """Permute the windows; their common offset shifts a little with every epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000 + epoch)
        count = self.steps_per_epoch * self.batch
        offset = (epoch * 389) % self.sequence
        order = torch.randperm(count, generator=generator)
        self.starts = (order * self.sequence + offset).to(self.device)
        self.epoch = epoch

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of one step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.enter_epoch(epoch)
        starts = self.starts[place * self.batch : (place + 1) * self.batch]
        return windows(self.tokens, starts, self.sequence)


def windows(tokens: Tensor, starts: Tensor, sequence: int) -> tuple[Tensor, Tensor]:
    """Cut windows and shift them into inputs and targets."""
    places = starts[:, None] + torch.arange(sequence + 1, device=tokens.device)
    cut = tokens[places].long()
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()
