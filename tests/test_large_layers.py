"""Layers with larger records than the others: they are always resident, and every load moves its own layer's bytes."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.cache.core import make_tables
from expertflow.cache.policy import Usage
from expertflow.cache.strategy import STRATEGIES
from expertflow.cli.record_bytes import find_record
from expertflow.engine.prepare import prepare
from expertflow.errors import BudgetError, TraceError
from expertflow.events import Event, EventKind
from expertflow.formats.records import ALIGNMENT
from expertflow.kernels.ledger import DONE, SRC
from expertflow.kernels.residency import driver, reference
from expertflow.kernels.residency.state import BLOCKS, CacheState
from expertflow.schedule.cost import StepPrices, price
from expertflow.sim.clock import Cost
from expertflow.sim.replay import replay, replay_events
from expertflow.sim.workload import as_recorded, live_sequences
from expertflow.trace.format import load_trace, save_trace
from expertflow.units import format_bytes
from helpers import DEVICE, DEVICES, MakeCheckpoint, make_trace
from layout import Layout, write_twins
from layouts_int4 import compressed, pack_compressed

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
PARAMS = SamplingParams(max_tokens=5, temperature=0.8, seed=5, ignore_eos=True)
EXPERTS, TOP_K, LARGE = 8, 2, 1
NAMES = ("next-use", "on-demand", "lru", "ring", "lfu")
EXECUTION = {"host": "host", "graph": "graph", "watched": "graph"}
MAKERS = {"reference": reference.Residency, "kernels": driver.Residency}
OPTIONS = {"max_length": 32, "max_batch": 3}
Twins = Callable[[tuple[int, ...]], tuple[Path, Path]]
Resident = Callable[[tuple[int, ...], str, str], list[list[int]]]


@pytest.fixture(scope="module")
def twins(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """Makes a checkpoint of three layers in int4 but for some in bfloat16, and the same decoded."""

    @cache
    def make(plain: tuple[int, ...]) -> tuple[Path, Path]:
        layout = Layout(
            family="qwen3_moe", quantization=compressed(32), pack=partial(pack_compressed, group=32), plain_layers=plain,
            sizes={"moe_intermediate_size": 64},
        )  # fmt: skip
        source = make_checkpoint(layout.family, layout.dtype, spread=0.3, num_hidden_layers=3, **layout.sizes)
        return write_twins(source, tmp_path_factory.mktemp("large"), layout)

    return make


@pytest.fixture(scope="module")
def resident(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> Resident:
    """Tokens of the decoded checkpoint with every expert resident, by the way it runs."""

    @cache
    def find(plain: tuple[int, ...], way: str, device: str) -> list[list[int]]:
        with LLM(twins(plain)[1], slots="100%", execution=EXECUTION[way], device=device, **OPTIONS) as llm:
            return answers(llm, way, tmp_path_factory.mktemp("resident") / "t.trace")

    return find


def answers(llm: LLM, way: str, trace: Path) -> list[list[int]]:
    """Tokens; watched steps are recorded, and then the host decides them although the plan is `graph`."""
    with llm.record(trace) if way == "watched" else nullcontext():
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", EXECUTION)
@pytest.mark.parametrize(
    ("slots", "plain"), [*((slots, (LARGE,)) for slots in (1, TOP_K, EXPERTS // 2, EXPERTS)), (5, (0, 2))]
)
def test_offloaded_is_resident(  # noqa: PLR0917 - parameters and fixtures
    slots: int, plain: tuple[int, ...], way: str, device: str, twins: Twins, resident: Resident, tmp_path: Path
) -> None:
    """Law 1; law 3; law 4 with each layer's bytes; law 2: what the host decides is what the replay decides."""
    events: list[Event] = []
    strategy = STRATEGIES[NAMES[(slots + len(way)) % len(NAMES)]]
    options = {**OPTIONS, "device": device, "execution": EXECUTION[way], "strategy": strategy.name}
    with LLM(twins(plain)[0], slots=slots, **options) as llm:
        llm._offloaded.events.subscribe(events.append)
        assert answers(llm, way, tmp_path / "t.trace") == resident(plain, way, device)
        llm._offloaded.settle()
        llm._offloaded.controller.table.check_integrity()
        plan, counted = llm.plan, llm.stats.cache
        assert device != "cpu" or llm.stats.peak_bytes <= plan.total  # on CUDA other tests' memory counts
    bytes_of = plan.shape.records.layer_bytes
    assert len({bytes_of[layer] for layer in plain}) == 1
    assert all(3 * size < bytes_of[plain[0]] for layer, size in enumerate(bytes_of) if layer not in plain)
    loaded = Counter(event.layer for event in events if event.kind in {EventKind.MISS, EventKind.PREFETCH})
    numbers = way == "host" and device == "cpu"  # slots of numbers, so all layers fit
    large = (LARGE,) if plain == (LARGE,) and not numbers else ()
    assert plan.slot_layout.large == large
    assert plan.host == EXPERTS * (sum(bytes_of) if plain == (LARGE,) else 3 * max(bytes_of))
    assert [loaded[layer] == 0 for layer in range(3)] == [layer in large for layer in range(3)]
    assert counted.bytes_moved == sum(bytes_of[layer] * count for layer, count in loaded.items())
    if way == "watched" and device == "cpu":  # on CUDA the host's waves are of two
        found = [event for event in events if event.kind is not EventKind.HOST]
        workload = as_recorded(load_trace(tmp_path / "t.trace"))
        assert found == replay_events(workload, strategy, plan.slots, bytes_of, large=large)


