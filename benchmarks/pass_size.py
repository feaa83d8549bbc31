"""Passes over prompts whose size the plan chooses, and how long they keep other sequences waiting.

A shape of `stand_ins.py` with random weights and widened embeddings, through `LLM`. *Reads*: the first token of prompts, with the size
that the plan chooses and with 512 tokens a pass, beside the copies and the stall that the plan states; then eight unequal
prompts at once. *Stalls*: seven sequences decode while a prompt of 32,768 tokens is read. Their longest wait for a
token is a pass and a step; beside it stand the plan's stated stall, and 1.3 times its copies alone.

Usage: python benchmarks/pass_size.py --out FILE [--shape q|g] [--format bf16|mxfp4] [--shares 25%,50%] [--parts reads,stalls]
       --tiny: small widths and short prompts, for a CPU
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from stand_ins import SEED, WIDE, StandIn, device, make_config, random_tokens, resized

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about

LENGTHS, TINY_LENGTHS = (512, 2048, 8192), (40, 90)
UNEQUAL, TINY_UNEQUAL = (4000, 30, 700, 90, 1500, 12, 260, 64), (60, 3, 11, 2, 30, 1, 5, 9)
REPEATS, BATCH = 3, 8
STALLING, TINY_STALLING = 32_768, 600
"""Tokens of the prompt that the others wait for."""
BEGIN, BEFORE = 60, 24
"""Tokens of the others' prompts, and steps before the long prompt comes, of which the last half is timed."""


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


class Waits:
    """How long sequences wait for tokens.

    Args:
        llm: the model.
    """

    def __init__(self, llm: LLM) -> None:
        """Nothing has come yet."""
        self.llm, self.gaps = llm, list[float]()
        self._last: dict[int, float] = {}

    def step(self, without: int = -1) -> bool:
        """Run a pass or step, and note the gaps between tokens of one sequence; whether `without`, which is left out, got a token."""
        came = self.llm.engine.step()
        now = time.perf_counter()
        for number in {number for number, _ in came} - {without}:
            if number in self._last:
                self.gaps.append(now - self._last[number])
            self._last[number] = now
        return without in {number for number, _ in came}

    def add(self, prompt: list[int], limit: int) -> int:
        """Queue a request; its number."""
        return self.llm.engine.add(self.llm.request(prompt, SamplingParams(max_tokens=limit, ignore_eos=True)))


def stall(stand_in: StandIn, share: str, length: int, chunk: int | None) -> dict[str, Any]:
    """Let seven sequences decode while a long prompt is read: once with a shorter one to capture everything, then timed."""
    room = length + 512
    options = {
        "max_batch": BATCH,
        "max_length": room,
        "kv_tokens": room + BATCH * 2048,
        "prefill_chunk": chunk,
        "slots": share,
    }
    with stand_in.open(strategy="next-use", execution="graph", **options) as one:
        llm, plan, found = one.llm, one.llm.plan, dict[str, Any]()
        prompts = prompts_of(plan.shape.vocabulary, [BEGIN] * (BATCH - 1) + [length])
        for read in (min(length, 2 * plan.prefill_chunk + 100), length):
            waits = Waits(llm)
            for prompt in prompts[:-1]:
                waits.add(prompt, 512)
            for step in range(BEFORE + BATCH):
                if step == BATCH + BEFORE // 2:
                    waits.gaps.clear()
                waits.step()
            alone, began = waits.gaps.copy(), time.perf_counter()
            waits.gaps.clear()
            number = waits.add(prompts[-1][:read], 1)
            while not waits.step(number):
                pass
            found = {"first_token_seconds": time.perf_counter() - began, "step_seconds": statistics.median(alone),
                     "largest_gap_seconds": max(waits.gaps), "gaps": len(waits.gaps)}  # fmt: skip
            for other in range(number - BATCH + 1, number):
                llm.engine.cancel(other)
            while llm.engine.unfinished:
                llm.engine.step()
        return {
            "share": share, "length": length, "stated": chunk, "prefill_chunk": plan.prefill_chunk, **found,
            "stall_seconds": plan.stall_seconds, "copies_seconds": plan.copies_seconds, "peak_bytes": one.peak, "budget_bytes": plan.total,
        }  # fmt: skip


def shown(seconds: float | None) -> str:
    """Seconds as text; a dash where they are not known, as on a CPU."""
    return "-" if seconds is None else f"{seconds:.3f}"


def show(reads: list[dict[str, Any]], stalls: list[dict[str, Any]]) -> None:
    """A line a row."""
    for row in reads:
        print(f"{row['share']:>5} {len(row['lengths'])} x {max(row['lengths']):5d} tokens, {row['prefill_chunk']:5d} a pass: {statistics.median(row['seconds']):.3f} s; "
              f"copies {shown(row['copies_seconds'])}, stall {shown(row['stall_seconds'])}, peak {row['peak_bytes'] / row['budget_bytes']:.2f} of plan")  # fmt: skip
    for row in stalls:
        bound = None if row["stall_seconds"] is None else row["stall_seconds"] + row["step_seconds"]
        most = None if row["copies_seconds"] is None else 1.3 * row["copies_seconds"] + row["step_seconds"]
        print(f"{row['share']:>5} others beside a prompt of {row['length']} tokens, {row['prefill_chunk']} a pass: longest wait {row['largest_gap_seconds']:.3f} s; "
              f"stated stall and a step {shown(bound)}, 1.3 x copies and a step {shown(most)}, a step {row['step_seconds']:.4f}; "
              f"first token {row['first_token_seconds']:.2f} s, peak {row['peak_bytes'] / row['budget_bytes']:.2f} of plan")  # fmt: skip


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small widths, for a CPU")
    parser.add_argument("--shape", choices=["q", "g"], default="q")
    parser.add_argument("--format", default="bf16", help="how experts are stored")
    parser.add_argument("--shares", default="25%,50%,100%")
    parser.add_argument("--parts", default="reads,stalls")
    parser.add_argument("--out", type=Path, default=Path("pass_size.json"))
    options = parser.parse_args()
    tiny = options.tiny or device() == "cpu"
    lengths, unequal = (TINY_LENGTHS, TINY_UNEQUAL) if tiny else (LENGTHS, UNEQUAL)
    sizes = {"max_position_embeddings": 65536} | ({"num_hidden_layers": 2, "vocab_size": 512} if tiny else {})
    config = resized(make_config(options.shape, tiny=tiny, packed=options.format), sizes)
    reads, stalls = list[dict[str, Any]](), list[dict[str, Any]]()
    with StandIn(config, embedding=WIDE) as stand_in:
        for share in options.shares.split(","):
            for together in [*([length] for length in lengths), list(unequal)] if "reads" in options.parts else []:
                for chunk in (None, 512):
                    reads.append(read(stand_in, share, together, chunk))
            if "stalls" in options.parts:
                stalls.append(stall(stand_in, share, TINY_STALLING if tiny else STALLING, 100 if tiny else None))
    result = {
        **about(device())._asdict(), "benchmark": "pass size", "seed": SEED, "reads": reads, "stalls": stalls,
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    show(reads, stalls)


if __name__ == "__main__":
    main()
