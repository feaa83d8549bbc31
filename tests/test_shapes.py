"""Published shapes with random weights through the bench: `benchmarks/shapes_h100.py`, as small models."""

import json
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import shapes_h100

from expertflow.bench.result import BELADY, DECODE, PEAK, RESIDENT, WARM, read_result
from expertflow.models.skeleton import build_skeleton


def test_a_shape_is_measured_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but a config is on disk: tokens are exact, peaks within plan."""
    options = "--strategies lru,next-use --slots 2/layer --batches 2 --tokens 4 --repeats 1 --tiny"
    shapes_h100.main(["--shape", "qwen", "--out", str(tmp_path / "results"), *options.split()])
    result = read_result(tmp_path / "results" / "shape_qwen.json")
    assert result.complete
    assert (result.model.name, result.model.model_type) == ("qwen1.5-moe-a2.7b-tiny-random", "qwen2_moe")
    assert {row.strategy for row in result.rows if row.state == WARM} == {"lru", "next-use", RESIDENT, BELADY}
    for row in result.rows:
        assert row.exact is (None if row.strategy in {RESIDENT, BELADY} else True)
        if row.strategy != BELADY:
            assert row.figures[DECODE].median > 0
            assert 0 < row.figures[PEAK].high <= row.figures[PEAK].bound
    assert "0 of them not exact" in capsys.readouterr().out
    again = shapes_h100.arguments(shlex.split(result.command)[2:])
    assert (again.shape, again.slots, again.strategies) == (("qwen",), "2/layer", "lru,next-use")
    assert "/" not in str(again.out)


def test_prompts_are_the_same_every_time(tmp_path: Path) -> None:
    """Random tokens of the vocabulary, none of them special."""
    for name in ("a", "b"):
        shapes_h100.write_prompts(tmp_path / name, 96)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    prompts = [json.loads(line)["tokens"] for line in (tmp_path / "a").read_text().splitlines()]
    assert len(prompts) == shapes_h100.PROMPTS
    assert all(shapes_h100.SHORTEST <= len(tokens) <= shapes_h100.LONGEST for tokens in prompts)
    assert all(shapes_h100.SPECIAL <= token < 96 for tokens in prompts for token in tokens)


@pytest.mark.parametrize(
    ("shape", "figures"),
    [("mixtral", (32, 8, 2, 352321536)), ("qwen", (24, 60, 4, 17301504)), ("deepseek", (26, 64, 6, 17301504))],
)
def test_full_sizes_are_the_published_ones(tmp_path: Path, shape: str, figures: tuple[int, ...]) -> None:
    """MoE layers, experts, experts a token, and bytes of an expert in bf16."""
    shapes_h100.SHAPES[shape].config(tiny=False).save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path, "auto")
    record = sum(spec.nbytes for spec in skeleton.specs)
    assert (len(skeleton.expert_modules), skeleton.experts, skeleton.top_k, record) == figures
