"""Keys and values in pages: nobody's page is another's, nothing is lost, and where pages lie changes no bit."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from expertflow import LLM, SamplingParams
from expertflow.config import EngineConfig
from expertflow.engine.plan import make_plan
from expertflow.engine.prepare import prepare
from expertflow.errors import ConfigError
from expertflow.execution.kv import layout as layouts
from expertflow.execution.kv.copies import Move, PageCopies
from expertflow.execution.kv.layout import SPARE, WASTE, ZEROS, Layout
from expertflow.execution.kv.paged import PagedCache, Span
from expertflow.execution.kv.pages import Beginning
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.kernels import dense, dense_reference
from expertflow.kernels.prompts.attention import prompt_attention
from expertflow.memory.arena import HostArena
from expertflow.models.context import ForwardContext
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import build_skeleton
from expertflow.schedule.scheduler import Decode, Prefill, Scheduler
from helpers import DEVICE, DEVICES, MakeCheckpoint

FAMILIES = ["gpt_oss", "qwen3_moe", "deepseek_v2"]
"""With windows of 8 tokens, without, and with latents."""
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = [[5 + 7 * place % 80 for place in range(count)] for count in (29, 3, 40, 11, 18)]


def interrupt(*, fails: bool) -> None:
    """What a pass may do half-way."""
    if fails:
        raise InterruptedError


def moves_of(cache: PagedCache, copies: PageCopies, row: int, token: int) -> list[Move]:
    """Copies of all that a row's token sees, one record behind the other."""
    found, page, at = [], cache.layout.page, 0
    for kind, book in enumerate(cache.books):
        first = book.needed(token)
        for number in range(first // page, -(-token // page)):
            places = slice(max(0, first - number * page), min(page, token - number * page))
            found.append(Move(kind, int(book.entries[row, number]), at, places))
            at += copies.record_bytes(kind)
    return found


def begin_at(cache: PagedCache, row: int, room: int, token: int, beginning: Beginning | None = None) -> None:
    """Open a row whose next token is number `token`, and have pages for what that one sees."""
    cache.open(row, room, beginning)
    for book in cache.books:
        book.advance(row, token, token)
    cache.synchronise()


class Story:
    """Random sequences over a cache whose every token is a number of its own; what a token should see is written down beside it."""

    def __init__(self, seed: int, windows: tuple[int | None, ...], page: int) -> None:
        self.draw = random.Random(seed)
        self.rows, self.length, self.chunk = self.draw.randint(1, 5), self.draw.randint(8, 60), self.draw.randint(1, 30)
        tokens = self.draw.randint(self.length, self.rows * self.length)
        layout = Layout.of(windows, rows=self.rows, length=self.length, tokens=tokens, chunk=self.chunk)
        assert layout.page == page
        self.context = ForwardContext()
        self.cache = PagedCache(layout, self.context, torch.device("cpu"))
        self.copies = PageCopies(self.cache.stacks, HostArena(1 << 20, pin=False), torch.device("cpu"), 0)
        self.windows = windows
        self.live: dict[int, tuple[int, list[float]]] = {}
        """Tokens that a row's sequence has room for, and the numbers it wrote."""
        self.names = iter(range(1, 10**6))

    def write(self, spans: list[Span], columns: np.ndarray, *, fails: bool = False) -> None:
        numbers = torch.tensor([[float(next(self.names)) for _ in line] for line in columns])
        states = numbers[:, None, :, None].expand(-1, 2, -1, 3).clone()
        rows = torch.tensor([span.row for span in spans])
        try:
            with self.cache.passing(spans, columns) as cells:
                end = max(span.end for span in spans)
                pages = self.cache.of_pass(cells, rows, end)
                with self.context.carry(rows=rows, end=end, pages=pages):
                    for number in range(len(self.windows)):
                        keys, values = self.cache.update(states + number, states - number, number)
                        self.check(number, keys, values, spans, columns, numbers)
                interrupt(fails=fails)
        except InterruptedError:
            return
        for span, line, known in zip(spans, columns, numbers.tolist(), strict=True):
            self.live[span.row][1].extend(known[len(line) - (span.end - span.begin) :])

    def check(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        spans: list[Span],
        columns: np.ndarray,
        numbers: torch.Tensor,
    ) -> None:
        """Every token of the pass sees the numbers of its sequence, within its layer's window; elsewhere it is finite."""
        assert keys.isfinite().all()
        for place, span in enumerate(spans):
            known = self.live[span.row][1] + numbers[place, columns[place] >= 0].tolist()
            for token in range(span.begin, span.end):
                first = max(0, token - (self.windows[layer] or self.length) + 1)
                expected = torch.tensor(known[first : token + 1])[None, :, None].expand(2, -1, 3)
                assert torch.equal(keys[place, :, first : token + 1], expected + layer)
                assert torch.equal(values[place, :, first : token + 1], expected - layer)

    def prompt_pass(self) -> None:
        left = self.chunk
        spans = []
        for row in self.draw.sample(sorted(self.live), len(self.live)):
            room, known = self.live[row]
            count = min(left, room - len(known), self.draw.randint(1, self.chunk))
            if count > 0:
                spans.append(Span(row, len(known), len(known) + count))
                left -= count
        if not spans:
            return
        width = max(span.end - span.begin for span in spans)
        columns = np.full((len(spans), width), -1)
        for line, span in zip(columns, spans, strict=True):
            line[width - (span.end - span.begin) :] = np.arange(span.begin, span.end)
        self.write(spans, columns, fails=self.draw.random() < 0.15)

    def step(self) -> None:
        spans = [Span(row, len(known), len(known) + 1) for row, (room, known) in self.live.items() if len(known) < room]
        if spans:
            self.write(spans, np.array([[span.begin] for span in spans]), fails=self.draw.random() < 0.1)

    def arrive(self) -> None:
        free = [row for row in range(self.rows) if row not in self.live]
        room, page = self.draw.randint(1, self.length), self.cache.layout.page
        taken = sum(-(-room // page) for room, _ in self.live.values())
        if free and taken + -(-room // page) <= self.cache.layout.pages:
            row = self.draw.choice(free)
            if not self.share(row, room):
                self.cache.open(row, room)
                self.live[row] = room, []

    def share(self, row: int, room: int) -> bool:
        """Begin as another sequence did, sometimes: its pages are shared, and those of windows are copied."""
        others, page = [other for other in self.live if self.live[other][1]], self.cache.layout.page
        if not others or self.draw.random() < 0.3:
            return False
        source = self.draw.choice(others)
        known = self.live[source][1]
        pages = min(len(known), room) // page - self.draw.randint(0, 1)
        count, books = pages * page, self.cache.books
        if pages < 1 or not all(book.keeps(source, book.needed(count), count) for book in books):
            return False
        self.copies.out(moves_of(self.cache, self.copies, source, count))
        begin_at(self.cache, row, room, count, Beginning(source, pages))
        self.copies.into(moves_of(self.cache, self.copies, row, count))
        self.live[row] = room, known[:count]
        return True

    def integrity(self) -> None:
        """Each page has as many users as tables name it, and those that nobody names are free."""
        for book in self.cache.books:
            users = np.bincount(book.entries.ravel(), minlength=book.kind.pages)
            assert not book.pool.users[:SPARE].any()
            assert np.array_equal(users[SPARE:], book.pool.users[SPARE:])
            assert book.pool.free == (users[SPARE:] == 0).sum()
            assert WASTE not in book.entries
        for kind in self.cache.layout.kinds:
            assert kind.pages >= SPARE
        for layer in self.cache.layers:
            assert not layer.is_initialized or not layer.keys[ZEROS].any()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("windows", [(None,), (5, None, 5), (1,), (9, 4)])
def test_every_token_sees_its_own_sequence(
    windows: tuple[int | None, ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random arrivals, passes, failures, ends and shared beginnings: pages never run out, and nothing is seen of others."""
    page = (2, 3, 8)[seed % 3]
    monkeypatch.setattr(layouts, "PAGE", page)
    story = Story(seed, windows, page)
    for _ in range(60):
        story.draw.choice([story.arrive, story.prompt_pass, story.step, story.step])()
        if story.live and story.draw.random() < 0.1:
            row = story.draw.choice(sorted(story.live))
            story.cache.leave(row)
            del story.live[row]
        story.integrity()
    for row in list(story.live):
        story.cache.leave(row)
    assert [book.pool.free for book in story.cache.books] == [kind.pages - SPARE for kind in story.cache.layout.kinds]


def scattered(kept: torch.Tensor, page: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[R, G, N, D]` as pages in a drawn order, with poison between them, and their table."""
    rows, heads, length, width = kept.shape
    count = -(-length // page)
    padded = torch.nn.functional.pad(kept, (0, 0, 0, count * page - length), value=torch.nan)
    pages = padded.view(rows, heads, count, page, width).transpose(1, 2).reshape(rows * count, heads, page, width)
    order = torch.randperm(2 * rows * count, generator=torch.Generator().manual_seed(0))[: rows * count]
    found = kept.new_full((2 * rows * count, heads, page, width), torch.nan)
    found[order] = pages
    table = torch.zeros(rows, count + 3, dtype=torch.int32)
    table[:, :count] = order.view(rows, count)
    return found, table[:, :count].to(kept.device)


@pytest.mark.parametrize("kernels", ["kernel", "reference"])
@pytest.mark.parametrize("window", [None, 70])
def test_attention_in_pages_has_the_bits_of_rows(window: int | None, kernels: str) -> None:
    """A step's attention and a prompt's, wherever the pages lie."""
    random = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 3, 2, 300, 16, generator=random).to(DEVICE, torch.bfloat16)
    keys, values = drawn[0], drawn[1]
    (paged, table), (others, _) = scattered(keys, 128), scattered(values, 128)
    rows, lasts = torch.tensor([2, 0], device=DEVICE), torch.tensor([299, 67], device=DEVICE)
    query = torch.randn(2, 6, 40, 16, generator=random).to(DEVICE, torch.bfloat16)
    bias = torch.randn(6, 300, generator=random).to(DEVICE, torch.bfloat16)
    step, prompt = (
        (dense.decode_attention, prompt_attention)
        if kernels == "kernel"
        else (dense_reference.decode_attention, dense_reference.prompt_attention)
    )
    if kernels == "reference":
        paged, others = paged.nan_to_num(), others.nan_to_num()  # it multiplies what is masked, by zero
    asked = query[:, :, 0].contiguous()
    for more in ({}, {"bias": bias}):
        plain = step(asked, keys, values, (rows, lasts), 0.3, window, **more)
        assert plain.isfinite().all()
        mine = step(asked, paged, others, (rows, lasts), 0.3, window, table=table, **more)
        close = 0 if kernels == "kernel" else 1e-2  # the reference adds zeros of the last page
        torch.testing.assert_close(mine, plain, rtol=0, atol=close)
    plain = prompt(query, keys, values, (rows, lasts), 0.3, window)
    assert torch.equal(prompt(query, paged, others, (rows, lasts), 0.3, window, table=table), plain)


@contextmanager
def opened(make_checkpoint: MakeCheckpoint, family: str, execution: str, page: int, **options: object) -> Iterator[LLM]:
    """A model whose pages hold so many tokens; on a GPU everything is 16 times as long, because kernels read blocks of 64."""
    times = scale(options.get("device", "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layouts, "PAGE", page * times)
        patch.setattr("expertflow.engine.planning.kv.PAGE", page * times)
        folder = make_checkpoint(family, spread=0.3, **({"max_position_embeddings": 2048} if times > 1 else {}))
        given = {
            "device": "cpu",
            "slots": 9,
            "max_length": 64 * times,
            "max_batch": 4,
            "execution": execution,
            **options,
        }
        with LLM(folder, **given) as llm:
            yield llm


def scale(device: object) -> int:
    return 1 if device == "cpu" else 16


class Driver:
    """Runs passes and steps of chosen rows; positions are in units of the scale."""

    def __init__(self, llm: LLM) -> None:
        self.executor, self.times = llm._engine._executor, scale(llm.plan.device)
        self.cache = llm._offloaded.handover.rows.cache

    def read(self, count: int, row: int) -> torch.Tensor:
        """A prompt of so many units, in passes."""
        tokens, cut = [5 + 7 * place % 80 for place in range(count * self.times)], 9 * self.times
        for begin in range(0, len(tokens), cut):
            piece = tokens[begin : begin + cut]
            chunk = PromptChunk(row, piece, row, begin, len(tokens) - begin - len(piece))
            logits = self.executor.prefill([chunk])
        return logits.clone()

    def step(self, *fed: tuple[int, int, int]) -> torch.Tensor:
        """A row, a token, and the token's position."""
        return self.executor.decode([DecodeInput(row, token, row, position) for row, token, position in fed]).clone()

    def steps(self, row: int, position: int, tokens: list[int]) -> list[torch.Tensor]:
        return [self.step((row, token, position + place)) for place, token in enumerate(tokens)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pages_change_no_bit(family: str, execution: str, device: str, make_checkpoint: MakeCheckpoint) -> None:
    """Sequences that come and go in small pages have the logits of those whose pages hold all of their tokens."""

    def story(llm: LLM) -> list[torch.Tensor]:
        driver, times = Driver(llm), scale(device)
        found = [driver.read(29, 2), driver.read(3, 0), *driver.steps(2, 29 * times, [7, 8, 9]), driver.read(40, 3)]
        driver.executor.leave(2)
        found += [driver.step((0, 8, 3 * times), (3, 9, 40 * times)), driver.read(11, 2)]
        for step in range(20):
            found.append(driver.step((2, 7 + step, 11 * times + step), (0, 60 - step, 3 * times + 1 + step)))
        return found

    with opened(make_checkpoint, family, execution, 64, device=device) as llm:
        expected = story(llm)
    with opened(make_checkpoint, family, execution, 4, device=device) as llm:
        assert all(torch.equal(a, b) for a, b in zip(story(llm), expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("family", FAMILIES)
def test_copied_out_and_in_a_sequence_goes_on(
    family: str, execution: str, device: str, make_checkpoint: MakeCheckpoint
) -> None:
    """From host memory in another row, and from a shared beginning, a sequence goes on with the bits it would have had."""
    tokens, times = [20, 30, 40, 50, 60, 70, 80], scale(device)
    with opened(make_checkpoint, family, execution, 4, device=device) as llm:
        driver = Driver(llm)
        cache, end, room = driver.cache, 29 * times, 60 * times
        device_ = torch.device(device)
        copies = PageCopies(cache.stacks, HostArena(1 << 24, pin=device_.type == "cuda"), device_, 1 << 20)
        driver.read(29, 1)
        copies.out(moves_of(cache, copies, 1, end))
        begin_at(cache, 3, room, end, Beginning(1, end // cache.layout.page))
        copies.into(moves_of(cache, copies, 3, end))
        expected = driver.steps(1, end, tokens)
        assert all(map(torch.equal, driver.steps(3, end, tokens[:3]), expected)), "shared"
        found = driver.executor.prefill([PromptChunk(3, tokens[3:], 3, end + 3)])
        torch.testing.assert_close(found, expected[-1], atol=1e-4, rtol=1e-4)
        driver.executor.leave(1)
        driver.read(40, 0)  # into the pages of the sequence that left
        driver.steps(0, 40 * times, [3] * 9)
        begin_at(cache, 2, room, end)
        copies.into(moves_of(cache, copies, 2, end))
        assert all(map(torch.equal, driver.steps(2, end, tokens), expected)), "copied"
        for row in range(4):
            driver.executor.leave(row)
        assert [book.pool.free for book in cache.books] == [kind.pages - SPARE for kind in cache.layout.kinds]


def test_a_shared_beginning_takes_no_pages() -> None:
    """Full pages of the beginning have two users; the row has pages of its own only for what follows, and they are new again afterwards."""
    layout = Layout.of((None,), rows=2, length=960, tokens=1280, chunk=64)
    cache = PagedCache(layout, ForwardContext(), torch.device("cpu"))
    cache.open(0, 900)
    book = cache.books[0]
    assert book.pool.free == 20 - 15
    cache.open(1, 400, Beginning(0, 3))  # 7 pages are more than are free
    assert (book.pool.free, book.common(0), book.common(1)) == (20 - 15 - 4, 3, 3)
    assert book.entries[0, :3].tolist() == book.entries[1, :3].tolist()
    assert not set(book.entries[0, 3:15]) & set(book.entries[1, 3:7])
    cache.leave(0)
    assert (book.pool.free, book.common(1)) == (20 - 7, 0)
    cache.leave(1)
    assert book.pool.free == 20


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_admission_goes_by_need(execution: str, make_checkpoint: MakeCheckpoint) -> None:
    """Requests wait until their tokens fit, keep what they were promised, and get the answers they have alone; cancelled ones leave."""
    with opened(make_checkpoint, "gpt_oss", execution, 4, max_batch=1) as llm:
        alone = [llm.generate([prompt], PARAMS)[0].token_ids for prompt in PROMPTS]
    # 29 + 11 tokens are 10 pages, 3 + 11 are 4, 40 + 11 are 13, 11 + 11 are 6, 18 + 11 are 8
    with opened(make_checkpoint, "gpt_oss", execution, 4, kv_tokens=64, max_batch=4, prefill_chunk=16) as llm:
        engine, books, most = llm.engine, llm._offloaded.handover.rows.cache.books, 0
        outputs, cancelled = {}, [engine.add(llm.request(PROMPTS[2], PARAMS))]
        engine.step()
        numbers = [engine.add(llm.request(prompt, PARAMS)) for prompt in PROMPTS]
        cancelled.append(engine.add(llm.request(PROMPTS[0], PARAMS)))
        assert all(map(engine.cancel, cancelled))
        while engine.unfinished:
            outputs |= {number: output.output for number, output in engine.step() if output.output}
            most = max(most, engine._scheduler.live)
            assert sum(engine._scheduler._live[number].pages for number in engine._scheduler._live) <= 16
        assert [outputs[number].token_ids for number in numbers] == alone
        assert 2 <= most <= 3
        assert all(book.pool.free == book.kind.pages - SPARE for book in books)


def drained(scheduler: Scheduler, of: Callable[[int], int]) -> list[int]:
    """Run everything, `of(n)` decode steps a sequence; the order in which sequences were admitted."""
    order, left = [], {}
    while (task := scheduler.next()) is not None:
        for sequence in task.sequences:
            if isinstance(task, Prefill):
                if sequence not in order:
                    order.append(sequence)
                left[sequence] = of(sequence)
            left[sequence] -= isinstance(task, Decode)
            if not left[sequence]:
                scheduler.remove(sequence)
        if isinstance(task, Prefill):
            scheduler.done(task)
    return order


def test_a_long_request_is_passed_over_and_then_waited_for() -> None:
    """Short ones go first while it does not fit, but only so often; one that can never fit is refused with both numbers."""
    scheduler = Scheduler(rows=3, batch=3, chunk=64, pages=10, page=4, patience=2)
    with pytest.raises(ConfigError, match=r"41 tokens, .* of 40 are kept"):
        scheduler.add(99, 30, 41)
    scheduler.add(0, 4, 12)
    scheduler.add(1, 20, 40)
    for number in range(2, 8):
        scheduler.add(number, 4, 8)
    order = drained(scheduler, lambda sequence: 3 + sequence % 2)
    assert sorted(order) == list(range(8))
    assert order[:4] == [0, 2, 3, 1]


def test_the_plan_counts_pages_to_the_byte(make_checkpoint: MakeCheckpoint) -> None:
    """Stated tokens of keys and values, layers with windows among them, take what the tensors take."""
    folder = make_checkpoint("gpt_oss", "bfloat16", max_position_embeddings=4096)
    options = {
        "device": "cpu",
        "max_length": 2000,
        "max_batch": 2,
        "max_live": 33,
        "kv_tokens": 5000,
        "prefill_chunk": 100,
    }
    with LLM(folder, slots=9, **options) as llm:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=1))
        tensors = llm._offloaded.handover.rows.cache.tensors
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == llm.plan.kv
        assert llm.plan.kv_tokens == 79 * 64
        token = 2 * 2 * 16 * 2  # keys and values, heads, width, bytes
        # a window of 8 tokens reaches into 2 pages; 100 tokens of 33 pieces begin at most (100 + 33 * 62) // 64 pages more
        assert llm.plan.kv == (2 * min(79, 66 + 33) + 79 + 3 * SPARE) * 64 * token + 2 * 33 * 32 * 4


@pytest.mark.parametrize("execution", ["host", "graph"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2"])
def test_long_sequences_stay_within_the_plan(family: str, execution: str, make_checkpoint: MakeCheckpoint) -> None:
    """Where keys and values are most of a run: more live sequences than step at once, and more tokens than kept at once."""
    folder = make_checkpoint(family, "bfloat16", max_position_embeddings=1024)
    options = {"max_length": 400, "max_batch": 3, "max_live": 5, "kv_tokens": 900, "prefill_chunk": 64, "slots": 2}
    with LLM(folder, device="cpu", execution=execution, **options) as llm:
        prompts = [
            [5 + (7 + row) * place % 80 for place in range(count)]
            for row, count in enumerate((390, 200, 90, 300, 50, 7))
        ]
        llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True))
        assert 0.3 * llm.plan.total <= llm.stats.peak_bytes <= llm.plan.total


def test_short_chats_and_a_long_one_fit_one_budget(tmp_path: Path) -> None:
    """At gpt-oss-20b's size 32 chats of 2k tokens and one of 100k take a fortieth of rows of full length, and 8 GiB in all."""
    sizes = {"num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
             "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "vocab_size": 201088}  # fmt: skip
    config = AutoConfig.for_model("gpt_oss", **sizes, architectures=["GptOssForCausalLM"])
    config.save_pretrained(tmp_path)
    shape = shape_of(build_skeleton(tmp_path, "bfloat16"))
    chats = {"max_batch": 8, "max_live": 33, "max_length": 100 * 1024, "kv_tokens": 32 * 2048 + 100 * 1024}
    plan = make_plan(EngineConfig(**chats, gpu_memory="8GiB"), shape, "cuda", "next-use")
    assert plan.execution == "graph"
    assert plan.total <= 8 << 30
    a_token = 24 * 2 * 8 * 64 * 2
    assert 33 * 100 * 1024 * a_token > 37 * plan.kv
    # half of the layers keep all tokens; in the others a window of 128 reaches into 3 pages
    assert plan.kv < (168 * 1024 + 3 * 64 * 33 + 512 + 33 * 64) * a_token // 2 * 1.01 + 2 * 33 * 1600 * 4


def test_a_budget_shares_what_is_left(make_checkpoint: MakeCheckpoint) -> None:
    """With auto tokens keys and values take at most half of what is left, at least one sequence; the least budget that is named works."""
    folder = make_checkpoint("qwen3_moe", max_position_embeddings=4096)
    options = {"device": "cpu", "max_length": 500, "max_batch": 2, "max_live": 8}
    free = prepare(folder, EngineConfig(**options, slots=1)).plan
    assert free.kv_tokens == 8 * 512
    before = free
    for gpu_memory in (free.least, free.least + 300_000, free.total, free.total + free.kv, 10**9):
        plan = prepare(folder, EngineConfig(**options, gpu_memory=gpu_memory)).plan
        assert plan.total <= gpu_memory
        assert plan.kv_tokens == 512 or plan.kv <= (gpu_memory - plan.fixed + plan.kv) / 2
        assert gpu_memory == free.least or (plan.kv_tokens >= before.kv_tokens and plan.slots >= before.slots)
        before = plan
    assert before.kv_tokens == free.kv_tokens
    with pytest.raises(ConfigError, match="kv_tokens=400 is less than max_length=500"):
        EngineConfig(**options, kv_tokens=400)
    with pytest.raises(ConfigError, match="do not lie in pages"):
        prepare(make_checkpoint("switch_transformers"), EngineConfig(device="cpu", kv_tokens=4000))
