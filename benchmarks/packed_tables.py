"""Tables of packed experts on an H200, from the files of `engine_h100.py --formats`, `first_token.py` and `packed_kernels.py`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
SHAPES = {
    "gpt-oss-20b": "engine_g_packed_h200",
    "gpt-oss-20b, an earlier day": "engine_g_beside_h200",
    "gpt-oss-120b": "engine_g120_h200",
    "Qwen3-30B-A3B": "engine_q30_h200",
}
"""Result files by shape; those that are not there have no rows."""
BATCHES = (1, 4, 8, 16)
PEERS = (
    ("gpt-oss-20b", "mxfp4", "FreeToken 0.2.1, 50 % of the experts", 11183 / 1024, (179, 171, 69, 100)),
    ("gpt-oss-20b", "mxfp4", "llama.cpp 0.5.0, half of the layers on 16 cores", 8751 / 1024, (30, 72, 75, 79)),
)  # fmt: skip
"""Measured on another H200 on 2026-11-29: tokens a second at each batch, and GiB as the driver counts them."""


def measured() -> dict[str, dict[str, Any]]:
    """Results by shape."""
    return {shape: read(name) for shape, name in SHAPES.items() if (RESULTS / f"{name}.json").is_file()}


def read(name: str) -> dict[str, Any]:
    """A result file."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def bound(result: dict[str, Any], row: dict[str, Any]) -> float:
    """Milliseconds a step takes at least: its loads at the link's best, or the step with every expert resident."""
    loads = statistics.median(row["carried"])
    return float(max(row["resident_ms"], loads * row["record_bytes"] / result["bounds"]["link_bytes_per_second"] * 1e3))


def packed_lines(best_only: bool) -> list[str]:  # noqa: FBT001 - one table in two lengths
    """Tokens a second by shape, format, memory and strategy; behind each the share of its bound."""
    lines = ["| shape | experts | GPU memory | what | 1 | 4 | 8 | 16 |", "|---" * 8 + "|"]
    for shape, result in measured().items():
        rows: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
        shares = result["config"]["shares"].split(",")
        count = {}
        for row in result["rows"]:  # rows are in order of share, then batch, strategy, format
            key = row["format"], row["strategy"], row["batch"]
            place = count[key] = count.get(key, -1) + 1
            rows.setdefault((row["format"], shares[place], row["strategy"]), {})[row["batch"]] = row
        resident = result["resident_ms"]
        for packed in dict.fromkeys(kind[0] for kind in rows):
            shown = [
                f"{batch / statistics.median(resident[f'{packed} {batch}']) * 1e3:.0f}"
                if f"{packed} {batch}" in resident else "" for batch in BATCHES
            ]  # fmt: skip
            whole = max(
                row["peak_bytes"] + (result["experts"] - row["slots"]) * row["record_bytes"]
                for kind, of in rows.items() if kind[0] == packed for row in of.values()
            )  # fmt: skip
            lines.append(f"| {shape} | {packed} | {whole / GIB:.1f} GiB | all resident | {' | '.join(shown)} |")
            best = [kind for kind in rows if kind[0] == packed]
            if best_only:
                names = {kind[2] for kind in best}
                best = [kind for kind in best if kind[2] == ("plec" if "plec" in names else "next-use")]
            for kind in best:
                of = rows[kind]
                if best_only and len(of) == 1:  # it ended before the others were measured
                    continue
                peak = max(row["peak_bytes"] for row in of.values())
                cells = [_cell(result, of[batch]) if batch in of else "" for batch in BATCHES]
                share = f", {float(kind[1]):.0%}" if not kind[1].endswith("B") else ""
                lines.append(f"| {shape} | {packed}{share} | {peak / GIB:.1f} GiB | {kind[2]} | {' | '.join(cells)} |")
        lines += [
            f"| {shape} | {packed} | {memory:.1f} GiB | {who} | {' | '.join(map(str, speeds))} |"
            for of, packed, who, memory, speeds in PEERS if of == shape
        ]  # fmt: skip
    return lines


def _cell(result: dict[str, Any], row: dict[str, Any]) -> str:
    speed = row["batch"] / statistics.median(row["ms"]) * 1e3
    return f"{speed:.0f} ({bound(result, row) / statistics.median(row['ms']):.2f})"


