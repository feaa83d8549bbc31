"""Where weights come from: random ones make the model that stock transformers makes of them, and stores can be shared."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from expertflow import LLM, SamplingParams
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.errors import ClosedError, ConfigError, ExpertFlowError, PredictorError
from expertflow.models.families import FAMILIES
from expertflow.models.weights.sources import FileWeights, RandomWeights
from helpers import MakeCheckpoint, MakePredictor

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
OPTIONS = {"device": "cpu", "slots": 6, "max_length": 32, "execution": "host", "strategy": "lru", "predictor": "none"}


def only_config(family: str, folder: Path, dtype: str = "float32") -> Path:
    """A folder that holds a small model's config and nothing else."""
    AutoConfig.for_model(family, dtype=dtype, **FAMILIES[family].tiny).save_pretrained(folder)
    return folder


def as_stock(llm: LLM, folder: Path) -> torch.nn.Module:
    """Stock transformers with the same weights: dense ones by key, experts stacked from their records."""
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    stock = AutoModelForCausalLM.from_config(config).eval()
    offloaded = llm._offloaded
    stock.load_state_dict(offloaded.model.state_dict(), strict=False)
    for layer, path in enumerate(offloaded.skeleton.expert_modules):
        module = stock.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            for expert in range(offloaded.skeleton.experts):
                record = offloaded.store.record(layer * offloaded.skeleton.experts + expert)
                parameter.data[expert].copy_(offloaded.store.layout.layers[layer].tensor(record, name))
    return stock


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v2", "qwen2_moe"])
def test_random_weights_are_a_whole_model(tmp_path: Path, family: str) -> None:
    """Nothing is left uninitialised: logits are stock transformers' on the same weights, rotary tables included."""
    folder, ids = only_config(family, tmp_path), torch.tensor([[5, 9, 14, 3, 8]])
    with LLM(folder, weights=RandomWeights(seed=3, embedding=20), **OPTIONS) as llm, torch.inference_mode():
        ours = llm._offloaded.model(ids).logits
        assert torch.equal(ours, as_stock(llm, folder)(ids).logits)
        assert bool(ours.isfinite().all())


def test_the_seed_decides(tmp_path: Path) -> None:
    """The same seed gives the same identity and tokens; another seed, or wider embeddings, gives others."""
    folder, found = only_config("qwen3_moe", tmp_path), []
    state = torch.random.get_rng_state()
    for source in (
        RandomWeights(seed=3),
        RandomWeights(seed=3),
        RandomWeights(seed=4),
        RandomWeights(seed=3, embedding=9),
    ):
        with LLM(folder, weights=source, **OPTIONS) as llm:
            tokens = llm.generate([[4, 7, 2, 9]], PARAMS)[0].token_ids
            found.append((llm.identity, llm.fingerprint, tokens, llm._offloaded.store.buffer.clone()))
    assert found[0][:3] == found[1][:3]
    assert torch.equal(found[0][3], found[1][3])
    assert len({identity for identity, *_ in found}) == 3
    assert not torch.equal(found[0][3], found[2][3])
    assert torch.equal(state, torch.random.get_rng_state())  # the program's own random numbers go on as they were


def test_a_random_store_is_shared_with_the_same_seed_only(tmp_path: Path) -> None:
    """`weights=llm.shared_weights` and `beside=llm` take the other model's records; both at once are refused."""
    folder = only_config("mixtral", tmp_path)
    with LLM(folder, weights=RandomWeights(seed=3), **OPTIONS) as first:
        expected = first.generate([[4, 7, 2, 9]], PARAMS)[0].token_ids
        for given in ({"beside": first}, {"weights": first.shared_weights}):
            with LLM(folder, **given, **{**OPTIONS, "slots": 3}) as second:
                assert second._offloaded.store is first._offloaded.store
                assert second.generate([[4, 7, 2, 9]], PARAMS)[0].token_ids == expected
        twin = only_config("mixtral", tmp_path / "twin")
        with LLM(twin, beside=first, **OPTIONS) as second:  # another folder of the same config
            assert second.identity == first.identity
        assert first.generate([[4, 7, 2, 9]], PARAMS)[0].token_ids == expected  # the store is still there
        with pytest.raises(ConfigError, match="beside and weights"):
            LLM(folder, beside=first, weights=FileWeights(), **OPTIONS)
        other = only_config("mixtral", tmp_path / "other", dtype="bfloat16")
        with pytest.raises(ConfigError, match="cannot share"):
            LLM(other, beside=first, **OPTIONS)


def test_a_folder_without_weights_needs_a_source(tmp_path: Path) -> None:
    """Random weights are never a silent fallback."""
    with pytest.raises(ExpertFlowError):
        LLM(only_config("mixtral", tmp_path), **OPTIONS)


def test_a_stand_in_takes_the_predictor_of_what_it_stands_for(
    tmp_path: Path,
    make_checkpoint: MakeCheckpoint,
    make_predictor: MakePredictor,
) -> None:
    """A predictor is refused by random weights, unless they carry the fingerprint of the model it was made for."""
    real = make_checkpoint("qwen3_moe")
    shutil.copy(real / "config.json", tmp_path)
    options = {**OPTIONS, "strategy": "plec", "predictor": str(make_predictor(real))}
    mark = prepare(real, EngineConfig(device="cpu", predictor="none")).fingerprint
    with LLM(tmp_path, weights=RandomWeights(fingerprint=mark), **options) as llm:
        assert llm.fingerprint == mark
        assert llm.predictor is not None
    with pytest.raises(PredictorError, match="fingerprint"):
        LLM(tmp_path, weights=RandomWeights(), **options)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda")
def test_weights_drawn_on_a_gpu_are_shared_and_planned(tmp_path: Path) -> None:
    """Records land in page-locked memory; a second model in graph execution gives the resident one's tokens, inside its plan."""
    folder, tokens = only_config("qwen3_moe", tmp_path, dtype="bfloat16"), []
    options = {**OPTIONS, "device": "cuda", "execution": "graph"}
    with LLM(folder, weights=RandomWeights(seed=3, embedding=20), **{**options, "slots": "100%"}) as first:
        tokens.append(first.generate([[4, 7, 2, 9]], PARAMS)[0].token_ids)
        assert first.stats.peak_bytes <= first.plan.total
        with LLM(folder, beside=first, **options) as second:
            tokens.append(second.generate([[4, 7, 2, 9]], PARAMS)[0].token_ids)
    assert tokens[0] == tokens[1]


def test_experts_of_a_closed_model_are_not_shared(tmp_path: Path) -> None:
    """A source whose model was closed says so before anything is computed."""
    folder = only_config("mixtral", tmp_path)
    with LLM(folder, weights=RandomWeights(seed=3), **OPTIONS) as first:
        source = first.shared_weights
    with pytest.raises(ClosedError, match="closed"):
        LLM(folder, weights=source, **OPTIONS)
