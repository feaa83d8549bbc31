"""Prompts that begin as earlier ones: what is read again is little, and no token changes."""

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.config import EngineConfig
from expertflow.engine.plan import make_plan
from expertflow.engine.prepare import prepare
from expertflow.errors import ConfigError
from expertflow.execution.kv import layout, prefix
from expertflow.execution.kv.blocks import WORTH, BlockStore, names_of
from expertflow.execution.kv.copies import Move, PageCopies
from expertflow.execution.kv.paged import PagedCache, Span
from expertflow.memory.arena import HostArena
from expertflow.models.context import ForwardContext
from expertflow.schedule.scheduler import Decode, Prefill, Scheduler
from expertflow.trace.format import load_trace
from helpers import MakeCheckpoint, MakePredictor
from test_attention import LIKE_OLMOE, RECURRENT

PAGE = 8
FAMILIES = ["gpt_oss", "qwen3_moe", "deepseek_v2"]
"""With windows of 8 tokens, without, and with latents."""
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
OPTIONS = {"device": "cpu", "slots": 9, "max_length": 80, "max_batch": 3, "prefill_chunk": 24, "predictor": "none"}


def text(seed: int, count: int) -> list[int]:
    return [random.Random(seed + place).randint(3, 90) for place in range(0, 1000 * count, 1000)]


