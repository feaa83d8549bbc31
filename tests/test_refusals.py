"""Models that do not run as they are: the error names the true cause, and its remedy works."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, GptOssForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from expertflow import LLM, EngineConfig, SamplingParams, from_pretrained
from expertflow.cli.plan import as_dict
from expertflow.engine.prepare import prepare
from expertflow.errors import CheckpointError, ExpertFlowError, UnsupportedModelError
from expertflow.models.files import checkpoint
from expertflow.models.files.checkpoint import SINGLE_NAME
from helpers import MakeCheckpoint, load_resident, run

PROMPT = [5, 9, 17, 33, 4, 61, 8]
TOKENS = 6
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
         "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "head_dim": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
QWEN35 = {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 32, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
LLAMA4 = {**SIZES, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 8, "head_dim": 16}


def save(folder: Path, model_type: str, mapping: object = MODEL_FOR_CAUSAL_LM_MAPPING, **sizes: object) -> Path:
    """A small random model, with weights wide enough that its tokens depend on them."""
    config = AutoConfig.for_model(model_type, **sizes)
    torch.manual_seed(3)
    model = mapping[type(config)](config).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1 if "embed" in name else 0.3)
    model.save_pretrained(folder)
    return folder


def stock_tokens(model: PreTrainedModel) -> list[int]:
    made = model.eval().generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(PROMPT) :].tolist()


def our_tokens(folder: Path) -> list[int]:
    with LLM(folder, device="cpu", slots=8, max_length=32, max_batch=1) as llm:
        return list(llm.generate([PROMPT], SamplingParams(max_tokens=TOKENS, ignore_eos=True))[0].token_ids)


def refusal(place: Path, error: type[ExpertFlowError]) -> str:
    with pytest.raises(error) as caught:
        LLM(place, device="cpu")
    return str(caught.value)


def remedy_lines(message: str) -> str:
    """The lines of Python in an error message."""
    return "\n".join(line.strip() for line in message.splitlines() if line.startswith("    "))


def test_the_text_part_of_a_larger_model_runs(tmp_path: Path) -> None:
    """A config that holds a text config: its tokens are those of the whole model, and the plan says what is left out."""
    wrapped = {"text_config": QWEN35, "vision_config": VISION}
    folder = save(tmp_path, "qwen3_5_moe", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, **wrapped)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(AutoConfig.from_pretrained(folder))]
    stock = whole.from_pretrained(folder, dtype="auto", experts_implementation="eager")
    assert our_tokens(folder) == stock_tokens(stock)
    notes = prepare(folder, EngineConfig(device="cpu", slots=8)).plan.shape.notes
    assert "of this 'qwen3_5_moe' checkpoint the text part runs; its other parts are left out" in notes


@pytest.mark.parametrize(
    ("model_type", "sizes", "cause"),
    [
        ("llama4_text", LLAMA4, r"class of their own \(Llama4TextExperts\), outside transformers' experts registry"),
        ("llama4", {"text_config": LLAMA4}, r"class of their own \(Llama4TextExperts\)"),
        ("longcat_flash",
         {**SIZES, **LATENT, "num_layers": 1, "ffn_hidden_size": 64, "moe_topk": 4, "n_routed_experts": 8,
          "zero_expert_num": 4, "expert_ffn_hidden_size": 32, "head_dim": 8},
         r"class of their own \(LongcatFlashExperts\)"),
        ("jetmoe", {**SIZES, "intermediate_size": 32, "kv_channels": 16}, r"class of their own \(JetMoeParallelExperts\)"),
        ("qwen3_vl_moe", {"text_config": {**SIZES, **EXPERTS}, "vision_config": VISION},
         "reads images and text, and only models of text run; its text part 'qwen3_vl_moe_text' has no model of its own"),
        ("qwen3_next", {**QWEN35, "layer_types": ["linear_attention"] * 2}, "no layer of 'qwen3_next' .* is one of attention"),
        ("llama", SIZES, "has no experts: it is no Mixture-of-Experts model"),
    ],
)  # fmt: skip
def test_why_a_family_does_not_run(model_type: str, sizes: dict, cause: str, tmp_path: Path) -> None:
    """The reason is the family's own, not that of a damaged checkpoint; it is found before any weight is looked at."""
    AutoConfig.for_model(model_type, **sizes).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=cause):
        prepare(tmp_path, EngineConfig(device="cpu"))


