"""When waiting requests should be let in, on a virtual clock: the engine's scheduler, passes and steps of fixed cost.

With experts in host memory a pass over prompts costs nearly the same however few tokens it has, since few tokens need most experts
already. Costs are those of `arrivals_h100.py` (shape Q, half of the experts in slots): a pass .12 s, a step 3.5 ms and .7 ms a
sequence. Arrivals of `azure_conv_256.json`, lengths an eighth, time six times as fast.

Usage: python benchmarks/admission.py [--out FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from expertflow.schedule.scheduler import Prefill, Scheduler

PASS, STEP, MEMBER = 0.12, 0.0035, 0.0007
SHORTER, FASTER, ROWS = 8, 6, 8
MODES = ("static batches", "at once", "when it pays")


def serve(mode: str, chunk: int, count: int) -> dict[str, Any]:
    """All requests through the scheduler."""
    told = json.loads((Path(__file__).parent / "azure_conv_256.json").read_text())["requests"][:count]
    coming = [(when / FASTER, max(1, context // SHORTER), max(2, answer // SHORTER)) for when, context, answer in told]
    costs = (lambda: (PASS, STEP + MEMBER * ROWS)) if mode == "when it pays" else None
    scheduler = Scheduler(rows=ROWS, batch=ROWS, chunk=chunk, costs=costs, joins=mode != "static batches")
    clock, passes, steps, number = 0.0, 0, 0, 0
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    got = [0] * count
    while number < count or scheduler.live or scheduler.waiting:
        while number < count and coming[number][0] <= clock:
            scheduler.add(number, coming[number][1])
            number += 1
        turn = scheduler.next()
        if turn is None:
            clock = max(clock, coming[number][0])
            continue
        if isinstance(turn, Prefill):
            widest = max(part.end - part.begin for part in turn.parts)
            passes += (parts := -(-widest * len(turn.parts) // chunk))
            clock += PASS * parts
            scheduler.done(turn)
            sampled = [part.sequence for part in turn.parts if part.last]
        else:
            steps += 1
            clock += STEP + MEMBER * len(turn.sequences)
            sampled = list(turn.sequences)
        for one in sampled:
            got[one] += 1
            first.setdefault(one, clock)
            last[one] = clock
            if got[one] == coming[one][2]:
                scheduler.remove(one)
    waited = sorted(first[one] - coming[one][0] for one in first)
    later = sorted((last[one] - first[one]) / (coming[one][2] - 1) for one in first)
    return {
        "mode": mode, "chunk": chunk, "requests": count, "tokens_per_second": sum(got) / clock, "seconds": clock,
        "passes": passes, "steps": steps, "first_token_seconds": [statistics.median(waited), waited[int(0.95 * count)]],
        "token_seconds": [statistics.median(later), later[int(0.95 * count)]],
    }  # fmt: skip


def main() -> None:
    """Serve, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [serve(mode, chunk, 256) for chunk in (512, 2048) for mode in MODES]
    for row in rows:
        print(f"{row['chunk']:4d} tokens a pass, {row['mode']:14s} {row['tokens_per_second']:6.1f} tok/s  {row['passes']:3d} passes {row['steps']:4d} steps  first token "
              f"{row['first_token_seconds'][0]:.2f} s (95%: {row['first_token_seconds'][1]:.2f})  later {row['token_seconds'][0] * 1e3:.1f} ms (95%: {row['token_seconds'][1] * 1e3:.1f})")  # fmt: skip
    result = {
        "benchmark": "admission", "date": time.strftime("%Y-%m-%d"), "seed": None, "machine": {"device": "virtual clock"}, "versions": {},
        "config": {"pass_seconds": PASS, "step_seconds": STEP, "member_seconds": MEMBER, "shorter": SHORTER, "faster": FASTER, "rows": ROWS},
        "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
