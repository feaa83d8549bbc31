"""What choosing tokens costs: steps of greedy and of sampled requests through `LLM`, and the choice alone.

Model: gpt-oss-20b's shape with mxfp4 experts, all resident, random weights, a vocabulary of 201,088; random tokens are fed in, so
that every option runs the same steps. Options take turns in each round; a round is some steps of one batch, every step waited
for. The choice alone is timed on random logits by events. Draws of the device are compared with the reference on the CPU, over ties,
exact shares and masks: one that differs is an error.

Usage: python benchmarks/sampling.py --out FILE
       --tiny: small widths and few steps, for a CPU
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from math import e, log2
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from stand_ins import SEED, StandIn, device, make_config, random_tokens
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.execution.replay import Replay
from expertflow.execution.sampler import Draw, Sampler, most_probable
from expertflow.execution.sampling.edits import TokenEdits
from expertflow.kernels.backend import backend
from expertflow.kernels.sampling import reference

VOCABULARY, LENGTH, BEGIN, WARM = 201_088, 256, 32, 4
CHAT = {"temperature": 0.7, "top_p": 0.9}
OPTIONS: MappingProxyType[str, dict[str, Any]] = MappingProxyType({
    "greedy": {},
    "sampled": {**CHAT, "top_k": 50, "min_p": 0.02},
    "top-p": CHAT,
    "top-k": {"temperature": 0.7, "top_k": 50},
    "penalties": {**CHAT, "frequency_penalty": 0.1, "repetition_penalty": 1.1},
    "logprobs": {"logprobs": 5},
})  # fmt: skip
ROUNDS, STEPS, REPEATS = 5, 12, 40


def params_of(name: str, tokens: int) -> SamplingParams:
    """Options of a request by their name here."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True, seed=SEED, **OPTIONS[name])


def step_ms(llm: LLM, prompts: list[list[int]], name: str, steps: int) -> float:
    """Milliseconds a step of these sequences, after some steps that are not counted."""
    engine, params = llm.engine, params_of(name, LENGTH - BEGIN)
    numbers = [engine.add(llm.request(prompt, params, index=index)) for index, prompt in enumerate(prompts)]
    seen = dict.fromkeys(numbers, 0)
    while min(seen.values()) < WARM:
        for number, _ in engine.step():
            seen[number] += 1
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    lasted = time.perf_counter() - began
    for number in numbers:
        engine.cancel(number)
    return lasted / steps * 1e3


def steps_through_llm(batches: list[int], *, tiny: bool) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Batch by batch, and by option: milliseconds a step, one number a round."""
    config = make_config("g", tiny=tiny, packed="bf16" if tiny else "mxfp4")
    rounds, steps = (1, 2) if tiny else (ROUNDS, STEPS)
    names = ["greedy", "sampled"] if tiny else list(OPTIONS)
    tokens = random_tokens(VOCABULARY, max(batches), LENGTH)
    prompts = [one[:BEGIN] for one in tokens]
    sizes = {"max_batch": max(batches), "max_length": LENGTH, "prefill_chunk": max(batches) * BEGIN}
    with StandIn(config) as stand_in:
        options = {"routing": Replay(tokens=tokens), "slots": "100%", "strategy": "next-use", "execution": "graph"}
        with stand_in.open(**options, **sizes) as opened:
            for batch in batches:
                mine: dict[str, list[float]] = {name: [] for name in names}
                for name in names:  # kernels are compiled, steps captured
                    step_ms(opened.llm, prompts[:batch], name, steps)
                for number in range(rounds):
                    for name in names[:: -1 if number % 2 else 1]:
                        mine[name].append(step_ms(opened.llm, prompts[:batch], name, steps))
                yield str(batch), mine


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the device's work, the median of some repeats."""
    run()
    found = []
    for _ in range(repeats):
        if device() == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)  # noqa: SLF001 - the host has queued all by then, as it has behind a step
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            found.append((time.perf_counter() - began) * 1e3)
    return statistics.median(found)


