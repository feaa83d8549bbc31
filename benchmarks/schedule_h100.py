"""The scheduler at full size, through `LLM`: live sequences in groups by arrival or by predicted route, on recorded routing.

Shape `g`: gpt-oss-20b (24 layers x 32 experts top-4, 49.8 MB an expert). Shape `s`: the dimensions of Switch-128 (12
MoE layers x 128 experts top-1, 9.4 MB an expert) in the blocks of a decoder-only model. It is routed by gpt-oss-20b's
best experts, two of its layers to one. Weights are random, tokens and routing a recorded trace's, the predictor trained
on other sequences of it.

32 requests live, 8 step together. Each repeat runs other parts of 32 sequences, once by each schedule, in an order that changes.
Figures are of the decode steps: tokens a second, time per token of single requests, loads a token.

Usage: python benchmarks/schedule_h100.py --shape g --trace TEST.trace --predictor FOLDER --out FILE
       python benchmarks/schedule_h100.py --map TRAIN.trace --out TOP1.trace      (to train a predictor for shape s)
       --tiny: small widths and few requests, for a CPU
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from stand_ins import SEED, Opened, Parts, StandIn, device, make_config, parts_of

from expertflow import SamplingParams
from expertflow.bench.about import about
from expertflow.trace.format import Header, Trace, load_trace, save_trace

LIVE, BATCH, REPEATS, PROMPT, LENGTH = 32, 8, 3, 64, 128
TINY_LIVE, TINY_BATCH, TINY_REPEATS = 6, 2, 1
ROUNDS = {"g": 8, "s": 30}
TINY_ROUNDS = 2
WARM = 3
"""Rounds before the measured ones."""
SHARES = {"g": (0.5, 0.25), "s": (0.125, 0.03125)}
SCHEDULES = ("fifo", "group", "auto")


def as_top1(trace: Trace) -> Trace:
    """12 layers of 128 experts, one a token: the best expert of an even layer, and two bits of the best one behind it."""
    best = trace.rows.experts[:, :, 0].astype(np.int64)
    experts = (best[:, 0::2] * 4 + best[:, 1::2] % 4)[:, :, None].astype(np.uint8)
    header = replace(trace.header, layers=12, experts=128, top_k=1, model=f"{trace.header.model}, as top-1")
    rows = trace.rows._replace(experts=experts, weights=np.ones(experts.shape, dtype=np.float16))
    return replace(trace, header=header, rows=rows)


def write_top1(source: Path, out: Path) -> None:
    """A trace file for shape s."""
    trace = as_top1(load_trace(source))
    header = Header(layers=12, experts=128, top_k=1, model=trace.header.model, fingerprint="")
    save_trace(replace(trace, header=header, vocabulary=()), out)


def run(opened: Opened, parts: Parts, indices: Sequence[int], rounds: int) -> dict[str, float]:
    """Requests from first to last token; figures from the round on in which every one has had `WARM` decode steps."""
    llm, limit = opened.llm, 1 + WARM + rounds
    engine, params = llm.engine, SamplingParams(max_tokens=limit, ignore_eos=True)
    for index in indices:
        engine.add(llm.request(parts.tokens[index][:PROMPT], params, index=index))
    times: list[float] = []
    made, tokens, began, before = Counter[int](), 0, 0.0, 0
    while engine.unfinished:
        if not began and len(made) == len(indices) and min(made.values()) > WARM:
            tokens, before, began = 0, llm.stats.cache.bytes_moved, time.perf_counter()
        outputs = engine.step()
        tokens += len(outputs)
        made.update(output.index for _, output in outputs)
        times += [output.output.token_seconds for _, output in outputs if output.output is not None]
    lasted, times = time.perf_counter() - began, sorted(times)
    loads = (llm.stats.cache.bytes_moved - before) / llm.plan.record_bytes
    return {
        "tokens_per_second": tokens / lasted,
        "p95_token_seconds": times[int(0.95 * (len(times) - 1))],
        "loads_per_token": loads / tokens,
    }


def measure(opened: Opened, parts: Parts, names: Sequence[str], options: argparse.Namespace) -> dict[str, list[Any]]:
    """Every schedule on the same sequences, repeat by repeat; one run of a round before, to warm up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    opened.llm.engine.reschedule(names[0])
    run(opened, parts, range(options.live), 1)
    for repeat in range(options.repeats):
        indices = range(repeat * options.live, (repeat + 1) * options.live)
        for place in range(len(names)):
            name = names[(place + repeat) % len(names)]
            opened.llm.engine.reschedule(name)
            found[name].append(run(opened, parts, indices, options.rounds))
    return found


