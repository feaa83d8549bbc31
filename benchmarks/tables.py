"""Tables of README.md and docs/, and the pages under docs/results/, written from the result files and from the code.

Usage: python benchmarks/tables.py            prints every table of the documents
       python benchmarks/tables.py --write    puts them between their markers
       python benchmarks/tables.py --results  writes docs/results/: one page a result, with pictures (not committed)

A test compares the documents with what this file makes.
"""

import ast
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packed_tables
from matplotlib.figure import Figure

from expertflow.bench.pages import figures
from expertflow.bench.pages.report import section
from expertflow.bench.result import BELADY, DECODE, MOVED, PEAK, RESIDENT, WARM, Result, Row, read_result
from expertflow.cli.main import app
from expertflow.cli.strategies import page as strategies_page
from expertflow.serve.protocol.fields import TABLES, Use

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "expertflow"
RESULTS = ROOT / "benchmarks" / "results"
GIB = 2**30


def _median(values: list[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def host_execution() -> str:
    """Memory, speed and link of host execution at the size of Qwen1.5-MoE-A2.7B."""
    result: dict[str, Any] = json.loads((RESULTS / "host_execution_h100.json").read_text())
    resident = result["resident"]
    lines = [
        "| strategy | slots | batch | peak GiB (budget) | decode tokens/s | hit ratio | link GB/s decode | first token s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for batch, speeds in resident["tokens_per_second"].items():
        peak = f"{resident['peak_bytes'] / GIB:.2f}"
        lines.append(f"| all resident, stock | 100% | {batch} | {peak} | {_median(speeds)} | 1 | 0 | |")
    for row in result["rows"]:
        cells = (
            row["strategy"],
            row["share"],
            str(row["batch"]),
            f"{row['peak_bytes'] / GIB:.2f} ({row['budget_bytes'] / GIB:.2f})",
            _median(row["decode_tokens_per_second"]),
            f"{row['decode_hit_ratio']:.3f}",
            _median(row["decode_link_gb_per_second"]),
            _median(row["first_token_seconds"], 2),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _circumstances(result)]
    return "\n".join(lines)


def _circumstances(result: dict[str, Any]) -> str:
    """Machine, repeats, exactness, roofline and loading, as a paragraph."""
    loading, environment = result["loading"], result["environment"]
    cold, cached = loading["cold"], loading["cached"]
    return (
        f"{environment['device']}, torch {environment['torch']}, transformers {environment['transformers']}; medians of "
        f"{result['settings']['repeats']} (smallest-largest). Logits bit-equal to the stock resident model in every row: "
        f"{'yes' if result['bit_equal'] else 'NO'}. Copies of one record reach "
        f"{result['link_gb_per_second']:.1f} GB/s back to back. Loading {cold['store_bytes'] / GIB:.1f} GiB of experts: "
        f"{cold['seconds']:.1f} s from a disk that reads {loading['disk_bytes_per_second'] / 1e9:.2f} GB/s, "
        f"{cached['seconds']:.1f} s from the page cache; peak host memory {cold['host_peak_over_store']:.4f} times the store."
    )


def policies() -> str:
    """Share of needs kept, by strategy, slots and live sequences, on the gpt-oss-20b trace."""
    cells = json.loads((RESULTS / "simulate_gpt_oss_20b.json").read_text())["cells"]
    names = list(dict.fromkeys(cell["strategy"] for cell in cells))
    kept = {(cell["batch"], cell["share"], cell["strategy"]): cell["kept_ratio"] for cell in cells}
    lines = [f"| live sequences | slots | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for batch, share in dict.fromkeys((batch, share) for batch, share, _ in kept):
        row = (f"{kept[batch, share, name]:.3f}" for name in names)
        lines.append(f"| {batch} | {share:.1%} | {' | '.join(row)} |")
    return "\n".join(lines)


def predictor() -> str:
    """Recall at 4, 8, 12 guesses and batch accuracy of the predictors and the free baselines."""
    result = json.loads((RESULTS / "predictor_gpt_oss_20b.json").read_text())
    paper = json.loads((RESULTS / "predictor_gpt_oss_20b_t5.json").read_text())
    rows = [
        ("**ours**", result["evaluations"][0]),
        (
            f"the paper's T5, {paper['config']['predictor']['about']['options']['epochs']} epochs",
            paper["evaluations"][0],
        ),
    ]
    rows += [(item["name"], item) for item in result["evaluations"][1:]]
    sizes = [union["batch"] for union in result["evaluations"][0]["batches"]]
    heads = ["@4", "@8", "@12", "next step @4", "next step @8", *(f"B={size}" for size in sizes)]
    lines = [f"| source | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, item in rows:
        figures = item["headline"]
        cells = [figures.get(key) for key in ("recall@4", "recall@8", "recall@12", "next recall@4", "next recall@8")]
        cells += [figures[f"B={size} precision at recall 0.95"] for size in sizes]
        lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.3f}' for cell in cells)} |")
    lines += ["", _predictor_notes(result)]
    return "\n".join(lines)


def _predictor_notes(result: dict[str, Any]) -> str:
    """Size, calibration, domain and latency, as a paragraph."""
    latency = json.loads((RESULTS / "predictor_latency_h100.json").read_text())
    domain = [
        json.loads((RESULTS / f"predictor_gpt_oss_20b_{name}_domain.json").read_text())["evaluations"][0]["headline"]
        for name in ("in", "cross")
    ]
    host = json.loads((RESULTS / "predictor_latency_cpu.json").read_text())
    graph, cpu = (next(c for c in file["cells"] if c["batch"] == 16) for file in (latency, host))
    errors = [item["error"] for item in result["evaluations"][0]["calibration"]]
    return (
        f"Ours takes {result['config']['predictor']['bytes'] / 1e6:.1f} MB. Expected calibration error {min(errors):.3f} to "
        f"{max(errors):.3f} over its five outputs. Trained without mmlu_pro and tested on it: "
        f"{domain[1]['recall@4']:.3f}/{domain[1]['recall@8']:.3f}/{domain[1]['recall@12']:.3f}, trained with it "
        f"{domain[0]['recall@4']:.3f}/{domain[0]['recall@8']:.3f}/{domain[0]['recall@12']:.3f}. A step of 16 sequences takes "
        f"{statistics.median(cpu['cpu_ms']):.2f} ms on {host['machine']['threads']} CPU threads and "
        f"{statistics.median(graph['graph_ms']):.2f} ms in a CUDA graph ({latency['machine']['gpu']})."
    )


def predictor_simulated() -> str:
    """Bytes a token of PLEC with the predictor, and what is closed of the distance to Belady."""
    cells = json.loads((RESULTS / "predictor_gpt_oss_20b.json").read_text())["cells"]
    names = {
        "nothing (next-use)": "next-use",
        "mix with context": "free mix",
        "predictor": "predictor",
        "Belady": "Belady",
    }
    moved = {(c["groups"], c["batch"], c["share"], c["source"]): c for c in cells}
    lines = [f"| live sequences | slots | {' | '.join(names.values())} | closed |", "|---" * (len(names) + 3) + "|"]
    for groups, batch, share in dict.fromkeys(key[:3] for key in moved):
        turns = "" if groups == 1 else f" in {groups} groups"
        row = [f"{moved[groups, batch, share, name]['bytes_per_token'] / 1e6:.0f}" for name in names]
        closed = moved[groups, batch, share, "predictor"]["closed"]
        lines.append(f"| {batch}{turns} | {share:.0%} | {' | '.join(row)} | {closed:.0%} |")
    return "\n".join(lines)


ENGINE = {
    "lru-global": "lru-global",
    "lru": "lru",
    "next-use": "next-use",
    "plec": "**plec**",
    "oracle-step": "this step known",
    "oracle": "Belady",
}


def _engine_rows(name: str) -> tuple[dict[str, Any], dict[tuple[int, int, str], dict[str, Any]]]:
    """The result of a shape, and its measurements by slots, batch and strategy."""
    result = json.loads((RESULTS / f"engine_{name}_h100.json").read_text())
    more = RESULTS / f"engine_{name}_baselines_h100.json"  # rows the file itself lacks
    later = json.loads(more.read_text())["rows"] if more.is_file() else []
    return result, {(row["slots"], row["batch"], row["strategy"]): row for row in (*later, *result["rows"])}


def _engine(name: str, chosen: str, *, whole: bool) -> list[str]:
    """Tokens a second of every strategy by slots and batch, beside all-resident; `whole`: ranges, loads and the link too."""
    result, rows = _engine_rows(name)
    names = [key for key in ENGINE if any(strategy == key for _, _, strategy in rows)]
    more = [f"{chosen}: loads (ahead)", "GB/s", "idle"] if whole else []
    heads = [*(ENGINE[key] for key in names), "all resident", *more, "peak GiB (budget)"]
    lines = [f"| slots | live | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    cells = dict.fromkeys((slots, batch) for slots, batch, strategy in rows if strategy == chosen)
    for slots, batch in sorted(cells, key=lambda cell: (-cell[0], cell[1])):
        speeds = [[batch / ms * 1e3 for ms in rows[slots, batch, key]["ms"]] for key in names]
        row = rows[slots, batch, chosen]
        ms, resident = statistics.median(row["ms"]), statistics.median(result["resident_ms"][str(batch)])
        ahead, loads = (statistics.median(row[key]) for key in ("ahead", "corrections"))
        link = (ahead + loads) * result["row_bytes"]
        idle = max(0.0, 1 - (resident + link / result["bounds"]["link_bytes_per_second"] * 1e3) / ms)
        shown = [_median(each) if whole else f"{statistics.median(each):.1f}" for each in speeds]
        shown.append(f"{batch / resident * 1e3:.0f}")
        if whole:
            shown += [f"{loads + ahead:.1f} ({ahead:.1f})", f"{link / ms / 1e6:.1f}", f"{idle:.1%}"]
        shown.append(f"{row['peak_bytes'] / GIB:.2f} ({row['budget_bytes'] / GIB:.2f})")
        lines.append(f"| {slots / result['experts']:.1%} | {batch} | {' | '.join(shown)} |")
    lines += ["", _engine_notes(result, [*rows.values()], whole=whole)]
    return lines


def _engine_notes(result: dict[str, Any], rows: list[dict[str, Any]], *, whole: bool) -> str:
    """Machine, exactness and memory, as a paragraph."""
    exact = all(row["tokens_equal"] and row["logits_equal"] for row in rows)
    inside = all(row["peak_bytes"] <= row["budget_bytes"] for row in rows)
    machine, versions = result["machine"], result["versions"]
    ranges = "; idle: share of a step in which neither the GPU computes nor the link copies" if whole else ""
    return (
        f"{machine['device']}, torch {versions['torch']}, Triton {versions['triton']}; tokens a second, medians of 3 windows over "
        f"the same steps{' (smallest-largest)' if whole else ''}{ranges}. Every token and the checked logits equal to the "
        f"all-resident graph's in every row: {'yes' if exact else 'NO'}; measured peak within the plan in every row: "
        f"{'yes' if inside else 'NO'}."
    )


def engine_g() -> str:
    """gpt-oss-20b's shape with real routing replayed: medians."""
    return "\n".join(_engine("g", "plec", whole=False))


def engine_g_whole() -> str:
    """The same with ranges, and what plec gives over lru-global."""
    lines = _engine("g", "plec", whole=True)
    result = json.loads((RESULTS / "engine_g_h100.json").read_text())
    ms = {(r["slots"], r["batch"], r["strategy"]): statistics.median(r["ms"]) for r in result["rows"]}
    shares = dict.fromkeys(slots for slots, _, _ in ms)
    batches = sorted({batch for _, batch, _ in ms})
    gains = [
        f"{slots / result['experts']:.1%} of the experts "
        + " / ".join(f"{ms[slots, batch, 'lru-global'] / ms[slots, batch, 'plec']:.2f}" for batch in batches)
        for slots in sorted(shares, reverse=True)
    ]
    lines.append(f"plec over lru-global, live {' / '.join(map(str, batches))}: {'; '.join(gains)}.")
    return "\n".join(lines)


def engine_q_whole() -> str:
    """The same with ranges."""
    return "\n".join(_engine("q", "next-use", whole=True))


def schedule() -> str:
    """Live sequences in groups on a GPU: by arrival, by route, by the cost model."""
    files = [json.loads((RESULTS / f"schedule_g_30{part}_h100.json").read_text()) for part in ("_25", "")]
    result, config = files[0], files[0]["config"]
    assert all(found["config"] == config for found in files)
    measured = [row for found in files for row in found["rows"]]
    lines = [
        "| slots | schedule | tokens/s | over fifo | time per token, 95% of requests, over fifo | loads a token | peak GiB (budget) |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = {(row["share"], row["schedule"]): row["runs"] for row in measured}
    for row in measured:
        fifo = runs[row["share"], "fifo"]
        speeds = [run["tokens_per_second"] for run in row["runs"]]
        gains, late = (
            [mine[key] / theirs[key] for mine, theirs in zip(row["runs"], fifo, strict=True)]
            for key in ("tokens_per_second", "p95_token_seconds")
        )
        loads = statistics.median(run["loads_per_token"] for run in row["runs"])
        memory = f"{row['peak_bytes'] / GIB:.2f} ({row['budget_bytes'] / GIB:.2f})"
        cells = (
            _median(speeds),
            f"{statistics.median(gains):.3f}",
            f"{statistics.median(late):.3f}",
            f"{loads:.2f}",
            memory,
        )
        lines.append(f"| {row['share']:.0%} | {row['schedule']} | {' | '.join(cells)} |")
    versions = result["versions"]
    lines += ["", (f"{result['machine']['device']}, torch {versions['torch']}; {config['live']} live sequences, {config['batch']} a step, {config['rounds']} rounds, "
              f"{config['repeats']} parts of the sequences, every schedule on each; medians (smallest-largest).")]  # fmt: skip
    return "\n".join(lines)


def turns() -> str:
    """Loads a token of alternating groups in the simulator, and what the cost model expects."""
    rows = json.loads((RESULTS / "grouping_gpt_oss_20b.json").read_text())["turns"]
    cell = {(r["groups"], r["size"], r["share"], r["way"], r["strategy"], r["known"]): r for r in rows}
    heads = (
        "arrival, blind",
        "arrival",
        "routes",
        "merged",
        "Belady: arrival",
        "Belady: routes",
        "Belady: merged",
        "model: arrival",
        "model: routes",
        "model: merged",
    )
    lines = [f"| groups x size | slots | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for groups, size, share in dict.fromkeys(key[:3] for key in cell):
        case = groups, size, share
        values = [cell[*case, "arrival", "plec", False]["loads_per_token"]]
        values += [cell[*case, way, "plec", True]["loads_per_token"] for way in ("arrival", "routes", "merged")]
        values += [cell[*case, way, "oracle", True]["loads_per_token"] for way in ("arrival", "routes", "merged")]
        values += [cell[*case, way, "plec", True]["model_loads_per_token"] for way in ("arrival", "routes", "merged")]
        lines.append(f"| {groups} x {size} | {share:.0%} | {' | '.join(f'{value:.1f}' for value in values)} |")
    return "\n".join(lines)


ARRIVALS = {
    "arrivals_q_h100": "Qwen3-MoE's shape",
    "arrivals_q_more_h100": "Qwen3-MoE's shape, earlier rule",
    "arrivals_long_h100": "Qwen3-MoE's shape, longer",
    "arrivals_g_h100": "gpt-oss-20b's shape and routing",
    "arrivals_g_before_h100": "gpt-oss-20b's, earlier rule",
}


def arrivals() -> str:
    """Requests that arrive at a GPU."""
    heads = "tokens/s", "first token s, half and 95% of requests", "later tokens ms, half and 95%"
    lines = [f"| | | slots | {' | '.join(heads)} |", "|---" * 6 + "|"]
    files = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ARRIVALS}
    for name, found in files.items():
        for row in found["rows"]:
            runs = sorted(row["runs"], key=lambda run: run["tokens_per_second"])
            speeds = " / ".join(f"{run['tokens_per_second']:.0f}" for run in row["runs"])
            times = _times(runs[len(runs) // 2])
            lines.append(f"| {ARRIVALS[name]} | {row['mode']} | {row['slots']} | {speeds} | {times} |")
    inside = all(row["peak_bytes"] <= row["budget_bytes"] for found in files.values() for row in found["rows"])
    about, config = files["arrivals_g_h100"], files["arrivals_g_h100"]["config"]
    lines += ["", (f"{about['machine']['device']}, torch {about['versions']['torch']}, {config['requests']} requests, {config['prefill_chunk']} tokens a pass at most, every run's "
              f"speed and the times of the middle one; peak within the budget in every row: {'yes' if inside else 'NO'}.")]  # fmt: skip
    return "\n".join(lines)


def admission() -> str:
    """The scheduler alone, on a virtual clock."""
    rows = json.loads((RESULTS / "admission.json").read_text())["rows"]
    lines = [
        "| | lengths | | tokens/s | first token s, half and 95% of requests | later tokens ms, half and 95% | passes |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        length = "as they were" if row["shorter"] == 1 else f"a {row['shorter']}th"
        if row["faster"] < 1:
            length += f", coming {row['faster']:g} times as fast"
        cells = row["machine"], length, row["mode"], f"{row['tokens_per_second']:.0f}", _times(row), str(row["passes"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(run: dict[str, Any]) -> str:
    first, later = run["first_token_seconds"], run["token_seconds"]
    return f"{first[0]:.2f}, {first[1]:.2f} | {later[0] * 1e3:.1f}, {later[1] * 1e3:.1f}"


def control() -> str:
    """The trained predictor beside one with its chances on wrong experts, in tokens a second."""
    result = json.loads((RESULTS / "control_gpt_oss_20b.json").read_text())
    sources = {
        "none": "`next-use`, no predictor",
        "shuffled": "`plec`, misled",
        "trained": "`plec`",
        "future": "Belady",
    }
    lines = [
        f"| live | slots | {' | '.join(sources.values())} | loads ahead a token: misled | trained |",
        "|---" * 8 + "|",
    ]
    cell = {(row["batch"], row["groups"], row["share"], row["predictor"]): row for row in result["rows"]}
    for batch, groups, share in dict.fromkeys(key[:3] for key in cell):
        mine = {source: cell[batch, groups, share, source] for source in sources}
        live = f"{batch}" if groups == 1 else f"{batch} in {groups} groups"
        speeds = " | ".join(f"{row['tokens_per_second']:.1f}" for row in mine.values())
        ahead = [
            f"{mine[source]['ahead_per_token']:.2f} ({mine[source]['wasted_per_token']:.2f} wasted)"
            for source in ("shuffled", "trained")
        ]
        lines.append(f"| {live} | {share:.0%} | {speeds} | {' | '.join(ahead)} |")
    return "\n".join(lines)


SHOWN = {
    "+ told of the turns that come": "+ the forecast covers the groups that come",
    "+ the predictor says what to keep": "+ the predictor decides what is kept",
}
"""Names of stages in the result file that the table shows under other names."""


def ablation() -> str:
    """The cache and the scheduler, one part at a time, in tokens a second on a virtual clock, and loads a token."""
    rows = json.loads((RESULTS / "ablation_gpt_oss_20b.json").read_text())["rows"]
    cell = {(row["batch"], row["groups"], row["share"], row["stage"]): row for row in rows}
    places = list(dict.fromkeys(key[:3] for key in cell))
    heads = [f"{batch}{f' in {groups} groups' if groups > 1 else ''}, {share:.0%}" for batch, groups, share in places]
    lines = [f"| live, slots | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for stage in sorted({row["stage"] for row in rows}, key=[row["stage"] for row in rows if row["groups"] > 1].index):
        found = [cell.get((*place, stage)) for place in places]
        cells = [
            "" if row is None else f"{row['tokens_per_second']:.1f} ({row['loads_per_token']:.1f})" for row in found
        ]
        lines.append(f"| {SHOWN.get(stage, stage)} | {' | '.join(cells)} |")
    return "\n".join(lines)


STAGES = (
    ("on-demand", "host", "nothing kept, eager"),
    ("on-demand", "graph", "+ one graph a step, records fetched by kernels"),
    ("lru", "graph", "+ kept by recency, 4 or 16 slots a layer (Cache-MoE)"),
    ("next-use", "graph", "+ kept by next use, over all layers"),
    ("plec", "graph", "+ a predictor, loads ahead, corrected"),
    ("resident", "graph", "every expert resident"),
    ("ring", "graph", "SE-MoE's ring, in graphs"),
    ("ring", "host", "SE-MoE's ring, eager"),
    ("lru", "host", "Cache-MoE, eager"),
    ("next-use", "host", "`next-use`, eager"),
    ("plec", "host", "`plec`, eager"),
    ("resident", "host", "every expert resident, eager"),
)


def switch_stages() -> str:
    """Switch-128, one improvement at a time."""
    speeds = {
        (row.strategy, row.execution, row.slots, row.batch): row.figures[DECODE]
        for row in read_result(RESULTS / "switch_128.json").rows
        if row.state == WARM and DECODE in row.figures
    }
    places = [(48, 4), (48, 32), (192, 4), (192, 32)]
    heads = " | ".join(f"{slots // 12} slots a layer, batch {batch}" for slots, batch in places)
    lines = [f"| | {heads} |", "|---" * (1 + len(places)) + "|"]
    for strategy, execution, stage in STAGES:
        cells = []
        for slots, batch in places:
            figure = speeds[strategy, execution, 1536 if strategy == "resident" else slots, batch]
            cells.append(f"{figure.median:.0f} ({figure.low:.0f}-{figure.high:.0f})")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


SIZES = (32, 64, 128)
"""Experts a layer of the Switch models that were measured."""


def switch_growth() -> str:
    """How speed, bytes and memory grow with the number of experts, at the same slots a layer."""
    results = {count: read_result(RESULTS / f"switch_{count}_grid.json") for count in SIZES}
    lines = [
        "| slots a layer, batch | model | Cache-MoE | SE-MoE's ring | Pre-gated | `next-use` | **`plec`** | every expert resident | `plec`, % of that | MB a token: `plec` | Cache-MoE | peak, % of resident |",
        "|---" * 12 + "|",
    ]
    for slots, batch in ((4, 4), (4, 32), (8, 4), (8, 32), (16, 4), (16, 32)):
        for count, result in results.items():
            rows = {
                row.strategy: row
                for row in result.rows
                if row.state == WARM and row.batch == batch and row.execution == "graph" and DECODE in row.figures
                and row.slots in (12 * slots, 12 * count)
            }  # fmt: skip
            named = ("lru", "ring", "pregated", "next-use", "plec", RESIDENT)
            speeds = [rows[name].figures[DECODE].median for name in named]
            moved = [rows[name].figures[MOVED].median for name in ("plec", "lru")]
            share = rows["plec"].figures[PEAK].median / rows[RESIDENT].figures[PEAK].median
            lines.append(
                f"| {slots}, {batch} | Switch-{count} | {' | '.join(f'{speed:.0f}' for speed in speeds)} "
                f"| {speeds[-2] / speeds[-1]:.0%} | {moved[0]:.1f} | {moved[1]:.1f} | {share:.1%} |"
            )
    return "\n".join(lines)


def shapes() -> str:
    """All files of the full-size shapes as one table: of each cell the row with the most repeats, of equals the newest."""
    named = ("on-demand", "lru", "ring", "pregated", "next-use")
    lines = [
        "| slots, batch | on-demand | Cache-MoE | SE-MoE's ring | pregated | **`next-use`** | every expert resident | bound of `next-use` | % of that | peak | of resident |",
        "|---" * 11 + "|",
    ]
    for title, files in SHAPES.items():
        results = [read_result(RESULTS / f"{name}.json") for name in files]
        measured = {(row.slots, row.batch) for result in results for row in result.rows if row.strategy != RESIDENT}
        for slots, batch in sorted(measured):
            rows = {name: _best(results, slots, batch, name) for name in named}
            whole, mine = _best(results, 0, batch, RESIDENT), rows["next-use"]
            assert mine is not None
            bound, peak = _bound(mine, results), mine.figures[PEAK].median
            cells = [_decoded(row) for row in (*rows.values(), whole)]
            cells += [f"{bound:.1f}", f"{mine.figures[DECODE].median / bound:.0%}", f"{peak / 1e9:.2f} GB"]
            cells.append("" if whole is None else f"{peak / whole.figures[PEAK].median:.0%}")
            lines.append(f"| {title}, {slots // results[0].model.layers}, {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bound(row: Row, results: list[Result]) -> float:
    """The bound of a row's speed; of one that was measured before the link alone was a bound, that."""
    if (bound := row.figures[DECODE].bound) is not None:
        return bound
    mine = next(result for result in results if row in result.rows)
    least = _best([mine], row.slots, row.batch, BELADY)
    assert least is not None
    return mine.link_gbps * 1e3 / least.figures[MOVED].median


def _best(results: list[Result], slots: int, batch: int, strategy: str) -> Row | None:
    """The warm row of a cell with the most repeats, of equals the last file's; `slots` 0: any number."""
    found = [
        row
        for result in results
        for row in result.rows
        if row.state == WARM and row.strategy == strategy and row.batch == batch and slots in (0, row.slots)
    ]
    return max(reversed(found), key=_repeats, default=None)


def _repeats(row: Row) -> int:
    return max(len(figure.values) for figure in row.figures.values())


def _decoded(row: Row | None) -> str:
    """Its speed; marked where there are fewer than three runs, and where the host decided."""
    if row is None:
        return ""
    marks = ("h" if row.execution == "host" else "") + ("*" if _repeats(row) < 3 else "")
    return f"{row.figures[DECODE].median:.1f} {marks}".strip()


def switch_predictor() -> str:
    """How often the best guess of a layer is right: Switch routes a token to one expert."""
    domains = {"": "novels", "_maths": "maths", "_chat": "instructions"}
    files = {
        (count, domain): json.loads((RESULTS / f"switch_{count}_predictor{domain}.json").read_text())
        for count in SIZES
        for domain in domains
    }
    heads = [f"Switch-{count}, {domains[domain]}" for count, domain in files]
    lines = [f"| source | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    found = [{row["name"]: row for row in result["evaluations"]} for result in files.values()]
    for name in found[0]:
        cells = []
        for rows in found:
            layers = rows[name]["layer_recall"]
            half = len(layers) // 2
            cells.append(f"{rows[name]['guesses']['recall'][0]:.2f} ({statistics.mean(layers[:half]):.2f}, {statistics.mean(layers[half:]):.2f})")  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def switch_schedule() -> str:
    """The token scheduler with and without."""
    lines = ["| model | slots | fifo tokens/s | group | auto | loads a token: fifo | group | auto |", "|---" * 8 + "|"]
    for count in SIZES:
        for row in json.loads((RESULTS / f"switch_{count}_schedule.json").read_text())["rows"]:
            cells = [
                f"{statistics.median(run[key] for run in row['schedules'][name]):{form}}"
                for key, form in (("tokens_per_second", ".0f"), ("loads_per_token", ".3f"))
                for name in ("fifo", "group", "auto")
            ]
            lines.append(f"| Switch-{count} | {row['slots']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def accelerate() -> str:
    """Hugging Face accelerate's offload, beside the row whose peak it was given."""
    lines = [
        "| model | batch | accelerate tokens/s | peak | `plec` tokens/s, 4 slots a layer | peak | times faster | answers equal |",
        "|---" * 8 + "|",
    ]
    for count in (32, 128):
        for row in json.loads((RESULTS / f"accelerate_switch_{count}.json").read_text())["rows"]:
            speeds, ours = row["decode_tokens_per_second"], row["compared_with"]
            lines.append(
                f"| Switch-{count} | {row['batch']} | {statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f}) "
                f"| {row['peak_bytes'] / 2**20:.0f} MiB | {ours['decode_tokens_per_second']:.0f} | {ours['peak_bytes'] / 2**20:.0f} MiB "
                f"| {row['times_faster']:.1f} | {row['answers_equal']} of {row['batch']} |"
            )
    return "\n".join(lines)


def expert_format() -> str:
    """Perplexity of the shipped model with experts that are quantised on loading."""
    result = json.loads((RESULTS / "expert_format_cpu.json").read_text())
    stored, config = result["rows"][0], result["config"]
    lines = ["| experts | bytes each | perplexity | nats a token more |", "|---|---|---|---|"]
    for row in result["rows"]:
        more = [mine - its for mine, its in zip(row["losses"], stored["losses"], strict=True)]
        error = statistics.stdev(more) / len(more) ** 0.5
        change = f"{statistics.mean(more):.4f} ± {error:.4f}" if row is not stored else ""
        name = row["expert_format"] or f"as stored ({config['dtype']})"
        lines.append(f"| {name} | {row['record_bytes']:,} | {row['perplexity']:.2f} | {change} |")
    lines += [
        "",
        (
            f"{config['windows']} windows of {config['window']:,} tokens out of {len(config['books'])} novels that training left out; ± is "
            f"the standard error over windows, which all formats share. {result['machine']['processor']}, torch {result['versions']['torch']}."
        ),
    ]
    return "\n".join(lines)


def draw_growth(path: Path) -> None:
    """Speed over the number of experts, a panel for slots and batch."""
    results = {count: read_result(RESULTS / f"switch_{count}_grid.json") for count in SIZES}
    picture = Figure(figsize=(16, 3.4), layout="constrained")
    places = ((4, 4), (4, 32), (8, 4), (8, 32), (16, 4), (16, 32))
    for panel, (slots, batch) in zip(picture.subplots(1, len(places)), places, strict=True):
        for name, mark in (
            ("ring", "v"),
            ("lru", "s"),
            ("pregated", "^"),
            ("next-use", "D"),
            ("plec", "<"),
            (RESIDENT, "_"),
        ):
            found = [
                next(
                    row.figures[DECODE].median
                    for row in result.rows
                    if (row.state, row.strategy, row.batch, row.execution) == (WARM, name, batch, "graph")
                    and row.slots in (12 * slots, 12 * count)
                )
                for count, result in results.items()
            ]
            style = {"color": "black", "ls": ":"} if name == RESIDENT else {}
            panel.plot(range(len(SIZES)), found, marker=mark, label=name, **style)
        panel.set_xticks(range(len(SIZES)), [str(count) for count in SIZES])
        panel.set_xlabel("experts a layer")
        panel.set_title(f"{slots} slots a layer, batch {batch}", fontsize="medium")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    picture.axes[0].set_ylabel("decoded tokens/s")
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    picture.savefig(path, dpi=90)


FLOORS = (
    "cli", "serve", "bench", "engine", "execution", "sim", "live", "schedule", "kernels", "predict", "cache", "memory", "models",
    "trace", "formats",
)  # fmt: skip
"""The package's folders from top to bottom; imports only point down."""


def modules() -> str:
    """Every folder of the package, what it does, and its modules."""
    folders = [path.parent for path in PACKAGE.rglob("__init__.py")]
    lines = ["| folder | what it does | modules |", "|---|---|---|"]
    for folder in sorted(folders, key=_floor):
        names = sorted(path.stem for path in folder.glob("*.py") if path.name != "__init__.py")
        if not names:
            continue
        place = folder.relative_to(PACKAGE)
        doc = "" if folder == PACKAGE else ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        about = doc.partition("\n\n")[0].replace("\n", " ") or "What every floor uses, and the way in."
        lines.append(f"| {'top' if folder == PACKAGE else f'`{place}/`'} | {about} | {' '.join(names)} |")
    return "\n".join(lines)


def _floor(folder: Path) -> tuple[int, str]:
    """Where a folder stands in the table: by its floor, the package itself last."""
    place = folder.relative_to(PACKAGE)
    top = place.parts[0] if place.parts else ""
    return (FLOORS.index(top) if top in FLOORS else len(FLOORS) + (not top), str(place))


def strategies() -> str:
    """The table that `expertflow strategies --markdown` prints."""
    return "\n".join(line for line in strategies_page().splitlines() if line.startswith("|"))


def blocks() -> str:
    """Which parts of a decoder layer building blocks compute, by `expertflow models`, and in which families."""
    with redirect_stdout(io.StringIO()) as printed:
        app(["models", "--json"], standalone_mode=False)
    found: dict[tuple[str, ...], list[str]] = {}
    for family in json.loads(printed.getvalue()):
        found.setdefault(tuple(family["blocks"]), []).append(f"`{family['model_type']}`")
    lines = ["| computed by blocks | families |", "|---|---|"]
    lines += [f"| {', '.join(parts) or 'nothing'} | {', '.join(names)} |" for parts, names in found.items()]
    return "\n".join(lines)


def fields() -> str:
    """What the server does with each field of a request body, by route."""
    chat, completion, *others = TABLES
    both = {name: field for name, field in TABLES[chat].items() if TABLES[completion].get(name) == field}
    rows = {f"`{chat}` and `{completion}`": both}
    rows |= {f"only `{one}`": {n: f for n, f in TABLES[one].items() if n not in both} for one in (chat, completion)}
    rows |= {f"`{one}`": TABLES[one] for one in others if one.startswith("/v1/")}
    lines = ["| route | honoured | accepted without effect | refused |", "|---|---|---|---|"]
    for route, table in rows.items():
        cells = [", ".join(name for name, field in table.items() if field.use is use) for use in Use]
        lines.append(f"| {route} | {' | '.join(cells)} |")
    return "\n".join(lines)


Tables = Mapping[str, Callable[[], str]]
PAGES: Mapping[str, Tables] = {
    "README.md": {"front": packed_tables.front},
    "docs/how-it-works.md": {"modules": modules, "blocks": blocks, "strategies": strategies},
    "docs/serving.md": {"fields": fields},
    "docs/benchmarks.md": {
        "engine-g": engine_g,
        "packed": packed_tables.packed,
        "schedule": schedule,
        "predictor": predictor,
        "predictor-simulated": predictor_simulated,
        "ablation": ablation,
        "control": control,
        "switch-stages": switch_stages,
        "accelerate": accelerate,
    },
    "docs/limits.md": {"expert-format": expert_format},
}
"""The committed documents, and the tables between their markers."""


def bench(name: str, pictures: Iterable[str] = ()) -> str:
    """A result of `expertflow bench` as a section, with pictures named as given."""
    return section(f"{name}.json", read_result(RESULTS / f"{name}.json"), pictures)


SHAPES = {
    "Qwen1.5-MoE-A2.7B": ("shape_qwen", "shape_qwen_8_16", "shape_qwen_rivals"),
    "DeepSeek-V2-Lite": (
        "shape_deepseek",
        "shape_deepseek_8",
        "shape_deepseek_16",
        "shape_deepseek_rivals",
        "shape_deepseek_pregated",
        "shape_deepseek_32",
        "shape_deepseek_32_16",
    ),
    "Mixtral-8x7B": ("shape_mixtral", "shape_mixtral_two", "shape_mixtral_32"),
}
"""The files of each full-size shape, oldest first."""
BENCHES = (
    "bench_quick_cpu", "switch_32", "switch_64", "switch_128", "switch_32_grid", "switch_64_grid", "switch_128_grid",
    "switch_128_4", "switch_128_16", "switch_128_control", *(name for names in SHAPES.values() for name in names),
)  # fmt: skip
"""Results of `expertflow bench`: each has a page with pictures."""


@dataclass(frozen=True)
class Page:
    """One page under docs/results/: its heading, how its numbers are made again, and its tables."""

    title: str
    made_by: str
    tables: tuple[Callable[[], str], ...]


RESULT_PAGES = {
    "engine": Page(
        "Decode steps as CUDA graphs: gpt-oss-20b's shape with recorded routing, Qwen3-MoE's shape with random weights",
        "`python benchmarks/engine_h100.py` (`engine_*_h100.json`)",
        (engine_g_whole, engine_q_whole),
    ),
    "packed": Page(
        "Packed experts on an H200",
        "`benchmarks/engine_h100.py --formats`, `first_token.py`, `packed_kernels.py` (`*_h200.json`)",
        (packed_tables.packed_whole, packed_tables.packed_loads, packed_tables.first_token, packed_tables.kernels),
    ),
    "host-execution": Page(
        "Host execution at the size of Qwen1.5-MoE-A2.7B",
        "`python benchmarks/host_execution.py` (`host_execution_h100.json`)",
        (host_execution,),
    ),
    "scheduler": Page(
        "Sequences that take turns, and requests that arrive",
        "`benchmarks/schedule_h100.py`, `grouping.py`, `arrivals_h100.py`, `admission.py` (files of the same names)",
        (schedule, turns, arrivals, admission),
    ),
    "policies": Page(
        "Share of needs kept, by strategy: the simulator on recorded routing of gpt-oss-20b",
        "`expertflow simulate TRACE --slots 12.5%,25%,50% --batch 1,4,8,16 --json` (`simulate_gpt_oss_20b.json`)",
        (policies,),
    ),
    "predictor": Page(
        "The routing path predictor on gpt-oss-20b",
        "`benchmarks/predictor_split.py` has the commands (`predictor_*.json`)",
        (predictor, predictor_simulated),
    ),
    "parts": Page(
        "One part at a time, and a misled predictor",
        "`benchmarks/ablation.py` and `benchmarks/control.py` (`ablation_gpt_oss_20b.json`, `control_gpt_oss_20b.json`)",
        (ablation, control),
    ),
    "switch": Page(
        "Switch-32, -64 and -128",
        "`python -m switch.evaluate` in `tools/` and `benchmarks/accelerate_offload.py` (`switch_*.json`)",
        (switch_stages, switch_growth, switch_predictor, switch_schedule, accelerate),
    ),
    "shapes": Page(
        "Full-size shapes with random weights: of each cell the measurement with the most repeats",
        "`benchmarks/shapes_h100.py` (`shape_*.json`)",
        (shapes,),
    ),
}
"""Pages of tables made from several files; the results of `expertflow bench` have one each beside them."""


SMALL = (
    "loading_h200", "threads_cpu", "threads_h200", "invariance_h100", "soak_h100", "prefill_h100", "next_use_halves",
    "predictor_latency_cpu", "predictor_latency_h100", "engine_compare_h200", "prompt_attention_h200",
)  # fmt: skip
"""Results that are few enough to be read whole."""


def as_it_is(name: str) -> str:
    """Every value of a result, a line each."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return "\n".join([f"## `{name}.json`", "", *(f"- {place}: {value}" for place, value in _leaves(found, ""))])


def _leaves(found: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Paths and values; a list of plain values is one."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from _leaves(value, f"{place}.{key}" if place else key)
    elif isinstance(found, list) and any(isinstance(each, dict | list) for each in found):
        for number, value in enumerate(found):
            yield from _leaves(value, f"{place}[{number}]")
    else:
        yield place, ", ".join(map(str, found)) if isinstance(found, list) else found


def write_results(folder: Path, *, pictures: bool = True) -> list[Path]:
    """Write a page a result, and an index.

    Args:
        folder: is made if it is not there.
        pictures: draw the pictures too (needs matplotlib, a minute).

    Returns:
        The pages, the index first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = ["# Results", "", "Made by `python benchmarks/tables.py --results` from `benchmarks/results/`.", ""]
    written = [folder / "README.md"]
    for name, page in RESULT_PAGES.items():
        body = "\n\n".join(f"## {(make.__doc__ or '').splitlines()[0]}\n\n{make()}" for make in page.tables)
        shown = "\n\n![speed over the number of experts](switch_growth.png)" if pictures and name == "switch" else ""
        written.append(folder / f"{name}.md")
        written[-1].write_text(f"# {page.title}\n\nMade by {page.made_by}.\n\n{body}{shown}\n")
        index.append(f"- [{page.title}]({name}.md)")
    for name in BENCHES:
        result = read_result(RESULTS / f"{name}.json")
        drawn = [make(result, folder / f"{name}_{kind}.png").name for kind, make in PICTURES.items() if pictures]
        written.append(folder / f"{name}.md")
        written[-1].write_text(bench(name, drawn) + "\n")
        index.append(f"- [`{name}.json`: {result.model.name}, preset {result.preset}]({name}.md)")
    written.append(folder / "small.md")
    written[-1].write_text("# Small results, as they are in their files\n\n" + "\n\n".join(map(as_it_is, SMALL)) + "\n")
    index.append("- [Small results: loading, threads, soak, prompts, two source trees and others](small.md)")
    if pictures:
        draw_growth(folder / "switch_growth.png")
    written[0].write_text("\n".join(index) + "\n")
    return written


PICTURES = {"speed": figures.speed, "kept": figures.kept, "budget": figures.budget}


def fill(text: str, tables: Tables) -> str:
    """The text with every table between its markers.

    Raises:
        ValueError: if a marker is missing.
    """
    for name, make in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"no place for the table {name!r}: {begin} and {end} must stand in the text")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
    return text


def main() -> None:
    """Print or write."""
    if "--results" in sys.argv:
        write_results(ROOT / "docs" / "results")
    elif "--write" in sys.argv:
        for page, tables in PAGES.items():
            path = ROOT / page
            path.write_text(fill(path.read_text(), tables))
    else:
        for tables in PAGES.values():
            for make in tables.values():
                print(make())


if __name__ == "__main__":
    main()