@contextmanager
def opened(folder: Path, **options: object) -> Iterator[LLM]:
    """A model with small pages, and restarts inside of prompts every 16 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("expertflow.execution.kv.layout", "expertflow.engine.planning.kv", "expertflow.engine.plan"):
            patch.setattr(f"{module}.PAGE", PAGE)
        patch.setattr(prefix, "APART", 16)
        assert layout.PAGE == PAGE
        with LLM(folder, **{**OPTIONS, **options}) as llm:
            yield llm
            rows = llm._offloaded.handover.rows
            books = [] if rows is None else rows.cache.books
            assert all(book.pool.free == book.kind.pages - layout.SPARE for book in books), "every page came back"
            assert llm._engine._scheduler._left == llm.plan.kv_layout.pages


def answers(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams = PARAMS) -> list[tuple[int, ...]]:
    """Answers of prompts that come one after the other."""
    return [llm.generate([prompt], params)[0].token_ids for prompt in prompts]


def forget(llm: LLM) -> None:
    """Drop all that is kept."""
    while llm._offloaded.prefixes.evict():
        pass


def fresh(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams = PARAMS) -> list[tuple[int, ...]]:
    """Answers of prompts that are read whole."""
    found = []
    for prompt in prompts:
        forget(llm)
        output = llm.generate([prompt], params)[0]
        assert output.cached_tokens == 0
        found.append(output.token_ids)
    return found


def cached(llm: LLM, *prompts: list[int]) -> list[int]:
    return [llm.generate([prompt], PARAMS)[0].cached_tokens for prompt in prompts]


class Asked:
    """A request of the soak: a drawn prompt, and tokens that follow it."""

    def __init__(self, tokens: list[int], answer: int) -> None:
        self.prompt_token_ids, self.answer, self.cached_tokens = tuple(tokens), answer, 0
        self.kept = len(tokens) + answer

    def unscored(self, *_: int) -> range:
        return range(0)

    def value(self, position: int) -> float:
        """What stands for the keys of a token: a number that all tokens up to it make."""
        tokens = [*self.prompt_token_ids, *range(1000, 1000 + self.answer)]
        return float(zlib.crc32(bytes(str(tokens[: position + 1]), "ascii")) % 2**20)


class Soak:
    """Random requests through scheduler, pages and host memory, without a model: every token must see its own beginning."""

    def __init__(self, seed: int, windows: tuple[int | None, ...]) -> None:
        self.draw, self.windows = random.Random(seed), windows
        self.rows, length, chunk = self.draw.randint(1, 4), 48, self.draw.randint(3, 20)
        sizes = layout.Layout.of(
            windows, rows=self.rows, length=length, tokens=self.draw.randint(48, 48 * self.rows), chunk=chunk
        )
        self.context, device = ForwardContext(), torch.device("cpu")
        self.cache = PagedCache(sizes, self.context, device)
        arena = HostArena(self.draw.choice([400, 3000, 20000]), pin=False)
        piece = self.draw.choice([4, 4, 6, 10])
        copies = PageCopies(self.cache.stacks, arena, device, 0)
        self.store = BlockStore(arena)
        self.prefixes = prefix.PrefixCache(self.cache, copies, self.store, piece=piece, generated=seed % 2 == 0)
        self.scheduler = Scheduler(
            rows=self.rows, batch=self.rows, chunk=chunk, unequal=seed % 3 > 0, pages=sizes.pages, page=4,
            beginnings=self.prefixes,
        )  # fmt: skip
        self.asked: dict[int, Asked] = {}
        self.written: dict[int, int] = {}
        self.reused = 0

    def add(self, number: int) -> None:
        trunk = self.draw.choice([text(1, 40), text(2, 40), text(1, 17) + text(3, 23)])
        tokens = trunk[: self.draw.randint(1, 36)] + text(self.draw.randint(4, 9), self.draw.randint(0, 5))
        asked = self.asked[number] = Asked(tokens, self.draw.randint(1, 6))
        self.scheduler.add(number, len(tokens), asked.kept)
        self.prefixes.expect(number, asked)

    def write(self, spans: list[Span], numbers: Sequence[int]) -> None:
        """One pass; what each token sees is compared with what its own tokens make."""
        columns = np.concatenate([np.arange(span.begin, span.end) for span in spans])[None]
        values = [
            self.asked[number].value(at)
            for span, number in zip(spans, numbers, strict=True)
            for at in range(span.begin, span.end)
        ]
        for span in spans:
            if span.begin == 0:
                self.cache.open(span.row, self.asked[numbers[spans.index(span)]].kept)
        rows = torch.tensor([span.row for span in spans])
        with self.cache.passing(spans, columns) as cells:
            pages = self.cache.of_pass(cells, rows, max(span.end for span in spans))
            states = torch.tensor(values)[None, None, :, None].expand(1, 1, -1, 2)
            with self.context.carry(rows=rows, end=max(span.end for span in spans), pages=pages):
                for layer, window in enumerate(self.windows):
                    keys, others = self.cache.update(states + layer, states - layer, layer)
                    for place, (span, number) in enumerate(zip(spans, numbers, strict=True)):
                        first = max(0, span.begin - (window or span.end) + 1)
                        expected = torch.tensor([self.asked[number].value(at) for at in range(first, span.end)])
                        assert torch.equal(keys[place, 0, first : span.end, 0], expected + layer)
                        assert torch.equal(others[place, 0, first : span.end, 1], expected - layer)

    def run(self, steps: int) -> None:
        coming = iter(range(10**6))
        for _ in range(steps):
            if self.draw.random() < 0.4 and self.scheduler.waiting < 4:
                self.add(next(coming))
            if self.asked and self.draw.random() < 0.08:
                self.end(self.draw.choice(sorted(self.asked)))
            task = self.scheduler.next()
            if isinstance(task, Prefill):
                for part in task.parts:
                    self.reused += self.asked[part.sequence].cached_tokens if part.sequence not in self.written else 0
                    self.written[part.sequence] = part.end
                self.write(
                    [Span(self.scheduler.row(part.sequence), part.begin, part.end) for part in task.parts],
                    task.sequences,
                )
                self.scheduler.done(task)
            elif isinstance(task, Decode):
                self.write(
                    [Span(self.scheduler.row(one), self.written[one], self.written[one] + 1) for one in task.sequences],
                    task.sequences,
                )
                for one in task.sequences:
                    self.written[one] += 1
                    if self.written[one] == self.asked[one].kept:
                        self.end(one)
            self.check()
        for number in sorted(self.asked):
            self.end(number)
        assert [book.pool.free for book in self.cache.books] == [
            kind.pages - layout.SPARE for kind in self.cache.layout.kinds
        ]

    def end(self, number: int) -> None:
        """As `Engine` does: the scheduler first, the pages last."""
        asked, row = self.asked[number], self.scheduler.row(number) if self.scheduler.lives(number) else None
        self.scheduler.remove(number)
        tokens = [*asked.prompt_token_ids, *range(1000, 1000 + asked.answer)]
        self.prefixes.leave(number, tokens[: self.written.pop(number, 0)])
        if row is not None:
            self.cache.leave(row)
        del self.asked[number]

    def check(self) -> None:
        """Free pages are those that the scheduler counts, but for rows that are not open yet."""
        assert self.store.nbytes <= self.store._arena.nbytes
        if None in self.windows:
            book = self.cache.books[[kind.window for kind in self.cache.layout.kinds].index(None)]
            live = self.scheduler._live.items()
            unopened = sum(one.pages for number, one in live if number not in self.written and not one.read)
            assert book.pool.free == self.scheduler._left + unopened


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("windows", [(None,), (5, None), (None, 9, 4), (6,)])
def test_every_token_sees_its_own_beginning(
    windows: tuple[int | None, ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that share beginnings come, end and are cancelled at random, in little memory of either kind."""
    monkeypatch.setattr(layout, "PAGE", 4)
    monkeypatch.setattr(prefix, "APART", 12)
    soak = Soak(seed, windows)
    soak.run(100)
    assert soak.reused or soak.store._arena.nbytes == 400


