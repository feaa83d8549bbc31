"""How many tokens of each prompt a pass reads: by room, by time, and at borders of pages."""

import random
from math import ceil

import pytest

from expertflow import LLM, SamplingParams
from expertflow.engine.plan import Plan
from expertflow.schedule.portions import Pace, Unread, columns, portions
from expertflow.schedule.scheduler import Prefill, Scheduler
from helpers import MakeCheckpoint

TOKEN, LAYERS = 3e-5, {None: 1e-8, 128: 2e-8}
PAGE = 64


def seconds_of(begin: int, end: int) -> float:
    """What tokens take, one by one."""
    seen = [sum(each * min(place + 1, window or place + 1) for window, each in LAYERS.items()) for place in range(begin, end)]  # fmt: skip
    return sum(TOKEN + one for one in seen)


def pace_of(bound: float, least: int = 128) -> Pace:
    return Pace(token=TOKEN, columns=tuple(LAYERS.items()), bound=bound, least=least)


def test_tokens_take_what_each_takes_alone() -> None:
    """Sums of single tokens, and the most tokens of a time, found by trying."""
    draw, pace = random.Random(3), pace_of(1.0)
    for _ in range(40):
        begin, count = draw.choice([0, 5, 127, 128, 129, draw.randrange(9000)]), draw.randrange(1, 400)
        seconds = seconds_of(begin, begin + count)
        assert pace.seconds(begin, begin + count) == pytest.approx(seconds)
        assert pace.tokens(begin, seconds * (1 + 1e-9)) == count
        assert pace.tokens(begin, seconds * (1 - 1e-9)) == count - 1
    assert pace.tokens(9, 0.0) == 0
    assert pace_of(0.001).allowed(5000) == pytest.approx(seconds_of(5000, 5128))
    assert pace_of(99.0).allowed(5000) == 99.0


@pytest.mark.parametrize("unequal", [True, False])
def test_a_pass_lasts_no_longer_than_it_may(unequal: bool) -> None:
    """Random prompts, beside a sequence that steps or alone: time, room and borders hold, every token is read once, no pass reads little."""
    draw = random.Random(7)
    for _ in range(60):
        chunk, bound, beside = PAGE * draw.randrange(4, 40), draw.choice([0.01, 0.05, 0.1]), draw.random() < 0.7
        prompts = [draw.choice([draw.randrange(1, 90), draw.randrange(1, 9000)]) for _ in range(draw.randrange(1, 5))]
        options = {"chunk": chunk, "unequal": unequal, "page": PAGE, "pace": pace_of(bound)}
        scheduler, read = Scheduler(rows=6, batch=5, **options), [0] * len(prompts)
        if beside:
            scheduler.add(99, 3)
            scheduler.done(scheduler.next())
        for number, prompt in enumerate(prompts):
            scheduler.add(number, prompt)
        while read != prompts:
            turn = scheduler.next()
            if not isinstance(turn, Prefill):
                continue
            first, left = turn.parts[0], sum(prompts) - sum(read)
            allowed = max(bound, seconds_of(first.begin, first.begin + 128)) if beside else 1e9
            lasts = sum(seconds_of(done, prompt) for done, prompt in zip(read, prompts, strict=True))
            spent = sum(seconds_of(part.begin, part.end) for part in turn.parts)
            assert spent <= allowed * (1 + 1e-9)
            assert sum(part.end - part.begin for part in turn.parts) <= chunk
            assert first.sequence == next(place for place in range(len(prompts)) if read[place] < prompts[place])
            for part in turn.parts:
                assert part.begin == read[part.sequence] < part.end
                assert part.last == (part.end == prompts[part.sequence])
                assert part.last or part.end % PAGE == 0
                read[part.sequence] = part.end
                if part.last:
                    scheduler.remove(part.sequence)
            scheduler.done(turn)
            cut = [part for part in turn.parts if not part.last]
            if unequal and cut:  # what is left would not do for one more page of each that goes on
                more = sum(seconds_of(part.end, part.end + PAGE) for part in cut)
                size = chunk if beside else left / ceil(left / chunk)
                room = size - sum(part.end - part.begin for part in turn.parts)
                time = lasts / 2 if lasts <= 2 * allowed else allowed
                assert room < PAGE * len(prompts) or spent + more > 0.6 * time


