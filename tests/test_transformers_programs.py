"""Programs written against transformers: an offloaded model does what the stock model does, or refuses at the call."""

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CompileConfig,
    PreTrainedModel,
    pipeline,
)

from expertflow import LLM, EngineConfig, from_pretrained
from expertflow.config import OF_OTHERS
from expertflow.errors import ClosedError, ConfigError, DeviceError, UnsupportedModelError
from helpers import MakeCheckpoint, load_resident

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(7))
FLEX_OLMO = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32,
}  # fmt: skip
"""A family outside the table, which runs by its own forward."""
SMALL = {
    "qwen3_moe": {"num_hidden_layers": 2},
    "flex_olmo": {"num_hidden_layers": 2, **FLEX_OLMO},
    "switch_transformers": {"num_layers": 1, "num_decoder_layers": 1},
}
Pair = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture
def compiler() -> Iterator[list[torch.fx.GraphModule]]:
    """Graphs that a compiler of this test was given."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


@pytest.fixture
def pair(make_checkpoint: MakeCheckpoint) -> Iterator[Pair]:
    """An offloaded model with 3 slots, and the stock model."""
    folder = make_checkpoint("qwen3_moe", num_hidden_layers=2)
    model = from_pretrained(folder, slots=3, device="cpu")
    yield model, load_resident(folder)
    model.expertflow.close()


def logits(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    extra = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(ids, **extra).logits


def tokens(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    return model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, **options)


def by_torch_compile(model: PreTrainedModel, backend: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(model, backend=backend)


def by_its_method(model: PreTrainedModel, backend: Callable[..., Any]) -> Callable[..., Any]:
    model.compile(backend=backend)
    return model


def by_its_forward(model: PreTrainedModel, backend: Callable[..., Any]) -> Callable[..., Any]:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


@pytest.mark.parametrize(
    ("model_type", "compiled"),
    [("qwen3_moe", by_its_method), ("flex_olmo", by_torch_compile), ("switch_transformers", by_its_forward)],
)
def test_a_compiled_model_is_exact(
    model_type: str, compiled: Callable[..., Any], make_checkpoint: MakeCheckpoint, compiler: list[Any]
) -> None:
    """Logits of compiled passes are stock's, experts are decided anew in each, and the model stays right afterwards."""
    folder = make_checkpoint(model_type, **SMALL[model_type])
    stock, model = load_resident(folder), from_pretrained(folder, slots=3, device="cpu")

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiler.append(graph)
        return graph.forward

    fast = compiled(model, backend)
    for ids in (IDS, IDS.flip(1)):
        assert torch.equal(logits(fast, ids), logits(stock, ids))
    assert compiler, "nothing was compiled"
    torch.compiler.set_stance("force_eager")
    try:
        assert torch.equal(logits(model), logits(stock))
    finally:
        torch.compiler.set_stance("default")
    assert model.expertflow.counters.steps == 3 * (2 if model_type == "switch_transformers" else 1)
    model.expertflow.controller.table.check_integrity()
    model.expertflow.close()


def test_generate_compiles_its_own_steps_exactly(pair: Pair, compiler: list[Any]) -> None:
    """The path of `generate` that transformers takes on CUDA, where it compiles decode steps over a static cache."""
    del compiler
    model, stock = pair
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    compiled = tokens(model, cache_implementation="static", compile_config=config)  # two shapes: a prompt, one token
    assert hasattr(model, "_compiled_call")
    assert torch.equal(compiled, tokens(stock))
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:The CUDA Graph is empty")
def test_generate_over_a_static_cache_on_cuda(make_checkpoint: MakeCheckpoint, cuda: torch.device) -> None:
    """Transformers compiles these steps by itself; tokens are stock's."""
    folder = make_checkpoint("qwen3_moe", num_hidden_layers=2)
    stock, model = load_resident(folder).to(cuda), from_pretrained(folder, slots=3, device=cuda)
    ids = IDS.to(cuda)
    expected = tokens(stock, ids, cache_implementation="static")
    assert torch.equal(tokens(model, ids, cache_implementation="static"), expected)
    assert hasattr(model, "_compiled_call")
    assert torch.equal(tokens(model, ids), tokens(stock, ids))


