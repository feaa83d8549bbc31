"""Requests that arrive as they did at a large service: continuous batching beside one at a time and static batches.

Through `LLM` and its engine. Arrivals, prompt lengths and answer lengths of `azure_conv_256.json`, divided by `--shorter` and sped up by `--faster`, inside one budget of
device memory for all. Shape `q`: Qwen3-MoE (12 layers x 128 experts top-8), random weights and prompts of random tokens. Shape `g`:
gpt-oss-20b's, random weights, tokens and routing of a recorded trace's sequences and a predictor trained on others, if they are given.
Modes that share a plan are served by one loaded model in turns, forwards and backwards, `--repeats` times.
Tokens a second from the first arrival to the last token; time to the first token from a request's arrival, and mean time of its
later tokens.

Usage: python benchmarks/arrivals_h100.py --out FILE
       python benchmarks/arrivals_h100.py --shape g --trace TEST.trace --predictor FOLDER --out FILE
       --tiny: small widths and few requests, for a CPU
"""

import argparse
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from stand_ins import SEED, WIDE, StandIn, device, make_config, parts_of, random_tokens

from expertflow import LLM, RequestOutput, SamplingParams
from expertflow.bench.about import about
from expertflow.engine.request import Request
from expertflow.trace.format import load_trace

BUDGET = {"q": "8GiB", "g": "23GiB"}
SHORTER, FASTER = {"q": 8, "g": 16}, {"q": 6.0, "g": 2.0}
SCHEDULE = {"q": "fifo", "g": "auto"}
MODES: dict[str, tuple[str, ...]] = {
    "8": ("static batches of 8", "continuous, at once", "continuous, 8 live"),
    "8x32": ("continuous, 32 live in turns of 8",),
    "16": ("static batches of 16", "continuous, 16 live"),
    "1": ("one at a time",),
}
"""By sequences of a step at most, and of those that may live."""


Arrival = tuple[float, list[int], int]
"""When a request comes, the tokens of its prompt, and how many it is answered with."""


def serve(llm: LLM, requests: list[tuple[float, Request]]) -> tuple[float, list[RequestOutput]]:
    """Let requests arrive at their times; seconds in all, and what came out."""
    engine, coming, outputs, began = llm.engine, deque(requests), [], time.perf_counter()
    while coming or engine.unfinished:
        while coming and coming[0][0] <= time.perf_counter() - began:
            engine.add(coming.popleft()[1])
        if not engine.unfinished:
            time.sleep(max(0.0, coming[0][0] - (time.perf_counter() - began)))
            continue
        outputs += [output.output for _, output in engine.step() if output.output is not None]
    return time.perf_counter() - began, outputs


