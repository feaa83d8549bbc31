"""First tokens of long prompts, a prompt of 100,000 tokens in a small budget, and decode steps behind long contexts, through `LLM`.

Random weights of published sizes (`stand_ins.py`). Shape `q`: Qwen3-MoE, random tokens and widened embeddings. Shape `g`:
gpt-oss-20b, routing replayed from a recorded trace, whose sequences follow one another, over and over; without a trace embeddings are
widened.

`first`: seconds to the first token of one prompt, with a warm cache. Beside each are the copies alone (bytes moved by the link's speed,
measured then), the computation alone (the same passes with every expert resident), the peers' figures, and the speed of the expert
products of a resident pass. `prompt`: one prompt of 100,000 tokens within a stated budget. `decode`: milliseconds a step of one sequence
behind contexts of several lengths, each with the same routing, beside the step at the shortest one and the time that its keys and
values take. `stall`: the longest wait between two tokens of a sequence while another's long prompt is read, beside the plan's bound.

Usage: python benchmarks/long_context.py --parts first,prompt,decode,stall --rows q/bf16,g/mxfp4/50% --trace TEST.trace --out FILE [--tiny]
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from engine_h100 import LINK, MEMORY, probe, sync
from first_token import DECODED, measure
from stand_ins import SEED, WIDE, Opened, StandIn, device, make_config, random_tokens
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedConfig

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.execution.replay import Replay
from expertflow.trace.format import Trace, load_trace

ROWS = (
    ("first", "q", "bf16", "25%"), ("first", "q", "bf16", "50%"),
    ("first", "g", "mxfp4", "50%"), ("prompt", "g", "mxfp4", "8GiB"), ("decode", "g", "mxfp4", "50%"), ("stall", "g", "mxfp4", "50%"),
    ("first", "g", "mxfp4", "25%"), ("decode", "g", "mxfp4", "100%"),
    ("prompt", "g", "bf16", "16GiB"), ("first", "g", "bf16", "25%"), ("stall", "g", "bf16", "50%"),
)  # fmt: skip
"""Part, shape, format, and share of slots or budget, in the order in which they are measured."""
LENGTHS, TINY_LENGTHS = (512, 2048, 8192, 32768), (20, 33)
CONTEXTS, TINY_CONTEXTS = (1024, 8192, 32768, 130944), (12, 40)
"""The last one ends, with the steps behind it, within the 131,072 tokens that gpt-oss-20b reads."""
LONG, TINY_LONG = 100_000, 60
STALLING, TINY_STALLING = (32768, 98304), (40,)
"""Tokens of prompts beside which another sequence decodes."""
REPEATS, PROBES, WARM, STEPS, WINDOWS, TINY_STEPS = 3, 5, 24, 16, 4, 2
"""Timed prompts; probes of the link; steps before windows, of a window, and windows; steps of any of them with small widths."""
EXPERT_KERNELS = "_up_kernel", "_down_kernel"
GOAL, STEP_GOAL = 1.15, 1.2
"""Most that a first token may take as a multiple of the larger of both times; and a step of its bound."""
PEERS = MappingProxyType({
    ("q", "25%"): {"FreeToken 0.2.1, bf16": {512: 0.271, 2048: 0.275, 8192: 0.280},
                   "llama.cpp 0.5.0, bf16": {512: 0.248, 2048: 0.748, 8192: 1.88},
                   "llama.cpp 0.5.0, Q4_K": {512: 0.024, 2048: 0.080, 8192: 0.272}},
    ("g", "50%"): {"FreeToken 0.2.1, MXFP4": {512: 0.197, 2048: 0.199, 8192: 0.497},
                   "llama.cpp 0.5.0, MXFP4": {512: 0.075, 2048: 0.192, 8192: 0.798}},
})  # fmt: skip
"""Seconds to the first token of other programs at about the same GPU memory, on one H200 (2026-11-29), by tokens of the prompt."""


class Text(NamedTuple):
    """What a shape's prompts are made of.

    Attributes:
        config: of the model.
        embedding: times wider than drawn.
        trace: recorded routing; None: the router decides.
    """

    config: PreTrainedConfig
    embedding: float
    trace: Trace | None

    @classmethod
    def of(cls, shape: str, packed: str, options: argparse.Namespace) -> "Text":
        """The text of a shape whose experts are stored in a format."""
        config = make_config(shape, tiny=options.tiny, packed=packed)
        if shape == "q":  # its published context is shorter
            config = type(config)(**{**config.to_dict(), "max_position_embeddings": 65536})
        trace = None if shape == "q" or options.trace is None else load_trace(options.trace).without("repetition")
        return cls(config, WIDE if trace is None else 1.0, trace)

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        """Random prompts, parts of one long row of tokens."""
        drawn, begin, found = random_tokens(self.config.vocab_size, sum(lengths)), 0, []
        for length in lengths:
            found.append(drawn[begin : begin + length])
            begin += length
        return found

    def routing(self, lengths: list[int], *, same_end: int = 0) -> Replay | None:
        """Routes of so many positions each, each part where the last one ended; the last `same_end` are of all parts alike."""
        if self.trace is None:
            return None
        rows = self.trace.rows
        known, begin, found = rows.experts[rows.sequence >= 0], 0, []
        for length in lengths:
            places = (begin + np.arange(length)) % len(known)
            if same_end:
                places[length - same_end :] = np.arange(same_end) % len(known)
            found.append(known[places])
            begin += length
        return Replay(found)


class Bench(NamedTuple):
    """Where a row is measured.

    Attributes:
        stand_in: the model's weights.
        text: its prompts.
        tiny: whether prompts are short.
        resident: rows with every expert resident, by what they have in common with others.
    """

    stand_in: StandIn
    text: "Text"
    tiny: bool
    resident: dict[Any, dict[str, Any]]

    def opened(self, length: int, routing: Replay | None, **options: Any) -> AbstractContextManager[Opened]:
        """A model with captured steps for sequences of so many tokens."""
        given = {"max_batch": 1, "strategy": "next-use", "execution": "graph", **options}
        return self.stand_in.open(routing=routing, max_length=length, **given)


def link_speed(llm: LLM) -> float:
    """Bytes a second of copies to the device now, at their median."""
    return statistics.median(probe(llm) for _ in range(PROBES)) * 1e9


def product_speed(llm: LLM, prompt: list[int]) -> float | None:
    """Floating-point operations a second of the expert kernels in one reading of a prompt; None without CUDA."""
    if device() != "cuda":
        return None
    shape = llm.plan.shape
    expert = sum(2 * int(np.prod(spec.shape)) for spec in shape.specs if len(spec.shape) > 1)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        llm.engine.add(llm.request(prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
        while llm.engine.unfinished:
            llm.engine.step()
        sync()
    spent = sum(one.self_device_time_total for one in profiled.key_averages() if one.key.startswith(EXPERT_KERNELS))
    return len(prompt) * shape.layers * shape.top_k * expert / (spent / 1e6) if spent else None


def read(bench: Bench, tokens: int, **options: Any) -> dict[str, Any]:
    """Time prompts of one length; the first one compiles and fills the cache."""
    lengths = [tokens] * (REPEATS + 1)
    prompts, routing = bench.text.prompts(lengths), bench.text.routing([length + DECODED for length in lengths])
    with bench.opened(tokens + DECODED + 1, routing, **options) as one:
        row, plan = measure(one.llm, prompts), one.llm.plan
        row |= {
            "prefill_chunk": plan.prefill_chunk, "planned_copies": plan.copies_seconds, "planned_stall": plan.stall_seconds,
            "link": link_speed(one.llm), "peak_bytes": one.peak, "budget_bytes": plan.total,
        }  # fmt: skip
        if options["slots"] == "100%" and tokens == 8192:
            row["product_flops"] = product_speed(one.llm, prompts[-1])
    return row


def first(bench: Bench, share: str, about_row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """First tokens of prompts of each length."""
    for tokens in TINY_LENGTHS if bench.tiny else LENGTHS:
        row = read(bench, tokens, slots=share)
        key = tokens, row["prefill_chunk"]
        if key not in bench.resident:
            bench.resident[key] = read(bench, tokens, slots="100%", prefill_chunk=row["prefill_chunk"])
        alone, known = bench.resident[key], PEERS.get((about_row["shape"], share), {})
        seconds, computed = statistics.median(row["seconds"]), statistics.median(alone["seconds"])
        copied = statistics.median(row["bytes_moved"]) / row["link"]
        yield {
            **row, "tokens": tokens, "copies_seconds": copied, "compute_seconds": alone["seconds"],
            "ratio": seconds / max(copied, computed), "product_flops": alone.get("product_flops"), "resident_peak_bytes": alone["peak_bytes"],
            "peers": {name: at[tokens] for name, at in known.items() if tokens in at},
        }  # fmt: skip


def prompt(bench: Bench, budget: str, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A long prompt within a budget."""
    tokens = TINY_LONG if bench.tiny else LONG
    room = {"slots": "50%"} if bench.tiny else {"gpu_memory": budget}
    lengths = [20 if bench.tiny else 8192, *[tokens] * REPEATS]
    with bench.opened(tokens + DECODED + 1, bench.text.routing([one + DECODED for one in lengths]), **room) as one:
        found, plan = measure(one.llm, bench.text.prompts(lengths)), one.llm.plan
        yield {
            **found, "tokens": tokens, "prefill_chunk": plan.prefill_chunk, "peak_bytes": one.peak, "planned_bytes": plan.total,
            "budget_bytes": plan.budget or plan.total, "kv_bytes": plan.kv, "copies_seconds": found["bytes_moved"][-1] / link_speed(one.llm),
        }  # fmt: skip


