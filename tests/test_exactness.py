"""Law 1: offloaded equals resident, bit for bit."""

from collections.abc import Generator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.cache.forecast import Recorded
from expertflow.cache.strategy import STRATEGIES, Strategy
from expertflow.models.experts import Binding, ExpertWeights, run_experts
from expertflow.models.families import FAMILIES
from helpers import DEVICES, MakeCheckpoint, load_resident, random_future

DTYPES = ("float32", "bfloat16")
NEW_TOKENS = 6


def _slot_counts(config: object) -> list[int]:
    """1, top-k, E/2 and E a layer, as totals of the model, and every expert."""
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    top_k = getattr(config, "num_experts_per_tok", 1)
    return sorted({1, top_k, experts // 2, experts, 2 * experts, 1000})


def _some(turn: int) -> list[tuple[str, Strategy]]:
    """A sixth of the strategies, another one every turn: every family meets all of them in its two dtypes."""
    return [entry for place, entry in enumerate(STRATEGIES.items()) if place % 6 == turn % 6]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_equal_the_stock_model(
    model_type: str, dtype: str, device: str, make_checkpoint: MakeCheckpoint
) -> None:
    """Logits and greedy tokens are the stock eager model's bits, for every family, slot count and strategy."""
    folder = make_checkpoint(model_type, dtype, spread=0.3)
    resident = load_resident(folder).to(device)
    ids = torch.randint(3, 90, (3, 13), generator=torch.Generator().manual_seed(5)).to(device)
    extra = {"decoder_input_ids": ids[:, :5]} if resident.config.is_encoder_decoder else {}
    with torch.inference_mode():
        expected = resident(ids, **extra).logits
        tokens = resident.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    for place, slots in enumerate(_slot_counts(resident.config)):
        for strategy, entry in _some(place + DTYPES.index(dtype) + list(FAMILIES).index(model_type)):
            wrong = Recorded(random_future(folder)) if entry.needs_future else None
            model = from_pretrained(folder, slots=slots, strategy=strategy, device=device, forecast=wrong)
            with torch.inference_mode():
                assert torch.equal(model(ids, **extra).logits, expected), (slots, strategy)
                again = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
            assert torch.equal(again, tokens), (slots, strategy)
            model.expertflow.controller.table.check_integrity()
            model.expertflow.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_engine_generates_the_stock_tokens(model_type: str, dtype: str, make_checkpoint: MakeCheckpoint) -> None:
    """`LLM.generate` gives the tokens of transformers' own greedy `generate`, padded batch included.

    Its batch has another shape than ours, so in bfloat16 a row may go another way where two logits are as good as equal.
    """
    folder = make_checkpoint(model_type, dtype, spread=0.3)
    resident = load_resident(folder)
    encoder_decoder = resident.config.is_encoder_decoder
    lengths = (4, 11, 7)
    prompts = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    width = max(lengths)
    rows = [(p + [0] * (width - len(p))) if encoder_decoder else ([0] * (width - len(p)) + p) for p in prompts]
    ids = torch.tensor(rows)
    stock = resident.generate(
        ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = stock.sequences[:, 1:] if encoder_decoder else stock.sequences[:, width:]
    with LLM(folder, slots=5, device="cpu", max_length=32, max_batch=3) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [NEW_TOKENS] * 3
    for row, output in enumerate(outputs):
        apart = np.flatnonzero(np.array(output.token_ids) != expected[row].numpy())
        if len(apart):
            best, second = stock.logits[apart[0]][row].float().topk(2).values.tolist()
            assert dtype == "bfloat16"
            assert best - second <= abs(best) * 2**-6  # two steps of bfloat16 at most


FALLBACK = {
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 1,
              "first_k_dense_replace": 1, "intermediate_size": 64, "n_group": 1, "topk_group": 1, "head_dim": 16},
    "flex_olmo": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoeshared": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32,
                         "shared_intermediate_size": 32},
    "nemotron_h": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_groups": 1,
                   "moe_shared_expert_intermediate_size": 32, "intermediate_size": 64, "mamba_num_heads": 4,
                   "mamba_head_dim": 16, "ssm_state_size": 8, "head_dim": 16, "chunk_size": 8,
                   "layers_block_type": ["moe", "attention", "moe"], "n_shared_experts": 1},
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", FALLBACK)
def test_other_registry_families_run_by_their_own_forward(
    model_type: str, dtype: str, make_checkpoint: MakeCheckpoint
) -> None:
    """A registry family without an entry of its own is bit-equal through the universal fallback, with one slot."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "vocab_size": 96, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    folder = make_checkpoint(model_type, dtype, **{**sizes, **FALLBACK[model_type]})
    resident = load_resident(folder)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = resident(ids).logits
        for slots in (1, 3, 1000):
            model = from_pretrained(folder, slots=slots, device="cpu")
            assert torch.equal(model(ids).logits, expected), slots
            model.expertflow.close()


def test_order_of_experts_does_not_change_the_sum(make_checkpoint: MakeCheckpoint) -> None:
    """Results do not depend on which experts happened to be resident: warm and cold caches give the same bits."""
    folder = make_checkpoint("qwen3_moe", "bfloat16")
    model = from_pretrained(folder, slots=20, strategy="lru-global", device="cpu")
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cold = model(ids).logits
        assert model.expertflow.counters.hits == 0
        model(ids.flip(0)[:, :7])
        warm = model(ids).logits
    assert model.expertflow.counters.hits > 0
    assert torch.equal(cold, warm)
    model.expertflow.close()


class _Backwards:
    """Brings the experts of one layer, the last one first."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights

    def stream(self, layer: int, experts: list[int]) -> Generator[tuple[int, ExpertWeights], None, None]:  # noqa: ARG002 - a provider's signature
        for expert in reversed(experts):
            yield expert, {"w": self._weights[expert]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [16, 20, 33])
def test_a_layer_is_the_stock_sum_at_any_width(width: int, dtype: str, device: str, *, wide: bool) -> None:
    """Rows that no alignment fits, weights and perhaps results wider than states, tokens of no expert: as the stock code adds them."""
    experts, tokens, top_k = 7, 41, 5
    random, kind = torch.Generator().manual_seed(width), getattr(torch, dtype)
    hidden = torch.randn(tokens, width, generator=random).to(device, kind)
    weights = [torch.randn(width, width, generator=random).to(device, kind) for _ in range(experts)]
    index = torch.stack([torch.randperm(experts + 1, generator=random)[:top_k] for _ in range(tokens)]).to(device)
    share = torch.rand(tokens, top_k, generator=random).to(device)

    def mlp(x: Tensor, weights: ExpertWeights) -> Tensor:
        return functional.linear(x, weights["w"]).to(torch.float32 if wide else kind) * 1.001

    expected = torch.zeros_like(hidden)
    for expert in range(experts):
        rank, token = torch.where(index.t() == expert)
        out = mlp(hidden[token], {"w": weights[expert]}) * share[token, rank, None]
        expected.index_add_(0, token, out.to(kind))
    seen: list[tuple[int, Tensor, Tensor]] = []
    binding = Binding(layer=3, provider=_Backwards(weights))
    with binding.context.carry(observe=lambda *shown: seen.append(shown)):
        made = run_experts(binding, mlp, hidden, index, share, experts)
    assert torch.equal(made, expected)
    assert [layer for layer, _, _ in seen] == [3]
    assert torch.equal(seen[0][1], index.cpu())
    assert torch.equal(seen[0][2].cpu(), share.cpu())
