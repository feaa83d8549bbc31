"""A captured decode step with every expert resident, through `LLM`: milliseconds, kernels, and the bound of memory.

Each model is open twice, with building blocks and with the modules' own code in their place, and windows of steps alternate between the
two. The bound is all bytes that a step reads, over the rate at which memory is read in this run. Kernels are those of torch's profiler;
busy is the time in which at least one of them runs. Logits of both are compared: they differ by rounding alone.

Shapes: `g` gpt-oss-20b, `q` Qwen3-MoE of 12 layers, `q30` Qwen3-30B-A3B, `d` DeepSeek-V2-Lite. With `--products` single products are timed instead, for several
ways to cut them. With `--near` the two are compared instead, in float32 and in bfloat16: `g` and `q` with narrow experts, whose modules
differ in bfloat16 from themselves at another number of sequences; and the perplexity of the shipped model.

Usage: python benchmarks/dense_step.py --shapes g --formats mxfp4 --batches 1 --out FILE
       python benchmarks/dense_step.py --products --out FILE
       python benchmarks/dense_step.py --near --out FILE
       --tiny: small widths, for a CPU
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from stand_ins import SEED, WIDE, Opened, StandIn, device, make_config, random_tokens
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.engine.llm import shipped_model
from expertflow.execution.captured import graph
from expertflow.execution.replay import Replay
from expertflow.kernels.blocks.given import Norm

BEGIN, FILLING, WINDOWS = 130, 400, 7
"""Tokens of a prompt, tokens of the prompt that makes every expert resident, windows timed. All steps look at 256 columns."""
STEPS, WARM, PROFILED = 15, 6, 4
"""Steps of a window, steps before the first one, steps that the profiler sees."""
NAMED = 16
"""Kernels that a result names."""
LONGEST = 400
"""Microseconds from one kernel's end to the next one's, at most: between steps more go by."""
ALL_FORMATS = {"g": "bf16,mxfp4", "q": "bf16,int4", "q30": "int4", "d": "bf16,int4"}


@dataclass(kw_only=True)
class Row:
    """One model and number of sequences. Lists have a number a window."""

    shape: str
    format: str
    batch: int
    blocks: bool
    layers: int
    ms: list[float] = field(default_factory=list)
    kernels: float = 0.0
    busy_ms: float = 0.0
    bound_ms: float = 0.0
    near: float = 0.0
    names: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Kernels by their name and the one that ended before: how many a step, and microseconds from that one's end to theirs."""

    def line(self) -> str:
        """As a line of a printed table."""
        ms = statistics.median(self.ms)
        return (
            f"{self.shape:4s}{self.format:6s} B={self.batch:<3d}{'blocks' if self.blocks else 'own':7s}{ms:7.3f} ms "
            f"({min(self.ms):.3f}-{max(self.ms):.3f})  busy {self.busy_ms:6.3f}  bound {self.bound_ms:6.3f}  {self.kernels:6.0f} kernels, "
            f"{self.kernels / self.layers:5.1f} a layer  {self.batch / ms * 1e3:7.0f} tok/s  logits differ {self.near:.1e}"
        )


def sync() -> None:
    """Wait for the device."""
    if device() == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], times: int = 10) -> float:
    """Seconds of a call, the best of some."""
    best = float("inf")
    for _ in range(times):
        sync()
        began = time.perf_counter()
        run()
        sync()
        best = min(best, time.perf_counter() - began)
    return best


def read_rate() -> float:
    """Bytes a second at which memory is read: the best of a sum and of a copy, which also writes."""
    buffer = torch.ones((1 << 30 if device() == "cuda" else 1 << 20), dtype=torch.float32, device=device())
    other = torch.empty_like(buffer)
    return max(buffer.nbytes / timed(buffer.sum), 2 * buffer.nbytes / timed(partial(other.copy_, buffer)))


@contextmanager
def own_code() -> Iterator[None]:
    """Inside, captured steps are made without building blocks."""
    with mock.patch.object(graph, "LayerBlocks", return_value=None):
        yield


