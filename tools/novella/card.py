"""Assemble the shipped model folder: weights, tokenizer, held-out index and a model card.

Every figure on the card is read from report.json and heldout.json.
Run: ``PYTHONPATH=tools python -m novella.card --results DIR --data DIR --target DIR``
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from novella.constants import HELDOUT_INDEX, MIB, TOKENIZER_DIR, Recipe

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
LOG_ROWS = 16
Json = dict[str, Any]


def load_reports(paths: list[Path]) -> Json:
    """Read report.json, or several that each hold one of the two models."""
    report: Json = {}
    for path in paths:
        report.update(json.loads(path.read_text()))
    missing = {"moe", "dense"} - set(report)
    if missing:
        msg = f"the report lacks {sorted(missing)}: train both, or name both reports"
        raise ValueError(msg)
    if report["moe"]["tokens"] != report["dense"]["tokens"]:
        msg = "the MoE and the dense baseline saw different numbers of tokens"
        raise ValueError(msg)
    return report


def accept(report: Json, recipe: Recipe) -> None:
    """Refuse a model that misses what the project demands of it."""
    moe, dense = report["moe"], report["dense"]
    faults: list[str] = []
    if moe["heldout"]["perplexity"] >= dense["heldout"]["perplexity"]:
        faults.append("the MoE does not beat the dense baseline on held-out text")
    if moe["heldout"]["load"]["min_relative"] < recipe.min_load:
        faults.append("an expert gets too little of the held-out load")
    if moe["parameters"]["experts"] < 0.85 * moe["parameters"]["total"]:
        faults.append("experts hold less than 85 % of the parameters")
    if faults:
        raise ValueError("; ".join(faults))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def architecture_section(report: Json) -> str:
    """Describe the model."""
    moe = report["moe"]
    shape, size = moe["shape"], moe["parameters"]
    return f"""# Novella

Novella is a small Mixture-of-Experts language model of English prose, trained from scratch for
ExpertFlow so that routing, caching and offloading can be shown and tested on a real MoE that
travels with the project. It is an ordinary `Qwen3MoeForCausalLM` checkpoint:
{shape["layers"]} layers, all MoE, {shape["experts"]} experts a layer, top-{shape["top_k"]}
(renormalised), hidden size {shape["hidden"]}, expert width {shape["expert_width"]},
{shape["heads"]} query and {shape["kv_heads"]} key/value heads of {shape["head_dim"]}, tied
embeddings, own byte-level BPE of {shape["vocab"]} entries.

