"""`batch_invariant` on a GPU: bits of answers alone, with seven others and staggered; and what the option costs.

Bits: gpt-oss-20b's shape in bfloat16 dense weights and MXFP4 experts, fewer layers and a smaller vocabulary, half of the experts in slots,
captured steps. 200 requests of 1 to 300 tokens are answered alone, then all added at once so that each steps with seven others, then
staggered, three steps apart. Tokens and every token's logits, the first one's too, are compared bit for bit. The same
with the option off shows that the comparison can fail.

Costs: the whole shape, in models that are opened in turns with the option off and on. Tokens a second of 1 and 8 sequences where a step has
room for 8, by the windows of `engine_h100.py`; and seconds to the first token of one long prompt and of eight at once.

Usage: python benchmarks/batch_invariant.py --out FILE [--trace TEST.trace] [--requests 200] [--parts bits,costs]
       --tiny: small widths and few requests, for a CPU
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from engine_h100 import Work, make_work, measure
from pass_size import first_tokens, prompts_of
from stand_ins import SEED, WIDE, StandIn, device, make_config, resized
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.trace.format import load_trace

TOKENS, COMPANY, APART, CONTROL = 8, 8, 3, 24
"""Tokens of an answer, sequences of a step, steps between staggered requests, and requests compared with the option off."""
LAYERS, VOCABULARY, TINY_SIZES = 6, 32_000, {"num_hidden_layers": 2, "vocab_size": 512}
LONG, SEVERAL, TINY_LONG, TINY_SEVERAL = 2048, 256, 90, 20
"""Tokens of the prompt that is read alone, and of each of eight that are read together."""
TURNS = (False, True, True, False)


class Answer(NamedTuple):
    """Tokens, and the logits `[n, V]` that they were chosen from."""

    tokens: list[int]
    logits: Tensor


def answers(llm: LLM, prompts: Mapping[int, list[int]], *, apart: int = 0) -> tuple[dict[int, Answer], float]:
    """Answers by the prompts' numbers, their requests added at once or so many steps apart; and the seconds of it all."""
    engine, kinds, waiting, tokens = llm.engine, dict[int, int](), list(prompts), dict[int, list[int]]()
    lines: dict[int, list[Tensor]] = {number: [] for number in prompts}

    def watch(members: Sequence[int], logits: Tensor) -> None:
        for member, line in zip(members, logits.to("cpu", copy=True), strict=True):
            lines[kinds[member]].append(line)

    engine.watch_logits(watch)
    began = time.perf_counter()
    while waiting or engine.unfinished:
        for number in [waiting.pop(0) for _ in range(1 if apart else len(waiting)) if waiting]:
            request = llm.request(prompts[number], SamplingParams(max_tokens=TOKENS, ignore_eos=True))
            kinds[engine.add(request)] = number
        for _ in range(apart or 1):
            for member, output in engine.step():
                tokens.setdefault(kinds[member], []).append(output.token_id)
    engine.watch_logits(None)
    seconds = time.perf_counter() - began
    return {number: Answer(tokens[number], torch.stack(found)) for number, found in lines.items()}, seconds


def equal(alone: Mapping[int, Answer], found: Mapping[int, Answer]) -> dict[str, int]:
    """How many answers have the tokens that they have alone, the first token's logits, and all logits, to the bit."""
    pairs = [(found[number], answer) for number, answer in alone.items()]
    return {
        "tokens": sum(mine.tokens == theirs.tokens for mine, theirs in pairs),
        "first_logits": sum(torch.equal(mine.logits[0], theirs.logits[0]) for mine, theirs in pairs),
        "all_logits": sum(torch.equal(mine.logits, theirs.logits) for mine, theirs in pairs),
    }


def bits(stand_in: StandIn, requests: int, *, invariant: bool) -> dict[str, Any]:
    """Compare requests alone with the same ones in company."""
    lengths = [1 + (37 * number) % 300 for number in range(requests)]
    options = {"max_batch": COMPANY, "max_length": 320, "slots": "50%", "execution": "graph", "prefill_chunk": 128}
    with stand_in.open(strategy="next-use", batch_invariant=invariant, **options) as one:
        prompts = dict(enumerate(prompts_of(one.llm.plan.shape.vocabulary, lengths)))
        alone, seconds = dict[int, Answer](), {"alone": 0.0}
        for number, prompt in prompts.items():
            found, took = answers(one.llm, {number: prompt})
            alone |= found
            seconds["alone"] += took
        row: dict[str, Any] = {"batch_invariant": invariant, "requests": requests}
        for name, apart in (("with seven others", 0), ("staggered", APART)):
            found, seconds[name] = answers(one.llm, prompts, apart=apart)
            row[name] = equal(alone, found)
        distinct = len({token for answer in alone.values() for token in answer.tokens})
        return {
            **row,
            "distinct_tokens": distinct,
            "seconds": seconds,
            "peak_bytes": one.peak,
            "plan_bytes": one.llm.plan.total,
        }


def decode_costs(
    stand_in: StandIn, works: Mapping[int, Work], share: str, turns: Sequence[bool]
) -> list[dict[str, Any]]:
    """Milliseconds a step of one and of several sequences where a step has room for the most, off and on in turns."""
    rows, room = list[dict[str, Any]](), max(works)
    for sequences, work in works.items():
        for invariant in turns:
            more = {"max_batch": room, "max_live": room, "prefill_chunk": 512, "batch_invariant": invariant}
            row, _ = measure(stand_in, work, "next-use", share, "mxfp4", **more)
            ms = statistics.median(row.ms)
            rows.append({"sequences": sequences, "batch_invariant": invariant, "ms": row.ms, "tokens_per_second": sequences / ms * 1e3,
                         "loads": row.carried, "within_plan": row.peak_bytes <= row.budget_bytes})  # fmt: skip
    return rows