def show(share: float, name: str, answers: list[dict[str, float]], first: str, fifo: list[dict[str, float]]) -> str:
    """As a line of a printed table."""
    speeds = [answer["tokens_per_second"] for answer in answers]
    gains, late = (
        [mine[key] / theirs[key] for mine, theirs in zip(answers, fifo, strict=True)]
        for key in ("tokens_per_second", "p95_token_seconds")
    )
    return (
        f"{share:.1%} {name:6s} {statistics.median(speeds):7.1f} tok/s ({min(speeds):.1f}-{max(speeds):.1f})  "
        f"x{statistics.median(gains):.3f} of {first}, p95 x{statistics.median(late):.3f}, "
        f"{statistics.median(answer['loads_per_token'] for answer in answers):.2f} loads a token"
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]], known: int) -> None:
    """The result file, as far as it goes."""
    result = {
        **about(device())._asdict(), "benchmark": "schedule", "shape": options.shape, "seed": SEED, "rows": rows,
        "config": {"live": options.live, "batch": options.batch, "rounds": options.rounds, "warm": WARM, "repeats": options.repeats,
                   "prompt": PROMPT, "known_tokens": int(known)},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["g", "s"], default="g")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument(
        "--schedules", default="", help=f"of {', '.join(SCHEDULES)}; default: all, without a predictor fifo"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--shares", default="", help="slots as shares of all experts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small widths and few requests; always so without CUDA")
    options = parser.parse_args(argv)
    options.tiny |= device() == "cpu"
    options.live, options.batch, options.repeats = (
        (TINY_LIVE, TINY_BATCH, TINY_REPEATS) if options.tiny else (LIVE, BATCH, REPEATS)
    )
    options.rounds = options.rounds or (TINY_ROUNDS if options.tiny else ROUNDS[options.shape])
    options.schedules = options.schedules or (",".join(SCHEDULES) if options.predictor else "fifo")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options = read_options(argv)
    if options.map:
        write_top1(options.map, options.out)
        return
    began = time.perf_counter()
    trace = load_trace(options.trace).without("repetition")
    lengths = [PROMPT + 1 + WARM + options.rounds] * (options.live * options.repeats)
    parts = parts_of(as_top1(trace) if options.shape == "s" else trace, lengths)
    names, rows = options.schedules.split(","), []
    shares = [float(text) for text in options.shares.split(",")] if options.shares else SHARES[options.shape]
    settings = {"max_batch": options.batch, "max_live": options.live, "max_length": LENGTH, "prefill_chunk": options.batch * PROMPT,
            "execution": "graph"}  # fmt: skip
    strategy = "next-use" if options.predictor is None else "plec"
    with StandIn(make_config(options.shape, tiny=options.tiny), predictor=options.predictor) as stand_in:
        for share in shares:
            chosen = {"slots": f"{share:.4%}", "strategy": strategy, "routing": parts.replay, **settings}
            with stand_in.open(predicted=options.predictor is not None, **chosen) as opened:
                found = measure(opened, parts, names, options)
                peak, plan = opened.peak, opened.llm.plan
            for name, answers in found.items():
                print(f"{time.perf_counter() - began:4.0f} s  {show(share, name, answers, names[0], found[names[0]])}", flush=True)  # fmt: skip
                rows.append({"share": share, "slots": plan.slots, "schedule": name, "runs": answers, "peak_bytes": peak, "budget_bytes": plan.total})  # fmt: skip
            write(options, rows, parts.known)  # a share at a time: a run that is cut off keeps its results


if __name__ == "__main__":
    main()