@pytest.mark.parametrize("device", DEVICES)
def test_everything_resident_is_looked_up(device: str, twins: Twins, resident: Resident) -> None:
    """Slots for all experts but the large layer's: after the first use nothing is decided, and the tokens stay."""
    with LLM(twins((LARGE,))[0], slots="100%", execution="graph", device=device, **OPTIONS) as llm:
        assert llm.plan.slots == 2 * EXPERTS
        for layer in (0, 2):
            for _ in llm._offloaded.handover.provider.stream(layer, list(range(EXPERTS))):
                pass
        assert answers(llm, "graph", Path()) == resident((LARGE,), "graph", device)
        assert llm._offloaded.handover.decoder.experts.fixed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("plain", [(LARGE,), (0, 2)])
def test_totals_without_a_listener_have_each_layers_bytes(plain: tuple[int, ...], device: str, twins: Twins) -> None:
    """The device counts blocks alone; what it says moved is what single events say of the same run."""
    found = []
    for listens in (False, True):
        with LLM(twins(plain)[0], slots=3, execution="graph", device=device, **OPTIONS) as llm:
            if listens:
                llm._offloaded.events.subscribe(lambda _: None)
            llm.generate(PROMPTS, PARAMS)
            found.append(llm.stats.cache)
    assert found[0] == found[1]
    assert found[0].bytes_moved > 0


def test_a_budget_has_room_for_large_layers(twins: Twins) -> None:
    """A byte below the least is refused with the layers and their bytes; the least itself gives one slot, and runs."""
    config, folder = {**OPTIONS, "execution": "graph", "device": "cpu", "kv_tokens": 128}, twins((LARGE,))[0]
    plan = prepare(folder, EngineConfig(**config, slots=1)).plan
    assert plan.large >= EXPERTS * plan.shape.records.layer_bytes[LARGE] > EXPERTS * plan.record_bytes
    with pytest.raises(BudgetError, match=rf"large layers \({LARGE}\).* always resident") as refused:
        prepare(folder, EngineConfig(**config, gpu_memory=plan.total - 1))
    assert refused.value.least_bytes == plan.total == plan.least
    with LLM(folder, gpu_memory=plan.total, **config) as llm:
        assert llm.plan.slots == 1
        llm.generate(PROMPTS, PARAMS)
        assert llm.stats.peak_bytes <= plan.total
    (note,) = [note for note in plan.shape.notes if "median" in note]
    assert format_bytes(EXPERTS * plan.shape.records.layer_bytes[LARGE]) in note
    assert plan.resident_total == plan.total + (2 * EXPERTS - 1) * plan.record_bytes - ALIGNMENT


