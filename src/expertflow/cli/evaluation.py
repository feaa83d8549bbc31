"""What `expertflow eval-predictor` measures, checked before torch is imported. Knows options; refuses to know predictors."""

import re
from dataclasses import dataclass
from pathlib import Path

from expertflow.cli.record_bytes import bytes_of
from expertflow.errors import ConfigError
from expertflow.predict.dataset import read_condition
from expertflow.trace.format import open_trace
from expertflow.units import read_slots


@dataclass(frozen=True, kw_only=True)
class Test:
    """What is measured.

    Attributes:
        trace: sequences to predict.
        free: trace that the free baselines learn from; None: each half of the sequences from the other.
        only: `key=text` of the sequences to take; empty: all.
        leave_out: `key=text` of sequences the free baselines do not learn from; empty: none.
        skip: flag of sequences to leave out; empty: none.
        cases: live sequences and the groups they take turns in; none: no replay.
        slots: counts or shares.
        steps: of a replay, at most.
        model: checkpoint the trace is of: what an expert's bytes are taken from; None: not stated.
        record_mb: bytes of an expert in 10^6, where no model is stated; None: what the trace says.
    """

    trace: Path
    free: Path | None
    only: str
    leave_out: str
    skip: str
    cases: tuple[tuple[int, int], ...]
    slots: tuple[str, ...]
    steps: int
    model: str | None = None
    record_mb: float | None = None

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: for an impossible option.
            TraceError: for a malformed condition, or a trace that cannot be opened.
        """
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} is too small", "Replay one step or more.")
        if self.leave_out and self.free is None:
            raise ConfigError(
                f"leave_out={self.leave_out!r} needs a trace that the baselines learn from", "Give it with --baselines."
            )
        if self.record_mb is not None:
            bytes_of(self.record_mb)
        for slots in self.slots:
            read_slots(slots)
        for condition in filter(None, (self.only, self.leave_out)):
            read_condition(condition)
        for trace in filter(None, (self.trace, self.free)):
            open_trace(trace)


def parse_cases(text: str) -> tuple[tuple[int, int], ...]:
    """`1,4,4x2`: live sequences, and after an x the groups they take turns in; empty: none.

    Raises:
        ConfigError: if a part is no such thing.
    """
    cases = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        found = re.fullmatch("([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,8}))?", part, re.ASCII)
        if found is None or int(found[1]) % int(found[2] or 1):
            raise ConfigError(f"batch={part!r} is no number of sequences", "Write it like 1,4,16 or 4x2 (two groups).")
        cases.append((int(found[1]), int(found[2] or 1)))
    return tuple(cases)
