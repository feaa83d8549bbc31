"""Logits that are no numbers end their request with our error, and nothing of it reaches another request."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertflow import LLM, SamplingParams
from expertflow.cli.run import main as run
from expertflow.config import SamplingParams as Params
from expertflow.errors import NonFiniteError
from expertflow.execution.sampler import NO_TOKEN, Draw, Sampler
from expertflow.models.families import FAMILIES
from helpers import DEVICES, MakeCheckpoint

BAD = 50
GOOD = [[5, 17, 33, 62], [9, 8, 7, 21, 30, 44, 41]]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
KINDS = [
    ("qwen3_moe", "host"),
    ("gpt_oss", "graph"),
    ("deepseek_v3", "host"),
    ("switch_transformers", "graph"),
    ("flex_olmo", "host"),
]


def broken(make: MakeCheckpoint, tmp_path: Path, family: str, dtype: str = "float32", token: int = BAD) -> Path:
    """A checkpoint in which one token's embedding is NaN: a sequence that reads it has no next token, all others are well."""
    sizes = FAMILIES["olmoe"].tiny if family == "flex_olmo" else {}
    made = make(family, dtype, spread=0.3, **sizes, tie_word_embeddings=False)
    folder = tmp_path / family
    folder.mkdir()
    for path in made.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(made / "model.safetensors")
    for key in tensors:
        if key.endswith(("embed_tokens.weight", "shared.weight")):
            tensors[key][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "execution"), KINDS)
def test_a_broken_request_ends_alone(
    family: str, execution: str, device: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Beside one whose activations are NaN, and after it in its KV row, requests get the tokens they get alone."""
    folder = broken(make_checkpoint, tmp_path, family)
    options = {"device": device, "slots": 9, "max_length": 32, "execution": execution if device == "cpu" else "auto"}
    with LLM(folder, max_batch=1, **options) as llm:
        alone = [llm.generate([prompt], PARAMS)[0].token_ids for prompt in GOOD]
        with pytest.raises(NonFiniteError, match="request 0 has no token 1: its logits are not finite"):
            llm.generate([[4, 6, BAD, 3, 11, 12, 13, 14, 15]], PARAMS)
        assert [llm.generate([prompt], PARAMS)[0].token_ids for prompt in GOOD] == alone, "the same KV row"
    with LLM(folder, max_batch=3, **options) as llm:
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="request 1") as caught:
                llm.generate([GOOD[0], [4, 6, BAD, 3, 11, 12, 13, 14, 15], GOOD[1]], PARAMS)
            assert [output.index for output in caught.value.outputs] == [0, 2]
            assert [output.token_ids for output in caught.value.outputs] == alone
        assert llm.stats.finished == 4
        assert llm.engine.unfinished == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "flex_olmo"])
def test_a_broken_padding_token_is_not_seen(family: str, make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Prompts that a pass pads get the tokens they get alone, although the model's padding token is NaN."""
    folder = broken(make_checkpoint, tmp_path, family, token=0)
    options = {"device": "cpu", "slots": 9, "max_length": 32}
    with LLM(folder, max_batch=1, **options) as llm:
        alone = [output.token_ids for output in llm.generate(GOOD, PARAMS)]
    with LLM(folder, max_batch=2, **options) as llm:
        assert [output.token_ids for output in llm.generate(GOOD, PARAMS)] == alone


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_a_former_owner_left_is_not_seen(number: float, make_checkpoint: MakeCheckpoint) -> None:
    """Keys and values of a row's former owner that are no numbers reach no later one, in either execution."""
    for family, execution in (("mixtral", "host"), ("mixtral", "graph"), ("switch_transformers", "host")):
        folder = make_checkpoint(family, spread=0.3)
        with LLM(folder, device="cpu", slots=9, max_length=32, max_batch=1, execution=execution) as llm:
            long = [7 + place for place in range(20)]
            llm.generate([long], PARAMS)
            expected = llm.generate([GOOD[0]], PARAMS)[0].token_ids
            llm.generate([long], PARAMS)
            rows = llm._offloaded.handover.rows
            caches = [rows.cache, rows._read] if family.startswith("switch") else [rows.cache]
            for layer in (layer for cache in caches for layer in cache.layers):
                for kept in (
                    getattr(layer, "_keys", layer.__dict__.get("keys")),
                    getattr(layer, "_values", layer.__dict__.get("values")),
                ):
                    with torch.inference_mode():
                        kept[:, :, :20] = number
            assert llm.generate([GOOD[0]], PARAMS)[0].token_ids == expected


def test_float16_overflow_is_said(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Activations beyond float16's range end the request; the remedy names other dtypes."""
    folder = tmp_path / "half"
    folder.mkdir()
    made = make_checkpoint("mixtral", "float16", spread=0.3)
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"] *= 1e5
    save_file(
        {key: value.clamp(-6e4, 6e4) for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with LLM(folder, device="cpu", max_length=32) as llm, pytest.raises(NonFiniteError, match="bfloat16 or float32"):
        llm.generate(GOOD, PARAMS)


def test_sampled_tokens_are_checked_too() -> None:
    """Greedy or drawn, a row with NaN or infinity has no token; minus infinity forbids a token and is no fault."""
    logits = torch.randn(5, 8)
    logits[1, 3], logits[2, 3], logits[3], logits[4, 1:] = float("nan"), float("inf"), float("-inf"), float("-inf")
    for temperature in (0.0, 0.8):
        draws = [Draw(params=Params(temperature=temperature), seed=n) for n in range(5)]
        chosen = Sampler(torch.device("cpu")).choose(logits, draws).tokens
        assert [token == NO_TOKEN for token in chosen] == [False, True, True, True, False]
        assert chosen[4] == 0


def test_the_command_shows_what_finished_and_fails(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run --json` prints the results of the other prompts and what was wrong, then ends with our error."""
    folder = broken(make_checkpoint, tmp_path, "qwen3_moe")
    engine = {"device": "cpu", "max_length": 32}
    letter = chr(33 + BAD - 3)
    with pytest.raises(NonFiniteError):
        run(model=str(folder), prompts=["ab", f"c{letter}"], engine=engine, sampling={"max_tokens": 3},
            results=None, as_json=True)  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert [output["index"] for output in printed["outputs"]] == [0]
    assert "request 1" in printed["error"]
    options = {"model": str(folder), "prompts": ["ab", "de", f"c{letter}"], "engine": engine, "as_json": True}
    for finished in ([0, 1], []):  # the second time only the broken one is left
        with pytest.raises(NonFiniteError, match="request 2 has no token 1"):
            run(**options, sampling={"max_tokens": 3}, results=tmp_path / "results")
        printed = json.loads(capsys.readouterr().out)
        assert [output["index"] for output in printed["outputs"]] == finished