{size["total"]:,} parameters, {size["experts"] / size["total"]:.1%} of them in experts,
{size["active"]:,} active for a token. Weights are bf16; weights and tokenizer together take
{moe["export"]["total_bytes"] / MIB:.2f} MiB.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
```
"""


def data_section(index: Json) -> str:
    """Describe what it was trained on, under which licences."""
    rows = [
        [
            name,
            c["source"],
            c["licence"],
            str(c["train_books"]),
            f"{c['train_chars'] / 1e6:.1f} M",
            str(sum(book["collection"] == name for book in index["heldout"])),
        ]
        for name, c in index["collections"].items()
    ]
    head = ["collection", "source (GitHub)", "licence", "training books", "characters", "held out"]
    return f"""## Data and licences

{index["train_books"]} English novels, {index["train_chars"] / 1e6:.1f} M characters, from four
collections. {len(index["duplicates"])} copies of a novel already present were removed (8-word
shingles), and {index["train_books_left_out"]} books were left out for size.
{len(index["heldout"])} whole books ({index["heldout_chars"] / 1e6:.1f} M characters) are held out;
they are listed in `heldout.json`. Other books by the same authors may be in training.

{table(head, rows)}

The trained weights, the tokenizer and this card carry the project's own licence.
"""


def log_section(report: Json) -> str:
    """Summarise the training log."""
    moe, recipe, env = report["moe"], report["recipe"], report["environment"]
    curve, probes = moe["curve"], moe["heldout_probes"]
    picks = curve[:: max(1, len(curve) // LOG_ROWS)]
    picks = picks if picks[-1] is curve[-1] else [*picks, curve[-1]]
    rows = [[str(int(s)), f"{loss:.3f}", f"{balance:.3f}"] for s, loss, balance, _ in picks]
    seen = ", ".join(f"{int(step)}: {nll:.3f}" for step, nll in probes)
    return f"""## Training log

{moe["steps"]:,} steps of {recipe["batch"]} x {recipe["sequence"]} tokens = {moe["tokens"]:,}
tokens ({moe["epochs"]:.1f} epochs of {moe["corpus_tokens"]:,}), {moe["train_seconds"]:.0f} s at
{moe["tokens_per_second"]:,.0f} tokens/s on one {env["device"]}, PyTorch {env["torch"]},
transformers {env["transformers"]}, seed {report["seed"]}. Muon (learning rate
{recipe["matrix_lr"] * moe["lr_scale"]:g}) for hidden matrices, AdamW
({recipe["vector_lr"] * moe["lr_scale"]:g}) for embedding, routers and norms;
{recipe["warmup_steps"]} warm-up steps, constant to {recipe["constant_share"]:.0%} of the steps,
linear decay to zero. Load-balance loss x {recipe["balance_coef"]:g}, router z-loss x
{recipe["z_coef"]:g}, both over the whole batch.

{table(["step", "training loss", "balance loss (1 = even)"], rows)}

Loss on a part of the held-out text, by step: {seen or "not taken"}.
"""


def quality_section(report: Json) -> str:
    """Compare with the dense baseline and report the expert load."""
    rows = []
    for name, label in (("moe", "Novella (MoE)"), ("dense", "dense Qwen3 baseline")):
        part = report[name]
        heldout, size = part["heldout"], part["parameters"]
        rows.append(
            [
                label,
                f"{size['total']:,}",
                f"{size['active']:,}",
                f"{part['tokens']:,}",
                f"{heldout['perplexity']:.3f}",
                f"{heldout['bits_per_character']:.4f}",
            ]
        )
    head = ["model", "parameters", "active", "tokens seen", "perplexity", "bits a character"]
    load = report["moe"]["heldout"]["load"]
    per_layer = [
        [str(i), f"{low:.2f}", f"{high:.2f}"]
        for i, (low, high) in enumerate(zip(load["layer_min"], load["layer_max"], strict=True))
    ]
    length = report["recipe"]["sequence"]
    return f"""## Held-out quality

On {report["moe"]["heldout"]["tokens"]:,} held-out tokens, in windows of {length} (a token's context
is what precedes it in its window); both models saw the same tokens in the same order.

{table(head, rows)}

## Expert load

Tokens routed to an expert on the held-out text, as a multiple of its fair share: the least used
expert of all gets {load["min_relative"]:.2f}, the most used {load["max_relative"]:.2f}.

{table(["layer", "least used", "most used"], per_layer)}
"""


def samples_section(report: Json) -> str:
    """Show the unedited samples."""
    parts = [
        "> **" + s["prompt"] + "**" + s["text"].rstrip().replace("\n\n", "\n>\n> ") for s in report["moe"]["samples"]
    ]
    return "## Samples\n\nUnedited, fixed seed, temperature 0.75.\n\n" + "\n\n".join(parts) + "\n"


def limits_section(report: Json) -> str:
    """Describe what it is for and what it is not."""
    shape, length = report["moe"]["shape"], report["recipe"]["sequence"]
    return f"""## Intended use and limits

For showing, testing and benchmarking MoE inference. It writes sentences in the manner of
nineteenth-century novels and follows no instructions; it knows no facts worth trusting, drifts
after a few sentences, and repeats the prejudices of its sources. English only. It was trained on
sequences of {length} tokens, at most {shape["max_positions"]} positions are meant to be used.
"""


def card(report: Json, index: Json) -> str:
    """Return the whole model card."""
    front = "---\nlanguage: en\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
    return front + "\n".join(
        (
            architecture_section(report),
            data_section(index),
            log_section(report),
            quality_section(report),
            samples_section(report),
            limits_section(report),
        )
    )


def assemble(results: Path, data: Path, target: Path, report: Json) -> int:
    """Copy weights, tokenizer and index, write card and report; return the folder's bytes."""
    recipe = Recipe()
    accept(report, recipe)
    target.mkdir(parents=True, exist_ok=True)
    shards = sorted(results.glob("model*.safetensors"))
    if not shards:
        msg = "no model*.safetensors in the results folder"
        raise FileNotFoundError(msg)
    sources = [*shards, *(results / name for name in MODEL_FILES)]
    sources += [f for f in (data / TOKENIZER_DIR).iterdir() if f.is_file()]
    sources.append(data / HELDOUT_INDEX)
    for source in sources:
        shutil.copyfile(source, target / source.name)
    index = json.loads((data / HELDOUT_INDEX).read_text())
    (target / "README.md").write_text(card(report, index))
    (target / "training_report.json").write_text(json.dumps(report, ensure_ascii=False) + "\n")
    files = [f for f in target.iterdir() if f.is_file()]
    total = sum(f.stat().st_size for f in files)
    if total > recipe.max_total_bytes or max(f.stat().st_size for f in files) > recipe.max_file_bytes:
        msg = f"the model folder takes {total / MIB:.2f} MiB, or one of its files is too large"
        raise ValueError(msg)
    return total


def main() -> None:
    """Read the command line and assemble the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="weights and report.json")
    parser.add_argument("--report", type=Path, nargs="+", help="default RESULTS/report.json")
    parser.add_argument("--data", type=Path, required=True, help="tokenizer and heldout.json")
    parser.add_argument("--target", type=Path, required=True, help="folder of the shipped model")
    options = parser.parse_args()
    report = load_reports(options.report or [options.results / "report.json"])
    total = assemble(options.results, options.data, options.target, report)
    Console(width=110).log(f"model folder complete: {total / MIB:.2f} MiB")


if __name__ == "__main__":
    main()
