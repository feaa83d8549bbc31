"""The second turn of a chat: its first token beside that of a fresh prompt of only its new tokens plus the copy of what is kept.

Shape `q`: Qwen3-MoE, 12 layers x 128 experts, bf16, a quarter of the experts on the device. Shape `g`: gpt-oss-20b, MXFP4, a half. Weights
are random and embeddings wide, so that routing is spread; tokens are drawn. Through `LLM`, with the helpers of `engine_h100.py`.

A first turn of so many tokens is read and answered. The second turn is that prompt, the answer, and new tokens. Beside it a fresh prompt has as
many tokens as the second turn had to read, and page-locked memory of the kept bytes is copied to the device. The ratio is bound to 1.1.
Then a model without reuse reads the second turn whole: with `batch_invariant` the answers have to be equal.

Usage: python benchmarks/second_turn.py --out FILE
       --tiny: small widths and few tokens, for a CPU
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
from engine_h100 import sync
from stand_ins import SEED, WIDE, StandIn, device, make_config, random_tokens

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
        lengths: tokens of the first turn.
        piece: tokens of a pass with `batch_invariant`, and so of what is kept.
        new: new tokens of the second turn.
        answer: generated tokens of a turn.
        chats: of each length.
        warm: chats before the first ones, in which kernels are compiled and steps captured.
    """

    lengths: tuple[int, ...] = (2048, 8192, 32768)
    piece: int = 2048
    new: int = 256
    answer: int = 32
    chats: int = 2
    warm: int = 2

    @property
    def params(self) -> SamplingParams:
        """How a turn is answered."""
        return SamplingParams(max_tokens=self.answer, ignore_eos=True)


TINY = Sizes(lengths=(64, 128), piece=64, new=9, answer=3, chats=1, warm=0)
SHARES = {"q": "25%", "g": "50%"}
FORMATS = {"q": "bf16", "g": "mxfp4"}
BOUND = 1.1


@dataclass(kw_only=True)
class Row:
    """Chats of one shape, way of running and length; lists hold one number a chat, seconds unless stated otherwise."""

    shape: str
    batch_invariant: bool
    tokens: int
    slots: int
    cached_tokens: int = 0
    read_tokens: int = 0
    kept_bytes: int = 0
    first_turn: list[float] = field(default_factory=list)
    second_turn: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens_equal: bool = True
    peak_bytes: int = 0
    planned_bytes: int = 0

    @property
    def ratio(self) -> float:
        """The second turn's first token beside a fresh prompt and the copy."""
        return statistics.median(self.second_turn) / (statistics.median(self.fresh) + statistics.median(self.copies))

    def line(self) -> str:
        """As a line of a printed table."""
        first, second, fresh, copy, whole = (
            statistics.median(found)
            for found in (self.first_turn, self.second_turn, self.fresh, self.copies, self.whole)
        )
        return (
            f"{self.shape} {'invariant' if self.batch_invariant else 'default':9} {self.tokens:6d} tokens, {self.cached_tokens:5d} kept, "
            f"{self.read_tokens:4d} read: first turn {first:.3f} s, second {second:.3f}, without reuse {whole:.3f}; fresh {fresh:.3f} + copy "
            f"{copy:.3f} ({self.kept_bytes / 2**20:.0f} MiB): ratio {self.ratio:.3f}  {'equal' if self.tokens_equal else 'other tokens'} "
            f"{self.peak_bytes / 2**30:.2f}{'<=' if self.peak_bytes <= self.planned_bytes else '>'}{self.planned_bytes / 2**30:.2f} GiB"
        )


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Both prompts of a chat, and the second answer."""

    first: list[int]
    second: list[int]
    answer: tuple[int, ...]


def kept_bytes(llm: LLM, tokens: int) -> int:
    """Bytes of keys and values that a restart behind so many tokens needs."""
    layout = llm.plan.kv_layout
    assert layout is not None
    windows = [layout.kinds[kind].window for kind in layout.layers]
    sizes = [layer.bytes_per_token for layer in llm.plan.shape.kv if layer.in_pages]
    return sum(min(tokens, window or tokens) * size for window, size in zip(windows, sizes, strict=True))


def copy_seconds(nbytes: int) -> float:
    """Seconds of one copy from page-locked memory to the device."""
    cuda = device() == "cuda"
    here, there = (
        torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda),
        torch.empty(nbytes, dtype=torch.uint8, device=device()),
    )
    found = []
    for _ in range(3):
        sync()
        began = time.perf_counter()
        there.copy_(here, non_blocking=True)
        sync()
        found.append(time.perf_counter() - began)
    return min(found)


def chat(llm: LLM, prompts: list[list[int]], row: Row, params: SamplingParams) -> Chat:
    """Two turns, then a fresh prompt of as many tokens as the second one read."""
    first, new, fresh = prompts
    one = llm.generate([first], params)[0]
    second = [*first, *one.token_ids, *new]
    two = llm.generate([second], params)[0]
    row.cached_tokens, row.read_tokens = two.cached_tokens, len(second) - two.cached_tokens
    three = llm.generate([fresh[: row.read_tokens]], params)[0]
    if two.cached_tokens <= 0 or three.cached_tokens:
        raise SystemExit(
            f"{two.cached_tokens} tokens of a second turn were kept, and {three.cached_tokens} of a fresh prompt"
        )
    row.first_turn.append(one.first_token_seconds)
    row.second_turn.append(two.first_token_seconds)
    row.fresh.append(three.first_token_seconds)
    return Chat(first=first, second=second, answer=two.token_ids)


def drawn(vocabulary: int, sizes: Sizes) -> Iterator[list[list[int]]]:
    """A first turn's prompt, new tokens, and a fresh prompt, chat by chat; no two of them begin alike."""
    chats = [sizes.lengths[0]] * sizes.warm + [length for length in sizes.lengths for _ in range(sizes.chats)]
    counts = [(length, sizes.new, sizes.new + sizes.answer + sizes.piece) for length in chats]
    tokens, begin = random_tokens(vocabulary, sum(map(sum, counts))), 0
    for parts in counts:
        ends = list(accumulate(parts, initial=begin))
        yield [tokens[first:last] for first, last in pairwise(ends)]
        begin = ends[-1]


