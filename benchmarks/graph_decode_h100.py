"""Decode as one CUDA graph a step, at full size: random bf16 weights made here, experts decided on the GPU.

Shape `q`: Qwen3-MoE, 12 layers x 128 experts top-8, hidden 2048, expert width 768; random tokens.
Shape `g`: gpt-oss-20b, 24 layers x 32 experts top-4, hidden 2880; the router's choice is replayed from a recorded trace.

Every row: milliseconds a step, tokens/s, loads a step, GB/s over the link, beside two floors: the link's time for the
bytes that were loaded, and the memory's time for the bytes that were read. Each row's first logits are compared bit for
bit with those of the all-resident graph, and the measured peak with the plan. Repeats are interleaved.

Usage: python benchmarks/graph_decode_h100.py --shape q [--out FILE] [--trace FILE] [--quick]
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import triton
from torch import Tensor, nn
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from expertflow import __version__
from expertflow.cache.controller import CacheController
from expertflow.cache.core import RESIDENT
from expertflow.cache.strategy import STRATEGIES
from expertflow.config import EngineConfig
from expertflow.engine.device import DeviceExperts, Held, expert_mlp
from expertflow.engine.graph import GraphDecoder
from expertflow.engine.plan import Plan, make_plan
from expertflow.events import CacheCounters, EventStream
from expertflow.kernels.state import HITS, LOADS
from expertflow.memory.layout import RowLayout
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore
from expertflow.models.load import bind_experts, unbind_experts
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import Skeleton, build_skeleton
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import load_trace

PROMPT, LENGTH, CHECKED, SECONDS = 32, 512, 6, 0.6
LINK, MEMORY = 55e9, 3.0e12
"""Bytes a second: the copy engine at its best, and device memory, both as measured on this kind of machine."""
SEED = 11
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}


def make_config(shape: str, *, tiny: bool) -> PreTrainedConfig:
    """The model's sizes."""
    if shape == "q":
        sizes = {"num_hidden_layers": 12, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
                 "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
                 "intermediate_size": 6144}  # fmt: skip
        small = {**TINY, "moe_intermediate_size": 32, "num_experts": 16, "head_dim": 16}
        common = {"num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False}
        return Qwen3MoeConfig(max_position_embeddings=4096, **common, **(small if tiny else sizes))
    small = {**TINY, "intermediate_size": 32, "head_dim": 16}
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
             "head_dim": 64, "vocab_size": 201088}  # fmt: skip
    common = {"num_local_experts": 32, "num_experts_per_tok": 4, "pad_token_id": 0}
    return GptOssConfig(**common, **{**(small if tiny else sizes), "num_hidden_layers": 24})


@dataclass
class World:
    """What every row shares: the model without experts, and all rows in host memory."""

    skeleton: Skeleton
    model: Any
    store: HostStore
    device: torch.device
    dense: bool = False
    routers: list["ReplayRouter"] = field(default_factory=list)

    def follow(self, workload: Workload, step: Tensor) -> None:
        """Let the routers choose what the workload's step `step` chose."""
        chosen = workload.trace.rows.experts[workload.members[:LENGTH]].astype(np.int64)
        routes = torch.from_numpy(chosen).to(self.device)
        for layer, router in enumerate(self.routers):
            router.routes, router.step = routes[:, :, layer].contiguous(), step


class ReplayRouter(nn.Module):
    """A router that computes its choice and then says what was recorded."""

    def __init__(self, router: nn.Module) -> None:
        """Stand in for `router`."""
        super().__init__()
        self.router = router
        self.routes = self.step = torch.zeros(0)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As GPT-OSS's router; the experts are those of the running step."""
        logits, scores, index = self.router(hidden)
        return logits, scores, self.routes.index_select(0, self.step)[0].to(index.dtype)


