"""Tables of packed experts on an H200, from the files of `engine_h100.py --formats`, `first_token.py` and `packed_kernels.py`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 2**30
SHAPES = {
    "gpt-oss-20b": ("engine_g_quarter_h200", "engine_g_packed_h200", "engine_g_lanes_h200"),
    "gpt-oss-20b, an earlier day": ("engine_g_beside_h200",),
    "gpt-oss-120b": ("engine_g120_h200",),
    "Qwen3-30B-A3B": (
        "engine_q30_h200",
        "engine_q30_beside_h200",
        "engine_q30_again_h200",
        "engine_q30_bf16_h200",
        "engine_q30_bf16_more_h200",
    ),
}
"""Result files by shape. Of a configuration and number of sequences that are in several, the last one counts."""
BATCHES = (1, 4, 8, 16)
PEERS = (
    ("gpt-oss-20b", "mxfp4", "FreeToken 0.2.1, 50 % of the experts", 11183 / 1024, (179, 171, 69, 100)),
    ("gpt-oss-20b", "mxfp4", "llama.cpp 0.5.0, half of the layers on 16 cores", 8751 / 1024, (30, 72, 75, 79)),
)  # fmt: skip
"""Measured on another H200 on 2026-11-29: tokens a second at each batch, and GiB as the driver counts them."""


def measured() -> dict[str, list[dict[str, Any]]]:
    """Results by shape."""
    return {shape: [read(name) for name in names] for shape, names in SHAPES.items()}


Kind = tuple[str, str, str]
"""Format, share or budget, strategy."""


def kinds(results: Sequence[dict[str, Any]]) -> dict[Kind, dict[int, tuple[dict[str, Any], dict[str, Any]]]]:
    """By configuration and batch: a row, behind the result it is of."""
    found: dict[Kind, dict[int, tuple[dict[str, Any], dict[str, Any]]]] = {}
    for result in results:
        shares, count = result["config"]["shares"].split(","), dict[tuple[str, str, int], int]()
        for row in result["rows"]:  # rows are in order of share, then batch, strategy, format
            key = row["format"], row["strategy"], row["batch"]
            place = count[key] = count.get(key, -1) + 1
            share = shares[place] if shares[place].endswith("B") else f"{float(shares[place]):.0%}"
            found.setdefault((row["format"], share, row["strategy"]), {})[row["batch"]] = result, row
    return found


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
    for shape, results in measured().items():
        found = kinds(results)
        for packed in dict.fromkeys(kind[0] for kind in found):
            those = {kind: of for kind, of in found.items() if kind[0] == packed}
            resident = {
                batch: statistics.median(result["resident_ms"][f"{packed} {batch}"])
                for result in results for batch in BATCHES if f"{packed} {batch}" in result["resident_ms"]
            }  # fmt: skip
            shown = [f"{batch / resident[batch] * 1e3:.0f}" if batch in resident else "" for batch in BATCHES]
            whole = max(
                row["peak_bytes"] + (result["experts"] - row["slots"]) * row["record_bytes"]
                for of in those.values() for result, row in of.values()
            )  # fmt: skip
            lines.append(f"| {shape} | {packed} | {whole / GIB:.1f} GiB | all resident | {' | '.join(shown)} |")
            if best_only:
                best = "plec" if any(kind[2] == "plec" for kind in those) else "next-use"
                those = {kind: of for kind, of in those.items() if kind[2] == best and len(of) > 1}
            for (_, share, strategy), of in those.items():
                peak = max(row["peak_bytes"] for _, row in of.values())
                cells = [_cell(*of[batch]) if batch in of else "" for batch in BATCHES]
                stated = "" if share.endswith("B") else f", {share}"
                lines.append(
                    f"| {shape} | {packed}{stated} | {peak / GIB:.1f} GiB | {strategy} | {' | '.join(cells)} |"
                )
        lines += [
            f"| {shape} | {packed} | {memory:.1f} GiB | {who} | {' | '.join(map(str, speeds))} |"
            for of, packed, who, memory, speeds in PEERS if of == shape
        ]  # fmt: skip
    return lines


def _cell(result: dict[str, Any], row: dict[str, Any]) -> str:
    speed = row["batch"] / statistics.median(row["ms"]) * 1e3
    wrong = "" if row["tokens_equal"] and row["logits_equal"] else ", other bits"
    return f"{speed:.0f} ({bound(result, row) / statistics.median(row['ms']):.2f}{wrong})"


def notes(shapes: Sequence[str] = tuple(SHAPES)) -> str:
    """Machine, exactness and memory of some shapes, as a paragraph."""
    results = [result for shape, of in measured().items() if shape in shapes for result in of]
    rows = [row for result in results for row in result["rows"]]
    wrong = sum(not (row["tokens_equal"] and row["logits_equal"]) for row in rows)
    exact = "yes" if not wrong else f"in {len(rows) - wrong} of {len(rows)} rows"
    inside = all(row["peak_bytes"] <= row["budget_bytes"] for row in rows)
    machine, versions = results[0]["machine"], results[0]["versions"]
    return (
        f"{machine['device']}, torch {versions['torch']}; tokens a second, medians of 3 windows (share of the bound: loads at the link's best, or the "
        "all-resident step); routing of gpt-oss-20b recorded, else of random tokens. Tokens and logits equal to the all-resident graph's: "
        f"{exact}; peak within the plan: {'yes' if inside else 'NO'}. Rivals: another H200, 2026-11-29; llama.cpp routes by its "
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
    for shape, result in ((shape, result) for shape, results in measured().items() for result in results):
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
