"""Latent attention at the sizes of DeepSeek-V2-Lite and DeepSeek-V3: the kernels alone, and steps of DeepSeek-V2-Lite's layers.

Parts, each of its own with `--parts`:

- `kernel`: attention of one token a sequence, one layer, random latents in pages of a drawn order. Layers take turns until they hold more
  than a GPU's cache, as in a step, and are captured as one graph. Read rate: bytes of latents over time. Beside it what the model's own
  code does: gather, expand, attend.
- `search`: other tilings, spans and numbers of spans of the same, at a few sizes.
- `prompt`: a piece of a prompt at the end of a context, beside the same attention over keys and values that are there already.
- `step`: decode steps of 8 layers of DeepSeek-V2-Lite, every expert resident, behind prompts of several lengths, through `LLM`. It runs
  on trees without these kernels as well.

Usage: python benchmarks/latent_attention.py --out FILE [--parts kernel,prompt,step] [--contexts 1024,8192,32768,131072] [--tiny]
       --tiny: small sizes, for a CPU and Triton's interpreter
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported
from stand_ins import SEED, StandIn, device, random_tokens
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV2Config

from expertflow import SamplingParams
from expertflow.bench.about import about

CONTEXTS, TINY_CONTEXTS = (1024, 8192, 32768, 131072), (128,)
PLAIN, ROPE, WIDTH, RANK, PAGE = 128, 64, 128, 512, 64
LAYERS, CACHE, REPEATS = 8, 160 << 20, 5
"""Layers of the model that steps; bytes that the layers of a measurement hold at least; graphs that are timed."""
PIECE, TINY_PIECE = 2048, 20
STEPS, WARM = 24, 6
LONGEST_STOCK = 32768
"""Tokens up to which the model's own code is measured: it makes 10 GB of one layer's keys and values at 131,072."""


class Shape(NamedTuple):
    """Heads, and sequences that step together."""

    heads: int
    batches: tuple[int, ...]


SHAPES = {"DeepSeek-V2-Lite": Shape(16, (1, 8)), "DeepSeek-V3": Shape(128, (1, 8))}
TINY_SHAPES = {"tiny": Shape(3, (1, 2))}


class Drawn:
    """Latents of some sequences of one length in pages, of several layers, and one token's queries."""

    def __init__(self, heads: int, batch: int, tokens: int) -> None:
        """Draw them."""
        torch.manual_seed(SEED)
        draw = {"device": device(), "dtype": torch.bfloat16}
        count = -(-tokens // PAGE)
        nbytes = batch * count * PAGE * (RANK + ROPE) * 2
        self.layers = [
            (torch.randn(batch * count, 1, PAGE, RANK, **draw), torch.randn(batch * count, 1, PAGE, ROPE, **draw))
            for _ in range(max(1, min(27, -(-CACHE // nbytes))) if device() == "cuda" else 1)
        ]
        self.weights = [torch.randn(heads * (PLAIN + WIDTH), RANK, **draw) * RANK**-0.5 for _ in self.layers]
        self.table = torch.randperm(batch * count, device=device()).view(batch, count).int()
        self.query = torch.randn(batch, heads, PLAIN + ROPE, **draw)
        self.where = torch.arange(batch, device=device()), torch.full((batch,), tokens - 1, device=device())
        self.nbytes, self.scale = batch * tokens * (RANK + ROPE) * 2, (PLAIN + ROPE) ** -0.5
        self.operations = 2 * batch * tokens * heads * (RANK + ROPE + RANK)

    def kernel(self, **more: Any) -> Callable[[], Any]:
        """Ours, of all layers."""
        from expertflow.kernels.latent.decode import decode_attention  # noqa: PLC0415 - a tree without it has steps

        return lambda: [
            decode_attention(self.query, kept, weight, self.where, self.scale, self.table, **more)
            for kept, weight in zip(self.layers, self.weights, strict=True)
        ]

    def stock(self) -> Callable[[], Any]:
        """What the model's own code does with the latents of these sequences, of all layers."""
        batch, heads = self.query.shape[:2]

        def attend(kept: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
            latents, turned = (part[self.table.long()].flatten(1, 3) for part in kept)
            made = functional.linear(latents, weight).view(batch, latents.shape[1], heads, -1).transpose(1, 2)
            keys = torch.cat([made[..., :PLAIN], turned[:, None].expand(-1, heads, -1, -1)], dim=-1)
            return functional.scaled_dot_product_attention(
                self.query[:, :, None], keys, made[..., PLAIN:], scale=self.scale
            )

        return lambda: [attend(kept, weight) for kept, weight in zip(self.layers, self.weights, strict=True)]


def seconds(work: Callable[[], Any], calls: int = 1) -> float:
    """The median time of a graph of some calls on the device, for one call."""
    if device() == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    times = []
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls / 1e3)
    return statistics.median(times[1:])


def kernels(shapes: dict[str, Shape], contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Attention of steps."""
    rows = []
    for (name, shape), tokens in itertools.product(shapes.items(), contexts):
        for batch in shape.batches:
            drawn = Drawn(shape.heads, batch, tokens)
            taken = seconds(drawn.kernel()) / len(drawn.layers)
            theirs, far = None, None
            if tokens <= LONGEST_STOCK and batch == 1:
                theirs = seconds(drawn.stock()) / len(drawn.layers)
                far = float((drawn.kernel()()[0].float() - drawn.stock()()[0][:, :, 0].float()).abs().max())
            rows.append({
                "part": "kernel", "shape": name, "batch": batch, "tokens": tokens, "us": taken * 1e6, "latents_gb_s": drawn.nbytes / taken / 1e9,
                "tflops": drawn.operations / taken / 1e12, "stock_us": theirs and theirs * 1e6, "farthest_from_stock": far,
            })  # fmt: skip
            show(rows[-1])
    return rows


def searched(contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Other tilings, the fastest first."""
    from triton.runtime.errors import OutOfResources  # noqa: PLC0415 - as above

    from expertflow.kernels.latent.decode import Tiling  # noqa: PLC0415 - as above

    tried = {
        "DeepSeek-V2-Lite": [(16, 64, 8, 5), (16, 32, 8, 7), (16, 32, 8, 5), (16, 32, 4, 7), (64, 32, 8, 5)],
        "DeepSeek-V3": [(64, 32, 8, 5), (64, 64, 8, 3), (16, 64, 8, 5), (32, 32, 8, 5)],
    }  # fmt: skip
    rows = []
    for name, tokens in itertools.product(tried, contexts[::3]):
        drawn = Drawn(SHAPES[name].heads, 1, tokens)
        for cut, spans in itertools.product(
            tried[name], (None, (64, 128), (128, 32), (128, 128), (256, 64), (512, 64))
        ):
            if cut != tried[name][0] and spans is not None:
                continue
            try:
                taken = seconds(drawn.kernel(cut=Tiling(*cut), spans=spans)) / len(drawn.layers)
            except OutOfResources:
                continue
            rows.append({
                "part": "search", "shape": name, "batch": 1, "tokens": tokens, "cut": str(cut), "spans": str(spans), "us": taken * 1e6,
                "latents_gb_s": drawn.nbytes / taken / 1e9,
            })  # fmt: skip
            show(rows[-1])
    return rows


def prompt(name: str, heads: int, tokens: int, piece: int) -> dict[str, Any]:
    """Attention of the last tokens of a prompt, from latents and from keys and values."""
    from expertflow.kernels.latent.prompts import prompt_attention as from_latents  # noqa: PLC0415 - as above
    from expertflow.kernels.prompts.attention import prompt_attention  # noqa: PLC0415 - as above

    drawn, count, few = Drawn(heads, 1, tokens), min(piece, tokens), min(heads, 16)
    query = torch.randn(1, count, heads, PLAIN + ROPE, device=device(), dtype=torch.bfloat16).transpose(1, 2)
    bounds, begin = torch.tensor([[0], [count]], device=device()), torch.zeros(1, dtype=torch.long, device=device())
    room = {"pieces": (bounds, count), "room": (begin, tokens)}
    given = drawn.layers[0], drawn.weights[0], drawn.where, drawn.scale, drawn.table
    made = seconds(lambda: from_latents(query, *given, **room))
    ready = [
        torch.randn(1, few, tokens, width, device=device(), dtype=torch.bfloat16) for width in (PLAIN + ROPE, WIDTH)
    ]  # of some heads: the rest takes as long
    there = seconds(lambda: prompt_attention(query[:, :few], *ready, drawn.where, drawn.scale)) * heads / few
    operations = 2 * count * (tokens - count / 2) * heads * (PLAIN + ROPE + WIDTH)
    return {
        "part": "prompt", "shape": name, "batch": 1, "tokens": tokens, "piece": count, "us": made * 1e6, "tflops": operations / made / 1e12,
        "keys_ready_us": there * 1e6,
    }  # fmt: skip


def prompts(shapes: dict[str, Shape], contexts: Sequence[int], piece: int) -> list[dict[str, Any]]:
    """Attention of pieces of prompts."""
    rows = []
    for (name, shape), tokens in itertools.product(shapes.items(), contexts):
        rows.append(prompt(name, shape.heads, tokens, piece))
        show(rows[-1])
    return rows


def make_config(*, tiny: bool, longest: int) -> DeepseekV2Config:
    """Layers of DeepSeek-V2-Lite, the first one without experts, and no rotary scaling."""
    sizes = {
        "vocab_size": 102400, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 64, "kv_lora_rank": RANK, "qk_nope_head_dim": PLAIN, "qk_rope_head_dim": ROPE,
        "v_head_dim": WIDTH,
    }  # fmt: skip
    small = {
        "vocab_size": 96, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    }  # fmt: skip
    return DeepseekV2Config(
        num_hidden_layers=2 if tiny else LAYERS, n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, q_lora_rank=None,
        topk_method="greedy", max_position_embeddings=longest + 2 * STEPS, pad_token_id=0, **(small if tiny else sizes),
    )  # fmt: skip


def steps(contexts: Sequence[int], *, tiny: bool) -> list[dict[str, Any]]:
    """Decode steps behind prompts of several lengths, through `LLM`."""
    rows, longest = [], max(contexts)
    with StandIn(make_config(tiny=tiny, longest=longest)) as stand_in:
        room = {"max_batch": 1, "max_length": longest + STEPS + 2, "execution": "graph", "slots": "100%"}
        with stand_in.open(strategy="next-use", **room) as one:
            llm, params = one.llm, SamplingParams(max_tokens=STEPS, ignore_eos=True)
            for tokens in contexts:
                prompt = random_tokens(llm.plan.shape.vocabulary, tokens)
                request, times = llm.request(prompt, params), []
                llm.engine.add(request)
                began = time.perf_counter()
                while not request.token_ids:
                    llm.engine.step()
                first = time.perf_counter() - began
                while llm.engine.unfinished:
                    began = time.perf_counter()
                    llm.engine.step()
                    times.append(time.perf_counter() - began)
                kept = sum(layer.bytes_per_token for layer in llm.plan.shape.kv) * tokens
                rows.append({
                    "part": "step", "shape": "DeepSeek-V2-Lite", "batch": 1, "tokens": tokens, "us": statistics.median(times[WARM:]) * 1e6,
                    "first_token_seconds": first, "latent_bytes": kept, "peak_bytes": one.peak, "budget_bytes": llm.plan.total,
                    "prefill_chunk": llm.plan.prefill_chunk,
                })  # fmt: skip
                show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    line = f"{row['part']:6} {row['shape']:17} {row['batch']} x {row['tokens']:6} tokens {row['us']:9.1f} us"
    if "latents_gb_s" in row:
        line += f" {row['latents_gb_s']:6.0f} GB/s of latents"
    if "tflops" in row:
        line += f" {row['tflops']:4.0f} TFLOP/s"
    if row.get("stock_us"):
        line += f", the model's own code {row['stock_us']:8.1f} us, apart by {row['farthest_from_stock']:.4f}"
    if "keys_ready_us" in row:
        line += f", over keys and values that are there {row['keys_ready_us']:9.1f} us"
    if "cut" in row:
        line += f" {row['cut']} {row['spans']}"
    if "first_token_seconds" in row:
        line += f", first token {row['first_token_seconds']:.3f} s, peak {row['peak_bytes'] / row['budget_bytes']:.2f} of the plan"
    print(line, flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="kernel,prompt,step")
    parser.add_argument("--contexts", default="")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    shapes = TINY_SHAPES if given.tiny else SHAPES
    usual = TINY_CONTEXTS if given.tiny else CONTEXTS
    contexts = [int(text) for text in given.contexts.split(",")] if given.contexts else list(usual)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "kernel": lambda: kernels(shapes, contexts), "search": lambda: searched(contexts),
        "prompt": lambda: prompts(shapes, contexts, TINY_PIECE if given.tiny else PIECE), "step": lambda: steps(contexts, tiny=given.tiny),
    }  # fmt: skip
    rows = []
    for part in given.parts.split(","):
        with torch.inference_mode():
            rows += parts[part]()
        if device() == "cuda":
            torch.cuda.empty_cache()
    config = {"dtype": "bfloat16", "layers": LAYERS, "parts": given.parts, "tiny": given.tiny}
    result = {
        **about(device())._asdict(),
        "benchmark": "latent_attention",
        "rows": rows,
        "seed": SEED,
        "config": config,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
