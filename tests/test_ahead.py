"""Steps that begin before the host knows the tokens of the step before: the same tokens, and where that is not done."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.engine.request import StreamOutput
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.replay import Replay
from expertflow.execution.sampler import Chosen, Unread
from expertflow.execution.sampling.logprobs import Logprob
from helpers import DEVICES, MakeCheckpoint, MakePredictor

PROMPTS = ["hello there", "good", "the sea was calm"]
GREEDY = SamplingParams(max_tokens=14, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("qwen3_moe", spread=0.3)


def open_llm(folder: Path, device: str = "cpu", **options: object) -> LLM:
    more = {"execution": "graph", "max_length": 64, "max_batch": 3, "slots": 6, **options}
    return LLM(folder, device=device, **more)


def count_steps(llm: LLM, breaks_at: int = 0) -> list[bool]:
    """Notes for every decode step from now on whether its tokens were on the device; the given one raises once it is queued."""
    executor, found = llm.engine._executor, list[bool]()
    decode = executor.decode

    def counted(fed: Sequence[DecodeInput], tokens: Tensor | None = None) -> Tensor:
        found.append(tokens is not None)
        logits = decode(fed, tokens)
        if len(found) == breaks_at:
            raise RuntimeError("out of luck")
        return logits

    executor.decode = counted
    return found


def tokens_of(llm: LLM, params: Sequence[SamplingParams], prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """What `generate` gives, the second time: every size of a step has been captured."""
    for _ in range(2):
        outputs = llm.generate(list(prompts), list(params))
    return [list(output.token_ids) for output in outputs]


def by_the_host(llm: LLM, params: Sequence[SamplingParams], prompts: Sequence[str] = PROMPTS) -> list[list[int]]:
    """The same, while somebody looks at the logits of every step: then none begins ahead."""
    llm.engine.watch_logits(lambda *_: None)
    found = tokens_of(llm, params, prompts)
    llm.engine.watch_logits(None)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_steps_ahead_give_the_tokens_of_steps_that_wait(
    folder: Path, device: str, predicted: bool, temperature: float, make_predictor: MakePredictor
) -> None:
    """Greedy and drawn, of sequences of several lengths, with a predictor and without; most steps take their tokens on the device."""
    options = {"strategy": "plec", "predictor": str(make_predictor(folder))} if predicted else {}
    params = [
        SamplingParams(max_tokens=count, ignore_eos=True, temperature=temperature, top_p=0.9, seed=count)
        for count in (14, 5, 9)
    ]
    with open_llm(folder, device, **options) as llm:
        steps = count_steps(llm)
        expected = by_the_host(llm, params)
        assert not any(steps)
        steps.clear()
        assert tokens_of(llm, params) == expected
        assert [len(tokens) for tokens in expected] == [14, 5, 9]
        assert sum(steps) >= len(steps) / 2
        assert llm.predictor_failure is None
        if predicted:
            live = llm._offloaded.live_predictor
            assert live is not None
            assert live.took(range(llm.engine.begun)), "each token was taken in once"


@pytest.mark.parametrize("device", DEVICES)
def test_penalties_and_bias_need_no_wait(folder: Path, device: str) -> None:
    """Changes of logits depend on tokens that the host has by then: those before the step that runs. Beside them is a request without any."""
    params = [
        SamplingParams(max_tokens=14, ignore_eos=True, repetition_penalty=1.8, presence_penalty=0.4),
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, top_p=0.9, frequency_penalty=1.5, seed=5),
        SamplingParams(max_tokens=9, min_tokens=6, stop_token_ids=[11], logit_bias={11: 100.0, 12: 60.0}),
        GREEDY,
    ]
    prompts = [*PROMPTS, "a"]
    with open_llm(folder, device, max_batch=4) as llm:
        plain = by_the_host(llm, [GREEDY] * 4, prompts)
        steps = count_steps(llm)
        expected = by_the_host(llm, params, prompts)
        assert not any(steps)
        steps.clear()
        assert tokens_of(llm, params, prompts) == expected
        assert sum(steps) >= len(steps) / 2
        assert expected[0] != plain[0]
        assert expected[2] == [12] * 6 + [11], "no ending before six tokens, then at once"
        assert expected[3] == plain[3]


@pytest.mark.parametrize("device", DEVICES)
def test_log_probabilities_need_no_wait(folder: Path, device: str) -> None:
    """They are of the step that the token was chosen from, though the next one has begun; requests may want several, one or none."""
    params = [
        SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.8, seed=count, logprobs=most)
        for count, most in ((9, None), (14, 5), (11, 0))
    ]
    with open_llm(folder, device) as llm:
        steps = count_steps(llm)
        llm.engine.watch_logits(lambda *_: None)
        expected = llm.generate(PROMPTS, params)
        llm.engine.watch_logits(None)
        assert not any(steps)
        steps.clear()
        found = llm.generate(PROMPTS, params)
        assert sum(steps) >= len(steps) / 2
        for one, other in zip(found, expected, strict=True):
            assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
        assert [[len(line) for line in one.logprobs or ()] for one in found] == [[], [6] * 14, [1] * 11]


def test_what_is_left_keeps_its_places() -> None:
    """Tokens, faults and log-probabilities of some sequences, in another order."""
    first, second = (Logprob(4, -1.0, 1),), (Logprob(6, -2.0, 3),)
    chosen = Chosen([4, 5, 6], {1: "odd"}, [first, None, second])
    assert chosen.of([2, 1]) == Chosen([6, 5], {1: "odd"}, [second, None])
    assert chosen.of([1, 0]) == Chosen([5, 4], {0: "odd"}, [None, first])


class Script:
    """A mask that allows what the script says, by position: some tokens, or an error."""

    def __init__(self, script: Sequence[Sequence[int] | Exception]) -> None:
        self._script, self.seen = script, list[int]()

    def fill(self, row: np.ndarray) -> None:
        allowed = self._script[len(self.seen)]
        if isinstance(allowed, Exception):
            raise allowed
        for token in allowed:
            row[token // 32] |= np.array(1 << (token % 32), np.uint32).view(np.int32)

    def accept(self, token: int) -> None:
        self.seen.append(token)


@pytest.mark.parametrize("device", DEVICES)
def test_masks_need_no_wait(folder: Path, device: str) -> None:
    """A mask is filled in behind the token before. One that fails, allows nothing or nothing possible ends its request, and no other one."""
    several = [(n + 5, 90 - n, n + 20) for n in range(14)]
    late = SamplingParams(max_tokens=14, min_tokens=10, stop_token_ids=[7])
    cases: list[tuple[list[object], SamplingParams, str | None]] = [
        (several, SamplingParams(max_tokens=14, ignore_eos=True, temperature=1.0, seed=3, logprobs=1), None),
        ([*several[:5], ValueError("odd")], GREEDY, "its mask failed"),
        ([*several[:3], ()], GREEDY, "its mask allows no token"),
        ([*several[:4], (7,)], late, "only tokens that are forbidden"),
    ]
    with open_llm(folder, device, max_batch=5) as llm:

        def outputs() -> list[list[StreamOutput]]:
            found = list[list[StreamOutput]]()
            for script, params, _ in [*cases, (None, GREEDY, None)]:
                found.append([])
                mask = None if script is None else Script(script)  # type: ignore[arg-type]
                llm.engine.add(llm.request("good", params, mask=mask), found[-1].append)
            while llm.engine.unfinished:
                llm.engine.advance()
            return found

        steps = count_steps(llm)
        llm.engine.watch_logits(lambda *_: None)
        expected = outputs()
        llm.engine.watch_logits(None)
        assert not any(steps)
        steps.clear()
        outputs()
        found = outputs()
        assert sum(steps) >= len(steps) / 3
        for one, other in zip(found, expected, strict=True):
            assert [out.token_id for out in one] == [out.token_id for out in other]
            assert str(one[-1].error) == str(other[-1].error)
        for mine, waited in zip(found[0], expected[0], strict=True):  # others leave a step later
            assert mine.logprobs[0].token_id == waited.logprobs[0].token_id == mine.token_id
            assert mine.logprobs[0].logprob == pytest.approx(waited.logprobs[0].logprob, abs=1e-4)
        for (script, _, fault), one in zip(cases, found, strict=False):
            assert len(one) == len(script)
            assert all(out.token_id in allowed for out, allowed in zip(one, several, strict=False) if out.error is None)
            assert (fault or "None") in str(one[-1].error)
        assert len(found[-1]) == 14


@pytest.mark.parametrize("device", DEVICES)
def test_a_text_may_end_by_itself(folder: Path, device: str) -> None:
    """A sequence that met a stop token took part in one more step; the others, and who gets its row, are as without it."""
    with open_llm(folder, device, max_live=3) as llm:
        plain = by_the_host(llm, [GREEDY] * 3)
        params = [GREEDY, SamplingParams(max_tokens=14, ignore_eos=True, stop_token_ids=[plain[1][5]]), GREEDY, GREEDY]
        prompts = [*PROMPTS, "a"]
        expected = by_the_host(llm, params, prompts)
        steps = count_steps(llm)
        assert tokens_of(llm, params, prompts) == expected
        assert len(expected[1]) < 14
        assert any(steps)


def test_a_cancelled_request_leaves_a_step_that_has_begun(folder: Path) -> None:
    """The others go on; the row is another's at once; when nobody is left, what has begun is forgotten."""
    with open_llm(folder, admission="at once") as llm:
        expected = by_the_host(llm, [GREEDY] * 3)
        engine, found = llm.engine, dict[int, list[int]]()

        def add(prompt: str) -> int:
            def keep(output: StreamOutput) -> None:
                found[number].append(output.token_id)

            number = engine.add(llm.request(prompt, GREEDY), keep)
            found[number] = []
            return number

        first, second = add(PROMPTS[0]), add(PROMPTS[1])
        while len(found[second]) < 4:
            engine.advance()
        assert engine.ahead.begun is not None
        engine.cancel(second)
        third = add(PROMPTS[2])
        while len(found[first]) < 14:
            engine.advance()
        assert found[first] == expected[0]
        assert found[third]
        while len(found[third]) < 12:
            engine.advance()
        assert engine.ahead.begun is not None
        assert found[third] == expected[2][: len(found[third])]
        engine.cancel(third)
        assert engine.ahead.begun is None
        assert engine.unfinished == 0
        assert tokens_of(llm, [GREEDY] * 3) == expected