def read_arrivals(vocabulary: int, count: int, shorter: int, faster: float) -> list[Arrival]:
    """Times, prompts of random tokens and lengths of answers, as the file has them."""
    entries = json.loads((Path(__file__).parent / "azure_conv_256.json").read_text())["requests"][:count]
    lengths = [max(1, context // shorter) for _, context, _ in entries]
    tokens = random_tokens(vocabulary, sum(lengths))
    begins = [sum(lengths[:place]) for place in range(len(lengths))]
    return [
        (when / faster, tokens[begin : begin + length], max(2, answer // shorter))
        for (when, _, answer), begin, length in zip(entries, begins, lengths, strict=True)
    ]


def make_requests(llm: LLM, arrivals: list[Arrival]) -> list[tuple[float, Request]]:
    """Requests with their times; each has the index of its place."""
    return [
        (when, llm.request(prompt, SamplingParams(max_tokens=limit, ignore_eos=True), index=index))
        for index, (when, prompt, limit) in enumerate(arrivals)
    ]


def percentile(values: list[float], share: float) -> float:
    """Of the values, the one that so many are not above."""
    return sorted(values)[int(share * (len(values) - 1))]


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result file, as far as it goes."""
    result = {
        **about(device())._asdict(), "benchmark": "arrivals", "seed": SEED, "rows": rows,
        "config": {"shape": options.shape, "format": options.format, "slots": options.slots, "budget": options.budget, "requests": options.requests, "shorter": options.shorter, "faster": options.faster, "schedule": SCHEDULE[options.shape], "prefill_chunk": options.prefill_chunk, "repeats": options.repeats},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def rule_of(mode: str) -> str:
    """When waiting requests are let in."""
    if mode.startswith("static"):
        return "static"
    return "at once" if mode.endswith("at once") else "pays"


def serve_by(llm: LLM, mode: str, schedule: str, arrivals: list[Arrival]) -> dict[str, Any]:
    """All requests, from the first arrival on."""
    llm.engine.reschedule(schedule, rule_of(mode))
    seconds, outputs = serve(llm, make_requests(llm, arrivals))
    assert len(outputs) == len(arrivals)
    first, later = [o.first_token_seconds for o in outputs], [o.token_seconds for o in outputs]
    tokens = sum(len(o.token_ids) for o in outputs)
    return {
        "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
        "first_token_seconds": [percentile(first, share) for share in (0.5, 0.95)],
        "token_seconds": [percentile(later, share) for share in (0.5, 0.95)],
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """A line a mode."""
    for row in rows:
        middle = sorted(row["runs"], key=lambda run: run["tokens_per_second"])[len(row["runs"]) // 2]
        print(f"{row['mode']:20s} {row['slots']:4d} slots  {middle['tokens_per_second']:6.1f} tok/s "
              f"({', '.join(format(run['tokens_per_second'], '.0f') for run in row['runs'])}); first token {middle['first_token_seconds'][0]:.2f} s "
              f"(95%: {middle['first_token_seconds'][1]:.2f}), later {middle['token_seconds'][0] * 1e3:.1f} ms (95%: {middle['token_seconds'][1] * 1e3:.1f}); "
              f"peak {row['peak_bytes'] / 2**30:.2f} GiB {'<=' if row['peak_bytes'] <= row['budget_bytes'] else '>'} {row['budget_bytes'] / 2**30:.2f}; {row['prefill_chunk']} tokens a pass, stated stall {row['stall_seconds'] or 0:.3f} s", flush=True)  # fmt: skip


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["q", "g"], default="q")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--requests", type=int, help="default: all 256; 6 with --tiny")
    parser.add_argument(
        "--shorter", type=int, help="lengths are divided by it; default: 8 for shape q, 16 for g, 64 with --tiny"
    )
    parser.add_argument("--faster", type=float, help="time is; default: 6 for shape q, 2 for g, 60 with --tiny")
    parser.add_argument("--budget", help="default: 8GiB for shape q, 23GiB for g; a quarter of the experts with --tiny")
    parser.add_argument("--slots", help="a share of the experts such as 50%%, in place of a budget")
    parser.add_argument("--format", default="bf16", help="how experts are stored: bf16, mxfp4, int4, fp8, nvfp4")
    parser.add_argument("--skip", default="nothing", help="leave out modes whose name has this in it")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of a pass over prompts; default: auto")
    parser.add_argument("--plans", default="8,8x32,16,1", help="those of `MODES`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small widths and few requests; always so without CUDA")
    options = parser.parse_args(argv)
    options.tiny |= device() == "cpu"
    options.requests = options.requests or (6 if options.tiny else 256)
    options.shorter = options.shorter or (64 if options.tiny else SHORTER[options.shape])
    options.faster = options.faster or (60.0 if options.tiny else FASTER[options.shape])
    return options


def measure_plan(
    llm: LLM, modes: list[str], options: argparse.Namespace, schedule: str, arrivals: list[Arrival]
) -> dict[str, list[dict[str, Any]]]:
    """Every mode of one plan, forwards and backwards; first a few requests of every batch size, which captures the steps."""
    batch = llm.plan.max_batch
    for count in sorted({1, 3, 5, 9, 16} & set(range(batch + 1)) | {batch}):
        llm.engine.reschedule(schedule)
        serve(llm, [(0.0, request) for _, request in make_requests(llm, arrivals[:count])])
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for repeat in range(options.repeats):
        for mode in modes if repeat % 2 == 0 else modes[::-1]:
            runs[mode].append(serve_by(llm, mode, schedule, arrivals))
    return runs


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    options, rows = read_options(argv), []
    shape, config = options.shape, make_config(options.shape, tiny=options.tiny, packed=options.format)
    arrivals = read_arrivals(config.vocab_size, options.requests, options.shorter, options.faster)
    routing = None
    if shape == "g" and options.trace is not None:
        parts = parts_of(
            load_trace(options.trace).without("repetition"), [len(prompt) + limit for _, prompt, limit in arrivals]
        )
        arrivals = [(when, parts.tokens[n][: len(prompt)], limit) for n, (when, prompt, limit) in enumerate(arrivals)]
        routing = parts.replay
    length = max(len(prompt) + limit for _, prompt, limit in arrivals) + 1
    strategy = "next-use" if options.predictor is None else "plec"
    budget = options.budget or ("" if options.slots or options.tiny else BUDGET[shape])
    memory = {"gpu_memory": budget} if budget else {"slots": options.slots or "25%"}
    wide = WIDE if shape == "g" and routing is None else 1.0  # else random weights route all tokens alike
    with StandIn(config, embedding=wide, predictor=options.predictor) as stand_in:
        for plan in options.plans.split(","):
            modes = [mode for mode in MODES[plan] if options.skip not in mode]
            batch, live = int(plan.split("x")[0]), int(plan.split("x")[-1])
            schedule = SCHEDULE[shape] if live > batch else "fifo"
            settings = {"max_batch": batch, "max_live": live, "max_length": length, "prefill_chunk": options.prefill_chunk,
                    "execution": "graph", "strategy": strategy, "routing": routing, **memory}  # fmt: skip
            with stand_in.open(predicted=options.predictor is not None, **settings) as opened:
                found, made = measure_plan(opened.llm, modes, options, schedule, arrivals), opened.llm.plan
                peak = opened.peak
            done = [
                {"mode": mode, "slots": made.slots, "runs": runs, "peak_bytes": peak, "budget_bytes": made.budget or made.total,
                 "prefill_chunk": made.prefill_chunk, "copies_seconds": made.copies_seconds, "stall_seconds": made.stall_seconds}
                for mode, runs in found.items()
            ]  # fmt: skip
            rows += done
            write(options, rows)  # a plan at a time: a run that is cut off keeps its results
            show(done)


if __name__ == "__main__":
    main()
