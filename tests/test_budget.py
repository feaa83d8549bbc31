"""Law 3: measured peak device memory is at most what was planned, and what was planned is at most the budget."""

import pytest
import torch

from conftest import MakeCheckpoint
from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.engine.build import prepare
from expertflow.models.families import FAMILIES

LENGTH, BATCH, CHUNK = 48, 3, 60


def _fill_everything(llm: LLM) -> None:
    """Prompts and generations that use every planned token of every planned sequence, greedy and sampled."""
    vocabulary = llm.plan.shape.vocabulary
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.0, 1.0):
        prompt = LENGTH if llm.plan.shape.encoder_decoder else LENGTH - 8
        prompts = [torch.randint(3, vocabulary, (prompt,), generator=generator).tolist() for _ in range(BATCH)]
        params = SamplingParams(max_tokens=LENGTH, temperature=temperature, top_k=9, top_p=0.9, ignore_eos=True)
        llm.generate(prompts, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_measured_peak_is_within_the_plan(model_type: str, dtype: str, make_checkpoint: MakeCheckpoint) -> None:
    """Running the plan to its limits on the CPU stays within every planned byte, in all families."""
    folder = make_checkpoint(model_type, dtype)
    options = {"device": "cpu", "max_length": LENGTH, "max_batch": BATCH, "prefill_chunk": CHUNK}
    least = prepare(folder, EngineConfig(**options, slots=3)).plan.total
    with LLM(folder, gpu_memory=least, **options) as llm:
        assert llm.plan.slots == 3
        assert llm.plan.total <= least
        _fill_everything(llm)
        assert llm.stats.peak_bytes <= least
        # a bound that is far from the truth would waste slots: most of the plan has to be real
        assert llm.stats.peak_bytes >= 0.3 * least


@pytest.mark.parametrize("model_type", FAMILIES)
def test_dense_bytes_are_as_planned(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """The planned dense bytes are those of the loaded model, each tied tensor once."""
    with LLM(make_checkpoint(model_type, "bfloat16"), device="cpu", max_length=16) as llm:
        model = llm._offloaded.model
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*model.parameters(), *model.buffers())
        }
        assert sum(storages.values()) <= llm.plan.dense <= sum(storages.values()) * 1.01 + 256


@pytest.mark.cuda
@pytest.mark.parametrize("model_type", FAMILIES)
def test_cuda_peak_is_within_the_budget(model_type: str, make_checkpoint: MakeCheckpoint, cuda: torch.device) -> None:
    """`torch.cuda.max_memory_allocated` stays within the budget."""
    folder = make_checkpoint(model_type, "bfloat16")
    options = {"device": cuda.type, "max_length": LENGTH, "max_batch": BATCH, "prefill_chunk": CHUNK}
    least = prepare(folder, EngineConfig(**options, slots=3)).plan.total
    with LLM(folder, gpu_memory=least, **options) as llm:
        _fill_everything(llm)
        assert torch.cuda.max_memory_allocated() <= least


def test_a_larger_budget_buys_more_slots(make_checkpoint: MakeCheckpoint) -> None:
    """Slots grow with the budget, one row at a time, up to every expert."""
    folder = make_checkpoint("mixtral")
    options = {"device": "cpu", "max_length": 32, "max_batch": 1}
    one = prepare(folder, EngineConfig(**options, slots=1)).plan
    for more in (0, 1, 5, 23, 40):
        plan = prepare(folder, EngineConfig(**options, gpu_memory=one.total + more * one.row)).plan
        assert plan.slots == min(1 + more, 24)
        assert plan.total <= one.total + more * one.row
