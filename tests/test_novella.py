"""The shipped model is what its card says: format, size, share of experts, no dead expert, better than dense."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertflow import LLM, SamplingParams
from expertflow.engine.llm import shipped_model

MIB = 2**20


@pytest.fixture(scope="module")
def resident() -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(shipped_model(), dtype="auto", experts_implementation="eager").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def test_size_and_shape(resident: torch.nn.Module) -> None:
    """At least 8 MoE layers, 32 experts, top-2, 85 % expert parameters; at most 48 MiB, shards at most 16 MiB."""
    config = resident.config
    assert config.num_hidden_layers >= 8
    assert config.num_experts >= 32
    assert config.num_experts_per_tok >= 2
    experts = sum(p.numel() for name, p in resident.named_parameters() if ".experts." in name)
    assert experts >= 0.85 * sum(p.numel() for p in resident.parameters())
    sizes = [path.stat().st_size for path in shipped_model().iterdir()]
    assert sum(sizes) <= 48 * MIB
    assert max(sizes) <= 16 * MIB


def test_the_training_report_meets_the_bar() -> None:
    """Every expert gets at least 0.2 of its fair share on held-out text, and the MoE beats the dense model."""
    report = json.loads((shipped_model() / "training_report.json").read_text())
    moe, dense = report["moe"]["heldout"], report["dense"]["heldout"]
    assert moe["load"]["min_relative"] >= 0.2
    assert moe["perplexity"] < dense["perplexity"]
    assert report["moe"]["tokens"] == report["dense"]["tokens"]


def test_offloaded_text_is_the_stock_text(resident: torch.nn.Module) -> None:
    """Greedy tokens of the shipped model with 10 % of its experts in slots are the stock model's."""
    prompt = "The captain looked at the sea, and"
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = resident.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    with LLM(slots="10%", device="cpu", max_length=64) as llm:
        output = llm.generate(prompt, SamplingParams(max_tokens=24))[0]
    assert list(output.token_ids) == expected
    assert output.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_it_reads_plain_english_better_than_noise(resident: torch.nn.Module) -> None:
    """Perplexity on a sentence outside the training text is far below that of its words in random order."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())

    def loss(text: str) -> float:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return float(resident(ids, labels=ids).loss)

    plain = "She closed the door behind her and walked slowly down the narrow stairs to the kitchen."
    shuffled = "the slowly kitchen stairs down her She and door to walked the narrow closed behind the."
    assert loss(plain) < 4.0 < loss(shuffled)
