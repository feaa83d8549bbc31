"""Recorded routing and tokens in place of the model's: what was recorded is used, in both executions, whatever the batches."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.errors import ConfigError
from expertflow.execution.replay import Replay
from expertflow.trace.format import load_trace
from helpers import MakeCheckpoint

PROMPTS = [[5, 9, 17, 30, 8], [40, 41, 42], [7, 7, 7, 7, 7, 7, 12]]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
OPTIONS = {"device": "cpu", "max_length": 24, "max_batch": 2, "max_live": 3, "strategy": "lru", "predictor": "none"}


def random_routes(llm: LLM, lengths: Sequence[int]) -> list[np.ndarray]:
    """Experts that no router chose: distinct ones for every position and layer."""
    shape, random = llm.plan.shape, np.random.default_rng(5)
    return [
        random.permuted(np.tile(np.arange(shape.experts), (n, shape.layers, 1)), axis=2)[:, :, : shape.top_k]
        for n in lengths
    ]


def recorded(llm: LLM, path: Path) -> list[np.ndarray]:
    """The routes of each prompt's sequence, position by position, as a trace of the run says."""
    with llm.record(path):
        llm.generate(PROMPTS, PARAMS)
    rows = load_trace(path).rows
    return [rows.experts[rows.sequence == number] for number in np.unique(rows.sequence[rows.sequence >= 0])]


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_what_was_recorded_is_used(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, family: str, execution: str
) -> None:
    """Every fed token uses its recording's experts, prompts padded or unpadded and in chunks, sequences in turns and in any KV row."""
    folder = make_checkpoint(family)
    with LLM(folder, slots=5, execution="host", prefill_chunk=4, **OPTIONS) as llm:
        routes = random_routes(llm, [24] * 3)
    with LLM(folder, slots=5, execution=execution, prefill_chunk=4, routing=Replay(routes), **OPTIONS) as llm:
        assert llm.engine._executor.unpadded == (execution == "graph")
        for number, found in enumerate(recorded(llm, tmp_path / "a.trace")):
            assert np.array_equal(np.sort(found), np.sort(routes[number][: len(found)]))  # a trace has them by weight
            assert len(found) == len(PROMPTS[number]) + PARAMS.max_tokens - 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_captured_steps_use_what_was_recorded(
    make_checkpoint: MakeCheckpoint, request: pytest.FixtureRequest, family: str, device: str
) -> None:
    """Graph execution needs what the recording says, and gives the tokens of all experts resident."""
    if device == "cuda":
        request.getfixturevalue("cuda")
    folder, tokens = make_checkpoint(family), []
    with LLM(folder, slots=5, execution="host", **{**OPTIONS, "device": device}) as llm:
        routes, experts = random_routes(llm, [24] * 3), llm.plan.shape.total_experts
    for slots in (5, experts):
        with LLM(
            folder, slots=slots, execution="graph", routing=Replay(routes), **{**OPTIONS, "device": device}
        ) as llm:
            tokens.append([output.token_ids for output in llm.generate(PROMPTS, PARAMS)])
            assert llm.plan.execution == "graph"
            assert llm.stats.peak_bytes <= llm.plan.total
    assert tokens[0] == tokens[1]
    alone = Replay(routes[:1])
    with LLM(folder, slots=5, execution="graph", routing=alone, **{**OPTIONS, "device": device}) as llm:
        llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1, ignore_eos=True))
        before = llm.stats.cache
        llm.generate(PROMPTS[:1], PARAMS)
        after = llm.stats.cache
    fed = routes[0][: len(PROMPTS[0]) + PARAMS.max_tokens - 1]
    prompt = sum(len(np.unique(fed[: len(PROMPTS[0]), layer])) for layer in range(fed.shape[1]))
    assert after.accesses - before.accesses == prompt + (PARAMS.max_tokens - 1) * fed.shape[1] * fed.shape[2]


def test_the_models_own_routing_replayed_changes_nothing(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A replay of what the router chose gives the router's tokens, in both executions, from a trace as from arrays."""
    folder, path = make_checkpoint("mixtral"), tmp_path / "own.trace"
    with LLM(folder, slots=5, execution="host", **OPTIONS) as llm:
        own = [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]
        routes = recorded(llm, path)
    for execution in ("host", "graph"):
        for replay in (Replay(routes), Replay(load_trace(path))):
            with LLM(folder, slots=5, execution=execution, routing=replay, **OPTIONS) as llm:
                assert [output.token_ids for output in llm.generate(PROMPTS, PARAMS)] == own


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_recorded_tokens_are_fed(make_checkpoint: MakeCheckpoint, execution: str) -> None:
    """Tokens alone are replayed where they are known; the logits are those of a prompt that ends there."""
    folder, seen = make_checkpoint("mixtral"), []
    sequence = [*PROMPTS[0], 11, 3, -1, 25, 19, 2]
    with LLM(folder, slots=9, execution=execution, routing=Replay(tokens=[sequence]), **OPTIONS) as llm:
        llm.engine.watch_logits(lambda _, logits: seen.append(logits.clone()))
        output = llm.generate(PROMPTS[:1], PARAMS)[0]
        llm.engine.watch_logits(None)
    assert output.token_ids[:2] == (11, 3)
    assert output.token_ids[2] == int(seen[2].argmax())
    assert output.token_ids[3:] == (25, 19, 2)
    fed = [*PROMPTS[0], *output.token_ids]
    with LLM(folder, slots=9, execution="host", **OPTIONS) as llm:
        for step, logits in enumerate(seen):
            prompt = torch.tensor([fed[: len(PROMPTS[0]) + step]])
            torch.testing.assert_close(llm.model(prompt).logits[:, -1], logits, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_replayed_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """Recordings of another shape, too short ones, requests without one, and models that do not lie in KV rows."""
    folder = make_checkpoint("mixtral")
    options = {"slots": 5, "execution": "host", **OPTIONS}
    with LLM(folder, **options) as llm:
        routes = random_routes(llm, [10])
    for wrong in (routes[0][:, :1], routes[0] + 100):
        with pytest.raises(ConfigError, match="recording 0"):
            LLM(folder, routing=Replay([wrong]), **options)
    with LLM(folder, routing=Replay(routes), **options) as llm:
        assert llm.generate(PROMPTS[0], PARAMS)[0].index == 0
        with pytest.raises(ConfigError, match="its recording has 10"):
            llm.generate(PROMPTS[0], SamplingParams(max_tokens=7, ignore_eos=True))
        with pytest.raises(ConfigError, match="request 1 has no recording"):
            llm.engine.add(llm.request(PROMPTS[0], PARAMS, index=1))
        assert llm.engine.unfinished == 0
    with pytest.raises(ConfigError, match="KV rows"):
        LLM(make_checkpoint("switch_transformers"), routing=Replay(tokens=[[1]]), **options)
    with pytest.raises(ConfigError, match="nothing to replay"):
        Replay()