class Side:
    """A model whose steps are timed.

    Args:
        opened: the model.
        prompts: of the sequences.
        limit: new tokens of each.
    """

    def __init__(self, opened: Opened, prompts: list[list[int]], limit: int) -> None:
        """Read the long prompt, so that every expert has a slot, then begin."""
        self.llm, self.engine, self.logits = opened.llm, opened.llm.engine, list[Tensor]()
        self._add([random_tokens(self.llm.plan.shape.vocabulary, FILLING)], 4)
        while self.engine.unfinished:
            self.engine.step()
        self._add(prompts, limit)
        self.engine.watch_logits(self._note)
        for _ in range(WARM):
            self.engine.step()
        self.engine.watch_logits(None)

    def _add(self, prompts: list[list[int]], limit: int) -> None:
        params = SamplingParams(max_tokens=limit, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            self.engine.add(self.llm.request(prompt, params, index=index))

    def _note(self, numbers: Any, logits: Tensor) -> None:
        del numbers
        self.logits.append(logits.to("cpu", torch.float32, copy=True))

    def window(self, steps: int) -> float:
        """Milliseconds a step."""
        sync()
        self.engine.step()  # not timed: it has begun already, and meanwhile it has ended
        began = time.perf_counter()
        for _ in range(steps):
            self.engine.step()
        return (time.perf_counter() - began) / steps * 1e3

    def profile(self, row: Row) -> None:
        """Count kernels, and the time in which one runs."""
        with profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device() == "cuda" else [])]
        ) as seen:
            for _ in range(PROFILED):
                self.engine.step()
            sync()
        spans = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in seen.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.name.startswith(("Mem", "ProfilerStep"))
        ]
        busy, reached = 0.0, 0.0
        for begin, end, _ in sorted(spans):
            busy += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        row.kernels, row.busy_ms = len(spans) / PROFILED, busy / PROFILED / 1e3
        counts, added = Counter[str](), Counter[str]()
        reached, before = min((begin for begin, _, _ in spans), default=0.0), "nothing"
        for _, end, name in sorted(spans, key=lambda span: span[1]):
            key = f"{name[:40]} behind {before[:20]}"
            counts[key] += 1
            added[key] += min(end - reached, LONGEST)
            reached, before = end, name
        row.names = {key: (counts[key] / PROFILED, us / PROFILED) for key, us in added.most_common(NAMED)}


def step_bytes(side: Side, batch: int) -> float:
    """Bytes that a step reads: dense weights but for the table of embeddings, and the experts that so many tokens choose."""
    plan, shape = side.llm.plan, side.llm.plan.shape
    config = side.llm.model.config
    table = 0 if config.tie_word_embeddings else shape.vocabulary * config.hidden_size * 2
    used = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** batch)
    return shape.dense_bytes - table + shape.layers * used * plan.record_bytes


def measure(  # noqa: PLR0913 - the last ones by keyword
    stand_in: StandIn, shape: str, packed: str, batch: int, rate: float, *, both: bool, tiny: bool
) -> list[Row]:
    """Both sides of one model and number of sequences."""
    windows, steps = (2, 2) if tiny else (WINDOWS, STEPS)
    options, prompts, limit = options_of(stand_in, batch, windows * (steps + 1) + PROFILED)
    rows, sides = list[Row](), list[Side]()
    with ExitStack() as opened:
        for blocks in (True, False) if both else (True,):
            with ExitStack() as inside:
                if not blocks:
                    inside.enter_context(own_code())
                sides.append(Side(opened.enter_context(stand_in.open(**options)), prompts, limit))
            layers = sides[-1].llm.model.config.num_hidden_layers
            rows.append(Row(shape=shape, format=packed, batch=batch, blocks=blocks, layers=layers))
        for _ in range(windows):
            for row, side in zip(rows, sides, strict=True):
                row.ms.append(side.window(steps))
        for row, side in zip(rows, sides, strict=True):
            side.profile(row)
            row.bound_ms = step_bytes(side, batch) / rate * 1e3
            pairs = zip(side.logits, sides[-1].logits, strict=True)
            row.near = max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)
            print(row.line(), flush=True)
    return rows


