"""Law 8: statistics are true while the engine runs, and reading them changes nothing."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.errors import ClosedError
from expertflow.events import CacheCounters, Event
from helpers import DEVICES, MakeCheckpoint

PROMPT, TOKENS = [5, 6, 7, 8, 9, 10, 11], 7


def open_llm(folder: Path, execution: str, device: str = "cpu", **options: object) -> LLM:
    return LLM(folder, **{"device": device, "execution": execution, "max_length": 32, "slots": 9, **options})


def up_to(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["lru", "ring"])
@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("model_type", ["mixtral", "switch_transformers"])
def test_totals_after_a_token_are_those_of_a_run_that_ends_there(
    model_type: str, execution: str, strategy: str, device: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Totals and residency behind token n, read in the middle of a run, are what a run of n tokens leaves; of n + 1, if its step has begun."""
    folder, read = make_checkpoint(model_type, spread=0.3), []
    with open_llm(folder, execution, device, strategy=strategy) as llm:
        stream = llm.stream([PROMPT], up_to(TOKENS))
        for item in stream:
            begun = llm.engine.ahead.begun is not None
            read.append((item.token_id, llm.stats.cache, llm._offloaded.residency(), begun))
        decoder = llm._offloaded.handover.decoder
        assert (decoder is not None) == (execution == "graph")
    assert read[-1][1].accesses > read[1][1].accesses
    assert any(begun for *_, begun in read) == (execution == "graph")
    for place, (token, totals, slots, begun) in enumerate(read):
        count = place + 1 + begun
        with open_llm(folder, execution, device, strategy=strategy) as llm:
            output = llm.generate([PROMPT], up_to(count))[0]
            assert output.token_ids[place] == token
            assert llm.stats.cache == llm._offloaded.counters == totals
            assert totals.steps == count + (model_type == "switch_transformers")  # its encoder is a step of its own
            assert np.array_equal(llm._offloaded.controller.table.slot_of, slots)


def test_a_reader_captures_nothing_and_a_subscriber_does(make_checkpoint: MakeCheckpoint) -> None:
    """Readers leave the captured steps alone and the events silent; single events need other captured steps."""
    folder = make_checkpoint("mixtral")
    with open_llm(folder, "graph") as llm:
        stream, offloaded = llm.stream([PROMPT], up_to(TOKENS)), llm._offloaded
        next(stream)
        next(stream)
        decoder, counted = offloaded.handover.decoder, int(offloaded.counters.loads)
        for _ in range(3):
            assert offloaded.totals() == offloaded.totals() == llm.stats.cache
            assert np.array_equal(offloaded.residency(), offloaded.residency())
            assert offloaded.counters.loads == counted, "the steps' totals are on the device still"
            next(stream)
            assert offloaded.handover.decoder is decoder
        happened: list[Event] = []
        offloaded.events.subscribe(happened.append)
        next(stream)
        assert offloaded.handover.decoder is not decoder
        before, counted = offloaded.totals(), len(happened)
        next(stream)
        again = CacheCounters()
        for event in happened[counted:]:
            again.count(event)
        before.add(again)
        assert before == offloaded.totals()


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_readers_in_other_threads_change_nothing(execution: str, make_checkpoint: MakeCheckpoint) -> None:
    """While a thread reads on and on, tokens, totals and residency are those of a run that is not read; totals only grow."""
    folder, answers = make_checkpoint("qwen3_moe"), []
    prompts = [PROMPT, [10, 11], [12, 13, 14]]
    for watched in (False, True):
        # requests are admitted at once, whatever the clock says
        with open_llm(folder, execution, max_batch=3, admission="at once") as llm:
            read: list[CacheCounters] = []
            with _reading(llm, read) if watched else memoryview(b""):
                tokens = [output.token_ids for output in llm.generate(prompts, up_to(20))]
            answers.append((tokens, llm.stats.cache, llm._offloaded.residency().tolist()))
            assert len(read) > 10 or not watched
            for earlier, later in pairwise(read):
                assert all(a <= b for a, b in zip(astuple(earlier), astuple(later), strict=True))
    assert answers[0] == answers[1]