def test_the_text_part_can_be_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper whose class is no text model: the lines of the error make a folder that gives the whole model's tokens."""
    text = {**SIZES, **LATENT, "model_type": "deepseek_v3", "num_key_value_heads": 4, "intermediate_size": 64,
            "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1}  # fmt: skip
    eye = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = tmp_path / "whole"
    save(folder, "kimi_k25", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, text_config=text, vision_config=eye)
    message = refusal(folder, UnsupportedModelError)
    assert "which is of the family 'deepseek_v3'" in message
    lines = [line for line in remedy_lines(message).splitlines() if "AutoTokenizer." not in line]  # it has none
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    made: dict = {}
    exec("\n".join(lines), made)  # noqa: S102 - the lines a user is given
    made["whole"].set_experts_implementation("eager")
    assert our_tokens(tmp_path / "text") == stock_tokens(made["whole"])


def test_experts_named_by_a_pattern_of_transformers(tmp_path: Path) -> None:
    """Patterns of transformers' conversion table are regular expressions, such as kimi_linear's."""
    layers = {"layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16, "linear_num_heads": 4}
    sizes = {**SIZES, **LATENT, "num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": 32,
             "num_local_experts": 8, "num_experts_per_tok": 4}  # fmt: skip
    folder = save(tmp_path, "kimi_linear", **sizes, **layers)
    assert any(".block_sparse_moe.experts.0.w1" in key for key in load_file(folder / SINGLE_NAME))
    assert our_tokens(folder) == stock_tokens(load_resident(folder))


def test_layers_that_only_the_model_itself_can_serve(tmp_path: Path) -> None:
    """deepseek_v4: `LLM` and the plan name the layers, and what they point to gives the stock model's tokens."""
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "moe_intermediate_size": 32, "q_lora_rank": 16,
             "num_experts_per_tok": 4, "n_routed_experts": 8, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2,
             "index_head_dim": 16, "index_topk": 8, "hc_mult": 2}  # fmt: skip
    folder = save(tmp_path, "deepseek_v4", **sizes)
    message = refusal(folder, UnsupportedModelError)
    assert "layers of kind" in message
    assert "Use expertflow.from_pretrained and the model's own `generate`" in message
    notes = prepare(folder, EngineConfig(device="cpu", slots=8)).plan.shape.notes
    assert any(note.endswith("it runs through expertflow.from_pretrained only") for note in notes)
    model = from_pretrained(folder, slots=8, device="cpu")
    assert stock_tokens(model) == stock_tokens(load_resident(folder))
    model.expertflow.close()


def _quantise(folder: Path) -> None:
    """Random mxfp4 experts in a folder of gpt-oss, as its publisher stores them."""
    random = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for key, value in load_file(folder / SINGLE_NAME).items():
        if key.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = value.shape
            blocks = (experts, outer, inner // 32)
            tensors[f"{key}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8, generator=random)
            tensors[f"{key}_scales"] = torch.randint(122, 126, blocks, dtype=torch.uint8, generator=random)
        else:
            tensors[key] = value
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    _say(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _say(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_experts_that_older_versions_lost(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A dequantised model that was saved in the default way of an older transformers has one layer's experts: the error says so."""
    made = make_checkpoint("gpt_oss", "bfloat16", num_experts_per_tok=4, spread=0.3)
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())
    tensors = load_file(made / SINGLE_NAME)
    lost = {key.rpartition(".")[2] + "$" if key.endswith("_proj") and "experts" in key else key: value for key, value in tensors.items()}  # fmt: skip
    save_file(lost, tmp_path / SINGLE_NAME, {"format": "pt"})
    message = refusal(tmp_path, CheckpointError)
    assert "all but one layer's are lost" in message
    assert "save_original_format=False" in message


def test_an_mxfp4_model_is_the_one_that_transformers_decodes(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """gpt-oss as it is published gives the tokens of transformers' dequantised model."""
    made = make_checkpoint("gpt_oss", "bfloat16", num_experts_per_tok=4, spread=0.3)
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _quantise(tmp_path)
    stock = GptOssForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=transformers.Mxfp4Config(dequantize=True),
        experts_implementation="eager",
    )  # fmt: skip
    for tensor in (*stock.parameters(), *stock.buffers()):
        tensor.data = tensor.data.clone()
    assert our_tokens(tmp_path) == stock_tokens(stock)


@pytest.mark.parametrize(
    ("about", "cause"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size [128]"),
        ({"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {"g": {"format": "nvfp4-pack-quantized"}}},
         "with 'compressed-tensors' in the format 'nvfp4-pack-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": {"g": {"weights": {"num_bits": 8}}}},
         "'mxfp8-quantized'"),
        ({"quant_method": "hqq", "bits": 4}, "quantised with 'hqq'"),
        ({"quant_method": "gptq", "bits": 3}, "quantised by gptq to 3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "'NVFP4_AWQ'"),
        ("modelopt", "quantised with 'modelopt'"),
    ],
)  # fmt: skip
def test_what_no_format_decodes_is_refused_by_name(
    about: object, cause: str, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The error says by which method, and in which format, if the config states it."""
    made = make_checkpoint("qwen3_moe")
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE_NAME)
    if about == "modelopt":
        (tmp_path / "hf_quant_config.json").write_text("{}")
    else:
        _say(tmp_path, quantization_config=about)
    assert cause in refusal(tmp_path, UnsupportedModelError)


@pytest.mark.parametrize(
    ("names", "place", "cause"),
    [
        (["model-Q4_K.gguf"], "", "Give the path of one of them, such as"),
        (["model-Q4_K.gguf"], "model-Q4_K.gguf", "model-Q4_K.gguf is no whole GGUF file"),
        (["model.safetensors"], "model.safetensors", "is a file, and a checkpoint is a folder or a GGUF file"),
        (["adapter_config.json", "adapter_model.safetensors"], "", "AutoPeftModelForCausalLM"),
    ],
)
def test_places_that_hold_no_model(names: list[str], place: str, cause: str, tmp_path: Path) -> None:
    """GGUF files, single files and adapters are named as what they are."""
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert cause in refusal(tmp_path / place, CheckpointError)


def test_an_id_of_something_else_is_refused_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched for an id may be an adapter: it is named as in a folder."""
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="holds an adapter"):
        checkpoint.resolve("someone/some-adapter")


def test_a_config_without_a_dtype(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The model runs in the dtype of most expert weights, whatever the dense ones are, and the plan says so."""
    made = make_checkpoint("mixtral", "bfloat16", spread=0.3)
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _say(tmp_path, dtype=None)
    tensors = load_file(tmp_path / SINGLE_NAME)
    wide = {key: value if ".experts." in key else value.float() for key, value in tensors.items()}
    save_file(wide, tmp_path / SINGLE_NAME, {"format": "pt"})
    assert sum(v.numel() for v in wide.values() if v.dtype == torch.float32) > 1000
    assert our_tokens(tmp_path) == our_tokens(made)
    plan = prepare(tmp_path, EngineConfig(device="cpu", slots=8)).plan
    assert plan.shape.notes == ("config.json states no dtype: it runs in bfloat16, the dtype of most expert weights",)
    assert prepare(made, EngineConfig(device="cpu", slots=8)).plan.shape.notes == ()
    experts = next(key for key in tensors if ".experts." in key)
    save_file({**tensors, experts: tensors[experts].half()}, tmp_path / SINGLE_NAME, {"format": "pt"})
    assert "is stored as float16, most expert weights are bfloat16" in refusal(tmp_path, CheckpointError)


OUTSIDE = "is not in the table of families and runs by its own forward: no overlap, no graphs, cohorts"


def test_the_fallback_says_what_it_does_without(make_checkpoint: MakeCheckpoint, capsys: pytest.CaptureFixture) -> None:
    """A family outside the table: plan, summary and both as JSON say how it runs; one of the table says nothing."""
    folder = make_checkpoint("flex_olmo", **SIZES, num_experts=8, num_experts_per_tok=4, intermediate_size=32)
    shape = prepare(folder, EngineConfig(device="cpu", slots=8)).plan
    assert OUTSIDE in as_dict(shape)["notes"][0]
    small = ("--device", "cpu", "--max-length", 32)
    assert OUTSIDE in " ".join(run("plan", folder, *small).stdout.split())
    words = ("run", folder, "--prompt", "ab", "--max-tokens", 2, *small)
    assert OUTSIDE in json.loads(run(*words, "--json").stdout)["notes"][0]
    assert "its own forward" in " ".join(run(*words).stderr.split())
    known = make_checkpoint("mixtral")
    assert json.loads(run("plan", known, *small, "--json").stdout)["notes"] == []
    assert "Note" not in run("plan", known, *small).stdout
    capsys.readouterr()
