"""The shapes and the recipe. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass

PAD, EOS = 0, 1
NAMES = ("<pad>", "</s>", "<unk>")
"""Special pieces by id."""
SENTINELS = 100
PROMPTS_FILE, REPORT_FILE, TRAINING_PROMPTS_FILE = "prompts.jsonl", "training_report.json", "training_prompts.jsonl"


@dataclass(frozen=True)
class Shape:
    """A Switch model: every feed-forward block sparse, top-1."""

    experts: int = 32
    layers: int = 6
    hidden: int = 768
    width: int = 3072
    heads: int = 12
    head_dim: int = 64
    pieces: int = 32_000
    vocabulary: int = 32_128


TINY = Shape(experts=4, layers=2, hidden=32, width=64, heads=2, head_dim=16, pieces=600, vocabulary=768)
"""To try the scripts on a CPU."""


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    seed: int = 20_252
    raw: int = 568
    batch: int = 48
    noise: float = 0.15
    span: float = 3.0
    rate: float = 0.01
    warmup: int = 20
    balance: float = 0.01
    capacity: float = 1.5
    heldout_share: float = 0.02
    prompt_lengths: tuple[int, ...] = (40, 64, 88)
    prompts: int = 64
    training_prompts: int = 1024
    shard_bytes: int = 2 << 30