def make_world(shape: str, device: torch.device, *, tiny: bool) -> World:
    """Random weights: the model's on the device, the experts' in host memory."""
    with tempfile.TemporaryDirectory() as folder:
        make_config(shape, tiny=tiny).save_pretrained(folder)
        skeleton = build_skeleton(Path(folder), "bfloat16")
    torch.manual_seed(SEED)
    model = skeleton.model.to(torch.bfloat16).to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(skeleton.config, device=device)
    layout = RowLayout.of(skeleton.specs)
    store = HostStore(layout, len(skeleton.expert_modules) * skeleton.experts, pin=device.type == "cuda")
    store.lock()  # before it is filled: rows then come from the device at the link's speed
    for row in range(len(store.buffer)):
        values = torch.randn(layout.row_bytes // 2, device=device, dtype=torch.bfloat16) * 0.02
        store.row(row).copy_(values.view(torch.uint8))
    world = World(skeleton, model, store, device)
    if shape == "g":
        for layer in model.model.layers:
            layer.mlp.router = ReplayRouter(layer.mlp.router)
            world.routers.append(layer.mlp.router)
    return world


@dataclass(kw_only=True)
class Row:
    """One configuration. Lists hold one number a repeat."""

    slots: int
    strategy: str
    batch: int
    budget_bytes: int
    peak_bytes: int = 0
    bit_equal: bool = True
    ms: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    needed: list[float] = field(default_factory=list)

    def line(self, row_bytes: int, dense: int) -> str:
        """For people."""
        ms, loads, needed = (statistics.median(numbers) for numbers in (self.ms, self.loads, self.needed))
        link = loads * row_bytes / LINK * 1e3
        read = (needed * row_bytes + dense) / MEMORY * 1e3
        gb = loads * row_bytes / ms / 1e6
        return (
            f"{self.slots:5d} {self.strategy:10s} B={self.batch:<2d} {ms:8.2f} ms ({min(self.ms):.2f}-{max(self.ms):.2f}) "
            f"{self.batch / ms * 1e3:8.1f} tok/s loads {loads:6.1f} of {needed:6.1f}  link {gb:5.1f} GB/s  "
            f"floors: link {link:6.2f} memory {read:5.2f} ms  equal {self.bit_equal} "
            f"peak {self.peak_bytes / 2**30:.2f} <= {self.budget_bytes / 2**30:.2f} GiB"
        )


def fill(controller: CacheController, pool: SlotPool, store: HostStore) -> None:
    """Everything resident: row i in slot i."""
    tables, count = controller.tables, len(store.buffer)
    tables.slot_of[:] = np.arange(count).reshape(tables.slot_of.shape)
    tables.owner[:] = np.arange(count)
    tables.held[:] = tables.slot_of.shape[1]
    tables.newer[count] = tables.older[count] = count
    tables.cursor[RESIDENT] = count
    pool.buffer.copy_(store.buffer)


def measure(world: World, plan: Plan, row: Row, tokens: Tensor, workload: Workload | None, truth: dict) -> None:
    """One repeat of one row."""
    device, skeleton = world.device, world.skeleton
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    resident = row.strategy == "resident"
    strategy = STRATEGIES["lru" if resident else row.strategy]
    pool = SlotPool(world.store.layout, row.slots, device)
    future = workload.needed if workload is not None and strategy.needs_future else None
    controller = CacheController(
        layers=plan.shape.layers, experts=plan.shape.experts, slots=row.slots, strategy=strategy, row_bytes=plan.row,
        events=EventStream(), future=future,
    )  # fmt: skip
    if resident:
        fill(controller, pool, world.store)
    held = Held(controller=controller, store=world.store, pool=pool, counters=CacheCounters())
    with torch.inference_mode():
        experts = DeviceExperts(expert_mlp(skeleton), held, row.batch, plan.shape.top_k, log=False)
        decoder = GraphDecoder(world.model, skeleton, experts, row.batch, LENGTH, dense=world.dense)
        step = torch.zeros(1, dtype=torch.long, device=device)
        if workload is not None:
            routes = torch.from_numpy(workload.trace.rows.experts[workload.members[:LENGTH]].astype(np.int64)).to(
                device
            )
            for layer, router in enumerate(world.routers):
                router.routes, router.step = routes[:, :, layer].contiguous(), step
        bind_experts(world.model, skeleton, None)
        decoder.begin([PROMPT] * row.batch)
        experts.begin()
        count = 0

        def run(steps: int) -> None:
            nonlocal count
            for _ in range(steps):
                decoder.tokens.copy_(tokens[count, : row.batch])
                decoder.launch(row.batch, LENGTH)
                step.add_(1)
                count += 1

        for number in range(CHECKED):
            run(1)
            mine = decoder.logits.cpu().clone()
            row.bit_equal &= torch.equal(mine, truth.setdefault((row.batch, number), mine)) and bool(
                mine.isfinite().all()
            )
        run({1: 60, 4: 30}.get(row.batch, 14))
        began = time.perf_counter()
        run(3)
        _sync(device)
        steps = int(min(max(SECONDS * 3 / (time.perf_counter() - began), 6), 96))
        experts.state.take_tally()
        began = time.perf_counter()
        run(steps)
        _sync(device)
        row.ms.append((time.perf_counter() - began) / steps * 1e3)
        tally = experts.state.take_tally()
        row.loads.append(tally[LOADS] / steps)
        row.needed.append((tally[LOADS] + tally[HITS]) / steps)
    if device.type == "cuda":
        row.peak_bytes = max(row.peak_bytes, torch.cuda.max_memory_allocated() + decoder.pool_bytes)
    unbind_experts(world.model, skeleton)


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["q", "g"], default="q")
    parser.add_argument("--out", type=Path, default=Path("graph_decode.json"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dense", action="store_true", help="attention and norms by our kernels")
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--strategies", default="")
    parser.add_argument("--slots", default="")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write the numbers."""
    began, options = time.perf_counter(), read_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = make_world(options.shape, device, tiny=device.type == "cpu")
    world.dense = options.dense
    shape = shape_of(world.skeleton)
    total = shape.total_experts
    batches = [int(text) for text in options.batches.split(",")]
    shares = [int(text) for text in options.slots.split(",")] if options.slots else (
        [total // 2, total // 4] if options.shape == "q" else [total // 2, total // 4, total // 8]
    )  # fmt: skip
    names = options.strategies or ("on-demand,lru,lru-global,next-use" + (",oracle" if options.shape == "g" else ""))
    rows = []
    for slots, strategy in [(total, "resident"), *((s, n) for s in shares for n in names.split(","))]:
        for batch in batches:
            wish = EngineConfig(slots=slots, max_batch=batch, max_length=LENGTH, execution="graph")
            plan = make_plan(wish, shape, device.type, "lru")
            rows.append(Row(slots=slots, strategy=strategy, batch=batch, budget_bytes=plan.total))
    tokens = torch.randint(3, shape.vocabulary, (LENGTH, 16), generator=torch.Generator().manual_seed(SEED)).to(device)
    trace = load_trace(options.trace).without("repetition") if options.shape == "g" else None
    workloads = {batch: live_sequences(trace, batch) for batch in batches} if trace is not None else {}
    print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
    truth: dict[int, list[Tensor]] = {}
    for repeat in range(1 if options.quick else 3):
        for row in rows:
            plan = make_plan(EngineConfig(slots=row.slots, max_batch=row.batch), shape, device.type, "lru")
            measure(world, plan, row, tokens, workloads.get(row.batch), truth)
            print(repeat, row.line(plan.row, shape.dense_bytes), flush=True)
    for row in rows:  # with everything resident nothing is counted, but the same experts are needed
        same = next((other.needed for other in rows if other.batch == row.batch and any(other.needed)), row.needed)
        row.needed = row.needed if any(row.needed) else same
    about = {
        "shape": options.shape, "dense_kernels": options.dense, "seed": SEED, "repeats": len(rows[0].ms), "row_bytes": world.store.layout.row_bytes,
        "dense_bytes": shape.dense_bytes, "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
                     "transformers": transformers.__version__, "expertflow": __version__},
        "floors": {"link_bytes_per_second": LINK, "memory_bytes_per_second": MEMORY},
    }  # fmt: skip
    options.out.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print("\n".join(row.line(world.store.layout.row_bytes, shape.dense_bytes) for row in rows))
    if not all(row.bit_equal and row.peak_bytes <= row.budget_bytes for row in rows):
        raise SystemExit("a row is not exact, or over its budget")


if __name__ == "__main__":
    main()
