"""The token scheduler with and without (the paper's Table 2): the same requests divided by arrival, by route, and as it pays.

All models share one copy of the experts and take turns, forwards and backwards. The clock runs from the moment when
every request has its first token; the time of predicting and dividing is included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.bench.workload import read_prompt_set
from switch.constants import PROMPTS_FILE

SCHEDULES = ("fifo", "group", "auto")


def run(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[dict[str, float], list[list[int]]]:
    """All prompts at once, to the last token; figures after all first tokens, and the tokens."""
    out: list[list[int]] = [[] for _ in prompts]
    waiting, count, began, before = len(prompts), 0, 0.0, llm.stats.cache
    for item in llm.stream(list(prompts), SamplingParams(max_tokens=tokens, ignore_eos=True)):
        waiting -= not out[item.index]
        out[item.index].append(item.token_id)
        count += bool(began)
        if not waiting and not began:
            began, before = time.perf_counter(), llm.stats.cache
    lasted, after = time.perf_counter() - began, llm.stats.cache
    figures = {
        "tokens_per_second": count / lasted,
        "loads_per_token": (after.loads - before.loads) / count,
        "moved_mb_per_token": (after.bytes_moved - before.bytes_moved) / count / 1e6,
    }
    return figures, out


def measure(
    folder: Path, slots: str, *, batch: int, live: int, tokens: int, repeats: int, device: str
) -> dict[str, Any]:
    """Every schedule on the same prompts.

    Args:
        folder: checkpoint with its predictor and prompts.
        slots: as for `LLM`.
        batch: sequences that step together.
        live: sequences that take turns.
        tokens: new tokens of each.
        repeats: timed runs of each schedule, behind one that warms up.
        device: `cuda` or `cpu`.
    """
    prompts = read_prompt_set(folder / PROMPTS_FILE, None, long_prompt=0, seed=0).prompts
    longest = max(map(len, prompts)) + tokens
    options = {"slots": slots, "max_batch": batch, "max_live": live, "max_length": longest, "prefill_chunk": batch * longest, "device": device}  # fmt: skip
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in SCHEDULES}
    exact = True
    with ExitStack() as stack:
        models: dict[str, LLM] = {}
        for name in SCHEDULES:
            first = next(iter(models.values()), None)
            models[name] = stack.enter_context(LLM(folder, schedule=name, beside=first, **options))
        for repeat in range(repeats + 1):
            mine = [prompts[(repeat * live + place) % len(prompts)] for place in range(live)]
            answers = []
            for name in SCHEDULES if repeat % 2 else reversed(SCHEDULES):
                found, out = run(models[name], mine, tokens)
                answers.append(out)
                if repeat:
                    figures[name].append(found)
            exact &= all(out == answers[0] for out in answers)
        plan = models["fifo"].plan
        return {
            "slots": plan.slots, "batch": batch, "live": live, "tokens": tokens, "execution": plan.execution, "tokens_equal": exact,
            "strategy": plan.strategy, "plan_bytes": plan.total, "schedules": figures,
        }  # fmt: skip


def write(out: Path, rows: list[dict[str, Any]], device: str) -> None:
    """The result file."""
    result = {**about(device)._asdict(), "benchmark": "switch_schedule", "seed": 0, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
