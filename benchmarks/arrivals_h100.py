"""Requests that arrive as they did at a large service: continuous batching beside one at a time and static batches.

Arrivals, prompt lengths and answer lengths of `azure_conv_256.json`, divided by `--shorter` and sped up by `--faster`, inside one budget of
device memory for all. Shape `q`: Qwen3-MoE (12 layers x 128 experts top-8), random weights and prompts of random tokens. Shape `g`:
gpt-oss-20b's, random weights, tokens and routing of a recorded trace's sequences and a predictor trained on others.
Modes that share a plan are served by one loaded model in turns, forwards and backwards, `--repeats` times.
Tokens a second from the first arrival to the last token; time to the first token from a request's arrival, and mean time of its
later tokens.

Usage: python benchmarks/arrivals_h100.py --out FILE
       python benchmarks/arrivals_h100.py --shape g --trace TEST.trace --predictor FOLDER --out FILE
"""

import argparse
import gc
import json
import platform
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from engine_h100 import SEED, make_config
from schedule_h100 import ReplayEngine, open_random, replaying, sizes_of
from torch import Tensor

from expertflow import SamplingParams, __version__
from expertflow.engine.build import OffloadedModel
from expertflow.engine.engine import Engine
from expertflow.engine.request import Request, RequestOutput
from expertflow.trace.format import Trace, load_trace

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


class Parts:
    """What a trace says of every request: its sequences in turn, each from where its last part ended, over and over."""

    def __init__(self, trace: Trace, requests: list[tuple[float, Request]]) -> None:
        """Tokens `[n]` and routes `[n, L, K]` of each request, prompt and answer."""
        rows = [np.flatnonzero(trace.rows.sequence == number) for number in np.unique(trace.rows.sequence)]
        rows.sort(key=lambda mine: -trace.rows.tokens[mine].min())  # those whose tokens are known first
        self.known = sum(trace.rows.tokens[mine].min() >= 0 for mine in rows)
        self.tokens: list[list[int]] = []
        self.routes: list[npt.NDArray[np.uint8]] = []
        begins = [0] * len(rows)
        for _, request in requests:
            which = request.index % len(rows)
            needed = len(request.prompt_token_ids) + request.limit + 1
            part = rows[which][(begins[which] + np.arange(needed)) % len(rows[which])]
            begins[which] += needed
            self.tokens.append(np.maximum(trace.rows.tokens[part], 0).tolist())
            self.routes.append(trace.rows.experts[part])


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