@pytest.mark.parametrize("model_type", SMALL)
def test_threads_share_a_model(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """Passes of several threads run one after the other: every thread gets its own tokens, and hidden states too."""
    folder = make_checkpoint(model_type, **SMALL[model_type])
    stock, model = load_resident(folder), from_pretrained(folder, slots=3, device="cpu")
    prompts = [IDS[:, :length] for length in (3, 5, 6, 9)]
    expected = [tokens(stock, prompt) for prompt in prompts]
    wrong: list[object] = []

    def work(first: int) -> None:
        for place in range(first, first + 8):
            try:
                got = tokens(model, prompts[place % 4])
            except Exception as error:  # noqa: BLE001 - of whatever kind, in a thread
                wrong.append(error)
            else:
                wrong.extend([] if torch.equal(got, expected[place % 4]) else ["other tokens"])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    model.expertflow.controller.table.check_integrity()
    model.expertflow.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_lets_the_next_thread_in(error: type[BaseException], pair: Pair) -> None:
    """An error inside a pass, or Ctrl-C, does not keep other threads out."""
    model, stock = pair

    def fail(*_: object) -> None:
        raise error

    with model.model.layers[1].register_forward_pre_hook(fail), pytest.raises(error):
        logits(model)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.append(logits(model)), daemon=True)
    thread.start()
    thread.join(900)
    assert got, "the thread waits for ever"
    assert torch.equal(got[0], logits(stock))


def test_a_hook_may_call_the_model(pair: Pair) -> None:
    """A pass inside a pass of the same thread neither waits for itself nor changes the outer one."""
    model, stock = pair
    inner: list[Tensor] = []

    def call(*_: object) -> None:
        hook.remove()
        inner.append(logits(model, IDS[:1, :5]))

    hook = model.model.layers[0].register_forward_hook(call)
    assert torch.equal(logits(model), logits(stock))
    assert torch.equal(inner[0], logits(stock, IDS[:1, :5]))


def test_parts_of_the_model_can_be_called(pair: Pair) -> None:
    """Hidden states by the base model and logits by `forward` are stock's, and each call is a step."""
    model, stock = pair
    with torch.no_grad():
        assert torch.equal(model.model(IDS).last_hidden_state, stock.model(IDS).last_hidden_state)
        assert torch.equal(model.forward(IDS).logits, stock.forward(IDS).logits)
    assert model.expertflow.counters.steps == 2


CONVERSIONS = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device": lambda m: m.to("meta"),
    "type": lambda m: m.type(torch.float16),
    "to_empty": lambda m: m.to_empty(device="meta"),
    "base model": lambda m: m.model.half(),
    "one layer": lambda m: m.model.layers[0].to(torch.bfloat16),
}
STATES = {
    "strict": lambda m, s: m.load_state_dict(s.state_dict()),
    "not strict": lambda m, s: m.load_state_dict(s.state_dict(), strict=False),
    "base model": lambda m, s: m.model.load_state_dict(s.model.state_dict(), strict=False),
    "assigned": lambda m, _: m.load_state_dict(dict(m.named_parameters()), strict=False, assign=True),
}


def test_conversions_are_refused_at_the_call(pair: Pair) -> None:
    """A call that would change dtype or device names both and changes nothing; one that would not is allowed."""
    model, stock = pair
    for name, convert in CONVERSIONS.items():
        with pytest.raises(UnsupportedModelError, match=r"its experts are float32 on cpu"):
            pytest.fail(f"accepted: {name}, {convert(model)}")
    for same in (model.to("cpu"), model.to(torch.float32), model.to("cpu", torch.float32), model.float(), model.cpu()):
        assert same is model
    assert torch.equal(logits(model), logits(stock))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_moving_to_a_device_that_is_not_there_is_refused(pair: Pair) -> None:
    """The cause is torch's own words."""
    with pytest.raises(UnsupportedModelError, match="converted or moved"):
        pair[0].cuda()


def test_other_experts_cannot_be_loaded(pair: Pair) -> None:
    """A state with experts in it is refused whole; dense weights of another model are taken over."""
    model, stock = pair
    with torch.no_grad():
        stock.lm_head.weight.add_(1)
    before = logits(model)
    for name, load in STATES.items():
        with pytest.raises(UnsupportedModelError, match="cannot be given other"):
            pytest.fail(f"accepted: {name}, {load(model, stock)}")
    assert torch.equal(logits(model), before)
    dense = {name: value for name, value in stock.state_dict().items() if ".experts." not in name}
    model.load_state_dict(dense)
    assert torch.equal(logits(model), logits(stock))


