"""A short measurement of the full-size MoE: speed, memory, loss and the slowest kernels."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from novella.constants import MIB
from novella.loop import Run, probe, record, resume, save_checkpoint, synchronise, train_step
from novella.report import MODEL_DIR, check_size, export, samples

PROFILED_STEPS = 3
TOP = 12


def smoke(run: Run, seconds: float) -> None:
    """Train for `seconds`, then profile a few steps; print what a real run would want to know."""
    begin = time.perf_counter()
    first = record(run, train_step(run))
    run.console.log(f"first step (compile included): {time.perf_counter() - begin:.1f} s")
    for _ in range(3):
        train_step(run)
    synchronise(run.device)
    mark, mark_step = time.perf_counter(), run.step
    while time.perf_counter() - mark < seconds:
        for _ in range(10):
            values = train_step(run)
        loss = record(run, values)
    spent = time.perf_counter() - mark
    steps = run.step - mark_step
    run.console.log(
        f"{steps} steps in {spent:.1f} s: {steps * run.tokens_per_step / spent / 1e6:.3f} M tokens/s, "
        f"{spent / steps * 1e3:.1f} ms a step, loss {first:.3f} -> {loss:.3f}, "
        f"balance {run.curve[-1][2]:.3f}"
    )
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device) / MIB
        run.console.log(f"peak memory {peak:,.0f} MiB, {run.batches.steps_per_epoch} steps an epoch")
    top_kernels(run)


def rehearse(run: Run, out: Path, tokenizer_file: Path) -> None:
    """Try everything that follows training, so that a long run cannot fail at its end."""
    begin = time.perf_counter()
    save_checkpoint(run, out, 0.0)
    resume(run, out)
    train_step(run)
    probe(run)
    run.twin.use_eager()
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    text = samples(run.twin, tokenizer, run.recipe.seed, length=20)[0]["text"]
    run.console.log(f"sample: {text!r}")
    run.console.log(f"export: {export(run.twin, out / MODEL_DIR, run.recipe)}")
    run.console.log(f"size: {check_size(out / MODEL_DIR, tokenizer_file.parent, run.recipe)}")
    run.console.log(f"checkpoint, probe, samples and export: {time.perf_counter() - begin:.1f} s")


def top_kernels(run: Run) -> None:
    """Profile a few steps and print the dearest kernels."""
    cuda = run.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as trace:
        for _ in range(PROFILED_STEPS):
            train_step(run)
        synchronise(run.device)
    rows = trace.key_averages()
    if cuda:
        rows = [row for row in rows if row.device_type == DeviceType.CUDA]
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = sorted(((getattr(row, key), row.count, row.key) for row in rows), reverse=True)
    whole = sum(row[0] for row in spent)
    run.console.log(f"{whole / PROFILED_STEPS / 1e3:.2f} ms of kernels a step; the dearest:")
    for micros, count, name in spent[:TOP]:
        run.console.print(
            f"{micros / PROFILED_STEPS / 1e3:8.3f} ms {micros / whole:6.1%} {count // PROFILED_STEPS:5d}x  {name[:84]}",
            highlight=False,
            markup=False,
        )
