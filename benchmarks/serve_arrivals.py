"""Requests that arrive over HTTP as they did at a large service, some of which are given up: first tokens and times between tokens.

Random weights of shape Q (Qwen3-MoE, 12 layers x 128 experts top-8), prompts of random tokens. Arrivals, prompt lengths and answer
lengths of `azure_conv_256.json`, divided by `--shorter` and sped up by `--faster`. The server listens on the loopback as `expertflow
serve` does; its clients are a process of their own, one connection a request. A share of them, drawn with a seed, closes its connection
within the first half of its answer. Times to the first token from the arrival, and between two tokens, over all requests; every other
answer has to be whole, the server idle at the end, and without having computed all of what was given up.

Usage: python benchmarks/serve_arrivals.py --out FILE [--requests 128] [--cancelled 0.2] [--slots 50%]
       --tiny: small widths and few requests, for a CPU
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arrivals_h100 import percentile, read_arrivals
from serve_streams import make_worker, save_words, serving
from stand_ins import SEED, WIDE, StandIn, device, make_config

from expertflow.bench.about import about
from expertflow.serve.metrics import Metrics
from expertflow.serve.service import Names, Service
from expertflow.serve.worker import Worker

CLIENT = """
import asyncio, json, sys, time
from urllib.parse import urlsplit
where, requests = urlsplit(sys.argv[1]), json.loads(sys.stdin.read())
async def ask(began, when, prompt, tokens, patience):
    asked = began + when
    await asyncio.sleep(max(0.0, asked - time.perf_counter()))
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: {where.netloc}\\r\\nContent-Type: application/json\\r\\n"
    writer.write(f"{head}Content-Length: {len(data)}\\r\\nConnection: close\\r\\n\\r\\n".encode() + data)
    times, over = [], False
    async for line in reader:
        if line == b"data: [DONE]\\n":
            over = True
        elif line.startswith(b"data: ") and json.loads(line[6:])["choices"][0]["text"]:
            times.append(time.perf_counter() - asked)
            if patience and len(times) >= patience:
                break
    writer.close()
    return {"times": times, "whole": over, "tokens": tokens, "given_up": bool(patience) and not over}
async def main():
    began = time.perf_counter() + 0.1
    found = await asyncio.gather(*(ask(began, *request) for request in requests))
    print(json.dumps({"answers": found, "seconds": time.perf_counter() - began}))
asyncio.run(main())
"""
"""Every request on its own connection; the times at which its tokens came, one a piece of the answer."""
IDLE = 30.0
"""Seconds after which a server that was left is still busy."""


Asked = tuple[float, list[int], int, int]
"""When a request comes, its prompt, tokens of its answer, and after how many the client leaves; 0: it stays."""


async def ask(url: str, requests: list[Asked]) -> dict[str, Any]:
    """Let a process of clients make the requests."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, url, stdin=pipe, stdout=pipe)
    out, _ = await process.communicate(json.dumps(requests).encode())
    found: dict[str, Any] = json.loads(out)
    return found


async def idle(worker: Worker) -> None:
    """Wait until no request lives; the server has to have noticed those that were given up."""
    async with asyncio.timeout(IDLE):
        while worker.llm.engine.unfinished:  # noqa: ASYNC110 - another thread writes it
            await asyncio.sleep(0.05)


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Percentiles over the answers, in seconds; raises if one that was waited for is not whole, a piece a token."""
    answers = found["answers"]
    for one in answers:
        assert one["given_up"] or (one["whole"] and len(one["times"]) == one["tokens"]), one
    first = [one["times"][0] for one in answers if one["times"]]
    between = [
        later - earlier for one in answers for earlier, later in zip(one["times"], one["times"][1:], strict=False)
    ]
    shares = 0.5, 0.95
    return {
        "seconds": found["seconds"], "given_up": sum(one["given_up"] for one in answers),
        "tokens_per_second": sum(len(one["times"]) for one in answers) / found["seconds"],
        "first_token_seconds": [percentile(first, share) for share in shares],
        "between_tokens_seconds": [percentile(between, share) for share in shares],
    }  # fmt: skip


async def measure(
    worker: Worker, service: Service, requests: list[Asked], turns: int, write: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Serve the arrivals several times; the first time warms up and is not counted."""
    rows: list[dict[str, Any]] = []
    async with serving(worker, service) as url:
        for turn in range(turns + 1):
            before = worker.llm.stats.tokens
            row = summary(await ask(url, requests))
            await idle(worker)
            row |= {"generated": worker.llm.stats.tokens - before, "asked": sum(limit for _, _, limit, _ in requests)}
            assert row["generated"] < row["asked"] or not row["given_up"], row
            firsts, betweens = row["first_token_seconds"], row["between_tokens_seconds"]
            print(
                f"turn {turn}: {row['given_up']} of {len(requests)} given up ({row['generated']} of {row['asked']} tokens made), first token p50 {firsts[0]:.3f} s, p95 {firsts[1]:.3f}; "
                f"between tokens p50 {betweens[0] * 1e3:.1f} ms, p95 {betweens[1] * 1e3:.1f}; {row['tokens_per_second']:.1f} tokens/s",
                flush=True,
            )
            if turn:
                rows.append(row)
                write(rows)


def main() -> None:
    """Draw, serve, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--shorter", type=int, default=4)
    parser.add_argument("--faster", type=float, default=0.7)
    parser.add_argument("--cancelled", type=float, default=0.2, help="share of the requests that are given up")
    parser.add_argument("--slots", default="50%")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.shorter, options.batch, options.turns = 8, 4, 4, 1
    sys.setswitchinterval(5e-4)  # as the command `serve` does
    config, draw = make_config("q", tiny=options.tiny), random.Random(SEED)
    stand, scratch = StandIn(config, embedding=WIDE), tempfile.TemporaryDirectory()
    save_words(Path(scratch.name), config.vocab_size)
    arrivals = read_arrivals(config.vocab_size, options.requests, options.shorter, options.faster)
    requests = [
        (when, prompt, limit, draw.randint(1, limit // 2) if draw.random() < options.cancelled else 0)
        for when, prompt, limit in arrivals
    ]
    longest = max(len(prompt) + limit for _, prompt, limit in arrivals)

    def write(rows: list[dict[str, Any]]) -> None:
        names = "requests", "shorter", "faster", "cancelled", "slots", "batch", "tiny"
        result = {
            **about(device())._asdict(), "benchmark": "serve_arrivals", "seed": SEED,
            "config": {name: getattr(options, name) for name in names}, "rows": rows,
        }  # fmt: skip
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    metrics = Metrics("q")
    size = {"max_batch": options.batch, "max_length": longest, "slots": options.slots}
    worker = make_worker(stand, scratch.name, metrics, **size)
    asyncio.run(measure(worker, Service(worker, Names(served=["q"]), metrics), requests, options.turns, write))


if __name__ == "__main__":
    main()