def step_windows(one: Opened, context: list[int], index: int, steps: int) -> dict[str, Any]:
    """Read a prompt, step until steps are captured and the cache is warm, then time windows of steps."""
    engine, llm, limit = one.llm.engine, one.llm, (1 + WINDOWS) * steps + (WARM if steps > TINY_STEPS else 1)
    engine.add(llm.request(context, SamplingParams(max_tokens=limit + WINDOWS + 2, ignore_eos=True), index=index))
    before, began = llm.stats.tokens, time.perf_counter()
    while llm.stats.tokens == before:
        engine.step()
    seconds, ms, moved = time.perf_counter() - began, [], []
    for _ in range(limit - WINDOWS * steps):
        engine.step()
    for _ in range(WINDOWS):
        start = llm.stats.cache.bytes_moved
        engine.step()  # not timed: it has begun already, and meanwhile it has ended
        began = time.perf_counter()
        for _ in range(steps):
            engine.step()
        ms.append((time.perf_counter() - began) / steps * 1e3)
        moved.append((llm.stats.cache.bytes_moved - start) / (steps + 1))
    while engine.unfinished:
        engine.step()
    return {"ms": ms, "bytes_moved": moved, "read_seconds": seconds}


def decode(bench: Bench, share: str, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps behind contexts; every context ends in the same routes."""
    steps, contexts = (TINY_STEPS, list(TINY_CONTEXTS)) if bench.tiny else (STEPS, list(CONTEXTS))
    behind, base = (1 + WINDOWS) * steps + WINDOWS + WARM + 3, 0.0
    lengths = [length + behind for length in contexts]
    routing = bench.text.routing(lengths, same_end=behind + min(contexts))
    with bench.opened(max(lengths), routing, slots=share) as one:
        shape = one.llm.plan.shape
        for index, (length, tokens) in enumerate(zip(contexts, bench.text.prompts(contexts), strict=True)):
            found = step_windows(one, tokens, index, steps)
            ms = statistics.median(found["ms"])
            layers = zip(shape.windows, (layer for layer in shape.kv if layer.in_pages), strict=True)
            kept = sum(layer.bytes_per_token * min(length, window or length) for window, layer in layers)
            base = base or ms
            yield {
                **found, "context": length, "kv_bytes": kept, "tokens_per_second": 1e3 / ms, "peak_bytes": one.peak,
                "bound_ms": STEP_GOAL * (base + kept / MEMORY * 1e3), "budget_bytes": one.llm.plan.total,
            }  # fmt: skip


def gaps(one: Opened, short: list[int], long: list[int]) -> dict[str, Any]:
    """Seconds between the tokens of a short sequence while a long prompt is read, the passes that read it, and seconds of a step before."""
    engine, llm, times, done = one.llm.engine, one.llm, list[float](), list[int]()
    params = SamplingParams(max_tokens=256, ignore_eos=True)
    # made before its wait: checking 98,304 tokens takes 9 ms
    late = llm.request(long, SamplingParams(max_tokens=1, ignore_eos=True), index=1)
    number = engine.add(llm.request(short, params), lambda _: times.append(time.perf_counter()))
    while len(times) < (2 if device() == "cpu" else WARM):
        engine.step()
    begin, passes = len(times) - 1, 0
    engine.add(late, lambda _: done.append(1))
    while not done:
        before = len(times)
        engine.step()
        passes += len(times) == before
    behind = len(times) + 1
    while len(times) < behind and engine.unfinished:
        engine.step()
    engine.cancel(number)
    before, during = (
        [later - earlier for earlier, later in pairwise(part)] for part in (times[: begin + 1], times[begin:])
    )
    return {"gaps": during, "passes": passes, "step_seconds": statistics.median(before[len(before) // 2 :])}


def stall(bench: Bench, share: str, _: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How long one sequence waits for its next token while a long prompt is read."""
    longest = TINY_STALLING if bench.tiny else STALLING
    lengths, prompts = [300, longest[-1] + 8], bench.text.prompts([32, *longest])
    with bench.opened(lengths[-1], bench.text.routing(lengths), slots=share, max_batch=2) as one:
        plan = one.llm.plan
        gaps(one, prompts[0], prompts[1])  # compiles
        every = SamplingParams(max_tokens=2 if bench.tiny else 256, ignore_eos=True)
        one.llm.generate([prompts[0]], every)  # captures the steps
        for tokens, long in zip(longest, prompts[1:], strict=True):
            yield {
                "tokens": tokens, **gaps(one, prompts[0], long), "prefill_chunk": plan.prefill_chunk, "stall_seconds": plan.stall_seconds,
                "copies_seconds": plan.copies_seconds, "link": link_speed(one.llm), "peak_bytes": one.peak, "budget_bytes": plan.total,
            }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    memory = f"{row['peak_bytes'] / 2**30:.2f}{'<=' if row['peak_bytes'] <= row['budget_bytes'] else '>'}{row['budget_bytes'] / 2**30:.2f} GiB"
    head = f"{row['shape']} {row['format']:5} {row['share']:>5}"
    match row["part"]:
        case "first":
            times, alone = row["seconds"], statistics.median(row["compute_seconds"])
            flops = row["product_flops"]
            speed = f", products {flops / 1e12:.0f} TFLOP/s" if flops else ""
            peers = "".join(f"; {name} {value:.3f}" for name, value in row["peers"].items())
            return (
                f"{head} {row['tokens']:6d} tokens, {row['prefill_chunk']} a pass: {statistics.median(times):.3f} s ({min(times):.3f}-{max(times):.3f}), "
                f"copies {row['copies_seconds']:.3f} at {row['link'] / 1e9:.1f} GB/s, compute {alone:.3f}, ratio {row['ratio']:.2f} "
                f"({'ok' if row['ratio'] <= GOAL else 'over'}){speed}, {memory}{peers}"
            )
        case "prompt":
            return (
                f"{head} {row['tokens']:6d} tokens within it, {row['prefill_chunk']} a pass: {min(row['seconds']):.2f}-{max(row['seconds']):.2f} s, "
                f"copies {row['copies_seconds']:.2f}, keys and values {row['kv_bytes'] / 2**30:.2f} GiB, {memory}, plan {row['planned_bytes'] / 2**30:.2f}"
            )
        case "decode":
            ms = statistics.median(row["ms"])
            return (
                f"{head} {row['context']:6d} of context: {ms:.2f} ms a step ({min(row['ms']):.2f}-{max(row['ms']):.2f}), {1e3 / ms:.1f} tokens/s, bound "
                f"{row['bound_ms']:.2f} ({'ok' if ms <= row['bound_ms'] else 'over'}), link {statistics.median(row['bytes_moved']) / LINK * 1e3:.2f} ms, "
                f"read in {row['read_seconds']:.2f} s, {memory}"
            )
        case _:
            bound, copies = row["stall_seconds"], row["copies_seconds"]
            step, longest = row["step_seconds"], max(row["gaps"]) - row["step_seconds"]
            stated = "nothing stated"
            if bound is not None:
                stated = f"stated {bound:.3f} ({'ok' if longest <= bound else 'over'}), copies {copies:.3f}"
            return (
                f"{head} {row['tokens']:6d} tokens beside a sequence, {row['prefill_chunk']} a pass at most, {row['passes']} passes: longest wait "
                f"beyond a step's {step:.3f} s: {longest:.3f} s (median {statistics.median(row['gaps']) - step:.3f}), {stated}, {memory}"
            )


class Results:
    """Rows, printed and written as soon as they are measured, because a later one may be cut off."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start without rows."""
        self.rows, self._out, self._began = list[dict[str, Any]](), options.out, time.perf_counter()
        self._about = {
            **about(device())._asdict(), "benchmark": "long context", "seed": SEED, "dtype": "bfloat16",
            "config": {name: str(value) for name, value in vars(options).items() if name not in {"out", "trace"}},
            "bounds": {"memory_bytes_per_second": MEMORY, "first": GOAL, "step": STEP_GOAL},
        }  # fmt: skip

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._began

    def add(self, row: dict[str, Any]) -> None:
        """Take a row."""
        self.rows.append(row)
        self._out.write_text(json.dumps({**self._about, "rows": self.rows}, indent=1) + "\n")
        print(f"{self.seconds:4.0f} s {line(row)}", flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="first,prompt,decode,stall")
    parser.add_argument(
        "--rows", default="", help="beginnings of rows, such as g/mxfp4/50%%,q; default: all of the parts"
    )
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--deadline", type=float, default=1e9, help="begin no row then, seconds")
    parser.add_argument("--out", type=Path, default=Path("long_context.json"))
    parser.add_argument("--tiny", action="store_true", help="small widths and short prompts; always so without CUDA")
    options = parser.parse_args()
    options.tiny |= device() == "cpu"
    work, results = {"first": first, "prompt": prompt, "decode": decode, "stall": stall}, Results(options)
    wanted = tuple(options.rows.split(","))
    rows = [row for row in ROWS if row[0] in options.parts.split(",") and "/".join(row[1:]).startswith(wanted)]
    for key in dict.fromkeys(row[1:3] for row in rows):
        text = Text.of(*key, options)
        with StandIn(text.config, embedding=text.embedding) as stand_in:
            bench = Bench(stand_in, text, options.tiny, {})
            for part, shape, packed, room in (row for row in rows if row[1:3] == key):
                if results.seconds > options.deadline:
                    continue
                head = {"part": part, "shape": shape, "format": packed, "share": room}
                for row in work[part](bench, room, head):
                    results.add({**head, **row})
                    if results.seconds > options.deadline:
                        break
    print(*map(line, results.rows), sep="\n")


if __name__ == "__main__":
    main()
