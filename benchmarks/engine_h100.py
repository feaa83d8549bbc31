"""The cache engine at full size, through `LLM`: every strategy as whole-step CUDA graphs, beside all-resident and the link.

Shape `q`: Qwen3-MoE, 12 layers x 128 experts top-8, hidden 2048, expert width 768; random bf16 weights, embeddings drawn wide so that
routing is spread, random tokens fed in. Shape `g`: gpt-oss-20b, 24 layers x 32 experts top-4, hidden 2880; random weights, tokens and
routing replayed from a recorded trace.

For each batch the all-resident model runs first. Every strategy then reads the same prompts and is fed the same tokens.
Each row has milliseconds a step (3 windows, every step waited for, as `LLM` does), loads, loads ahead and wasted, and
GB/s over the link. Beside them are the link's time for the bytes and the all-resident step. Checked in every row: the
logits of some steps before the windows and of one behind them, bit for bit, and the measured peak against the plan.

Shapes `q30` and `g120` are Qwen3-30B-A3B and gpt-oss-120b: as `q`, with their layers and experts. With `--formats` experts are packed;
the formats take turns at every row.

Usage: python benchmarks/engine_h100.py --shape q --out FILE
       python benchmarks/engine_h100.py --shape g --trace TEST.trace --predictor FOLDER --out FILE
       --tiny: small widths and few steps, for a CPU
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from stand_ins import SEED, WIDE, Opened, StandIn, device, make_config, parts_of, random_tokens
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.cache.strategy import STRATEGIES
from expertflow.engine.plan import Plan
from expertflow.execution.replay import Replay
from expertflow.trace.format import Trace, load_trace

LENGTH, BEGIN, WINDOWS = 512, 60, 3
"""Tokens of a sequence at most, tokens of a prompt, and windows timed."""
STEPS = {
    "q": {1: (60, 40), 4: (60, 30), 8: (40, 15), 16: (10, 4)},
    "g": {1: (20, 15), 4: (8, 5), 8: (5, 3), 16: (4, 2)},
    "q30": {1: (16, 10), 4: (8, 5), 8: (5, 3), 16: (3, 2)},
    "g120": {1: (20, 15), 4: (10, 6), 8: (6, 4), 16: (4, 2)},
}
"""By shape and batch: steps before the windows, and steps of a window. The same for every strategy, and so the same tokens."""
TINY_STEPS = 4, 2
SOME, SOME_SHARE = ("on-demand", "ring"), "0.25"
"""Strategies that batches of 8 and 16 get at one share of slots only: their steps are the longest."""
CHECKED = (0, 1, 2, 5, 10)
"""Steps, counted from the first, whose logits are compared bit for bit; and the last one's."""
PROBED = 8
"""Records copied to see how fast the link is at the moment."""
LINK, MEMORY = 50.6e9, 3.0e12
"""Bytes a second: zero-copy fetch and device memory at their best, from kernels_h100.json."""
ORDER = "plec,lru-global,lru,next-use,on-demand,ring"
SHARES = {"q": "0.5,0.25", "g": "0.25,0.5,0.125", "q30": "8GiB,12GiB", "g120": "16GiB,24GiB"}


@dataclass(kw_only=True)
class Row:
    """One configuration. Lists hold one number a window; counts are of a step."""

    slots: int
    strategy: str
    batch: int
    budget_bytes: int
    record_bytes: int = 0
    format: str = "bf16"
    peak_bytes: int = 0
    tokens_equal: bool = True
    logits_equal: bool = True
    resident_ms: float = 0.0
    ms: list[float] = field(default_factory=list)
    needed: list[float] = field(default_factory=list)
    corrections: list[float] = field(default_factory=list)
    ahead: list[float] = field(default_factory=list)
    ahead_used: list[float] = field(default_factory=list)
    wasted: list[float] = field(default_factory=list)
    carried: list[float] = field(default_factory=list)
    probe_gbps: list[float] = field(default_factory=list)

    def line(self) -> str:
        """As a line of a printed table."""
        record_bytes = self.record_bytes
        ms, ahead, corrections = (statistics.median(numbers) for numbers in (self.ms, self.ahead, self.corrections))
        loads, probe = statistics.median(self.carried), statistics.median(self.probe_gbps)
        link = loads * record_bytes / LINK * 1e3
        idle = max(0.0, 1 - (self.resident_ms + link) / ms)
        return (
            f"{self.format:5s} {self.slots:5d} {self.strategy:11s} B={self.batch:<2d} {self.batch / ms * 1e3:7.1f} tok/s {ms:7.2f} ms "
            f"({min(self.ms):.2f}-{max(self.ms):.2f}) loads {corrections:6.1f}+{ahead:5.1f} ahead, "
            f"{statistics.median(self.wasted):4.1f} vain, of {statistics.median(self.needed):6.1f}; "
            f"link {loads * record_bytes / ms / 1e6:4.1f} GB/s (probe {probe:.1f}); bounds: link {link:6.2f} resident {self.resident_ms:5.2f} ms; "
            f"idle {idle:4.1%}  {'exact' if self.tokens_equal and self.logits_equal else 'WRONG'} "
            f"{self.peak_bytes / 2**30:.2f}{'<=' if self.peak_bytes <= self.budget_bytes else '>'}{self.budget_bytes / 2**30:.2f} GiB"
        )


