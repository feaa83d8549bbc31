"""A model on a CUDA device that is not the current one: same tokens, and nothing on the other device."""

import threading

import pytest
import torch

from expertflow import LLM, SamplingParams, from_pretrained
from expertflow.engine.prepare import SHIPPED_MODEL
from expertflow.errors import DeviceError
from helpers import MakeCheckpoint

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
PROMPTS = ["The old house stood at the end of the lane, and", "She said", "In the morning", "A ship"]


@pytest.mark.parametrize(
    "options", [{"execution": "host"}, {"execution": "graph"}, {"execution": "graph", "strategy": "next-use"}]
)
def test_the_second_device_gives_the_firsts_tokens(options: dict[str, str]) -> None:
    """Loading, passes, captured steps and calls from another thread use the stated device alone, within its plan."""
    found = []
    for own, other in ((0, 1), (1, 0)):
        torch.cuda.reset_peak_memory_stats(other)
        before = torch.cuda.memory_allocated(other)
        with LLM(device=f"cuda:{own}", slots="40%", dtype="float32", **options) as llm:
            tokens = [one.token_ids for one in llm.generate(PROMPTS, SamplingParams(max_tokens=48))]
            beside: list[tuple[int, ...]] = []
            thread = threading.Thread(
                target=lambda llm=llm, into=beside: into.append(
                    tuple(llm.generate(PROMPTS[0], SamplingParams(max_tokens=8))[0].token_ids)
                )
            )
            thread.start()
            thread.join()
            assert llm.plan.execution == options["execution"]
            assert torch.cuda.max_memory_allocated(other) == before
        found.append((tokens, beside))
        assert torch.cuda.current_device() == 0
    assert found[0] == found[1]
    assert found[0][1]


def test_a_plain_model_runs_on_the_second_device() -> None:
    """`from_pretrained(device="cuda:1")` gives the logits of the first device."""
    logits = []
    for device in ("cuda:0", "cuda:1"):
        model = from_pretrained(SHIPPED_MODEL, device=device, slots="40%", dtype="float32")
        ids = torch.tensor([[5, 6, 7, 8]], device=device)
        with torch.inference_mode():
            logits.append(model(ids).logits.cpu())
        model.expertflow.close()
    assert torch.equal(*logits)


def test_a_device_that_is_not_there_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    """The error names the last device there is."""
    with pytest.raises(DeviceError, match="the last CUDA device"):
        LLM(make_checkpoint("mixtral"), device=f"cuda:{torch.cuda.device_count()}")
