"""The live page at `/`: one static file, and the numbers that it asks for once a second. Must not know HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertflow.serve.metrics import Metrics

if TYPE_CHECKING:
    from expertflow.serve.worker import Snapshot, Worker

PAGE = Path(__file__).with_suffix(".html").read_bytes()
"""The page."""


def stats_of(model: str, worker: "Worker", snapshot: "Snapshot", metrics: Metrics) -> dict[str, Any]:
    """What the page shows: totals, of which it shows what was added since it last asked, and what is in the slots.

    Args:
        model: its name.
        worker: owns the engine.
        snapshot: of the engine, between two steps.
        metrics: what clients got.
    """
    stats, plan, (first, late) = snapshot.stats, snapshot.plan, metrics.first_tokens()
    return {
        "model": model, "time": snapshot.taken, "running": worker.running, "waiting": worker.waiting,
        "tokens": stats.tokens, "hits": stats.cache.hits, "misses": stats.cache.loads, "ahead": stats.cache.prefetched,
        "wasted": stats.cache.wasted, "bytes": stats.cache.bytes_moved, "first": first, "late": late,
        "slots": plan.slots, "experts": plan.competing, "kv": snapshot.kv_share, "peak": stats.peak_bytes,
        "planned": plan.total, "budget": plan.budget, "execution": plan.execution,
        "predictor": "at work" if snapshot.predicted else "none",
        "resident": ["".join("1" if slot >= 0 else "0" for slot in layer) for layer in snapshot.slot_of.tolist()],
    }  # fmt: skip
