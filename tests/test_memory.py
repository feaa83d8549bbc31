"""Rows, slots, copies, and the meter that measures device memory."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertflow.cache.controller import CacheController
from expertflow.cache.strategy import STRATEGIES
from expertflow.errors import DeviceError, HostMemoryError
from expertflow.events import EventStream
from expertflow.execution.passes import Passes
from expertflow.execution.provider import CachedExperts
from expertflow.formats.dtypes import RUN_DTYPES
from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.records import ALIGNMENT, StoreLayout
from expertflow.memory import store as store_module
from expertflow.memory.devices import free_bytes, resolve_device
from expertflow.memory.meter import CpuMeter, CudaMeter
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore, check_addresses, check_host_memory, memory_reported
from expertflow.memory.transfer import PlainTransfer, StreamTransfer, Transfer
from expertflow.types import Access

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
spec_lists = st.lists(st.tuples(shapes, st.sampled_from(sorted(RUN_DTYPES))), min_size=1, max_size=4).map(
    lambda pairs: tuple(plain(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(pairs))
)
LAYOUT = StoreLayout.uniform([plain("w", (5, 7), "float32")], layers=8)


@given(specs=spec_lists)
def test_a_record_gives_back_what_was_written(specs: tuple[TensorSpec, ...]) -> None:
    """Tensors written into a record through views are read back unchanged, aligned and without overlap."""
    layout = StoreLayout.uniform(specs)
    store = HostStore(layout, 2, pin=False)
    written = {spec.name: torch.randn(spec.shape).to(getattr(torch, spec.dtype)) for spec in specs}
    for name, value in written.items():
        layout.layers[0].tensor(store.record(1), name).copy_(value)
    for name, view in layout.layers[0].weights(store.record(1)).items():
        assert torch.equal(view, written[name])
        assert view.data_ptr() % ALIGNMENT == 0
    assert not store.record(0).any()
    assert layout.record_bytes % ALIGNMENT == 0
    store.close()


@given(specs=spec_lists, slots=st.integers(1, 5))
def test_slots_are_aligned_and_disjoint(specs: tuple[TensorSpec, ...], slots: int) -> None:
    """Each slot starts on the alignment, and filling one leaves the others alone; the pool's size is as planned."""
    layout = StoreLayout.uniform(specs)
    pool = SlotPool(layout, slots, torch.device("cpu"))
    pool.buffer.zero_()
    pool.slot(slots - 1).fill_(1)
    assert all(pool.slot(s).data_ptr() % ALIGNMENT == 0 for s in range(slots))
    assert int(pool.buffer.sum()) == layout.record_bytes
    assert pool.buffer.untyped_storage().nbytes() == SlotPool.nbytes(layout.record_bytes, slots)


