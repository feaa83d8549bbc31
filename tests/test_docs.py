"""Documents say what the code and the result files say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertflow.cache.strategy import STRATEGIES
from expertflow.models.families import FAMILIES

ROOT = Path(__file__).parents[1]


def test_result_tables_come_from_result_files() -> None:
    """Every number in the README's tables is what `benchmarks/tables.py` writes from the results."""
    script = "import tables; text = (tables.ROOT / 'README.md').read_text(); assert tables.fill(text) == text"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT / "benchmarks").returncode == 0


def test_measurements_come_from_result_files() -> None:
    """docs/benchmarks.md says what the committed results of `expertflow bench` say, and its pictures are there."""
    script = "import tables; p = tables.ROOT / 'docs/benchmarks.md'; t = p.read_text(); assert tables.fill(t, tables.PAGES['docs/benchmarks.md']) == t"
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT / "benchmarks").returncode == 0
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all((ROOT / "docs" / name).is_file() for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))


def test_the_tree_names_every_module() -> None:
    """The README's tree names every module of the package, and nothing that is not there."""
    tree = (ROOT / "README.md").read_text().split("## The tree")[1]
    named = set(re.findall(r"^  ([\w/]+\.py)", tree, flags=re.MULTILINE))
    package = ROOT / "src" / "expertflow"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert named == {module for module in modules if not module.startswith("cli/")}


@pytest.mark.parametrize(
    "document", ["README.md", "docs/architecture.md", "docs/benchmarks.md", "docs/lab-notes.md", "CHANGELOG.md"]
)
def test_named_files_exist(document: str) -> None:
    """Every path that a document names in backquotes is there."""
    text = (ROOT / document).read_text()
    for name in re.findall(r"`((?:src|tests|docs|benchmarks|tools|cli|engine|models|memory|cache)/[\w./-]+)`", text):
        assert (ROOT / name).exists() or (ROOT / "src" / "expertflow" / name).exists(), name


def test_every_family_has_an_example_and_a_small_config() -> None:
    """A family row says what people know it by, and how to make a small one."""
    assert all(row.examples and row.tiny for row in FAMILIES.values())


def test_every_strategy_says_what_it_does() -> None:
    """A strategy row has a summary for tables and documents."""
    assert all(len(row.summary) > 20 for row in STRATEGIES.values())