def near(*, tiny: bool) -> list[dict[str, Any]]:
    """How far logits of a first sequence are apart: blocks and own code, and own code beside itself with two sequences."""
    rows = []
    for shape, dtype in itertools.product(("q",) if tiny else ("g", "q"), ("float32", "bfloat16")):
        given = make_config(shape, tiny=tiny).to_dict()
        name = "moe_intermediate_size" if "moe_intermediate_size" in given else "intermediate_size"
        config = type(make_config(shape, tiny=tiny)).from_dict({**given, name: 64})
        found = {}
        with StandIn(config, embedding=WIDE, dtype=dtype) as stand_in:
            for blocks, batch in itertools.product((True, False), (1, 2)):
                with ExitStack() as opened:
                    if not blocks:
                        opened.enter_context(own_code())
                    options, prompts, limit = options_of(stand_in, batch, 2)
                    side = Side(opened.enter_context(stand_in.open(**options)), prompts, limit)
                    found[blocks, batch] = [one[0] for one in side.logits]
        for text, mine, theirs in (
            ("blocks, own", found[True, 1], found[False, 1]), ("own of two, own", found[False, 2], found[False, 1]),
            ("blocks of two, blocks", found[True, 2], found[True, 1]),
        ):  # fmt: skip
            apart = [float((one - other).norm() / other.norm()) for one, other in zip(mine, theirs, strict=True)]
            rows.append(
                {"shape": shape, "dtype": dtype, "pair": text, "median": statistics.median(apart), "most": max(apart)}
            )
            print(
                f"{shape:4s}{dtype:9s} {text:24s} median {rows[-1]['median']:.1e} most {rows[-1]['most']:.1e}",
                flush=True,
            )
    return [*rows, *perplexities(*((2, 12) if tiny else (8, 250)))]


def perplexities(batch: int, length: int) -> list[dict[str, Any]]:
    """Of the shipped model, over text that it is fed."""
    tokenizer = AutoTokenizer.from_pretrained(shipped_model())
    text = (Path(__file__).parents[1] / "docs" / "decisions.md").read_text()
    ids = tokenizer(text)["input_ids"]
    tokens, rows = [ids[place * length : (place + 1) * length] for place in range(batch)], []
    for dtype, blocks in itertools.product(("float32", "bfloat16"), (True, False)):
        lost = list[float]()

        def note(numbers: Any, logits: Tensor, lost: list[float] = lost) -> None:
            del numbers
            place = 2 + len(lost) // batch
            shares = logits.float().log_softmax(-1)
            lost.extend(-float(shares[number, tokens[number][place]]) for number in range(batch))

        options = {"max_batch": batch, "max_live": batch, "max_length": length, "slots": "100%", "execution": "graph"}
        with (
            nullcontext() if blocks else own_code(),
            LLM(dtype=dtype, device=device(), predictor="none", routing=Replay(tokens=tokens), **options) as llm,
        ):
            llm.engine.watch_logits(note)
            params = SamplingParams(max_tokens=length - 2, ignore_eos=True)
            for index, one in enumerate(tokens):
                llm.engine.add(llm.request(one[:2], params, index=index))
            while llm.engine.unfinished:
                llm.engine.step()
        rows.append(
            {
                "shape": "shipped",
                "dtype": dtype,
                "blocks": blocks,
                "tokens": len(lost),
                "perplexity": math.exp(statistics.fmean(lost)),
            }
        )
        print(
            f"shipped {dtype:9s} {'blocks' if blocks else 'own':7s} perplexity {rows[-1]['perplexity']:.4f} of {len(lost)} tokens",
            flush=True,
        )
    return rows


def options_of(stand_in: StandIn, batch: int, room: int) -> tuple[dict[str, Any], list[list[int]], int]:
    """Options of `LLM`, prompts, and new tokens of each, for `room` steps after the first ones."""
    vocabulary, limit = stand_in.owner.plan.shape.vocabulary, WARM + room + 8
    length = BEGIN + FILLING + limit
    routing = Replay(tokens=random_tokens(vocabulary, batch, length))
    options = {
        "strategy": "next-use", "execution": "graph", "slots": "100%", "routing": routing, "max_batch": batch, "max_live": batch,
        "max_length": length, "prefill_chunk": 512,
    }  # fmt: skip
    return options, random_tokens(vocabulary, batch, BEGIN), limit


