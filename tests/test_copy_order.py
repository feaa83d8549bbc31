"""Copies beside computation on a device that is played: two streams, each in order, both together in any order that their events allow."""

from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest

from expertflow.cache.controller import CacheController
from expertflow.cache.strategy import STRATEGIES
from expertflow.events import EventStream
from expertflow.execution.provider import CachedExperts
from expertflow.memory.transfer import StreamTransfer

LAYERS, EXPERTS = 2, 8
Work = Callable[[], None]


class Stream:
    """Work and waits in order; a wait is for another stream's work up to a place."""

    def __init__(self) -> None:
        self.queue: list[Work | tuple["Stream", int]] = []
        self.over = 0

    def wait_event(self, event: "Event") -> None:
        if event.recorded is not None:
            self.queue.append(event.recorded)

    def wait_stream(self, other: "Stream") -> None:
        self.queue.append((other, len(other.queue)))

    def may_go_on(self) -> bool:
        if self.over == len(self.queue):
            return False
        first = self.queue[self.over]
        return not isinstance(first, tuple) or first[0].over >= first[1]

    def go_on(self) -> None:
        first = self.queue[self.over]
        if not isinstance(first, tuple):
            first()
        self.over += 1


class Event:
    """A place in a stream."""

    def __init__(self) -> None:
        self.recorded: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self.recorded = stream, len(stream.queue)

    def query(self) -> bool:
        return self.recorded is None or self.recorded[0].over >= self.recorded[1]


class Device:
    """Slots that a transfer fills, and readers that note what they find."""

    def __init__(self, slots: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inside: list[int | None] = [None] * slots
        self.wrong = self.reads = 0
        self._rng, self._bias = rng, int(rng.integers(4))  # which stream runs ahead, if one does
        self.computing, self.copying = Stream(), Stream()
        self.copying.synchronize = self.finish  # type: ignore[attr-defined]
        self._current = self.computing
        cuda = SimpleNamespace(
            Event=Event, Stream=lambda _: self.copying, current_stream=lambda _: self._current, set_stream=self._set
        )
        monkeypatch.setattr("expertflow.memory.transfer.torch", SimpleNamespace(cuda=cuda))
        layout = SimpleNamespace(layer_bytes=(1,) * LAYERS, layers=(None,) * LAYERS)
        records = Rows(LAYERS * EXPERTS, self)
        self.transfer = StreamTransfer(
            SimpleNamespace(layout=layout, buffer=records), SimpleNamespace(buffer=Rows(slots, self))
        )

    def _set(self, stream: Stream) -> None:
        self._current = stream

    def copy(self, record: int, slot: int) -> None:
        """Two pieces of work, because a copy takes a while."""
        for content in (None, record):
            self._current.queue.append(lambda content=content: self.inside.__setitem__(slot, content))

    def read(self, slot: int, record: int) -> None:
        """Two pieces, because a kernel does, too."""

        def look() -> None:
            self.reads += 1
            self.wrong += self.inside[slot] != record

        self.computing.queue += [look, look]

    def run(self, count: int) -> None:
        """Some work of either stream."""
        streams = self.computing, self.copying
        for _ in range(count):
            ready = [stream for stream in streams if stream.may_go_on()]
            if not ready:
                return
            ahead = streams[self._bias] if self._bias < 2 else None
            chosen = ahead if ahead in ready else ready[int(self._rng.integers(len(ready)))]
            chosen.go_on()

    def finish(self) -> None:
        """All that is queued; it must not wait for anything that never comes."""
        while any(stream.over < len(stream.queue) for stream in (self.computing, self.copying)):
            before = self.computing.over + self.copying.over
            self.run(1)
            assert self.computing.over + self.copying.over > before, "the streams wait for one another"


class Rows:
    """Records or slots, as far as a transfer looks at tensors."""

    device = SimpleNamespace(index=0)

    def __init__(self, count: int, device: Device) -> None:
        self._rows = [Row(number, device) for number in range(count)]

    def unbind(self) -> list["Row"]:
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator["Row"]:
        return iter(self._rows)


class Row:
    """One of them, of one byte."""

    def __init__(self, number: int, device: Device) -> None:
        self.number, self._device = number, device

    def __getitem__(self, _: slice) -> "Row":
        return self

    def __len__(self) -> int:
        return 1

    def copy_(self, source: "Row", *, non_blocking: bool) -> None:
        assert non_blocking
        self._device.copy(source.number, self.number)


def _passes(device: Device, provider: CachedExperts, rng: np.random.Generator) -> None:
    """Passes as `execution.grouped` makes them; one layer in thirty is given up."""
    for _ in range(8):
        provider.begin_step(prompts=int(rng.choice([0, EXPERTS])))
        for layer in range(LAYERS):
            needed = sorted(rng.permutation(EXPERTS)[: rng.integers(EXPERTS + 1)].tolist())
            gives_up = rng.random() < 0.03
            with provider.lend_residents(layer) as early:
                for expert, slot in early.items():
                    device.read(slot, EXPERTS * layer + expert)
            device.run(int(rng.choice([0, 0, 3, 20])))
            seen = set[int]()
            with closing(provider.groups(layer, needed)) as brought:
                for group in brought:
                    for access in group:
                        seen.add(access.expert)
                        if access.expert in early:
                            assert (access.slot, access.load) == (early[access.expert], False)
                        else:
                            device.read(access.slot, EXPERTS * layer + access.expert)
                    device.run(int(rng.choice([0, 0, 1, 5])))
                    if gives_up:
                        return
            assert seen == set(needed)
        if rng.random() < 0.1:
            device.transfer.settle()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_reader_finds_its_record(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever stream runs ahead, whatever is lent early, loaded ahead in vain, given up or evicted."""
    rng, reads = np.random.default_rng(3), 0
    for slots in (1, 2, 3, 5, 8, 11, 16) * 3:
        device = Device(slots, rng, monkeypatch)
        controller = CacheController(
            layers=LAYERS, experts=EXPERTS, slots=slots, strategy=STRATEGIES[strategy].double_buffered(), record_bytes=1,
            events=EventStream(), wide=EXPERTS, future=rng.random((30, LAYERS, EXPERTS)) < 0.4,
        )  # fmt: skip
        _passes(device, CachedExperts(controller, device.transfer, None), rng)
        device.finish()
        assert not device.wrong
        reads += device.reads
    assert reads > 500


def test_a_copy_has_arrived_once_computation_follows_one_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are made one after the other. What lies behind the slots needs none; a new copy has to be waited for again."""
    device = Device(3, np.random.default_rng(0), monkeypatch)
    transfer = device.transfer
    transfer.start([(4, 0), (5, 1), (6, 2)])
    assert [transfer.arrived(slot) for slot in range(4)] == [False, False, False, True]
    transfer.wait([1, 3])
    assert [transfer.arrived(slot) for slot in range(3)] == [True, True, False]
    waits = len(device.computing.queue)
    transfer.wait([0])
    assert len(device.computing.queue) == waits
    transfer.start([(7, 0)])
    assert not transfer.arrived(0)
    transfer.wait([0])
    assert len(device.computing.queue) == waits + 1
    transfer.settle()
    assert device.inside == [7, 5, 6]
    assert all(map(transfer.arrived, range(3)))
