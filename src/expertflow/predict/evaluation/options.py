"""What a study of a predictor measures. Must not load torch, and must not know predictors."""

from dataclasses import dataclass
from pathlib import Path

from expertflow.errors import ConfigError
from expertflow.predict.dataset import read_condition
from expertflow.trace.format import open_trace
from expertflow.units import read_slots


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What is measured.

    Attributes:
        trace: file with the sequences to predict.
        free: trace that the free baselines learn from; None: they learn each half of the sequences from the other.
        only: `key=text` of the sequences to measure; empty: all.
        leave_out: `key=text` of sequences that the free baselines do not learn from; empty: none.
        skip: flag of sequences to leave out; empty: none.
        cases: live sequences, and the groups in which they take turns; empty: no replay.
        slots: counts or shares.
        steps: of a replay, at most.
    """

    trace: Path
    free: Path | None
    only: str
    leave_out: str
    skip: str
    cases: tuple[tuple[int, int], ...]
    slots: tuple[str, ...]
    steps: int

    def check(self) -> None:
        """Check the options before anything is loaded.

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
        for slots in self.slots:
            read_slots(slots)
        for condition in filter(None, (self.only, self.leave_out)):
            read_condition(condition)
        for trace in filter(None, (self.trace, self.free)):
            open_trace(trace)
