"""Several threads on one `LLM`: every request gets the tokens it gets alone, and no one waits for longer than a step."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from expertflow import LLM, SamplingParams
from expertflow.engine.stepping.lock import FairLock
from expertflow.errors import CancelledError, ClosedError
from helpers import DEVICES, GUARD, MakeCheckpoint

THREADS = 8
PROMPTS = [[3 + (5 * i * j + i) % 90 for j in range(3 + i)] for i in range(THREADS)]
PARAMS = [
    SamplingParams(max_tokens=4 + i % 3, ignore_eos=True, temperature=0.9 * (i % 2), seed=i) for i in range(THREADS)
]


@pytest.fixture(params=DEVICES)
def folder(make_checkpoint: MakeCheckpoint, request: pytest.FixtureRequest) -> tuple[Path, str]:
    return make_checkpoint("qwen3_moe", spread=0.3), request.param


@pytest.fixture
def llm(folder: tuple[Path, str]) -> Iterator[LLM]:
    with LLM(folder[0], device=folder[1], slots=9, max_length=48, max_batch=3, max_live=5, prefill_chunk=16) as made:
        yield made


def together(work: Callable[[int], object]) -> list[object]:
    """Run in as many threads at once; their results, or what the first one raised."""
    start = threading.Barrier(THREADS)

    def one(number: int) -> object:
        start.wait(GUARD)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return [job.result(GUARD) for job in [pool.submit(one, number) for number in range(THREADS)]]


def test_generate_stream_and_cancel_side_by_side(llm: LLM) -> None:
    """Threads that generate, stream, stream and drop, and cancel: tokens are those alone, and nothing is left over."""
    alone = [llm.generate(prompt, one)[0].token_ids for prompt, one in zip(PROMPTS, PARAMS, strict=True)]

    def work(number: int) -> tuple[int, ...]:
        prompt, params = PROMPTS[number], PARAMS[number]
        for _ in range(2):
            dropped = llm.stream([prompt, PROMPTS[-1]], params)
            next(dropped)
            if number % 2:
                dropped.close()
            else:
                del dropped
            cancelled = llm.engine.add(llm.request(prompt, params), lambda _: None)
            llm.engine.cancel(cancelled)
        if number % 3 == 0:
            return tuple(item.token_id for item in llm.stream(prompt, params))
        return llm.generate(prompt, params)[0].token_ids

    assert together(work) == alone
    gc.collect()
    llm.generate(PROMPTS[0], PARAMS[0])
    assert llm.engine.unfinished == 0


def test_coroutines_share_it(llm: LLM) -> None:
    """`asyncio.to_thread` works as threads do."""
    alone = [llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, PARAMS, strict=True)]

    async def all_at_once() -> list[object]:
        jobs = [asyncio.to_thread(llm.generate, p, one) for p, one in zip(PROMPTS, PARAMS, strict=True)]
        return [found[0] for found in await asyncio.gather(*jobs)]

    before = llm.stats
    assert [out.token_ids for out in asyncio.run(all_at_once())] == [out.token_ids for out in alone]
    assert llm.stats.finished - before.finished == THREADS, "whichever thread's step ended a request"
    assert llm.stats.tokens - before.tokens == sum(len(out.token_ids) for out in alone)


def test_calls_share_batches_and_a_held_stream_blocks_none(llm: LLM) -> None:
    """Beside a stream that is not read on, and inside another one, calls go on; requests of two threads step together."""
    held = llm.stream(PROMPTS[0], SamplingParams(max_tokens=30, ignore_eos=True))
    next(held)
    outer = llm.stream(PROMPTS[1], SamplingParams(max_tokens=3, ignore_eos=True))
    nested = [llm.generate(PROMPTS[2], PARAMS[2])[0].token_ids for _ in outer]
    assert len(set(nested)) == 1
    done = ThreadPoolExecutor(1).submit(llm.generate, PROMPTS[3], PARAMS[3]).result(GUARD)
    assert len(done[0].token_ids) == PARAMS[3].max_tokens
    sizes: list[int] = []
    decode = llm.engine._executor.decode
    llm.engine._executor.decode = lambda fed, *more: (sizes.append(len(fed)), decode(fed, *more))[1]
    together(lambda number: llm.generate(PROMPTS[number], PARAMS[number]))
    assert max(sizes) == 3, "the largest batch"
    held.close()


def test_closing_ends_the_others_with_our_error(folder: tuple[Path, str]) -> None:
    """A thread in a call when another closes the model gets `ClosedError`; none hangs."""
    llm = LLM(folder[0], device=folder[1], slots=9, max_length=4096 // 64, max_batch=3)
    begun = threading.Barrier(3)

    def work() -> str:
        stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=50, ignore_eos=True))
        next(stream)
        begun.wait(GUARD)
        try:
            return f"{sum(1 for _ in stream)} tokens"
        except (ClosedError, CancelledError) as error:
            return type(error).__name__

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(work) for _ in range(2)]
        begun.wait(GUARD)
        llm.close()
        assert {job.result(GUARD) for job in jobs} <= {"ClosedError", "49 tokens"}
    with pytest.raises(ClosedError):
        llm.generate(PROMPTS[0])


def test_a_failed_call_leaves_a_working_object(llm: LLM) -> None:
    """A step that breaks in one thread gives that thread its error; afterwards every thread gets its tokens."""
    alone = [llm.generate(prompt, one)[0].token_ids for prompt, one in zip(PROMPTS, PARAMS, strict=True)]
    decode, failures = llm.engine._executor.decode, [RuntimeError("broken"), RuntimeError("broken")]

    def break_off(*fed: object) -> object:
        if failures:
            raise failures.pop()
        return decode(*fed)

    llm.engine._executor.decode = break_off

    def work(number: int) -> object:
        try:
            return llm.generate(PROMPTS[number], PARAMS[number])[0].token_ids
        except RuntimeError as error:
            return str(error)

    found = together(work)
    assert found.count("broken") == 2
    assert all(got in (wanted, "broken") for got, wanted in zip(found, alone, strict=True))
    assert together(work) == alone


def test_the_lock_is_handed_on_in_order() -> None:
    """First come, first served; the holder may take it again; a try does not wait."""
    lock, order = FairLock(), []
    ready = threading.Semaphore(0)

    def work(number: int) -> None:
        ready.release()
        with lock, lock:
            order.append(number)
            assert not tried(lock)

    def tried(lock: FairLock) -> bool:
        return ThreadPoolExecutor(1).submit(lock.acquire, wait=False).result(GUARD)

    with ThreadPoolExecutor(5) as pool:
        with lock:
            jobs = []
            for number in range(5):
                jobs.append(pool.submit(work, number))
                ready.acquire(timeout=GUARD)
                while len(lock._waiting) <= number:  # until it stands in the queue
                    pass
        for job in jobs:
            job.result(GUARD)
    assert order == list(range(5))
    assert lock._owner is None


@pytest.mark.parametrize("execution", ["host", "graph"])
def test_the_model_itself_may_be_called_beside_the_engine(folder: tuple[Path, str], execution: str) -> None:
    """A thread that calls `llm.model` waits for the engine's step, and gets the logits it gets alone; so does the engine."""
    options = {"device": folder[1], "slots": 9, "max_length": 48, "max_batch": 3, "execution": execution}
    ids, over, found = torch.tensor([[5, 6, 7, 8, 9, 10]], device=folder[1]), threading.Event(), []

    def logits(llm: LLM) -> torch.Tensor:
        with torch.inference_mode():
            return llm.model(input_ids=ids, use_cache=False).logits.clone()

    with LLM(folder[0], **options) as llm:
        expected, alone = [one.token_ids for one in llm.generate(PROMPTS, PARAMS)], logits(llm)

        def call() -> None:
            while not over.is_set():
                found.append(torch.equal(logits(llm), alone))

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(call)
            try:
                for _ in range(3):
                    assert [one.token_ids for one in llm.generate(PROMPTS, PARAMS)] == expected
            finally:
                over.set()
            other.result(GUARD)
    assert found
    assert all(found)
