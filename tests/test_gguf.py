"""GGUF files: numbers as the package `gguf` decodes them, bits as of the decoded checkpoint, and clear refusals."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertflow import LLM, SamplingParams, from_pretrained
from helpers import MakeCheckpoint, load_resident

gguf = pytest.importorskip("gguf")
import gguf_files  # noqa: E402 - needs the package

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [10, 11], [12, 13, 14]]
WIDE = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 256, "intermediate_size": 256}
CASES = {
    "K": ("qwen3_moe", lambda name: "Q6_K" if "down_exps" in name or name == "output.weight" else "Q5_K" if "attn" in name else "Q4_K", WIDE, {}),
    "Q8_0": ("qwen2_moe", lambda _: "Q8_0", {}, {}),
    "MXFP4": ("gpt_oss", lambda name: "MXFP4" if "exps" in name else "Q8_0" if "attn" in name else "BF16", {}, {}),
    "Q4_0": ("mixtral", lambda _: "Q4_0", {}, {}),
    "split": ("mixtral", lambda name: "Q5_0" if "exps" in name else "Q5_1", {}, {"parts": 3}),
    "F16": ("mixtral", lambda _: "F16", {}, {}),
    "reordered F16": ("gpt_oss", lambda _: "F16", {}, {}),
}
"""Family, types by name in the file, sizes, how it is written."""
MakePair = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def make_pair(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> MakePair:
    """Writes a GGUF file and its decoded twin, once for each case and dtype."""

    @cache
    def make(case: str, dtype: str = "bfloat16") -> tuple[Path, Path]:
        family, types, sizes, options = CASES[case]
        source = make_checkpoint(family, "float32", spread=0.2, **sizes)
        return gguf_files.write(source, tmp_path_factory.mktemp("gguf"), types, dtype, **options)

    return make


def stock_logits(folder: Path) -> list[Tensor]:
    with torch.inference_mode():
        model = load_resident(folder)
        return [model(torch.tensor([prompt])).logits for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_decoded_checkpoints_bits(case: str, dtype: str, make_pair: MakePair) -> None:
    """Law 1: logits of the stock model with the weights that the package decodes, and the tokens of `LLM`."""
    file, decoded = make_pair(case, dtype)
    model = from_pretrained(file, slots=3, device="cpu", dtype=dtype)
    with torch.inference_mode():
        found = [model(torch.tensor([prompt])).logits for prompt in PROMPTS]
    model.expertflow.close()
    assert all(map(torch.equal, found, stock_logits(decoded)))