def sync() -> None:
    """Wait for the device."""
    if device() == "cuda":
        torch.cuda.synchronize()


def probe(llm: LLM) -> float:
    """10^9 bytes a second that copies of a few records to the device reach now."""
    store = llm.shared_weights.store.buffer
    count, room = min(PROBED, len(store)), torch.empty(store.shape[1], dtype=torch.uint8, device=device())
    sync()
    began = time.perf_counter()
    for number in range(count):
        room.copy_(store[number], non_blocking=True)
    sync()
    return count * store.shape[1] / (time.perf_counter() - began) / 1e9


@dataclass(frozen=True)
class Work:
    """What every model of one batch size runs.

    Attributes:
        prompts: token ids, one sequence each.
        replay: tokens that are fed, and routes where they are recorded.
        before: steps before the windows.
        steps: steps of a window.
    """

    prompts: list[list[int]]
    replay: Replay
    before: int
    steps: int

    @property
    def limit(self) -> int:
        """New tokens of a sequence: one of the prompt's pass, those of the steps, one before each window and one more, and one step to check."""
        return self.before + WINDOWS * (self.steps + 1) + 3

    @property
    def options(self) -> dict[str, Any]:
        """Fields of `EngineConfig`: all prompts are read in one pass, and all sequences step together."""
        batch = len(self.prompts)
        return {"max_batch": batch, "max_live": batch, "max_length": LENGTH, "prefill_chunk": batch * BEGIN}


def make_work(shape: str, batch: int, vocabulary: int, trace: Trace | None, *, tiny: bool) -> Work:
    """Prompts and what follows them: random tokens, or parts of the trace's sequences."""
    before, steps = TINY_STEPS if tiny else STEPS[shape][batch]
    length = BEGIN + before + WINDOWS * (steps + 1) + 3
    if trace is None:
        tokens = random_tokens(vocabulary, batch, length)
        return Work([one[:BEGIN] for one in tokens], Replay(tokens=tokens), before, steps)
    parts = parts_of(trace, [length] * batch)
    return Work([one[:BEGIN] for one in parts.tokens], parts.replay, before, steps)


class Watcher:
    """Keeps the logits of some steps, in host memory."""

    def __init__(self) -> None:
        """Count from the prompts' pass on."""
        self.step, self.kept = -1, dict[int, Tensor]()

    def __call__(self, numbers: Sequence[int], logits: Tensor) -> None:
        """Keep a step's `[B, V]`, if it is to be checked."""
        del numbers
        if self.step in CHECKED:
            self.kept[self.step] = logits.to("cpu", copy=True)
        self.step += 1

    def last(self, numbers: Sequence[int], logits: Tensor) -> None:
        """Keep the last step's."""
        del numbers
        self.kept[-1] = logits.to("cpu", copy=True)


def add(llm: LLM, work: Work) -> None:
    """Queue the work's requests."""
    params = SamplingParams(max_tokens=work.limit, ignore_eos=True)
    for index, prompt in enumerate(work.prompts):
        llm.engine.add(llm.request(prompt, params, index=index))


def run(opened: Opened, work: Work, row: Row) -> dict[int, Tensor]:
    """Prompts, steps before the windows, the windows, and a step to check. Fills in the row; returns the kept logits.

    The same requests have run once before, so that no step is captured inside a window.
    """
    llm, engine, watcher = opened.llm, opened.llm.engine, Watcher()
    add(llm, work)
    while engine.unfinished:
        engine.step()
    engine.watch_logits(watcher)
    add(llm, work)
    while watcher.step < work.before:
        engine.step()
    engine.watch_logits(None)
    engine.step()
    record, counted = llm.plan.record_bytes, work.steps + 1
    for _ in range(WINDOWS):
        row.probe_gbps.append(probe(llm))
        start = llm.stats.cache
        engine.step()  # not timed: it has begun already, and meanwhile it has ended
        began = time.perf_counter()
        for _ in range(work.steps):
            engine.step()
        row.ms.append((time.perf_counter() - began) / work.steps * 1e3)
        end = llm.stats.cache
        row.corrections.append((end.loads - start.loads) / counted)
        row.ahead.append((end.prefetched - start.prefetched) / counted)
        row.ahead_used.append((end.prefetch_hits - start.prefetch_hits) / counted)
        row.wasted.append((end.wasted - start.wasted) / counted)
        row.carried.append((end.bytes_moved - start.bytes_moved) / record / counted)
        row.needed.append((end.accesses - start.accesses) / counted)
    engine.watch_logits(watcher.last)
    while engine.unfinished:
        engine.step()
    engine.watch_logits(None)
    row.peak_bytes = opened.peak
    return watcher.kept


