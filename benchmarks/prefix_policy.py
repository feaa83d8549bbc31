"""What chats need not read again, beside many short requests of which each comes once: by what the memory drops first.

Draws chats that take turns and grow, short requests such as titles, and now and then a long document that is asked about once.
Each goes through the real `BlockStore` without a model: what is kept of its beginning is a hit, then its own blocks are kept.
`worth` 0 drops the least recently used block; the package has `WORTH`. A perfect memory has no bound.

Usage: python benchmarks/prefix_policy.py [--out FILE] [--requests 2000] [--seeds 2]
       --tiny: 300 requests, one seed
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from expertflow.bench.about import about
from expertflow.execution.kv.blocks import WORTH, BlockStore, names_of
from expertflow.memory.arena import HostArena

PIECE, BYTES = 4, 8
"""Tokens of a block, few for speed, and bytes that stand for its keys and values."""
SYSTEM = 8
"""Blocks that all chats begin with; short requests have their own two."""
SHARES = (0.3, 0.5, 0.8, 0.95)
"""Short requests of all."""
LONGEST = (40, 120)
"""Blocks of a chat's first prompt at most, beside those of `SYSTEM`."""
ROOMS = (100, 300, 1000)
"""Blocks that fit."""
WORTHS = (0.0, WORTH, 2 * WORTH)


class Memory:
    """What is kept, as `PrefixCache` keeps it."""

    def __init__(self, room: int, worth: float) -> None:
        """Start with nothing."""
        self.store = BlockStore(HostArena(room * BYTES, pin=False), worth)

    def ask(self, names: list[bytes]) -> int:
        """Read a prompt, given as names of its blocks; the blocks of its beginning that were there."""
        hits = next((place for place, name in enumerate(names) if name not in self.store), len(names))
        self.store.use(names[:hits])
        for name in names[hits:]:
            if self.store.put(self.store.add(name), 0, 0, BYTES, frozenset(names)) is None:
                self.store.remove(name)
                break
        self.store.use(names)
        return hits


def requests(seed: int, count: int, share: float, longest: int) -> list[tuple[str, list[bytes]]]:
    """Kinds and prompts, as names of their blocks; the same for every memory."""
    draw, fresh, chats = random.Random(seed), iter(range(10**9)), list[list[int]]()

    def blocks(number: int) -> list[int]:
        return [next(fresh) for _ in range(number * PIECE)]

    system, title, found = blocks(SYSTEM), blocks(2), list[tuple[str, list[bytes]]]()

    def ask(kind: str, tokens: list[int]) -> None:
        found.append((kind, names_of(tokens, PIECE)))

    while len(found) < count:
        if draw.random() < share:
            ask("title", title + blocks(draw.randint(1, 4)))
        elif draw.random() < 0.02:
            ask("document", blocks(60))
        else:
            if len(chats) < 6 or draw.random() < 0.08:
                chats = [*chats[-5:], system + blocks(draw.randint(1, longest))]
            chat = draw.choice(chats)
            ask("chat", chat)
            chat += blocks(draw.randint(1, 6))
    return found


def hits(drawn: list[list[tuple[str, list[bytes]]]], room: int, worth: float) -> int:
    """Blocks of chats that were there."""
    memories = [Memory(room, worth) for _ in drawn]
    found = [(kind, memory.ask(names)) for asked, memory in zip(drawn, memories, strict=True) for kind, names in asked]
    return sum(count for kind, count in found if kind == "chat")


def measure(count: int, seeds: int) -> Iterator[dict[str, Any]]:
    """One row a load and room: blocks of chats that were there, as a share of those that a memory without bound has."""
    for longest in LONGEST:
        for share in SHARES:
            drawn = [requests(seed, count, share, longest) for seed in range(seeds)]
            most = hits(drawn, 10**6, 0.0)
            for room in ROOMS:
                found = {str(worth): round(hits(drawn, room, worth) / most, 4) for worth in WORTHS}
                yield {"longest": longest, "titles": share, "room": room, "hits": found}


def main() -> None:
    """Draw, keep, report each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    count, seeds = (300, 1) if options.tiny else (options.requests, options.seeds)
    config = {"requests": count, "seeds": seeds, "piece": PIECE, "worth": WORTH}
    rows: list[dict[str, Any]] = []
    result = {**about()._asdict(), "benchmark": "prefix_policy", "seed": 0, "config": config, "rows": rows}
    for row in measure(count, seeds):
        print(row, flush=True)
        rows.append(row)
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
