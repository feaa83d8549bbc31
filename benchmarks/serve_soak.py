"""Clients come, leave, send nonsense and read slowly for minutes, and the server restarts; no request is lost, every error has its shape.

Starts `expertflow serve` with the shipped model as a process. Each client does one thing after another, drawn by its seed: a
whole answer, a stream, a stream that it leaves or reads slowly or not at all for a while, a whole answer that it does not wait
for, half a body, a request that is wrong, or a second turn; at each of the four routes that generate. For two thirds of the
time one process serves, and its memory is read every ten seconds. In the last third it restarts at the same port, by SIGTERM,
and every second time by two of them. A request that was sent before the signal gets its answer, or an error in its shape once
its time to end is over; only requests that were sent behind it may find nobody.

Usage: python benchmarks/serve_soak.py --out FILE [--seconds 1800] [--clients 8] [--restarts 4] [--slots 25%]
       --tiny: 40 seconds
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple

import httpx2
import psutil

from expertflow.bench.about import about

CHAT, COMPLETION, ANSWER, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
ROUTES = (CHAT, COMPLETION, ANSWER, MESSAGE)
LAST = {CHAT: "data: [DONE]", COMPLETION: "data: [DONE]", ANSWER: "response.completed response.incomplete", MESSAGE: "message_stop"}  # fmt: skip
JSON = {"content-type": "application/json"}
LONGEST_WAIT = 300.0
UNREAD = "timeout graceful shutdown exceeded"
"""What uvicorn writes where a client does not read what is left for it when the server ends."""
PREFIX_MEMORY = "64MiB"
"""Little, so that it is full early and what is kept no longer grows."""
SHAPES = {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""For the server's environment: shapes for which torch, and oneDNN below it, keep compiled products in bfloat16 on a CPU. Their own 1,024 take half a GB to fill."""


class Wrong(NamedTuple):
    """A request that is refused: how it is sent, and the status it has to get."""

    status: int
    content: bytes = b"{}"
    route: str | None = None
    method: str = "POST"
    headers: dict[str, str] = JSON


NONSENSE = (
    *(Wrong(400, content) for content in (b"", b"{", b"[]", b"null", b"\xff", b'{"x": 1}', b'{"stream": "yes"}')),
    *(Wrong(400, content, CHAT) for content in (b'{"messages": 1}', b'{"messages": []}', b'{"messages": [{"role": "boss"}]}')),
    Wrong(400, b'{"messages": [{"role": "user", "content": "a"}], "n": 1000}', CHAT),
    Wrong(400, b'{"messages": [{"role": "user", "content": "' + b"a b " * 3000 + b'"}]}', CHAT),
    Wrong(400, b'{"prompt": [1, -1]}', COMPLETION),
    Wrong(400, b'{"input": 3}', ANSWER),
    Wrong(400, b'{"messages": [{"role": "user", "content": "a"}]}', MESSAGE),
    Wrong(404, b'{"messages": [{"role": "user", "content": "a"}], "model": "other"}', CHAT),
    Wrong(404, route="/v1/nothing"),
    Wrong(405, b"", method="GET"),
    Wrong(415, headers={"content-type": "text/plain"}),
    Wrong(403, headers={**JSON, "host": "example.com"}),
    Wrong(403, headers={**JSON, "origin": "https://example.com"}),
)  # fmt: skip


