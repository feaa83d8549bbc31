"""Novella's routing on text it did not write: the traces its predictor is trained and judged on.

Run: ``python -m novella.routes texts --data DIR --prompts DIR --out texts.npz`` makes windows of token ids. They are
from books that Novella learned from, books it never saw, maths and chat prompts. Then ``python -m novella.routes record
--texts texts.npz --out DIR`` runs Novella over them and writes one trace a part. Every token is fed in as if it had
just been sampled. Needs PYTHONPATH=tools.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from transformers import AutoTokenizer

from expertflow.engine.llm import shipped_model
from expertflow.engine.plain import from_pretrained
from expertflow.trace.format import DECODE, Header, Rows, Trace, save_trace
from novella.constants import HELDOUT_FILE, TRAIN_FILE

WINDOW = 512
COUNTS = {"learned": 900, "unseen": 160, "maths": 120, "chat": 120}
"""Windows of each part."""
_LEAST = 48
_SEED = 11
_BATCH = 16


def book_windows(path: Path, count: int, tokenizer: Any) -> list[list[int]]:
    """Windows from all over a collection of books."""
    with lzma.open(path, "rt", encoding="utf-8") as stream:
        text = stream.read()
    places = np.linspace(0, len(text) - 8 * WINDOW, count).astype(int)
    pieces = [text[place : place + 8 * WINDOW] for place in places]
    return [tokenizer(piece.split(" ", 1)[-1])["input_ids"][:WINDOW] for piece in pieces]


def prompt_texts(folder: Path) -> dict[str, list[str]]:
    """Maths and chat: questions with their answers where there are any."""
    lines = {
        name: [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        for name in ("gsm8k_test.jsonl", "math500_test.jsonl", "mt_bench_question.jsonl")
    }
    alpaca = json.loads((folder / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    maths = [f"{entry['question']}\n{entry['answer']}" for entry in lines["gsm8k_test.jsonl"][:60]]
    maths += [f"{entry['problem']}\n{entry['solution']}" for entry in lines["math500_test.jsonl"][:60]]
    chat = ["\n\n".join(entry["turns"]) for entry in lines["mt_bench_question.jsonl"]]
    chat += [f"{entry['instruction']}\n{entry['output']}" for entry in alpaca]
    return {"maths": maths, "chat": chat}


def texts(data: Path, prompts: Path, out: Path) -> None:
    """Write the windows of every part."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    parts = {
        "learned": book_windows(data / TRAIN_FILE, COUNTS["learned"], tokenizer),
        "unseen": book_windows(data / HELDOUT_FILE, COUNTS["unseen"], tokenizer),
    }
    for name, lines in prompt_texts(prompts).items():
        windows = [tokenizer(line)["input_ids"][:WINDOW] for line in lines]
        parts[name] = [window for window in windows if len(window) >= _LEAST][: COUNTS[name]]
    arrays: dict[str, NDArray[Any]] = {}
    for name, windows in parts.items():
        arrays[f"{name}_tokens"] = np.concatenate([np.asarray(window, dtype=np.uint16) for window in windows])
        arrays[f"{name}_lengths"] = np.asarray([len(window) for window in windows], dtype=np.int32)
    np.savez_compressed(out, **arrays)


class Collector:
    """Keeps the routing of one forward pass."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.layers: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def begin(self, tokens: NDArray[np.int32] | None) -> None:
        """A pass starts."""
        del tokens
        self.layers = []

    def observe(self, layer: int, routes: NDArray[np.int64], weights: Callable[[], NDArray[np.float32]]) -> None:
        """A layer's routing."""
        del layer
        self.layers.append((routes, weights()))

    def take(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`[T, L, K]` experts in descending weight, and the weights."""
        routes = np.stack([routes for routes, _ in self.layers], axis=1)
        weights = np.stack([weights for _, weights in self.layers], axis=1)
        order = np.argsort(-weights, axis=2, kind="stable")
        return np.take_along_axis(routes, order, axis=2), np.take_along_axis(weights, order, axis=2)


def record(windows: Path, out: Path) -> None:
    """Run Novella over every window, and write a trace a part."""
    model = from_pretrained(progress=False, max_batch=_BATCH, max_length=WINDOW)
    collector = Collector()
    model.expertflow.watch(collector)
    shape, arrays = model.expertflow.plan.shape, np.load(windows)
    out.mkdir(parents=True, exist_ok=True)
    for part in COUNTS:
        lengths = arrays[f"{part}_lengths"]
        pieces = np.split(arrays[f"{part}_tokens"].astype(np.int64), np.cumsum(lengths)[:-1])
        columns: list[Rows] = []
        for begin in track(range(0, len(pieces), _BATCH), description=part, console=Console(stderr=True)):
            columns += _run(model, collector, pieces[begin : begin + _BATCH], begin)
        header = Header(
            layers=shape.layers, experts=shape.experts, top_k=model.expertflow.skeleton.top_k, model="novella",
            fingerprint=model.expertflow.fingerprint, source=f"{part}: given text, token by token",
            record_bytes=model.expertflow.plan.record_bytes,
        )  # fmt: skip
        rows = Rows(*(np.concatenate(column) for column in zip(*columns, strict=True)))
        entries = tuple({"sequence": number, "category": part} for number in range(len(pieces)))
        save_trace(Trace(header=header, rows=rows, sequences=entries), out / f"{part}.trace")


def _run(model: Any, collector: Collector, pieces: list[NDArray[np.int64]], first: int) -> list[Rows]:
    width = max(len(piece) for piece in pieces)
    ids = np.zeros((len(pieces), width), dtype=np.int64)
    for row, piece in enumerate(pieces):
        ids[row, : len(piece)] = piece  # padded behind: causal attention never sees it
    with torch.inference_mode():
        model(torch.from_numpy(ids).to(model.device), use_cache=False)
    routes, weights = (column.reshape(len(pieces), width, *column.shape[1:]) for column in collector.take())
    return [
        Rows(
            routes[row, : len(piece)].astype(np.uint8), weights[row, : len(piece)].astype(np.float16),
            piece.astype(np.int32), np.full(len(piece), DECODE, dtype=np.uint8),
            np.full(len(piece), first + row, dtype=np.int32), np.arange(len(piece), dtype=np.int32),
        )
        for row, piece in enumerate(pieces)
    ]  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("texts", "record"))
    for name in ("data", "prompts", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path)
    options = parser.parse_args()
    if options.command == "texts":
        texts(options.data, options.prompts, options.out)
    else:
        record(options.texts, options.out)


if __name__ == "__main__":
    main()
