"""Benchmarks and tools measure what users run: they look at nothing private of the package, and change nothing in it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from helpers import ROOT

SCRIPTS = sorted(path for folder in ("benchmarks", "tools") for path in (ROOT / folder).rglob("*.py"))
THIRD_PARTY = {"_grouped_mm", "_sleep", "_asdict", "_replace"}
"""Private names of others: an operator of torch and its way to keep a GPU busy, and the methods of every named tuple, which are public in spite of their names."""
SETTINGS = {
    "architectures", "decoder", "dtype", "eos_token_id", "generation_config", "pre_tokenizer",  # of transformers and tokenizers
    "should_exit",  # of uvicorn: how a server is asked to end
    "grad", "k",  # of torch: a parameter's gradient, and what an autograd function keeps
}  # fmt: skip
"""Attributes of other libraries that scripts set where there is no other way."""
EXEMPT = {
    "tools/compare_probe.py": {
        "imports unittest.mock",
        "calls patch",
        "looks at _offloaded",
    },  # it runs in two trees, one of which has no other way in, and puts Triton's kernels on a CPU
    "benchmarks/dense_step.py": {
        "imports unittest.mock",
        "calls patch",
    },  # it takes building blocks away, to measure the modules' own code beside them
    "tools/switch/evaluate.py": {
        "imports unittest.mock",
        "calls patch",
    },  # a control: a predictor that says the same of wrong experts
}
"""Scripts that deceive the package on purpose, which no option should do."""
CHANGERS = {"setattr", "delattr", "patch", "monkeypatch"}
"""Names that change attributes of objects."""
NAMESPACES = {"options", "given"}
"""What `argparse` returns, by the names the scripts give it."""


@cache
def parsed(path: Path) -> ast.Module:
    """A script's tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def own_fields_of(folder: Path) -> set[str]:
    """Attributes of classes of the scripts in a folder."""
    return own_fields([parsed(path) for path in SCRIPTS if path.parent == folder])


def own_fields(trees: list[ast.Module]) -> set[str]:
    """Attributes that the scripts' own classes declare or set on themselves."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            found |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)}  # fmt: skip
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root(node) in {"self", "cls"}:
            found.add(node.attr)
    return found


def root(node: ast.expr) -> str:
    """The name that a chain of attributes, items and calls begins with; empty if it begins with no name."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.Module) -> set[str]:
    """Names that a script gets from the package."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "expertflow":
            found |= {alias.asname or alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if alias.name.startswith("expertflow")}  # fmt: skip
    return found


def names_of(node: ast.expr) -> list[str]:
    """The names of a chain of attributes, last one first: `mock.patch.object` gives object, patch, mock."""
    found = []
    while isinstance(node, ast.Attribute):
        found.append(node.attr)
        node = node.value
    return [*found, node.id] if isinstance(node, ast.Name) else found


def private_name(call: ast.Call) -> str:
    """The private name that a call of `getattr` reads; empty if it is public or not a literal."""
    name = call.args[1].value if len(call.args) > 1 and isinstance(call.args[1], ast.Constant) else ""
    private = isinstance(name, str) and name.startswith("_") and not name.startswith("__")
    return name if private and name not in THIRD_PARTY else ""


def attribute_fault(node: ast.Attribute, package: set[str], fields: set[str]) -> str:
    """What is wrong with reading or writing an attribute; empty if nothing is."""
    private = node.attr.startswith("_") and not node.attr.startswith("__") and node.attr not in THIRD_PARTY
    if private and root(node) not in {"self", "cls"}:
        return f"looks at {node.attr}"
    allowed = root(node) in NAMESPACES or node.attr in fields | SETTINGS
    if not isinstance(node.ctx, ast.Load) and (root(node) in package or not allowed):
        return f"changes {node.attr}"
    return ""


def faults(tree: ast.Module, fields: set[str]) -> Iterator[str]:
    """What a script may not do."""
    package = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (fault := attribute_fault(node, package, fields)):
            yield fault
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield from (f"calls {name}" for name in sorted(CHANGERS.intersection(names_of(node.func))))
            if names_of(node.func) == ["getattr"] and (private := private_name(node)):
                yield f"looks at {private}"
        if isinstance(node, ast.Import | ast.ImportFrom) and "unittest" in ast.unparse(node):
            yield "imports unittest.mock"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("expertflow"):
            yield from (f"imports {alias.name}" for alias in node.names if alias.name.startswith("_"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_uses_the_front_door(path: Path) -> None:
    """No private name, no assignment to attributes of anything but its own classes, no patching."""
    found = {*faults(parsed(path), own_fields_of(path.parent))}
    assert found == EXEMPT.get(str(path.relative_to(ROOT)), set())


@pytest.mark.parametrize(
    "script",
    [
        "llm._offloaded.store",
        "engine.step()._scheduler",
        "from expertflow.engine import build\nbuild.load_dense = None",
        "from expertflow import LLM\nLLM.generate = print",
        "llm.engine.lock = None",
        "llm.plan.slots += 1",
        "del llm.tokenizer",
        "setattr(layer.mlp, 'router', None)",
        "from unittest.mock import patch",
        "from unittest import mock",
        "mock.patch.object(LLM, 'generate', print)",
        "getattr(llm, '_offloaded')",
        "from expertflow.bench.about import _commit",
        "from expertflow.config import EngineConfig\nclass Mine:\n    slots: int\nEngineConfig.slots = 3",
    ],
)
def test_the_walk_finds_what_it_looks_for(script: str) -> None:
    """Each of these would be a look inside, or a change of the package."""
    tree = ast.parse(script)
    assert [*faults(tree, own_fields([tree]))]