def prompt_costs(stand_in: StandIn, share: str, turns: Sequence[bool], *, tiny: bool) -> list[dict[str, Any]]:
    """Seconds until every prompt has its first token: one long prompt, and eight at once; off and on in turns."""
    rows, kinds = list[dict[str, Any]](), [[TINY_LONG], [TINY_SEVERAL] * 2] if tiny else [[LONG], [SEVERAL] * COMPANY]
    for invariant in turns:
        options = {
            "max_batch": max(map(len, kinds)),
            "max_length": max(map(max, kinds)) + 8,
            "slots": share,
            "execution": "graph",
        }
        with stand_in.open(strategy="next-use", batch_invariant=invariant, **options) as one:
            for lengths in kinds:
                prompts, times = prompts_of(one.llm.plan.shape.vocabulary, lengths * 4), list[float]()
                for begin in range(0, len(prompts), len(lengths)):
                    times.append(first_tokens(one.llm, prompts[begin : begin + len(lengths)]))
                rows.append({"prompts": len(lengths), "length": lengths[0], "batch_invariant": invariant,
                             "prefill_chunk": one.llm.plan.prefill_chunk, "seconds": times[1:]})  # fmt: skip
    return rows


def show(result: dict[str, Any]) -> None:
    """A line a comparison."""
    for row in result["bits"]:
        found = {name: f"{row[name]} of {row['requests']}" for name in ("with seven others", "staggered")}
        print(f"batch_invariant={row['batch_invariant']}: bit-equal {found}, {row['distinct_tokens']} distinct tokens")
    for sequences in sorted({row["sequences"] for row in result["decode"]}):
        speeds = {
            invariant: [row["tokens_per_second"] for row in result["decode"] if (row["sequences"], row["batch_invariant"]) == (sequences, invariant)]
            for invariant in (False, True)
        }  # fmt: skip
        off, on = (statistics.median(speeds[invariant]) for invariant in (False, True))
        print(f"{sequences} sequences: {off:.1f} tok/s off, {on:.1f} on ({on / off:.3f}); single figures {speeds}")
    for kind in sorted({(row["prompts"], row["length"]) for row in result["prompts"]}):
        off, on = (
            statistics.median(
                second
                for row in result["prompts"]
                if (row["prompts"], row["length"], row["batch_invariant"]) == (*kind, invariant)
                for second in row["seconds"]
            )
            for invariant in (False, True)
        )
        print(f"first token of {kind[0]} x {kind[1]} tokens: {off:.3f} s off, {on:.3f} on ({on / off:.2f})")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small widths; always so without CUDA")
    parser.add_argument("--requests", type=int, help="default: 200; 4 with --tiny")
    parser.add_argument("--share", default="50%", help="slots of the costs, as a share of all experts")
    parser.add_argument("--trace", type=Path, help="recorded routing for the costs")
    parser.add_argument("--parts", default="bits,costs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.tiny |= device() == "cpu"
    options.requests = options.requests or (4 if options.tiny else 200)
    return options


def main() -> None:
    """Measure, write, print."""
    options, began = read_options(), time.perf_counter()
    result: dict[str, Any] = {"bits": [], "decode": [], "prompts": []}
    config = resized(make_config("g", tiny=options.tiny, packed="mxfp4"), TINY_SIZES if options.tiny else {})
    if "bits" in options.parts:
        fewer = {} if options.tiny else {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
        small = resized(config, fewer)
        with StandIn(small, embedding=WIDE) as stand_in:
            for invariant, count in ((True, options.requests), (False, min(CONTROL, options.requests))):
                result["bits"].append(bits(stand_in, count, invariant=invariant))
        print(f"{time.perf_counter() - began:.0f} s: bits compared", flush=True)
    if "costs" in options.parts:
        trace = None if options.trace is None else load_trace(options.trace).without("repetition")
        works = {
            count: make_work("g", count, config.vocab_size, trace, tiny=options.tiny)
            for count in ((1, 2) if options.tiny else (1, COMPANY))
        }
        turns = TURNS[:2] if options.tiny else TURNS
        with StandIn(config, embedding=1.0 if trace is not None else WIDE) as stand_in:
            result["decode"] = decode_costs(stand_in, works, str(float(options.share.rstrip("%")) / 100), turns)
            print(f"{time.perf_counter() - began:.0f} s: decode steps timed", flush=True)
            result["prompts"] = prompt_costs(stand_in, options.share, turns, tiny=options.tiny)
    about_it = {
        **about(device())._asdict(),
        "benchmark": "batch_invariant",
        "seed": SEED,
        "wall_seconds": time.perf_counter() - began,
    }
    config_of_run = {name: str(value) for name, value in vars(options).items() if name != "out"}
    options.out.write_text(json.dumps({**about_it, "config": config_of_run, **result}, indent=1) + "\n")
    show(result)
    wrong = [
        row for row in result["bits"] if row["batch_invariant"] and {*row["with seven others"].values(), *row["staggered"].values()} != {row["requests"]}
    ]  # fmt: skip
    if wrong:
        raise SystemExit("an answer depends on other requests")


if __name__ == "__main__":
    main()
