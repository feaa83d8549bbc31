"""Train Novella and its dense baseline: one command, seeded, resumable.

Run: ``PYTHONPATH=tools python -m novella.train --data DIR --out DIR --minutes 9``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from expertflow.bench.about import about
from novella.constants import TOKENIZER_DIR, Recipe, Shape
from novella.data import Corpus, load_corpus
from novella.loop import Run, measure, resume, start_run, summary, train
from novella.report import (
    MODEL_DIR,
    check_size,
    export,
    flatten,
    load_tokenizer,
    merge_report,
    samples,
    shape_summary,
)
from novella.smoke import rehearse, smoke

SAFETY = 0.97
STARTED = time.perf_counter()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="corpus and tokenizer folder")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints, model and report")
    parser.add_argument("--minutes", type=float, help="total wall-clock budget")
    parser.add_argument("--steps", type=int, help="train exactly so many steps instead")
    parser.add_argument("--which", choices=("moe", "dense", "both"), default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from --out's checkpoints")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--flat-out", type=Path, help="copy the files to bring back here")
    parser.add_argument("--smoke", type=float, metavar="SECONDS", help="only measure the MoE")
    parser.add_argument("--cache", type=Path, help="token cache, default OUT/cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, help="sequences a step")
    parser.add_argument("--sequence", type=int, help="tokens a sequence")
    parser.add_argument("--lr-scale", type=float, default=1.0)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the script")
    options = parser.parse_args(argv)
    if options.smoke is None and (options.minutes is None) == (options.steps is None):
        parser.error("give either --minutes or --steps")
    return options


def plan(options: argparse.Namespace) -> tuple[Shape, Recipe]:
    """Return the MoE's shape and the recipe by the options."""
    shape, recipe = Shape(), Recipe()
    if options.tiny:
        shape = replace(shape, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16)
        shape = replace(shape, experts=8, top_k=2, expert_width=16)
        recipe = replace(recipe, batch=4, sequence=64, warmup_steps=5, measure_from=2)
        recipe = replace(recipe, measure_steps=2, reserve_seconds=5.0, probe_every=10)
    if options.batch:
        recipe = replace(recipe, batch=options.batch)
    if options.sequence:
        recipe = replace(recipe, sequence=options.sequence)
    if recipe.sequence > shape.max_positions:
        msg = f"--sequence {recipe.sequence} is beyond the model's {shape.max_positions} positions"
        raise ValueError(msg)
    return shape, recipe


def fix_steps(seconds_left: float, each: float, run: Run) -> int:
    """Turn a time budget into a step count, at most the recipe's epochs, and log it."""
    most = int(run.recipe.max_epochs * run.batches.steps_per_epoch)
    steps = run.step + max(1, int(SAFETY * seconds_left / each))
    chosen = min(steps, most)
    run.console.log(
        f"plan: {chosen} steps, {chosen * run.tokens_per_step / 1e6:.0f} M tokens, "
        f"{chosen / run.batches.steps_per_epoch:.1f} epochs"
        f"{' (epoch limit)' if chosen < steps else ''}"
    )
    return chosen


def make(options: argparse.Namespace, corpus: Corpus, console: Console, *, moe: bool) -> Run:
    """Start (or resume) one of the two models."""
    shape, recipe = plan(options)
    device = torch.device(options.device)
    compiled = device.type == "cuda" and not options.no_compile
    run = start_run(
        replace(shape, moe=moe),
        recipe,
        device,
        corpus,
        console,
        compiled=compiled,
        lr_scale=options.lr_scale,
    )
    console.log(f"{run.name}: {shape_summary(run.shape)}, {recipe.batch} x {recipe.sequence}")
    if options.resume:
        resume(run, options.out)
    return run


def dense_command(options: argparse.Namespace, steps: int) -> list[str]:
    """Return the command that trains the dense baseline on the second GPU."""
    command = [sys.executable, "-m", "novella.train", "--which", "dense", "--device", "cuda:1"]
    command += ["--data", str(options.data), "--out", str(options.out / "second")]
    command += ["--steps", str(steps), "--workers", str(options.workers)]
    command += ["--cache", str(options.cache or options.out / "cache")]
    command += ["--lr-scale", str(options.lr_scale)]
    for flag in ("batch", "sequence"):
        if getattr(options, flag):
            command += [f"--{flag}", str(getattr(options, flag))]
    command += ["--no-compile"] if options.no_compile else []
    return command + (["--resume"] if options.resume else [])


def train_moe(
    options: argparse.Namespace, corpus: Corpus, console: Console
) -> tuple[Run, subprocess.Popen[bytes] | None]:
    """Train the MoE within its part of the budget; start the dense run beside it if possible."""
    run = make(options, corpus, console, moe=True)
    both = options.which == "both"
    beside = both and options.device.startswith("cuda") and torch.cuda.device_count() > 1
    deadline = None
    if run.total == 0 and options.minutes is not None:
        deadline = plan_run(options, corpus, run, beside=beside)
    run.total = run.total or options.steps
    child = None
    if beside:
        child = subprocess.Popen(dense_command(options, run.total))
    train(run, options.out, deadline)
    return run, child


