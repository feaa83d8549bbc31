"""Who steps next: waiting and live sequences in, one pass or step at a time out.

A sequence waits, gets a row, has its prompt read in passes of at most `chunk` tokens, then takes part in every *round*:
each live sequence steps once, in turns of at most `batch`. Between two rounds one pass of prompts may run, so that a long
prompt does not hold the others up, and a waiting request does not wait for the others to end. Turns are made by arrival, or
by predicted route, or as the cost model says. A pass needs nearly every expert, however few its tokens: so a waiting request is
let in once the rows that stood empty have cost as much as a pass does, and others come with it, or once it waited as long as a
few passes take. Pure: numbers in, numbers
out, no clock, no tensors.
Knows sequence numbers, prompt lengths and expected routes; refuses to know tokens, models and caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from expertflow.errors import ConfigError
from expertflow.schedule.cluster import group, in_order
from expertflow.schedule.cost import Costs, Rates, best_guesses, cheapest

Policy = Literal["fifo", "group", "auto"]
Ask = Callable[[Sequence[int]], npt.NDArray[np.floating] | None]
"""How likely the next token of each sequence uses an expert, `[N, L, E]`; None if nobody knows."""
LONGEST_WAIT = 4
"""Passes that a request waits at most, in time of rounds, for others to come with it; measured, see docs/lab-notes.md."""
_CANDIDATES = 16
"""Waiting requests that are compared when some are to be admitted by route."""
_REST = 32
"""Rounds that `auto` steps by arrival before it asks again, at most: 1 when that was cheaper, then 2, 4, ..."""


class Part(NamedTuple):
    """Tokens `begin .. end - 1` of a prompt; `last` if it has no more."""

    sequence: int
    begin: int
    end: int
    last: bool


class Prefill(NamedTuple):
    """A pass over parts of prompts."""

    parts: tuple[Part, ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Whose they are."""
        return tuple(part.sequence for part in self.parts)


class Decode(NamedTuple):
    """A step of the first group; the others' turns come next, in this order, as far as is known now."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Whose step it is."""
        return self.groups[0]


@dataclass(kw_only=True)
class _Sequence:
    """A waiting or live sequence."""

    prompt: int
    row: int = -1
    read: int = 0
    passed: int = 0


