"""Seconds to the first token of long prompts, half of the experts resident, by format, through `LLM`.

gpt-oss-20b's shape with random weights; tokens and routing of prompts are replayed from a recorded trace, each prompt another part of
it. The cache is warm: prompts and answers came before. Beside each time are the bytes loaded and the time that the link takes for them.
Formats take turns.

Usage: python benchmarks/first_token.py --trace TEST.trace --formats mxfp4,bf16 --out benchmarks/results/first_token_h200.json
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stand_ins import SEED, StandIn, device, make_config, parts_of

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.trace.format import load_trace

LENGTHS = (512, 2048)
REPEATS, DECODED = 4, 8
"""Prompts that are timed, and tokens generated after each, which leave the cache as serving does."""
LINK = 50.6e9
"""Bytes a second of records at their best, from kernels_h100.json."""


def measure(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Time each prompt but the first, which compiles and fills the cache."""
    times, loads, params = [], [], SamplingParams(max_tokens=DECODED, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        before, began = llm.stats.cache, time.perf_counter()
        request = llm.request(prompt, params, index=number)
        llm.engine.add(request)
        while not request.token_ids:
            llm.engine.step()
        times.append(time.perf_counter() - began)
        loads.append(llm.stats.cache.bytes_moved - before.bytes_moved)
        while llm.engine.unfinished:
            llm.engine.step()
    return {
        "strategy": llm.plan.strategy, "slots": llm.plan.slots, "seconds": times[1:], "bytes_moved": loads[1:],
        "link_seconds": [count / LINK for count in loads[1:]], "peak_bytes": llm.stats.peak_bytes, "budget_bytes": llm.plan.total,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--formats", default="mxfp4,bf16")
    parser.add_argument("--strategy", default="next-use")
    parser.add_argument("--share", default="50%")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--executions", default="graph")
    parser.add_argument("--out", type=Path, default=Path("first_token.json"))
    options = parser.parse_args()
    trace, rows = load_trace(options.trace).without("repetition"), list[dict[str, Any]]()
    tiny, lengths = device() == "cpu", [int(text) for text in options.lengths.split(",")]
    with ExitStack() as opened:
        stand_ins = {
            name: opened.enter_context(StandIn(make_config("g", tiny=tiny, packed=name))) for name in options.formats.split(",")
        }  # fmt: skip
        for length in lengths:
            parts = parts_of(trace, [length + DECODED + 1] * (REPEATS + 1))
            prompts = [one[:length] for one in parts.tokens]
            for execution in options.executions.split(","):
                for name, stand_in in stand_ins.items():
                    settings = {
                        "max_batch": 1,
                        "max_length": length + DECODED + 2,
                        "prefill_chunk": length,
                        "slots": options.share,
                    }
                    with stand_in.open(
                        strategy=options.strategy, execution=execution, routing=parts.replay, **settings
                    ) as one:
                        row = measure(one.llm, prompts)
                    rows.append({"format": name, "tokens": length, "execution": execution, **row})
                    print(
                        f"{name:6} {execution:5} {length:5d} tokens: {statistics.median(row['seconds']):.3f} s "
                        f"({min(row['seconds']):.3f}-{max(row['seconds']):.3f}), link {statistics.median(row['link_seconds']):.3f} s",
                        flush=True,
                    )
    result = {
        **about(device())._asdict(), "benchmark": "first token", "seed": SEED, "rows": rows,
        "config": {name: str(value) for name, value in vars(options).items() if name not in {"out", "trace"}},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
