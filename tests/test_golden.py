"""The simulator's decisions, held against a file made before the modules were moved: same events in the same order.

`python tests/test_golden.py` writes the file anew; do so only where decisions are meant to change, and say why.
"""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from expertflow.cache.strategy import STRATEGIES
from expertflow.events import Event
from expertflow.sim.replay import replay_events
from expertflow.sim.workload import live_sequences
from expertflow.trace.format import load_trace

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "simulator_events.json"
CASES = [(1, 1, 96), (1, 1, 192), (4, 1, 192), (4, 2, 384)]
"""Sequences, groups they step in, slots."""


def happened(strategy: str, batch: int, groups: int, slots: int) -> dict[str, object]:
    """What a strategy does in the first 30 steps of recorded routing: counts a kind, and a hash of every event."""
    trace = load_trace(DATA / "gpt_oss_20b_excerpt" / "routing.trace").without("repetition")
    whole = live_sequences(trace, batch, groups)
    workload = replace(whole, members=whole.members[:30])
    events: list[Event] = replay_events(workload, STRATEGIES[strategy], slots, 1000)
    lines = [f"{e.kind.value} {e.step} {e.layer} {e.expert} {e.slot} {e.value}" for e in events]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"counts": dict(sorted(Counter(e.kind.value for e in events).items())), "first": lines[:8], "sha256": digest}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_the_recorded_decisions(strategy: str, case: tuple[int, int, int]) -> None:
    """Moving and renaming code changes no decision."""
    golden = json.loads(GOLDEN.read_text())
    assert happened(strategy, *case) == golden[f"{strategy} {case}"]


if __name__ == "__main__":
    found = {f"{name} {case}": happened(name, *case) for name in STRATEGIES for case in CASES}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
