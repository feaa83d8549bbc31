"""Random plans carried out in one process: measured peak <= plan <= 1.15 x peak.

Models of published widths with few layers and random weights, through `LLM`. Drawn are execution, budget (also the least that
works, and slots instead), sequences of a step and live ones, their length, tokens of keys and values, and of a pass. Each plan reads prompts of random
lengths, decodes a few tokens, greedy and sampled, fills its largest pass, also with tokens that all go to the same experts, and
records the routing of two steps.

What a GPU's libraries may take whatever the model is, `FIXED`, is in every plan, and rarely used in full: it is left out of the upper bound, so that
small models are judged too. Ends in an error where a peak exceeds its plan, or a plan on a GPU exceeds that bound. On a CPU
the meter does not see temporaries inside operators, so only the lower bound holds there.

Usage: python benchmarks/plans.py --out FILE [--plans 60] [--seed 0] [--deadline SECONDS]
       --tiny: two small models and six plans, for a CPU
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stand_ins import PACKED, SEED, WIDE, StandIn, device, make_config, resized
from transformers import DeepseekV2Config, MixtralConfig, OlmoeConfig, PreTrainedConfig

from expertflow import LLM, EngineConfig, SamplingParams
from expertflow.bench.about import about
from expertflow.bench.shared_host import library_bytes
from expertflow.engine.plan import Plan
from expertflow.engine.planning.workspace import CUDA_LIBRARY_BYTES, GRAPH_POOL_BYTES
from expertflow.engine.prepare import prepare
from expertflow.execution.kv.layout import PAGE, pages_of

FIXED = 2 * CUDA_LIBRARY_BYTES + GRAPH_POOL_BYTES
"""Bytes of cuBLAS on two streams, and of the graphs' memory pool."""
LOOSE = 1.15
ANSWER, CONTEXT = 4, 16_384
MOST_PASSES = 4
"""Largest passes that a plan's prompts fill at most: reading takes most of the time."""


def _q(layers: int, packed: str = "bf16") -> PreTrainedConfig:
    return resized(
        make_config("q", tiny=False, packed=packed), {"num_hidden_layers": layers, "max_position_embeddings": CONTEXT}
    )


def _g(layers: int, packed: str) -> PreTrainedConfig:
    return resized(make_config("g", tiny=False, packed=packed), {"num_hidden_layers": layers})


def _deepseek() -> PreTrainedConfig:
    """DeepSeek-V2-Lite, a dense layer and three others; a short context, because latents of whole batches are expanded."""
    return DeepseekV2Config(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, num_hidden_layers=4, first_k_dense_replace=1, vocab_size=102400,
        topk_method="greedy", n_group=1, topk_group=1, max_position_embeddings=2048, pad_token_id=0,
    )  # fmt: skip


def _mixtral(packed: str) -> PreTrainedConfig:
    """Mixtral's proportions at half the width."""
    return MixtralConfig(
        hidden_size=2048, intermediate_size=7168, num_local_experts=8, num_experts_per_tok=2, num_attention_heads=16,
        num_key_value_heads=4, num_hidden_layers=4, vocab_size=32000, max_position_embeddings=CONTEXT, pad_token_id=0,
        quantization_config=PACKED[packed],
    )  # fmt: skip


def _olmoe() -> PreTrainedConfig:
    """OLMoE at half the width."""
    return OlmoeConfig(
        hidden_size=1024, intermediate_size=512, num_experts=64, num_experts_per_tok=8, num_attention_heads=16,
        num_key_value_heads=16, num_hidden_layers=6, vocab_size=50304, max_position_embeddings=CONTEXT, pad_token_id=0,
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], PreTrainedConfig]] = MappingProxyType({
    "Qwen3-MoE bf16": lambda: _q(4),
    "Qwen3-MoE int4": lambda: _q(6, "int4"),
    "gpt-oss mxfp4": lambda: _g(6, "mxfp4"),
    "gpt-oss bf16": lambda: _g(3, "bf16"),
    "DeepSeek-V2-Lite bf16": _deepseek,
    "Mixtral fp8": lambda: _mixtral("fp8"),
    "OLMoE bf16": _olmoe,
})  # fmt: skip
TINY_MODELS: Mapping[str, Callable[[], PreTrainedConfig]] = MappingProxyType({
    "Qwen3-MoE bf16": lambda: make_config("q", tiny=True),
    "gpt-oss mxfp4": lambda: resized(make_config("g", tiny=True, packed="mxfp4"), {"num_hidden_layers": 2, "vocab_size": 512}),
})  # fmt: skip