def alone(batches: list[int], *, tiny: bool) -> dict[str, dict[str, float]]:
    """By batch and option: milliseconds of the device to choose, and milliseconds of a whole call, the host's part included."""
    where, found = torch.device(device()), {}
    sampler, choose = Sampler(where), backend(where).choose
    for batch in batches:
        random = torch.Generator(where).manual_seed(SEED)
        logits = (torch.randn(batch, VOCABULARY, device=where, generator=random) * 3).to(torch.bfloat16)
        mine = found[str(batch)] = {
            "argmax": timed(lambda logits=logits: most_probable(logits), 3 if tiny else REPEATS)
        }
        for name in OPTIONS:
            params = params_of(name, 8)
            edits = TokenEdits(params, range(2000), ()) if params.changes_logits else None
            draws = [Draw(params=params, seed=row, position=row, edits=edits) for row in range(batch)]
            rules = torch.tensor([one.rules(VOCABULARY) for one in draws], dtype=torch.float64, device=where)
            hints = {"counted": bool(rules[:, 1].any()), "shared": bool((rules[:, 2] < 1).any())}
            if name not in ("greedy", "logprobs", "penalties"):
                run = lambda logits=logits, rules=rules, hints=hints: choose(logits, rules, None, **hints)  # noqa: E731
                mine[f"{name}, kernels"] = timed(run, 3 if tiny else REPEATS)
            most = [params.logprobs] * batch
            whole = []
            for _ in range(3 if tiny else REPEATS):
                began = time.perf_counter()
                sampler.weighed(sampler.choose(logits, draws), logits, most)
                whole.append((time.perf_counter() - began) * 1e3)
            mine[f"{name}, whole call"] = statistics.median(whole)
    return found


def draws_to_compare(count: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with many ties, rules of every mix, masks, some of which allow one token."""
    random = np.random.default_rng(SEED)
    logits = (random.normal(size=(count, vocabulary)) * 3).astype(np.float32)
    logits[::2] = np.round(logits[::2])
    rules = np.stack([
        random.random(count),
        random.integers(0, vocabulary, count) * random.integers(0, 2, count),
        random.choice([1.0, 0.5, 0.25, 0.125, 1e-9, 0.9, 0.7], count),
        np.float32(log2(e) / random.choice([0.01, 0.3, 0.7, 1.0, 2.5], count)),
        np.float32(np.log2(random.choice([1.0, 0.5, 0.1, 1e-12], count))),
    ], axis=1)  # fmt: skip
    mask = random.integers(-(2**31), 2**31, (count, -(-vocabulary // 32))).astype(np.int32)
    mask[::3], mask[1::7] = -1, 0
    mask[1::7, -1] = 1
    return torch.from_numpy(logits), torch.from_numpy(rules), torch.from_numpy(mask)


def compare(*, tiny: bool) -> dict[str, int]:
    """Draws of the device's kernels, and how many of them differ from the reference on the CPU."""
    where, done, wrong = torch.device(device()), 0, 0
    choose = backend(where).choose
    for count, vocabulary in ((200, 100), (2, VOCABULARY)) if tiny else ((20_000, 200), (16, VOCABULARY)):
        logits, rules, mask = draws_to_compare(count, vocabulary)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for bits in (None, mask):
                some = logits.to(dtype)
                parts = [
                    reference.choose(
                        some[b : b + 4000], rules[b : b + 4000], None if bits is None else bits[b : b + 4000]
                    )
                    for b in range(0, count, 4000)
                ]
                there = choose(some.to(where), rules.to(where), None if bits is None else bits.to(where))
                done, wrong = done + count, wrong + int((there.cpu() != torch.cat(parts)).sum())
    return {"draws": done, "different": wrong}


def main(argv: list[str] | None = None) -> None:
    """Compare, time, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("sampling.json"))
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--parts", default="steps,alone,draws")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    batches = [int(text) for text in options.batches.split(",")]
    parts, began = options.parts.split(","), time.perf_counter()
    result: dict[str, Any] = {
        **about(device())._asdict(), "benchmark": "sampling", "seed": SEED, "vocabulary": VOCABULARY, "options": dict(OPTIONS),
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"}, "compared": {},
        "choice_ms": {}, "step_ms": {},
    }  # fmt: skip

    def took(text: str) -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{time.perf_counter() - began:4.0f} s  {text}", flush=True)

    if "steps" in parts:
        for batch, mine in steps_through_llm(batches, tiny=options.tiny):
            result["step_ms"][batch] = mine
            medians = {name: statistics.median(ms) for name, ms in mine.items()}
            base = medians["greedy"]
            told = (f"{name} {ms:.2f} ({ms / base - 1:+.1%})" for name, ms in medians.items() if name != "greedy")
            took(f"B={batch:<2s} greedy {base:6.2f} ms a step; " + ", ".join(told))
    if "alone" in parts:
        result["choice_ms"] = alone(batches, tiny=options.tiny)
        for batch, times in result["choice_ms"].items():
            took(f"B={batch:<2s} the choice alone, ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()))
    if "draws" in parts:
        compared = result["compared"] = compare(tiny=options.tiny)
        took(f"{compared['draws']} draws, {compared['different']} differ")
        if compared["different"]:
            raise SystemExit(f"{compared['different']} draws differ from the reference")


if __name__ == "__main__":
    main()