def notes(shapes: Sequence[str] = tuple(SHAPES)) -> str:
    """Machine, exactness and memory of some shapes, as a paragraph."""
    results = [result for shape, result in measured().items() if shape in shapes]
    rows = [row for result in results for row in result["rows"]]
    exact = all(row["tokens_equal"] and row["logits_equal"] for row in rows)
    inside = all(row["peak_bytes"] <= row["budget_bytes"] for row in rows)
    machine, versions = results[0]["machine"], results[0]["versions"]
    return (
        f"{machine['device']}, torch {versions['torch']}; tokens a second, medians of 3 windows (share of the bound: loads at the link's best, or the "
        "all-resident step); routing of gpt-oss-20b recorded, else of random tokens. Tokens and logits equal to the all-resident graph's: "
        f"{'yes' if exact else 'NO'}; peak within the plan: {'yes' if inside else 'NO'}. Rivals: another H200, 2026-11-29; llama.cpp routes by its "
        "own random router."
    )


def front() -> str:
    """The README's table: gpt-oss-20b's shape as published, its memory and speed, and its rivals."""
    head, rule, *lines = packed_lines(best_only=False)
    shape, packed = "| gpt-oss-20b |", " mxfp4"
    kept = [line.removeprefix(shape) for line in lines if line.startswith(shape + packed)]
    titles = head.removeprefix("| shape |").replace("| what |", "| what | 1 sequence |").replace("| 1 |", "|")
    return "\n".join(
        [f"|{titles}", rule.removesuffix("---|"), *(f"|{line}" for line in kept), "", notes(("gpt-oss-20b",))]
    )


def packed() -> str:
    """Packed experts and plain ones, the best strategy."""
    return "\n".join([*packed_lines(best_only=True), "", notes()])


def packed_whole() -> str:
    """Packed experts and plain ones, every strategy."""
    return "\n".join([*packed_lines(best_only=False), "", notes()])


def packed_loads() -> str:
    """Loads and the link of every row."""
    lines = [
        "| shape | experts | slots | sequences | strategy | ms a step | loads (ahead) | link GB/s | all-resident ms | GiB (budget) |",
        "|---" * 10 + "|",
    ]
    for shape, result in measured().items():
        for row in result["rows"]:
            ms, loads, ahead = (statistics.median(row[key]) for key in ("ms", "carried", "ahead"))
            lines.append(
                f"| {shape} | {row['format']} | {row['slots']} | {row['batch']} | {row['strategy']} | {ms:.2f} "
                f"({min(row['ms']):.2f}-{max(row['ms']):.2f}) | {loads:.1f} ({ahead:.1f}) | "
                f"{loads * row['record_bytes'] / ms / 1e6:.1f} | {row['resident_ms']:.2f} | "
                f"{row['peak_bytes'] / GIB:.2f} ({row['budget_bytes'] / GIB:.2f}) |"
            )
    return "\n".join(lines)


def first_token() -> str:
    """Seconds to the first token of a prompt, beside the link's time for what is loaded."""
    result = read("first_token_h200")
    lines = ["| experts | tokens | seconds (smallest-largest) | link's time | GB loaded |", "|---" * 5 + "|"]
    for row in result["rows"]:
        seconds = row["seconds"]
        lines.append(
            f"| {row['format']} | {row['tokens']:,} | {statistics.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f}) | "
            f"{statistics.median(row['link_seconds']):.3f} | {statistics.median(row['bytes_moved']) / 1e9:.2f} |"
        )
    return "\n".join(lines)


def kernels() -> str:
    """Expert kernels by format: microseconds of a layer, and the share of the time that reading the weights takes."""
    result, later = read("packed_kernels_h200"), read("packed_kernels_nvfp4_h200")
    rows = [row for row in result["rows"] if row["format"] != "nvfp4"]
    rows += [row for row in later["rows"] if row["format"] == "nvfp4"]
    lines = ["| shape | experts | projection | 1 token | 4 | 16 | 64 |", "|---" * 7 + "|"]
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in rows:
        key = row["shape"], row["format"], row["projection"]
        found.setdefault(key, {})[row["tokens"]] = f"{row['us']:.1f} ({row['share']:.2f})"
    for (shape, packed, projection), cells in found.items():
        lines.append(
            f"| {shape} | {packed} | {projection} | {' | '.join(cells[tokens] for tokens in (1, 4, 16, 64))} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            (
                f"Read rate of the same run: {result['read_bytes_per_second'] / 1e12:.2f} TB/s; of the one of NVFP4 "
                f"{later['read_bytes_per_second'] / 1e12:.2f}."
            ),
        ]
    )
