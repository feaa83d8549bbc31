"""Requests that arrive as they did at a large service: continuous batching beside one at a time and static batches.

Arrivals, prompt lengths and answer lengths of `azure_conv_256.json` (lengths an eighth, time six times as fast), prompts of random
tokens, on the shape of Qwen3-MoE (12 layers x 128 experts top-8, random weights) inside one budget of device memory for all.
Tokens a second from the first arrival to the last token; time to the first token from a request's arrival, and mean time of its
later tokens.

Usage: python benchmarks/arrivals_h100.py --out FILE
"""

import argparse
import gc
import json
import platform
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from engine_h100 import SEED, make_config
from schedule_h100 import open_random

from expertflow import SamplingParams, __version__
from expertflow.engine.engine import Engine
from expertflow.engine.request import Request, RequestOutput

BUDGET = "8GiB"
SHORTER, FASTER = 8, 6
MODES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_batch": 1},
    "static batches of 8": {"max_batch": 8},
    "continuous, at once": {"max_batch": 8},
    "continuous, 8 live": {"max_batch": 8},
    "continuous, 16 live": {"max_batch": 16},
}
COMMON = {"max_length": 640, "prefill_chunk": 512}


def serve(engine: Engine, requests: list[tuple[float, Request]]) -> tuple[float, list[RequestOutput]]:
    """Let requests arrive at their times; seconds in all, and what came out."""
    coming, outputs, began = deque(requests), [], time.perf_counter()
    while coming or engine.unfinished:
        while coming and coming[0][0] <= time.perf_counter() - began:
            engine.add(coming.popleft()[1])
        if not engine.unfinished:
            time.sleep(max(0.0, coming[0][0] - (time.perf_counter() - began)))
            continue
        outputs += [output.output for _, output in engine.step() if output.output is not None]
    return time.perf_counter() - began, outputs


def make_requests(vocabulary: int, count: int) -> list[tuple[float, Request]]:
    """Arrival times, prompts and lengths of the file."""
    random = torch.Generator().manual_seed(SEED)
    told = json.loads((Path(__file__).parent / "azure_conv_256.json").read_text())["requests"][:count]
    requests = []
    for number, (when, context, answer) in enumerate(told):
        tokens = torch.randint(3, vocabulary, (max(1, context // SHORTER),), generator=random).tolist()
        limit = max(2, answer // SHORTER)
        params = SamplingParams(max_tokens=limit, ignore_eos=True)
        request = Request(index=number, prompt=None, prompt_token_ids=tuple(tokens), params=params, ends=(), limit=limit, decoder=None)  # fmt: skip
        requests.append((when / FASTER, request))
    return requests


def percentile(values: list[float], share: float) -> float:
    """Of the values, the one that so many are not above."""
    return sorted(values)[int(share * (len(values) - 1))]


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result file, as far as it goes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "benchmark": "arrivals", "date": time.strftime("%Y-%m-%d"), "seed": SEED, "rows": rows,
        "config": {"shape": "q", "requests": options.requests, "shorter": SHORTER, "faster": FASTER, **COMMON},
        "machine": {"device": device},
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "expertflow": __version__},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--budget", default=BUDGET)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, rows = make_config("q", tiny=device == "cpu"), []
    for name, wish in MODES.items():
        wish = {**COMMON, **wish, "gpu_memory": options.budget, "device": device, "execution": "graph"}  # noqa: PLW2901
        offloaded = open_random(config, wish)
        engine = Engine(offloaded)
        if name.endswith("at once"):
            engine._scheduler.costs = None  # noqa: SLF001 - whoever waits is let in as soon as there is a row
        if name.startswith("static"):
            engine._scheduler.joins = False  # noqa: SLF001 - the next batch waits for the last of this one
        for count in (1, 3, 5, 9, 16):  # shapes are captured before the clock runs
            serve(
                engine,
                [(0.0, request) for _, request in make_requests(config.vocab_size, min(count, wish["max_batch"]))],
            )
        seconds, outputs = serve(engine, make_requests(config.vocab_size, options.requests))
        assert len(outputs) == options.requests
        first, later = [o.first_token_seconds for o in outputs], [o.token_seconds for o in outputs]
        tokens, peak = sum(len(o.token_ids) for o in outputs), offloaded.measure()
        row = {
            "mode": name, "slots": offloaded.plan.slots, "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "first_token_seconds": [percentile(first, share) for share in (0.5, 0.95)],
            "token_seconds": [percentile(later, share) for share in (0.5, 0.95)],
            "peak_bytes": peak, "budget_bytes": offloaded.plan.budget,
        }  # fmt: skip
        rows.append(row)
        print(f"{name:20s} {row['slots']:4d} slots  {tokens / seconds:6.1f} tok/s in {seconds:5.1f} s; first token {row['first_token_seconds'][0]:.2f} s (95%: {row['first_token_seconds'][1]:.2f}), "
              f"later {row['token_seconds'][0] * 1e3:.1f} ms (95%: {row['token_seconds'][1] * 1e3:.1f}); peak {peak / 2**30:.2f} GiB {'<=' if peak <= offloaded.plan.budget else '>'} {options.budget}", flush=True)  # fmt: skip
        write(options, rows)
        offloaded.close()
        del offloaded, engine
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
