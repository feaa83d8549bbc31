"""Layers with larger records than the others: they are always resident, and every load moves its own layer's bytes."""

from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.cache.controller import CacheController
from expertflow.cache.policy import Usage
from expertflow.cache.strategy import STRATEGIES
from expertflow.engine.prepare import prepare
from expertflow.errors import BudgetError
from expertflow.events import Event, EventKind, EventStream
from expertflow.kernels.residency.state import CacheState, Schedule, refusal
from expertflow.sim.clock import Cost
from expertflow.sim.replay import replay, replay_events
from expertflow.sim.workload import live_sequences
from helpers import MakeCheckpoint, make_trace
from layout import Layout, write_twins
from layouts_int4 import compressed, pack_compressed

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
PARAMS = SamplingParams(max_tokens=5, temperature=0.8, seed=5, ignore_eos=True)
EXPERTS, TOP_K, LARGE = 8, 2, 1
SLOTS = (1, TOP_K, EXPERTS // 2, EXPERTS)
STRATEGIES_HERE = ("next-use", "on-demand", "lru", "ring", "lfu")


@pytest.fixture(scope="module")
def twins(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of three layers in int4 but for the middle one in bfloat16, and the same decoded."""

    def pack(key: str, weight: torch.Tensor, generator: torch.Generator):  # noqa: ANN202 - a layout's `pack`
        return pack_compressed(key, weight, generator, group=32)

    layout = Layout(
        family="qwen3_moe", quantization=compressed(32), pack=pack, plain_layers=(LARGE,), sizes={"moe_intermediate_size": 64}
    )
    source = make_checkpoint(layout.family, layout.dtype, spread=0.3, num_hidden_layers=3, **layout.sizes)
    return write_twins(source, tmp_path_factory.mktemp("large"), layout)


@pytest.fixture(scope="module")
def resident(twins: tuple[Path, Path]):  # noqa: ANN201
    """Tokens of the decoded checkpoint with every expert resident, by execution."""

    @cache
    def run(execution: str) -> list[list[int]]:
        with LLM(twins[1], slots="100%", execution=execution, **options()) as llm:
            return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]

    return run


def options() -> dict:
    return {"device": "cpu", "max_length": 32, "max_batch": 3}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("turn", range(len(SLOTS)))
def test_offloaded_is_resident(turn: int, watched: bool, twins: tuple[Path, Path], resident) -> None:  # noqa: ANN001
    """Law 1, with steps that the GPU's twin decides and with watched ones; law 4 for each layer; law 3; the large layer is never loaded."""
    events: list[Event] = []
    strategy = STRATEGIES_HERE[(turn + 2 * watched) % len(STRATEGIES_HERE)]
    with LLM(twins[0], slots=SLOTS[turn], execution="graph", strategy=strategy, **options()) as llm:
        if not watched:
            llm._offloaded.events.subscribe(events.append)
            found = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
            assert found == resident("graph")
        else:
            with llm.record(twins[0] / f"{turn}.trace"):
                found = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        plan, cache_ = llm.plan, llm.stats.cache
        llm._offloaded.settle()
        llm._offloaded.controller.table.check_integrity()
        assert plan.slot_layout.large == (LARGE,)
        assert llm.stats.peak_bytes <= plan.total
    small, large, _ = plan.shape.records.layer_bytes
    assert plan.host == EXPERTS * (2 * small + large)
    assert large > 3 * small
    loaded = Counter(event.layer for event in events if event.kind in {EventKind.MISS, EventKind.PREFETCH})
    assert watched or (loaded[LARGE] == 0 < loaded[0])
    assert cache_.bytes_moved == (cache_.loads + cache_.prefetched) * small > 0
