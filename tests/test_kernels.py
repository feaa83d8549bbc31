"""The Triton kernels against plain torch in float64, and against themselves: what must not change a bit.

Without a CUDA device they run in Triton's interpreter on CPU tensors.
"""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertflow.cache.core import make_tables
from expertflow.cache.horizon import hazards, take_turns, unite
from expertflow.cache.strategy import STRATEGIES
from expertflow.formats.dtypes import RUN_DTYPES
from expertflow.formats.plain import plain
from expertflow.formats.records import RecordLayout, StoreLayout
from expertflow.kernels import mlp as mlp_module
from expertflow.kernels import reference
from expertflow.kernels.ledger import BLOCK_BYTES, CALLED_OFF, CARRIED, DONE, DST, LINE, PRIOR, SRC, TAKEN, Ledger
from expertflow.kernels.mlp import ACTIVATIONS, CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.kernels.residency.state import BLIND, CacheState
from expertflow.live.batch import PredictorBatch, PredictorInputs
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore
from expertflow.models.families import FAMILIES
from helpers import DEVICE

pytest.importorskip("triton", reason="kernels need triton")
from expertflow.kernels import experts, fetch
from expertflow.kernels.residency import driver

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 1e-2}
HIDDEN, WIDTH, EXPERTS = 72, 40, 6  # no multiples of any block
SWITCH = {"wi": (WIDTH, HIDDEN), "wo": (HIDDEN, WIDTH)}
GATED = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
PLAIN_TRANSPOSED = {"up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}
GPT_OSS = {
    "gate_up_proj": (HIDDEN, 2 * WIDTH),
    "gate_up_proj_bias": (2 * WIDTH,),
    "down_proj": (WIDTH, HIDDEN),
    "down_proj_bias": (HIDDEN,),
}
BIASED = {
    "gate_up_proj": (2 * WIDTH, HIDDEN),
    "gate_up_proj_bias": (2 * WIDTH,),
    "down_proj": (HIDDEN, WIDTH),
    "down_proj_bias": (HIDDEN,),
}
KINDS = {
    **{f"gated-{name}": (GATED, {"activation": name}) for name in ACTIVATIONS},
    "gated-biased": (BIASED, {"activation": "silu"}),
    "plain-relu": (SWITCH, {"activation": "relu"}),
    "plain-transposed": (PLAIN_TRANSPOSED, {"activation": "relu2", "transposed": True}),
    "gated-transposed": (
        {"gate_up_proj": (HIDDEN, 2 * WIDTH), "down_proj": (WIDTH, HIDDEN)}, {"activation": "silu", "transposed": True},
    ),
    "gpt-oss": (GPT_OSS, {"activation": CLAMPED_SWIGLU, "transposed": True, "interleaved": True}),
}  # fmt: skip


def make(kind: str, dtype: str = "float32") -> tuple[StoreLayout, ExpertMlp]:
    shapes, options = KINDS[kind]
    layout = StoreLayout.uniform([plain(name, shape, dtype) for name, shape in shapes.items()])
    return layout, ExpertMlp.of(layout.layers[0], **options)


def filled_pool(layout: StoreLayout, slots: int = EXPERTS, scale: float = 0.3) -> SlotPool:
    pool = SlotPool(layout, slots, DEVICE)
    pool.buffer.fill_(255)  # NaN in every dtype, also between the tensors
    for slot in range(slots):
        for view in pool.weights(slot, 0).values():
            view.copy_(torch.randn(view.shape) * scale)
    return pool


def poisoned(mlp: ExpertMlp, tokens: int, top_k: int, *, exact: bool = False) -> Workspace:
    work = Workspace.allocate(mlp, tokens, top_k, DEVICE)
    work = Workspace(work.inner.double(), work.parts.double()) if exact else work
    work.inner.fill_(torch.nan)
    work.parts.fill_(torch.nan)
    return work


def routing(tokens: int, top_k: int, number: int = EXPERTS) -> Tensor:
    return torch.stack([torch.randperm(number)[:top_k] for _ in range(tokens)]).to(DEVICE)


def distance(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", RUN_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_their_sum_equal_float64(kind: str, dtype: str) -> None:
    """Every kind of MLP in every dtype gives what float64 torch gives; pairs without a slot are left untouched."""
    layout, mlp = make(kind, dtype)
    pool = filled_pool(layout)
    hidden = torch.randn(5, HIDDEN).to(DEVICE, getattr(torch, dtype)) * 2
    index, weights = routing(5, 3), torch.rand(5, 3, device=DEVICE)
    slots = index.to(torch.int32)
    slots[2, 1] = slots[4, 0] = -1
    work, expected = poisoned(mlp, 5, 3), poisoned(mlp, 5, 3, exact=True)
    experts.expert_pairs(mlp, hidden, slots, pool.buffer, work)
    reference.expert_pairs(mlp, hidden, slots, pool.buffer, expected)
    assert torch.equal(work.parts.isnan().any(dim=2), slots < 0)
    assert distance(work.parts[slots >= 0], expected.parts[slots >= 0]) < TOLERANCE[dtype]
    index[slots < 0] = EXPERTS  # no expert
    out = torch.full((5, HIDDEN), torch.nan, dtype=getattr(torch, dtype), device=DEVICE)
    total = torch.empty(5, HIDDEN, dtype=torch.float64, device=DEVICE)
    experts.combine(work.parts, index, weights, EXPERTS, out)
    reference.combine(expected.parts, index, weights, EXPERTS, total)
    assert distance(out, total) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_reference_is_what_transformers_computes(family: str) -> None:
    """The reference gives what the family's own eager experts module gives."""
    config = AutoConfig.for_model(family, **FAMILIES[family].tiny)
    config._experts_implementation = "eager"
    module = {"qwen3_moe": Qwen3MoeExperts, "gpt_oss": GptOssExperts}[family](config)
    parameters = dict(module.named_parameters())
    for parameter in parameters.values():
        parameter.data.normal_(std=0.5)
    specs = [plain(n, tuple(p.shape[1:]), "float32") for n, p in parameters.items()]
    layout = StoreLayout.uniform(specs)
    options = {"activation": CLAMPED_SWIGLU, "transposed": True, "interleaved": True}
    mlp = ExpertMlp.of(
        layout.layers[0],
        **(options if family == "gpt_oss" else {"activation": "silu"}),
    )
    pool = SlotPool(layout, module.num_experts, torch.device("cpu"))
    for expert in range(module.num_experts):
        for name, view in pool.weights(expert, 0).items():
            view.copy_(parameters[name].data[expert])
    hidden, index, weights = torch.randn(7, 64) * 3, routing(7, 2, module.num_experts).cpu(), torch.rand(7, 2)
    work = Workspace(torch.empty(14, mlp.width).double(), torch.empty(7, 2, 64).double())
    reference.expert_pairs(mlp, hidden, index.to(torch.int32), pool.buffer, work)
    out = torch.empty(7, 64, dtype=torch.float64)
    reference.combine(work.parts, index, weights, module.num_experts, out)
    with torch.no_grad():
        assert distance(module(hidden, index, weights), out) < 1e-6


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slots_waves_and_company_change_no_bit(data: st.DataObject) -> None:
    """A pair's result is the same in any slot, in any wave, and with any other tokens in the batch."""
    kind = data.draw(st.sampled_from(["gated-silu", "gpt-oss", "plain-relu"]))
    dtype = data.draw(st.sampled_from(sorted(RUN_DTYPES)))
    tokens, top_k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    layout, mlp = make(kind, dtype)
    pool = filled_pool(layout)
    hidden = torch.randn(tokens, HIDDEN).to(DEVICE, getattr(torch, dtype))
    index = routing(tokens, top_k)
    work, other = poisoned(mlp, tokens, top_k), poisoned(mlp, tokens, top_k)
    experts.expert_pairs(mlp, hidden, index.to(torch.int32), pool.buffer, work)

    order = torch.tensor(data.draw(st.permutations(range(EXPERTS))), device=DEVICE)
    moved = torch.empty_like(pool.buffer)
    moved[order] = pool.buffer
    elsewhere = order[index].to(torch.int32)
    first = torch.tensor(data.draw(st.lists(st.booleans(), min_size=EXPERTS, max_size=EXPERTS)), device=DEVICE)[index]
    for wave in (first, ~first):
        experts.expert_pairs(mlp, hidden, torch.where(wave, elsewhere, -1), moved, other)
    assert torch.equal(work.parts, other.parts)

    alone = data.draw(st.integers(0, tokens - 1))
    single = poisoned(mlp, 1, top_k)
    mine = slice(alone, alone + 1)
    experts.expert_pairs(mlp, hidden[mine], index[mine].to(torch.int32), pool.buffer, single)
    assert torch.equal(single.parts[0], work.parts[alone])


def test_more_tokens_than_a_tile_share_an_expert() -> None:
    """Forty tokens on two experts need several tiles of one expert; each gets what it gets alone."""
    layout, mlp = make("gated-silu")
    pool = filled_pool(layout)
    hidden = torch.randn(40, HIDDEN, device=DEVICE)
    slots = torch.where(torch.arange(40, device=DEVICE) % 5 == 0, 1, 4).to(torch.int32)[:, None]
    work, expected = poisoned(mlp, 40, 1), poisoned(mlp, 40, 1, exact=True)
    experts.expert_pairs(mlp, hidden, slots, pool.buffer, work)
    reference.expert_pairs(mlp, hidden, slots, pool.buffer, expected)
    assert distance(work.parts, expected.parts) < TOLERANCE["float32"]
    single = poisoned(mlp, 1, 1)
    for token in (0, 21, 39):
        experts.expert_pairs(mlp, hidden[token : token + 1], slots[token : token + 1], pool.buffer, single)
        assert torch.equal(single.parts[0], work.parts[token])


@pytest.mark.parametrize("module", [reference, experts])
def test_the_sum_does_not_depend_on_the_routers_order(module: SimpleNamespace) -> None:
    """Permuting a token's experts together with weights and parts changes no bit of the sum."""
    parts, weights = torch.randn(4, 6, HIDDEN, device=DEVICE), torch.rand(4, 6, device=DEVICE)
    index = routing(4, 6, 32)
    out, again = torch.empty(4, HIDDEN, device=DEVICE), torch.empty(4, HIDDEN, device=DEVICE)
    module.combine(parts, index, weights, 32, out)
    order = torch.randperm(6, device=DEVICE)
    module.combine(parts[:, order].contiguous(), index[:, order], weights[:, order], 32, again)
    assert torch.equal(out, again)
    assert distance(out, (parts.double() * weights[..., None]).sum(1)) < 1e-6


@pytest.mark.parametrize("module", [reference, experts])
def test_an_index_of_no_expert_adds_nothing(module: SimpleNamespace) -> None:
    """A token with no expert at all gets zeros, whatever lies in the buffer."""
    parts = torch.full((2, 2, HIDDEN), torch.nan, device=DEVICE)
    out = torch.full((2, HIDDEN), torch.nan, device=DEVICE)
    index = torch.tensor([[8, -1], [9, 8]], device=DEVICE)
    module.combine(parts, index, torch.ones(2, 2, device=DEVICE), 8, out)
    assert not out.any()


@settings(max_examples=15)
@given(data=st.data())
def test_fetch_copies_the_named_entries_only(data: st.DataObject) -> None:
    """Rows of entries within the bounds arrive in their slots; every other slot stays as it was, also the second time."""
    record_bytes = 256 * data.draw(st.integers(1, 300))
    slots, entries = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    entries = min(entries, slots)
    host = torch.randint(0, 256, (9, record_bytes), dtype=torch.uint8)
    host = host.pin_memory() if DEVICE.type == "cuda" else host
    before = torch.randint(0, 256, (slots, record_bytes), dtype=torch.uint8, device=DEVICE)
    src = torch.randint(0, 9, (entries,), dtype=torch.int32, device=DEVICE)
    dst = torch.randperm(slots, device=DEVICE)[:entries].to(torch.int32)
    todo = torch.cat([src[:1], torch.randperm(entries, device=DEVICE).to(torch.int32)])[1:]  # lists start anywhere
    begin = data.draw(st.integers(0, entries))
    bounds = torch.tensor([begin, data.draw(st.integers(begin, entries))], dtype=torch.int32, device=DEVICE)
    gone = data.draw(st.integers(-1, entries - 1))
    sizes = data.draw(st.none() | st.lists(st.integers(1, record_bytes // LINE), min_size=9, max_size=9))
    lines = None if sizes is None else torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    pools = before.clone(), before.clone()
    for module, pool in zip((fetch, reference), pools, strict=True):
        ledger = replace(Ledger.of(src, dst), lines=lines)
        if gone >= 0:  # called off before a program took it
            ledger.table[TAKEN, gone], ledger.table[DONE, gone] = CALLED_OFF, 1 << 20  # so that no program waits for it
        module.fetch_records(host, pool, ledger, todo, bounds, data.draw(st.integers(1, 5)))
        once = pool.clone()
        module.fetch_records(host, pool, ledger, todo, bounds)
        assert torch.equal(pool, once)
    assert torch.equal(*pools)
    named = [int(entry) for entry in todo[int(bounds[0]) : int(bounds[1])] if entry != gone]
    for entry in named:
        size = record_bytes if sizes is None else sizes[int(src[entry])] * LINE
        assert torch.equal(pools[0][dst[entry], :size].cpu(), host[src[entry], :size])
        assert torch.equal(pools[0][dst[entry], size:], before[dst[entry], size:])


def test_a_load_finishes_what_another_began() -> None:
    """Blocks that another program carried are not carried again, and those that none took are."""
    blocks, block = 5, BLOCK_BYTES
    host = torch.randint(1, 256, (1, blocks * block), dtype=torch.uint8)
    host = host.pin_memory() if DEVICE.type == "cuda" else host
    pool = torch.zeros(1, blocks * block, dtype=torch.uint8, device=DEVICE)
    first = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    ledger = Ledger.of(first, first)
    ledger.table[TAKEN : DONE + 1] = 2
    fetch.fetch_records(host, pool, ledger, first, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), 3)
    assert not pool[0, : 2 * block].any()
    assert torch.equal(pool[0, 2 * block :].cpu(), host[0, 2 * block :])
    assert int(ledger.table[DONE]) == blocks


def beside(device: torch.device, work: Callable[[], None]) -> threading.Thread:
    """Start `work` in a thread of its own, and on a GPU on a stream of its own; the stream is made here: making one waits for the device."""
    line = torch.cuda.Stream() if device.type == "cuda" else None

    def run() -> None:
        with nullcontext() if line is None else torch.cuda.stream(line):
            work()

    if line is not None:
        torch.cuda.synchronize()
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def records_to_fetch(blocks: int) -> tuple[Tensor, Tensor, Ledger, Tensor, Tensor]:
    """Two records of so many blocks in host memory, slots, their loads, both in order, and the bounds of each."""
    host = torch.randint(1, 256, (2, blocks * BLOCK_BYTES), dtype=torch.uint8)
    host = host.pin_memory() if DEVICE.type == "cuda" else host
    both = torch.arange(2, dtype=torch.int32, device=DEVICE)
    pool, bounds = torch.zeros_like(host, device=DEVICE), torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    return host, pool, Ledger.of(both, both), both, bounds


def test_loads_ahead_take_no_block_while_something_is_urgent() -> None:
    """They go on when it has ended."""
    host, pool, ledger, both, bounds = records_to_fetch(3)
    for waits in (True, False):  # a kernel that is compiled below would begin too late to be seen
        fetch.fetch_records(host, pool, ledger, both, bounds[:2], wait=waits)
        assert int(ledger.urgent) == 0
    ledger.urgent.fill_(1)
    taken: list[int] = []

    def end_what_is_urgent() -> None:
        time.sleep(0.2)
        taken.append(int(ledger.table[TAKEN, 1]))
        ledger.urgent.zero_()

    other = beside(DEVICE, end_what_is_urgent)
    fetch.fetch_records(host, pool, ledger, both, bounds[1:], wait=False)
    other.join()
    assert taken == [0]
    assert torch.equal(pool.cpu(), host)


def test_a_load_that_a_layer_waits_for_is_urgent() -> None:
    """It says so while it runs: here it waits for a block of a load into its slot that was called off."""
    host, pool, ledger, both, bounds = records_to_fetch(3)
    fetch.fetch_records(host, pool, ledger, both, bounds[:2])
    ledger.table[DONE, 0], ledger.table[CARRIED, 0], ledger.table[PRIOR, 1] = 0, 1, 0
    urgent: list[int] = []

    def carry_the_block() -> None:
        time.sleep(0.2)
        urgent.append(int(ledger.urgent))
        ledger.table[DONE, 0] = 1

    other = beside(DEVICE, carry_the_block)
    fetch.fetch_records(host, pool, ledger, both, bounds[1:], 1)
    other.join()
    assert urgent == [1]
    assert int(ledger.urgent) == 0
    assert torch.equal(pool.cpu(), host)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has carried the record before a thread can say so")
def test_loads_ahead_stand_still_between_two_blocks() -> None:
    """What becomes urgent while a record is carried holds up the rest of it."""
    host, pool, ledger, both, bounds = records_to_fetch(400)
    taken: list[int] = []

    def become_urgent() -> None:
        while not int(ledger.table[TAKEN, 1]):
            time.sleep(0.001)
        ledger.urgent.fill_(1)
        for _ in range(2):
            time.sleep(0.1)
            taken.append(int(ledger.table[TAKEN, 1]))
        ledger.urgent.zero_()

    other = beside(DEVICE, become_urgent)
    fetch.fetch_records(host, pool, ledger, both, bounds[1:], wait=False)
    other.join()
    assert taken[0] == taken[1] < 400
    assert torch.equal(pool[1], host[1])


@pytest.mark.parametrize("groups", [[[2, 0, 3]], [[1], [4, 0], [2, 3]], [[0, 3], [4]]])
def test_what_is_expected_of_single_sequences_is_united(groups: list[list[int]]) -> None:
    """The demand of a step is `unite`, `hazards` and `take_turns` of its groups; a chance that is no number leaves none."""
    strategy = STRATEGIES["plec"]
    state = CacheState.allocate(strategy, make_tables(3, 7, 5, divided=False), DEVICE)
    twin = driver.Residency(state)
    chances = torch.rand(6, 5, 3, 7, device=DEVICE)
    chances[0, 2:, 0], chances[3, 1, 1] = 0.0, 1.0
    inputs = PredictorInputs(5, 5, 5, DEVICE)
    inputs.write([0], PredictorBatch([], [], groups))
    twin.expect(chances, inputs.members, inputs.turns)
    expected = take_turns([hazards(unite(chances[group].cpu().numpy())) for group in groups])
    assert state.demand.shape == expected.shape
    np.testing.assert_allclose(state.demand.cpu().numpy(), expected, atol=1e-7)
    assert int(state.known) == len(expected)
    chances[groups[-1][-1], 4, 2, 6] = torch.nan
    twin.expect(chances, inputs.members, inputs.turns)
    assert int(state.known) == 0
    assert state.take_tally()[BLIND] == 1
    chances[groups[-1][-1]], chances[5] = 0.5, torch.nan  # the spare row is no sequence's
    twin.expect(chances, inputs.members, inputs.turns)
    assert int(state.known) == len(expected)
    inputs.write([0], None)
    twin.expect(chances, inputs.members, inputs.turns)
    assert int(state.known) == 0
    assert state.take_tally()[BLIND] == 0


def test_a_record_that_is_no_mlp_is_refused() -> None:
    """A tensor or an activation the kernels do not know is an error, not a guess."""
    specs = make("gated-silu")[0].layers[0].specs
    with pytest.raises(ValueError, match="activation 'mish'"):
        ExpertMlp.of(RecordLayout.of(specs), "mish")
    with pytest.raises(ValueError, match="w1"):
        ExpertMlp.of(RecordLayout.of((*specs, plain("w1", (2,), "float32"))), "silu")


def test_the_workspace_takes_what_it_says() -> None:
    """The bytes a planner counts are the bytes allocated."""
    _, mlp = make("gpt-oss", "bfloat16")
    work = Workspace.allocate(mlp, 5, 3, DEVICE)
    sizes = mlp.width, mlp.inner, mlp.hidden, mlp.torch_dtype.itemsize
    assert Workspace.nbytes(15, *sizes) == sum(t.untyped_storage().nbytes() for t in vars(work).values())


@pytest.mark.cuda
def test_a_captured_layer_follows_its_inputs(cuda: torch.device) -> None:
    """A replayed graph fetches other records and computes with other slots when the tensors it reads change."""
    layout, mlp = make("gpt-oss", "bfloat16")
    store = HostStore(layout, 12, pin=True)
    for record in range(12):
        for view in layout.layers[0].weights(store.record(record)).values():
            view.copy_(torch.randn(view.shape))
    store.lock()
    pool = SlotPool(layout, 4, cuda)
    hidden, weights = torch.randn(2, HIDDEN, device=cuda, dtype=torch.bfloat16), torch.rand(2, 2, device=cuda)
    src, dst, todo, bounds, slots, index, out = (
        torch.zeros(shape, dtype=dtype, device=cuda)
        for shape, dtype in (
            ((4,), torch.int32), ((4,), torch.int32), ((4,), torch.int32), ((2,), torch.int32), ((2, 2), torch.int32),
            ((2, 2), torch.int64), ((2, HIDDEN), torch.bfloat16),
        )
    )  # fmt: skip
    work, ledger = poisoned(mlp, 2, 2), Ledger.of(src, dst)
    todo.copy_(torch.arange(4))

    def layer() -> None:
        ledger.renew()
        fetch.fetch_records(store.buffer, pool.buffer, ledger, todo, bounds)
        experts.expert_pairs(mlp, hidden, slots, pool.buffer, work)
        experts.combine(work.parts, index, weights, 12, out)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()
    for _ in range(5):
        records, places = torch.randperm(12)[:4], torch.randperm(4)
        which = routing(2, 2, 4).cpu()
        ledger.table[SRC] = records.to(cuda)
        ledger.table[DST] = places.to(cuda)
        bounds.copy_(torch.tensor([0, 4]))
        slots.copy_(places[which])
        index.copy_(records[which])
        graph.replay()
        expected, total = poisoned(mlp, 2, 2, exact=True), torch.empty(2, HIDDEN, dtype=torch.float64)
        expected = Workspace(expected.inner.cpu(), expected.parts.cpu())
        reference.expert_pairs(mlp, hidden.cpu(), records[which].to(torch.int32), store.buffer, expected)
        reference.combine(expected.parts, records[which], weights.cpu(), 12, total)
        assert distance(out.cpu(), total) < 2 * TOLERANCE["bfloat16"]
    torch.cuda.synchronize()
    store.close()


@pytest.mark.cuda
@pytest.mark.parametrize("tokens", [4, 64])
def test_full_size_records_are_exact_on_the_device(cuda: torch.device, tokens: int) -> None:
    """At real sizes a token's result in a batch is, to the bit, its result alone."""
    hidden, width, number, top_k = 2048, 768, 32, 8
    shapes = {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}
    layout = StoreLayout.uniform([plain(n, s, "bfloat16") for n, s in shapes.items()])
    mlp = ExpertMlp.of(layout.layers[0], "silu")
    pool = filled_pool(layout, number, scale=0.02)
    x = torch.randn(tokens, hidden, device=cuda, dtype=torch.bfloat16)
    slots = routing(tokens, top_k, number).to(torch.int32)
    work, single = poisoned(mlp, tokens, top_k), poisoned(mlp, 1, top_k)
    experts.expert_pairs(mlp, x, slots, pool.buffer, work)
    for token in range(0, tokens, 3):
        experts.expert_pairs(mlp, x[token : token + 1], slots[token : token + 1], pool.buffer, single)
        assert torch.equal(single.parts[0], work.parts[token])


def test_an_activation_without_a_branch_is_no_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry in the table of activations that the kernels have no branch for is an error, not another function."""
    monkeypatch.setattr(mlp_module, "ACTIVATIONS", {**ACTIVATIONS, "tanh": torch.tanh})
    layout, known = make("gated-silu")
    mlp = ExpertMlp.of(layout.layers[0], "tanh")
    slots = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    hidden = torch.randn(1, HIDDEN, device=DEVICE)
    with pytest.raises(Exception, match="activat") as caught:  # Triton's own, which a compiler nests
        experts.expert_pairs(mlp, hidden, slots, filled_pool(layout).buffer, poisoned(known, 1, 1))
    error, messages = caught.value, ""
    while error is not None:
        error, messages = error.__cause__, f"{messages} {error}"
    assert "no branch here" in messages