class RecordingTransfer:
    """Logs the order of verbs, and refuses a copy into a slot whose expert has not been computed.

    `users`: the records that the running layer uses in each slot, in the order of accesses; released ones are gone.
    """

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.users: defaultdict[int, list[int]] = defaultdict(list)

    def start(self, loads: Sequence[tuple[int, int]]) -> None:
        for record, slot in loads:
            assert self.users[slot][:1] in ([], [record]), f"record {record} into slot {slot} of {self.users[slot]}"
            self.log.append(("start", record))

    def wait(self, slots: Sequence[int]) -> None:
        self.log += [("wait", slot) for slot in slots]

    def release(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if self.users[slot]:
                del self.users[slot][0]
            self.log.append(("release", slot))

    def close(self) -> None:
        pass


def _provider(
    slots: int, transfer: Transfer, pool: SlotPool, strategy: str = "lru-global", wide: int | None = None
) -> CachedExperts:
    controller = CacheController(
        layers=2,
        experts=8,
        slots=slots,
        strategy=STRATEGIES[strategy],
        record_bytes=LAYOUT.record_bytes,
        events=EventStream(),
        future=np.random.default_rng(1).random((30, 2, 8)) < 0.4,
        wide=wide,
    )
    return CachedExperts(controller, transfer, pool)


def test_copies_start_before_earlier_experts_compute() -> None:
    """With room for all, every copy is under way before the first expert is lent: the link is busy while computing."""
    transfer = RecordingTransfer()
    provider = _provider(4, transfer, SlotPool(LAYOUT, 4, torch.device("cpu")))
    next(provider.stream(1, [2, 5, 6]))
    assert transfer.log[:3] == [("start", 10), ("start", 13), ("start", 14)]


def test_a_copy_is_under_way_while_the_next_load_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host decides beside running copies: no load is decided while one before it could start and has not."""
    transfer = RecordingTransfer()
    provider = _provider(6, transfer, SlotPool(LAYOUT, 6, torch.device("cpu")))
    accesses = provider.controller.accesses

    def logged(layer: int, needed: Sequence[int]) -> Iterator[Access]:
        for access in accesses(layer, needed):
            transfer.log.append(("decided", 8 * layer + access.expert))
            yield access

    monkeypatch.setattr(provider.controller, "accesses", logged)
    next(provider.stream(1, [2, 5, 6]))
    assert transfer.log[:5] == [("decided", 10), ("start", 10), ("decided", 13), ("start", 13), ("decided", 14)]


def test_what_is_loaded_ahead_waits_for_no_computation_but_that_of_its_slot() -> None:
    """In a pass that needs every expert: before anything of a layer is lent, the next one's copies begin where slots are free."""
    transfer = RecordingTransfer()
    provider = _provider(12, transfer, SlotPool(LAYOUT, 12, torch.device("cpu")), "next-use", wide=8)
    provider.begin_step(prompts=8)
    lent = provider.stream(0, list(range(8)))
    next(lent)
    copies = [number for what, number in transfer.log if what == "start"]
    assert copies[:8] == list(range(8))
    assert len(copies[8:]) == 4
    assert min(copies[8:]) >= 8
    list(lent)
    copies = [number for what, number in transfer.log if what == "start"]
    assert sorted(copies[8:]) == list(range(8, 16))


def test_a_layer_given_up_is_forgotten_once() -> None:
    """A copy that fails makes the slots untrusted at once, and not once more when its traceback is let go of, in the middle of later work."""
    transfer = RecordingTransfer()
    provider = _provider(4, transfer, SlotPool(LAYOUT, 4, torch.device("cpu")))
    start, kept = transfer.start, []

    def fail(loads: Sequence[tuple[int, int]]) -> None:
        if any(record == 3 for record, _ in loads):
            raise RuntimeError("the link is gone")
        start(loads)

    transfer.start = fail
    list(provider.stream(0, [0, 1]))
    try:
        list(provider.stream(0, [0, 2, 3, 4]))
    except RuntimeError as error:
        kept.append(error)
    assert provider.controller.table.resident == 0
    list(provider.stream(0, [0, 2]))
    kept.clear()
    gc.collect()
    assert provider.controller.table.resident == 2


@pytest.mark.parametrize("needed", [[2], [2, 3]])
def test_an_expert_whose_copy_cannot_be_waited_for_is_not_kept(
    needed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is the layer's last one: it is not taken for one that is there."""
    transfer = RecordingTransfer()
    provider = _provider(4, transfer, SlotPool(LAYOUT, 4, torch.device("cpu")))

    waits = []

    def interrupted(slots: Sequence[int]) -> None:
        waits.extend(slots)
        if len(waits) == len(needed):
            raise KeyboardInterrupt

    monkeypatch.setattr(transfer, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(provider.stream(0, needed))
    assert provider.controller.table.resident == 0


def test_an_unused_layer_forgets_nothing() -> None:
    """A pass of padding alone needs no expert; what the slots hold stays there."""
    provider = _provider(4, RecordingTransfer(), SlotPool(LAYOUT, 4, torch.device("cpu")))
    for needed in ([1, 3], [], [3, 1]):
        list(provider.stream(0, needed))
    assert provider.controller.table.resident == 2
    assert [access.load for access in provider.controller.access(0, [1, 3])] == [False, False]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_copy_never_overwrites_a_slot_before_its_turn(
    slots: int, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decided turns that use one slot follow each other: the next one's copy starts when the one before is given back."""
    transfer = RecordingTransfer()
    provider = _provider(slots, transfer, SlotPool(LAYOUT, slots, torch.device("cpu")), strategy)
    accesses, shared = provider.controller.accesses, 0

    def noting(layer: int, needed: Sequence[int]) -> Iterator[Access]:
        nonlocal shared
        for access in accesses(layer, needed):
            transfer.users[access.slot].append(8 * layer + access.expert)
            shared += len(transfer.users[access.slot]) > 1
            yield access

    monkeypatch.setattr(provider.controller, "accesses", noting)
    for needed in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 3], [0, 2, 4, 6], [1, 2, 3, 5, 6, 7]):
        provider.begin_step()
        for layer in range(2):
            for expert, _ in provider.stream(layer, needed):
                assert 8 * layer + expert in {users[0] for users in transfer.users.values() if users}
            assert not any(transfer.users.values())
    assert shared > 0, "no slot was used twice in a layer"


def _filled_store(*, pin: bool) -> HostStore:
    store = HostStore(LAYOUT, 16, pin=pin)
    for number in range(16):
        LAYOUT.layers[0].tensor(store.record(number), "w").fill_(number + 1)
    store.lock()
    return store


def _check_values(provider: CachedExperts, rounds: Sequence[list[int]], delay: int = 0) -> None:
    for needed in rounds:
        provider.begin_step()
        for layer in range(2):
            seen = []
            for expert, weights in provider.stream(layer, needed):
                if delay:
                    torch.cuda._sleep(delay)
                seen.append((expert, weights["w"].mean()))
            assert {expert: float(value) for expert, value in seen} == {e: layer * 8 + e + 1.0 for e in needed}


@pytest.mark.parametrize("slots", [1, 2, 5, 16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plain_transfer_brings_the_right_records(slots: int, strategy: str) -> None:
    """Every lent record holds its own expert's values, in waves and with reuse."""
    store, pool = _filled_store(pin=False), SlotPool(LAYOUT, slots, torch.device("cpu"))
    provider = _provider(slots, PlainTransfer(store, pool), pool, strategy)
    _check_values(provider, [[0, 1, 2, 3, 4, 5, 6, 7], [2], [7, 1], [3, 4, 5], [2]])


@pytest.mark.cuda
@pytest.mark.parametrize("slots", [1, 2, 5, 16])
@pytest.mark.parametrize("delay", [0, 2_000_000])
def test_stream_transfer_brings_the_right_records(slots: int, delay: int, cuda: torch.device) -> None:
    """On CUDA the same holds when computation lags far behind the host and copies could overtake it."""
    store, pool = _filled_store(pin=True), SlotPool(LAYOUT, slots, cuda)
    provider = _provider(slots, StreamTransfer(store, pool), pool)
    _check_values(provider, [[0, 1, 2, 3, 4, 5, 6, 7], [2], [7, 1], [3, 4, 5], [2]] * 4, delay)
    store.close()


@pytest.mark.cuda
def test_a_copy_has_arrived_once_computation_follows_one_behind_it(cuda: torch.device) -> None:
    """Copies are made one after the other. What lies behind the slots needs none."""
    store, pool = _filled_store(pin=True), SlotPool(LAYOUT, 3, cuda)
    transfer = StreamTransfer(store, pool)
    torch.cuda._sleep(100_000_000)
    transfer.release([0, 1, 2])
    transfer.start([(record, record) for record in range(3)])
    assert [transfer.arrived(slot) for slot in (0, 1, 2, 3)] == [False, False, False, True]
    transfer.wait([1, 3])
    assert [transfer.arrived(slot) for slot in (0, 1, 2)] == [True, True, False]
    assert [pool.weights(slot, 0)["w"].mean().item() for slot in (0, 1)] == [1, 2]
    transfer.settle()
    assert transfer.arrived(2)
    store.close()


def test_the_meter_counts_what_is_alive() -> None:
    """The peak is resident tensors plus the most temporary bytes alive at once; freed and excluded ones do not count."""
    host, weights = torch.zeros(1000), torch.zeros(10, 10)
    meter = CpuMeter([weights], exclude=[host])
    assert meter.peak_bytes == 400
    with meter.watch():
        first = weights + 1
        view = first[2:]
        del first, view
        second = torch.cat([weights, weights])
        third = second * 2
        meter.add(host)
    assert meter.peak_bytes == 400 + 800 + 800
    del second, third


def test_too_little_host_memory_is_refused_before_loading() -> None:
    """The error says what is needed and what there is, for the machine and for a stated limit."""
    with pytest.raises(HostMemoryError, match=r"needs 1024.00 GiB of host memory, .* free on this host"):
        check_host_memory(2**40 * 1, None)
    with pytest.raises(HostMemoryError, match="allowed by host_memory"):
        check_host_memory(11, 10)
    check_host_memory(10, 10)


def test_a_limit_on_address_space_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before loading, and for an allocation that torch or Python is refused; other errors stay what they are."""
    monkeypatch.setattr(store_module, "free_addresses", lambda: 2**30)
    check_addresses(2**29)
    with pytest.raises(HostMemoryError, match=r"address space, the limit leaves 1.00 GiB.*ulimit -v"):
        check_addresses(2**30)
    with pytest.raises(HostMemoryError, match="host refused memory"), memory_reported():
        torch.empty(2**55, dtype=torch.uint8)
    with pytest.raises(HostMemoryError, match="host refused memory"), memory_reported():
        bytearray(2**62)
    with pytest.raises(RuntimeError, match="shape"), memory_reported():
        torch.ones(2) @ torch.ones(3, 3)


@pytest.mark.parametrize(
    ("limit", "code", "refused"), [(None, 1, False), (8192, 0, False), (8192, 1, True), (2**40, 1, False)]
)
def test_a_limit_on_locked_memory_is_tried_before_loading(
    limit: int | None, code: int, refused: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a driver that keeps to a limit which is too small is an error: most do not."""
    sizes: list[int] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
            assert address % 4096 == flags == 0
            sizes.append(size)
            return code

        def cudaHostUnregister(self, address: int) -> None:  # noqa: N802
            sizes.append(-address)

    monkeypatch.setattr(store_module, "lockable_memory", lambda: limit)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    if refused:
        with pytest.raises(HostMemoryError, match=r"page-locks 1.0 MiB.*is 8.0 KiB.*ulimit -l unlimited"):
            store_module.check_locking(2**20)
    else:
        store_module.check_locking(2**20)
    assert [size for size in sizes if size > 0] == ([8192 + 4096] if limit == 8192 else [])


def test_a_device_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cuda` is torch's current device by its number, `cuda:N` device N, and `auto` takes a GPU if there is one."""
    assert resolve_device("cpu") == resolve_device("cpu:0") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = [resolve_device(name) for name in ("auto", "cuda", "cuda:0", "cuda:3")]
    assert [(device.type, device.index) for device in found] == [("cuda", index) for index in (2, 2, 0, 3)]
    with pytest.raises(DeviceError, match=r"'cuda:4'.*'cuda:3'"):
        resolve_device("cuda:4")


def test_memory_queries_name_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory and peaks are those of the stated device, not of the current one."""
    device, calls = torch.device("cuda", 3), []

    def answer(value: object) -> Callable[..., object]:
        return lambda *where: (calls.append(where), value)[1]

    for name, value in (("mem_get_info", (70, 100)), ("memory_reserved", 20), ("memory_allocated", 5)):
        monkeypatch.setattr(torch.cuda, name, answer(value))
    assert free_bytes(device) == 85
    for name, value in (("reset_peak_memory_stats", None), ("max_memory_allocated", 9)):
        monkeypatch.setattr(torch.cuda, name, answer(value))
    assert CudaMeter(device).peak_bytes == 9
    assert calls == [(device,)] * 5


def test_a_pass_runs_on_the_models_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's device is the current one before the pass begins its step, and no longer once the pass is over."""
    happened: list[object] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        happened.append(device)
        yield
        happened.append("left")

    monkeypatch.setattr(torch.cuda, "device", enter)
    module = torch.nn.Linear(2, 2)
    passes = Passes(
        lambda args, kwargs: happened.append("begun"),  # noqa: ARG005 - as called
        lambda: None,
    )
    passes.device = torch.device("cuda", 1)
    passes.guard(module)
    module(torch.zeros(1, 2))
    assert happened == [torch.device("cuda", 1), "begun", "left"]
