"""What runs next: waiting and live sequences in, one pass over prompts or one decode step at a time out.

A sequence waits, gets a KV row, has its prompt read in passes of at most `chunk` tokens, then takes part in every
*round*. In a round each live sequence steps once, in groups of at most `batch`. Between two rounds one pass over
prompts may run. So a long prompt does not delay the others, and a waiting request does not wait for the others to end.
Groups are made by arrival, by predicted route, or by the cost model. An `admission` rule decides when waiting requests
get rows. Pure: numbers in, numbers out, no clock, no tensors. Must not know tokens, models and caches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from expertflow.config import SCHEDULES, nearest
from expertflow.errors import ConfigError
from expertflow.schedule.admission import Admission, AtOnce, Moment
from expertflow.schedule.cluster import group, in_order
from expertflow.schedule.cost import StepPrices, best_guesses, cheapest
from expertflow.schedule.portions import Pace, Unread, columns, even_room, portions

Grouping = Literal["fifo", "group", "auto"]
Chances = Callable[[Sequence[int]], npt.NDArray[np.floating] | None]
"""How likely the next token of each sequence uses an expert, `[N, L, E]`; None where they are unknown."""
_CANDIDATES = 16
"""Waiting requests that are compared when some are to be admitted by route."""
_LOOKED_AT = 256
"""Waiting requests that are looked at for some that fit, at most."""
_PAGES = 4
"""Pages of a pass whose pieces end at borders of pages, at least: smaller ones would not be shared fairly."""
_LONGEST_PAUSE = 32
"""Rounds that `auto` steps by arrival before it looks at routes again, at most: 1 when that was cheaper, then 2, 4, ..."""


def check_schedule(name: str, *, predicted: bool) -> None:
    """Refuse a schedule that is unknown, or that needs a predictor where there is none.

    Args:
        name: how live sequences are divided into groups.
        predicted: whether there is a predictor.

    Raises:
        ConfigError: then.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name!r} is unknown", nearest(name, SCHEDULES))
    if name == "group" and not predicted:
        raise ConfigError(
            "schedule='group' divides sequences by predicted route, and there is no predictor here",
            "Train one (`expertflow train-predictor`), or use schedule='auto' or 'fifo'.",
        )


class Part(NamedTuple):
    """Tokens `begin .. end - 1` of a prompt; `last` if it has no more."""

    sequence: int
    begin: int
    end: int
    last: bool


class Beginnings(Protocol):
    """Knows what of a prompt need not be read."""

    def begin(self, sequence: int, row: int) -> int:
        """Let an admitted sequence begin in a KV row; tokens of its prompt that need not be read."""

    def shared(self, sequence: int) -> int:
        """Pages that a live sequence has in common with others, or that a waiting one would have."""


