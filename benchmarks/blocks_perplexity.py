"""How far building blocks are from stock code: perplexity of the shipped model over held-out books, token by token, in bfloat16.

Windows of the books that its training left out (`heldout.json`) are fed one token a step, so each token's prediction is a decode step's:
of the host execution, which is stock transformers with eager attention, and of captured steps. Beside the relative difference of both
perplexities stand those of float32, whose steps round so little that the order of sums does not show.

Usage: python benchmarks/blocks_perplexity.py --text novels100.txt.xz --out FILE [--windows 16] [--length 512]
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from expert_format import windows
from stand_ins import device
from torch import Tensor

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.engine.llm import shipped_model
from expertflow.execution.replay import Replay

BEGIN = 2
"""Tokens that a pass reads before the steps."""


def losses(tokens: Tensor, dtype: str, execution: str) -> Tensor:
    """Minus log-probability of each token that a step predicts, float64 `[N, length - BEGIN - 1]`, of windows `[N, length]`."""
    count, length = tokens.shape
    options: dict[str, Any] = {"max_batch": count, "max_live": count, "max_length": length + 1, "predictor": "none"}
    found = torch.zeros(count, length, dtype=torch.float64)
    fed = Replay(tokens=tokens.tolist())
    with LLM(
        shipped_model(), device=device(), dtype=dtype, execution=execution, slots="100%", routing=fed, **options
    ) as llm:
        params, engine, place = SamplingParams(max_tokens=length - BEGIN, ignore_eos=True), llm.engine, dict[int, int]()
        for row, line in enumerate(tokens.tolist()):
            place[engine.add(llm.request(line[:BEGIN], params, index=row))] = row
        seen = [BEGIN] * count

        def watch(numbers: Sequence[int], logits: Tensor) -> None:
            """Look up what the model said of the next token of each window."""
            shares = logits.double().log_softmax(1).cpu()
            for number, line in zip(numbers, shares, strict=True):
                row = place[number]
                found[row, seen[row]] = -line[tokens[row, seen[row]]]
                seen[row] += 1

        engine.watch_logits(watch)
        while engine.unfinished:
            engine.step()
    assert seen == [length] * count
    return found[:, BEGIN + 1 :]  # the first one is the pass's


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names, drawn = windows(options.text, 1)
    tokens = drawn[torch.linspace(0, len(drawn) - 1, options.windows).long(), : options.length]
    began, found, means = time.perf_counter(), dict[str, Any](), dict[str, Tensor]()
    for dtype in ("float32", "bfloat16"):
        mine = {execution: losses(tokens, dtype, execution) for execution in ("host", "graph")}
        means |= {f"{dtype} {execution}": one for execution, one in mine.items()}
        apart = mine["graph"] - mine["host"]
        found[dtype] = {
            "stock": math.exp(mine["host"].mean()), "blocks": math.exp(mine["graph"].mean()),
            "relative": math.expm1(apart.mean()), "error": float(apart.mean(1).std() / len(apart) ** 0.5),
            "largest_log_difference": float(apart.abs().max()),
        }  # fmt: skip
        print(f"{time.perf_counter() - began:4.0f} s {dtype} {found[dtype]}", flush=True)
    base = means["float32 host"]
    distance = {name: float((means[name] - base).abs().mean()) for name in ("bfloat16 host", "bfloat16 graph")}
    result = {
        **about(device())._asdict(), "benchmark": "blocks perplexity", "books": len(names), "windows": len(tokens),
        "tokens": base.numel(), "perplexity": found, "mean_distance_from_float32": distance,
    }  # fmt: skip
    print(json.dumps({"tokens": base.numel(), "distance": distance}))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