def measure(stand_in: StandIn, shape: str, sizes: Sizes, *, invariant: bool) -> list[Row]:
    """All lengths of a shape, with reuse and then without."""
    longest = max(sizes.lengths) + sizes.new + 2 * sizes.answer
    options = {
        "slots": SHARES[shape],
        "max_batch": 1,
        "max_length": longest,
        "strategy": "next-use",
        "execution": "graph",
    }
    options |= {"batch_invariant": True, "prefill_chunk": sizes.piece} if invariant else {}
    rows, chats = list[Row](), list[list[Chat]]()
    with stand_in.open(prefix_memory="4GiB" if device() == "cuda" else "64MiB", **options) as opened:
        plan, llm = opened.llm.plan, opened.llm
        prompts = drawn(plan.shape.vocabulary, sizes)
        for _ in range(sizes.warm):
            chat(llm, next(prompts), Row(shape=shape, batch_invariant=invariant, tokens=0, slots=0), sizes.params)
        for length in sizes.lengths:
            row = Row(shape=shape, batch_invariant=invariant, tokens=length, slots=plan.slots)
            chats.append([chat(llm, next(prompts), row, sizes.params) for _ in range(sizes.chats)])
            row.kept_bytes = kept_bytes(llm, row.cached_tokens)
            row.peak_bytes, row.planned_bytes = opened.peak, plan.total
            rows.append(row)
    for row in rows:
        row.copies.append(copy_seconds(row.kept_bytes))
    with stand_in.open(**options) as opened:
        if sizes.warm:
            opened.llm.generate([chats[0][0].second], sizes.params)
        for row, those in zip(rows, chats, strict=True):
            for one in those if invariant else those[:1]:
                output = opened.llm.generate([one.second], sizes.params)[0]
                row.whole.append(output.first_token_seconds)
                row.tokens_equal &= output.token_ids == one.answer
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="q,g")
    parser.add_argument("--lengths", default="")
    parser.add_argument("--out", type=Path, default=Path("second_turn.json"))
    parser.add_argument("--tiny", action="store_true", help="small widths and few tokens; always so without CUDA")
    options = parser.parse_args(argv)
    options.tiny |= device() == "cpu"
    sizes, rows, began = TINY if options.tiny else Sizes(), list[Row](), time.perf_counter()
    if options.lengths:
        sizes = sizes._replace(lengths=tuple(map(int, options.lengths.split(","))))
    for shape in options.shapes.split(","):
        drawn_for = make_config(shape, tiny=options.tiny, packed=FORMATS[shape])
        context = max(drawn_for.max_position_embeddings, 2 * max(sizes.lengths))
        config = type(drawn_for).from_dict({**drawn_for.to_dict(), "max_position_embeddings": context})
        with StandIn(config, embedding=WIDE) as stand_in:
            for invariant in (False, True):
                found = measure(stand_in, shape, sizes, invariant=invariant)
                rows += found
                write(options, sizes, rows)
                for row in found:
                    print(f"{time.perf_counter() - began:4.0f} s {row.line()}", flush=True)
    wrong = [
        row for row in rows if (row.batch_invariant and not row.tokens_equal) or row.peak_bytes > row.planned_bytes
    ]
    if wrong:
        raise SystemExit(f"{len(wrong)} rows have other tokens than without reuse, or are over their plan")


def write(options: argparse.Namespace, sizes: Sizes, rows: list[Row]) -> None:
    """The result file, as far as it is measured."""
    result = {
        **about(device())._asdict(), "benchmark": "second turn", "seed": SEED, "bound": BOUND,
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"} | sizes._asdict(),
    }  # fmt: skip
    options.out.write_text(
        json.dumps({**result, "rows": [{**asdict(row), "ratio": row.ratio} for row in rows]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
