"""The size of a pass over prompts where it is auto: how copies, computation and memory decide it."""

import random
import re
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from expertflow import EngineConfig
from expertflow.cli.plan import _stall
from expertflow.engine.plan import Plan, make_plan
from expertflow.engine.planning.pass_size import (
    PACED,
    PassWork,
    Speeds,
    attention_flops,
    pass_tokens,
    token_flops,
)
from expertflow.engine.prepare import prepare
from expertflow.errors import BudgetError
from expertflow.formats.format import TensorSpec
from expertflow.formats.plain import PLAIN
from expertflow.formats.records import StoreLayout
from expertflow.models.shape import ModelShape
from expertflow.schedule.scheduler import Prefill, Scheduler
from helpers import MakeCheckpoint, load_resident

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH, DENSE = 12, 128, 8, 2048, 768, 226_000_000
RECORD = 3 * HIDDEN * WIDTH * 2
LINK, COMPUTE = 50e9, 300e12


@pytest.fixture
def shape(make_checkpoint: MakeCheckpoint) -> ModelShape:
    """A small model's figures with the sizes of a large one."""
    specs = tuple(
        TensorSpec(name=name, shape=size, dtype="bfloat16", format=PLAIN)
        for name, size in (("gate_up_proj", (2 * WIDTH, HIDDEN)), ("down_proj", (HIDDEN, WIDTH)))
    )
    small = prepare(make_checkpoint("qwen3_moe", "bfloat16"), EngineConfig(device="cpu")).plan.shape
    return replace(
        small, layers=LAYERS, experts=EXPERTS, top_k=TOP_K, specs=specs, records=StoreLayout.of([specs] * LAYERS),
        hidden=HIDDEN, expert_width=HIDDEN, heads=32, head_width=4096, vocabulary=151936, context=1 << 20,
        dense_bytes=1_700_000_000, multiplied=DENSE, windows=(None,) * LAYERS, kv=(replace(small.kv[0], bytes_per_token=2048, read_per_token=2048),) * LAYERS,
    )  # fmt: skip


def plan_of(shape: ModelShape, device: str = "cuda", **options: Any) -> Plan:
    """A plan of one sequence unless stated otherwise."""
    config = EngineConfig(**{"max_batch": 1, "max_length": 100_000, "execution": "graph", **options})
    return make_plan(config, shape, device, "next-use")


def test_a_pass_is_computed_while_its_copies_are_made(shape: ModelShape) -> None:
    """Few experts are missing: as many tokens as make both times equal, and not 64 more."""
    missing = 100
    plan = plan_of(shape, slots=LAYERS * EXPERTS - missing)
    copies = missing * RECORD / LINK
    token = 2 * (DENSE + LAYERS * TOP_K * 3 * HIDDEN * WIDTH) / COMPUTE
    assert 0 <= plan.prefill_chunk * token - copies < 64 * token
    assert plan.copies_seconds == pytest.approx(copies)
    attention = LAYERS * 4 * 4096 * 100_000 / (PACED * COMPUTE)
    stated = plan_of(shape, slots=LAYERS * EXPERTS - missing, prefill_chunk=plan.prefill_chunk)
    assert stated.stall_seconds == pytest.approx(1.15 * stated.prefill_chunk * (token / PACED + attention))
    assert stated.pace is None


def test_sizes_where_nothing_or_much_is_copied(shape: ModelShape) -> None:
    """Everything resident, nearly nothing missing, everything missing without a budget, on a CPU, and what prompts allow."""
    assert plan_of(shape, slots="100%").prefill_chunk == 2048
    assert plan_of(shape, slots=LAYERS * EXPERTS - 1).prefill_chunk == 512
    assert plan_of(shape, slots=1).prefill_chunk == 8192
    assert plan_of(shape, slots=1, execution="host").prefill_chunk == 2048  # scores take memory
    assert plan_of(shape, "cpu", slots=1).prefill_chunk == 512
    assert plan_of(shape, "cpu", slots=1).stall_seconds is None
    assert plan_of(shape, slots=1, max_length=700, max_batch=3).prefill_chunk == 2100
    assert plan_of(shape, slots=1, max_length=100, max_batch=3).prefill_chunk == 300
    assert plan_of(shape, slots=1, prefill_chunk=7).prefill_chunk == 7