def test_memory_is_lent_once() -> None:
    """Pieces never overlap, what comes back is lent again, and what is used is what is out."""
    draw, arena, out, owner = random.Random(0), HostArena(500, pin=False), dict[int, int](), np.zeros(500, dtype=bool)
    for _ in range(3000):
        if draw.random() < 0.55:
            size = draw.choice([7, 20, 33])
            begin = arena.take(size)
            if begin is None:
                runs = "".join("x" if taken else "." for taken in owner).split("x")
                assert max(map(len, runs)) < size
                continue
            assert not owner[begin : begin + size].any()
            out[begin], owner[begin : begin + size] = size, True
        elif out:
            begin = draw.choice(sorted(out))
            size = out.pop(begin)
            arena.give_back(begin, size)
            owner[begin : begin + size] = False
        assert arena.used == owner.sum()
    for begin, size in out.items():
        arena.give_back(begin, size)
    assert arena.take(500) == 0


def test_names_cover_all_that_is_before() -> None:
    """Equal names mean equal beginnings; a part of a block has no name."""
    one, other = text(1, 30), text(1, 13) + text(2, 17)
    assert len(names_of(one, 8)) == 3
    assert [a == b for a, b in zip(names_of(one, 8), names_of(other, 8), strict=True)] == [True, False, False]
    assert names_of([*one[:8], *one[:8]], 8)[0] != names_of([*one[:8], *one[:8]], 8)[1]


class Kept:
    """The rule by which memory is kept, without an order that is kept up: every decision looks at all blocks."""

    def __init__(self, room: int, worth: float) -> None:
        self.room, self.worth, self.time = room, worth, 0
        self.values: dict[bytes, tuple[float, int]] = {}

    def ask(self, names: list[bytes]) -> None:
        for name in names:
            if name in self.values:
                continue
            self.time += 1
            while len(self.values) == self.room:
                left = [name for name in self.values if name not in names]
                if not left:
                    break
                del self.values[min(left, key=self.values.__getitem__)]
            if len(self.values) == self.room:
                break
            self.values[name] = (self.time, 0)
        self.time += 1
        kept = [(place, name) for place, name in enumerate(names) if name in self.values]
        for place, name in kept:
            worth = (self.time + self.worth * len(kept), -place)
            self.values[name] = max(self.values[name], worth)


def ask(store: BlockStore, names: list[bytes]) -> None:
    """As `PrefixCache` does."""
    for name in names:
        if name not in store and store.put(store.add(name), 0, 0, 10, frozenset(names)) is None:
            store.remove(name)
            break
    store.use(names)


@pytest.mark.parametrize("worth", [0.0, 1.0, 3.0])
def test_what_is_worth_least_goes_first(worth: float) -> None:
    """By the rule as it is written; and a block is never there without the one before it."""
    draw, room = random.Random(0), 30
    store, kept = BlockStore(HostArena(10 * room, pin=False), worth), Kept(room, worth)
    trunks = [text(seed, 320) for seed in range(4)]
    for step in range(400):
        trunk = draw.choice(trunks)[: 8 * draw.randint(0, 38)]
        names = names_of([*trunk, *text(1000 + step, 8 * draw.choice([0, 1, 2, 9]))], 8)
        ask(store, names)
        kept.ask(names)
        assert {name for name in kept.values if name in store} == kept.values.keys()
        assert len(store) == len(kept.values)
        assert all(names[place] not in store or names[place - 1] in store for place in range(1, len(names)))
        if draw.random() < 0.1 and len(store):
            assert store.drop()
            del kept.values[min(kept.values, key=kept.values.__getitem__)]
    assert len(store._order) <= 2 * len(store) + 50, "what is forgotten leaves nothing behind"


