"""The training loop: one seeded, resumable run of one model, and its measured step plan."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from novella.constants import Recipe, Shape
from novella.data import Batches, Corpus
from novella.model import Twin, parameter_counts
from novella.optim import Hybrid, learning_factor
from novella.report import evaluate


@dataclass
class Run:
    """A model in training with everything a checkpoint must hold."""

    name: str
    shape: Shape
    recipe: Recipe
    device: torch.device
    twin: Twin
    optimiser: Hybrid
    batches: Batches
    corpus: Corpus
    console: Console
    step: int = 0
    total: int = 0
    seconds: float = 0.0
    first_step_seconds: float = 0.0
    lr_scale: float = 1.0
    curve: list[list[float]] = field(default_factory=list)
    probes: list[list[float]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        """How many tokens one step sees."""
        return self.recipe.batch * self.recipe.sequence


def start_run(
    shape: Shape,
    recipe: Recipe,
    device: torch.device,
    corpus: Corpus,
    console: Console,
    *,
    compiled: bool,
    lr_scale: float = 1.0,
) -> Run:
    """Make a fresh seeded model with its optimiser and data."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    twin = Twin(shape, dtype).initialise(recipe.seed).to(device)
    if compiled:
        twin.compile_parts()
    batches = Batches(corpus.train, recipe.batch, recipe.sequence, recipe.seed, device)
    optimiser = Hybrid(twin, recipe, lr_scale)
    name = "moe" if shape.moe else "dense"
    run = Run(name, shape, recipe, device, twin, optimiser, batches, corpus, console)
    run.lr_scale = lr_scale
    return run


def synchronise(device: torch.device) -> None:
    """Wait for the device, if it is one that runs ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_step(run: Run) -> torch.Tensor:
    """Do one optimiser step; return language, balance and z losses (still on the device)."""
    inputs, targets = run.batches.at(run.step)
    losses = run.twin(inputs, targets, run.recipe)
    losses.total.backward()
    total = run.total or run.recipe.warmup_steps * 1_000
    run.optimiser.step(learning_factor(run.step, total, run.recipe))
    run.step += 1
    return torch.stack([losses.language, losses.balance, losses.z]).detach()


def record(run: Run, values: torch.Tensor) -> float:
    """Note one point of the loss curve and return its language loss."""
    language, balance, z = (round(float(v), 5) for v in values.cpu())
    if not np.isfinite(language):
        msg = f"{run.name}: the loss is {language} at step {run.step}; lower --lr-scale"
        raise FloatingPointError(msg)
    run.curve.append([run.step, language, balance, z])
    return language


def measure(run: Run) -> float:
    """Train the first steps (part of the warm-up, so none is lost); return seconds a step."""
    begin = time.perf_counter()
    record(run, train_step(run))
    run.first_step_seconds = time.perf_counter() - begin
    while run.step < run.recipe.measure_from:
        train_step(run)
    synchronise(run.device)
    mark = time.perf_counter()
    for _ in range(run.recipe.measure_steps):
        values = train_step(run)
    record(run, values)
    each = (time.perf_counter() - mark) / run.recipe.measure_steps
    rate = run.tokens_per_step / each
    run.seconds += time.perf_counter() - begin
    run.console.log(
        f"{run.name}: first step {run.first_step_seconds:.1f} s, then {each * 1e3:.1f} ms a step, "
        f"{rate / 1e6:.3f} M tokens/s"
    )
    return each


def train(run: Run, out: Path, deadline: float | None = None, stop_at: int | None = None) -> None:
    """Train to the planned total; shrink the plan if it would overrun the deadline."""
    begin, saved = time.perf_counter(), time.perf_counter()
    entered, every = run.step, max(1, min(50, run.total // run.recipe.curve_points or 1))
    last = run.total if stop_at is None else min(stop_at, run.total)
    mark, mark_step = begin, entered
    while run.step < last:
        values = train_step(run)
        if run.step % every == 0 or run.step == last:
            language = record(run, values)
            now = time.perf_counter()
            if run.step % (every * 20) == 0:
                rate = (run.step - mark_step) * run.tokens_per_step / max(1e-9, now - mark)
                mark, mark_step = now, run.step
                run.console.log(
                    f"{run.name} step {run.step}/{run.total}: loss {language:.4f}, balance "
                    f"{float(values[1]):.3f}, {rate / 1e6:.2f} M tokens/s"
                )
            if now - saved > run.recipe.checkpoint_seconds:
                save_checkpoint(run, out, run.seconds + now - begin)
                saved = time.perf_counter()
            if deadline is not None and now - begin > 20:
                last = replan(run, deadline, (now - begin) / (run.step - entered))
        if run.step % run.recipe.probe_every == 0:
            probe(run)
    synchronise(run.device)
    run.seconds += time.perf_counter() - begin
    save_checkpoint(run, out, run.seconds)


def replan(run: Run, deadline: float, each: float) -> int:
    """Shorten the plan when it would end more than 8 s past the deadline."""
    left = deadline - time.perf_counter()
    if run.step < run.total and (run.total - run.step) * each > left + 8.0:
        run.total = max(run.step + 1, run.step + int(left / each))
        run.console.log(f"{run.name}: behind plan, now {run.total} steps in all")
    return run.total


def probe(run: Run) -> None:
    """Take a quick look at held-out loss."""
    ids = run.corpus.heldout[: 256 * 1024]
    compiled = (run.twin.run_layer, run.twin.loss_of)
    run.twin.use_eager()
    answer = evaluate(run.twin, ids, run.recipe.batch, run.recipe.sequence, 1)
    run.twin.run_layer, run.twin.loss_of = compiled
    run.probes.append([run.step, round(answer["nll"], 5)])
    run.console.log(f"{run.name} step {run.step}: held-out loss {answer['nll']:.4f} (a part)")


def checkpoint_path(out: Path, name: str) -> Path:
    """Where a run's checkpoint lies."""
    return out / "checkpoints" / f"{name}.pt"


