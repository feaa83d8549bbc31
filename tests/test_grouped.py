"""Prompts in graph execution: kernels compute all tokens of an expert at once, with the bits of a decode step."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.cache.controller import CacheController
from expertflow.cache.strategy import STRATEGIES
from expertflow.events import EventStream
from expertflow.execution.grouped import PromptExperts
from expertflow.execution.provider import CachedExperts
from expertflow.execution.runner import PromptChunk
from expertflow.formats.dtypes import RUN_DTYPES
from expertflow.formats.format import Format, TensorSpec
from expertflow.formats.plain import plain
from expertflow.formats.published.mxfp4 import MXFP4
from expertflow.formats.records import StoreLayout
from expertflow.kernels import reference
from expertflow.kernels.backend import backend
from expertflow.kernels.mlp import CLAMPED_SWIGLU, ExpertMlp, Workspace
from expertflow.kernels.prompts.pairs import CountedPairs, sort_pairs
from expertflow.memory.slots import SlotPool
from expertflow.trace.format import load_trace
from expertflow.types import Access
from helpers import DEVICE, DEVICES, ROOT, MakeCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter
HIDDEN, WIDTH, EXPERTS, TOP_K = 72, 40, 6, 2  # no multiples of any block
KINDS = {
    "gated": ({"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}, {"activation": "silu"}),
    "plain": ({"wi": (WIDTH, HIDDEN), "wo": (HIDDEN, WIDTH)}, {"activation": "relu"}),
    "gpt-oss": (
        {
            "gate_up_proj": (HIDDEN, 2 * WIDTH), "gate_up_proj_bias": (2 * WIDTH,),
            "down_proj": (WIDTH, HIDDEN), "down_proj_bias": (HIDDEN,),
        },
        {"activation": CLAMPED_SWIGLU, "transposed": True, "interleaved": True},
    ),
}  # fmt: skip
CASES = [(kind, dtype) for kind in KINDS for dtype in (RUN_DTYPES if DEVICE.type == "cuda" else ("bfloat16",))]
CASES += [("gated", "float32")] * (DEVICE.type == "cpu")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [10, 11], [12, 13, 14]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


def make(kind: str, dtype: str) -> tuple[ExpertMlp, Tensor]:
    """An MLP, and slots with random experts."""
    shapes, options = KINDS[kind]
    layout = StoreLayout.uniform([plain(name, shape, dtype) for name, shape in shapes.items()])
    pool = SlotPool(layout, EXPERTS, DEVICE)
    for slot in range(EXPERTS):
        for view in pool.weights(slot, 0).values():
            view.copy_(torch.randn(view.shape) * 0.3)
    return ExpertMlp.of(layout.layers[0], **options), pool.buffer


def routing(tokens: int) -> Tensor:
    """Experts `[tokens, TOP_K]`; expert 4 has most tokens, expert 5 none."""
    index = torch.stack([torch.randperm(4)[:TOP_K] for _ in range(tokens)])
    index[: tokens * 2 // 3, 1] = 4
    return index.to(DEVICE)


def sorted_pairs(index: Tensor) -> CountedPairs:
    return sort_pairs(index, EXPERTS).counted(index.cpu().numpy())


def empty(mlp: ExpertMlp, tokens: int) -> Workspace:
    work = Workspace.allocate(mlp, tokens, TOP_K, DEVICE)
    work.inner.fill_(torch.nan)
    work.parts.fill_(torch.nan)
    return work


def test_pairs_are_sorted_by_expert() -> None:
    """Places lie between the expert's bounds, in ascending order of pair; pairs without an expert come last."""
    index = torch.tensor([[3, 0], [6, 6], [0, 5], [3, 0]], device=DEVICE)
    pairs = sorted_pairs(index)
    found = {expert: pairs.order[pairs.bounds[expert] : pairs.bounds[expert + 1]].tolist() for expert in range(EXPERTS)}
    assert found == {0: [1, 4, 7], 1: [], 2: [], 3: [0, 6], 4: [], 5: [5]}
    assert pairs.order[pairs.bounds[-1] :].tolist() == [2, 3]
    assert (pairs.needed, pairs.mean) == ([0, 3, 5], 2)
    assert pairs.edges.tolist() == pairs.bounds
    everyone = [(expert, expert) for expert in range(EXPERTS)]
    for tile, count in ((1, 6), (2, 4), (16, 3)):  # what the host knows, and what it expects at most while it does not
        assert pairs.tiles(everyone, tile) == count <= sort_pairs(index, EXPERTS).tiles(everyone, tile) <= 8


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_pair_has_the_bits_of_a_decode_step(kind: str, dtype: str) -> None:
    """Whatever the size of pass and tile, in whatever groups, from whatever slots.

    In Triton's interpreter NumPy multiplies, whose bits depend on the shape; there wider tiles are compared up to rounding.
    """
    experts = pytest.importorskip("expertflow.kernels.experts", reason="kernels need triton")
    grouped = pytest.importorskip("expertflow.kernels.prompts.grouped")
    tokens = 30
    mlp, pool = make(kind, dtype)
    hidden, index = torch.randn(tokens, HIDDEN).to(DEVICE, mlp.torch_dtype), routing(tokens)
    expected = empty(mlp, tokens)
    experts.expert_pairs(mlp, hidden, index.to(torch.int32), pool, expected)
    order = torch.randperm(EXPERTS).tolist()
    moved = torch.empty_like(pool)
    moved[order] = pool
    run, pairs = grouped.GroupedMlp(mlp, DEVICE), sorted_pairs(index)
    for tile in grouped.TILES if DEVICE.type == "cuda" else (16, 64):
        found = empty(mlp, tokens)
        for known, group in ((pairs, [4]), (sort_pairs(index, EXPERTS), [0, 5, 3]), (pairs, [1, 2])):
            run.launch(hidden, known, [(expert, order[expert]) for expert in group], moved, found, tile=tile)
        if tile == grouped.TILES[0] or DEVICE.type == "cuda":
            assert torch.equal(found.parts, expected.parts)
        torch.testing.assert_close(found.parts, expected.parts, atol=1e-3, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_of_any_size_gives_a_token_the_same_bits(kind: str, dtype: str, cuda: torch.device) -> None:
    """A token alone, and among 3, 90 and 700 others."""
    grouped = pytest.importorskip("expertflow.kernels.prompts.grouped")
    mlp, pool = make(kind, dtype)
    run, most = grouped.GroupedMlp(mlp, cuda), 701
    hidden, index = torch.randn(most, HIDDEN, device=cuda).to(mlp.torch_dtype), routing(most)
    found = []
    for tokens in (1, 4, 91, most):
        pairs, work = sorted_pairs(index[-tokens:]), empty(mlp, tokens)
        run(hidden[-tokens:], pairs, [(expert, expert) for expert in pairs.needed], pool, work)
        found.append(work.parts)
    assert all(torch.equal(each, found[-1][-len(each) :]) for each in found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_does_not_depend_on_the_pass(kind: str) -> None:
    """It gives each pair what the reference of a decode step does, in a pass of all tokens and in one of a few."""
    mlp, pool = make(kind, "bfloat16")
    hidden, index = torch.randn(9, HIDDEN).to(DEVICE, mlp.torch_dtype), routing(9)
    expected = empty(mlp, 9)
    reference.expert_pairs(mlp, hidden, index.to(torch.int32), pool, expected)
    for mine in (slice(0, 9), slice(5, 8)):
        pairs, work = sorted_pairs(index[mine]), empty(mlp, 9)
        for expert in pairs.needed:
            reference.group_pairs(mlp, hidden[mine], pairs, [(expert, expert)], pool, work)
        count = mine.stop - mine.start
        assert torch.equal(work.parts[:count], expected.parts[mine])
        assert work.parts[count:].isnan().all()


def test_packed_experts_have_the_bits_of_decoded_ones() -> None:
    """The grouped kernel reads a packed format by the product that a decode step uses."""
    grouped = pytest.importorskip("expertflow.kernels.prompts.grouped", reason="kernels need triton")
    shapes, plain_format = {"gate_up_proj": (64, 160), "down_proj": (160, 32)}, plain("x", (1,), "bfloat16").format
    generator = torch.Generator().manual_seed(1)
    layouts = [
        StoreLayout.uniform([_spec(name, shape, format_) for name, shape in shapes.items()])
        for format_ in (MXFP4, plain_format)
    ]
    pools = [SlotPool(layout, EXPERTS, DEVICE) for layout in layouts]
    for slot in range(EXPERTS):
        for name in shapes:
            spec = next(spec for spec in layouts[0].layers[0].specs if spec.name == name)
            parts = MXFP4.draw(spec, generator, 0.3)
            for part, value in parts.items():
                layouts[0].layers[0].part(pools[0].buffer[slot], name, part).copy_(value)
            layouts[1].layers[0].tensor(pools[1].buffer[slot], name).copy_(MXFP4.decode(spec, parts))
    index = routing(20)
    hidden, pairs, found = torch.randn(20, 160).to(DEVICE, torch.bfloat16), sorted_pairs(index), []
    for layout, pool in zip(layouts, pools, strict=True):
        mlp = ExpertMlp.of(layout.layers[0], "silu")
        work = empty(mlp, 20)
        grouped.GroupedMlp(mlp, DEVICE)(hidden, pairs, [(expert, expert) for expert in pairs.needed], pool.buffer, work)
        found.append(work.parts)
    assert torch.equal(*found)
    assert found[0].isfinite().all()


def _spec(name: str, shape: tuple[int, ...], format_: Format) -> TensorSpec:
    return TensorSpec(
        name=name, shape=shape, dtype="bfloat16", format=format_, joined=2 if name == "gate_up_proj" else 1
    )


@pytest.mark.parametrize(("dtype", "transposed"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10])
def test_tiles_fit_into_shared_memory(room: int, dtype: str, transposed: bool) -> None:
    """On GPUs of every size, and along K in the steps of a decode step."""
    experts = pytest.importorskip("expertflow.kernels.experts", reason="kernels need triton")
    grouped = pytest.importorskip("expertflow.kernels.prompts.grouped")
    mlp = replace(make("gated", dtype)[0], transposed=transposed)
    for tile in grouped.TILES:
        cuts = grouped.wider_tilings(mlp, tile, room)
        for cut, same, outputs in zip(cuts, experts.tilings(mlp, 1024), (2, 1), strict=True):
            assert cut.block_k == same.block_k
            if tile > grouped.TILES[0] and dtype != "float32":
                assert cut.stages > 1
                assert cut.stages * (cut.block_n * outputs + tile) * cut.block_k * 2 <= room


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """With the shared memory that each has, and Hopper's own instructions on Hopper."""
    pytest.importorskip("triton", reason="kernels need triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "compile_grouped.py"), "80", "86", "89", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert len(made) == 8
    for arch, shared, room, hopper in made:
        assert 0 < shared <= room
        assert hopper == (arch >= 90)


def test_a_kernel_too_large_for_the_device_gets_fewer_stages() -> None:
    """Once; and if one stage is too large as well, it is an error."""
    grouped = pytest.importorskip("expertflow.kernels.prompts.grouped", reason="kernels need triton")
    launching = pytest.importorskip("expertflow.kernels.launching")
    launch, tried = grouped.Launch(3, {"num_stages": 4}), []

    def kernel(number: torch.Tensor, *, num_stages: int, most: int) -> None:
        tried.append((int(number), num_stages))
        if num_stages > most:
            raise launching.OutOfResources(num_stages, most, "shared memory")

    grid = {(3, 5): kernel}
    for number in range(2):
        launch.run(grid, 5, (torch.tensor(number),), most=2)
    assert tried == [(0, 4), (0, 3), (0, 2), (1, 2)]
    with pytest.raises(launching.OutOfResources):
        launch.run(grid, 5, (torch.tensor(2),), most=0)


class Link:
    """A transfer whose copies arrive when told to; refuses to overwrite what is still needed, and to lend what is not there."""

    def __init__(self) -> None:
        self.inside: dict[int, int] = {}
        self.lent: set[int] = set()
        self.under_way: list[int] = []
        self.log: list[str] = []

    def start(self, loads: Sequence[tuple[int, int]]) -> None:
        for record, slot in loads:
            assert slot not in self.lent
            self.inside[slot] = record
            self.under_way.append(slot)
            self.log.append(f"start {record}")

    def wait(self, slots: Sequence[int]) -> None:
        last = max((place for place, one in enumerate(self.under_way) if one in slots), default=-1)
        del self.under_way[: last + 1]  # copies arrive in order

    def arrived(self, slot: int) -> bool:
        return slot not in self.under_way

    def release(self, slots: Sequence[int]) -> None:
        self.lent.difference_update(slots)

    def settle(self) -> None:
        self.under_way.clear()


def make_provider(link: Link, slots: int, strategy: str, wide: int | None = None) -> CachedExperts:
    controller = CacheController(
        layers=2, experts=8, slots=slots, strategy=STRATEGIES[strategy].double_buffered(), record_bytes=1,
        events=EventStream(), wide=wide, future=np.random.default_rng(1).random((30, 2, 8)) < 0.4,
    )  # fmt: skip
    return CachedExperts(controller, link, None)


def brought(provider: CachedExperts, link: Link, layer: int, needed: list[int]) -> Iterator[list[Access]]:
    """The groups of a layer, each of which holds what it should."""
    for group in provider.groups(layer, needed):
        for access in group:
            assert access.slot not in link.under_way
            assert link.inside[access.slot] == 8 * layer + access.expert
            link.lent.add(access.slot)
        link.log.append(f"group {sorted(8 * layer + access.expert for access in group)}")
        yield group


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 11, 16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_groups_hold_every_expert_once_in_its_slot(slots: int, strategy: str) -> None:
    """With the decisions of single experts: what is loaded and where does not depend on how it is computed."""
    decided: list[Any] = []
    for together in (False, True):
        link = Link()
        provider = make_provider(link, slots, strategy)
        provider._pool = SlotPool(StoreLayout.uniform([plain("w", (1,), "float32")], 2), slots, torch.device("cpu"))
        happened: list[Any] = []
        provider.controller.events.subscribe(happened.append)
        for needed in ([0, 1, 2, 3, 4, 5, 6, 7], [1, 3], [], [0, 2, 4, 6], [1, 2, 3, 5, 6, 7]):
            provider.begin_step()
            for layer in range(2):
                if together:
                    found = [a.expert for group in brought(provider, link, layer, needed) for a in group]
                else:
                    found = [expert for expert, _ in provider.stream(layer, needed)]
                assert sorted(found) == needed
        decided.append(happened)
    assert decided[0] == decided[1]


def test_residents_come_together_and_arrivals_as_they_are_there() -> None:
    """A layer needs eight experts, of which half are resident, in its four slots.

    The two residents whose slots the first loads need come first, so that the link has work while the others are computed. Then what
    is loaded comes as soon as it is there: alone, or with those behind it that are there too.
    """
    for late in (True, False):
        link = Link()
        provider = make_provider(link, 8, "lru")
        for layer in range(2):
            assert list(brought(provider, link, layer, [0, 1, 2, 3]))
        link.log.clear()
        for _ in brought(provider, link, 1, [0, 1, 2, 3, 4, 5, 6, 7]):
            if not late:
                link.settle()  # what is under way arrives while a group is computed
        assert link.log[:5] == ["group [11]", "start 12", "group [10]", "start 13", "group [8, 9]"]
        arrived = (
            ["group [12]", "start 14", "group [13]", "start 15"] if late else ["group [12, 13]", "start 14", "start 15"]
        )
        assert link.log[5:] == [*arrived, "group [14]", "group [15]"]


def test_residents_do_not_wait_for_every_copy_to_start() -> None:
    """With slots for all, the link gets two copies to do, then the residents are computed while the host starts the others."""
    link = Link()
    provider = make_provider(link, 16, "lru-global")
    assert list(brought(provider, link, 0, [0, 1, 2, 3]))
    link.log.clear()
    assert list(brought(provider, link, 0, [0, 1, 2, 3, 4, 5, 6, 7]))
    assert link.log[:5] == ["start 4", "start 5", "group [0, 1, 2, 3]", "start 6", "start 7"]
    assert link.log[5:] == ["group [4]", "group [5]", "group [6]", "group [7]"]


def test_what_was_loaded_ahead_in_vain_is_waited_for_when_it_is_used() -> None:
    """A pass loads all experts of layer 1 ahead and uses one. The next pass uses another, whose copy is still under way."""
    link = Link()
    provider = make_provider(link, 16, "next-use", wide=8)
    provider.begin_step(prompts=8)
    assert list(brought(provider, link, 0, list(range(8))))
    (first,) = brought(provider, link, 1, [0])
    late = provider.controller.table.slot_of[1, 7]
    assert late in link.under_way
    with provider.lend_residents(1) as early:
        assert early == {first[0].expert: first[0].slot}
    provider.begin_step()
    ((access,),) = brought(provider, link, 1, [7])
    assert (access.slot, access.load, access.fresh) == (late, False, False)


@pytest.mark.parametrize(("strategy", "needed", "lent"), [("lru", 3, 0), ("lru", 8, 8), ("lru-global", 3, 3)])
def test_nothing_is_lent_that_copies_would_wait_for(strategy: str, needed: int, lent: int) -> None:
    """With a share of the slots for each layer a missing expert takes the slot of one that would be lent."""
    link = Link()
    provider = make_provider(link, 16, strategy)
    assert list(brought(provider, link, 1, list(range(needed))))
    with provider.lend_residents(1) as early:
        assert len(early) == lent


def test_a_pass_of_padding_alone_gives_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """No expert is needed, so nothing is added up, whatever memory the result lies in."""
    mlp, buffer = make("gated", "bfloat16")
    pool = SimpleNamespace(buffer=buffer, of=lambda _: (buffer, 0))
    context = SimpleNamespace(now=SimpleNamespace(padding=torch.ones(3, dtype=torch.bool, device=DEVICE), observe=None))
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    hidden, weights = torch.randn(3, HIDDEN).to(DEVICE, mlp.torch_dtype), torch.ones(3, TOP_K, device=DEVICE)
    experts = PromptExperts((mlp, mlp), make_provider(Link(), EXPERTS, "lru"), pool, context)
    assert not experts.run(0, hidden, routing(3), weights).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe", "switch_transformers"])
def test_observers_see_the_prompts_routing(
    model_type: str, device: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A trace of graph execution holds the routes of host execution, and padding loads nothing."""
    folder, counted = make_checkpoint(model_type), []
    for execution in ("host", "graph"):
        options = {"device": device, "execution": execution, "max_length": 32, "max_batch": 4, "slots": 5}
        with LLM(folder, **options) as llm, llm.record(tmp_path / execution):
            llm.generate(PROMPTS, SamplingParams(max_tokens=3, ignore_eos=True))
            counted.append(llm.stats.cache)
    assert counted[0] == counted[1]
    rows = [load_trace(tmp_path / execution).rows for execution in ("host", "graph")]
    assert (rows[1].sequence >= 0).all() == (
        model_type != "switch_transformers"
    )  # a decoder's pass of kernels has no padding
    known = [each.take(each.sequence >= 0) for each in rows]
    assert np.array_equal(known[0].experts, known[1].experts)
    assert np.array_equal(known[0].tokens, known[1].tokens)


def test_kernels_and_reference_give_a_prompt_the_same_logits(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to rounding: a pass of unequal prompts through Triton's kernels, in the interpreter where there is no GPU."""
    experts = pytest.importorskip("expertflow.kernels.experts", reason="kernels need triton")
    grouped = pytest.importorskip("expertflow.kernels.prompts.grouped")
    found = []
    for kernels in (grouped.GroupedMlp, lambda mlp, _: partial(reference.group_pairs, mlp)):
        chosen = replace(backend(DEVICE), grouped=kernels, combine=experts.combine)
        monkeypatch.setattr("expertflow.execution.grouped.backend", lambda _, chosen=chosen: chosen)
        options = {"device": DEVICE.type, "execution": "graph", "max_length": 32, "max_batch": 4, "slots": 9}
        with LLM(make_checkpoint("gpt_oss"), **options) as llm:
            pieces = [PromptChunk(n, prompt, n, 0) for n, prompt in enumerate(PROMPTS[1:])]
            found.append(llm._engine._executor.prefill(pieces).clone())
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_kernels_read_prompts_in_graph_execution_alone(
    execution: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host execution keeps the family's own arithmetic; in graph execution no prompt goes through it."""
    used: list[int] = []
    own = reference.group_pairs

    def counted(*args: Any) -> None:
        edges = args[2].edges.tolist()
        used.extend(edges[expert + 1] - edges[expert] for expert, _ in args[3])
        own(*args)

    monkeypatch.setattr(reference, "group_pairs", counted)
    with LLM(make_checkpoint("mixtral"), device="cpu", execution=execution, max_length=32, max_batch=4) as llm:
        executor = llm._engine._executor
        pieces: Sequence[PromptChunk] = [PromptChunk(n, prompt, n, 0) for n, prompt in enumerate(PROMPTS)]
        for _ in range(2):  # without residents, and with some
            executor.prefill(pieces)
        shape = llm.plan.shape
    pairs = 2 * sum(map(len, PROMPTS)) * shape.top_k * shape.layers
    assert sum(used) == (pairs if execution == "graph" else 0)
