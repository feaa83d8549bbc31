"""Streams through the server beside the same requests through `LLM.generate`, in turns in one process: what HTTP costs.

Random weights of shape Q (Qwen3-MoE, 12 layers x 128 experts top-8), prompts of random tokens. The server listens on the loopback
as `expertflow serve` does; its clients are a process of their own. Each turn measures three ways: `generate`, the
server, and the server while `/metrics` is read once a second. Tokens a second over all streams, from the first request to the last
token; the ratios of the medians are the results (issue: server / generate >= .95, with metrics / without >= .99).

Usage: python benchmarks/serve_streams.py --out FILE [--streams 16] [--tokens 256] [--slots 50%] [--turns 3]
       --tiny: small widths and few tokens, for a CPU
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from stand_ins import SEED, WIDE, StandIn, device, make_config, random_tokens
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.serve.app import make_app
from expertflow.serve.guard import Rules
from expertflow.serve.metrics import Metrics
from expertflow.serve.run import listen
from expertflow.serve.service import Names, Service
from expertflow.serve.worker import Loading, Worker

PROMPT = 64
"""Tokens of a prompt."""
CLIENT = """
import json, selectors, socket, sys, threading, time, urllib.request
from urllib.parse import urlsplit
url, prompts, tokens, scrape = sys.argv[1], json.loads(sys.stdin.readline()), int(sys.argv[2]), sys.argv[3] == "1"
where, streams, ends = urlsplit(url), selectors.DefaultSelector(), {}
def ask(prompt):
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\\r\\nHost: {where.netloc}\\r\\nContent-Type: application/json\\r\\n"
    stream = socket.create_connection((where.hostname, where.port))
    stream.sendall(f"{head}Content-Length: {len(data)}\\r\\nConnection: close\\r\\n\\r\\n".encode() + data)
    streams.register(stream, selectors.EVENT_READ)
    ends[stream] = b""
def look():
    while not over.wait(1.0):
        urllib.request.urlopen(url + "/metrics").read()
over, left = threading.Event(), len(prompts)
watcher = threading.Thread(target=look)
began = time.perf_counter()
if scrape: watcher.start()
for prompt in prompts: ask(prompt)
while left:
    for key, _ in streams.select():
        more = key.fileobj.recv(1 << 16)
        ends[key.fileobj] = (ends[key.fileobj] + more)[-4096:]
        if not more:
            streams.unregister(key.fileobj)
            left -= 1
spent = time.perf_counter() - began
over.set()
counts = [json.loads(b"{" + end.rpartition(b"data: {")[2].partition(b"\\n")[0])["usage"]["completion_tokens"] for end in ends.values()]
print(json.dumps({"tokens": sum(counts), "seconds": spent}))
"""
"""All streams in one thread, which hardly looks at what it reads: the machine's time is the server's."""


def save_words(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose every token is a word."""
    words = {f"word{number} ": number for number in range(vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="word0 "))  # noqa: S106 - no password
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


async def through_http(url: str, prompts: list[list[int]], tokens: int, *, scrape: bool) -> float:
    """Tokens a second of a process of clients."""
    words = [sys.executable, "-c", CLIENT, url, str(tokens), str(int(scrape))]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*words, stdin=pipe, stdout=pipe)
    out, _ = await process.communicate(json.dumps(prompts).encode() + b"\n")
    found = json.loads(out)
    assert found["tokens"] == len(prompts) * tokens, found
    return float(found["tokens"] / found["seconds"])


def through_llm(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    """Tokens a second of one call."""
    began = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began)


def make_worker(stand: StandIn, tokenizer: str, metrics: Metrics, **options: Any) -> Worker:
    """What loads stand-in weights as a server does; `options` of `LLM`."""

    def load(_: Loading) -> LLM:
        given = {"dtype": "bfloat16", "device": device(), "predictor": "none", "tokenizer": tokenizer, **options}
        return LLM(stand.folder, beside=stand.owner, **given)

    return Worker(load, watcher=metrics)


@asynccontextmanager
async def serving(worker: Worker, service: Service) -> AsyncIterator[str]:
    """Serve as the command `serve` does; the address of the server, once the model is loaded."""
    bound = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(service, Rules()), log_config=None, access_log=False, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[bound]))
    worker.start()
    while worker.loading.phase not in {"ready", "failed"}:  # noqa: ASYNC110 - another thread writes it
        await asyncio.sleep(0.05)
    if worker.error is not None:
        raise worker.error
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    await task
    await worker.close()
    service.close()


async def measure(
    worker: Worker,
    service: Service,
    prompts: list[list[int]],
    options: argparse.Namespace,
    write: Callable[[dict[str, list[float]]], None],
) -> None:
    """Serve, and measure each way in turns; the first turn warms up and is not counted. `write` gets what is known after each other one."""
    async with serving(worker, service) as url:
        rows: dict[str, list[float]] = {"generate": [], "http": [], "http and metrics": []}
        for turn in range(options.turns + 1):
            found = [
                await asyncio.to_thread(through_llm, worker.llm, prompts, options.tokens),
                await through_http(url, prompts, options.tokens, scrape=False),
                await through_http(url, prompts, options.tokens, scrape=True),
            ]
            for name, speed in zip(rows, found, strict=True):
                rows[name] += [speed] if turn else []
            print(
                f"turn {turn}: " + ", ".join(f"{name} {speed:.1f}" for name, speed in zip(rows, found, strict=True)),
                flush=True,
            )
            if turn:
                write(rows)


def main() -> None:
    """Draw, serve, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--slots", default="50%")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.streams, options.tokens, options.turns = 4, 8, 1
    sys.setswitchinterval(5e-4)  # as the command `serve` does
    config = make_config("q", tiny=options.tiny)
    stand = StandIn(config, embedding=WIDE)
    scratch = tempfile.TemporaryDirectory()
    save_words(Path(scratch.name), config.vocab_size)
    tokens = random_tokens(config.vocab_size, options.streams * PROMPT)
    prompts = [tokens[begin : begin + PROMPT] for begin in range(0, len(tokens), PROMPT)]

    metrics = Metrics("q")
    size = {"max_batch": options.streams, "max_length": PROMPT + options.tokens, "slots": options.slots}
    worker = make_worker(stand, scratch.name, metrics, **size)

    def write(rows: dict[str, list[float]]) -> None:
        medians = {name: statistics.median(speeds) for name, speeds in rows.items()}
        ratios = {
            "http / generate": medians["http"] / medians["generate"],
            "with metrics / without": medians["http and metrics"] / medians["http"],
        }
        result = {
            **about(device())._asdict(), "benchmark": "serve_streams", "seed": SEED,
            "config": {"streams": options.streams, "tokens": options.tokens, "slots": options.slots, "prompt": PROMPT, "tiny": options.tiny},
            "tokens_per_second": rows, "ratios": ratios,
        }  # fmt: skip
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
        for name, speeds in rows.items():
            print(f"{name:20s} {medians[name]:8.1f} tokens/s  ({min(speeds):.1f}-{max(speeds):.1f})")
        print("  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()), flush=True)

    asyncio.run(measure(worker, Service(worker, Names(served=["q"]), metrics), prompts, options, write))


if __name__ == "__main__":
    main()