class Server:
    """A server as a process, which can be started again at its port.

    Args:
        slots: of its engine.
        log: gets what it writes to its standard error.

    Attributes:
        stopping: whether a signal was sent, and it does not serve again yet.
        ended: processes that got one.
        cut: how often a connection that was not read was closed at the end all the same.
    """

    def __init__(self, slots: str, log: IO[str]) -> None:
        """Start it."""
        self.slots, self.log, self.port, self.exits = slots, log, 0, list[int]()
        self.stopping, self.ended, self.cut = False, set[int](), 0
        self.start()

    def start(self) -> None:
        """Start the process; it listens and loads when this returns, and serves behind `ready`."""
        words = [
            "serve",
            "--port",
            str(self.port),
            "--slots",
            self.slots,
            "--max-waiting",
            "24",
            "--prefix-memory",
            PREFIX_MEMORY,
        ]
        self.seen = self.log.tell()
        environment = {**os.environ, **SHAPES}
        self.process = subprocess.Popen([sys.executable, "-m", "expertflow", *words], stderr=self.log, env=environment)

    def written(self) -> str:
        """What this process has written so far."""
        return Path(self.log.name).read_text()[self.seen :]

    async def ready(self) -> str:
        """Wait until it serves; its address."""
        while "Ready" not in self.written():
            assert self.process.poll() is None, self.written()
            await asyncio.sleep(0.1)
        found = re.search(r"http://127.0.0.1:(\d+)", self.written())
        assert found is not None
        self.port, self.stopping = int(found[1]), False
        return found[0]

    async def stop(self, *, twice: bool = False) -> None:
        """Send SIGTERM, or two of them, and wait for the end."""
        self.stopping = True
        self.ended.add(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        if twice:
            await asyncio.sleep(0.3)
            self.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(self.process.wait, 60)
        self.exits.append(
            0 if twice and status == -signal.SIGTERM else status
        )  # it may come when all is over but the process
        text = [line for line in self.written().splitlines() if not line.startswith(("Listening at", "Ready: "))]
        self.cut += sum(UNREAD in line for line in text)
        assert all(UNREAD in line for line in text), text
        self.log.seek(0, 2)


class Client:
    """One client.

    Args:
        server: of its requests.
        http: carries them.
        seed: of what it does.
        seen: counts what it saw, for all clients.
    """

    def __init__(self, server: Server, http: httpx2.AsyncClient, seed: int, seen: Counter[str]) -> None:
        """Begin."""
        self.server, self.http, self.random, self.seen = server, http, random.Random(seed), seen

    def body(self, route: str, *, stream: bool = False) -> dict[str, Any]:
        """A request of random length."""
        words = "It was " * self.random.randint(1, 60)
        most = "max_output_tokens" if route == ANSWER else "max_tokens"
        key = {ANSWER: "input", COMPLETION: "prompt"}.get(route)
        asked = {key: words} if key else {"messages": [{"role": "user", "content": words}]}
        return {**asked, most: self.random.randint(1, 30), "stream": stream}

    async def run(self, end: float) -> None:
        """Do one thing after another."""
        things = (
            self.wrong, self.wrong, self.whole, self.whole, self.stream, self.stream, self.leave, self.impatient, self.turns,
            self.half, self.heavy, self.stalled,
        )  # fmt: skip
        while time.monotonic() < end:
            thing, number, sent_late = self.random.choice(things), self.server.process.pid, self.server.stopping
            try:
                found = await thing()
            except (httpx2.HTTPError, OSError, asyncio.IncompleteReadError) as error:
                late = sent_late or (thing == self.turns and number != self.server.process.pid)
                unread = thing == self.stalled and number in self.server.ended
                lost = "not read when the server ended" if unread else f"LOST {type(error).__name__} {error}"
                found = "nobody there" if late else lost
                await asyncio.sleep(0.2)
            self.seen[f"{thing.__name__}: {found}"] += 1

    def check(self, answer: httpx2.Response, *statuses: int) -> str:
        """The status, if it is one of these, and an error has its shape."""
        right = answer.status_code in statuses
        if answer.status_code != 200:
            right = right and self.shaped(answer.request.url.path, answer.json())
        return str(answer.status_code) if right else f"WRONG {answer.status_code} {answer.text[:80]}"

    @staticmethod
    def shaped(path: str, body: Any) -> bool:
        """Whether an error has the shape of its route's API."""
        if path.startswith(MESSAGE):
            return bool(body["type"] == "error" and set(body["error"]) == {"type", "message"})
        return set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}

    async def wrong(self) -> str:
        """A request that is refused; while the server loads or ends it may be refused for that."""
        one, busy = self.random.choice(NONSENSE), self.server.stopping
        request = self.http.build_request(
            one.method, one.route or self.random.choice(ROUTES), content=one.content, headers=one.headers
        )
        answer = await self.http.send(request)
        return self.check(answer, one.status, *((503,) if busy or self.server.stopping else ()))

    async def whole(self) -> str:
        """A whole answer."""
        route = self.random.choice(ROUTES)
        answer = await self.http.post(route, json=self.body(route))
        await asyncio.sleep(0.2 * (answer.status_code == 503))
        return self.check(answer, 200, 503)

    async def turns(self) -> str:
        """A chat of two turns; the second one has to be answered as the first one was."""
        body = self.body(CHAT)
        first = await self.http.post(CHAT, json=body)
        if first.status_code != 200:
            return self.check(first, 503)
        body["messages"] += [first.json()["choices"][0]["message"], {"role": "user", "content": "And then"}]
        return self.check(await self.http.post(CHAT, json=body), 200, 503)

    async def impatient(self) -> str:
        """A whole answer that the client may not wait for."""
        route = self.random.choice(ROUTES)
        try:
            timeout = 3 * self.random.random()
            return self.check(await self.http.post(route, json=self.body(route), timeout=timeout), 200, 503)
        except httpx2.TimeoutException:
            return "left"

    async def stream(self) -> str:
        """A stream that is read to its end, now and then slowly."""
        return await self._read(self.random.choice((0.0, 0.0, 0.1)), None)

    async def leave(self) -> str:
        """A stream that the client leaves."""
        return await self._read(0.0, self.random.randint(1, 15))

    async def _read(self, pause: float, most: int | None) -> str:
        route, number = self.random.choice(ROUTES), self.server.process.pid
        async with self.http.stream("POST", route, json=self.body(route, stream=True)) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return self.check(answer, 503)
            lines = list[str]()
            async for line in answer.aiter_lines():
                lines += [line] if line else []
                if most is not None and len(lines) >= most:
                    return "left"
                await asyncio.sleep(pause)
        return self.ended(route, lines, number)

    def ended(self, route: str, lines: list[str], number: int) -> str:
        """Whether a stream of a process ended as those of its route do: whole, or by an error in its shape if the process was ended."""
        frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        failed = [frame for frame in frames if "error" in frame.get("type", "") or "error" in frame]
        if failed:
            right = number in self.server.ended and (route == ANSWER or self.shaped(route, failed[0]))
            return "ended by the server" if right else f"WRONG frame {failed[0]}"
        last = lines[-1] if route in {CHAT, COMPLETION} else frames[-1]["type"]
        return (
            "200"
            if last in LAST[route].split("\n" if route in {CHAT, COMPLETION} else " ")
            else f"WRONG end {last[:80]}"
        )

    async def half(self) -> str:
        """A body that stops in its middle."""
        _, writer = await self._open(self.random.choice(ROUTES), b'{"messages": [', 500)
        await asyncio.sleep(self.random.random())
        writer.close()
        return "left"

    async def heavy(self) -> str:
        """A body that is said to be far too long."""
        route, busy = self.random.choice(ROUTES), self.server.stopping
        reader, writer = await self._open(route, b"", 10**12)
        try:
            status = await self._status(reader)
            body = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        finally:
            writer.close()
        right = self.shaped(route, body) and (status == "413" or (status == "503" and busy))
        return status if right else f"WRONG {status} {body}"

    async def stalled(self) -> str:
        """A stream of much text that is not read for seconds, by a client with little room; read to its end or left."""
        body = {"messages": [{"role": "user", "content": "It was"}], "max_tokens": 100, "n": 2, "ignore_eos": True}
        body |= {"logprobs": True, "top_logprobs": 20, "stream": True}
        content, stays, number = json.dumps(body).encode(), self.random.random() < 0.5, self.server.process.pid
        reader, writer = await self._open(CHAT, content, len(content), room=4096)
        try:
            await asyncio.sleep(self.random.randint(2, 8))
            if not stays:
                return "left"
            status, last = await self._status(reader), b""
            while part := await reader.read(4096):
                last = (last + part)[-20000:]
        finally:
            writer.close()
        if status != "200":
            return status if status == "503" and b'"code":' in last else f"WRONG {status} {last[-80:]!r}"
        lines = [line for line in last.decode(errors="replace").splitlines() if line.startswith("data: ")][-2:]
        if number in self.server.ended and b"[DONE]" not in last and b'"error"' not in last:
            return "not read when the server ended"
        return self.ended(CHAT, lines, number)

    async def _open(
        self, route: str, content: bytes, length: int, room: int = 2**16
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send the beginning of a request over a connection of its own; `room`: bytes that wait here to be read."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.server.port))
        reader, writer = await asyncio.open_connection(sock=connection, limit=room)
        head = f"POST {route} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {length}\r\n\r\n".encode() + content)
        await writer.drain()
        return reader, writer

    @staticmethod
    async def _status(reader: asyncio.StreamReader) -> str:
        """The status of an answer that begins."""
        words = (await reader.readline()).split()
        if len(words) < 2:
            raise ConnectionResetError("the connection ended without an answer")
        return words[1].decode()


