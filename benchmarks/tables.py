"""The README's result tables, written from the result files they quote. A test holds README and files together.

Usage: python benchmarks/tables.py          prints every table
       python benchmarks/tables.py --write  puts them between their markers in README.md
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
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
        f"{'yes' if result['bit_equal'] else 'NO'}. Copies of one row's size reach "
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


TABLES: dict[str, Callable[[], str]] = {"host-execution": host_execution, "policies": policies}


def fill(text: str) -> str:
    """The text with every table between its markers."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
    return text


def main() -> None:
    """Print or write."""
    readme = ROOT / "README.md"
    if "--write" in sys.argv:
        readme.write_text(fill(readme.read_text()))
    else:
        for make in TABLES.values():
            print(make())


if __name__ == "__main__":
    main()
