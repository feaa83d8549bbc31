"""When the predictor predicts: it pauses while nothing is loaded, and backs off after prefetches that nothing needed.

Pure numbers. Must not know tensors, sequences and events.
"""

import logging

IDLE_STEPS = 4
"""Decode steps without a load after which the predictor pauses; the next load resumes it. Measurements did not tell
1, 4 and 16 apart (docs/lab-notes.md): predicting costs little, and saves nothing where everything is resident."""
JUDGED_PREFETCHES = 32
"""Prefetches after which the predictor is judged."""
NEEDED_SHARE = 2 / 3
"""Share of the judged prefetches that a later access must need.

A prefetch is made from a probability of .77 on. Of a trained predictor's prefetches at least .97 are needed. Of a misled one's
.23 to .62 are needed with up to eight live sequences. With sixteen, .67 to .76 are, because then any expert is likely
(docs/benchmarks.md, "Is it the predictor?")."""
FIRST_BACKOFF, LONGEST_BACKOFF = 64, 4096
"""Decode steps of the first pause after a failed judgement, and of the longest; each further failure doubles the pause."""
_LOG = logging.getLogger(__name__)


class Pacing:
    """Decides from counts of loads whether the predictor predicts the next steps.

    Attributes:
        idle_steps: decode steps since the last load.
        backoff: decode steps that the predictor is still paused for after a failed judgement.
        last_backoff: length of the latest such pause; 0 after a passed judgement, and before the first one.
    """

    def __init__(self) -> None:
        """Start unpaused."""
        self.idle_steps = 0
        self.backoff = self.last_backoff = 0
        self._prefetched = self._needed = 0

    @property
    def paused(self) -> bool:
        """Whether the predictor only takes tokens in, and predicts nothing."""
        return self.idle_steps >= IDLE_STEPS or self.backoff > 0

    def resume(self) -> None:
        """End a pause; the next failed judgement still doubles the latest one."""
        self.idle_steps = self.backoff = 0

    def count(self, loads: int, steps: int = 1, prefetched: int = 0, needed: int = 0) -> None:
        """Count decode steps that are over. Passes over prompts are not counted.

        Args:
            loads: records they loaded, prefetches included.
            steps: how many steps they were.
            prefetched: prefetches among the loads.
            needed: accesses whose record a prefetch had loaded, counted at its first use.
        """
        self.idle_steps = 0 if loads else self.idle_steps + steps
        if self.backoff:  # the prefetches whose use is counted now were judged already
            self.backoff = max(0, self.backoff - steps)
            return
        self._prefetched, self._needed = self._prefetched + prefetched, self._needed + needed
        if self._prefetched < JUDGED_PREFETCHES:
            return
        if self._needed >= NEEDED_SHARE * self._prefetched:
            self.last_backoff = 0
        else:
            self.backoff = self.last_backoff = min(max(2 * self.last_backoff, FIRST_BACKOFF), LONGEST_BACKOFF)
            _LOG.info(
                "%d of %d prefetches were needed: the predictor pauses for %d steps",
                self._needed,
                self._prefetched,
                self.backoff,
            )
        self._prefetched = self._needed = 0
