"""Results of many prompts in a file: in order, once each, whatever was interrupted."""

import json
from pathlib import Path

import pytest

from expertflow import LLM, SamplingParams
from expertflow.engine.offline import Results, finish
from expertflow.errors import ResultsError
from helpers import MakeCheckpoint

PROMPTS = ["hello there", "good", "the sea", "a", "it was", "the end"]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def work(llm: LLM, path: Path, most: int = 100) -> int:
    """Generate what is left; stop, as a crash would, after `most` finished requests. How many were run."""
    results, run = Results(path, PROMPTS, PARAMS, llm.fingerprint), 0
    for item in finish(llm, PROMPTS, PARAMS, results):
        if item.output is not None:
            assert item.output.prompt == PROMPTS[item.output.index] == PROMPTS[item.index]
            run += 1
            if run == most:
                results._file.close()  # and nothing else is done
                return run
    results.close()
    return run


def test_a_run_that_was_cut_off_is_gone_on_with(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Finished requests are not run again, a line cut in two is; at the end all are there, in order, as without a crash."""
    with LLM(make_checkpoint("qwen3_moe"), device="cpu", max_batch=2, max_live=3, max_length=32) as llm:
        expected = [output.text for output in llm.generate(PROMPTS, PARAMS)]
        path = tmp_path / "results.jsonl"
        assert work(llm, path, 2) == 2
        with path.open("ab") as file:
            file.write(b'{"index": 5, "te')
        assert work(llm, path, 1) == 1
        assert work(llm, path) == 3
        first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert first["prompts"] == 6
        assert [entry["index"] for entry in lines] == list(range(6))
        assert [entry["text"] for entry in lines] == expected
        assert [entry["prompt"] for entry in lines] == PROMPTS
        before = path.read_bytes()
        assert work(llm, path) == 0
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"my novel\n", "line 1 is no JSON"),
        (b"my novel", "no results file"),
        (b'{"title": "my novel"}\n', "no results file"),
        (
            b'{"expertflow_results": 1, "prompts": 2, "model": "x", "of": "y"}\n',
            r"another model.*\(2 prompts, model x; now f\)",
        ),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, content: bytes, match: str) -> None:
    """A file that holds something else is an error, and not touched."""
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=match):
        Results(path, PROMPTS, PARAMS, "f")
    assert path.read_bytes() == content


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    """A line that is no result of these prompts is pointed at; other sampling is another file."""
    path = tmp_path / "results.jsonl"
    Results(path, PROMPTS, PARAMS, "f").close()
    with path.open("ab") as file:
        file.write(b'{"index": 6}\n')
    with pytest.raises(ResultsError, match="line 2 is no result of these prompts"):
        Results(path, PROMPTS, PARAMS, "f")
    with pytest.raises(ResultsError, match="other sampling"):
        Results(path, PROMPTS, SamplingParams(max_tokens=6), "f")
    with pytest.raises(ResultsError, match="holds results of other prompts, other sampling, another dtype or"):
        Results(path, PROMPTS, PARAMS, "f bfloat16 32")
    path.unlink()
    with Results(path, PROMPTS, PARAMS, "f"), pytest.raises(ResultsError, match="cannot be used"):
        Results(path, PROMPTS, PARAMS, "f")  # another process writes it
    with pytest.raises(ResultsError, match="cannot be used"):
        Results(tmp_path / "nowhere" / "r.jsonl", PROMPTS, PARAMS, "f")
