"""Every family loads and writes the stock model's tokens, with whatever transformers is installed (`make newest-smoke`)."""

import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.models.families import FAMILIES
from helpers import MakeCheckpoint, load_resident

TOKENS = 8
PROMPT = [5, 9, 17, 33, 4, 61, 8]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_tokens_are_the_stock_models(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """Half of a layer's experts in slots, a prompt in two passes: the tokens that stock eager `generate` gives."""
    folder = make_checkpoint(model_type, spread=0.3)
    stock = load_resident(folder)
    stock.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        made = stock.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
    expected = made[0, 1:] if stock.config.is_encoder_decoder else made[0, len(PROMPT) :]
    with LLM(folder, device="cpu", slots=4, prefill_chunk=4, max_batch=1, max_length=64) as llm:
        output = llm.generate([PROMPT], SamplingParams(max_tokens=TOKENS, ignore_eos=True))[0]
    assert list(output.token_ids) == expected.tolist()


def test_switch_capacity_is_counted_per_sequence(make_checkpoint: MakeCheckpoint) -> None:
    """Transformers drops tokens over an expert's capacity since 5.23: a batch of prompts drops the same as one alone."""
    folder = make_checkpoint("switch_transformers", expert_capacity=1)
    stock = load_resident(folder)
    stock.generation_config.eos_token_id = None
    prompts = [PROMPT, PROMPT[:3], [*PROMPT, *PROMPT]]
    with torch.inference_mode():
        expected = [
            stock.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)[0, 1:].tolist()
            for ids in prompts
        ]
    with LLM(folder, device="cpu", slots=4, max_batch=3, max_length=64) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert [list(output.token_ids) for output in outputs] == expected
