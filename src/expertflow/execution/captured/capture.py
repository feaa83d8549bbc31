"""Capturing what is queued on a CUDA device as a graph. Must not know what is captured."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def graph_pool(device: torch.device) -> Any:
    """A memory pool for graphs on a device; None where there are no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def kept_bytes(pool: Any) -> int:
    """Device memory that a pool's graphs keep for themselves."""
    if pool is None:
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) == pool)


def capture(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """What `run` queues, as a graph; nothing is carried out.

    cuBLAS keeps a workspace for each stream for good. Dropped before, so that the graph gets one of its own memory, and
    after, so that this memory goes when the graphs go.
    """
    graph, line = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - as torch's own graph trees do; there is no public way
    try:
        mode = "thread_local"  # other threads may read totals of other models meanwhile, which waits for the device
        with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(line.device_index), capture_error_mode=mode):
            run()
    finally:
        torch.cuda.set_stream(line)  # after a failed capture its own stream would stay current
        torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001
    return graph


@cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """The stream that captures a device's graphs; torch's own is on the device that captured first."""
    return torch.cuda.Stream(device)