@pytest.mark.parametrize("predicted", [False, True])
def test_a_step_ahead_that_breaks_loses_nothing(folder: Path, predicted: bool, make_predictor: MakePredictor) -> None:
    """The tokens of the step before it are sent, and the sequences go on from there."""
    options = {"strategy": "plec", "predictor": str(make_predictor(folder))} if predicted else {}
    with open_llm(folder, **options) as llm:
        expected = by_the_host(llm, [GREEDY] * 2, PROMPTS[:2])
        engine, found, broken = llm.engine, [list[int](), list[int]()], 0
        steps = count_steps(llm, breaks_at=4)
        for prompt, tokens in zip(PROMPTS, found, strict=False):
            engine.add(llm.request(prompt, GREEDY), lambda output, tokens=tokens: tokens.append(output.token_id))
        while engine.unfinished:
            try:
                engine.advance()
            except RuntimeError:
                broken += 1
                assert steps == [False, True, True, True]
                assert [len(tokens) for tokens in found] == [4, 4]
        assert broken == 1
        assert found == expected
        assert llm.predictor_failure is None


@pytest.mark.parametrize("where", ["while the tokens are waited for", "in a channel"])
def test_an_interrupt_loses_no_token(folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step behind has begun by then: requests whose token was not sent get it first, and go on with that step."""
    with open_llm(folder) as llm:
        expected = by_the_host(llm, [GREEDY] * 2, PROMPTS[:2])
        engine, found, read = llm.engine, [list[int](), list[int]()], Unread.read

        def interrupt(*_: object) -> Chosen:
            monkeypatch.setattr(Unread, "read", read)
            raise KeyboardInterrupt

        def first(output: StreamOutput) -> None:
            found[0].append(output.token_id)
            if where == "in a channel" and len(found[0]) == 4:
                raise KeyboardInterrupt

        engine.add(llm.request(PROMPTS[0], GREEDY), first)
        engine.add(llm.request(PROMPTS[1], GREEDY), lambda output: found[1].append(output.token_id))
        while len(found[1]) < 3:
            engine.advance()
        assert engine.ahead.begun is not None
        if where != "in a channel":
            monkeypatch.setattr(Unread, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.advance()
        assert len(found[1]) == 3
        while engine.unfinished:
            engine.advance()
        assert found == expected


def test_an_interrupt_behind_a_prompt_loses_no_token(folder: Path) -> None:
    """Prompts that were read together and have no token yet get theirs first."""
    with open_llm(folder) as llm:
        expected = by_the_host(llm, [GREEDY] * 2, PROMPTS[:2])
        found = [list[int](), list[int]()]

        def first(output: StreamOutput) -> None:
            found[0].append(output.token_id)
            if len(found[0]) == 1:
                raise KeyboardInterrupt

        llm.engine.add(llm.request(PROMPTS[0], GREEDY), first)
        llm.engine.add(llm.request(PROMPTS[1], GREEDY), lambda output: found[1].append(output.token_id))
        with pytest.raises(KeyboardInterrupt):
            llm.engine.advance()
        assert [len(tokens) for tokens in found] == [1, 0]
        while llm.engine.unfinished:
            llm.engine.advance()
        assert found == expected


def test_closing_lets_go_of_a_step_that_has_begun(folder: Path) -> None:
    """It holds the captured steps' logits."""
    llm = open_llm(folder)
    llm.engine.add(llm.request(PROMPTS[0], GREEDY))
    for _ in range(4):
        llm.engine.step()
    assert llm.engine.ahead.begun is not None
    llm.close()
    assert llm.engine.ahead.begun is None


def test_recorded_tokens_are_fed_ahead(folder: Path) -> None:
    """They are known already, so they come from the host; where only some sequences have one, steps wait."""
    recorded = [[5, 6, 7, *range(20, 34)], [8, 9, *range(40, 55)]]
    plain = SamplingParams(max_tokens=14, ignore_eos=True)
    some = [recorded[0], [8, 9, *[-1] * 15]]
    for known, ahead, params in (
        (recorded, True, plain),
        (some, False, plain),
        (recorded, False, replace(plain, logprobs=2)),
    ):
        with open_llm(folder, routing=Replay(tokens=known)) as llm:
            steps = count_steps(llm)
            with mock.patch.object(llm.engine, "_run_on", wraps=llm.engine._run_on) as run_on:
                outputs = llm.generate([tokens[: 3 - n] for n, tokens in enumerate(recorded)], params)
            assert list(outputs[0].token_ids) == recorded[0][3:17]
            assert run_on.called == ahead
            assert not any(steps)
            if known is recorded:
                assert list(outputs[1].token_ids) == recorded[1][2:16]
            if params.logprobs is not None:  # of what is recorded
                assert [line[0].token_id for line in outputs[1].logprobs] == recorded[1][2:16]


def test_a_waiting_request_is_let_in(folder: Path) -> None:
    """While a row is free and a request waits, no step begins ahead; while none is free, steps do."""
    with open_llm(folder, max_live=2, max_batch=2) as llm:
        steps = count_steps(llm)
        found = tokens_of(llm, [SamplingParams(max_tokens=6, ignore_eos=True)] * 3)
        assert any(steps)
        assert found == by_the_host(llm, [SamplingParams(max_tokens=6, ignore_eos=True)] * 3)


def test_a_token_that_is_none_is_not_fed(folder: Path) -> None:
    """Where logits are no numbers the request fails, and the step that has begun was fed 0 in its place."""
    with open_llm(folder) as llm:
        by_the_host(llm, [GREEDY] * 2, PROMPTS[:2])
        decoder, outputs = llm._offloaded.handover.decoder, list[StreamOutput]()
        assert decoder is not None
        launch, count = decoder.launch, [0]

        def spoiled(batch: int, columns: int) -> None:
            launch(batch, columns)
            count[0] += 1
            if count[0] == 3:
                decoder.logits[0].fill_(torch.nan)
                decoder.best[0] = -1

        decoder.launch = spoiled
        for prompt in PROMPTS[:2]:
            llm.engine.add(llm.request(prompt, GREEDY), outputs.append)
        while llm.engine.unfinished:
            llm.engine.advance()
        assert sum(output.error is not None for output in outputs) == 1
        assert sum(output.output is not None for output in outputs) == 1