async def watch(process: psutil.Process, end: float) -> list[int]:
    """The server's own memory, every ten seconds, bytes."""
    found = []
    while time.monotonic() < end:
        found.append(process.memory_full_info().uss)
        await asyncio.sleep(min(10.0, max(0.1, end - time.monotonic())))
    return found


async def restart(server: Server, begin: float, end: float, count: int) -> None:
    """Restart a server that many times from `begin` to `end`."""
    for place in range(count):
        await asyncio.sleep(max(0.0, begin + place * (end - begin) / count - time.monotonic()))
        await server.stop(twice=place % 2 == 1)
        server.start()
        await server.ready()


async def soak(server: Server, seconds: float, clients: int, restarts: int) -> dict[str, Any]:
    """Run the clients, then see that nothing is left of them."""
    url, seen = await server.ready(), Counter[str]()
    begin = time.monotonic()
    whole, end = begin + seconds * (2 / 3 if restarts else 1), begin + seconds
    limits = httpx2.Limits(max_connections=4 * clients)
    async with httpx2.AsyncClient(base_url=url, timeout=LONGEST_WAIT, limits=limits) as http:
        running = [Client(server, http, seed, seen).run(end) for seed in range(clients)]
        memory, *_ = await asyncio.gather(
            watch(psutil.Process(server.process.pid), whole), restart(server, whole, end, restarts), *running
        )
        await asyncio.sleep(2)
        health = (await http.get("/health")).json()
    await server.stop()
    left = health["running"] + health["waiting"]
    return {
        "seen": dict(sorted(seen.items())),
        "memory": memory,
        "left": left,
        "exits": server.exits,
        "cut": server.cut,
    }


def main() -> None:
    """Serve, soak, stop, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    seconds = 40.0 if options.tiny else options.seconds
    with tempfile.NamedTemporaryFile("w+", prefix="serve_soak") as log:
        server = Server(options.slots, log)
        try:
            found = asyncio.run(soak(server, seconds, options.clients, options.restarts))
        finally:
            server.process.kill()
    memory = found["memory"]
    half = memory[len(memory) // 2 :]
    result = {
        **about()._asdict(), "benchmark": "serve_soak", "seed": 0,
        "config": {"seconds": seconds, "clients": options.clients, "restarts": options.restarts, "slots": options.slots, "prefix_memory": PREFIX_MEMORY, **SHAPES},
        **found, "growth_second_half": half[-1] - half[0],
    }  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, count in found["seen"].items():
        print(f"{count:6d} {name}")
    print(f"left {found['left']}, exits {found['exits']}, memory MiB {[size >> 20 for size in memory[::6]]}")
    wrong = [name for name in found["seen"] if "WRONG" in name or "LOST" in name]
    sys.exit(bool(wrong or found["left"] or any(found["exits"])))


if __name__ == "__main__":
    main()