def test_state_dict_says_once_what_it_lacks(pair: Pair) -> None:
    """The dense weights by stock's names; one warning, and no second."""
    model, stock = pair
    with pytest.warns(UserWarning, match="holds its dense weights only"):
        state = model.state_dict()
    assert set(state) == {name for name in stock.state_dict() if ".experts." not in name}
    assert model.load_state_dict(model.state_dict()).missing_keys == []


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", "switch_transformers"])
def test_parameters_are_counted_as_in_the_stock_model(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """Experts count, biases and encoder included."""
    folder = make_checkpoint(model_type)
    stock, model = load_resident(folder), from_pretrained(folder, slots=3, device="cpu")
    assert model.num_parameters() == stock.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == stock.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == 0
    model.expertflow.close()


@pytest.mark.parametrize(
    "use",
    [
        copy.deepcopy,
        copy.copy,
        pickle.dumps,
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: copy.deepcopy(model.model),
        lambda model: pickle.dumps(model.model.layers[0].mlp.experts),
    ],
)
def test_copies_are_refused(use: Callable[[PreTrainedModel], object], pair: Pair) -> None:
    """A copy would take the expert store along, or share it without saying so."""
    with pytest.raises(UnsupportedModelError, match="cannot be copied or pickled"):
        use(pair[0])


def test_an_llm_is_not_copied_either(make_checkpoint: MakeCheckpoint) -> None:
    """The same for what holds a model."""
    with LLM(make_checkpoint("qwen3_moe"), slots=3, device="cpu") as llm, pytest.raises(UnsupportedModelError):
        copy.deepcopy(llm)


def test_training_is_refused(pair: Pair) -> None:
    """Whatever leads to a backward pass says so; a gradient that needs no experts is right."""
    model, stock = pair
    embedded = model.get_input_embeddings()(IDS).requires_grad_()
    for begin in (
        model.train,
        model.requires_grad_,
        model.gradient_checkpointing_enable,
        model.enable_input_require_grads,
        lambda: model(inputs_embeds=embedded),
        model(IDS, labels=IDS).loss.backward,
        model(IDS).logits.sum().backward,
        model(IDS, return_dict=False)[0].sum().backward,
    ):
        with pytest.raises(UnsupportedModelError, match=r"trained|gradient|backward"):
            begin()
    for one in (model, stock):
        one.requires_grad_(False).train(False).lm_head.requires_grad_(True)
        one(IDS, labels=IDS).loss.backward()
    assert torch.equal(model.lm_head.weight.grad, stock.lm_head.weight.grad)


def test_logits_are_written_into_as_in_the_stock_model(pair: Pair) -> None:
    """Programs that forbid tokens do so in place, also outside `torch.no_grad()`."""
    written = []
    for one in pair:
        found = one(IDS).logits
        found[:, :, 3] = -100.0
        found[:, -1] /= 2
        written.append(found.detach())
    assert torch.equal(*written)


def test_a_frozen_model_is_a_constant(pair: Pair) -> None:
    """A student learns from the logits of a teacher that `requires_grad_(False)` froze, as from the stock teacher."""
    gradients = []
    for one in pair:
        scale = torch.ones(96, requires_grad=True)
        (scale * one.requires_grad_(False)(IDS).logits).sum().backward()
        gradients.append(scale.grad)
    assert torch.equal(*gradients)


def test_the_base_model_refuses_the_same(pair: Pair, tmp_path: Path) -> None:
    """The model without its head is a model as well: saved, it would lose its experts without a word."""
    base, stock = pair[0].model, pair[1].model
    for use in (
        lambda: base.save_pretrained(tmp_path),
        lambda: base.set_experts_implementation("grouped_mm"),
        base.train,
        base.requires_grad_,
        base.gradient_checkpointing_enable,
    ):
        with pytest.raises(UnsupportedModelError, match="an offloaded model cannot be"):
            use()
    assert base.num_parameters() == stock.num_parameters()
    assert type(base).__name__ == type(stock).__name__
    assert isinstance(base, type(stock))
    with pytest.warns(UserWarning, match="holds its dense weights only"):
        base.state_dict()


@pytest.mark.filterwarnings("ignore")  # deprecations of torch and transformers
def test_traces_and_exports_are_refused(pair: Pair) -> None:
    """They would keep the experts of the example."""
    for export in (torch.jit.trace, torch.export.export):
        with pytest.raises(UnsupportedModelError, match="cannot be traced or exported"):
            export(pair[0], (IDS,), strict=False)


@pytest.mark.parametrize("model_type", SMALL)
def test_a_model_rebuilt_from_the_config_is_stock(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """The config of an offloaded model, or its class, makes an ordinary model, of the same arithmetic."""
    folder = make_checkpoint(model_type, **SMALL[model_type])
    stock, model = load_resident(folder), from_pretrained(folder, slots=3, device="cpu")
    with pytest.raises(UnsupportedModelError, match="another experts implementation"):
        model.set_experts_implementation("eager")
    build = (AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM).from_config
    assert type(type(model).from_pretrained(folder)) is type(stock)
    for rebuilt in (build(model.config), type(model)(model.config)):
        rebuilt.load_state_dict(stock.state_dict())
        assert torch.equal(logits(rebuilt.eval()), logits(model))
        rebuilt.half()
    model.expertflow.close()


def test_torch_objects_are_taken_as_options(make_checkpoint: MakeCheckpoint) -> None:
    """`torch.dtype` and `torch.device` mean what their names mean."""
    by_name = EngineConfig(dtype="bfloat16", device="cuda")
    assert EngineConfig(dtype=torch.bfloat16, device=torch.device("cuda")) == by_name
    model = from_pretrained(make_checkpoint("qwen3_moe"), dtype=torch.bfloat16, device=torch.device("cpu"), slots=3)
    assert model.dtype == torch.bfloat16
    model.expertflow.close()
    for wrong in ({"dtype": torch.float64}, {"dtype": 16}, {"device": 0}, {"device": torch.device("mps")}):
        with pytest.raises(ConfigError, match="is unknown"):
            EngineConfig(**wrong)


def test_only_a_visible_device_is_taken(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that torch does not see is refused; the error names the last one it sees."""
    folder = make_checkpoint("qwen3_moe")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        DeviceError, match=r"'cuda:1'.*the last CUDA device torch sees is 'cuda:0'.*CUDA_VISIBLE_DEVICES"
    ):
        from_pretrained(folder, device=torch.device("cuda:1"))


@pytest.mark.parametrize("name", OF_OTHERS)
def test_options_of_transformers_are_refused_by_name(name: str) -> None:
    """Before anything is read, with what to do in their place."""
    with pytest.raises(ConfigError, match=rf"unknown option '{name}'\. (?!Did you mean|Known)"):
        EngineConfig.from_mapping({name: "auto"})


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_stated_one(model_type: str, attention: str, make_checkpoint: MakeCheckpoint) -> None:
    """Bits are those of the stock model with the same attention, where the family has it."""
    folder = make_checkpoint(model_type)
    stock = load_resident(folder)
    if model_type == "gpt_oss" and attention == "sdpa":
        with pytest.raises(ConfigError, match="attn_implementation='sdpa' cannot run this family"):
            from_pretrained(folder, slots=3, device="cpu", attn_implementation=attention)
        return
    stock.set_attn_implementation(attention)
    model = from_pretrained(folder, slots=3, device="cpu", attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert torch.equal(logits(model), logits(stock))
    model.expertflow.close()


def test_attention_that_was_never_compared_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """With the ones that were."""
    with pytest.raises(ConfigError, match=r"flash_attention_2.* Known: eager, sdpa"):
        from_pretrained(make_checkpoint("qwen3_moe"), attn_implementation="flash_attention_2")


def test_surroundings_of_loading(make_checkpoint: MakeCheckpoint) -> None:
    """A default device is named as the cause; inference mode while loading does not bind later passes."""
    folder = make_checkpoint("qwen3_moe")
    with torch.device("meta"), pytest.raises(DeviceError, match="torch's default device is 'meta'"):
        from_pretrained(folder, device="cpu")
    with torch.inference_mode():
        model = from_pretrained(folder, slots=3, device="cpu")
        llm = LLM(folder, slots=3, device="cpu")
    assert torch.equal(logits(model), logits(load_resident(folder)))
    assert len(llm.generate([IDS[0].tolist()])[0].token_ids) > 0
    llm.close()
    model.expertflow.close()
    for call in (logits, tokens, lambda closed: closed.model(IDS)):
        with pytest.raises(ClosedError):
            call(model)


def test_tools_around_a_model_see_an_ordinary_one(pair: Pair, make_checkpoint: MakeCheckpoint) -> None:
    """Pipelines, beams, autocast and larger embeddings give what they give with the stock model."""
    tokenizer = AutoTokenizer.from_pretrained(make_checkpoint("qwen3_moe", num_hidden_layers=2))

    def results(model: PreTrainedModel) -> tuple[object, ...]:
        texts = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
            "abc", max_new_tokens=4, do_sample=False
        )
        beams = tokens(model, num_beams=3, num_return_sequences=2)
        with torch.autocast("cpu", torch.bfloat16):
            cast = logits(model)
        torch.manual_seed(0)
        model.resize_token_embeddings(100)
        return texts, beams.tolist(), cast.tolist(), logits(model).tolist()

    assert results(pair[0]) == results(pair[1])
