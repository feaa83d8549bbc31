"""Prompts at full size: time to the first token when experts are streamed, and what the decode set loses by it.

Shape Q of `engine_h100.py` (12 layers x 128 experts, random weights). Four sequences decode for a while, so that the cache
holds what decoding needs; then a prompt of random tokens is read by the host execution: every expert it needs, double
buffered. Beside it the copy engine's time for the bytes, the turns of one slot at a time (as on a CPU), and how many of
the experts the decode steps used and had are still there afterwards.

Usage: python benchmarks/prefill_h100.py [--out FILE]
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_h100 import SEED, make_world

from expertflow.cache.controller import CacheController
from expertflow.cache.strategy import STRATEGIES
from expertflow.events import CacheCounters, EventStream
from expertflow.execution.provider import CachedExperts
from expertflow.execution.runner import DecoderBatch
from expertflow.memory.slots import SlotPool
from expertflow.memory.transfer import PlainTransfer, StreamTransfer
from expertflow.models.context import ForwardContext
from expertflow.models.load import bind_experts, unbind_experts

COPY_ENGINE = 53.5e9
"""Bytes a second, from kernels_h100.json."""
BATCH, DECODED, REPEATS = 4, 24, 3


@torch.inference_mode()
def measure(world: Any, name: str, wave: int, slots: int, tokens: int) -> dict[str, Any]:
    """One strategy, prompts of one length."""
    events, counters = EventStream(), CacheCounters()
    events.subscribe(counters.count)
    strategy = replace(STRATEGIES[name], wave=wave)
    controller = CacheController(
        layers=world.shape.layers, experts=world.shape.experts, slots=slots, strategy=strategy,
        record_bytes=world.store.layout.record_bytes, events=events,
    )  # fmt: skip
    pool = SlotPool(world.store.layout, slots, world.device)
    transfer = (StreamTransfer if world.device.type == "cuda" else PlainTransfer)(world.store, pool)
    provider = CachedExperts(controller, transfer, pool)
    bind_experts(world.model, world.skeleton, provider)
    hook = world.model.register_forward_pre_hook(lambda *_: provider.begin_step(None))
    random = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> list[Any]:
        return torch.randint(3, world.shape.vocabulary, shape, generator=random).tolist()

    row: dict[str, Any] = {
        "strategy": name,
        "wave": wave,
        "slots": slots,
        "tokens": tokens,
        "ms": [],
        "loads": [],
        "kept": [],
    }
    for _ in range(REPEATS + 1):
        batch = DecoderBatch(world.model, draw(BATCH, 8), 512, ForwardContext())
        batch.prefill()
        recent = np.zeros_like(controller.tables.slot_of, dtype=np.int64)
        for _ in range(DECODED):
            before = controller._ranker.usage.count.copy()  # noqa: SLF001 - what the steps used
            batch.decode(draw(BATCH))
            controller.end_step()
            recent += controller._ranker.usage.count > before  # noqa: SLF001
        hot = (recent >= DECODED // 2) & (controller.tables.slot_of >= 0)
        prompt, loads = DecoderBatch(world.model, draw(1, tokens), tokens, ForwardContext()), counters.loads
        _sync(world.device)
        began = time.perf_counter()
        prompt.prefill().argmax(-1).tolist()
        row["ms"].append((time.perf_counter() - began) * 1e3)
        row["loads"].append(counters.loads - loads)
        row["kept"].append(float((controller.tables.slot_of[hot] >= 0).mean()))
    for name_ in ("ms", "loads", "kept"):
        del row[name_][0]
    transfer.settle()
    hook.remove()
    unbind_experts(world.model, world.skeleton)
    row["floor_ms"] = [count * world.store.layout.record_bytes / COPY_ENGINE * 1e3 for count in row["loads"]]
    return row


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = make_world("q", device, tiny=device.type == "cpu")
    slots, rows = world.shape.total_experts // 4, []
    for tokens in (64, 512):
        for name, wave in (("next-use", 1), ("next-use", 2), ("lru", 1), ("lru", 2)):
            rows.append(row := measure(world, name, wave, slots, tokens))
            ms, loads, kept, floor = (statistics.median(row[k]) for k in ("ms", "loads", "kept", "floor_ms"))
            print(f"{tokens:4d} tokens {name:9s} turns of {wave}: {ms:7.1f} ms ({min(row['ms']):.1f}-{max(row['ms']):.1f}), copies alone {floor:7.1f} ms, {loads:5.0f} loads, "
                  f"{kept:.0%} of the decode set kept", flush=True)  # fmt: skip
    result = {
        "benchmark": "prefill", "date": time.strftime("%Y-%m-%d"), "seed": SEED, "rows": rows,
        "machine": {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "config": {"shape": "q", "batch": BATCH, "decoded": DECODED, "copy_engine_bytes_per_second": COPY_ENGINE},
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    world.store.close()


if __name__ == "__main__":
    main()
