"""How much a request's greedy tokens depend on other requests: alone, and among others that come and go.

The shipped model (trained, bfloat16), its 40 opening lines with answers of different lengths. Alone: one sequence at a
time. Among others: 8 step together of 24 that live, by the default schedule, in two orders of arrival. In float32 every
token has to be the same. In bfloat16 a row of a matrix product may round differently beside others. Where two tokens
are nearly as likely, the answers then differ from there on.

Usage: python benchmarks/invariance.py --out FILE
"""

import argparse
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.bench.workload import OPENINGS

LIVE, BATCH, LONGEST = 24, 8, 96


def answers(order: list[int], *, batch: int, live: int, options: dict[str, Any]) -> dict[int, list[int]]:
    """Tokens of every opening, added in this order."""
    with LLM(max_batch=batch, max_live=live, slots="50%", max_length=160, **options) as llm:
        found: dict[int, list[int]] = {}
        numbers = {}
        for which in order:
            params = SamplingParams(max_tokens=LONGEST - which, ignore_eos=True)
            numbers[llm.engine.add(llm.request(OPENINGS[which], params))] = which
        while llm.engine.unfinished:
            for number, output in llm.engine.step():
                if output.output is not None:
                    found[numbers[number]] = list(output.output.token_ids)
    return found


def compare(alone: dict[int, list[int]], among: dict[int, list[int]]) -> dict[str, float]:
    """How many requests have equal tokens, and how far the others agree."""
    same = {which: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, among[which], strict=True))) for which, tokens in alone.items()}  # fmt: skip
    whole = [which for which, count in same.items() if count == len(alone[which])]
    total = sum(map(len, alone.values()))
    return {
        "requests": len(alone), "equal_requests": len(whole), "tokens": total, "tokens_before_the_first_difference": sum(same.values()),
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=len(OPENINGS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--executions", default="graph" if torch.cuda.is_available() else "host")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, rows = given.requests, []
    for dtype in given.dtypes.split(","):
        for execution in given.executions.split(","):
            options = {"device": device, "dtype": dtype, "execution": execution}
            alone = answers(list(range(count)), batch=1, live=1, options=options)
            for name, order in (("as they come", list(range(count))), ("backwards", list(range(count))[::-1])):
                row = {"dtype": dtype, "execution": execution, "order": name}
                row |= compare(alone, answers(order, batch=BATCH, live=LIVE, options=options))
                rows.append(row)
                print(f"{dtype} {execution} {name}: {row['equal_requests']} of {row['requests']} requests equal, "
                      f"{row['tokens_before_the_first_difference'] / row['tokens']:.1%} of the tokens come before a difference", flush=True)  # fmt: skip
    result = {
        **about(device)._asdict(), "benchmark": "invariance", "rows": rows, "seed": 0,
        "config": {"model": "shipped", "batch": BATCH, "live": LIVE, "longest": LONGEST, "slots": "50%", "schedule": "auto"},
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    if any(row["equal_requests"] < row["requests"] for row in rows if row["dtype"] == "float32"):
        raise SystemExit("float32: tokens depend on other requests")


if __name__ == "__main__":
    main()
