"""Law 3: measured peak device memory is at most what was planned, and what was planned is at most the budget."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.engine.prepare import prepare
from expertflow.errors import ClosedError, ConfigError
from expertflow.models.families import FAMILIES
from helpers import MakeCheckpoint, load_resident

LENGTH, BATCH, CHUNK = 48, 3, 60
MORE = {"logprobs": 3, "frequency_penalty": 0.1, "repetition_penalty": 1.1}


def _fill_everything(llm: LLM, temperatures: tuple[float, ...] = (0.0, 1.0)) -> None:
    """Prompts and generations that use every planned token of every planned sequence, greedy and sampled."""
    vocabulary = llm.plan.shape.vocabulary
    generator = torch.Generator().manual_seed(0)
    for temperature in temperatures:
        prompt = LENGTH if llm.plan.shape.encoder_decoder else LENGTH - 8
        prompts = [torch.randint(3, vocabulary, (prompt,), generator=generator).tolist() for _ in range(BATCH)]
        params = SamplingParams(
            max_tokens=LENGTH,
            temperature=temperature,
            top_k=9,
            top_p=0.9,
            ignore_eos=True,
            **(MORE if temperature else {}),
        )
        if temperature and not llm.plan.shape.encoder_decoder:
            params = replace(params, prompt_logprobs=3)
        llm.generate(prompts, params)


RUNS = [(name, dtype, "host") for name in FAMILIES for dtype in ("float32", "bfloat16")]
RUNS += [
    ("gpt_oss", "bfloat16", "graph"),
    ("deepseek_v2", "float32", "graph"),
    ("switch_transformers", "float32", "graph"),
]


@pytest.mark.parametrize(("model_type", "dtype", "execution"), RUNS)
def test_measured_peak_is_within_the_plan(
    model_type: str, dtype: str, execution: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Running the plan to its limits on the CPU stays within every planned byte, in all families; greedy steps, which take less, in one dtype."""
    folder = make_checkpoint(model_type, dtype)
    options = {
        "device": "cpu",
        "max_length": LENGTH,
        "max_batch": BATCH,
        "prefill_chunk": CHUNK,
        "execution": execution,
    }
    least = prepare(folder, EngineConfig(**options, slots=3)).plan.total
    with LLM(folder, gpu_memory=least, slots=3, **options) as llm:
        assert llm.plan.kv_tokens >= BATCH * LENGTH  # stated slots leave the rest to keys and values
        assert llm.plan.total <= least
        _fill_everything(llm, (0.0, 1.0) if dtype == "bfloat16" else (1.0,))
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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keys_and_values_are_as_planned(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """The planned bytes of keys and values are those of the tensors that hold them, to the byte."""
    options = {"device": "cpu", "max_length": 16, "max_batch": 2, "max_live": 3}
    with LLM(make_checkpoint(model_type, "bfloat16"), **options) as llm:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=1))
        rows = llm._offloaded.handover.rows
        if llm.plan.shape.encoder_decoder:
            layers = [*rows.cache.layers, *rows._read.layers]
            tensors = [tensor for layer in layers for tensor in vars(layer).values() if torch.is_tensor(tensor)]
        else:
            tensors = rows.cache.tensors
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == llm.plan.kv


def test_keys_and_values_of_a_cohort_are_as_planned(make_checkpoint: MakeCheckpoint) -> None:
    """A family outside the table: the plan counts what the stock model's own cache holds at full length."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 96, "num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 32, "pad_token_id": 0}  # fmt: skip
    folder = make_checkpoint("flex_olmo", "bfloat16", **sizes)
    plan = prepare(folder, EngineConfig(device="cpu", max_length=16, max_batch=3)).plan
    with torch.inference_mode():
        cache = load_resident(folder)(torch.ones(3, 16, dtype=torch.long), use_cache=True).past_key_values
    assert sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)) == plan.kv


@pytest.mark.cuda
@pytest.mark.parametrize("model_type", FAMILIES)
def test_cuda_peak_is_within_the_budget(model_type: str, make_checkpoint: MakeCheckpoint, cuda: torch.device) -> None:
    """`torch.cuda.max_memory_allocated` stays within the budget."""
    folder = make_checkpoint(model_type, "bfloat16")
    options = {"device": cuda.type, "max_length": LENGTH, "max_batch": BATCH, "prefill_chunk": CHUNK}
    least = prepare(folder, EngineConfig(**options, slots=3)).plan.total
    with LLM(folder, gpu_memory=least, slots=3, **options) as llm:
        _fill_everything(llm)
        assert torch.cuda.max_memory_allocated() <= least


def test_a_larger_budget_buys_more_slots(make_checkpoint: MakeCheckpoint) -> None:
    """Slots grow with the budget, one record at a time, up to every expert."""
    folder = make_checkpoint("mixtral")
    options = {"device": "cpu", "max_length": 32, "max_batch": 1}
    one = prepare(folder, EngineConfig(**options, slots=1)).plan
    for more in (0, 1, 5, 23, 40):
        plan = prepare(folder, EngineConfig(**options, gpu_memory=one.total + more * one.record_bytes)).plan
        assert plan.slots == min(1 + more, 24)
        assert plan.total <= one.total + more * one.record_bytes


def test_memory_that_cannot_be_planned_is_not_promised(make_checkpoint: MakeCheckpoint) -> None:
    """A budget for a model with state-space layers is refused, since the plan does not cover their state."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 16}
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
    moe = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1,
           "moe_shared_expert_intermediate_size": 32, "intermediate_size": 64}  # fmt: skip
    layers = {"layers_block_type": ["mamba", "moe", "attention"]}
    folder = make_checkpoint("nemotron_h", **sizes, **mamba, **moe, **layers)
    with pytest.raises(ConfigError, match=r"cannot be promised.*state slots"):
        prepare(folder, EngineConfig(device="cpu", gpu_memory="1GiB"))
    assert prepare(folder, EngineConfig(device="cpu", slots=3, max_length=32)).plan.slots == 3


def test_a_closed_model_gives_its_memory_back(make_checkpoint: MakeCheckpoint) -> None:
    """After `close` store and slots are gone, using the model is a clear error, and closing again is fine."""
    llm = LLM(make_checkpoint("mixtral"), device="cpu", max_length=32)
    parts = [
        weakref.ref(llm._offloaded.store.buffer.untyped_storage()),
        weakref.ref(llm._offloaded.handover.provider._pool),
    ]
    llm.close()
    gc.collect()
    assert [part() for part in parts] == [None, None]
    with pytest.raises(ClosedError, match="was closed"):
        llm.generate([3, 4, 5])
    llm.close()
