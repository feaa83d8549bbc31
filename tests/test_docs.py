"""Documents say what the code and the result files say."""

import importlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from expertflow.cache.strategy import STRATEGIES
from expertflow.models.families import FAMILIES
from helpers import ROOT

DOCUMENTS = ["README.md", "CHANGELOG.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    """`benchmarks/tables.py`, which imports what lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("tables")


@pytest.mark.parametrize(
    "document", ["README.md", "docs/how-it-works.md", "docs/benchmarks.md", "docs/limits.md", "docs/serving.md"]
)
def test_tables_are_what_the_result_files_and_the_code_say(document: str, tables: ModuleType) -> None:
    """Every table between markers is what `benchmarks/tables.py` makes; `--write` puts it there."""
    old = (ROOT / document).read_text()
    assert old == tables.fill(old, tables.PAGES[document]), "run `python benchmarks/tables.py --write`"


def test_every_result_has_a_page(tmp_path: Path, tables: ModuleType) -> None:
    """Each result of `expertflow bench` that is committed has a page, and the index names all pages."""
    tables.write_results(tmp_path, pictures=False)
    index = (tmp_path / "README.md").read_text()
    pages = {path.stem for path in tmp_path.glob("*.md")} - {"README"}
    assert pages == set(re.findall(r"\]\(([\w-]+)\.md\)", index))
    results = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert pages >= {name for name, found in results.items() if found.get("format") == "expertflow-bench"}
    assert all((tmp_path / f"{page}.md").read_text().count("|") > 20 for page in pages - {"small"})


def test_the_modules_are_named() -> None:
    """docs/how-it-works.md names every module of the package, and nothing that is not there."""
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    table = text.split("<!-- modules -->")[1].split("<!-- /modules -->")[0]
    named = set()
    for folder, modules in re.findall(r"^\| (top|`[\w/]+/`) \|.*\| ([\w ]+) \|$", table, flags=re.MULTILINE):
        named |= {("" if folder == "top" else folder.strip("`")) + f"{module}.py" for module in modules.split()}
    package = ROOT / "src" / "expertflow"
    assert named == {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document: str) -> None:
    """Every path that a document names in backquotes is there, and so is every page it links to and every result file."""
    text = (ROOT / document).read_text()
    package = ROOT / "src" / "expertflow"
    rooms = "|".join(sorted(path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"))
    for name in re.findall(rf"`((?:src|tests|docs|benchmarks|tools|{rooms})/[\w./-]+)`", text):
        assert (ROOT / name).exists() or (package / name).exists() or name.startswith("docs/results/"), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert ((ROOT / document).parent / name).exists(), name


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if name != "docs/lab-notes.md"])
def test_named_results_exist(document: str) -> None:
    """Every result file that a document names is committed; lab notes may name files of earlier commits."""
    text = (ROOT / document).read_text()
    for name in re.findall(r"\b\w+_(?:h100|h200|cpu|20b)\.json\b", text):
        assert (ROOT / "benchmarks" / "results" / name).exists(), name


def found(name: str, *keys: str) -> Any:
    """A value of a result file."""
    value = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    for key in keys:
        value = value[key]
    return value


def test_numbers_in_sentences_come_from_result_files() -> None:
    """What README, decisions, lab notes and benchmarks say outside of tables is what the files they name hold."""
    record, experts = found("engine_g_h100", "row_bytes"), found("engine_g_h100", "experts")
    packed = found("engine_g_packed_h200", "rows")[0]["record_bytes"]
    new, old = (statistics.median(times) for times in found("loading_h200", "seconds"))
    cells = found("engine_compare_h200", "summary")
    assert all(cell["same_logits"] for cell in cells)
    queued = sorted(cell["new_over_old_ms"] for cell in cells)
    waited = sorted(cell["new_over_old_waited_ms"] for cell in cells)
    alone = [cell for cell in cells if cell["batch"] == 1]
    through = sorted(cell["llm_over_new_waited_ms"] for cell in alone)
    beside = {(cell["shape"], cell["strategy"]): cell["llm_over_new_waited_ms"] for cell in cells if cell["batch"] == 8}
    added = sorted(
        statistics.median(cell["llm_waited_ms"]) - statistics.median(cell["new_waited_ms"]) for cell in alone
    )
    firsts = found("long_context_h200", "rows")
    first = [statistics.median(row["seconds"]) for row in firsts if row["part"] == "first" and row["format"] == "mxfp4"]
    steps = {(row["batch"], row["blocks"]): statistics.median(row["ms"]) for row in found("dense_step_h200", "rows")}
    rates = [
        {
            (r["slots"], r["batch"], r["strategy"]): r["batch"] / statistics.median(r["ms"]) * 1e3
            for r in found(name, "rows")
        }
        for name in ("engine_g_packed_h200", "engine_g_modules_h200")
    ]
    claims = {
        "README.md": [f"{packed / 1e6:.1f} MB an expert in MXFP4", f"{experts * record / 1e9:.0f} GB"],
        "docs/decisions.md": [
            f"{found('host_execution_h100', 'loading', 'cold', 'host_peak_over_store'):.4f} times the store",
            f"loading {found('loading_h200', 'bytes') / 1e9:.1f} GB {new / old - 1:.0%} longer".replace("%", " %"),
        ],
        "docs/lab-notes.md": [
            f"queued one after another {queued[0]:.3f} to {queued[-1]:.3f}; ",
            f"waited for {waited[0]:.3f} to {waited[-1]:.3f}.",
            f"one sequence: {through[0]:.3f} to {through[-1]:.3f}, that is {added[0]:.2f} to {added[-1]:.2f} ms a step",
            f"one sequence {steps[1, False]:.2f} to {steps[1, True]:.2f} ms, four {steps[4, False]:.2f} to {steps[4, True]:.2f}",
            f"{rates[0][384, 1, 'plec']:.0f} tokens/s for {rates[1][384, 1, 'plec']:.0f}",
            f"{beside['q', 'next-use']:.3f} and {beside['q', 'lru-global']:.3f} on shape Q; {beside['g', 'next-use']:.3f} on shape G",
        ],
        "docs/benchmarks.md": [
            f"tokens, 50 %: {first[0]:.3f}, {first[1]:.3f}, {first[2]:.3f} s",
        ],
    }
    for document, sentences in claims.items():
        text = " ".join((ROOT / document).read_text().split())
        assert [sentence for sentence in sentences if sentence not in text] == []


def test_documents_are_short() -> None:
    """The README fits a screen or three, the benchmarks page stays readable, and so do the documents together."""
    sizes = {name: len((ROOT / name).read_bytes()) for name in DOCUMENTS}
    assert sizes["README.md"] <= 10_000
    assert sizes["docs/benchmarks.md"] <= 15_000
    assert sizes["docs/serving.md"] <= 9_600
    assert sum(size for name, size in sizes.items() if name.startswith("docs/")) <= 137_000


def test_lab_notes_carry_verdict_and_date() -> None:
    """Each heading says when and what came of it."""
    headings = re.findall(r"^### (.+)$", (ROOT / "docs" / "lab-notes.md").read_text(), flags=re.MULTILINE)
    assert len(headings) > 10
    for heading in headings:
        assert re.match(r"20\d\d-\d\d-\d\d: \w.{15,}", heading), heading


def test_every_family_has_an_example_and_a_small_config() -> None:
    """A family's entry says which checkpoints it is known by, and how to make a small one."""
    assert all(entry.examples and entry.tiny for entry in FAMILIES.values())


def test_every_strategy_says_what_it_does() -> None:
    """A strategy's entry has a summary for tables and documents."""
    assert all(len(entry.summary) > 20 for entry in STRATEGIES.values())