def test_passes_that_follow_one_another_have_about_as_many_tokens() -> None:
    """No more of them than with full ones, and none of them short; or full ones, where bits go by pieces of one size."""

    def sizes(prompts: list[int], *, even: bool) -> list[int]:
        scheduler, found = Scheduler(rows=4, batch=4, chunk=10 * PAGE, unequal=True, page=PAGE, even=even), list[int]()
        for number, prompt in enumerate(prompts):
            scheduler.add(number, prompt)
        while scheduler.live or scheduler.waiting:
            turn = scheduler.next()
            assert isinstance(turn, Prefill)
            found.append(sum(part.end - part.begin for part in turn.parts))
            scheduler.done(turn)
            for part in turn.parts:
                if part.last:
                    scheduler.remove(part.sequence)
        return found

    assert sizes([16 * PAGE], even=True) == [8 * PAGE, 8 * PAGE]
    assert sizes([16 * PAGE], even=False) == [10 * PAGE, 6 * PAGE]
    assert sizes([21 * PAGE + 5], even=True) == [8 * PAGE, 7 * PAGE, 6 * PAGE + 5]
    assert sizes([12 * PAGE, 40, 3 * PAGE], even=True) == [8 * PAGE - 24, 7 * PAGE + 64]
    assert sizes([10 * PAGE], even=True) == [10 * PAGE]
    assert sizes([7], even=True) == [7]


def test_short_prompts_share_a_pass_with_one_behind_a_long_context() -> None:
    """It gets half of the time, or all that they leave; a pass of few tokens of it would last too long for them, and they go first."""
    bound = seconds_of(0, 2000)
    found = portions([Unread(8000, 16000), Unread(0, 40), Unread(0, 3000)], 4096, PAGE, pace_of(bound))
    assert found[0] % PAGE == 0
    assert seconds_of(8000, 8000 + found[0]) <= bound / 2 < seconds_of(8000, 8000 + found[0] + PAGE)
    assert found[1] == 40
    assert found[2] % PAGE == 0
    left = bound - seconds_of(8000, 8000 + found[0]) - seconds_of(0, 40)
    assert seconds_of(0, found[2]) <= left < seconds_of(0, found[2] + PAGE)
    alone = portions([Unread(8000, 16000), Unread(0, 40)], 4096, PAGE, pace_of(bound))
    assert bound - seconds_of(0, 40) - seconds_of(8000, 8000 + alone[0]) < seconds_of(9000, 9000 + PAGE)
    assert alone[1] == 40
    assert columns([Unread(8000, 16000), Unread(0, 3000)], 4096, PAGE, pace_of(bound)) == found[0]


def test_a_pace_changes_no_token(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is read in ever smaller pieces beside a sequence has the tokens that it has alone."""
    folder = make_checkpoint("qwen3_moe", max_position_embeddings=1024)
    prompt, short = [3 + place * 7 % 60 for place in range(400)], [5, 9, 4]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    options = {"max_batch": 2, "max_length": 410, "prefill_chunk": 256, "slots": "50%", "execution": "graph"}
    with LLM(folder, device="cpu", predictor="none", **options) as llm:
        alone = [list(one.token_ids) for one in llm.generate([prompt], params)]
    growing = Pace(token=1e-9, columns=((None, 1.0),), bound=42000.0, least=64)
    monkeypatch.setattr(Plan, "pace", growing)
    sizes = list[int]()
    with LLM(folder, device="cpu", predictor="none", **options) as llm:
        found: dict[int, list[int]] = {}

        for prompted, tokens in ((short, 9), (prompt, 2)):
            request = llm.request(prompted, SamplingParams(max_tokens=tokens, ignore_eos=True))
            llm.engine.add(request, lambda one, to=prompted: found.setdefault(len(to), []).append(one.token_id))
            if prompted is short:
                llm.engine.step()
        own = llm.engine._executor.prefill
        monkeypatch.setattr(llm.engine._executor, "prefill", lambda chunks, *more: sizes.extend(len(one.tokens) for one in chunks) or own(chunks, *more))  # fmt: skip
        while llm.engine.unfinished:
            llm.engine.step()
    assert [found[len(prompt)]] == alone
    assert sizes == [256, 128, 16]  # 128 tokens behind 256 see 41,024 in all, and a page more would be 63,264
