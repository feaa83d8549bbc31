"""How many kernels a layer of a captured step takes: launches of ours are counted in place of being made, and torch's beside them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expertflow import LLM, SamplingParams
from expertflow.execution.blocks import layer
from expertflow.execution.kv_rows import DecodeInput
from expertflow.kernels.backend import Backend, backend
from expertflow.models.families import FAMILIES
from helpers import DEVICE, MakeCheckpoint

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="kernels need triton")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="kernels are counted where the interpreter stands for them"
)

MOST = 16
"""Kernels of a layer at most, of building blocks alone."""
FREE = {"aten::empty", "aten::new_empty", "aten::empty_like"}
"""Operations of torch that launch nothing, beside views."""
MADE = {name: family for name, family in FAMILIES.items() if not family.no_graph and name != "switch_transformers"}


class Counted(TorchDispatchMode):
    """Keeps the names of what would run on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not func.is_view and func._schema.name not in FREE:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("model_type", MADE)
def test_a_layer_takes_few_kernels(
    model_type: str, tokens: int, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than stated; none of them is torch's; DeepSeek-V2-Lite's layers take 12, and a norm more with several tokens."""
    lite = {"q_lora_rank": None} if model_type == "deepseek_v2" else {}
    options = {"device": "cpu", "execution": "graph", "slots": "100%", "max_batch": 4, "max_live": 4, "max_length": 300}
    with LLM(make_checkpoint(model_type, max_position_embeddings=512, **lite), **options) as llm:
        llm.generate([list(range(5, 90)), [7] * 9], SamplingParams(max_tokens=2, ignore_eos=True))
        offloaded = llm._offloaded
        decoder, experts, layers = offloaded.handover.decoder, offloaded.handover.decoder.experts, []
        blocks, ours = decoder._blocks, backend(torch.device("cuda"))
        own = blocks.run
        mode = Counted()

        def launch(kernel: Any, grid: Any) -> Callable[..., None]:
            del grid
            return lambda *_, **__: mode.names.append(kernel.fn.__name__)

        def run(*given: Any) -> torch.Tensor:
            mode.names.clear()
            with mode:
                out = own(*given)
            layers.append(list(mode.names))
            return out

        monkeypatch.setattr(blocks, "_kernels", ours)
        monkeypatch.setattr(experts, "_kernels", ours)
        monkeypatch.setattr(blocks, "run", run)
        monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", launch)
        llm._engine._executor.decode([DecodeInput(row, 5, row, 3) for row in range(tokens)])
        assert experts.fixed
    assert len(layers) == FAMILIES[model_type].tiny["num_hidden_layers"]
    for names in layers:
        assert len(names) <= MOST, names
        assert not [name for name in names if "::" in name], names
    if model_type == "deepseek_v2":
        assert len(layers[-1]) == 12 + (tokens > 1), layers[-1]


def test_passes_over_prompts_take_products_that_need_no_compiler(
    make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a prompt's tokens, and no step's."""
    products, own = list[int](), layer.backend

    def counting(device: torch.device) -> Backend:
        kernels = own(device)

        def product(states: torch.Tensor, *given: Any) -> torch.Tensor:
            products.append(len(states))
            result: torch.Tensor = kernels.prompt_product(states, *given)
            return result

        return replace(kernels, prompt_product=product)

    monkeypatch.setattr(layer, "backend", counting)
    options = {"execution": "graph", "predictor": "none", "slots": "50%", "max_batch": 1, "max_length": 32}
    with LLM(make_checkpoint("qwen3_moe"), device=str(DEVICE), **options) as llm:
        llm.generate([[3, 5, 7, 9]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert set(products) == {4}
