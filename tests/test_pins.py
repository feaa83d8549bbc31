"""The pins fit together: with each other, with pyproject.toml, and with what each build of torch requires."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import ROOT

LINUX = {"platform_system": "Linux", "sys_platform": "linux", "python_version": "3.11", "extra": ""}
FILES = ("constraints.txt", "constraints-newest.txt")
TORCH = "2.13.0"


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """Versions by name."""
    split = (line.split("==") for line in lines(ROOT / name))
    return {canonicalize_name(package): version for package, version in split}


def unmet(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """Requirements on Linux that a pin contradicts."""
    found = []
    for entry in map(Requirement, requirements):
        version = pinned.get(canonicalize_name(entry.name))
        applies = entry.marker is None or entry.marker.evaluate(LINUX)
        if applies and version is not None and version not in entry.specifier:
            found.append(str(entry))
    return found


@pytest.mark.parametrize("build", ["cpu", "cuda"])
@pytest.mark.parametrize("name", FILES)
def test_pins_fit_both_builds_of_torch(name: str, build: str) -> None:
    """What the recorded metadata of a torch wheel requires agrees with every pin; a new torch needs new records."""
    pinned = pins(name)
    assert pinned["torch"] == TORCH
    assert unmet(lines(ROOT / "tools" / "pins" / f"torch-{TORCH}-{build}.txt"), pinned) == []


@pytest.mark.parametrize("name", FILES)
def test_pins_fit_the_ranges_of_the_project(name: str) -> None:
    """Every dependency of pyproject.toml is pinned, to a version it allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    wanted = [*project["dependencies"], *extras]
    pinned = pins(name)
    assert unmet(wanted, pinned) == []
    assert {canonicalize_name(Requirement(line).name) for line in wanted} <= set(pinned)


def test_only_transformers_and_its_hub_are_newer() -> None:
    """The second file is the first one with another transformers: else a difference in the smoke test has two causes."""
    ours, newest = (pins(name) for name in FILES)
    changed = {name for name in ours.keys() & newest.keys() if ours[name] != newest[name]}
    assert changed == {"transformers", "huggingface-hub"}


def test_a_wrong_pin_is_found() -> None:
    """The check finds the pin that once made the CUDA build uninstallable."""
    recorded = lines(ROOT / "tools" / "pins" / f"torch-{TORCH}-cuda.txt")
    assert [line.split("=")[0] for line in unmet(recorded, {**pins(FILES[0]), "triton": "3.6.0"})] == ["triton"]
