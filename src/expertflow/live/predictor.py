"""The predictor in the engine: whose tokens come, what they will use, and what they really used.

A forecast (`cache.forecast.Forecast`) on top of `predict.online`. It maps live sequences to predictor rows and keeps what was
said of each one's coming step. A sequence's newest token is told to the predictor before its own next step or an earlier one of
others, so where groups take turns, everybody's path is known while one of them computes. Inside a captured step `ask` answers
on the device, and the true routing is noted there. If the predictor raises, it is switched off with a warning event
and generation goes on: a forecast can cost bytes, never a token. Knows sequences; refuses to know slots.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertflow.cache.forecast import Step
from expertflow.cache.horizon import hazards, take_turns, unite
from expertflow.cache.policy import Outlook
from expertflow.events import Event, EventKind, EventStream
from expertflow.live.batch import PredictorBatch
from expertflow.predict.model import sent
from expertflow.predict.online import OnlinePredictor
from expertflow.trace.owners import NOBODY, BatchOwners, NextBatch
from expertflow.types import HORIZONS

CALM = 4
"""Decode steps without a load after which the predictor rests; the next load wakes it. 1, 4 and 16 were not told
apart for sure (docs/lab-notes.md); asking costs little, and saves nothing where everything is there."""
JUDGED, TRUSTED = 32, 2 / 3
"""Loads ahead by which a predictor is judged, and the share of them that has to meet a need. They are made from a chance of .77 on, and those
of a trained one meet theirs in .97 of the cases and more, of a misled one in .23 to .62 where up to eight sequences live, in .67 and .76
where sixteen do and any expert is likely (docs/benchmarks.md, "Is it the predictor?")."""
DOUBT, LONGEST_DOUBT = 64, 4096
"""Decode steps that it rests if it is not: at first, and, doubled every time it fails again, at most."""
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Asked(NamedTuple):
    """The pass that runs and is not learnt yet: each token's row, and whether the predictor took its token in before."""

    rows: npt.NDArray[np.int64]
    decoding: bool


