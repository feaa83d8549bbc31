"""`--model` beside a trace: whether the trace is of this checkpoint, and how large one expert's record is."""

from pathlib import Path

from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.trace.format import check_model, open_trace


def record_bytes_of(model: str, trace: Path) -> tuple[int, tuple[int, ...]]:
    """Bytes of one expert's record of a checkpoint, and of each layer's if they differ, from its headers alone.

    Args:
        model: checkpoint folder, or a Hugging Face id in the local cache.
        trace: has to be of this model's shape.

    Raises:
        TraceError: if the trace is of another model.
        ExpertFlowError: if the checkpoint cannot be planned.
    """
    prepared = prepare(model, EngineConfig(device="cpu"), fetch=False)
    shape = prepared.plan.shape
    check_model(open_trace(trace).header, layers=shape.layers, experts=shape.experts, top_k=shape.top_k)
    return prepared.plan.record_bytes, prepared.plan.unequal_bytes
