"""What `expertflow eval-predictor` measures, checked before torch is imported. Must not know predictors."""

import re
from dataclasses import dataclass

from expertflow.cli.record_bytes import bytes_of
from expertflow.errors import ConfigError
from expertflow.predict.evaluation.options import StudyOptions


@dataclass(frozen=True, kw_only=True)
class Test(StudyOptions):
    """A study, and how many bytes an expert has in its replays.

    Attributes:
        model: checkpoint of the trace, whose experts' bytes are used; None: not stated.
        record_mb: bytes of an expert in 10^6, where no model is stated; None: from the trace.
    """

    model: str | None = None
    record_mb: float | None = None

    def check(self) -> None:
        """Check the options before anything is loaded.

        Raises:
            ConfigError: for an impossible option.
            TraceError: for a malformed condition, or a trace that cannot be opened.
        """
        if self.record_mb is not None:
            bytes_of(self.record_mb)
        super().check()


def parse_cases(text: str) -> tuple[tuple[int, int], ...]:
    """Read `1,4,4x2`: live sequences, and behind an x the groups in which they take turns; empty: none.

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