@contextmanager
def _reading(llm: LLM, read: list[CacheCounters]) -> Iterator[None]:
    over = threading.Event()

    def go() -> None:
        while not over.wait(0.001):
            read.append(llm.stats.cache)
            assert llm._offloaded.residency().max() < 9

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_a_broken_step_loses_no_totals(
    execution: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of a step leaves what was counted before it, and the next request is counted on top."""
    with open_llm(make_checkpoint("mixtral"), execution) as llm:
        stream = llm.stream([PROMPT], up_to(TOKENS))
        for _ in range(3):
            next(stream)
        before, mlp = llm.stats.cache, llm._offloaded.model.model.layers[-1].mlp

        def fail(*_: object) -> torch.Tensor:
            raise RuntimeError("cosmic ray")

        monkeypatch.setattr(mlp.experts, "forward", fail)
        if execution == "graph":  # layers of building blocks call no module
            monkeypatch.setattr(llm._offloaded.handover.decoder.experts._twin, "run_layer", fail)
        with pytest.raises(RuntimeError, match="cosmic"):
            next(stream)
        broken = llm.stats.cache
        assert all(a <= b for a, b in zip(astuple(before), astuple(broken), strict=True))
        monkeypatch.undo()
        stream.close()
        assert llm.stats.cache == broken
        llm.generate([PROMPT], up_to(3))
        after = llm.stats.cache
        assert after.steps == broken.steps + 3
        assert after.accesses > broken.accesses


def test_totals_of_a_closed_model_are_complete(make_checkpoint: MakeCheckpoint) -> None:
    """What the GPU counted is not lost if a model is closed in the middle of a run."""
    with open_llm(make_checkpoint("mixtral"), "graph") as llm:
        stream = llm.stream([PROMPT], up_to(TOKENS))
        for _ in range(4):
            next(stream)
        before = llm.stats.cache
        llm.close()
        after = llm.stats.cache
    assert (after.steps, after.hits, after.loads) == (before.steps, before.hits, before.loads)


@pytest.mark.parametrize(
    ("model_type", "execution"),
    [
        ("mixtral", "host"),
        ("mixtral", "graph"),
        ("switch_transformers", "host"),
        ("switch_transformers", "graph"),
        ("flex_olmo", "host"),
    ],
)
def test_a_dropped_model_frees_its_memory_at_once(
    model_type: str, execution: str, make_checkpoint: MakeCheckpoint
) -> None:
    """`del llm` without `close`: expert store and weights go without the garbage collector."""
    if model_type == "flex_olmo":
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "vocab_size": 96, "num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 32, "pad_token_id": 0}  # fmt: skip
        folder = make_checkpoint("flex_olmo", "float32", **sizes)
    else:
        folder = make_checkpoint(model_type)
    gc.collect()
    gc.disable()
    try:
        llm = open_llm(folder, execution)
        llm.generate([PROMPT, [10, 11]], up_to(5))
        next(llm.stream([PROMPT], up_to(5)))
        offloaded = llm._offloaded
        parts = {
            "store": weakref.ref(offloaded.store),
            "records": weakref.ref(offloaded.store.buffer.untyped_storage()),
            "model": weakref.ref(offloaded.model),
            "slots": weakref.ref(offloaded.handover.provider._pool.buffer.untyped_storage()),
        }
        del offloaded
        del llm
        assert {name for name, part in parts.items() if part() is not None} == set()
    finally:
        gc.enable()


def test_a_dropped_transformers_model_frees_its_memory_at_once(make_checkpoint: MakeCheckpoint) -> None:
    """`del model` of `from_pretrained` does as `del llm`; what is left of it closes without an error."""
    gc.collect()
    gc.disable()
    try:
        model = from_pretrained(make_checkpoint("mixtral"), slots=5, device="cpu")
        with torch.inference_mode():
            model(torch.tensor([PROMPT]))
        handle = model.expertflow
        parts = [weakref.ref(model), weakref.ref(handle.store), weakref.ref(handle.store.buffer.untyped_storage())]
        del model
        assert parts[0]() is None
        with pytest.raises(ClosedError, match="deleted"):
            handle.model  # noqa: B018 - reading it is what is tested
        handle.close()
        del handle
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_every_prefetch_of_a_closed_model_ends_used_or_wasted(execution: str, make_checkpoint: MakeCheckpoint) -> None:
    """Law 4, for a model that is closed in the middle of a run, whichever side had the tables."""
    llm = open_llm(make_checkpoint("mixtral"), execution, strategy="ring", slots=7)
    llm.engine.add(llm.request(PROMPT, up_to(TOKENS)))
    for _ in range(4):
        llm.engine.step()
    llm.close()
    totals = llm.stats.cache
    assert totals.prefetched > 0
    assert totals.prefetched == totals.prefetch_hits + totals.wasted
    llm.close()
    assert llm.stats.cache == totals


def test_nothing_is_resident_after_a_broken_step(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the slots hold is unknown then, and a reader learns that before the next step empties them."""
    with open_llm(make_checkpoint("mixtral"), "graph") as llm:
        stream = llm.stream([PROMPT], up_to(TOKENS))
        next(stream)
        next(stream)
        assert llm._offloaded.residency().max() >= 0

        def fail(*_: object) -> None:
            raise RuntimeError("cosmic ray")

        monkeypatch.setattr(llm._offloaded.handover.decoder, "launch", fail)
        with pytest.raises(RuntimeError, match="cosmic"):
            next(stream)
        assert llm._offloaded.residency().max() == -1


def test_a_channel_sees_its_own_token_counted(make_checkpoint: MakeCheckpoint) -> None:
    """While token n is handed out the totals have it, and a channel that raises takes none from the others."""
    seen = []
    with open_llm(make_checkpoint("mixtral"), "host", max_batch=2) as llm:

        def count(_: object) -> None:
            seen.append(llm.engine.totals.tokens)

        def fail(_: object) -> None:
            count(_)
            raise ValueError("full")

        llm.engine.add(llm.request(PROMPT, up_to(3)), fail)
        llm.engine.add(llm.request(PROMPT, up_to(3)), count)
        with pytest.raises(ValueError, match="full"):
            llm.engine.step()
        while llm.engine.unfinished:
            llm.engine.step()
    assert seen == [1, 2, 3, 4]