def draw_options(draw: random.Random, context: int) -> dict[str, Any]:
    """Options of `LLM` without memory; a pass of the host execution keeps scores, so its sequences are short."""
    host, batch = draw.random() < 0.2, draw.choice([1, 2, 4, 8])
    length = int(2 ** draw.uniform(6, math.log2(min(context, 1024 if host else CONTEXT))))
    live = batch * draw.choice([1, 1, 2, 3])
    return {
        "execution": "host" if host else "graph", "max_batch": batch, "max_live": live, "max_length": length,
        "kv_tokens": draw.choice([None, None, draw.randint(length, live * length)]),
        "prefill_chunk": draw.choice([None, None, int(2 ** draw.uniform(5, 12))]),
        "batch_invariant": not host and draw.random() < 0.2, "strategy": draw.choice(["next-use", "lru-global"]),
    }  # fmt: skip


def draw_memory(draw: random.Random, bare: Plan) -> dict[str, Any]:
    """A budget from the least that works to all experts, or slots."""
    least, most, kind = bare.least, bare.resident_total, draw.random()
    if kind < 0.2:
        return {"slots": f"{draw.uniform(5, 100):.0f}%"}
    return {"gpu_memory": least if kind < 0.35 else least + int((most - least) * draw.random() ** 2)}


def filling(plan: Plan, most: int) -> list[int]:
    """Lengths of prompts that fill the largest pass, as far as pages of keys and values reach."""
    pages, wanted, found = plan.kv_tokens // PAGE, MOST_PASSES * plan.prefill_chunk, list[int]()
    while len(found) < plan.max_batch and pages > 0 and wanted > 0:
        found.append(max(1, min(most, wanted, pages * PAGE - ANSWER)))
        pages, wanted = pages - pages_of(found[-1] + ANSWER, PAGE), wanted - found[-1]
    return found


