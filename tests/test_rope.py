"""A sequence's rotary table depends on its own length only, whatever steps beside it and however its prompt is cut."""

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from expertflow import LLM, SamplingParams
from expertflow.execution.rope import use_own_lengths
from expertflow.models.context import ForwardContext
from expertflow.models.families import FAMILIES
from helpers import MakeCheckpoint, load_resident

ORIGINAL = 24
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "short_mscale": 1.1, "long_mscale": 1.3, "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FLEX_OLMO = {**FAMILIES["olmoe"].tiny}
SHORT = [3 + 7 * place % 90 for place in range(9)]
LONG = [5 + 11 * place % 90 for place in range(41)]
CROSSING = [9 + 5 * place % 90 for place in range(ORIGINAL - 2)]


def _expected(family: str, stock: PreTrainedModel, prompt: list[int]) -> list[int]:
    """Six greedy tokens of the stock model, with its cache.

    PhiMoE makes its cache anew beyond the original context, which fails in transformers 5.17: there it runs without a cache.
    """
    if family == "phimoe":
        ids = list(prompt)
        for _ in range(6):
            with torch.inference_mode():
                ids.append(int(stock(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[-6:]
    generated = stock.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    return generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["phimoe", "mixtral", "flex_olmo"])
def test_tokens_beside_a_longer_sequence_are_those_alone(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """Short, long, and one that grows past the original context: stock tokens, alone, together, and in small passes."""
    sizes = {"head_dim": 16} if family == "mixtral" else FLEX_OLMO if family == "flex_olmo" else {}
    folder = make_checkpoint(family, spread=0.3, **sizes, rope_parameters=LONG_ROPE)
    stock = load_resident(folder)
    prompts = [SHORT, LONG, CROSSING]
    expected = [_expected(family, stock, prompt) for prompt in prompts]
    for batch, chunk in ((1, 512), (3, 512), (3, 12)):
        with LLM(folder, device="cpu", slots=9, max_length=64, max_batch=batch, prefill_chunk=chunk) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
        assert [list(output.token_ids) for output in outputs] == expected, (batch, chunk)


@pytest.mark.parametrize(
    ("family", "kind", "scaling"),
    [
        ("phimoe", PhimoeRotaryEmbedding, LONG_ROPE),
        ("mixtral", MixtralRotaryEmbedding, LONG_ROPE),
        ("mixtral", MixtralRotaryEmbedding, DYNAMIC),
    ],
)
def test_angles_are_those_of_a_fresh_module(family: str, kind: type, scaling: dict) -> None:
    """Each sequence's angles equal a new module's that sees nothing but it, after longer sequences have passed."""
    config = AutoConfig.for_model(family, **FAMILIES[family].tiny, head_dim=16)
    config.max_position_embeddings = ORIGINAL
    config.rope_parameters = scaling
    module = kind(config)
    lengths = [60, 30, ORIGINAL, 7, 45]
    positions = torch.tensor([[length - 2, length - 1] for length in lengths])
    states = torch.zeros(len(lengths), 2, 64)
    context = ForwardContext()
    use_own_lengths(module, context)
    with context.carry(lengths=lengths):
        found = module(states, positions)
    for place, length in enumerate(lengths):
        alone = kind(config)(states[:1], torch.arange(length)[None])
        for ours, wanted in zip(found, alone, strict=True):
            assert torch.equal(ours[place], wanted[0, -2:])
    assert not torch.equal(found[0][1], kind(config)(states[:1], positions[1:2] - 28)[0][0])
