"""The house plan: files, folders and functions stay small enough to be read once."""

import ast
from pathlib import Path

import pytest

from helpers import ROOT
from sharing import TOGETHER, group_of

SOURCE = ROOT / "src" / "expertflow"
FILES = sorted(SOURCE.rglob("*.py"))
FOLDERS = sorted({file.parent for file in FILES})
LONGEST_FILE, LONGEST_FUNCTION, MOST_MODULES, MOST_PARAMETERS = 450, 60, 12, 30
REASON = "# many parameters: "
"""What stands before the reason for a kernel of more than 30 parameters."""


def _functions(file: Path) -> list[ast.FunctionDef]:
    nodes = ast.walk(ast.parse(file.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _is_kernel(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_file_can_be_read_once(file: Path) -> None:
    """No file over 450 lines, no function over 60 but kernels, no kernel over 30 parameters without a reason beside it."""
    lines = file.read_text().splitlines()
    assert len(lines) <= LONGEST_FILE
    for function in _functions(file):
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        if _is_kernel(function):
            beside = "\n".join(lines[function.decorator_list[0].lineno - 4 : function.body[0].lineno])
            assert count <= MOST_PARAMETERS or REASON in beside, function.name
        else:
            assert function.end_lineno - function.lineno < LONGEST_FUNCTION, function.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(SOURCE)))
def test_a_folder_can_be_seen_at_once(folder: Path) -> None:
    """At most twelve modules a folder; commands have a file each."""
    modules = [file for file in folder.glob("*.py") if file.name not in ("__init__.py", "__main__.py")]
    assert folder.name == "cli" or len(modules) <= MOST_MODULES


def test_files_with_long_fixtures_stay_together() -> None:
    """Groups of tests name modules that are there; a test of one has its group's name, any other its own."""
    assert {f"{name}.py" for name in TOGETHER} <= {path.name for path in (ROOT / "tests").glob("test_*.py")}
    nodes = ["tests/test_golden.py::test_a[x::y]", "test_simulator.py::test_b", "tests/test_kv.py::test_golden"]
    assert [group_of(node) for node in nodes] == ["simulator", "simulator", nodes[2]]