@pytest.mark.parametrize("maker", MAKERS)
def test_a_tally_counts_each_loads_own_lines(maker: str) -> None:
    """Blocks done times the lines of their records, when a step opens and when totals are read."""
    strategy = STRATEGIES["next-use"].on_device()
    device = torch.device("cpu") if maker == "reference" else DEVICE
    state = CacheState.allocate(strategy, make_tables(3, 4, 5, divided=False), device, layer_bytes=(256, 512, 1280))
    state.copy_from(make_tables(3, 4, 5, divided=False), Usage(layers=3, experts=4))
    state.ledger.table[SRC, :3], state.ledger.table[DONE, :3] = torch.tensor([[1, 7, 8], [3, 1, 2]]).to(device)
    assert state.read_tally()[BLOCKS] == 3 * 1 + 1 * 2 + 2 * 5
    MAKERS[maker](state).open_step()
    assert state.take_tally()[BLOCKS] == 3 * 1 + 1 * 2 + 2 * 5


def test_a_replay_loads_in_each_layers_time() -> None:
    """On the virtual clock the link is busy for each layer's bytes; equal records give what one number gives."""
    workload = live_sequences(make_trace(40, layers=3, experts=8), 2)
    strategy, sizes = STRATEGIES["plec"], (1_000_000, 4_000_000, 1_100_000)
    cost = Cost(row_bytes=1_100_000, link_gbps=10.0, copy_us=0.0, layer_bytes=sizes)
    found = replay(workload, strategy, 5, cost)
    loaded = Counter(
        e.layer for e in replay_events(workload, strategy, 5, large=(1,)) if e.kind in {"miss", "prefetch"}
    )
    moved = sum(sizes[layer] * count for layer, count in loaded.items())
    assert (found.loads, found.moved_bytes) == (sum(loaded.values()), moved)
    assert found.link_seconds == pytest.approx(moved / 10e9)
    assert found.share == 5 / 16
    same = [replace(cost, layer_bytes=each) for each in ((), (1_100_000,) * 3)]
    assert replay(workload, strategy, 5, same[0]) == replay(workload, strategy, 5, same[1])


def test_a_division_is_priced_by_each_layers_loads() -> None:
    """What most steps use is kept; what is not costs its layer's load, and a large layer's experts cost none."""
    chances = np.array([[[1.0, 0.5], [1.0, 1.0], [0.25, 0.0]]])
    rates = StepPrices(slots=1, load=(2.0, 100.0, 8.0), step=0.0, expert=0.0, large=(1,))
    division = price(chances, np.array([0]), 1, rates)
    assert (division.loads, division.seconds) == (0.75, 0.5 * 2 + 0.25 * 8)


def test_a_trace_carries_the_bytes_of_each_layer(tmp_path: Path) -> None:
    """Sizes come back as written; a list of another length is refused."""
    trace = make_trace(5, layers=2)
    save_trace(replace(trace, header=replace(trace.header, record_bytes=9, layer_bytes=(7, 9))), tmp_path / "a.trace")
    assert load_trace(tmp_path / "a.trace").header.layer_bytes == (7, 9)
    assert find_record(tmp_path / "a.trace", None, None).layer_bytes == (7, 9)
    save_trace(replace(trace, header=replace(trace.header, layer_bytes=(7,))), tmp_path / "b.trace")
    with pytest.raises(TraceError, match="layer_bytes"):
        load_trace(tmp_path / "b.trace")