def plan_run(options: argparse.Namespace, corpus: Corpus, run: Run, *, beside: bool) -> float | None:
    """Measure both models if they share the GPU, fix the step count, return the MoE's deadline."""
    each, dense_each = measure(run), 0.0
    if options.which == "both" and not beside:
        fresh = argparse.Namespace(**{**vars(options), "resume": False})
        dense_each = measure(make(fresh, corpus, run.console, moe=False))
    finish = STARTED + options.minutes * 60 - run.recipe.reserve_seconds
    left = finish - time.perf_counter()
    both_each = each + dense_each
    done = run.step * dense_each
    run.total = fix_steps(left - done, both_each, run)
    return None if beside else time.perf_counter() + (left - done) * each / both_each


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Describe the machine of the run."""
    cuda = options.device.startswith("cuda")
    found = about("cuda" if cuda else "cpu")
    return {**found.versions, "device": found.machine["device"], "gpus": torch.cuda.device_count() if cuda else 0}


def finish_moe(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, sample, export and check the MoE."""
    part = summary(run)
    tokenizer = load_tokenizer(options.data)
    part["samples"] = samples(run.twin, tokenizer, run.recipe.seed)
    for sample in part["samples"]:
        run.console.print(f"[bold]{sample['prompt']}[/bold]{sample['text']}\n", highlight=False)
    folder = options.out / MODEL_DIR
    part["export"] = export(run.twin, folder, run.recipe)
    part["export"].update(check_size(folder, options.data / TOKENIZER_DIR, run.recipe))
    if run.device.type == "cuda":
        part["peak_memory_bytes"] = torch.cuda.max_memory_allocated(run.device)
    load = part["heldout"]["load"]["min_relative"]
    part["no_dead_expert"] = load >= run.recipe.min_load
    if not part["no_dead_expert"]:
        run.console.log(f"[red]an expert gets only {load:.3f} of its fair share[/red]")
    return part


def merge_child(child: subprocess.Popen[bytes], options: argparse.Namespace) -> dict[str, Any]:
    """Wait for the dense run on the second GPU and take over its part of the report."""
    if child.wait() != 0:
        msg = "the dense run on the second GPU failed; its log is above"
        raise RuntimeError(msg)
    dense: dict[str, Any] = merge_report(options.out / "second" / "report.json", {})["dense"]
    return dense


def main(argv: list[str] | None = None) -> None:
    """Train the chosen models and write report.json after each one."""
    options = arguments(argv)
    console = Console(width=120)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(Recipe().seed)
    torch.set_float32_matmul_precision("high")
    if (index := torch.device(options.device).index) is not None:
        torch.cuda.set_device(index)
    corpus = load_corpus(options.data, options.cache or options.out / "cache", options.workers)
    console.log(
        f"{len(corpus.train) / 1e6:.2f} M training tokens, {len(corpus.heldout) / 1e6:.2f} M held "
        f"out, ready after {time.perf_counter() - STARTED:.1f} s"
    )
    shape, recipe = plan(options)
    if options.smoke is not None:
        device, compiled = torch.device(options.device), not options.no_compile
        run = start_run(shape, recipe, device, corpus, console, compiled=compiled, lr_scale=options.lr_scale)
        smoke(run, options.smoke)
        rehearse(run, options.out / "smoke", options.data / TOKENIZER_DIR / "tokenizer.json")
        if options.which == "both":
            measure(make(options, corpus, console, moe=False))
        return
    path = options.out / "report.json"
    facts = {"environment": environment(options), "seed": recipe.seed, "recipe": asdict(recipe)}
    merge_report(path, facts)
    train_all(options, corpus, console, path)
    verdict(merge_report(path, {"wall_seconds": time.perf_counter() - STARTED}), console)
    if options.flat_out:
        console.log(f"to bring back: {', '.join(flatten(options.out, options.flat_out))}")


def train_all(options: argparse.Namespace, corpus: Corpus, console: Console, path: Path) -> None:
    """Train the chosen models and put each one's part into the report when it is done."""
    steps, child = options.steps, None
    if options.which in ("moe", "both"):
        run, child = train_moe(options, corpus, console)
        steps = run.total
        merge_report(path, {"moe": finish_moe(run, options)})
        if options.flat_out:
            flatten(options.out, options.flat_out)
    if child is not None:
        merge_report(path, {"dense": merge_child(child, options)})
    elif options.which in ("dense", "both"):
        run = make(options, corpus, console, moe=False)
        run.total = run.total or steps or 0
        if run.total == 0:
            each = measure(run)
            left = options.minutes * 60 - (time.perf_counter() - STARTED)
            run.total = fix_steps(left - run.recipe.reserve_seconds, each, run)
        train(run, options.out)
        merge_report(path, {"dense": summary(run)})


def verdict(report: dict[str, Any], console: Console) -> None:
    """Log the comparison of the two models."""
    if "moe" in report and "dense" in report:
        moe, dense = (report[n]["heldout"]["perplexity"] for n in ("moe", "dense"))
        word = "beats" if moe < dense else "[red]DOES NOT BEAT[/red]"
        console.log(f"held-out perplexity: MoE {moe:.3f} {word} dense {dense:.3f}")


if __name__ == "__main__":
    main()