class LivePredictor:
    """What the predictor expects of the live sequences.

    Args:
        online: the predictor, a row for every sequence that may live at once.
        events: where it is told that the predictor was switched off.
        aside: entered while the predictor works: in host memory, which is not the device's, unless it is on the device.
        room: tokens of prompts that it is told of at once, if they are not all one sequence's.

    Attributes:
        artifact: what was trained.
        routes: int32 `[C + 1, L, K]` on the predictor's device, each row's experts in its last step; E where unknown.
        said: float32 `[C + 1, 5, L, E]` there, chances of each row's coming step, and within the horizons behind it.
        failure: why it was switched off, or None.
    """

    per_token, foreknown = True, False

    def __init__(
        self,
        online: OnlinePredictor,
        events: EventStream,
        aside: Callable[[], AbstractContextManager[object]] = nullcontext,
        room: int = 1 << 30,
    ) -> None:
        """No sequence yet."""
        self._online, self._events, self._aside, self._room = online, events, aside, room
        self.artifact = online.artifact
        self._layers, self._experts, self._top_k = online.artifact.shape
        self._owners = BatchOwners()
        self._live: dict[int, int] = {}
        self._housed: list[int] = []
        """The sequences that got rows last, as long as they all still have them."""
        self._untold: dict[int, int] = {}
        self._again: tuple[tuple[int, ...], list[int]] | None = None
        """The sequences of the last step, and their rows, as long as they have them."""
        self._told: dict[int, bool] = {}
        """The sequences whose newest token the predictor was told of, and whether it was asked what comes of it."""
        self._calm = 0
        self._ahead = self._found = 0
        self._doubt = self._doubted = 0
        """Steps that it is not trusted for from now on, and from the last judgement on."""
        self._stale: set[int] = set()
        """Rows that still hold what their last sequence left; cleared when the next one gets them, many at a time."""
        rows, device = online.rows + 1, online.device
        shape = rows, self._layers, self._top_k
        self.routes = torch.full(shape, self._experts, dtype=torch.int32, device=device)
        self.said = torch.zeros(rows, 1 + len(HORIZONS), self._layers, self._experts, device=device)
        self._asked = _Asked(np.zeros(0, dtype=np.int64), decoding=False)
        self.failure: str | None = None

    @property
    def sequences(self) -> int:
        """C, sequences that may live at once."""
        return self._online.rows

    @property
    def spare(self) -> int:
        """A row of nobody."""
        return self._online.spare

    def expect(self, coming: NextBatch) -> None:
        """Say whose rows come next; numbers are never used again for other sequences."""
        self._owners.expect(coming)
        self._guarded(Step(-1), lambda: self._house(coming))

    def leave(self, sequences: Sequence[int]) -> None:
        """These sequences are over."""
        self._guarded(Step(-1), lambda: self._forget([number for number in sequences if number in self._live]))

    def outlook(self, step: Step) -> Outlook | None:
        """The demand of the pass, and of the steps behind it; None if the tokens or their owners are not known."""
        return self._guarded(step, lambda: self._outlook(step))

    def learn(self, step: Step) -> None:
        """Take the pass's tokens and true routing in."""
        self._guarded(step, lambda: self._learn(step))

    def _guarded(self, step: Step, work: Callable[[], _T]) -> _T | None:
        if self.failure is not None:
            return None
        try:
            with self._aside():
                return work()
        except Exception as error:  # noqa: BLE001 - whatever a predictor raises, generation goes on without it
            self.switch_off(step.number, f"{type(error).__name__}: {error}")
            return None

    def switch_off(self, step: int, reason: str) -> None:
        """Ask it no more, and say why."""
        self.failure = reason
        _LOG.warning("the predictor failed in step %d and is switched off: %s", step, reason)
        self._events.emit(Event(EventKind.PREDICTOR_OFF, step, reason=reason))

    @property
    def resting(self) -> bool:
        """Whether the predictor is only told, and not asked: there was nothing to load lately, or too few of its loads met a need."""
        return self._calm >= CALM or self._doubt > 0

    def wake(self) -> None:
        """The next step is asked about, whatever the last ones were like."""
        self._calm = self._doubt = 0

    def loaded(self, rows: int, steps: int = 1, ahead: int = 0, found: int = 0) -> None:
        """Decode steps are over. What passes over prompts find of loads ahead is not counted.

        Args:
            rows: loads they took.
            steps: how many they were.
            ahead: loads ahead among them.
            found: needs that such a load met.
        """
        self._calm = 0 if rows else self._calm + steps
        if self._doubt:  # what is found now was loaded before, and is judged already
            self._doubt = max(0, self._doubt - steps)
            return
        self._ahead, self._found = self._ahead + ahead, self._found + found
        if self._ahead < JUDGED:
            return
        if self._found >= TRUSTED * self._ahead:
            self._doubted = 0
        else:
            self._doubt = self._doubted = min(max(2 * self._doubted, DOUBT), LONGEST_DOUBT)
            _LOG.info(
                "%d of %d loads ahead met a need: the predictor rests for %d steps",
                self._found,
                self._ahead,
                self._doubt,
            )
        self._ahead = self._found = 0

    def sampled(self, sequences: Sequence[int], tokens: Sequence[int]) -> None:
        """The newest tokens of these sequences, to be fed in when their turns come."""
        live, told, untold = self._live, self._told, self._untold
        for number, token in zip(sequences, tokens, strict=True):
            if number in live and number not in told:
                untold[number] = token

    def seats(self, sequences: Sequence[int]) -> list[int]:
        """Predictor rows of sequences; who has none shares that of nobody."""
        if self._again is not None and tuple(sequences) == self._again[0]:
            return self._again[1]
        return [self._live.get(number, self.spare) for number in sequences]

    def agenda(self, room: int) -> PredictorBatch | None:
        """What the step that was announced has to know; None if nothing is known of one of its sequences.

        Whoever calls it sees to it that the rows told are asked about before the groups are looked at, or are noted where it rests.

        Args:
            room: how many rows the caller can tell of a token; if there are more, they are told at once.
        """
        return self._guarded(Step(-1), lambda: self._agenda(room))

    def _agenda(self, room: int) -> PredictorBatch | None:
        coming = self._owners.coming
        if self._again is not None and not self._told and not coming.following and len(self._untold) <= room:
            numbers, rows = self._again
            if (
                tuple(coming.sequences) == numbers == tuple(self._untold)
            ):  # the same ones as in the last step, and nobody else
                tokens = list(self._untold.values())
                self._untold.clear()
                return PredictorBatch(rows, tokens, [] if self.resting else [rows])
        now = [number for number in coming.sequences if number in self._live]
        untold = [number for number in now if number in self._untold]
        untold += [number for number in self._untold if number not in untold]
        told, tokens = [self._live[number] for number in untold], [self._untold.pop(number) for number in untold]
        self._told.update(dict.fromkeys(untold, not self.resting))
        self._tell(told[room:], tokens[room:])
        if len(now) < len(coming.sequences) or not self._told.keys() >= set(now):
            return None
        asked = {number for number, asked in self._told.items() if asked}
        turns = (now, *coming.following) if asked.issuperset(now) and not self.resting else ()
        groups = [[self._live[number] for number in turn if number in asked] for turn in turns]
        for number in now:
            del self._told[number]  # once they have stepped, their next token is another one
        self._again = (tuple(coming.sequences), [self._live[number] for number in now])
        return PredictorBatch(told[:room], tokens[:room], [group for group in groups if group])

    def ask(self, seats: Tensor, tokens: Tensor) -> bool:
        """What rows will use in the steps their newest tokens are fed in: written to `said`. False once it is switched off.

        Args:
            seats: int64 `[B]`, predictor rows, each once, but for the spare one.
            tokens: int64 `[B]`, their newest tokens.
        """
        return self._guarded(Step(-1), lambda: self._ask(seats, tokens)) is not None

    def _ask(self, seats: Tensor, tokens: Tensor) -> bool:
        answer = self._online.step(seats, tokens, self.routes[seats])
        self.said[seats] = torch.cat([answer.demand[:, None], answer.within], dim=1)
        return True

    def note(self, seats: Tensor, tokens: Tensor) -> None:
        """Tell the predictor of the newest tokens, as `ask` does, and leave `said` as it is."""
        self._guarded(Step(-1), lambda: self._online.note(seats, tokens, self.routes[seats]))

    def paths(self, sequences: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """How likely each sequence's next token uses an expert, `[N, L, E]`; None if one of them is not known, or it rests."""
        return self._guarded(Step(-1), lambda: self._paths(sequences))

    def _paths(self, sequences: Sequence[int]) -> npt.NDArray[np.float32] | None:
        if self.resting:
            return None
        untold = [number for number in sequences if number in self._untold]
        self._tell([self._live[number] for number in untold], [self._untold.pop(number) for number in untold])
        self._told.update(dict.fromkeys(untold, True))
        if not all(self._told.get(number) for number in sequences):
            return None
        chances: npt.NDArray[np.float32] = self.said[self.seats(sequences), 0].cpu().numpy()
        return chances

    def usual(self, tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """How likely a token of a prompt uses an expert, `[L, E]`, on average, by what the tokens alone say."""
        given = np.asarray(tokens, dtype=np.int64)
        return self._guarded(Step(-1), lambda: self._online.usual(self._tensor(given)).cpu().numpy())

    def _tell(self, rows: list[int], tokens: list[int]) -> None:
        if not rows:
            return
        seats, newest = self._tensor(np.array(rows)), self._tensor(np.array(tokens))
        if self.resting:
            self._online.note(seats, newest, self.routes[seats])
        else:
            self._ask(seats, newest)
        self.routes[seats] = self._experts

    def _house(self, coming: NextBatch) -> None:
        """Rows for the sequences that come; if there are too few, those that stepped longest ago are forgotten."""
        wanted = [number for number in coming.sequences if number != NOBODY]
        if wanted == self._housed:
            return
        for number in wanted:
            if number in self._live:
                self._live[number] = self._live.pop(number)  # to the end: stepped last
        new = [number for number in wanted if number not in self._live]
        if new:
            others = [number for number in self._live if number not in wanted]
            self._forget(others[: max(0, len(self._live) + len(new) - self._online.rows)])
            free = iter(sorted(set(range(self._online.rows)) - set(self._live.values())))
            for number in new:
                self._live[number] = next(free)
            used_before = sorted(self._stale.intersection(self._live[number] for number in new))
            self._clear(used_before)
            self._stale.difference_update(used_before)
        self._housed = wanted

    def _forget(self, numbers: list[int]) -> None:
        self._housed, self._again = [], None
        rows = [self._live.pop(number) for number in numbers]
        for number in numbers:
            self._untold.pop(number, None)
            self._told.pop(number, None)
        self._stale.update(rows)
        # the pass that is not learnt yet may have been theirs
        self._asked.rows[np.isin(self._asked.rows, rows)] = NOBODY

    def _clear(self, rows: list[int]) -> None:
        if rows:
            self._online.free(rows)
            self.routes[self._tensor(np.array(rows))] = self._experts

    def _outlook(self, step: Step) -> Outlook | None:
        self._asked = _Asked(np.zeros(0, dtype=np.int64), decoding=False)
        if step.tokens is None:
            return None
        owner = self._owners.take(len(step.tokens))
        rows = self._rows_of(owner)
        if not np.any(rows != NOBODY):
            return None
        self._asked = _Asked(rows, decoding=self._owners.coming.lengths is None)
        if not self._asked.decoding:  # a pass over prompts uses most experts: for it, counts keep what a forecast would
            return None
        self.sampled(owner.tolist(), step.tokens.tolist())
        return self._decode()

    def _rows_of(self, owner: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Each token's row, `NOBODY` for those of nobody, or of sequences that have none."""
        numbers, place = np.unique(owner, return_inverse=True)
        rows = np.array([self._live.get(number, NOBODY) for number in numbers.tolist()], dtype=np.int64)
        found: npt.NDArray[np.int64] = rows[place]
        return found

    def _decode(self) -> Outlook | None:
        """Of sequences that step by one token, and of those whose turns come."""
        agenda = self.agenda(self.sequences)
        if agenda is None:
            return None
        self._tell(agenda.told, agenda.tokens)
        if not agenda.groups:
            return None
        said = self.said.cpu().numpy()
        return Outlook(take_turns([hazards(unite(said[group])) for group in agenda.groups]))

    def _learn(self, step: Step) -> None:
        asked = self._asked
        if step.tokens is None or len(asked.rows) != len(step.tokens):
            return
        routes = step.routes
        if routes is None:
            routes = np.full((len(step.tokens), self._layers, self._top_k), self._experts, dtype=np.uint16)
        if asked.decoding:
            self.loaded(step.loads, 1, step.ahead, step.found)
            alive = np.flatnonzero(asked.rows != NOBODY)
            self.routes[self._tensor(asked.rows[alive])] = self._tensor(routes[alive]).int()
            return
        count = np.bincount(asked.rows[asked.rows != NOBODY], minlength=self._online.rows)
        single = count[asked.rows] == 1  # such as a decoder's first tokens: taken in together
        for singles, rows, _ in _by_row(np.where(single, asked.rows, NOBODY), self._online.rows):
            seats = self._tensor(rows)
            self._online.note(seats, self._tensor(step.tokens[singles]), self.routes[seats])
            self.routes[seats] = self._tensor(routes[singles]).int()
        for order, rows, counts in _by_row(np.where(single, NOBODY, asked.rows), self._room):
            pieces = self._online.pieces(rows, counts)
            used = sent(torch.from_numpy(routes[order].astype(np.int32)), self._online.device)
            before = pieces.shifted(used, self.routes[pieces.rows])
            self._online.observe(pieces, self._tensor(step.tokens[order]), before)
            self.routes[pieces.rows] = used[pieces.begins + pieces.counts - 1]

    def _tensor(self, values: npt.NDArray[np.integer]) -> Tensor:
        return sent(torch.from_numpy(values.astype(np.int64)), self._online.device)


def _by_row(
    rows: npt.NDArray[np.int64], room: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Which tokens are somebody's, row after row, each row's in their order; the rows, and how many tokens each has.

    In parts of at most `room` tokens, or of one row.
    """
    order = np.argsort(rows, kind="stable")
    order = order[rows[order] != NOBODY]
    present, counts = np.unique(rows[order], return_counts=True)
    ends, first = np.cumsum(counts), 0
    while first < len(present):
        begin = ends[first] - counts[first]
        last = max(first + 1, int(np.searchsorted(ends, begin + room, side="right")))
        yield order[begin : ends[last - 1]], present[first:last], counts[first:last]
        first = last
