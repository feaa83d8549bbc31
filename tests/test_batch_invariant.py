"""`batch_invariant`: a request's bits are its own, whatever shares its steps and passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.engine.prepare import prepare
from expertflow.errors import ConfigError
from helpers import DEVICES, MakeCheckpoint

FAMILIES = ["gpt_oss", "deepseek_v2"]
PROMPTS = [
    [3 + (7 * number + place * (number + 1)) % 90 for place in range(3 + 5 * number + 100 * (number == 6))]
    for number in range(8)
]


def opened(folder: Path, device: str) -> LLM:
    options = {"max_batch": 4, "max_live": 8, "max_length": 200, "prefill_chunk": 32, "slots": 9, "execution": "graph"}
    return LLM(folder, device=device, batch_invariant=True, predictor="none", **options)


def logits_of(llm: LLM, numbers: list[int], apart: int = 0) -> dict[int, list[Tensor]]:
    """Logits of every token of some prompts, added at once, or so many steps apart."""
    engine, found, kinds = llm.engine, {number: [] for number in numbers}, {}

    def watch(members: list[int], logits: Tensor) -> None:
        for member, line in zip(members, logits, strict=True):
            found[kinds[member]].append(line.clone())

    engine.watch_logits(watch)
    waiting = list(numbers)
    while waiting or engine.unfinished:
        for number in [waiting.pop(0) for _ in range(1 if apart else len(waiting)) if waiting]:
            params = SamplingParams(max_tokens=4 + number % 3, ignore_eos=True)
            kinds[engine.add(llm.request(PROMPTS[number], params))] = number
        for _ in range(apart or 1):
            engine.step()
    engine.watch_logits(None)
    return found


def by_shape(own: Callable[..., Tensor], dim: int) -> Callable[..., Tensor]:
    """An operation whose result depends on how many rows, or columns, it is given, as a library's choice of a kernel may."""

    def computed(*given: Any, **more: Any) -> Tensor:
        found = own(*given, **more)
        return found * (1 + (found.shape[dim] if dim == -1 else found.shape[:-1].numel()) / 256)

    return computed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_equal_in_any_company(
    family: str, device: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16: alone, with seven others, and with others that come and go; also where every shape has bits of its own."""
    if device == "cpu":  # there products this small have the same bits in every shape
        monkeypatch.setattr(torch.nn.Linear, "forward", by_shape(torch.nn.Linear.forward, 0))
        for place in (torch.Tensor, torch.nn.functional):
            monkeypatch.setattr(place, "softmax", by_shape(place.softmax, -1))
    with opened(make_checkpoint(family, "bfloat16", spread=0.3, max_position_embeddings=256), device) as llm:
        alone = {}
        for number in range(len(PROMPTS)):
            alone |= logits_of(llm, [number])
        for order, apart in (([*range(8)], 0), ([5, 2, 7, 0, 1, 6, 3, 4], 3)):
            found = logits_of(llm, order, apart)
            for number, lines in alone.items():
                assert len(found[number]) == 4 + number % 3
                assert torch.equal(torch.stack(found[number]), torch.stack(lines)), number


def test_what_the_host_would_decide_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Host execution computes steps of any size, and so does a step that is recorded."""
    folder = make_checkpoint("qwen3_moe", max_position_embeddings=256)
    with pytest.raises(ConfigError, match="batch_invariant cannot be had: this is host execution"):
        prepare(folder, EngineConfig(device="cpu", batch_invariant=True))
    with opened(folder, "cpu") as llm:
        with pytest.raises(ConfigError, match="batch_invariant excludes"), llm.record(tmp_path / "a.trace"):
            pass
        assert len(llm.generate(PROMPTS[0], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2