def seconds_of(begin: int, end: int, windows: tuple[int | None, ...]) -> float:
    """What tokens of a prompt take beside steps, token by token and layer by layer."""
    products = 2 * (DENSE + LAYERS * TOP_K * 3 * HIDDEN * WIDTH)
    seen = sum(min(place + 1, window or place + 1) for place in range(begin, end) for window in set(windows)) / len(set(windows))  # fmt: skip
    return ((end - begin) * products / PACED + LAYERS * 4 * 4096 * seen / PACED) / COMPUTE


@pytest.mark.parametrize("missing", [0.5, 0.2, 0.005])
@pytest.mark.parametrize("windows", [(None,) * LAYERS, (None, 128) * (LAYERS // 2)])
def test_nobody_waits_longer_than_the_plan_says(
    shape: ModelShape, windows: tuple[int | None, ...], missing: float
) -> None:
    """A long prompt beside a sequence that steps: no pass computes longer than stated, nor 1.3 times its copies but where 512 tokens do."""
    length = 66_000
    slots = int(LAYERS * EXPERTS * (1 - missing))
    plan = plan_of(replace(shape, windows=windows), slots=slots, max_length=length, max_batch=2)
    copies = (LAYERS * EXPERTS - slots) * RECORD / LINK
    scheduler = Scheduler(rows=2, batch=2, chunk=plan.prefill_chunk, unequal=True, page=64, pace=plan.pace)
    scheduler.add(0, 8)
    scheduler.done(scheduler.next())
    scheduler.add(1, length - 10)
    passes, waits = [], list[float]()
    while not (passes and passes[-1].last):
        turn = scheduler.next()
        if isinstance(turn, Prefill):
            (part,) = turn.parts
            scheduler.done(turn)
            passes.append(part)
            waits.append(max(copies, seconds_of(part.begin, part.end, windows)))
    assert all(part.begin % 64 == 0 for part in passes)
    assert plan.stall_seconds >= 1.15 * max(waits)
    slow = [part for part, wait in zip(passes, waits, strict=True) if 1.15 * wait > 1.3 * copies]
    assert all(part.end - part.begin <= 512 for part in slow)
    assert (plan.stall_seconds > 1.3001 * copies) == bool(slow) == (missing == 0.005)
    assert plan.stall_seconds < 1.2 * 1.15 * max(waits)  # it is no guess far above
    if not slow:  # no pass but the last two is smaller than what its copies hide, where memory allows it, or than an even share of what is left
        small = [part for part in passes[:-2] if part.end - part.begin < plan.prefill_chunk]
        assert small
        for part in small:
            left = passes[-1].end - part.begin
            share = left / ceil(left / plan.prefill_chunk)
            assert seconds_of(part.begin, part.end + 64, windows) >= copies or part.end - part.begin >= share


def test_pieces_of_one_size_are_not_bounded(shape: ModelShape) -> None:
    """With `batch_invariant` every piece has the plan's size, and the wait behind a long context is stated as it is."""
    options = {"slots": "50%", "max_length": 100_000, "max_batch": 2}
    fixed, paced = plan_of(shape, batch_invariant=True, **options), plan_of(shape, **options)
    assert fixed.pace is None
    assert fixed.prefill_chunk == paced.prefill_chunk
    last = seconds_of(99_999, 100_000, (None,)) * fixed.prefill_chunk
    assert fixed.stall_seconds == pytest.approx(1.15 * last)
    assert paced.stall_seconds == pytest.approx(1.3 * fixed.copies_seconds)
    assert fixed.stall_seconds > 2 * paced.stall_seconds


def test_the_plan_says_what_a_pass_has_behind_a_long_context(shape: ModelShape) -> None:
    """How many tokens; and that the least take longer than the copies, where they do."""
    long = {"max_length": 100_000, "max_batch": 2}
    text = _stall(plan := plan_of(shape, slots="50%", **long))
    found = int(re.search(r"Behind 100000 tokens it has (\d+)\.", text)[1])
    assert 512 < found < plan.prefill_chunk
    assert 1.15 * seconds_of(100_000, 100_000 + found, (None,)) <= 1.3 * plan.copies_seconds
    assert "has 512, the least, whose attention takes longer" in _stall(
        plan_of(shape, slots=LAYERS * EXPERTS - 9, **long)
    )
    assert "Behind" not in _stall(plan_of(shape, slots="50%", batch_invariant=True, **long))
    assert _stall(plan_of(shape, "cpu", slots="50%", **long)) == ""


def test_budgets_bound_the_pass(shape: ModelShape) -> None:
    """Random budgets: the plan fits, and a pass takes an eighth more than the smallest at most, a quarter of what is left, or copies no longer."""
    draw = random.Random(5)
    for _ in range(100):
        together = {"max_length": draw.choice([600, 5000, 60_000]), "max_batch": draw.choice([1, 8])}
        options = {**together, "execution": draw.choice(["graph", "host"])}
        smallest = plan_of(shape, **options, prefill_chunk=512)
        budget = smallest.least + draw.randrange(1 << draw.randrange(25, 35))
        plan = plan_of(shape, **options, gpu_memory=budget)
        assert plan.total <= budget
        assert 512 <= plan.prefill_chunk <= options["max_batch"] * options["max_length"]
        allowed = min(budget / 8, (budget - smallest.least) / 4)
        assert plan.workspace - smallest.workspace <= allowed
        missing = plan.competing - plan.slots
        enough = plan.prefill_chunk * token_flops(shape) / COMPUTE >= missing * RECORD / LINK
        larger = plan_of(shape, **options, prefill_chunk=plan.prefill_chunk + 64)
        full = larger.workspace - smallest.workspace > allowed
        assert enough or full or plan.prefill_chunk + 64 > options["max_batch"] * options["max_length"]


def test_the_least_budget_is_that_of_the_smallest_pass(shape: ModelShape) -> None:
    """A larger pass is taken from what is left, so it refuses no budget that 512 tokens work with."""
    roomy = plan_of(shape, gpu_memory="12GiB")
    assert roomy.prefill_chunk > 512
    assert plan_of(shape, gpu_memory=roomy.least).total <= roomy.least
    with pytest.raises(BudgetError) as refused:
        plan_of(shape, gpu_memory=roomy.least - 1)
    assert refused.value.least_bytes == roomy.least == plan_of(shape, gpu_memory="12GiB", prefill_chunk=512).least


def test_more_slots_or_a_faster_link_never_make_a_pass_larger() -> None:
    """Random work: less to copy, or copies that take less time, ask for fewer tokens or as many; the limit always holds."""
    draw = random.Random(6)
    for _ in range(300):
        work = PassWork(draw.randrange(1, 1 << 36), draw.randrange(1 << 24, 1 << 34))
        speeds, limit = Speeds(draw.uniform(1e9, 1e11), draw.uniform(1e12, 1e15)), draw.randrange(1, 1 << 15)
        tokens = pass_tokens(work, speeds, limit)
        assert min(512, limit) <= tokens <= limit
        assert pass_tokens(work._replace(copied=work.copied // 2 + 1), speeds, limit) <= tokens
        assert pass_tokens(work, speeds._replace(link=2 * speeds.link), limit) <= tokens
        assert pass_tokens(work, speeds._replace(compute=2 * speeds.compute), limit) >= tokens


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_operations_are_those_that_torch_counts(model_type: str, make_checkpoint: MakeCheckpoint) -> None:
    """A pass of 7 tokens over the stock model, its attention without a kernel: every product is in the figures, and the head's."""
    folder, tokens = make_checkpoint(model_type), 7
    shape = prepare(folder, EngineConfig(device="cpu")).plan.shape
    model = load_resident(folder)
    model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.arange(3, 3 + tokens)[None], logits_to_keep=1)
    head = 2 * shape.hidden * shape.vocabulary
    counted = counter.get_total_flops() - head
    planned = tokens * (token_flops(shape) + attention_flops(shape, tokens))
    assert 0.9 * counted <= planned <= 1.15 * counted
