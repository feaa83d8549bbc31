"""Passes over prompts whose size the plan chooses, and what bits depend on.

Shape Q with random weights and widened embeddings, through `LLM`. First the first token of prompts, with the size that the plan
chooses and with 512 tokens a pass, beside the copies and the stall that the plan states; then eight unequal prompts at once. Then
requests whose logits are compared bit for bit: alone, with seven others, and staggered, with `batch_invariant` and without, and the
tokens a second of each.

Usage: python benchmarks/pass_size.py --out benchmarks/results/pass_size_h200.json [--tiny]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from stand_ins import SEED, WIDE, StandIn, device, make_config, random_tokens
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about

LENGTHS, TINY_LENGTHS = (512, 2048, 8192), (40, 90)
UNEQUAL, TINY_UNEQUAL = (4000, 30, 700, 90, 1500, 12, 260, 64), (60, 3, 11, 2, 30, 1, 5, 9)
REPEATS, TOKENS, COMPANY = 3, 8, 8


def prompts_of(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    """Random prompts, parts of one long row of tokens."""
    drawn, begin, found = random_tokens(vocabulary, sum(lengths)), 0, []
    for length in lengths:
        found.append(drawn[begin : begin + length])
        begin += length
    return found


def first_tokens(llm: LLM, prompts: list[list[int]]) -> float:
    """Seconds until every prompt has its first token, all of them added at once."""
    requests = [llm.request(prompt, SamplingParams(max_tokens=1, ignore_eos=True)) for prompt in prompts]
    began = time.perf_counter()
    for request in requests:
        llm.engine.add(request)
    while llm.engine.unfinished:
        llm.engine.step()
    return time.perf_counter() - began


def read(stand_in: StandIn, share: str, lengths: list[int], chunk: int | None) -> dict[str, Any]:
    """Time prompts that are read together; the first time compiles and fills the cache."""
    batch, room = len(lengths), max(lengths) + 8
    options = {"max_batch": batch, "max_length": room, "prefill_chunk": chunk, "slots": share, "execution": "graph"}
    with stand_in.open(strategy="next-use", **options) as one:
        plan, vocabulary, times = one.llm.plan, one.llm.plan.shape.vocabulary, []
        prompts = prompts_of(vocabulary, lengths * (REPEATS + 1))
        for begin in range(0, len(prompts), batch):
            times += [first_tokens(one.llm, prompts[begin : begin + batch])]
        return {
            "share": share, "lengths": lengths, "stated": chunk, "prefill_chunk": plan.prefill_chunk, "seconds": times[1:],
            "copies_seconds": plan.copies_seconds, "stall_seconds": plan.stall_seconds, "peak_bytes": one.peak, "budget_bytes": plan.total,
        }  # fmt: skip


class Answers:
    """Requests' logits and tokens a second.

    Args:
        llm: the model.
        prompts: one a request.
    """

    def __init__(self, llm: LLM, prompts: list[list[int]]) -> None:
        """Measure nothing yet."""
        self.llm, self.prompts = llm, prompts

    def of(self, numbers: list[int], *, apart: int = 0) -> tuple[dict[int, list[Tensor]], float]:
        """Logits of each token of some requests, added at once or so many steps apart, in host memory; and the seconds of it all."""
        engine, kinds, waiting = self.llm.engine, {}, list(numbers)
        found: dict[int, list[Tensor]] = {number: [] for number in numbers}

        def watch(members: Any, logits: Tensor) -> None:
            for member, line in zip(members, logits.to("cpu", copy=True), strict=True):
                found[kinds[member]].append(line)

        engine.watch_logits(watch)
        began = time.perf_counter()
        while waiting or engine.unfinished:
            for number in [waiting.pop(0) for _ in range(1 if apart else len(waiting)) if waiting]:
                request = self.llm.request(self.prompts[number], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
                kinds[engine.add(request)] = number
            for _ in range(apart or 1):
                engine.step()
        engine.watch_logits(None)
        return found, time.perf_counter() - began


def compare(stand_in: StandIn, share: str, requests: int, *, invariant: bool) -> dict[str, Any]:
    """How many requests have the logits that they have alone, to the bit."""
    lengths = [1 + (37 * number) % 300 for number in range(requests)]
    options = {"max_batch": COMPANY, "max_length": 320, "slots": share, "execution": "graph", "prefill_chunk": 256}
    with stand_in.open(strategy="next-use", batch_invariant=invariant, **options) as one:
        answers = Answers(one.llm, prompts_of(one.llm.plan.shape.vocabulary, lengths))
        answers.of(list(range(min(requests, COMPANY))))  # compiles and captures
        alone, seconds = {}, {}
        for number in range(requests):
            found, took = answers.of([number])
            alone |= found
            seconds["alone"] = seconds.get("alone", 0.0) + took
        equal = {}
        for name, apart in (("with seven others", 0), ("staggered", 3)):
            found, seconds[name] = answers.of(list(range(requests)), apart=apart)
            equal[name] = sum(
                torch.equal(torch.stack(found[number]), torch.stack(lines)) for number, lines in alone.items()
            )
        tokens = requests * TOKENS
        return {
            "batch_invariant": invariant, "share": share, "requests": requests, "equal": equal,
            "tokens_per_second": {name: tokens / took for name, took in seconds.items()},
        }  # fmt: skip


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small widths, for a CPU")
    parser.add_argument("--shares", default="25%,50%,100%")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--compared-share", default="100%")
    parser.add_argument("--out", type=Path, default=Path("pass_size.json"))
    options = parser.parse_args()
    tiny = options.tiny or device() == "cpu"
    lengths, unequal = (TINY_LENGTHS, TINY_UNEQUAL) if tiny else (LENGTHS, UNEQUAL)
    config = make_config("q", tiny=tiny)
    config = type(config)(**{**config.to_dict(), "max_position_embeddings": 16384})
    reads, compared = list[dict[str, Any]](), list[dict[str, Any]]()
    with StandIn(config, embedding=WIDE) as stand_in:
        for share in options.shares.split(","):
            for together in [*([length] for length in lengths), list(unequal)]:
                for chunk in (None, 512):
                    reads.append(read(stand_in, share, together, chunk))
        for invariant in (True, False):
            compared.append(compare(stand_in, options.compared_share, options.requests, invariant=invariant))
    result = {
        **about(device())._asdict(), "benchmark": "pass size", "seed": SEED, "reads": reads, "compared": compared,
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in reads:
        copies, stall = (
            f"{value:.3f}" if value is not None else "-" for value in (row["copies_seconds"], row["stall_seconds"])
        )
        print(f"{row['share']:>5} {len(row['lengths'])} x {max(row['lengths']):5d} tokens, {row['prefill_chunk']:5d} a pass: "
              f"{statistics.median(row['seconds']):.3f} s; copies {copies}, stall {stall}, peak {row['peak_bytes'] / row['budget_bytes']:.2f} of plan")  # fmt: skip
    for row in compared:
        speeds = ", ".join(f"{name} {value:.0f}" for name, value in row["tokens_per_second"].items())
        print(
            f"batch_invariant={row['batch_invariant']}: bit-equal {row['equal']} of {row['requests']}; tokens/s {speeds}"
        )


if __name__ == "__main__":
    main()