@dataclass(kw_only=True)
class Scheduler:
    """Decides what runs next.

    Args:
        rows: sequences that may live at once.
        batch: sequences of a step at most.
        chunk: tokens of a pass at most, over all its sequences.
        policy: how live sequences are divided into turns: `fifo` by arrival, `group` by route, `auto` what is cheapest.
        joins: whether sequences may join while others live; if not, they come and step in cohorts.
        whole: whether a prompt has to be read in one pass, however long; so is a cohort's.
        patience: how often a waiting request may be passed over by a later one.
        top_k: experts a token uses a layer.
        rates: what a step costs, for `auto`.
        ask: expected routes of live sequences, for `group` and `auto`.
        preview: the same of waiting ones, over their prompts' ends; None: requests are admitted as they came.
        costs: what passes and rounds take as a rule; None: requests are admitted as soon as there is a row.

    Raises:
        ConfigError: if a number is impossible.
    """

    rows: int
    batch: int
    chunk: int
    policy: Policy = "fifo"
    joins: bool = True
    whole: bool = False
    patience: int = 4
    top_k: int = 1
    rates: Rates | None = None
    ask: Ask | None = None
    preview: Ask | None = None
    costs: Callable[[], Costs] | None = None
    _waiting: dict[int, _Sequence] = field(default_factory=dict)
    _live: dict[int, _Sequence] = field(default_factory=dict)
    _round: list[list[int]] = field(default_factory=list)
    _place: int = 0
    _read_before_round: bool = False
    _by_arrival: int = 0
    _rest: int = 1
    _lost: float = 0.0
    _waited: float = 0.0

    def __post_init__(self) -> None:
        """Every row free."""
        for name in ("rows", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small", "Use 1 or more.")
        if not self.joins and self.rows > self.batch:
            raise ConfigError(
                f"{self.rows} live sequences cannot take turns in batches of {self.batch}: this model's run in cohorts",
                "Use as many live sequences as the batch has.",
            )
        self._free = list(range(self.rows))

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Sequences with a row."""
        return len(self._live)

    def add(self, sequence: int, prompt: int) -> None:
        """A request comes: its number, never used before, and the tokens of its prompt."""
        assert sequence not in self._waiting
        assert sequence not in self._live
        self._waiting[sequence] = _Sequence(prompt=prompt)

    def remove(self, sequence: int) -> bool:
        """A request is over, finished or cancelled, wherever it was; False if it is not known (any more)."""
        if self._waiting.pop(sequence, None) is not None:
            return True
        gone = self._live.pop(sequence, None)
        if gone is None:
            return False
        self._free.append(gone.row)
        self._free.sort()
        self._leave_round(sequence)
        return True

    def reread(self, sequence: int, tokens: int) -> None:
        """A live sequence has to be read from its beginning before its next step: so many tokens, into the same KV row."""
        self._live[sequence].prompt, self._live[sequence].read = tokens, 0
        self._leave_round(sequence)

    def _leave_round(self, sequence: int) -> None:
        for turn in self._round:
            if sequence in turn:
                turn.remove(sequence)

    def row(self, sequence: int) -> int:
        """The row of a live sequence."""
        return self._live[sequence].row

    def done(self, prefill: Prefill) -> None:
        """A pass was carried out: its prompts have been read as far as it says."""
        for part in prefill.parts:
            if part.sequence in self._live:
                self._live[part.sequence].read = part.end

    def next(self) -> Prefill | Decode | None:
        """What runs next; None if there is nothing to do."""
        while self._place < len(self._round):
            turn, self._place = self._place, self._place + 1
            if self._round[turn]:
                return self._turn(turn)
        live = [sequence for sequence in self._live if self._decodes(sequence)]
        reading = None if self._read_before_round and live else self._pass()
        self._read_before_round = reading is not None and bool(live)
        if reading is not None or not live:
            return reading
        self._round, self._place = self._divide(live), 1
        return self._turn(0)

    def _turn(self, turn: int) -> Decode:
        """A turn, and behind it the round's others; those that had theirs come again in the next round."""
        order = self._round[turn:] + self._round[:turn]
        return Decode(tuple(tuple(members) for members in order if members))

    def _decodes(self, sequence: int) -> bool:
        return self._live[sequence].read == self._live[sequence].prompt

    def _divide(self, live: list[int]) -> list[list[int]]:
        """As few turns as the batch size allows: more are never cheaper (see `cost.cheapest`)."""
        count = -(-len(live) // self.batch)
        groups = in_order(len(live), count)
        chances = self._ask(live) if count > 1 else None
        if chances is not None and self.policy == "group":
            groups = group(best_guesses(chances, self.top_k), count)
        elif chances is not None and self.rates is not None:
            found = cheapest(chances, self.batch, self.rates, self.top_k)
            if np.array_equal(found.groups, groups):
                self._by_arrival, self._rest = self._rest, min(2 * self._rest, _REST)
            else:
                self._rest = 1
            groups = found.groups
        return [[live[place] for place in np.flatnonzero(groups == number)] for number in range(count)]

    def _ask(self, live: list[int]) -> npt.NDArray[np.floating] | None:
        """Expected routes, if they are wanted; where asking did not pay, `auto` does not ask for a while."""
        if self.policy == "fifo" or self.ask is None:
            return None
        if self._by_arrival:
            self._by_arrival -= 1
            return None
        return self.ask(live)

    def _pass(self) -> Prefill | None:
        """Parts of prompts that are being read, new ones included if it is time for some."""
        if (self.joins or not self._live) and self._opportune():
            self._admit()
        reading = [sequence for sequence in self._live if not self._decodes(sequence)]
        if not reading:
            return None
        if self.whole or not self.joins:
            reading = reading[: self.batch]
            columns = max(self._live[sequence].prompt for sequence in reading)
        else:
            reading, columns = self._widest(reading)
        parts = []
        for sequence in reading:
            known = self._live[sequence]
            end = min(known.prompt, known.read + columns)
            parts.append(Part(sequence, known.read, end, end == known.prompt))
        return Prefill(tuple(parts))

    def _widest(self, reading: list[int]) -> tuple[list[int], int]:
        """Who is read in a pass, and how many columns each: whatever reads most tokens, with the first one among them.

        A pass has as many columns for each, so a long prompt beside short ones would be read in many passes.
        """
        left = {sequence: self._live[sequence].prompt - self._live[sequence].read for sequence in reading}
        longest = sorted(reading[1:], key=lambda sequence: -left[sequence])
        best, most, width = reading[:1], 0, self.chunk
        for count in range(1, min(len(reading), self.batch, self.chunk) + 1):
            columns, members = self.chunk // count, [reading[0], *longest[: count - 1]]
            tokens = sum(min(left[sequence], columns) for sequence in members)
            if tokens >= most:
                best, most, width = members, tokens, columns
        return sorted(best, key=reading.index), width

    def _opportune(self) -> bool:
        """Whether to let waiting requests in now. Asked once a round.

        Let in one by one, each pays for a pass; let in together, rows stand empty for the first ones. Their sum is least where both
        are equal, so a pass is due once the rows that stood empty while somebody waited have cost as much: of what a round takes
        however few step, the share that those who wait would have had; or once the rounds that ran beside free rows took as long as
        `LONGEST_WAIT` passes. Beside prompts that are being read anyway nobody waits.
        """
        wanted = min(len(self._free), len(self._waiting))
        if not wanted:
            if not self._waiting:
                self._lost = self._waited = 0.0
            return False
        stepping = sum(self._decodes(sequence) for sequence in self._live)
        if self.costs is None or not stepping or stepping < len(self._live):
            self._lost = self._waited = 0.0  # nobody is held up
            return True
        costs = self.costs()
        self._lost += costs.fixed * wanted / (stepping + wanted)
        self._waited += costs.round_
        if self._lost < costs.pass_ and self._waited < LONGEST_WAIT * costs.pass_:
            return False
        self._lost = self._waited = 0.0
        return True

    def _admit(self) -> None:
        """Give free rows to waiting requests: as they came, or those whose routes are most like the live ones'."""
        while self._free and self._waiting:
            sequence = self._choose()
            for earlier in self._waiting:
                if earlier == sequence:
                    break
                self._waiting[earlier].passed += 1
            chosen = self._waiting.pop(sequence)
            chosen.row = self._free.pop(0)
            self._live[sequence] = chosen

    def _choose(self) -> int:
        oldest = next(iter(self._waiting))
        if self.preview is None or len(self._waiting) <= len(self._free) or not self._live:
            return oldest
        for sequence, known in self._waiting.items():
            if known.passed >= self.patience:
                return sequence
        candidates = list(self._waiting)[:_CANDIDATES]
        chances = self.preview([*self._live, *candidates])
        if chances is None:
            return oldest
        union = 1.0 - (1.0 - chances[: len(self._live)].astype(np.float64)).prod(axis=0)
        added = (chances[len(self._live) :] * (1.0 - union)).sum(axis=(1, 2))
        return candidates[int(np.argmin(added))]