def carry_out(llm: LLM, draw: random.Random) -> dict[str, int]:
    """Prompts of random lengths, then as many tokens as the largest passes take; what was read."""
    plan, read, most = llm.plan, 0, llm.plan.max_length - ANSWER
    limit = max(1, min(most, MOST_PASSES * plan.prefill_chunk // plan.max_batch))
    lengths, full = [int(limit ** draw.random()) for _ in range(plan.max_batch + 2)], filling(plan, most)
    for temperature, counts, alike in ((0.0, lengths, False), (0.9, full, False), (0.0, full, True)):
        token = draw.randrange(3, plan.shape.vocabulary)  # the same everywhere, so that the same experts get all tokens
        prompts = [
            [token if alike else draw.randrange(3, plan.shape.vocabulary) for _ in range(count)] for count in counts
        ]
        top_p = 0.9 if temperature else 1.0
        llm.generate(prompts, SamplingParams(max_tokens=ANSWER, temperature=temperature, top_p=top_p, ignore_eos=True))
        read += sum(counts)
    if plan.execution == "graph" and not plan.batch_invariant:  # steps whose routing is observed are the host's
        with tempfile.TemporaryDirectory() as place, llm.record(Path(place) / "routing.trace"):
            llm.generate([prompt[:8] for prompt in prompts], SamplingParams(max_tokens=2, ignore_eos=True))
    return {"tokens_read": read, "longest": max(*lengths, *full)}


def one(stand_in: StandIn, draw: random.Random, context: int, library: int) -> dict[str, Any]:
    """Draw a plan and carry it out. `library`: bytes that cuBLAS took before, which belong to every peak."""
    options = draw_options(draw, context)
    settings = EngineConfig(dtype="bfloat16", device=device(), predictor="none", **options)
    bare = prepare(stand_in.folder, settings, weights=stand_in.owner.shared_weights).plan
    memory = draw_memory(draw, bare)
    with stand_in.open(**options, **memory) as opened:
        plan, read = opened.llm.plan, carry_out(opened.llm, draw)
        peak = opened.peak + library
    parts = {name: getattr(plan, name) for name in ("dense", "kv", "workspace", "graph", "large", "slot_bytes")}
    fixed = 0 if device() == "cpu" else FIXED if plan.execution == "graph" else CUDA_LIBRARY_BYTES
    return {
        "options": options, "memory": memory, "slots": plan.slots, "prefill_chunk": plan.prefill_chunk, "kv_tokens": plan.kv_tokens,
        "parts": parts, **read, "plan_bytes": plan.total, "peak_bytes": peak, "budget_bytes": plan.budget,
        "ratio": plan.total / peak, "ratio_without_fixed": (plan.total - fixed) / peak,
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """As a printed line."""
    options, parts = row["options"], {name: round(size / 2**20) for name, size in row["parts"].items() if size}
    drawn = " ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
    return (
        f"{row['ratio']:.3f} ({row['ratio_without_fixed']:.3f}) {row['model']}: peak {row['peak_bytes'] / 2**20:.0f} "
        f"{'<=' if row['peak_bytes'] <= row['plan_bytes'] else '>'} {row['plan_bytes'] / 2**20:.0f} MiB; {drawn} {row['memory']} "
        f"-> slots {row['slots']}, pass {row['prefill_chunk']}, kv_tokens {row['kv_tokens']}; {parts}"
    )


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plans", type=int, help="default: 60; 6 with --tiny")
    parser.add_argument("--models", default="", help="a part of the names of models to draw from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=1e9, help="carry out no more after so many seconds")
    parser.add_argument("--tiny", action="store_true", help="small models; always so without CUDA")
    options = parser.parse_args()
    options.tiny |= device() == "cpu"
    options.plans = options.plans or (6 if options.tiny else 60)
    return options


def judged(options: argparse.Namespace, rows: list[dict[str, Any]], seconds: float) -> tuple[int, int]:
    """Write what is known; how many plans were exceeded, and how many are far from their peak."""
    over = [row for row in rows if row["peak_bytes"] > min(row["plan_bytes"], row["budget_bytes"] or row["plan_bytes"])]
    loose = [row for row in rows if device() == "cuda" and row["ratio_without_fixed"] > LOOSE]
    result = {
        **about(device())._asdict(), "benchmark": "plans", "seed": options.seed, "weights_seed": SEED, "wanted": options.plans,
        "over": len(over), "loose": len(loose), "within": sum(row["ratio"] <= LOOSE for row in rows), "rows": rows,
        "config": {"fixed_bytes": FIXED, "bound": LOOSE, "tiny": options.tiny}, "wall_seconds": seconds,
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return len(over), len(loose)


def main() -> None:
    """Draw, carry out, compare, print; a run that is cut off keeps its rows."""
    options, began, rows = read_options(), time.perf_counter(), list[dict[str, Any]]()
    models = {name: make for name, make in (TINY_MODELS if options.tiny else MODELS).items() if options.models in name}
    draw, library, over, loose = random.Random(options.seed), library_bytes(device()), 0, 0
    for place, (name, make) in enumerate(models.items()):
        config = make()
        with StandIn(config, embedding=WIDE) as stand_in:
            share = options.plans // len(models) + (place < options.plans % len(models))
            for _ in range(share):
                if time.perf_counter() - began > options.deadline * (place + 1) / len(models):
                    break
                context = 256 if options.tiny else min(config.max_position_embeddings, CONTEXT)
                rows.append({"model": name, **one(stand_in, draw, context, library)})
                print(f"{time.perf_counter() - began:4.0f} s {line(rows[-1])}", flush=True)
                over, loose = judged(options, rows, time.perf_counter() - began)
    print("loosest, then tightest:")
    for row in [
        *sorted(rows, key=lambda row: -row["ratio_without_fixed"])[:5],
        *sorted(rows, key=lambda row: row["ratio"])[:3],
    ]:
        print(f"  {line(row)}")
    print(f"{len(rows)} of {options.plans} plans: {over} exceeded, {sum(row['ratio'] <= LOOSE for row in rows)} within {LOOSE} x peak as they are, "
          f"{loose} beyond it without the {FIXED / 2**20:.0f} MiB that do not depend on the model")  # fmt: skip
    if over or loose:
        raise SystemExit("a plan was exceeded, or is far from its peak")


if __name__ == "__main__":
    main()
