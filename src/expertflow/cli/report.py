"""`expertflow report`: result files in, a page with tables and pictures out."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from expertflow.bench.result import read_result
from expertflow.errors import ConfigError


def main(*, results: list[Path], out: Path) -> None:
    """Read, write, show where."""
    if find_spec("matplotlib") is None:
        raise ConfigError("the report's pictures need matplotlib", "Install it: pip install 'expertflow-moe[plot]'.")
    page = import_module("expertflow.bench.pages.report")  # imports matplotlib
    written = page.write_report([(path.name, read_result(path)) for path in results], out)
    console = Console()
    for path in written:
        console.print(str(path), soft_wrap=True, markup=False, highlight=False)
