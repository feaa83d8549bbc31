"""Held-out evaluation, samples, export to the stock format, and the files that travel back."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from novella.constants import MIB, TOKENIZER_DIR, Recipe, Shape
from novella.data import Ids, windows
from novella.model import Twin, stock_config

PROMPTS = (
    "It was a cold evening in November, and",
    "The old gentleman looked at her over his spectacles and said,",
    "When the carriage stopped before the house,",
    '"I do not believe you," she said,',
    "Many years ago there lived in the village",
    "The captain stood upon the deck and",
)
MODEL_DIR = "novella"


@torch.no_grad()
def evaluate(twin: Twin, ids: Ids, batch: int, sequence: int, chars: int) -> dict[str, Any]:
    """Return perplexity, bits a character and every expert's load on held-out tokens."""
    device = next(twin.parameters()).device
    tokens = torch.from_numpy(ids.astype("int16")).to(device)
    starts = torch.arange(0, len(ids) - 1 - sequence, sequence, device=device)
    if len(starts) == 0:
        msg = f"{len(ids)} held-out tokens are too few for one window of {sequence}"
        raise ValueError(msg)
    total = torch.zeros((), dtype=torch.float64, device=device)
    counts: Tensor | None = None
    twin.eval()
    for chunk in starts.split(batch):
        inputs, targets = windows(tokens, chunk, sequence)
        hidden, outs = twin.hidden(inputs)
        logits = F.linear(hidden, twin.model.embed_tokens.weight.to(hidden.dtype)).float()
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        layer_counts = torch.stack([out.counts for out in outs])
        counts = layer_counts if counts is None else counts + layer_counts
    twin.train()
    scored = len(starts) * sequence
    nll = float(total) / scored
    answer = {
        "tokens": scored,
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_character": nll / math.log(2) * len(ids) / chars,
    }
    if twin.shape.moe and counts is not None:
        answer["load"] = load_report(counts)
    return answer


def load_report(counts: Tensor) -> dict[str, Any]:
    """Return each expert's share of its layer's routed tokens, relative to a fair share."""
    share = counts.double() / counts.sum(1, keepdim=True).double() * counts.shape[1]
    return {
        "per_layer": [[round(float(v), 4) for v in row] for row in share],
        "min_relative": float(share.min()),
        "max_relative": float(share.max()),
        "layer_min": [float(v) for v in share.min(1).values],
        "layer_max": [float(v) for v in share.max(1).values],
    }


@torch.no_grad()
def samples(
    twin: Twin, tokenizer: Tokenizer, seed: int, length: int = 110, temperature: float = 0.75
) -> list[dict[str, str]]:
    """Continue six fixed prompts (plain sampling, fixed seed)."""
    device = next(twin.parameters()).device
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    ends = torch.tensor([len(p) for p in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    tokens = torch.zeros(len(prompts), int(ends.max()) + length, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    twin.eval()
    for _ in range(length):
        logits = twin.logits(tokens[:, : int(ends.max())])[rows, ends - 1].float()
        probs = (logits / temperature).softmax(-1)
        tokens[rows, ends] = torch.multinomial(probs, 1, generator=generator)[:, 0]
        ends = ends + 1
    twin.train()
    texts = [tokenizer.decode(tokens[row, len(prompt) : int(ends[row])].tolist()) for row, prompt in enumerate(prompts)]
    return [{"prompt": p, "text": t} for p, t in zip(PROMPTS, texts, strict=True)]


def export(twin: Twin, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Save as an ordinary bf16 checkpoint through stock transformers, reload it and compare."""
    if folder.exists():
        shutil.rmtree(folder)
    config = stock_config(twin.shape, recipe)
    stock = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = stock.load_state_dict(
        {name: value.detach().cpu() for name, value in twin.state_dict().items()}, strict=False
    )
    if unexpected or set(missing) - {"lm_head.weight"}:
        msg = f"the twin does not match the stock model: {missing} {unexpected}"
        raise ValueError(msg)
    stock.tie_weights()
    stock.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.75
    )
    stock.to(torch.bfloat16).save_pretrained(folder, max_shard_size=recipe.shard_size)
    return compare(twin, folder)


@torch.no_grad()
def compare(twin: Twin, folder: Path) -> dict[str, Any]:
    """Return how far the reloaded stock model's logits are from the twin's, both in fp32."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = Twin(twin.shape)
    saved = {name: v.detach().cpu().bfloat16().float() for name, v in twin.state_dict().items()}
    rounded.load_state_dict(saved)
    probe = torch.randint(0, twin.shape.vocab, (2, 48), generator=torch.Generator().manual_seed(1))
    ours, theirs = rounded.logits(probe), stock(probe).logits
    difference = float((ours - theirs).abs().max())
    if difference > 1e-2:
        msg = f"the exported model's logits are {difference:.4f} away from the twin's"
        raise ValueError(msg)
    return {"max_logit_difference_fp32": difference, "class": type(stock).__name__}


def check_size(folder: Path, tokenizer: Path, recipe: Recipe) -> dict[str, int]:
    """Refuse a checkpoint that, with its tokenizer, is larger than the project may ship."""
    files = [f for f in (*folder.iterdir(), *tokenizer.iterdir()) if f.is_file()]
    total = sum(f.stat().st_size for f in files)
    largest = max(f.stat().st_size for f in files)
    if total > recipe.max_total_bytes or largest > recipe.max_file_bytes:
        msg = (
            f"checkpoint and tokenizer take {total / MIB:.2f} MiB (largest file "
            f"{largest / MIB:.2f}); the limits are {recipe.max_total_bytes / MIB:.0f} MiB in all "
            f"and {recipe.max_file_bytes / MIB:.0f} MiB a file"
        )
        raise ValueError(msg)
    return {"total_bytes": total, "largest_file_bytes": largest}


def merge_report(path: Path, part: dict[str, Any]) -> dict[str, Any]:
    """Add a part to report.json and return the whole."""
    report: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    report.update(part)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def flatten(out: Path, flat: Path, limit: int = 8) -> list[str]:
    """Copy exactly the files that must travel back: weights, configs and the report."""
    flat.mkdir(parents=True, exist_ok=True)
    wanted = [out / "report.json"]
    if (out / MODEL_DIR).is_dir():
        wanted += sorted(f for f in (out / MODEL_DIR).iterdir() if f.is_file())
    if len(wanted) > limit:
        msg = f"{len(wanted)} files would travel back, {limit} may: {[f.name for f in wanted]}"
        raise ValueError(msg)
    for source in wanted:
        shutil.copyfile(source, flat / source.name)
    return [source.name for source in wanted]


def load_tokenizer(data: Path) -> Tokenizer:
    """Load the carried tokenizer."""
    return Tokenizer.from_file(str(data / TOKENIZER_DIR / "tokenizer.json"))


def shape_summary(shape: Shape) -> str:
    """Describe in a line what is trained."""
    kind = f"{shape.experts} experts, top-{shape.top_k}" if shape.moe else "dense"
    return f"{shape.layers} layers x {shape.hidden}, {kind}, vocabulary {shape.vocab}"
