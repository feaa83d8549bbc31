"""The engine as a service: one thread owns it, requests come from others, outputs leave by channels, totals are always true."""

import threading
from collections import Counter
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from expertflow import LLM, SamplingParams
from expertflow.cli.main import app
from expertflow.config import EngineConfig
from expertflow.engine.build import load_model
from expertflow.engine.engine import Engine
from expertflow.engine.request import Request, StreamOutput
from expertflow.engine.text import ModelText, RequestFactory, end_tokens
from expertflow.errors import ConfigError
from helpers import GUARD, MakeCheckpoint

PROMPTS = ["hello there", "good", "the sea was calm", "a", "it was night", "the end"]
PARAMS = [SamplingParams(max_tokens=3 + n, ignore_eos=True, temperature=n % 2, seed=n) for n in range(len(PROMPTS))]
OPTIONS = {"device": "cpu", "slots": 6, "max_batch": 2, "max_live": 3, "max_length": 48}


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("qwen3_moe", spread=0.3)


def test_one_thread_owns_the_engine(folder: Path) -> None:
    """Without `LLM`: requests are made elsewhere, each has an outbox, and gets the tokens that `LLM` gives it."""
    with LLM(folder, **OPTIONS) as llm:
        expected = [output.text for output in llm.generate(PROMPTS, PARAMS)]
    offloaded = load_model(folder, EngineConfig.from_mapping(OPTIONS))
    factory = RequestFactory(ModelText(folder), offloaded.plan, end_tokens(offloaded.model))
    engine, inbox = Engine(offloaded), SimpleQueue[tuple[Request, SimpleQueue[StreamOutput]] | None]()

    def work() -> None:
        more = True
        while more or engine.unfinished:
            try:
                entry = inbox.get(block=not engine.unfinished)
            except Empty:
                assert engine.step() == [], "every output has gone to its channel"
                continue
            more = entry is not None
            if entry is not None:
                engine.add(entry[0], entry[1].put)

    worker = threading.Thread(target=work)
    worker.start()
    outboxes = [SimpleQueue[StreamOutput]() for _ in PROMPTS]
    for prompt, params, outbox in zip(PROMPTS, PARAMS, outboxes, strict=True):
        inbox.put((factory.request(prompt, params), outbox))
    found = []
    for outbox in outboxes:
        pieces = [outbox.get(timeout=GUARD)]
        while pieces[-1].output is None:
            pieces.append(outbox.get(timeout=GUARD))
        assert "".join(piece.text for piece in pieces) == pieces[-1].output.text
        found.append(pieces[-1].output.text)
    inbox.put(None)
    worker.join(GUARD)
    offloaded.close()
    assert found == expected


def test_totals_are_true_after_every_step(folder: Path) -> None:
    """Whatever was added how, with a channel or without: tokens, prompts and finished requests are those seen so far."""
    with LLM(folder, **OPTIONS) as llm:
        engine, seen = llm.engine, list[StreamOutput]()
        assert (engine.totals.tokens, engine.totals.seconds) == (0, 0.0)
        for place, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
            engine.add(llm.request(prompt, params), seen.append if place % 2 else None)
        prompts = sum(len(one.token_ids) for one in ModelText(folder).read(PROMPTS))
        before = 0.0
        while engine.unfinished:
            seen += [output for _, output in engine.step()]
            totals = engine.totals
            assert totals == engine.totals
            assert (totals.tokens, totals.prompt_tokens) == (len(seen), prompts)
            assert totals.finished == sum(output.output is not None for output in seen)
            assert totals.seconds > before
            before = totals.seconds
        ends = [output.output for output in seen if output.output is not None]
        assert llm.stats.first_token_seconds == ends[-1].first_token_seconds
        assert llm.stats.tokens == sum(len(end.token_ids) for end in ends)
        totals.tokens = 0
        assert llm.stats.tokens == len(seen), "a reader has a copy"


@pytest.mark.parametrize("more", [[], ["--results", "out.jsonl"]])
def test_a_run_loads_its_tokenizer_and_reads_each_prompt_once(
    more: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What finds the length of the sequences is what generates: nothing is tokenised a second time."""
    read, loads, load, call = Counter[str](), [], AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.__call__

    def loading(*args: object, **kwargs: object) -> object:
        loads.append(args)
        return load(*args, **kwargs)

    def calling(self: PreTrainedTokenizerFast, text: str, *args: object, **kwargs: object) -> object:
        read[text] += 1
        return call(self, text, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", loading)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", calling)
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    result = CliRunner().invoke(
        app, ["run", str(folder), "--device", "cpu", "--max-tokens", "2", *given, *more], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert len(loads) == 1
    read.subtract(["a"])  # the tokenizer's first use, see `load_tokenizer`
    assert +read == Counter(PROMPTS)


def test_text_of_another_folder_is_refused(folder: Path, make_checkpoint: MakeCheckpoint) -> None:
    """A tokenizer that is not the model's would make `LLM.identity` untrue."""
    with pytest.raises(ConfigError, match="text is of"):
        LLM(folder, text=ModelText(make_checkpoint("mixtral")), **OPTIONS)


class Box(list[StreamOutput]):
    """A channel that is empty, and so false, at first."""

    def __call__(self, output: StreamOutput) -> None:
        self.append(output)


def test_a_channel_may_be_an_empty_container(folder: Path) -> None:
    """A channel is used because it was given, not because it is true."""
    with LLM(folder, **OPTIONS) as llm:
        box = Box()
        llm.engine.add(llm.request("good", SamplingParams(max_tokens=3, ignore_eos=True)), box)
        while llm.engine.unfinished:
            assert llm.engine.step() == []
    assert len(box) == 3


def test_an_unknown_rule_leaves_the_engine_as_it_was(folder: Path) -> None:
    """`reschedule` refuses before it changes anything: measured durations still reach the rule that admits."""
    with LLM(folder, **OPTIONS) as llm:
        llm.generate(PROMPTS, PARAMS)
        durations = llm.engine._durations
        with pytest.raises(ConfigError, match="admission='soon'"):
            llm.engine.reschedule("fifo", "soon")
        assert llm.engine._durations is durations
        llm.generate(PROMPTS, PARAMS)