def test_what_is_spared_is_not_dropped() -> None:
    """A prompt's own blocks stay, and where there are no others nothing is dropped."""
    store, names = BlockStore(HostArena(50, pin=False)), names_of(text(0, 40), 8)
    ask(store, names)
    assert store.put(store.add(b"more"), 0, 0, 10, [*names, b"more"]) is None
    assert all(name in store for name in names)
    assert store.put(store.get(b"more"), 0, 0, 10, [*names[:4], b"more"]) is not None
    assert [name in store for name in names] == [True] * 4 + [False]


@pytest.mark.parametrize(("worth", "left"), [(0.0, 0), (WORTH, 40)])
def test_short_requests_do_not_drop_a_long_chat(worth: float, left: int) -> None:
    """Forty blocks of a chat, then titles of two blocks in memory for fifty: by last use alone the chat is soon gone."""
    store, chat = BlockStore(HostArena(500, pin=False), worth), names_of(text(0, 320), 8)
    ask(store, chat)
    for title in range(25):
        ask(store, names_of(text(1 + title, 16), 8))
    assert sum(name in store for name in chat) == left
    for title in range(25, 200):
        ask(store, names_of(text(1 + title, 16), 8))
    assert not any(name in store for name in chat), "what nothing asks for again is forgotten in the end"


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_five_turns_read_only_what_is_new(family: str, execution: str, make_checkpoint: MakeCheckpoint) -> None:
    """A template opens reasoning at a prompt's end and drops it later: each turn reads its new tokens, and less than a piece of what stands in both prompts; tokens are those of a fresh run."""
    folder, opening = make_checkpoint(family, spread=0.3), [91, 92]
    history, prompts, hits = text(1, 29), list[list[int]](), 0
    with opened(folder, execution=execution, prefix_memory="8MiB") as llm:
        found = []
        for turn in range(5):
            prompts.append([*history, *opening])
            output = llm.generate([prompts[-1]], PARAMS)[0]
            found.append(output.token_ids)
            common = 0 if turn == 0 else len(prompts[-2]) - len(opening)
            assert common - PAGE < output.cached_tokens <= common
            hits += output.cached_tokens
            history = [*history, *output.token_ids[2:], *text(50 + turn, 7)]
        stats = llm.stats
        assert stats.prefix_cache_queries == sum(map(len, prompts))
        assert stats.prefix_cache_hits == hits
        assert stats.peak_bytes <= llm.plan.total
    with opened(folder, execution=execution) as llm:
        assert answers(llm, prompts) == found
        assert llm.stats.prefix_cache_queries == 0


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_prompts_that_part_in_the_middle(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """A prompt restarts at the last block it has in common; where windows matter, at the last restart before it."""
    whole = text(1, 61)
    prompts = [whole, whole[:47] + text(2, 9), whole[:30], whole, whole[:56] + text(3, 5)]
    blocks = [0, 40, 24, 56, 56] if family != "gpt_oss" else [0, 32, 16, 56, 56]
    with opened(make_checkpoint(family, spread=0.3), prefix_memory="8MiB") as llm:
        outputs = [llm.generate([prompt], PARAMS)[0] for prompt in prompts]
        assert [one.cached_tokens for one in outputs] == blocks
        assert fresh(llm, prompts) == [one.token_ids for one in outputs]


def test_memory_keeps_what_was_used_last(make_checkpoint: MakeCheckpoint) -> None:
    """Stated memory is never exceeded; a short side request costs an old chat no more than its own size; then the oldest goes."""
    folder, one, two, side = make_checkpoint("gpt_oss", spread=0.3), text(1, 65), text(2, 65), text(3, 17)
    with opened(folder, prefix_memory="1MiB") as llm:
        sizes = [0]
        for prompt in (one, side):
            cached(llm, prompt)
            sizes.append(llm._offloaded.prefixes._store.nbytes)
    a_chat, a_title = np.diff(sizes)
    room = 2 * a_chat + a_title // 2
    with opened(folder, prefix_memory=str(room)) as llm:
        prefixes = llm._offloaded.prefixes
        assert cached(llm, one, two, side, two) == [0, 0, 0, 64]
        assert prefixes._store.nbytes <= room
        assert 64 - 16 - prefix.APART <= prefixes.match(one).length < 64
        cached(llm, text(7, 65), text(8, 65))
        assert max(prefixes.match(one).length, prefixes.match(two).length) <= PAGE
        assert prefixes.match(text(8, 65)).length == 64
        forget(llm)
        assert prefixes.match(text(8, 65)).length == prefixes._store.nbytes == 0
    with opened(folder, prefix_memory=str(a_chat // 2)) as llm:
        cached(llm, one)
        assert 0 < llm._offloaded.prefixes.match(one).length < 64, "its own beginning stays"


@pytest.mark.parametrize("family", FAMILIES)
def test_side_requests_cost_a_chat_nothing(family: str, make_checkpoint: MakeCheckpoint) -> None:
    """In memory for a chat and one title, three titles come between two turns: the second turn reads what is new."""
    folder, chat = make_checkpoint(family, spread=0.3), text(1, 65)
    with opened(folder, prefix_memory="1MiB") as llm:
        cached(llm, chat, text(3, 17))
        room = llm._offloaded.prefixes._store.nbytes
    with opened(folder, prefix_memory=str(room)) as llm:
        assert cached(llm, chat, *(text(10 + title, 17) for title in range(3)), [*chat, *text(2, 9)]) == [
            0,
            0,
            0,
            0,
            64,
        ]


def test_live_sequences_share_their_pages(make_checkpoint: MakeCheckpoint) -> None:
    """A request that begins as a live one needs pages for its own tokens only, and keeps them when the other leaves."""
    begin, long = text(1, 49), SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = [begin + text(2, 3), begin + text(3, 5), begin + text(4, 7)]
    folder = make_checkpoint("gpt_oss", spread=0.3)
    # each takes 8 or 9 pages, 6 of them in common
    with opened(folder, prefix_memory="1MiB", kv_tokens=120, admission="at once") as llm:
        engine, scheduler, live, found = llm.engine, llm.engine._scheduler, 0, {}
        expected = fresh(llm, prompts, long)
        forget(llm)
        began = engine.totals.tokens
        numbers = [engine.add(llm.request(prompts[0], long))]
        book = llm._offloaded.handover.rows.cache.books[[kind.window for kind in llm.plan.kv_layout.kinds].index(None)]
        while engine.totals.tokens == began:
            engine.step()
        numbers += [engine.add(llm.request(prompt, long)) for prompt in prompts[1:]]
        while engine.unfinished:
            found |= {number: output.output for number, output in engine.step() if output.output}
            live = max(live, scheduler.live)
            assert scheduler._left <= book.pool.free
        assert live == 3
        assert [found[number].token_ids for number in numbers] == expected
        assert [found[number].cached_tokens for number in numbers] == [0, 48, 48]


def test_whole_pages_move_several_at_once(make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kept beginning of 64 tokens comes back in one move, not page by page."""
    taken: list[list[int]] = []
    groups = PageCopies._groups

    def noted(self: PageCopies, moves: Sequence[Move]) -> Iterator[list[Move]]:
        found = list(groups(self, moves))
        taken.append([len(group) for group in found])
        yield from found

    with opened(make_checkpoint("qwen3_moe"), prefix_memory="8MiB") as llm:
        prompt, longer = text(1, 64), [*text(1, 64), *text(2, 9)]
        expected = fresh(llm, [longer])
        forget(llm)
        answers(llm, [prompt])
        monkeypatch.setattr(PageCopies, "_groups", noted)
        assert answers(llm, [longer]) == expected
        assert taken[0] == [64 // PAGE], "their records lie one behind the other"


def test_cancelled_requests_leave_what_they_have_read(make_checkpoint: MakeCheckpoint) -> None:
    """Cancelled while it waits, is read, or was copied in a moment ago: the next one begins where passes ended, with its own tokens."""
    prompt = text(1, 70)
    with opened(make_checkpoint("gpt_oss", spread=0.3), prefix_memory="1MiB") as llm:
        engine, expected = llm.engine, fresh(llm, [prompt, text(1, 50) + text(2, 4)])
        forget(llm)
        first, waiting = (engine.add(llm.request(prompt, PARAMS)) for _ in range(2))
        engine.cancel(waiting)
        engine.step()
        engine.step()
        assert engine.cancel(first)
        assert llm._offloaded.prefixes.match(prompt).length == 48
        again = engine.add(llm.request(prompt, PARAMS))
        llm._engine._scheduler.next()  # it is admitted, and its copies are queued
        assert engine.cancel(again)
        for given, tokens in zip((prompt, text(1, 50) + text(2, 4)), expected, strict=True):
            output = llm.generate([given], PARAMS)[0]
            assert (output.cached_tokens, output.token_ids) == (48, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_beside_steps_change_no_token(family: str, cuda: torch.device, make_checkpoint: MakeCheckpoint) -> None:
    """On a GPU, where copies run on a stream of their own: chats take turns, pages and host memory change hands all the time."""
    folder = make_checkpoint(family, spread=0.3, max_position_embeddings=2048)
    chats = [text(seed, 300 + 70 * seed) for seed in range(5)]
    options = {
        "device": str(cuda),
        "execution": "graph",
        "slots": 9,
        "max_batch": 3,
        "max_length": 1500,
        "prefill_chunk": 192,
    }
    with LLM(folder, prefix_memory="3MiB", kv_tokens=3000, predictor="none", **options) as llm:
        prompts, found = [], []
        for turn in range(3):
            outputs = llm.generate(chats, PARAMS)
            prompts += [list(chat) for chat in chats]
            found += [output.token_ids for output in outputs]
            chats = [
                [*chat, *output.token_ids, *text(40 + turn, 50)] for chat, output in zip(chats, outputs, strict=True)
            ]
        stats = llm.stats
        assert stats.prefix_cache_hits > 0
        assert fresh(llm, prompts) == found
        assert stats.peak_bytes <= llm.plan.total


def test_generated_tokens_are_kept_if_stated(make_checkpoint: MakeCheckpoint) -> None:
    """With `prefix_generated` a next turn begins behind the answer, too; by default behind the prompt that a pass read."""
    prompt, params = text(1, 20), SamplingParams(max_tokens=15, ignore_eos=True)
    for family, generated, expected in (("qwen3_moe", False, 16), ("gpt_oss", True, 32)):
        folder = make_checkpoint(family, spread=0.3)
        with opened(folder, execution="graph", prefix_memory="1MiB", prefix_generated=generated) as llm:
            answer = llm.generate([prompt], params)[0].token_ids
            longer = [*prompt, *answer, *text(2, 5)]
            output = llm.generate([longer], PARAMS)[0]
            assert output.cached_tokens == expected
            assert fresh(llm, [longer]) == [output.token_ids]


def by_shape(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A product whose bits depend on its rows, as a library's choice of a kernel may."""

    def computed(*given: torch.Tensor, **more: object) -> torch.Tensor:
        found = own(*given, **more)
        return found * (1 + found.shape[:-1].numel() / 256)

    return computed


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2"])
def test_batch_invariant_logits_are_bit_equal(
    family: str, make_checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where every size of a pass has bits of its own: prompts restart where passes of a fresh run begin."""
    monkeypatch.setattr(torch.nn.Linear, "forward", by_shape(torch.nn.Linear.forward))
    one = text(1, 40)
    prompts, lines = [one, [*one[:31], *text(2, 5)], [*one, *text(3, 7)]], []
    options = {"execution": "graph", "batch_invariant": True, "prefill_chunk": 20, "max_length": 60, "max_batch": 1}
    with opened(make_checkpoint(family, "bfloat16", spread=0.3), **options, prefix_memory="1MiB") as llm:
        llm.engine.watch_logits(lambda _, logits: lines.extend(logits.clone()))
        assert cached(llm, *prompts) == [0, 20, 40]
        fresh(llm, prompts)
    half = len(prompts) * PARAMS.max_tokens
    assert torch.equal(torch.stack(lines[:half]), torch.stack(lines[half:]))


def test_the_predictor_knows_what_was_not_read(make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor) -> None:
    """Its state behind a restart is that of a prompt that was read whole: tokens, routes, faded averages."""
    folder, prompt = make_checkpoint("qwen3_moe", spread=0.3), text(1, 70)
    longer = [*prompt[:61], *text(2, 20)]
    states = []
    for memory, first in (("1MiB", prompt), ("0", text(3, 5))):
        with opened(folder, predictor=str(make_predictor(folder)), prefix_memory=memory, max_length=100) as llm:
            llm.generate([first], PARAMS)
            output = llm.generate([longer], SamplingParams(max_tokens=2, ignore_eos=True))[0]
            assert output.cached_tokens == (56 if memory != "0" else 0)
            assert llm.predictor_failure is None
            state = llm._offloaded.live_predictor._online.state
            taken = int(state.taken[0])
            order = [(taken - 1 - back) % 32 for back in range(20)]
            states.append((state.tokens[0, order], state.routes[0, order], state.keys[0][:, order], state.faded[0]))
    for mine, fresh in zip(*states, strict=True):
        torch.testing.assert_close(mine, fresh, atol=1e-5, rtol=1e-5)
    assert (states[0][1] < 8).all(), "true routes, none unknown"


def test_a_wide_pass_is_taken_in(make_checkpoint: MakeCheckpoint, make_predictor: MakePredictor) -> None:
    """The predictor takes the tokens of a prompt in also where its pass needs every expert and asks for no forecast."""
    folder = make_checkpoint("qwen3_moe", spread=0.3)
    options = {"execution": "graph", "strategy": "plec", "prefill_chunk": 70}
    with opened(folder, predictor=str(make_predictor(folder)), **options) as llm:
        llm.generate([text(1, 70)], PARAMS)
        assert int(llm._offloaded.live_predictor._online.state.taken[0]) == 70 + PARAMS.max_tokens - 1


def test_scored_prompts_are_read_whole(make_checkpoint: MakeCheckpoint) -> None:
    """Log-probabilities of a prompt's tokens need logits of all of them."""
    prompt, scored = text(1, 30), SamplingParams(max_tokens=1, prompt_logprobs=1)
    with opened(make_checkpoint("qwen3_moe", spread=0.3), prefix_memory="1MiB") as llm:
        outputs = [llm.generate([prompt], params)[0] for params in (scored, PARAMS, scored)]
    assert [output.cached_tokens for output in outputs] == [0, 24, 0]
    assert len(outputs[0].prompt_logprobs) == 30
    assert outputs[2].prompt_logprobs == outputs[0].prompt_logprobs


def test_recorded_prompts_are_read_whole(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """A trace has the routes of every token, so nothing is reused while it is recorded."""
    prompt = text(1, 30)
    with opened(make_checkpoint("qwen3_moe", spread=0.3), prefix_memory="1MiB") as llm:
        assert cached(llm, prompt, prompt) == [0, 24]
        with llm.record(tmp_path / "a.trace"):
            assert cached(llm, prompt) == [0]
        assert cached(llm, prompt) == [24]
    assert len(load_trace(tmp_path / "a.trace").rows.tokens) == 30 + PARAMS.max_tokens - 1


def test_the_plan_counts_it_or_says_why_not(make_checkpoint: MakeCheckpoint) -> None:
    """Host memory, and on a GPU the buffer that pages pass through; what cannot be had is refused when stated, and nothing when auto."""
    shape = prepare(make_checkpoint("qwen3_moe"), EngineConfig(device="cpu")).plan.shape
    plain, kept = (make_plan(EngineConfig(prefix_memory=size), shape, "cuda", "next-use") for size in ("0", "3GiB"))
    assert (plain.prefix, kept.prefix) == (0, 3 << 30)
    assert kept.total - plain.total == 8 << 20
    token = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
    for length, most in ((100, 32 * 100 * token), (2**20, 4 << 30)):
        auto = EngineConfig(prefix_memory="auto", max_length=length)
        assert make_plan(auto, replace(shape, context=None), "cpu", "next-use").prefix == most
    yarn = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 1e4,
            "original_max_position_embeddings": 64}  # fmt: skip
    for folder, why in (
        (make_checkpoint("switch_transformers"), "do not lie in pages"),
        (make_checkpoint("qwen3_next", **{**LIKE_OLMOE, **RECURRENT["qwen3_next"]}), "do not lie in pages"),
        (make_checkpoint("qwen3_moe", rope_parameters=yarn), "depend on the length"),
    ):
        with pytest.raises(ConfigError, match=why):
            prepare(folder, EngineConfig(device="cpu", prefix_memory="1GiB"))
        plan = prepare(folder, EngineConfig(device="cpu", prefix_memory="auto")).plan
        assert plan.prefix == 0
        assert re.search(why, plan.prefix_unavailable_reason)
    with pytest.raises(ConfigError, match="prefix_memory"):
        EngineConfig(prefix_memory="a lot")
