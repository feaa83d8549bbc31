"""What a reader beside running steps costs: a snapshot for the live page or a scrape, as the server takes it, against steps alone.

Model: shape Q with random weights, a quarter of its experts in slots, random tokens fed in. Every `EVERY`-th step a snapshot is begun
before the step and taken behind it. A snapshot costs what such a step, with both calls, takes longer than the others, by medians of
neighbours. Readers take one a second, so that is its share of a second. Residency and totals of every snapshot are compared with those
that are waited for before the step, in a second run of the same steps.

Usage: python benchmarks/snapshots.py --out FILE
       --tiny: small widths and few steps, for a CPU
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from stand_ins import SEED, StandIn, device, make_config, random_tokens

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.execution.replay import Replay

LENGTH, BEGIN, WARM, EVERY = 512, 32, 12, 5


def steps_of(llm: LLM, prompts: list[list[int]], steps: int, *, waited: bool) -> tuple[list[float], list[Any]]:
    """Seconds of each step, and what was read at every `EVERY`-th: by a snapshot, or `waited` for before the step."""
    engine, params = llm.engine, SamplingParams(max_tokens=LENGTH - BEGIN, ignore_eos=True)
    numbers = [engine.add(llm.request(prompt, params, index=index)) for index, prompt in enumerate(prompts)]
    for _ in range(WARM + len(prompts)):
        engine.step()
    seconds, read = [], []
    for number in range(steps):
        reads = number % EVERY == EVERY - 1
        if reads and waited:
            read.append((llm.stats.cache, llm.look().result()[1].slot_of))
        began = time.perf_counter()
        coming = llm.look() if reads and not waited else None
        engine.step()
        if coming is not None:
            stats, view = coming.result()
            read.append((stats.cache, view.slot_of))
        seconds.append(time.perf_counter() - began)
    for one in numbers:
        engine.cancel(one)
    return seconds, read


def cost_of(seconds: list[float]) -> list[float]:
    """Seconds that each step with a snapshot took longer than the median of the steps around it."""
    places = range(EVERY - 1, len(seconds), EVERY)
    around = [seconds[max(0, place - EVERY + 1) : place] + seconds[place + 1 : place + EVERY] for place in places]
    return [seconds[place] - statistics.median(near) for place, near in zip(places, around, strict=True)]


def measure(batch: int, *, tiny: bool) -> dict[str, Any]:
    """Steps with snapshots, and the same steps with readers that wait."""
    config = make_config("q", tiny=tiny)
    tokens = random_tokens(config.vocab_size, batch, LENGTH)
    steps, options = 20 if tiny else 400, {"slots": "25%", "execution": "graph", "strategy": "next-use"}
    sizes = {"max_batch": batch, "max_length": LENGTH, "prefill_chunk": batch * BEGIN}
    prompts, found, link = [one[:BEGIN] for one in tokens], {}, 0.0
    for waited in (False, True):
        with StandIn(config) as stand_in, stand_in.open(routing=Replay(tokens=tokens), **options, **sizes) as opened:
            link = opened.llm.link_speed()
            found[waited] = steps_of(opened.llm, prompts, steps, waited=waited)
    wrong = sum(
        totals != counted or not np.array_equal(slots, resident)
        for (totals, slots), (counted, resident) in zip(found[False][1], found[True][1], strict=True)
    )
    cost = cost_of(found[False][0])
    return {
        "batch": batch, "steps": steps, "step_ms": statistics.median(found[False][0]) * 1e3, "link_gbps": link / 1e9,
        "snapshot_us": statistics.median(cost) * 1e6, "snapshot_mean_us": statistics.fmean(cost) * 1e6,
        "snapshots": len(cost), "different": wrong,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("snapshots.json"))
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for batch in options.batches.split(","):
        row = measure(int(batch), tiny=options.tiny)
        rows.append(row)
        result = {
            **about(device())._asdict(), "benchmark": "snapshots", "seed": SEED, "rows": rows,
            "config": {name: str(value) for name, value in vars(options).items() if name != "out"},
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"B={row['batch']:<2d} step {row['step_ms']:.2f} ms; a snapshot {row['snapshot_us']:.0f} us (mean "
            f"{row['snapshot_mean_us']:.0f}), {row['snapshot_mean_us'] / 1e4:.3f} % of a second; {row['different']} of "
            f"{row['snapshots']} differ; link {row['link_gbps']:.1f} GB/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
