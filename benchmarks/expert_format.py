"""What quantising experts on loading costs: perplexity of the shipped model on held-out books, as stored and in each format.

Windows of 1,024 tokens, spread evenly over the books that its training left out (`heldout.json`); a token's context is what
precedes it in its window. Every format reads the same tokens through `from_pretrained`, so the differences are of the same text.

Usage: python benchmarks/expert_format.py --text novels100.txt.xz --out FILE
"""

import argparse
import json
import lzma
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from expertflow import from_pretrained
from expertflow.bench.about import about
from expertflow.config import EXPERT_FORMATS
from expertflow.engine.llm import shipped_model
from expertflow.errors import QuantisedWarning

WINDOW = 1024
_BOOK = "<|book|> "
"""Begins the line with a book's name in a collection's file."""


def heldout_books(path: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the held-out books of a collection."""
    listed = json.loads((shipped_model() / "heldout.json").read_text())
    held = {book["id"] for book in listed["heldout"]}
    for book in lzma.decompress(path.read_bytes()).decode().split(_BOOK)[1:]:
        name, _, text = book.partition("\n")
        name = f"{path.name.partition('.')[0]}/{name.strip()}"
        if name in held:
            yield (
                name,
                "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()),
            )


def windows(path: Path, count: int) -> tuple[list[str], torch.Tensor]:
    """Names of the books, and `count` windows of tokens of each, int64 `[N, 1024]`."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    names, found = [], []
    for name, text in heldout_books(path):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        begins = torch.linspace(0, len(ids) - WINDOW, count + 2).long()[1:-1]
        names.append(name)
        found += [ids[begin : begin + WINDOW] for begin in begins.tolist()]
    return names, torch.stack(found)


def losses(tokens: torch.Tensor, expert_format: str | None, device: str) -> dict[str, Any]:
    """Loss of each window in nats a token, bytes of an expert, and seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QuantisedWarning)
        model = from_pretrained(expert_format=expert_format, device=device, max_batch=1, max_length=WINDOW)
    plan, began = model.expertflow.plan, time.perf_counter()
    with torch.inference_mode():
        found = [float(model(one, labels=one).loss) for one in tokens[:, None].to(model.device)]
    seconds = time.perf_counter() - began
    model.expertflow.close()
    return {
        "expert_format": expert_format, "record_bytes": plan.record_bytes, "losses": found,
        "perplexity": math.exp(statistics.mean(found)), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a collection that the shipped model's card names")
    parser.add_argument("--windows", type=int, default=2, help="of each book")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    books, tokens = windows(given.text, given.windows)
    rows = []
    for name in (None, *EXPERT_FORMATS):
        rows.append(losses(tokens, name, given.device))
        print(
            f"{name or 'as stored'}: perplexity {rows[-1]['perplexity']:.3f}, {rows[-1]['seconds']:.0f} s", flush=True
        )
    result = {
        **about(given.device)._asdict(), "benchmark": "expert format", "seed": 0, "rows": rows,
        "config": {"model": "shipped", "dtype": "bfloat16", "window": WINDOW, "windows": len(tokens), "books": books},
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