def measure(
    stand_in: StandIn, work: Work, name: str, room: str, packed: str, **more: Any
) -> tuple[Row, dict[int, Tensor]]:
    """One configuration; `room` is a share of the experts, or a budget; `more` are options in place of the work's."""
    size = {"gpu_memory": room} if room.endswith("B") else {"slots": f"{float(room):.2%}"}
    options = {"strategy": name, "execution": "graph", "routing": work.replay, **size, **work.options, **more}
    with stand_in.open(predicted=STRATEGIES[name].predicted, **options) as opened:
        plan = opened.llm.plan
        row = Row(
            slots=plan.slots, strategy=name, batch=len(work.prompts), budget_bytes=plan.budget or plan.total, record_bytes=plan.record_bytes,
            format=packed,
        )  # fmt: skip
        return row, run(opened, work, row)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["q", "g", "q30", "g120"], default="q")
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--strategies", default=ORDER)
    parser.add_argument("--shares", default="", help="slots as shares of all experts, or budgets such as 8GiB")
    parser.add_argument("--formats", default="bf16", help="how experts are stored: bf16, mxfp4, int4, fp8, nvfp4")
    parser.add_argument(
        "--embedding", type=float, help=f"how wide embeddings are drawn; default: {WIDE} for shape q, 1 for g"
    )
    parser.add_argument("--deadline", type=float, default=1e9, help="stop measuring then, seconds")
    parser.add_argument("--tiny", action="store_true", help="small widths and few steps; always so without CUDA")
    options = parser.parse_args(argv)
    options.tiny |= device() == "cpu"
    options.shares = options.shares or SHARES[options.shape]
    options.embedding = options.embedding or (1.0 if options.shape == "g" else WIDE)
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write the numbers."""
    began, options = time.perf_counter(), read_options(argv)
    batches = [int(text) for text in options.batches.split(",")]
    chosen = options.strategies.split(",")
    names = [name for name in chosen if options.predictor is not None or not STRATEGIES[name].predicted]
    trace = None if options.trace is None else load_trace(options.trace).without("repetition")
    configs = {
        packed: make_config(options.shape, tiny=options.tiny, packed=packed) for packed in options.formats.split(",")
    }
    vocabulary = next(iter(configs.values())).vocab_size
    works = {batch: make_work(options.shape, batch, vocabulary, trace, tiny=options.tiny) for batch in batches}
    rows, truths, resident, stopped = list[Row](), {}, {}, False
    with ExitStack() as opened:
        stand_ins = {
            packed: opened.enter_context(StandIn(config, embedding=options.embedding, predictor=options.predictor))
            for packed, config in configs.items()
        }
        plan = next(iter(stand_ins.values())).owner.plan
        for batch, packed in itertools.product(batches, stand_ins):
            row, truths[packed, batch] = measure(stand_ins[packed], works[batch], "next-use", "1.0", packed)
            resident[packed, batch] = row.ms
            print(f"{time.perf_counter() - began:4.0f} s  resident {packed} B={batch:<2d}", [round(ms, 3) for ms in row.ms], flush=True)  # fmt: skip
        for share, batch, name, packed in itertools.product(options.shares.split(","), batches, names, stand_ins):
            if name in SOME and batch >= 8 and share != SOME_SHARE:
                continue
            if time.perf_counter() - began > options.deadline:
                stopped = True
                continue
            row, kept = measure(stand_ins[packed], works[batch], name, share, packed)
            truth = truths[packed, batch]
            row.logits_equal = all(torch.equal(kept[step], truth[step]) for step in truth)
            row.tokens_equal = torch.equal(kept[-1].argmax(-1), truth[-1].argmax(-1))
            row.resident_ms = statistics.median(resident[packed, batch])
            rows.append(row)
            print(f"{time.perf_counter() - began:4.0f} s {row.line()}", flush=True)
            write(options, plan, resident, rows, complete=False)
    write(options, plan, resident, rows, complete=not stopped)
    bad = [r for r in rows if not (r.tokens_equal and r.logits_equal and r.peak_bytes <= r.budget_bytes)]
    if bad:
        raise SystemExit(f"{len(bad)} rows are not exact, or over their budget")


def write(
    options: argparse.Namespace,
    plan: Plan,
    resident: dict[tuple[str, int], list[float]],
    rows: list[Row],
    *,
    complete: bool,
) -> None:
    """The result file: after each row, so that a run that is ended leaves what it measured."""
    result = {
        **about(device())._asdict(), "benchmark": "engine", "shape": options.shape, "seed": SEED,
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"} | {"length": LENGTH, "begin": BEGIN},
        "dense_bytes": plan.shape.dense_bytes, "experts": plan.shape.total_experts,
        "bounds": {"link_bytes_per_second": LINK, "memory_bytes_per_second": MEMORY},
        "resident_ms": {f"{packed} {batch}": ms for (packed, batch), ms in resident.items()}, "complete": complete,
    }  # fmt: skip
    options.out.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