class Prefill(NamedTuple):
    """A pass over parts of prompts."""

    parts: tuple[Part, ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Their sequences, in order."""
        return tuple(part.sequence for part in self.parts)


class Decode(NamedTuple):
    """A step of the first group; the other groups step next, in this order, as far as is known now."""

    groups: tuple[tuple[int, ...], ...]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that step now."""
        return self.groups[0]


@dataclass(kw_only=True)
class _Sequence:
    """A waiting or live sequence."""

    prompt: int
    pages: int = 0
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
        policy: how live sequences are divided into groups: `fifo` by arrival, `group` by route, `auto` what is cheapest.
        joins: whether sequences may join while others live; if not, they come and step in cohorts.
        whole: whether a prompt has to be read in one pass, however long; so is a cohort's.
        prompts: parts of a pass at most; None: as many as a step has sequences.
        unequal: whether parts of a pass may have any sizes; if not, all have room for as many tokens.
        even: whether passes of unequal parts have about as many tokens where nobody else waits; if not, all but the last have `chunk`.
        patience: how often a waiting request may be passed over by a later one.
        top_k: experts a token uses a layer.
        rates: what a step costs, for `auto`.
        expected: expected routes of live sequences, for `group` and `auto`.
        preview: the same of waiting ones, over their prompts' ends; None: requests are admitted as they came.
        admission: when waiting requests get free rows.
        pages: of keys and values, for all live sequences; None: a row is all that a sequence needs.
        page: tokens of one; where a pass has several, a piece of a prompt ends at a border of pages, so that others can begin there.
        pace: how long passes may last while sequences wait for their next token; None: as long as `chunk` tokens take.
        beginnings: what of prompts need not be read; None: all of them is read.

    Raises:
        ConfigError: if a number is impossible.
    """

    rows: int
    batch: int
    chunk: int
    policy: Grouping = "fifo"
    joins: bool = True
    whole: bool = False
    prompts: int | None = None
    unequal: bool = False
    even: bool = True
    patience: int = 4
    top_k: int = 1
    rates: StepPrices | None = None
    expected: Chances | None = None
    preview: Chances | None = None
    admission: Admission = field(default_factory=AtOnce)
    pages: int | None = None
    page: int = 1
    beginnings: Beginnings | None = None
    pace: Pace | None = None
    _waiting: dict[int, _Sequence] = field(default_factory=dict)
    _live: dict[int, _Sequence] = field(default_factory=dict)
    _round: list[list[int]] = field(default_factory=list)
    _place: int = 0
    _read_before_round: bool = False
    _by_arrival: int = 0
    _pause: int = 1

    def __post_init__(self) -> None:
        """Start with every row free."""
        for name in ("rows", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small", "Use 1 or more.")
        if not self.joins and self.rows > self.batch:
            raise ConfigError(
                f"{self.rows} live sequences cannot step in groups of {self.batch}: this model's run in cohorts",
                "Use as many live sequences as the batch has.",
            )
        self._free = list(range(self.rows))
        self._left = self.pages or 0
        whole = self.chunk % self.page == 0 and self.chunk >= _PAGES * self.page
        self._grain = self.page if whole else 1

    @property
    def waiting(self) -> int:
        """Requests without a KV row."""
        return len(self._waiting)

    @property
    def live(self) -> int:
        """Sequences with a KV row."""
        return len(self._live)

    @property
    def taken(self) -> float:
        """Share of the pages that live sequences have, 0 to 1; of the rows where there are no pages."""
        return 1 - (len(self._free) / self.rows if self.pages is None else self._left / self.pages)

    def add(self, sequence: int, prompt: int, tokens: int = 0) -> None:
        """Queue a request.

        Args:
            sequence: its number, never used before.
            prompt: tokens of its prompt.
            tokens: whose keys and values it keeps at most, with the prompt's.

        Raises:
            ConfigError: if it can never be admitted, because it needs more pages than there are.
        """
        assert sequence not in self._waiting
        assert sequence not in self._live
        need = 0 if self.pages is None else -(-max(prompt, tokens) // self.page)
        if self.pages is not None and need > self.pages:
            raise ConfigError(
                f"a request of {max(prompt, tokens)} tokens, answer included, cannot fit: keys and values of "
                f"{self.pages * self.page} are kept",
                "Shorten it, lower max_tokens, or raise kv_tokens.",
            )
        self._waiting[sequence] = _Sequence(prompt=prompt, pages=need)

    def remove(self, sequence: int) -> bool:
        """Forget a request that finished or was cancelled; False if it neither waits nor lives.

        Call it before the pages of its row go back.
        """
        if self._waiting.pop(sequence, None) is not None:
            return True
        if sequence not in self._live:
            return False
        self._left += self._live[sequence].pages - self._shared(sequence)
        gone = self._live.pop(sequence)
        self._free.append(gone.row)
        self._free.sort()
        self._leave_round(sequence)
        return True

    def reread(self, sequence: int, tokens: int) -> None:
        """Read a live sequence from its beginning before its next step: so many tokens, into the same KV row."""
        self._live[sequence].prompt, self._live[sequence].read = tokens, 0
        self._leave_round(sequence)

    def _leave_round(self, sequence: int) -> None:
        for members in self._round:
            if sequence in members:
                members.remove(sequence)

    def lives(self, sequence: int) -> bool:
        """Whether a sequence has a KV row."""
        return sequence in self._live

    def row(self, sequence: int) -> int:
        """The KV row of a live sequence."""
        return self._live[sequence].row

    def done(self, prefill: Prefill) -> None:
        """Note that a pass was carried out."""
        for part in prefill.parts:
            if part.sequence in self._live:
                self._live[part.sequence].read = part.end

    def next(self) -> Prefill | Decode | None:
        """What runs next; None if there is nothing to do."""
        while self._place < len(self._round):
            place, self._place = self._place, self._place + 1
            if self._round[place]:
                return self._step_of(place)
        live = [sequence for sequence in self._live if self._decodes(sequence)]
        reading = None if self._read_before_round and live else self._pass()
        self._read_before_round = reading is not None and bool(live)
        if reading is not None or not live:
            return reading
        self._round, self._place = self._divide(live), 1
        return self._step_of(0)

    def repeat(self, sequences: Sequence[int]) -> bool:
        """Let the group that has just stepped step again, if nothing else would come between, whatever its tokens are.

        Returns:
            Whether it does; the caller then runs that step without asking `next`.
        """
        if self._place < len(self._round) or self._round != [list(sequences)] or len(self._live) > len(sequences):
            return False
        if (self._waiting and self._free) or not all(self._decodes(sequence) for sequence in self._live):
            return False
        self._read_before_round = False
        if not self._waiting:
            self.admission.admits(self._moment())  # it counts rounds, and forgets what earlier requests waited
        return True

    def _step_of(self, place: int) -> Decode:
        """The step of a group, then the round's other groups; those that have stepped do so again in the next round."""
        order = self._round[place:] + self._round[:place]
        return Decode(tuple(tuple(members) for members in order if members))

    def _decodes(self, sequence: int) -> bool:
        return self._live[sequence].read == self._live[sequence].prompt

    def _divide(self, live: list[int]) -> list[list[int]]:
        """As few groups as the batch size allows: more are never cheaper (see `cost.cheapest`)."""
        count = -(-len(live) // self.batch)
        groups = in_order(len(live), count)
        chances = self._expected_routes(live) if count > 1 else None
        if chances is not None and self.policy == "group":
            groups = group(best_guesses(chances, self.top_k), count)
        elif chances is not None and self.rates is not None:
            found = cheapest(chances, self.batch, self.rates, self.top_k)
            if np.array_equal(found.groups, groups):
                self._by_arrival, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
            else:
                self._pause = 1
            groups = found.groups
        return [[live[place] for place in np.flatnonzero(groups == number)] for number in range(count)]

    def _expected_routes(self, live: list[int]) -> npt.NDArray[np.floating] | None:
        """Expected routes, if they are wanted; where grouping did not pay, `auto` steps by arrival for a while."""
        if self.policy == "fifo" or self.expected is None:
            return None
        if self._by_arrival:
            self._by_arrival -= 1
            return None
        return self.expected(live)

    def _pass(self) -> Prefill | None:
        """Parts of prompts that are being read, new ones included if it is time for some."""
        if (self.joins or not self._live) and self.admission.admits(self._moment()):
            self._admit()
        reading = [sequence for sequence in self._live if not self._decodes(sequence)]
        if not reading:
            return None
        if self.unequal and self.joins and not self.whole:
            return Prefill(tuple(self._fill(reading)))
        reading = reading[: self.prompts]
        if self.whole or not self.joins:
            reading = reading[: self.batch]
            width = max(self._live[sequence].prompt for sequence in reading)
        else:
            reading, width = self._widest(reading)
        parts = []
        for sequence in reading:
            known = self._live[sequence]
            end = min(known.prompt, known.read + width)
            parts.append(Part(sequence, known.read, end, end == known.prompt))
        return Prefill(tuple(parts))

    def _fill(self, reading: list[int]) -> Iterator[Part]:
        """Parts of any sizes, as their sequences came; see `portions`."""
        first, pace = reading[: self.prompts][: self.batch], self._pace_now()
        unread, room = self._unread(first), self.chunk
        # whoever else reads or waits would fill the last pass
        alone = pace is None and not self._waiting and len(first) == len(reading)
        if self.even and alone:
            room = even_room(unread, self.chunk, self._grain)
        taken = portions(unread, room, self._grain, pace)
        for sequence, (begin, end), count in zip(first, unread, taken, strict=True):
            if count:
                yield Part(sequence, begin, begin + count, begin + count == end)

    def _unread(self, sequences: Sequence[int]) -> list[Unread]:
        return [Unread(self._live[sequence].read, self._live[sequence].prompt) for sequence in sequences]

    def _pace_now(self) -> Pace | None:
        """How long the next pass may last; None if no sequence would wait for its next token meanwhile."""
        return self.pace if any(self._decodes(sequence) for sequence in self._live) else None

    def _widest(self, reading: list[int]) -> tuple[list[int], int]:
        """Sequences of a pass, and columns of each: what reads most tokens, with the first sequence among them.

        A pass has as many columns for each, so a long prompt beside short ones would be read in many passes.
        """
        left = {sequence: self._live[sequence].prompt - self._live[sequence].read for sequence in reading}
        longest = sorted(reading[1:], key=lambda sequence: -left[sequence])
        best, most, width, pace = reading[:1], 0, 0, self._pace_now()
        for count in range(1, min(len(reading), self.batch, self.chunk) + 1):
            members = [reading[0], *longest[: count - 1]]
            each = columns(self._unread(members), self.chunk, self._grain, pace)
            tokens = sum(min(left[sequence], each) for sequence in members)
            if tokens >= most:
                best, most, width = members, tokens, each
        return sorted(best, key=reading.index), width

    def _moment(self) -> Moment:
        stepping = sum(self._decodes(sequence) for sequence in self._live)
        return Moment(len(self._free), self._admissible(), len(self._live), stepping)

    def _admissible(self) -> int:
        """Waiting requests that free rows and pages would take, as they came; all of them where rows are what is short."""
        left, count = self._left, 0
        for sequence, known in islice(self._waiting.items(), _LOOKED_AT):
            need = self._need(sequence, known, left)
            if count == len(self._free) or (need > left and known.passed >= self.patience):
                break
            if need <= left:
                left, count = left - need, count + 1
        return count if count < len(self._free) else len(self._waiting)

    def _fitting(self) -> list[int]:
        """Waiting requests that may be admitted now, as they came: those that fit, but none past one that lost its patience."""
        found: list[int] = []
        for sequence, known in islice(self._waiting.items(), _LOOKED_AT):
            if self._need(sequence, known, self._left) <= self._left:
                found.append(sequence)
            elif known.passed >= self.patience:
                break
            if len(found) == _CANDIDATES:
                break
        return found

    def _need(self, sequence: int, known: _Sequence, left: int) -> int:
        """Pages that a waiting request would take; what it shares is only looked up where it matters."""
        return known.pages if known.pages <= left else known.pages - self._shared(sequence)

    def _shared(self, sequence: int) -> int:
        return 0 if self.beginnings is None else self.beginnings.shared(sequence)

    def _admit(self) -> None:
        """Give free rows to waiting requests that fit: as they came, or those whose routes are most like the live ones'."""
        while self._free and (candidates := self._fitting()):
            sequence = self._choose(candidates)
            for earlier in self._waiting:
                if earlier == sequence:
                    break
                self._waiting[earlier].passed += 1
            chosen = self._waiting.pop(sequence)
            chosen.row, self._left = self._free.pop(0), self._left - chosen.pages
            self._live[sequence] = chosen
            if self.beginnings is not None:
                chosen.read = self.beginnings.begin(sequence, chosen.row)
                self._left += self._shared(sequence)

    def _choose(self, candidates: list[int]) -> int:
        oldest = candidates[0]
        if self.preview is None or len(self._waiting) <= len(self._free) or not self._live:
            return oldest
        for sequence in candidates:
            if self._waiting[sequence].passed >= self.patience:
                return sequence
        chances = self.preview([*self._live, *candidates])
        if chances is None:
            return oldest
        union = 1.0 - (1.0 - chances[: len(self._live)].astype(np.float64)).prod(axis=0)
        added = (chances[len(self._live) :] * (1.0 - union)).sum(axis=(1, 2))
        return candidates[int(np.argmin(added))]
