"""When waiting requests should be let in, on a virtual clock: the engine's scheduler, passes and steps of given cost.

With experts in host memory a pass over prompts costs nearly the same however few tokens it has, since few tokens need
most experts already. How a step grows with its sequences depends on the slots: where loads rule, half-empty steps are
cheap, and little is lost by waiting for a batch to end. Machines, seconds: `few slots`, as measured on gpt-oss-20b's
shape with half of the experts in slots; `most slots`, an assumption: a fifth of the loads; `resident`, an assumption:
none. Arrivals of `azure_conv_256.json`, with lengths as they were or a sixteenth of that: more than can be served. Then
the same at a tenth of their pace: now and then rows are empty, except on the slowest machine.

Usage: python benchmarks/admission.py [--out FILE]
"""

import argparse
import json
import statistics
from collections import deque
from pathlib import Path
from typing import Any

from expertflow.bench.about import about
from expertflow.schedule.admission import make_admission
from expertflow.schedule.cost import Costs, fixed_part
from expertflow.schedule.scheduler import Prefill, Scheduler

MACHINES = {"few slots": (0.42, 0.004, 0.012), "most slots": (0.11, 0.004, 0.0025), "resident": (0.03, 0.004, 0.0003)}
"""Seconds of a pass, of a step, and of each of its sequences."""
ROWS, CHUNK = 8, 2048
LOADS = ((16, 16.0), (1, 16.0), (1, 0.1))
"""Factors by which requests are shorter and come faster: more than can be served, and now and then none to serve."""
MODES = {"static batches": "static", "at once": "at once", "when it pays": "pays"}
"""Names of the rows, and of the rules of admission."""


def serve(machine: str, mode: str, shorter: int, faster: float, count: int = 256) -> dict[str, Any]:
    """All requests through the scheduler."""
    a_pass, step, member = MACHINES[machine]
    entries = json.loads((Path(__file__).parent / "azure_conv_256.json").read_text())["requests"][:count]
    coming = [
        (when / faster, max(1, context // shorter), max(2, answer // shorter)) for when, context, answer in entries
    ]
    lasted: deque[tuple[int, float]] = deque(maxlen=64)

    def costs() -> Costs:
        return Costs(a_pass, fixed_part(lasted), statistics.median(step for _, step in lasted) if lasted else 0.0)

    scheduler = Scheduler(rows=ROWS, batch=ROWS, chunk=CHUNK, admission=make_admission(MODES[mode], costs))
    clock, passes, steps, number = 0.0, 0, 0, 0
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    got = [0] * count
    while number < count or scheduler.live or scheduler.waiting:
        while number < count and coming[number][0] <= clock:
            scheduler.add(number, coming[number][1])
            number += 1
        work = scheduler.next()
        if work is None:
            clock = max(clock, coming[number][0])
            continue
        if isinstance(work, Prefill):
            passes += 1
            clock += a_pass
            scheduler.done(work)
            sampled = [part.sequence for part in work.parts if part.last]
        else:
            steps += 1
            lasted.append((len(work.sequences), step + member * len(work.sequences)))
            clock += lasted[-1][1]
            sampled = list(work.sequences)
        for one in sampled:
            got[one] += 1
            first.setdefault(one, clock)
            last[one] = clock
            if got[one] == coming[one][2]:
                scheduler.remove(one)
    waited = sorted(first[one] - coming[one][0] for one in first)
    later = sorted((last[one] - first[one]) / (coming[one][2] - 1) for one in first)
    return {
        "machine": machine, "mode": mode, "shorter": shorter, "faster": faster, "requests": count, "tokens_per_second": sum(got) / clock,
        "seconds": clock, "passes": passes, "steps": steps, "first_token_seconds": [statistics.median(waited), waited[int(0.95 * count)]],
        "token_seconds": [statistics.median(later), later[int(0.95 * count)]],
    }  # fmt: skip


def main() -> None:
    """Serve, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [serve(machine, mode, *load) for machine in MACHINES for load in LOADS for mode in MODES]
    for row in rows:
        print(f"{row['machine']:10s} lengths / {row['shorter']:2d} {row['faster']:4.1f} times as fast {row['mode']:14s} {row['tokens_per_second']:6.1f} tok/s  {row['passes']:3d} passes {row['steps']:4d} steps  first token "
              f"{row['first_token_seconds'][0]:.2f} s (95%: {row['first_token_seconds'][1]:.2f})  later {row['token_seconds'][0] * 1e3:.1f} ms (95%: {row['token_seconds'][1] * 1e3:.1f})")  # fmt: skip
    result = {
        **about()._asdict(), "benchmark": "admission", "seed": None, "machine": {"device": "virtual clock"},
        "config": {"machines": MACHINES, "rows": ROWS, "chunk": CHUNK},
        "rows": rows,
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