def save_checkpoint(run: Run, out: Path, seconds: float) -> None:
    """Write model, optimiser, step and random state; replace the old file in one move."""
    path = checkpoint_path(out, run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": run.twin.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "step": run.step,
        "total": run.total,
        "seconds": seconds,
        "first_step_seconds": run.first_step_seconds,
        "curve": run.curve,
        "probes": run.probes,
        "shape": asdict(run.shape),
        "recipe": asdict(run.recipe),
        "torch_rng": torch.get_rng_state(),
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def resume(run: Run, out: Path) -> bool:
    """Go on from this run's checkpoint; return whether there was one."""
    path = checkpoint_path(out, run.name)
    if not path.is_file():
        return False
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["shape"] != asdict(run.shape) or state["recipe"]["seed"] != run.recipe.seed:
        msg = f"{path.name} belongs to another shape or seed; remove it or leave out --resume"
        raise ValueError(msg)
    run.twin.load_state_dict(state["model"])
    run.optimiser.load_state_dict(state["optimiser"])
    run.step, run.total, run.seconds = state["step"], state["total"], state["seconds"]
    run.first_step_seconds = state["first_step_seconds"]
    run.curve, run.probes = state["curve"], state["probes"]
    torch.set_rng_state(state["torch_rng"])
    run.console.log(f"{run.name}: resumed at step {run.step} of {run.total}")
    return True


def thin(curve: list[list[float]], points: int) -> list[list[float]]:
    """Keep at most `points` evenly spread points, the last one always."""
    if len(curve) <= points:
        return curve
    keep = np.unique(np.linspace(0, len(curve) - 1, points).astype(int))
    return [curve[i] for i in keep]


def summary(run: Run) -> dict[str, Any]:
    """Evaluate a finished run and return its part of the report."""
    run.twin.use_eager()
    heldout = evaluate(
        run.twin,
        run.corpus.heldout,
        run.recipe.batch,
        run.recipe.sequence,
        run.corpus.heldout_chars,
    )
    tokens = run.step * run.tokens_per_step
    answer = {
        "parameters": parameter_counts(run.twin),
        "shape": asdict(run.shape),
        "steps": run.step,
        "planned_steps": run.total,
        "tokens": tokens,
        "epochs": run.step / run.batches.steps_per_epoch,
        "corpus_tokens": len(run.corpus.train),
        "train_seconds": run.seconds,
        "tokens_per_second": tokens / max(run.seconds, 1e-9),
        "first_step_seconds": run.first_step_seconds,
        "lr_scale": run.lr_scale,
        "heldout": heldout,
        "heldout_probes": run.probes,
        "curve_columns": ["step", "language", "balance", "z"],
        "curve": thin(run.curve, run.recipe.curve_points),
    }
    run.console.log(
        f"{run.name}: held-out perplexity {heldout['perplexity']:.3f}, "
        f"{heldout['bits_per_character']:.4f} bits a character"
    )
    if "load" in heldout:
        load = heldout["load"]
        run.console.log(
            f"{run.name}: expert load {load['min_relative']:.2f} to {load['max_relative']:.2f} times the fair share"
        )
    return answer
