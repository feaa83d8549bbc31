"""`expertflow trace info` and `trace import`: show what is in a trace, and convert a foreign one."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from expertflow.cli.record_bytes import bytes_of
from expertflow.cli.tables import facts_table
from expertflow.trace.format import PREFILL, open_trace, save_trace
from expertflow.trace.importer import import_folder
from expertflow.units import format_bytes


def info(*, path: Path, as_json: bool) -> None:
    """Show what is in a trace, reading it chunk by chunk."""
    trace = open_trace(path)
    header = trace.header
    phases: Counter[int] = Counter()
    known, used = 0, np.zeros((header.layers, header.experts + 1), dtype=np.int64)
    for rows in trace.read():
        phases.update(rows.phase.tolist())
        known += int((rows.tokens >= 0).sum())
        for layer in range(header.layers):
            used[layer] += np.bincount(rows.experts[:, layer].reshape(-1), minlength=header.experts + 1)
    shares = used[:, : header.experts] / np.maximum(used[:, : header.experts].sum(axis=1, keepdims=True), 1)
    facts: dict[str, Any] = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "model": header.model,
        "fingerprint": header.fingerprint,
        "layers": header.layers,
        "experts": header.experts,
        "top_k": header.top_k,
        "record_bytes": header.record_bytes,
        "rows": len(trace),
        "prefill_rows": phases[PREFILL],
        "decode_rows": len(trace) - phases[PREFILL],
        "sequences": len(trace.sequences),
        "sequences_with_repetition": sum(bool(entry.get("repetition")) for entry in trace.sequences),
        "rows_with_token": known,
        "vocabulary": len(trace.vocabulary),
        "busiest_expert_share": round(float(shares.max()), 4),
        "unused_experts": int((used[:, : header.experts] == 0).sum()),
        "source": header.source,
        "licence": header.licence,
    }
    if as_json:
        print(json.dumps(facts))  # noqa: T201 - the output
        return
    table = facts_table()
    facts["bytes"] = format_bytes(facts["bytes"])
    facts["record_bytes"] = format_bytes(header.record_bytes) if header.record_bytes else "unknown"
    for name, value in facts.items():
        if value != "":
            table.add_row(name.replace("_", " "), escape(str(value)))
    Console().print(table)


def convert(*, source: Path, out: Path, model: str, experts: int | None, note: str, record_mb: float | None) -> None:
    """Convert a folder of recorded routing into a trace."""
    record = 0 if record_mb is None else bytes_of(record_mb)
    trace = import_folder(source, model=model, experts=experts, source=note, record_bytes=record)
    save_trace(trace, out)
    header = trace.header
    Console(stderr=True).print(
        f"{escape(str(out))}: {len(trace)} rows of {len(trace.sequences)} sequences, {header.layers} layers x {header.experts} "
        f"experts, top-{header.top_k}, {format_bytes(out.stat().st_size)}"
    )