def products(*, tiny: bool) -> list[dict[str, Any]]:
    """Single products in every cut: weights that together exceed the cache are read one after the other, in one graph."""
    from expertflow.kernels.blocks import product  # noqa: PLC0415 - a machine without a GPU need not have Triton

    shapes = {
        "g qkv": (5120, 2880),
        "g out": (2880, 4096),
        "q qkv": (5120, 2048),
        "q out": (2048, 4096),
        "d joined": (3648, 2048),
        "d shared": (2048, 2816),
        "g head": (201088, 2880),
    }
    shapes = {"tiny": (64, 96)} if tiny else shapes
    rows = []
    for name, (outputs, inputs) in shapes.items():
        copies = max(2, min(12, (600 << 20) // (outputs * inputs * 2)))
        weights = [torch.randn(outputs, inputs, device=device()).bfloat16() for _ in range(copies)]
        norm = Norm(torch.ones(inputs, device=device()).bfloat16(), 1e-5, wide=False)
        for tokens in (1, 4, 16):
            states = torch.randn(tokens, inputs, device=device()).bfloat16()
            cuts: dict[str, Callable[[Tensor], Any]] = {
                "torch": lambda weight, states=states: functional.linear(states, weight)
            }
            if tokens == 1:
                for cut in [product.RowCut(rows, warps) for rows in (1, 2, 4, 8) for warps in (2, 4, 8)]:
                    cuts[f"rows {cut.rows} warps {cut.warps}"] = partial(rows_of, product, states, norm, cut)
            else:
                sizes = [
                    (16, 256, 2, 4),
                    (32, 128, 4, 6),
                    (32, 256, 4, 4),
                    (64, 64, 4, 8),
                    (64, 128, 4, 5),
                    (64, 128, 8, 5),
                    (64, 256, 4, 3),
                ]
                for cut in [product.TileCut(*size) for size in sizes]:
                    text = f"tiles {cut.block_n}x{cut.block_k} warps {cut.warps} stages {cut.stages}"
                    cuts[text] = partial(tiles_of, product, states, cut)
            for text, run in cuts.items():
                seconds = replayed(run, weights)
                rows.append(
                    {
                        "shape": name,
                        "tokens": tokens,
                        "cut": text,
                        "us": seconds * 1e6,
                        "gbps": weights[0].nbytes / seconds / 1e9,
                    }
                )
                print(
                    f"{name:7s} T={tokens:<3d}{text:32s}{seconds * 1e6:8.1f} us {rows[-1]['gbps']:7.0f} GB/s",
                    flush=True,
                )
    return rows


def rows_of(product: Any, states: Tensor, norm: Norm, cut: Any, weight: Tensor) -> Tensor:
    """The product of one token."""
    return product.launch_rows(states, weight, None, norm, (None, None), cut)


def tiles_of(product: Any, states: Tensor, cut: Any, weight: Tensor) -> Tensor:
    """The product of more tokens."""
    return product.launch_tiles(states, weight, None, (None, None), cut)


def replayed(run: Callable[[Tensor], Any], weights: list[Tensor]) -> float:
    """Seconds a product takes, of all of them in one graph."""
    run(weights[0])
    if device() == "cpu":
        return timed(lambda: [run(weight) for weight in weights], 1) / len(weights)
    sync()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for weight in weights:
            run(weight)
    captured.replay()
    return timed(captured.replay) / len(weights)


def read_options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="", help="default: g,q,q30,d; with --tiny q,d")
    parser.add_argument("--formats", default="", help="how experts are stored; default: " + json.dumps(ALL_FORMATS))
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument(
        "--blocks", choices=["both", "only"], default="both", help="measure the modules' own code beside, or not"
    )
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--near", action="store_true")
    parser.add_argument(
        "--deadline", type=float, default=1e9, help="begin no model and number of sequences then, seconds"
    )
    parser.add_argument("--out", type=Path, default=Path("dense_step.json"))
    parser.add_argument("--tiny", action="store_true", help="small widths and few steps; always so without CUDA")
    options = parser.parse_args(argv)
    options.tiny |= device() == "cpu"
    options.shapes = options.shapes or ("q,d" if options.tiny else "g,q,q30,d")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write the numbers after every model and number of sequences."""
    began, options, rate, rows = time.perf_counter(), read_options(argv), read_rate(), list[Row]()
    print(f"memory is read at {rate / 1e12:.2f} TB/s", flush=True)
    single = products(tiny=options.tiny) if options.products else []
    apart = near(tiny=options.tiny) if options.near else []
    result = {
        **about(device())._asdict(), "benchmark": "dense_step", "seed": SEED, "read_bytes_per_second": rate, "products": single, "near": apart,
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"},
    }  # fmt: skip

    def write() -> None:
        options.out.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")

    write()
    for shape in () if options.products or options.near else options.shapes.split(","):
        for packed in (options.formats or ALL_FORMATS[shape]).split(","):
            if time.perf_counter() - began > options.deadline:
                return
            with StandIn(make_config(shape, tiny=options.tiny, packed=packed), embedding=WIDE) as stand_in:
                for batch in map(int, options.batches.split(",")):
                    if time.perf_counter() - began > options.deadline:
                        break
                    found = measure(
                        stand_in, shape, packed, batch, rate, both=options.blocks == "both", tiny=options.tiny
                    )
                    rows += found
                    write()
                    for row in found:
                        for name, (count, us) in row.names.items():
                            print(f"  {us:8.1f} us {count:6.1f}  {name}", flush=True)


if __name__ == "__main__":
    main()
