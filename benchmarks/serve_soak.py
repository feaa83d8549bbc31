"""Clients come, leave, send nonsense and read slowly for minutes; no request is lost, and every error has its shape.

Starts `expertflow serve` with the shipped model as a process, and ends it with SIGTERM. Each client does one thing after another,
drawn by its seed: a whole answer, a stream, a stream that it leaves or reads slowly, a whole answer that it does not wait for, a body
that is wrong, or a second turn. The server's memory is read every ten seconds: its growth in the second half of the run is a result.

Usage: python benchmarks/serve_soak.py --out FILE [--seconds 1800] [--clients 8] [--slots 25%]
       --tiny: 20 seconds
"""

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil

from expertflow.bench.about import about

ROUTE = "/v1/chat/completions"
NONSENSE = (b"{", b"[]", b'{"messages": 1}', b'{"messages": [], "x": 1}', b"\xff", b'{"messages": [{"role": "boss"}]}')
LONGEST_WAIT = 300.0


def start(slots: str) -> tuple[subprocess.Popen[str], str]:
    """A server as a process, and its address, once the model is loaded."""
    words = [sys.executable, "-m", "expertflow", "serve", "--port", "0", "--slots", slots, "--max-waiting", "16"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found = re.search(r"http://\S+:\d+", process.stderr.readline())
    assert found is not None
    assert "Ready" in process.stderr.readline()
    return process, found[0]


class Client:
    """One client.

    Args:
        http: carries its requests.
        seed: of what it does.
        seen: counts what it saw, for all clients.
    """

    def __init__(self, http: httpx2.AsyncClient, seed: int, seen: Counter[str]) -> None:
        """Begin."""
        self.http, self.random, self.seen = http, random.Random(seed), seen

    def body(self, **more: Any) -> dict[str, Any]:
        """A request of random length."""
        words = "It was " * self.random.randint(1, 60)
        return {"messages": [{"role": "user", "content": words}], "max_tokens": self.random.randint(1, 30), **more}

    async def run(self, end: float) -> None:
        """Do one thing after another."""
        things = (self.wrong, self.whole, self.whole, self.stream, self.stream, self.leave, self.impatient, self.turns)
        while time.monotonic() < end:
            thing = self.random.choice(things)
            try:
                self.seen[f"{thing.__name__}: {await thing()}"] += 1
            except httpx2.HTTPError as error:
                self.seen[f"lost: {thing.__name__}: {type(error).__name__}"] += 1

    def check(self, answer: httpx2.Response, *statuses: int) -> str:
        """The status, if it is one of these, and an error has its shape."""
        right = answer.status_code in statuses
        if answer.status_code != 200:
            right = right and set(answer.json()["error"]) == {"message", "type", "param", "code"}
        return str(answer.status_code) if right else f"WRONG {answer.status_code} {answer.text[:80]}"

    async def wrong(self) -> str:
        """A body that is no request."""
        content = self.random.choice(NONSENSE)
        return self.check(
            await self.http.post(ROUTE, content=content, headers={"content-type": "application/json"}), 400
        )

    async def whole(self) -> str:
        """A whole answer."""
        answer = await self.http.post(ROUTE, json=self.body())
        await asyncio.sleep(0.2 * (answer.status_code == 503))
        return self.check(answer, 200, 503)

    async def turns(self) -> str:
        """A chat of two turns; the second one has to be answered as the first one was."""
        body = self.body()
        first = await self.http.post(ROUTE, json=body)
        if first.status_code != 200:
            return self.check(first, 503)
        body["messages"] += [first.json()["choices"][0]["message"], {"role": "user", "content": "And then"}]
        return self.check(await self.http.post(ROUTE, json=body), 200, 503)

    async def impatient(self) -> str:
        """A whole answer that the client may not wait for."""
        try:
            return self.check(await self.http.post(ROUTE, json=self.body(), timeout=3 * self.random.random()), 200, 503)
        except httpx2.TimeoutException:
            return "left"

    async def stream(self) -> str:
        """A stream that is read to its end, now and then slowly."""
        return await self._read(self.random.choice((0.0, 0.0, 0.1)), None)

    async def leave(self) -> str:
        """A stream that the client leaves."""
        return await self._read(0.0, self.random.randint(1, 15))

    async def _read(self, pause: float, most: int | None) -> str:
        async with self.http.stream("POST", ROUTE, json=self.body(stream=True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self.check(answer, 503)
            lines, last = 0, ""
            async for line in answer.aiter_lines():
                last, lines = line or last, lines + 1
                if most is not None and lines >= most:
                    return "left"
                await asyncio.sleep(pause)
        return "200" if last == "data: [DONE]" else f"WRONG end {last[:80]}"


async def watch(process: psutil.Process, end: float) -> list[int]:
    """The server's own memory, every ten seconds, bytes."""
    found = []
    while time.monotonic() < end:
        found.append(process.memory_full_info().uss)
        await asyncio.sleep(min(10.0, max(0.1, end - time.monotonic())))
    return found


async def soak(url: str, number: int, seconds: float, clients: int) -> dict[str, Any]:
    """Run the clients, then see that nothing is left of them."""
    seen, end = Counter[str](), time.monotonic() + seconds
    async with httpx2.AsyncClient(
        base_url=url, timeout=LONGEST_WAIT, limits=httpx2.Limits(max_connections=4 * clients)
    ) as http:
        running = [Client(http, seed, seen).run(end) for seed in range(clients)]
        memory, *_ = await asyncio.gather(watch(psutil.Process(number), end), *running)
        await asyncio.sleep(2)
        health = (await http.get("/health")).json()
    return {"seen": dict(sorted(seen.items())), "memory": memory, "left": health["running"] + health["waiting"]}


def main() -> None:
    """Serve, soak, stop, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    seconds = 20.0 if options.tiny else options.seconds
    process, url = start(options.slots)
    try:
        found = asyncio.run(soak(url, process.pid, seconds, options.clients))
    finally:
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=60)[1]
    memory = found["memory"]
    half = memory[len(memory) // 2 :]
    result = {
        **about()._asdict(), "benchmark": "serve_soak", "seed": 0,
        "config": {"seconds": seconds, "clients": options.clients, "slots": options.slots}, **found,
        "exit": process.returncode, "log": log[-2000:], "growth_second_half": half[-1] - half[0],
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, count in found["seen"].items():
        print(f"{count:6d} {name}")
    print(
        f"left {found['left']}, exit {process.returncode}, log {len(log)} bytes, memory MiB {[size >> 20 for size in memory[::6]]}"
    )
    wrong = [name for name in found["seen"] if "WRONG" in name or name.startswith("lost")]
    sys.exit(bool(wrong or found["left"] or process.returncode or log))


if __name__ == "__main__":
    main()
