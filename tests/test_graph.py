"""Decode steps as graphs: exact whatever is resident, inside the plan, handed over and given back without loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.cache.forecast import CountsByToken, NextGate, Recorded
from expertflow.cache.strategy import STRATEGIES
from expertflow.config import EngineConfig
from expertflow.engine.plan import make_plan
from expertflow.engine.prepare import prepare
from expertflow.errors import BudgetError, ConfigError, DeviceError
from expertflow.events import CacheCounters, Event, EventKind
from expertflow.execution.kv_rows import DecodeInput, step_masks
from expertflow.execution.runner import PromptChunk
from expertflow.kernels.residency.state import refusal
from expertflow.models.attention import layer_kinds
from expertflow.models.families import FAMILIES
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import build_skeleton
from expertflow.schedule.admission import AtOnce
from expertflow.sim.workload import as_recorded
from expertflow.trace.format import load_trace
from expertflow.units import format_bytes
from helpers import DEVICES, MakeCheckpoint

GRAPHS = [name for name, family in FAMILIES.items() if not family.no_graph]
ON_DEVICE = [name for name, entry in STRATEGIES.items() if refusal(entry) is None and not entry.needs_future]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [10, 11], [12, 13, 14]]


def open_llm(folder: Path, device: str = "cpu", **options: object) -> LLM:
    return LLM(folder, **{"device": device, "execution": "graph", "max_length": 32, "max_batch": 4, **options})


def logits_of(llm: LLM, steps: int = 4, order: tuple[int, ...] = (2, 0, 3)) -> list[torch.Tensor]:
    """Logits of sequences in rows `order`, of which the middle one leaves after two steps, the same tokens fed in every time."""
    executor = llm._engine._executor
    lengths = [1 if llm.plan.shape.encoder_decoder else len(prompt) for prompt in PROMPTS]
    pieces = [PromptChunk(n, prompt, order[n], 0) for n, prompt in enumerate(PROMPTS)]
    found = [executor.prefill(pieces).clone()]
    tokens = [[7, 8, 9], [20, 30, 40], [50, 60], [71, 72], [73, 74], [75, 76]]
    for step in range(steps):
        live = [0, 1, 2] if step < 2 else [0, 2]
        fed = [DecodeInput(n, token, order[n], lengths[n] + step) for n, token in zip(live, tokens[step], strict=True)]
        found.append(executor.decode(fed).clone())
    llm._offloaded.settle()
    llm._offloaded.controller.table.check_integrity()
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", GRAPHS)
def test_logits_do_not_depend_on_what_is_resident(
    model_type: str, dtype: str, device: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Law 1: with any slots and strategy the logits are the bits of the run with every expert resident.

    Each dtype takes half of the numbers of slots, because a graph takes its time to capture, and Triton's interpreter its own.
    """
    folder = make_checkpoint(model_type, dtype)
    with open_llm(folder, device, slots=1000) as llm:
        resident = logits_of(llm)
        logits_of(llm)
        experts, top_k, decoder = llm.plan.shape.experts, llm.plan.shape.top_k, llm._offloaded.handover.decoder
        everything = llm.plan.shape.total_experts
        assert decoder is not None
    place = GRAPHS.index(model_type)
    counts = (1, top_k, experts // 2, experts, everything - 1, everything)
    half = range(dtype == "bfloat16", len(counts), 2) if device == "cpu" else (1, 4)
    for turn, slots in ((turn, counts[turn]) for turn in half):
        strategy = ON_DEVICE[(place + turn) % len(ON_DEVICE)]
        with open_llm(folder, device, slots=slots, strategy=strategy) as llm:
            for _ in range(2):  # cold, and with what the first batch left
                for step, (mine, theirs) in enumerate(zip(logits_of(llm), resident, strict=True)):
                    assert torch.equal(mine, theirs), (slots, strategy, step)


@pytest.mark.parametrize("device", DEVICES)
def test_all_resident_needs_no_decisions(device: str, make_checkpoint: MakeCheckpoint) -> None:
    """Once every expert is resident slots are looked up, and the logits are still those of a run that decides."""
    folder = make_checkpoint("qwen3_moe", "bfloat16")
    with open_llm(folder, device, slots=1000) as llm:
        deciding = logits_of(llm)
        provider = llm._offloaded.handover.provider
        for layer in range(llm.plan.shape.layers):
            for _ in provider.stream(layer, list(range(llm.plan.shape.experts))):
                pass
        fixed = logits_of(llm)
        assert llm._offloaded.handover.decoder.experts.fixed
    assert all(torch.equal(a, b) for a, b in zip(deciding, fixed, strict=True))


@pytest.mark.parametrize("model_type", GRAPHS)
def test_graph_tokens_are_the_hosts(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """In float32 greedy tokens are those of the host execution, sequences of unequal length to the last column."""
    folder = make_checkpoint(model_type)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (21, 4, 29)]
    answers = []
    for execution in ("host", "graph"):
        with open_llm(folder, slots=7, execution=execution, prefill_chunk=12) as llm:  # prompts in several passes
            answers.append([output.token_ids for output in llm.generate(PROMPTS, params)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", GRAPHS)
def test_dense_kernels_compute_what_the_modules_do(
    model_type: str, device: str, make_checkpoint: MakeCheckpoint
) -> None:
    """With attention, norms and layers by kernels the logits are the modules' up to rounding, windows and sinks included."""
    drawn = (
        0.1 if model_type.startswith("ernie") else 0
    )  # else its routers are zeros, and any experts are as good as others
    folder, found = make_checkpoint(model_type, spread=drawn), []
    attended = 0

    def counted(kernel: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def attend(*given: object, **more: object) -> torch.Tensor:
            nonlocal attended
            attended += 1
            return kernel(*given, **more)

        return attend

    for dense in (False, True):
        with open_llm(folder, device, slots=1000) as llm:
            decoder = llm._offloaded.handover.next_decoder()
            assert llm._offloaded.handover.decoder is decoder
            kinds, parts = layer_kinds(llm._offloaded.model.config), decoder._dense
            each = 1 + llm.plan.shape.encoder_decoder
            assert len(parts._attentions) == each * len(kinds)
            assert len(parts._norms) > len(kinds)
            for one in (parts, decoder._blocks):
                kernels = one._kernels
                names = ("attend", "attend_latents", "decode_attention", "latent_attention")
                one._kernels = replace(kernels, **{name: counted(getattr(kernels, name)) for name in names})
            if not dense:
                decoder._dense = decoder._blocks = None
            found.append(logits_of(llm))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert attended >= 2 * each * len(kinds)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", GRAPHS)
def test_peak_is_within_the_plan(model_type: str, device: str, make_checkpoint: MakeCheckpoint) -> None:
    """Law 3: graphs, static rows and tables are planned; a run to the plan's limits stays within the budget."""
    folder = make_checkpoint(model_type, "bfloat16")
    options = {"max_length": 48, "max_batch": 3, "prefill_chunk": 60, "execution": "graph", "device": device}
    least = prepare(folder, EngineConfig(**options, slots=3)).plan.total
    generator = torch.Generator().manual_seed(0)
    with LLM(folder, gpu_memory=least, slots=3, **options) as llm:
        prompts = [torch.randint(3, 90, (40,), generator=generator).tolist() for _ in range(3)]
        for temperature in (0.0, 1.0):
            llm.generate(prompts, SamplingParams(max_tokens=48, temperature=temperature, ignore_eos=True))
        assert llm.stats.peak_bytes <= least
        assert llm.stats.peak_bytes >= 0.2 * least or device == "cuda"
        assert (llm._offloaded.handover.decoder.pool_bytes > 0) == (device == "cuda")


def test_totals_are_the_events(make_checkpoint: MakeCheckpoint) -> None:
    """Counters fed with totals say the same as counters fed with every event."""
    folder = make_checkpoint("mixtral")
    counted = []
    for listen in (False, True):
        with open_llm(folder, slots=9) as llm:
            happened: list[Event] = []
            if listen:
                llm._offloaded.events.subscribe(happened.append)
            llm.generate(PROMPTS, SamplingParams(max_tokens=6, ignore_eos=True))
            counted.append(llm.stats.cache)
            again = CacheCounters()
            for event in happened:
                again.count(event)
            assert not listen or again == counted[0] == counted[1]
            assert not listen or [e.step for e in happened if e.kind is EventKind.STEP] == list(range(counted[0].steps))


def test_a_broken_step_is_not_trusted(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle of a step empties the slots; the next request is exact again."""
    folder = make_checkpoint("mixtral")
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with open_llm(folder, slots=9) as llm:
        expected = llm.generate(PROMPTS, params)
        experts = llm._offloaded.handover.decoder.experts
        run, calls = experts.run, iter(range(100))

        def fail(*args: object) -> torch.Tensor:
            if next(calls) == 7:
                raise RuntimeError("cosmic ray")
            return run(*args)

        monkeypatch.setattr(experts, "run", fail)
        with pytest.raises(RuntimeError, match="cosmic"):
            llm.generate(PROMPTS, params)
        assert llm._offloaded.controller.table.resident == 0
        monkeypatch.undo()
        assert llm.generate(PROMPTS, params) == expected

        def starve(*_: object) -> None:
            raise torch.OutOfMemoryError("tried to allocate")

        monkeypatch.setattr(llm._offloaded.handover.decoder, "_step", starve)
        with pytest.raises(DeviceError, match=r"ran out of memory.*leaves more"):
            llm.generate(PROMPTS, params)
        monkeypatch.undo()
        assert llm.generate(PROMPTS, params) == expected
        stream = llm.stream(PROMPTS, params)
        for _ in range(8):
            next(stream)
        stream.close()  # cancelled between two steps: what is resident stays
        assert llm._offloaded.controller.table.resident == 9
        assert llm.generate(PROMPTS, params) == expected


def test_rows_are_only_names(make_checkpoint: MakeCheckpoint) -> None:
    """Where a sequence's keys and values lie changes no bit, whatever lay there before."""
    folder = make_checkpoint("gpt_oss")
    with open_llm(folder, slots=9) as llm:
        first = logits_of(llm)
        for order in ((0, 1, 2), (3, 2, 1), (1, 3, 0)):
            assert all(torch.equal(a, b) for a, b in zip(logits_of(llm, order=order), first, strict=True))


def test_streams_side_by_side_do_not_disturb_one_another(make_checkpoint: MakeCheckpoint) -> None:
    """Two calls' requests step together, each gets its own tokens, and all of them in graphs."""
    folder, params = make_checkpoint("mixtral"), SamplingParams(max_tokens=7, ignore_eos=True)
    with open_llm(folder, slots=9) as llm:
        alone = [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS[:2]]
        happened: list[Event] = []
        llm._offloaded.events.subscribe(happened.append)
        llm.engine._scheduler.admission = AtOnce()  # the second is let in at once, however fast this machine is
        streams = [llm.stream(prompt, params) for prompt in PROMPTS[:2]]
        both: list[list[int]] = [[], []]
        for _ in range(7):
            for stream, tokens in zip(streams, both, strict=True):
                tokens.append(next(stream).token_id)
        assert [tuple(tokens) for tokens in both] == alone
        assert not [event for event in happened if event.kind is EventKind.HOST]
        assert sum(event.kind is EventKind.STEP for event in happened) < 14


@pytest.mark.parametrize("device", DEVICES)
def test_a_callers_forecast_reaches_captured_steps(
    device: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """A gate that is always right, one that falls silent, one that is wrong about everything: the same tokens, ever more misses."""
    folder, params = make_checkpoint("mixtral"), SamplingParams(max_tokens=9, ignore_eos=True)
    with open_llm(folder, device, slots="100%", execution="host") as llm, llm.record(tmp_path / "t.trace"):
        llm.generate(PROMPTS, params)
    with open_llm(folder, device, slots="100%") as llm:
        expected = llm.generate(PROMPTS, params)
    needed = as_recorded(load_trace(tmp_path / "t.trace")).needed
    missed = []
    for future in (needed, needed[:5], ~needed):
        with open_llm(folder, device, slots="75%", strategy="pregated", forecast=NextGate(future, recall=1.0)) as llm:
            assert llm.plan.execution == "graph"
            happened: list[Event] = []
            llm._offloaded.events.subscribe(happened.append)
            assert llm.generate(PROMPTS, params) == expected
            llm._offloaded.settle()
        decoding = [event for event in happened if event.step > 0]
        assert any(event.kind is EventKind.PREFETCH for event in decoding)
        missed.append(sum(event.kind is EventKind.MISS for event in decoding))
    assert 4 * missed[0] < missed[2]  # a few: half of the slots are kept free of loads ahead, and a layer may need more
    assert missed[0] < missed[1] < missed[2]


def test_what_cannot_be_a_graph_says_why(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A graph that was asked for and cannot be had is an error; one that was hoped for is an event with the reason."""
    with pytest.raises(ConfigError, match=r"plec.*no predictor.*execution='auto'"):
        open_llm(make_checkpoint("mixtral"), strategy="plec")
    with pytest.raises(ConfigError, match="513 sequences of 2 experts"):
        open_llm(make_checkpoint("mixtral"), max_batch=513)
    with pytest.raises(ConfigError, match="goes by the facts of steps"):
        open_llm(make_checkpoint("mixtral"), strategy="lru", forecast=CountsByToken(2, 8))
    with pytest.raises(ConfigError, match="every later use"):
        open_llm(
            make_checkpoint("mixtral"), strategy="oracle", forecast=Recorded(np.zeros((1, 2, 8), dtype=bool), None)
        )
    with pytest.raises(ConfigError, match="long-rope"):
        open_llm(make_checkpoint("phimoe"))
    with open_llm(make_checkpoint("mixtral"), execution="auto") as llm:
        assert llm.plan.execution == "host"
    with open_llm(make_checkpoint("mixtral")) as llm:
        happened: list[Event] = []
        llm._offloaded.events.subscribe(happened.append)
        with llm.record(tmp_path / "t.trace"):
            llm.generate([3, 4], SamplingParams(max_tokens=2, ignore_eos=True))
        assert [e.reason for e in happened if e.kind is EventKind.HOST] == [
            "the routing is observed, which only the host execution shows"
        ]


def test_a_step_sees_its_past_and_no_more() -> None:
    """A mask lets a token see the columns up to its own, at most a window of them, itself included."""
    full, window = step_masks(torch.tensor([[0, 4]]), 6, (None, 3), torch.float32)
    seen = [[(row == 0).nonzero().flatten().tolist() for row in mask[0, 0]] for mask in (full, window)]
    assert seen == [[[0], [0, 1, 2, 3, 4]], [[0], [2, 3, 4]]]


def test_a_budget_without_room_for_graphs_runs_on_the_host(make_checkpoint: MakeCheckpoint) -> None:
    """On CUDA a graph is hoped for; a budget that holds only the host execution gets that, and the plan says why."""
    shape = shape_of(build_skeleton(make_checkpoint("mixtral"), "auto"))
    wish = {"max_length": 32, "max_batch": 2, "kv_tokens": 128, "slots": 5}
    host = make_plan(EngineConfig(**wish, execution="host"), shape, "cuda", "lru")
    graph = make_plan(EngineConfig(**wish, execution="auto"), shape, "cuda", "lru")
    assert (host.execution, graph.execution, graph.graph_unavailable_reason) == ("host", "graph", "")
    assert graph.total - graph.graph - graph.workspace == host.total - host.workspace
    tight = make_plan(EngineConfig(**wish, gpu_memory=host.total, execution="auto"), shape, "cuda", "lru")
    assert (tight.execution, tight.total) == ("host", host.total)
    assert format_bytes(graph.total) in tight.graph_unavailable_reason
    with pytest.raises(BudgetError) as caught:
        make_plan(EngineConfig(**wish, gpu_memory=host.total, execution="graph"), shape, "cuda", "lru")
    assert caught.value.least_bytes == graph.total
    assert (
        make_plan(
            EngineConfig(**wish, execution="auto"), shape, "cuda", "lru", "it is Tuesday"
        ).graph_unavailable_reason
        == "it is Tuesday"
    )
    free = {"max_length": 32, "max_batch": 2, "kv_tokens": 128, "execution": "auto"}
    few = make_plan(EngineConfig(**free, gpu_memory=graph.fixed + 5 * graph.record_bytes), shape, "cuda", "lru")
    assert (few.execution, few.slots) == ("host", shape.total_experts)  # more than twice what graphs would leave
    assert "slots" in few.graph_unavailable_reason
    asking = make_plan(EngineConfig(**wish, execution="auto"), shape, "cuda", "plec", predictor=1 << 20)
    assert asking.total > graph.total + (1 << 20)
