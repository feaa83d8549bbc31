"""Train a Switch model at the paper's dimensions within a time box; write a stock checkpoint and held-out prompts.

Run: ``PYTHONPATH=tools:src python -m switch.train --text FILE.xz --out DIR --experts 32 --seconds 60``
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from expertflow.bench.about import about
from switch.constants import PROMPTS_FILE, REPORT_FILE, TINY, TRAINING_PROMPTS_FILE, Recipe, Shape
from switch.data import (
    Corpus,
    corrupt,
    draw,
    excerpt,
    make_corpus,
    make_tokenizer,
    read_text,
    shift_right,
    write_prompts,
)
from switch.model import build, export, grouped, loss_of
from switch.optim import Factored


@dataclass(frozen=True)
class Text:
    """What is trained on, ready."""

    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus


def prepare_text(path: Path, shape: Shape, recipe: Recipe, characters: int) -> Text:
    """Read, make the tokenizer, tokenise."""
    text = read_text(path, characters)
    tokenizer = make_tokenizer(text, shape)
    return Text(tokenizer, make_corpus(text, tokenizer, recipe))


def batches(corpus: Corpus, recipe: Recipe, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Batches for ever, the next one made while one is used: what is read, fed and written."""
    random = np.random.default_rng(recipe.seed)

    def make() -> tuple[Tensor, ...]:
        read, written = corrupt(draw(corpus.train, recipe.batch, recipe.raw, random), corpus.sentinel, recipe, random)
        return tuple(torch.from_numpy(part).to(device) for part in (read, shift_right(written), written))

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make)
        while True:
            ready, coming = coming.result(), pool.submit(make)
            yield ready


def rate_at(step: int, share: float, recipe: Recipe) -> float:
    """The learning rate: up over the first steps, down along a cosine over the time box."""
    return recipe.rate * min(1.0, (step + 1) / recipe.warmup) * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))


def heldout(model: torch.nn.Module, corpus: Corpus, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Loss on text never trained on, and how evenly its tokens use the experts (normalised entropy, by layer)."""
    random = np.random.default_rng(recipe.seed + 1)
    read, written = corrupt(draw(corpus.heldout, recipe.batch, recipe.raw, random), corpus.sentinel, recipe, random)
    parts = (torch.from_numpy(part).to(device) for part in (read, shift_right(written), written))
    with torch.no_grad():
        loss, balance = loss_of(model, *parts)
    loads = torch.stack([block.load for block in grouped(model)]).float().cpu()
    entropy = -(loads * loads.clamp(min=1e-9).log()).sum(1) / math.log(loads.shape[1])
    return {
        "loss": round(float(loss), 4), "balance": round(float(balance), 4),
        "load_entropy": [round(value, 4) for value in entropy.tolist()],
        "experts_used": [int(count) for count in (loads > 0).sum(1)],
    }  # fmt: skip


def train(
    text: Text, shape: Shape, recipe: Recipe, device: torch.device, seconds: float, folder: Path
) -> dict[str, Any]:
    """Train for so many seconds, export, report.

    Args:
        text: tokenizer and corpus.
        shape: of the model.
        recipe: of the training.
        device: where.
        seconds: time for steps; export comes on top.
        folder: for checkpoint, prompts and report.
    """
    model = build(shape, recipe, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    optimiser, source = Factored(model.parameters()), batches(text.corpus, recipe, device)
    before = heldout(model, text.corpus, recipe, device)
    began, step, curve = time.perf_counter(), 0, []
    while (spent := time.perf_counter() - began) < seconds:
        loss, balance = loss_of(model, *next(source))
        (loss + recipe.balance * balance).backward()
        optimiser.step(rate_at(step, spent / seconds, recipe))
        if step % 20 == 0:
            curve.append([step, round(float(loss.detach()), 4), round(float(balance.detach()), 4)])
            print(f"{spent:5.0f} s  step {step:4d}  loss {curve[-1][1]:.3f}  balance {curve[-1][2]:.3f}", flush=True)
        step += 1
    spent = time.perf_counter() - began
    after = heldout(model, text.corpus, recipe, device)
    del optimiser
    size = export(model, shape, folder, recipe)
    text.tokenizer.save_pretrained(folder)
    write_prompts(folder / PROMPTS_FILE, text.corpus.heldout, text.corpus.sentinel, recipe, recipe.prompts)
    training = replace(recipe, seed=recipe.seed + 2)
    write_prompts(
        folder / TRAINING_PROMPTS_FILE, text.corpus.train, text.corpus.sentinel, training, recipe.training_prompts
    )
    where = about(device.type)
    report = {
        "shape": asdict(shape), "recipe": asdict(recipe), "steps": step, "seconds": round(spent, 1),
        "tokens": step * recipe.batch * recipe.raw, "corpus_tokens": len(text.corpus.train), "curve": curve,
        "heldout_before": before, "heldout": after, **size,
        "machine": where.machine["device"], "versions": where.versions,
    }  # fmt: skip
    if device.type == "cuda":
        report["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f} in {step} steps, {spent:.0f} s; {size}", flush=True
    )
    return report


def main(argv: list[str] | None = None) -> None:
    """Cut an excerpt, or train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, plain or .xz")
    parser.add_argument("--excerpt", type=Path, help="only write this many --characters of --text here, as .xz")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--characters", type=int, default=14_000_000)
    parser.add_argument("--batch", type=int, default=Recipe().batch)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    options = parser.parse_args(argv)
    if options.excerpt is not None:
        excerpt(options.text, options.excerpt, options.characters)
        return
    if options.out is None:
        parser.error("give --out")
    shape, recipe = sizes(options.experts, tiny=options.tiny, batch=options.batch)
    text = prepare_text(options.text[0], shape, recipe, options.characters)
    train(text, shape, recipe, torch.device(options.device), options.seconds, options.out)


def sizes(experts: int, *, tiny: bool, batch: int) -> tuple[Shape, Recipe]:
    """Shape and recipe, of full size or to try things."""
    if tiny:
        return replace(TINY, experts=experts), replace(
            Recipe(), raw=60, batch=4, prompts=8, training_prompts=12, prompt_lengths=(16, 24)
        )
    return Shape(experts=experts), replace(Recipe(), batch=batch)


if __name__ == "__main__":
    main()
