"""Compare two source trees on this machine: same tokens, logits, events, counters, plans and traces, bit for bit.

Usage: `python tools/compare_trees.py OLD_SRC NEW_SRC [WORD ...]`; with words, only cases whose name has one of them. Each tree
is the folder that holds `expertflow`; the old one has its `tests` beside it, which make the small models. `compare_probe.py`
runs in one process a tree, both at once. Ends with 0 if all is equal, 1 at a difference, 2 if a tree could not be run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

PROBE = Path(__file__).with_name("compare_probe.py")
EQUAL, DIFFERENT, BROKEN = 0, 1, 2
NOT_COMPARED = ("case", "seconds", "ran", "message")
"""Parts of a case that may differ: times, names of kernels, wording."""
LINE = 120
"""Characters of a value that is shown."""
PROSE = ("notes", "why_host")
"""Parts of a plan that are sentences: it counts whether there are any."""


def main(old: Path, new: Path, words: list[str]) -> int:
    """Run both trees, show the first case that differs, and return the exit code."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="expertflow-compare-") as folder:
        models, outs = Path(folder) / "models", (Path(folder) / "old.jsonl", Path(folder) / "new.jsonl")
        saving = _start(old, "save", str(old.parent / "tests"), str(models))
        running = [saving]
        if saving.wait() == 0:
            running = [
                _start(tree, "run", str(models), str(out), *words) for tree, out in zip((old, new), outs, strict=True)
            ]
        if any([process.wait() for process in running]):  # noqa: C419 - all of them are waited for
            print("a tree could not be run, see above")
            return BROKEN
        ran_old, ran_new = ([json.loads(line) for line in out.read_text().splitlines()] for out in outs)
    for tree, (first, *_) in ((old, ran_old), (new, ran_new)):
        if not Path(first["package"]).is_relative_to(tree):
            print(f"{first['package']} was run in place of {tree}")
            return BROKEN
    code = report(ran_old[1:], ran_new[1:])
    print(f"{time.perf_counter() - began:.0f} s")
    return code


def _start(tree: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    return subprocess.Popen([sys.executable, "-W", "ignore", str(PROBE), *arguments], env=environment)


def report(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> int:
    """Print what was compared and the first case that differs.

    Args:
        old: the old tree's cases, as the probe wrote them.
        new: the new tree's.

    Returns:
        The exit code.
    """
    names = [[case["case"] for case in cases] for cases in (old, new)]
    if not old or names[0] != names[1]:
        print(f"the trees ran different cases: {sorted(set(names[0]) ^ set(names[1])) or 'none'}")
        return DIFFERENT
    refused = [case["case"] for case in old if "error" in case]
    kinds = Counter(event[0] for case in old for event in case.get("events", ()))
    kernels = [sum((Counter(case.get("ran", {})) for case in cases), Counter()) for cases in (old, new)]
    print(
        f"{len(old)} cases, {sum(len(tokens) for case in old for tokens in case.get('tokens', ()))} tokens, "
        f"{sum(len(case.get('logits', ())) for case in old)} logits, {sum(bool(case.get('trace')) for case in old)} traces; "
        f"refused by the old tree: {', '.join(refused) or 'none'}"
    )
    print("events:", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()))
    print(f"{kernels[0].total()} launches of Triton kernels in the old tree, {kernels[1].total()} in the new one:")
    print(" ", ", ".join(f"{count} {name}" for name, count in kernels[0].most_common()))
    spent = [sum(case["seconds"] for case in cases) for cases in (old, new)]
    print(f"processor time in the cases: {spent[0]:.0f} s in the old tree, {spent[1]:.0f} s in the new one")
    wrong = [(mine["case"], found) for mine, other in zip(old, new, strict=True) if (found := differences(mine, other))]
    if not wrong:
        print("all equal")
        return EQUAL
    name, found = wrong[0]
    print(f"{len(wrong)} cases differ; the first: {name}", *found, sep="\n  ")
    return DIFFERENT


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The first difference of each part of a case that differs; none if it is equal."""
    found = []
    for part in sorted({*old, *new} - set(NOT_COMPARED)):
        mine, other = old.get(part), new.get(part)
        if part == "counters" and mine and other:  # a counter may be new or gone if it counts nothing
            mine, other = ({**dict.fromkeys({*mine, *other}, 0), **one} for one in (mine, other))
        if part == "plan" and mine and other:
            mine, other = ({key: bool(of) if key in PROSE else of for key, of in one.items()} for one in (mine, other))
        if mine != other:
            place, a, b = first_difference(mine, other)
            found.append(f"{part}{place}: {a} in the old tree, {b} in the new one")
    return found


def first_difference(old: Any, new: Any) -> tuple[str, str, str]:
    """Where two unequal values of JSON differ first, and both values there, cut to a line; an event is shown whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in sorted({*old, *new}) if key not in old or key not in new or old[key] != new[key])
        place, *values = first_difference(old.get(key), new.get(key))
        return f"[{key}]{place}", *values
    if isinstance(old, list | str) and type(old) is type(new):
        shorter = min(len(old), len(new))
        at = next((at for at in range(shorter) if old[at] != new[at]), shorter)
        if isinstance(old, str):
            return f"[{at}]", *(repr(value[at : at + 32]) for value in (old, new))
        if at == shorter:
            return f"[{at}]", *(_line(value[at]) if at < len(value) else "nothing" for value in (old, new))
        if max(len(_line(old[at])), len(_line(new[at]))) == LINE:
            place, *values = first_difference(old[at], new[at])
            return f"[{at}]{place}", *values
        return f"[{at}]", _line(old[at]), _line(new[at])
    return "", _line(old), _line(new)


def _line(value: Any) -> str:
    return repr(value)[:LINE]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), sys.argv[3:]))
