"""Passes over so many tokens that every expert is needed: each layer is loaded while the one before runs."""

import pytest

from expertflow import LLM, SamplingParams
from expertflow.cache.controller import CacheController
from expertflow.cache.strategy import STRATEGIES
from expertflow.events import Event, EventKind, EventStream
from helpers import MakeCheckpoint, MakePredictor

LONG = [list(range(5, 90))]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.mark.parametrize("strategy", [name for name, entry in STRATEGIES.items() if entry.reads_ahead])
def test_a_wide_pass_loads_ahead(strategy: str, make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor) -> None:
    """Only the first layer's experts are waited for; no more is loaded than is missing; answers stay."""
    folder, found = make_checkpoint("qwen3_moe", "float32", num_hidden_layers=6), {}
    predictor = str(make_predictor(folder)) if STRATEGIES[strategy].predicted else "none"
    for slots in ("50%", "100%"):
        options = {
            "strategy": strategy,
            "execution": "graph",
            "predictor": predictor,
            "prefill_chunk": 128,
            "max_length": 128,
        }
        with LLM(folder, device="cpu", slots=slots, **options) as llm:
            seen: list[Event] = []
            llm.generate(LONG, PARAMS)  # the cache is warm
            llm.events.subscribe(seen.append)
            found[slots] = llm.generate(LONG, PARAMS)[0].token_ids
            experts, layers = llm.plan.shape.experts, llm.plan.shape.layers
        first = next(event.step for event in seen if event.kind is EventKind.STEP)
        mine = [event for event in seen if event.step == first]
        missed = {event.layer for event in mine if event.kind is EventKind.MISS}
        ahead = [event for event in mine if event.kind is EventKind.PREFETCH]
        used = sum(event.kind in {EventKind.HIT, EventKind.MISS} for event in mine)
        if slots == "50%":
            assert missed <= {0}
            assert len(ahead) > 0
            assert len(ahead) <= layers * experts - experts // 2
            assert used >= layers * experts * 0.8, "the pass is not wide, and tests nothing"
        else:
            assert not missed
    assert found["50%"] == found["100%"]


@pytest.mark.parametrize("strategy", [name for name, entry in STRATEGIES.items() if entry.reads_ahead])
@pytest.mark.parametrize("slots", [24, 30, 36])
def test_prompts_behind_one_another_leave_each_layer_its_share(strategy: str, slots: int) -> None:
    """From an empty cache, too: else early layers would keep all of their experts, and nothing would be loaded while they run.

    Two layers do not have theirs: the last one, whose experts are the newest, and the one that made room for them.
    """
    layers, experts = 6, 8
    controller = CacheController(
        layers=layers, experts=experts, slots=slots, strategy=STRATEGIES[strategy].double_buffered(), record_bytes=1,
        events=EventStream(), wide=experts,
    )  # fmt: skip
    for _ in range(5):
        controller.begin_step(prompts=experts)
        loads = len(controller.take_loads())
        for layer in range(layers):
            loads += sum(access.load for access in controller.access(layer, range(experts)))
            loads += len(controller.take_loads())
    held = (controller.table.slot_of >= 0).sum(1).tolist()
    assert held[-1] == experts
    assert sorted(held)[1:-1] == [slots // layers] * (layers - 2)
    assert loads <= layers * experts - slots + experts


def test_a_narrow_pass_loads_what_it_needs(make_checkpoint: MakeCheckpoint) -> None:
    """A few tokens need a few experts: nothing is loaded ahead by a strategy without prefetch."""
    with LLM(
        make_checkpoint("qwen3_moe", "float32"),
        device="cpu",
        slots="50%",
        strategy="next-use",
        execution="graph",
        max_length=64,
    ) as llm:
        llm.generate([[5, 6, 7]], PARAMS)
        assert llm.stats.cache.prefetched == 0
        assert llm.stats.cache.loads > 0


def test_a_baseline_does_not_read_ahead(make_checkpoint: MakeCheckpoint) -> None:
    """Rivals' strategies stay what they are."""
    with LLM(
        make_checkpoint("qwen3_moe", "float32"),
        device="cpu",
        slots="50%",
        strategy="lru",
        execution="graph",
        prefill_chunk=128,
        max_length=128,
    ) as llm:
        llm.generate(LONG, PARAMS)
        assert llm.stats.cache.prefetched == 0
