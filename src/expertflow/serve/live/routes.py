"""The live page at `/`, and the stream of events at `/live` that feeds it: one a second, the totals and the experts' map.

An event holds totals, so a reader makes rates of two of them. Must not know the engine beyond its snapshots.
"""

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

if TYPE_CHECKING:
    from expertflow.serve.live.snapshots import Snapshot
    from expertflow.serve.service import Service

SECONDS = 1.0
"""Time between two events."""
PAGE = Path(__file__).parent / "index.html"
_RESIDENT, _MOST = 128, 127
"""A byte of the map: the bit of a resident, and the largest share of steps that used the expert."""
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def page(_: Request) -> Response:
    """The page; it holds no data, so it needs no key."""
    return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=_PAGE_HEADERS)


def stream(service: "Service") -> Response:
    """The answer of `/live`: events until the client leaves or the server ends."""
    return StreamingResponse(events(service), media_type="text/event-stream", headers=_STREAM_HEADERS)


async def events(service: "Service") -> AsyncIterator[bytes]:
    """One event a second, the first at once; ends when the server begins to end."""
    worker, before = service.worker, None
    while not worker.draining:
        snapshot = await worker.snapshot(SECONDS)
        yield b"data: " + orjson.dumps(event(service, snapshot, before)) + b"\n\n"
        before = snapshot
        await asyncio.sleep(SECONDS)


def event(service: "Service", snapshot: "Snapshot | None", before: "Snapshot | None") -> dict[str, Any]:
    """What one event says.

    Args:
        service: what is served.
        snapshot: the engine now; None: the model is being loaded.
        before: the engine at the last event, for the experts' use since then; None: since the start.
    """
    worker, loading = service.worker, service.worker.loading
    first = sorted(service.metrics.first_tokens)
    found = {
        "model": service.names.served[0], "phase": loading.phase, "loaded": [loading.done, loading.total],
        "running": worker.running, "waiting": worker.waiting, "refused": sum(worker.refused.values()),
        "first_token": {"count": len(first), "p50": _quantile(first, 0.5), "p95": _quantile(first, 0.95)},
    }  # fmt: skip
    if snapshot is None:
        return found
    stats, plan, cache = snapshot.stats, snapshot.plan, snapshot.stats.cache
    return {
        **found,
        "time": snapshot.taken, "busy": stats.seconds, "tokens": stats.tokens, "prompt_tokens": stats.prompt_tokens,
        "steps": cache.steps, "clean": cache.clean_steps, "hits": cache.hits, "corrections": cache.loads,
        "forecast": cache.forecast, "foreseen": cache.foreseen, "ahead": cache.prefetched, "ahead_used": cache.prefetch_hits,
        "wasted": cache.wasted, "evictions": cache.evictions, "bytes": cache.bytes_moved, "link": loading.link,
        "slots": plan.slots, "competing": plan.competing, "kv": snapshot.kv_share,
        "memory": {"planned": plan.total, "peak": stats.peak_bytes, "budget": plan.budget},
        "predictor": snapshot.predictor, "device": plan.device, "execution": plan.execution, "strategy": plan.strategy,
        "layers": plan.shape.layers, "experts": plan.shape.experts, "map": _map(snapshot, before),
    }  # fmt: skip


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The value that so large a share is not above; None of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _map(snapshot: "Snapshot", before: "Snapshot | None") -> str:
    """A byte an expert, layer by layer, in base64: 128 if it is resident, plus the share of steps that used it, 0 to 127."""
    uses, steps = snapshot.view.uses, snapshot.stats.cache.steps
    if before is not None:
        uses, steps = uses - before.view.uses, steps - before.stats.cache.steps
    share = np.minimum(np.ceil(uses / max(1, steps) * _MOST), _MOST)
    return base64.b64encode((share + snapshot.view.resident * _RESIDENT).astype(np.uint8).tobytes()).decode()


def add_live(route: "Callable[[str], Callable[[Any], Any]]", service: "Service") -> None:
    """Add both routes."""
    route("/")(page)

    @route("/live")
    async def live(_: Request) -> Response:
        return stream(service)