def make_requests(vocabulary: int, count: int, shorter: int, faster: float) -> list[tuple[float, Request]]:
    """Arrival times, prompts and lengths of the file."""
    random = torch.Generator().manual_seed(SEED)
    told = json.loads((Path(__file__).parent / "azure_conv_256.json").read_text())["requests"][:count]
    requests = []
    for number, (when, context, answer) in enumerate(told):
        tokens = torch.randint(3, vocabulary, (max(1, context // shorter),), generator=random).tolist()
        limit = max(2, answer // shorter)
        params = SamplingParams(max_tokens=limit, ignore_eos=True)
        request = Request(index=number, prompt=None, prompt_token_ids=tuple(tokens), params=params, ends=(), limit=limit, decoder=None)  # fmt: skip
        requests.append((when / faster, request))
    return requests


def percentile(values: list[float], share: float) -> float:
    """Of the values, the one that so many are not above."""
    return sorted(values)[int(share * (len(values) - 1))]


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result file, as far as it goes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "benchmark": "arrivals", "date": time.strftime("%Y-%m-%d"), "seed": SEED, "rows": rows,
        "config": {"shape": options.shape, "requests": options.requests, "shorter": options.shorter, "faster": options.faster, "schedule": SCHEDULE[options.shape], "prefill_chunk": options.prefill_chunk, "repeats": options.repeats},
        "machine": {"device": device},
        "versions": {"torch": torch.__version__, "python": platform.python_version(), "expertflow": __version__},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def serve_by(mode: str, engine: Engine, requests: list[tuple[float, Request]]) -> dict[str, Any]:
    """All requests, from the first arrival on."""
    if mode.endswith("at once"):
        engine._scheduler.costs = None  # noqa: SLF001 - whoever waits is let in as soon as there is a row
    if mode.startswith("static"):
        engine._scheduler._opportune = lambda: not engine._scheduler.live  # type: ignore[method-assign]  # noqa: SLF001 - the next batch waits for the last of this one
    seconds, outputs = serve(engine, requests)
    assert len(outputs) == len(requests)
    first, later = [o.first_token_seconds for o in outputs], [o.token_seconds for o in outputs]
    tokens = sum(len(o.token_ids) for o in outputs)
    return {
        "seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds,
        "first_token_seconds": [percentile(first, share) for share in (0.5, 0.95)],
        "token_seconds": [percentile(later, share) for share in (0.5, 0.95)],
    }  # fmt: skip


def show(rows: list[dict[str, Any]], budget: str) -> None:
    """A line a mode."""
    for row in rows:
        middle = sorted(row["runs"], key=lambda run: run["tokens_per_second"])[len(row["runs"]) // 2]
        print(f"{row['mode']:20s} {row['slots']:4d} slots  {middle['tokens_per_second']:6.1f} tok/s "
              f"({', '.join(format(run['tokens_per_second'], '.0f') for run in row['runs'])}); first token {middle['first_token_seconds'][0]:.2f} s "
              f"(95%: {middle['first_token_seconds'][1]:.2f}), later {middle['token_seconds'][0] * 1e3:.1f} ms (95%: {middle['token_seconds'][1] * 1e3:.1f}); "
              f"peak {row['peak_bytes'] / 2**30:.2f} GiB {'<=' if row['peak_bytes'] <= row['budget_bytes'] else '>'} {budget}", flush=True)  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["q", "g"], default="q")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--shorter", type=int, help="lengths are divided by it; default: 8 for shape q, 16 for g")
    parser.add_argument("--faster", type=float, help="time is; default: 6 for shape q, 2 for g")
    parser.add_argument("--budget")
    parser.add_argument("--skip", default="nothing", help="leave out modes whose name has this in it")
    parser.add_argument("--prefill-chunk", type=int, default=512, help="tokens of a pass over prompts")
    parser.add_argument("--plans", default="8,8x32,16,1", help="those of `MODES`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, tiny, budget = options.shape, device == "cpu", options.budget or BUDGET[options.shape]
    options.shorter, options.faster = options.shorter or SHORTER[shape], options.faster or FASTER[shape]
    config, rows = sizes_of("g", tiny=tiny) if shape == "g" else make_config("q", tiny=tiny), []
    trace = load_trace(options.trace).without("repetition") if shape == "g" else None

    def some(count: int) -> list[tuple[float, Request]]:
        return make_requests(config.vocab_size, count, options.shorter, options.faster)

    length = max(len(one.prompt_token_ids) + one.limit for _, one in some(options.requests)) + 1
    for plan in options.plans.split(","):
        modes = [mode for mode in MODES[plan] if options.skip not in mode]
        batch, live = int(plan.split("x")[0]), int(plan.split("x")[-1])
        wish = {"max_batch": batch, "max_live": live, "max_length": length, "prefill_chunk": options.prefill_chunk, "gpu_memory": budget,
                "device": device, "execution": "graph", "schedule": SCHEDULE[shape] if live > batch else "fifo"}  # fmt: skip
        offloaded = open_random(config, wish, options.predictor)
        now = None if trace is None else replaying(offloaded, max(options.prefill_chunk, live * length))

        def start(
            requests: list[tuple[float, Request]], offloaded: OffloadedModel = offloaded, now: Tensor | None = now
        ) -> Engine:
            if trace is None or now is None:
                return Engine(offloaded)
            return ReplayEngine(offloaded, now, Parts(trace, requests))

        for count in {1, 3, 5, 9, 16} & set(range(batch + 1)) | {batch}:  # shapes are captured before the clock runs
            few = some(count)
            serve(start(few), [(0.0, request) for _, request in few])
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
        for repeat in range(options.repeats):
            for mode in modes if repeat % 2 == 0 else modes[::-1]:
                requests = some(options.requests)
                runs[mode].append(serve_by(mode, start(requests), requests))
            peak = offloaded.measure()
            done = [
                {"mode": mode, "slots": offloaded.plan.slots, "runs": found, "peak_bytes": peak, "budget_bytes": offloaded.plan.budget}
                for mode, found in runs.items()
            ]  # fmt: skip
            write(options, rows + done)  # a run that is cut off has lost nothing
        rows += done
        show(done, budget)
        failure = None if offloaded.live_predictor is None else offloaded.live_predictor.failure
        if failure:
            raise SystemExit(f"the predictor failed: {failure}")
        offloaded.close()
        del offloaded, start, now
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
