"""Prompts at full size, through `LLM`: time to the first token when experts are streamed, and what is evicted by it.

Shape Q of `stand_ins.py` (12 layers x 128 experts, random weights). Four sequences decode for a while, so that the
cache has the experts that decoding needs. Then the host execution reads a prompt of random tokens: every expert it
needs, double buffered on a GPU. Beside it the copy engine's time for the bytes, and how many of the experts that most
decode steps used, and that were resident, are still there afterwards.

Usage: python benchmarks/prefill_h100.py [--out FILE]
       --tiny: small widths, for a CPU
"""

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

from stand_ins import SEED, WIDE, StandIn, device, make_config, random_tokens

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.events import Event, EventKind

COPY_ENGINE = 53.5e9
"""Bytes a second, from kernels_h100.json."""
BATCH, DECODED, REPEATS, READ = 4, 24, 3, 8
"""Sequences that decode, their steps, timed repeats, and tokens of each sequence's prompt."""


class Residents:
    """Follows events: which experts are in slots, and how many steps used each."""

    def __init__(self) -> None:
        """Start with empty slots."""
        self.now: set[tuple[int, int]] = set()
        self.used = Counter[tuple[int, int]]()

    def __call__(self, event: Event) -> None:
        """Take an event."""
        expert = event.layer, event.expert
        match event.kind:
            case EventKind.HIT:
                self.used[expert] += 1
            case EventKind.MISS:
                self.used[expert] += 1
                self.now.add(expert)
            case EventKind.PREFETCH:
                self.now.add(expert)
            case EventKind.EVICT:
                self.now.discard(expert)
            case _:
                pass


def measure(llm: LLM, vocabulary: int, tokens: int) -> dict[str, Any]:
    """Prompts of one length."""
    residents, times, loads, kept = Residents(), [], [], []
    llm.events.subscribe(residents)
    one, many = (SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, DECODED + 1))
    drawn = random_tokens(vocabulary, REPEATS + 1, BATCH * READ + tokens)
    for numbers in drawn:
        prompts = [numbers[place * READ : (place + 1) * READ] for place in range(BATCH)]
        stream = llm.stream(prompts, many)
        for _ in range(BATCH):
            next(stream)
        residents.used.clear()  # the prompts' own uses
        for _ in stream:
            pass
        hot = {expert for expert, count in residents.used.items() if count >= DECODED // 2} & residents.now
        before, began = llm.stats.cache.loads, time.perf_counter()
        llm.generate([numbers[BATCH * READ :]], one)
        times.append((time.perf_counter() - began) * 1e3)
        loads.append(llm.stats.cache.loads - before)
        kept.append(len(hot & residents.now) / max(len(hot), 1))
    plan = llm.plan
    return {
        "strategy": plan.strategy, "wave": 2 if plan.device == "cuda" else 1, "slots": plan.slots, "tokens": tokens,
        "ms": times[1:], "loads": loads[1:], "kept": kept[1:],
        "floor_ms": [count * plan.record_bytes / COPY_ENGINE * 1e3 for count in loads[1:]],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small widths; always so without CUDA")
    options = parser.parse_args(argv)
    config, rows = make_config("q", tiny=options.tiny or device() == "cpu"), []
    with StandIn(config, embedding=WIDE) as stand_in:
        for tokens in (64, 512):
            for name in ("next-use", "lru"):
                settings = {"max_batch": BATCH, "max_length": 520, "prefill_chunk": 512, "execution": "host"}
                with stand_in.open(strategy=name, slots="25%", **settings) as opened:
                    rows.append(row := measure(opened.llm, config.vocab_size, tokens))
                ms, loads, kept, floor = (statistics.median(row[k]) for k in ("ms", "loads", "kept", "floor_ms"))
                print(f"{tokens:4d} tokens {name:9s}: {ms:7.1f} ms ({min(row['ms']):.1f}-{max(row['ms']):.1f}), copies alone {floor:7.1f} ms, {loads:5.0f} loads, "
                      f"{kept:.0%} of the decode set kept", flush=True)  # fmt: skip
    result = {
        **about(device())._asdict(), "benchmark": "prefill", "seed": SEED, "rows": rows,
        "config": {"shape": "q", "batch": BATCH, "decoded": DECODED, "copy_engine_bytes_per_second": COPY_ENGINE},
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
