"""The Switch models' training tools: spans, rounding, and a checkpoint that is the trained model."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from switch.constants import EOS, PROMPTS_FILE, TINY, Recipe, Shape
from switch.data import corrupt, shift_right
from switch.evaluate import misled
from switch.model import build, export, grouped, loss_of
from switch.optim import Factored, round_to
from switch.train import Text, prepare_text, train

from expertflow import LLM, SamplingParams
from expertflow.bench.workload import OPENINGS
from expertflow.engine.llm import shipped_model
from expertflow.predict.artifact import load_artifact
from expertflow.predict.online import OnlinePredictor
from helpers import load_resident

RECIPE = replace(Recipe(), raw=60, batch=4, prompts=6, training_prompts=6, prompt_lengths=(16, 24), capacity=4.0)
SHAPE: Shape = replace(TINY, experts=4)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A small corpus."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(OPENINGS * 40))
    return prepare_text(path, SHAPE, RECIPE, 100_000)


def test_corruption_can_be_undone() -> None:
    """Putting each span of the written side in place of its sentinel gives the raw tokens back; the noise is as large as stated."""
    random = np.random.default_rng(3)
    raw = random.integers(3, 500, (5, 97))
    read, written = corrupt(raw, 600, RECIPE, random)
    for row in range(len(raw)):
        spans: dict[int, list[int]] = {}
        for token in written[row, :-1].tolist():
            if token >= 600:
                spans[token] = last = []
            else:
                last.append(token)
        back = [t for token in read[row, :-1].tolist() for t in (spans[token] if token >= 600 else [token])]
        assert back == raw[row].tolist()
        assert sum(map(len, spans.values())) == round(97 * RECIPE.noise)
        assert list(spans) == sorted(spans)
    assert (read[:, -1] == EOS).all()
    assert (shift_right(written)[:, 1:] == written[:, :-1]).all()


def test_rounding_by_chance_is_right_on_average() -> None:
    """A step far below a bf16 digit moves the mean of many weights by that step, which rounding to nearest would drop."""
    torch.manual_seed(0)
    target, exact = torch.empty(1 << 16, dtype=torch.bfloat16), torch.full((1 << 16,), 1.0 + 2**-10)
    assert exact.bfloat16().float().mean() == 1.0
    round_to(target, exact.clone())
    assert abs(float(target.float().mean()) - (1.0 + 2**-10)) < 2**-14
    assert set(target.tolist()) == {1.0, 1.0 + 2**-7}


def test_the_optimizer_learns(text: Text) -> None:
    """Thirty steps on one batch at least halve its loss, experts and dense weights together."""
    model = build(SHAPE, RECIPE, torch.device("cpu"), torch.float32)
    read, written = corrupt(
        text.corpus.train[: 4 * 60].reshape(4, 60), text.corpus.sentinel, RECIPE, np.random.default_rng(0)
    )
    parts = [torch.from_numpy(part) for part in (read, shift_right(written), written)]
    optimiser, losses = Factored(model.parameters()), []
    for _ in range(30):
        loss, balance = loss_of(model, *parts)
        (loss + balance * 0.01).backward()
        optimiser.step(0.05)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exported_model_is_the_trained_one(tmp_path: Path, dtype: torch.dtype) -> None:
    """Stock transformers gives the training model's logits from the checkpoint, as long as no expert is over its capacity."""
    model = build(SHAPE, replace(RECIPE, shard_bytes=100_000), torch.device("cpu"), dtype).eval()
    size = export(model, SHAPE, tmp_path, replace(RECIPE, shard_bytes=100_000))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stock = load_resident(tmp_path)
    assert next(stock.parameters()).dtype is dtype
    assert size["parameters"] == sum(p.numel() for p in {id(p): p for p in stock.parameters()}.values())
    ids = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        ours = model(input_ids=ids, decoder_input_ids=ids[:, :6]).logits.float()
        theirs = stock(input_ids=ids, decoder_input_ids=ids[:, :6]).logits.float()
    assert all(int((block.load > 0).sum()) > 1 for block in grouped(model))
    torch.testing.assert_close(ours, theirs, atol=2e-4 if dtype is torch.float32 else 0.15, rtol=0.02)


def test_training_writes_what_the_engine_runs(text: Text, tmp_path: Path) -> None:
    """Held-out loss falls; the folder has a tokenizer, prompts that the engine generates from, and a report."""
    report = train(text, SHAPE, RECIPE, torch.device("cpu"), 2.0, tmp_path)
    assert report["heldout"]["loss"] < report["heldout_before"]["loss"]
    assert json.loads((tmp_path / "training_report.json").read_text())["steps"] == report["steps"] > 3
    prompts = [json.loads(line)["tokens"] for line in (tmp_path / PROMPTS_FILE).read_text().splitlines()]
    assert len(prompts) == 6
    with LLM(tmp_path, slots="1/layer", strategy="lru", device="cpu", max_length=64) as llm:
        assert llm.tokenizer is not None
        outputs = llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [4] * 6


def test_a_misled_predictor_says_the_same_of_others() -> None:
    """Layer by layer the same chances, dealt to other experts; and the honest one is back behind it."""
    online = OnlinePredictor(load_artifact(Path(shipped_model()).parent / "novella_predictor"), 2)
    layers, _, top_k = online.artifact.shape
    inputs = torch.arange(2), torch.tensor([5, 9]), torch.zeros(2, layers, top_k, dtype=torch.long)
    honest = online.step(*inputs)
    online.free([0, 1])
    with misled():
        wrong = online.step(*inputs)
    online.free([0, 1])
    for right, other in zip(honest, wrong, strict=True):
        assert torch.equal(right.sort(-1).values, other.sort(-1).values)
        assert (right.argmax(-1) != other.argmax(-1)).float().mean() > 0.8
    assert torch.equal(online.step(*inputs).demand, honest.demand)
