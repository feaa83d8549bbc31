"""`expertflow plan`: what goes where, from config and shard headers alone."""

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils import logging as transformers_logging

from expertflow.config import EngineConfig
from expertflow.engine.llm import shipped_model
from expertflow.engine.plan import Plan
from expertflow.engine.prepare import Prepared, prepare
from expertflow.formats.plain import PLAIN
from expertflow.units import format_bytes


def main(*, model: str | None, engine: dict[str, Any], as_json: bool) -> None:
    """Plan and print."""
    transformers_logging.set_verbosity_error()
    config = EngineConfig.from_mapping({"max_batch": 1, **engine})
    prepared = prepare(shipped_model() if model is None else model, config, fetch=False)
    if as_json:
        print(json.dumps(as_dict(prepared.plan)))  # noqa: T201 - the output
    else:
        _show(prepared, prepared.skeleton.folder.name if model is None else model)


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain numbers, in bytes."""
    names = (
        "device",
        "execution",
        "strategy",
        "budget",
        "dense",
        "kv",
        "workspace",
        "graph",
        "predictor",
        "slots",
        "slot_bytes",
        "large",
        "total",
        "host",
        "prefix",
    )
    sizes = {
        name: getattr(plan, name)
        for name in (
            *names,
            "resident_total",
            "max_batch",
            "max_live",
            "schedule",
            "max_length",
            "kv_tokens",
            "prefill_chunk",
        )
    }
    shape = plan.shape
    return {
        "model_type": shape.model_type,
        "dtype": shape.dtype,
        "layers": shape.layers,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "expert_format": shape.expert_format or None,
        "notes": shape.notes,
        **sizes,
        "row": plan.record_bytes,
        "layer_bytes": plan.unequal_bytes,
        "large_layers": plan.slot_layout.large,
        "slot": plan.slot_layout.record_bytes,
        "formats": _formats(plan),
        "prompt_attention": plan.prompt_attention,
        "stall_seconds": plan.stall_seconds,
        "copies_seconds": plan.copies_seconds,
        "paced": plan.paced,
        "why_host": plan.graph_unavailable_reason,
        "why_no_prefix": plan.prefix_unavailable_reason,
    }


def _formats(plan: Plan) -> list[str]:
    """How weights of experts are stored: formats, or the number type of plain ones; biases do not count."""
    weights = [spec for layout in plan.shape.records.distinct.values() for spec in layout.specs if len(spec.shape) > 1]
    return sorted({spec.dtype if spec.format is PLAIN else spec.format.name for spec in weights})


def _packing(prepared: Prepared) -> str:
    """What an expert takes in files, in the store, and decoded; and how dense weights are stored."""
    plan, located = prepared.plan, prepared.located
    shape, decoded = plan.shape, plan.shape.records.decoded.record_bytes
    files = sum(piece.nbytes for piece in located.pieces) // shape.total_experts
    text = f"An expert takes {format_bytes(files)} in the files, " if files else "An expert takes "
    text += f"{format_bytes(plan.record_bytes)} in the store and {format_bytes(decoded)} in {shape.dtype}. "
    if dense := sorted({one.spec.format.name for one in located.packed.values()}):
        text += f"Dense weights are stored as {' and '.join(dense)} too, and are decoded to {shape.dtype} on loading. "
    if plan.slot_layout is not shape.records:
        text += f"A CPU decodes an expert once, when it is loaded: slots are of {shape.dtype}. "
    return text + "Only weights are packed: activations never are."


def _show(prepared: Prepared, name: str) -> None:
    plan = prepared.plan
    shape = plan.shape
    table = Table(title=f"{escape(name)}: {shape.model_type}, {shape.dtype}, on {plan.device}", title_justify="left")
    table.add_column("where", overflow="fold")
    table.add_column("what", overflow="fold")
    table.add_column("bytes", justify="right", overflow="fold")
    sequences = f"{plan.kv_tokens} tokens of {plan.max_live} sequences of up to {plan.max_length}"
    table.add_row("device", "dense weights", format_bytes(plan.dense))
    table.add_row("device", f"keys and values, {sequences}", format_bytes(plan.kv))
    workspace = f"workspace, {plan.prefill_chunk} tokens a prefill pass, attention by the {plan.prompt_attention}"
    table.add_row("device", workspace, format_bytes(plan.workspace))
    if plan.graph:
        table.add_row("device", "captured decode steps and their buffers", format_bytes(plan.graph))
    if plan.predictor:
        table.add_row("device", "predictor, its state and working memory", format_bytes(plan.predictor))
    table.add_row(
        "device",
        f"{plan.slots} expert slots of {format_bytes(plan.slot_layout.record_bytes)} ({plan.share:.1%})",
        format_bytes(plan.slot_bytes),
    )
    if plan.large:
        layers = ", ".join(map(str, plan.slot_layout.large))
        table.add_row("device", f"experts of large layers ({layers}), always resident", format_bytes(plan.large))
    table.add_section()
    budget = "" if plan.budget is None else f" of {format_bytes(plan.budget)}"
    table.add_row("device", "in all", f"[bold]{format_bytes(plan.total)}[/]{budget}")
    table.add_row("device", "in all with every expert resident", format_bytes(plan.resident_total))
    packed = shape.records.decoded is not shape.records
    how = (
        f"quantised to {shape.expert_format} on loading"
        if shape.expert_format
        else f"stored as {' and '.join(_formats(plan))}"
    )
    experts = f"{shape.layers} layers x {shape.experts} experts"
    table.add_row("host", f"{experts}, {how}" if packed else experts, format_bytes(plan.host))
    if plan.prefix:
        pieces = f"keys and values of earlier prompts, in pieces of {plan.prefix_piece} tokens"
        table.add_row("host", pieces, format_bytes(plan.prefix))
    console = Console()
    console.print(table)
    console.print(_meaning(plan))
    if packed:
        console.print(_packing(prepared))
    if plan.prefix_unavailable_reason:
        console.print(f"Note: every prompt is read whole: {escape(plan.prefix_unavailable_reason)}.")
    for note in shape.notes:
        console.print(f"Note: {escape(note)}.")


def _meaning(plan: Plan) -> str:
    """What the number of slots means for this model."""
    sizes = [size for layer, size in enumerate(plan.shape.records.layer_bytes) if layer not in plan.slot_layout.large]
    a_layer = plan.slots / len(sizes)
    text = (
        f"{a_layer:.1f} slots a layer; a token uses {plan.shape.top_k} of {plan.shape.experts} experts a layer. "
        f"With nothing kept, a token moves {format_bytes(plan.shape.top_k * sum(sizes))}."
    )
    text += _stall(plan)
    if plan.slots >= plan.competing:
        return text + " Every expert fits: after the first use nothing is moved."
    return text + f" The least budget that works is {format_bytes(plan.least)} ({plan.least} bytes)."


def _stall(plan: Plan) -> str:
    """How long a pass over prompts keeps other sequences waiting; empty on a CPU."""
    stall, copies, pace = plan.stall_seconds, plan.copies_seconds, plan.pace
    if stall is None or copies is None:
        return ""
    text = f" A pass of up to {plan.prefill_chunk} prompt tokens keeps other sequences waiting {stall:.3f} s at most; "
    text += f"its copies alone take {copies:.3f} s."
    if pace is None:
        return text
    fits = min(plan.prefill_chunk, pace.tokens(plan.max_length, pace.bound))
    if fits >= pace.least:
        return text + f" Behind {plan.max_length} tokens it has {fits}."
    return (
        text
        + f" Behind {plan.max_length} tokens it has {pace.least}, the least, whose attention takes longer than the copies."
    )
