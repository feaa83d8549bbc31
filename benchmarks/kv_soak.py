"""Requests of many lengths come and are cancelled at random while few pages of keys and values are there; answers are those of each alone.

The shipped model in float32, greedy tokens. Requests wait until their pages are free, so the long ones are passed over and then waited for.
Ends in an error where an answer differs, a request is lost, or the measured peak exceeds the plan.

Usage: python benchmarks/kv_soak.py --out FILE [--requests N] [--seed N] [--tiny]
       --tiny: a few short requests, for a CPU
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT, CANCELLED = 1024, 0.1


class Wish(NamedTuple):
    """A prompt and how many tokens it asks for."""

    prompt: list[int]
    tokens: int


def draw(count: int, longest: int, seed: int) -> list[Wish]:
    """Half of the prompts are short; lengths of the others are spread evenly."""
    source, wishes = random.Random(seed), []
    for _ in range(count):
        length = source.randint(1, 40) if source.random() < 0.5 else source.randint(40, longest)
        tokens = source.randint(1, min(100, longest // 4))
        wishes.append(Wish([source.randrange(3, 4000) for _ in range(length)], tokens))
    return wishes


def alone(options: dict[str, Any], wishes: list[Wish]) -> list[tuple[int, ...]]:
    """The answer to each by itself, in pages enough for all."""
    with LLM(max_batch=1, **options) as llm:
        params = [SamplingParams(max_tokens=wish.tokens, ignore_eos=True) for wish in wishes]
        return [llm.generate([wish.prompt], one)[0].token_ids for wish, one in zip(wishes, params, strict=True)]


def together(
    options: dict[str, Any], wishes: list[Wish], seed: int
) -> tuple[dict[int, tuple[int, ...]], dict[str, Any]]:
    """Answers of those that were not cancelled, by number, and what was counted."""
    source, found, cancelled, steps, most = random.Random(seed + 1), {}, set(), 0, 0
    with LLM(max_batch=4, max_live=12, **options) as llm:
        engine, to_come, begun = llm.engine, list(enumerate(wishes)), time.perf_counter()
        numbers: dict[int, int] = {}
        while to_come or engine.unfinished:
            while to_come and engine.unfinished < 24 and source.random() < 0.7:
                place, wish = to_come.pop(0)
                params = SamplingParams(max_tokens=wish.tokens, ignore_eos=True)
                numbers[engine.add(llm.request(wish.prompt, params))] = place
            if numbers and source.random() < CANCELLED / 10:
                number = source.choice(list(numbers))
                if engine.cancel(number):
                    cancelled.add(numbers.pop(number))
            most, steps = max(most, engine.unfinished), steps + 1
            for number, output in engine.step():
                if output.output is not None:
                    found[numbers.pop(number)] = output.output.token_ids
        lost = len(wishes) - len(found) - len(cancelled)
        counted = {
            "steps": steps, "finished": len(found), "cancelled": len(cancelled), "lost": lost, "most_unfinished": most,
            "seconds": time.perf_counter() - begun, "peak": llm.stats.peak_bytes, "plan": llm.plan.total, "kv": llm.plan.kv,
            "kv_tokens": llm.plan.kv_tokens, "execution": llm.plan.execution,
        }  # fmt: skip
    return found, counted


def main() -> None:
    """Run, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    count, longest = (12, 90) if given.tiny else (given.requests, CONTEXT - 120)
    options = {"device": DEVICE, "dtype": "float32", "slots": "50%", "predictor": "none", "max_length": CONTEXT}
    wishes = draw(count, longest, given.seed)
    found, counted = together({**options, "kv_tokens": 2 * CONTEXT}, wishes, given.seed)
    expected = alone(options, wishes)
    wrong = [place for place, tokens in found.items() if tokens != expected[place]]
    row = {**counted, "wrong": wrong}
    config = {"requests": count, "longest": longest, "tiny": given.tiny}
    result = {**about(DEVICE)._asdict(), "benchmark": "kv_soak", "rows": [row], "seed": given.seed, "config": config}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print("  ".join(f"{name} {value}" for name, value in row.items()))
    if wrong or counted["lost"] or counted["peak"] > counted["plan"]:
        raise SystemExit("not exact, not complete, or not within the plan")


if __name__ == "__main__":
    main()
