"""The predictor in the engine: whose tokens come, what they will use, and what they really used.

A forecast (`cache.forecast.Forecast`) on top of `predict.online`. It maps the batch's sequences to predictor rows,
asks before every pass, and hands the true routing back behind it. Inside a captured step `ask` answers on the device, and
the routing is noted there. If the predictor raises, it is switched off with a
warning event and generation goes on: a forecast can cost bytes, never a token. Knows batches; refuses to know slots.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertflow.cache.forecast import Step
from expertflow.cache.horizon import hazards, unite
from expertflow.cache.policy import Outlook
from expertflow.events import Event, EventKind, EventStream
from expertflow.predict.online import OnlinePredictor
from expertflow.trace.owners import NOBODY, Coming, Owners

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Asked(NamedTuple):
    """The pass that was asked about and is not learnt yet: each token's row, and whether it took its token in."""

    rows: npt.NDArray[np.int64]
    decoding: bool


class Foresight:
    """What the predictor expects of the running batch.

    Args:
        online: the predictor, a row for every sequence that may run at once.
        events: where it is told that the predictor was switched off.
        aside: entered while the predictor works: in host memory, which is not the device's, unless it is on the device.

    Attributes:
        artifact: what was trained.
        routes: int32 `[C + 1, L, K]` on the predictor's device, each row's experts in its last step; E where unknown.
        failure: why it was switched off, or None.
    """

    per_token = True

    def __init__(
        self,
        online: OnlinePredictor,
        events: EventStream,
        aside: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """No sequence yet."""
        self._online, self._events, self._aside = online, events, aside
        self.artifact = online.artifact
        shape = online.artifact.shape
        self._layers, self._experts, self._top_k = shape
        self._owners = Owners()
        self._live: dict[int, int] = {}
        self.routes = torch.full(
            (online.rows + 1, self._layers, self._top_k), self._experts, dtype=torch.int32, device=online.device
        )
        self._asked = _Asked(np.zeros(0, dtype=np.int64), decoding=False)
        self.failure: str | None = None

    def expect(self, coming: Coming) -> None:
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

    def seats(self, rows: int) -> list[int]:
        """Predictor rows of a batch of `rows`: of the sequences that come; padding shares the row of nobody."""
        seats = [self._live.get(number, NOBODY) for number in self._owners.coming.sequences]
        return [self._online.spare if row == NOBODY else row for row in seats + [NOBODY] * (rows - len(seats))]

    def ask(self, seats: Tensor, tokens: Tensor) -> Tensor | None:
        """Before a step on the device: what each row will use, `[B, O, L, E]`; None once it is switched off.

        Args:
            seats: int64 `[B]`, predictor rows, each once.
            tokens: int64 `[B]`, fed in.
        """
        return self._guarded(Step(-1), lambda: self._chances(seats, tokens))

    def _chances(self, rows: Tensor, tokens: Tensor) -> Tensor:
        said = self._online.step(rows, tokens, self.routes[rows])
        return torch.cat([said.demand[:, None], said.within], dim=1)

    def _house(self, coming: Coming) -> None:
        """Rows for the sequences that come; if there are too few, those that stepped longest ago are forgotten."""
        wanted = [number for number in coming.sequences if number != NOBODY]
        for number in wanted:
            if number in self._live:
                self._live[number] = self._live.pop(number)  # to the end: stepped last
        new = [number for number in wanted if number not in self._live]
        others = [number for number in self._live if number not in wanted]
        self._forget(others[: max(0, len(self._live) + len(new) - self._online.rows)])
        free = iter(sorted(set(range(self._online.rows)) - set(self._live.values())))
        for number in new:
            self._live[number] = next(free)

    def _forget(self, numbers: list[int]) -> None:
        rows = [self._live.pop(number) for number in numbers]
        self._clear(rows)
        # the pass that is not learnt yet may have been theirs
        self._asked.rows[np.isin(self._asked.rows, rows)] = NOBODY

    def _clear(self, rows: list[int]) -> None:
        if rows:
            self._online.free(rows)
            self.routes[rows] = self._experts

    def _outlook(self, step: Step) -> Outlook | None:
        self._asked = _Asked(np.zeros(0, dtype=np.int64), decoding=False)
        if step.tokens is None:
            return None
        owner = self._owners.take(len(step.tokens))
        rows = np.array([self._live.get(number, NOBODY) for number in owner.tolist()], dtype=np.int64)
        present = np.unique(rows[rows != NOBODY])
        if not len(present):
            return None
        self._asked = _Asked(rows, decoding=len(present) == len(rows))
        if self._asked.decoding:
            return Outlook(hazards(unite(self._decode(step.tokens, rows))))
        each = [self._online.prefill(self._tensor(step.tokens[rows == row])).cpu().numpy() for row in present]
        return Outlook(unite(np.stack(each))[None])

    def _decode(self, tokens: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`[B, O, L, E]` of sequences that step by one token."""
        seats = self._tensor(rows)
        said: npt.NDArray[np.float32] = self._chances(seats, self._tensor(tokens)).cpu().numpy()
        self.routes[seats] = self._experts
        return said

    def _learn(self, step: Step) -> None:
        asked = self._asked
        if step.tokens is None or len(asked.rows) != len(step.tokens):
            return
        unknown = np.full((len(step.tokens), self._layers, self._top_k), self._experts)
        routes = self._tensor(unknown if step.routes is None else step.routes).int()
        if asked.decoding:
            alive = np.flatnonzero(asked.rows != NOBODY)
            self.routes[self._tensor(asked.rows[alive])] = routes[self._tensor(alive)]
            return
        for row in np.unique(asked.rows[asked.rows != NOBODY]).tolist():
            own = self._tensor(np.flatnonzero(asked.rows == row))
            before = torch.cat([self.routes[row][None], routes[own][:-1]])
            self._online.observe(row, self._tensor(step.tokens)[own], before)
            self.routes[row] = routes[own][-1]

    def _tensor(self, values: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._online.device)
