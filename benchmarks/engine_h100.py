"""The cache engine at full size: every strategy as whole-step CUDA graphs, beside all-resident, Belady and the link.

Shape `q`: Qwen3-MoE, 12 layers x 128 experts top-8, hidden 2048, expert width 768; random bf16 weights, random tokens.
Shape `g`: gpt-oss-20b, 24 layers x 32 experts top-4, hidden 2880; random weights, tokens and the router's choices
replayed from a recorded trace of sequences that the predictor has not seen.

For each batch the all-resident graph runs first; its keys and values, tokens and routing are the truth for the others,
which begin at step `BEGIN` of it with what had been observed by then. Each row: milliseconds a step (3 windows), loads,
loads ahead and wasted, GB/s over the link, beside the link's time for the bytes and the all-resident step. Checked in every
row: every token and the logits of some steps, bit for bit, and the measured peak against the plan.

Usage: python benchmarks/engine_h100.py --shape q --out FILE
       python benchmarks/engine_h100.py --shape g --trace TEST.trace --predictor FOLDER --out FILE
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
import triton
from expertflow.memory.layout import RecordLayout
from torch import Tensor, nn
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from expertflow import __version__
from expertflow.cache.controller import CacheController
from expertflow.cache.core import RESIDENT
from expertflow.cache.strategy import STRATEGIES, Strategy
from expertflow.config import EngineConfig
from expertflow.engine.plan import Plan, make_plan
from expertflow.engine.prepare import predictor_bytes
from expertflow.events import CacheCounters, EventStream
from expertflow.execution.captured.capturable import expert_mlp
from expertflow.execution.captured.experts import DeviceExperts, SharedParts
from expertflow.execution.captured.graph import POSITIONS, ROWS, TOKENS, GraphDecoder
from expertflow.execution.handover import DeviceTables
from expertflow.execution.kv_rows import RowModel
from expertflow.kernels.backend import backend
from expertflow.kernels.fetch import fetch_records
from expertflow.kernels.ledger import Ledger
from expertflow.kernels.residency.state import AHEAD, BLOCKS, FRESH, HITS, LOADS, WASTES
from expertflow.live.predictor import LivePredictor
from expertflow.memory.slots import SlotPool
from expertflow.memory.store import HostStore
from expertflow.memory.transfer import PlainTransfer
from expertflow.models.context import ForwardContext
from expertflow.models.load import bind_experts, unbind_experts
from expertflow.models.shape import ModelShape, shape_of
from expertflow.models.skeleton import Skeleton, build_skeleton
from expertflow.predict.artifact import Artifact, load_artifact
from expertflow.predict.kernels import step_kernels
from expertflow.predict.online import OnlinePredictor
from expertflow.sim.workload import Workload, live_sequences
from expertflow.trace.format import Trace, load_trace
from expertflow.trace.owners import NextBatch

LENGTH, BEGIN, WINDOWS = 512, 60, 3
"""Columns of keys and values, the step the measured rows begin at, and windows timed."""
STEPS = {
    "q": {1: (60, 40), 4: (60, 30), 8: (40, 15), 16: (10, 4)},
    "g": {1: (20, 15), 4: (8, 5), 8: (5, 3), 16: (4, 2)},
}
"""By shape and batch: steps before the windows, and steps of a window. The same for every strategy, and so the same tokens."""
SOME, SOME_SHARE = ("on-demand", "pregated", "ring", "plec-keep"), "0.25"
"""Strategies that batches of 8 and 16 get at one share of slots only: their steps are the longest."""
CHECKED = (0, 1, 2, 5, 10)
"""Steps, counted from `BEGIN`, whose logits are compared bit for bit; tokens of all steps are."""
PROBED = 8
"""Rows fetched to see how fast the link is at the moment."""
LINK, MEMORY = 50.6e9, 3.0e12
"""Bytes a second: zero-copy fetch and device memory at their best, from kernels_h100.json."""
SEED = 11
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
TABLE: dict[str, Strategy] = {
    **STRATEGIES,
    "plec-keep": replace(STRATEGIES["plec"], name="plec-keep", prefetch="none"),
}
"""The strategy table, and plec without its loads ahead."""
ORDER = "plec,lru-global,lru,oracle-step,next-use,oracle,plec-keep,pregated,on-demand,ring"


def make_config(shape: str, *, tiny: bool) -> PreTrainedConfig:
    """The model's sizes."""
    if shape == "q":
        sizes = {"num_hidden_layers": 12, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
                 "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
                 "intermediate_size": 6144}  # fmt: skip
        small = {**TINY, "moe_intermediate_size": 32, "num_experts": 16, "head_dim": 16}
        common = {"num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False}
        return Qwen3MoeConfig(max_position_embeddings=4096, **common, **(small if tiny else sizes))
    small = {**TINY, "intermediate_size": 32, "head_dim": 16, "vocab_size": 8192}
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
             "head_dim": 64, "vocab_size": 201088}  # fmt: skip
    common = {"num_local_experts": 32, "num_experts_per_tok": 4, "pad_token_id": 0}
    return GptOssConfig(**common, **{**(small if tiny else sizes), "num_hidden_layers": 24})


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


@dataclass
class World:
    """What every row shares: the model without experts, and all rows in host memory."""

    skeleton: Skeleton
    model: Any
    shape: ModelShape
    store: HostStore
    device: torch.device
    predictor: Artifact | None = None
    routers: list[ReplayRouter] = field(default_factory=list)


def random_model(skeleton: Skeleton, device: torch.device) -> Any:
    """The model without its experts, weights drawn on the device."""
    torch.manual_seed(SEED)
    model: Any = skeleton.model.to(torch.bfloat16).to_empty(device=device).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
    model.model.rotary_emb = type(model.model.rotary_emb)(skeleton.config).to(device)
    return model


def fill_randomly(store: HostStore, device: torch.device) -> None:
    """Draw every row on the device; the store is locked first, so that rows come at the link's speed."""
    store.lock()
    for row in range(len(store.buffer)):
        values = torch.randn(store.layout.record_bytes // 2, device=device, dtype=torch.bfloat16) * 0.02
        store.record(row).copy_(values.view(torch.uint8))


def make_world(shape: str, device: torch.device, *, tiny: bool) -> World:
    """Random weights: the model's on the device, the experts' in host memory."""
    with tempfile.TemporaryDirectory() as folder:
        make_config(shape, tiny=tiny).save_pretrained(folder)
        skeleton = build_skeleton(Path(folder), "bfloat16")
    model = random_model(skeleton, device)
    layout = RecordLayout.of(skeleton.specs)
    store = HostStore(layout, len(skeleton.expert_modules) * skeleton.experts, pin=device.type == "cuda")
    fill_randomly(store, device)
    world = World(skeleton, model, shape_of(skeleton), store, device)
    if shape == "g":
        for layer in model.model.layers:
            layer.mlp.router = ReplayRouter(layer.mlp.router)
            world.routers.append(layer.mlp.router)
    return world


@dataclass
class Truth:
    """What the all-resident run did, a batch.

    Attributes:
        tokens: int64 `[N, B]` on the device, fed in.
        sequences: `[N, B]`, whose they are.
        routes: `[N, B, L, K]`, the experts they used.
        best: int64 `[N, B]`, the most probable next tokens.
        logits: of the `CHECKED` steps.
        cache: keys and values of all steps, layer by layer, in host memory.
        ms: milliseconds a step, window by window.
    """

    tokens: Tensor
    sequences: npt.NDArray[np.int64]
    routes: npt.NDArray[np.uint8]
    best: Tensor
    logits: dict[int, Tensor] = field(default_factory=dict)
    cache: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)

    @property
    def needed(self) -> npt.NDArray[np.bool_]:
        """`[N, L, E]`, the distinct experts of each step."""
        steps, _, layers, _ = self.routes.shape
        marks = np.zeros((steps, layers, self.experts), dtype=np.bool_)
        np.put_along_axis(marks, self.routes.transpose(0, 2, 1, 3).reshape(steps, layers, -1).astype(np.int64), True, 2)
        return marks

    experts: int = 0


@dataclass(kw_only=True)
class Row:
    """One configuration. Lists hold one number a window."""

    slots: int
    strategy: str
    batch: int
    budget_bytes: int
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

    def line(self, row_bytes: int) -> str:
        """For people."""
        ms, ahead, corrections = (statistics.median(numbers) for numbers in (self.ms, self.ahead, self.corrections))
        loads, probe = statistics.median(self.carried), statistics.median(self.probe_gbps)
        link = loads * row_bytes / LINK * 1e3
        idle = max(0.0, 1 - (self.resident_ms + link) / ms)
        return (
            f"{self.slots:5d} {self.strategy:11s} B={self.batch:<2d} {self.batch / ms * 1e3:7.1f} tok/s {ms:7.2f} ms "
            f"({min(self.ms):.2f}-{max(self.ms):.2f}) loads {corrections:6.1f}+{ahead:5.1f} ahead, "
            f"{statistics.median(self.wasted):4.1f} vain, of {statistics.median(self.needed):6.1f}; "
            f"link {loads * row_bytes / ms / 1e6:4.1f} GB/s (probe {probe:.1f}); bounds: link {link:6.2f} resident {self.resident_ms:5.2f} ms; "
            f"idle {idle:4.1%}  {'exact' if self.tokens_equal and self.logits_equal else 'WRONG'} "
            f"{self.peak_bytes / 2**30:.2f}{'<=' if self.peak_bytes <= self.budget_bytes else '>'}{self.budget_bytes / 2**30:.2f} GiB"
        )


def fill(controller: CacheController, pool: SlotPool, store: HostStore) -> None:
    """Everything resident: row i in slot i."""
    tables, count = controller.tables, len(store.buffer)
    tables.slot_of[:] = np.arange(count).reshape(tables.slot_of.shape)
    tables.owner[:] = np.arange(count)
    tables.per_layer[:] = tables.slot_of.shape[1]
    tables.newer[count] = tables.older[count] = count
    tables.cursor[RESIDENT] = count
    pool.buffer.copy_(store.buffer)


class Run:
    """One configuration at work."""

    spare = torch.zeros(0)
    """Room that is fetched into to see how fast the link is."""

    def __init__(
        self, world: World, slots: int, strategy: Strategy, batch: int, future: Any, *, resident: bool
    ) -> None:
        """Allocate what the plan counts."""
        self.world, self.batch = world, batch
        pool = SlotPool(world.store.layout, slots, world.device)
        shape = world.shape
        self.controller = CacheController(
            layers=shape.layers, experts=shape.experts, slots=slots, strategy=strategy,
            record_bytes=world.store.layout.record_bytes, events=EventStream(), future=future,
        )  # fmt: skip
        if resident:
            fill(self.controller, pool, world.store)
        self.live_predictor: LivePredictor | None = None
        if strategy.predicted:
            assert world.predictor is not None
            twin = step_kernels(world.device)
            self.live_predictor = LivePredictor(
                OnlinePredictor(world.predictor, 2 * batch, world.device, twin), EventStream()
            )
        held = SharedParts(
            controller=self.controller, store=world.store, pool=pool, transfer=PlainTransfer(world.store, pool),
            counters=CacheCounters(), live_predictor=self.live_predictor,
        )  # fmt: skip
        self.experts = DeviceExperts(expert_mlp(world.skeleton), held, batch, shape.top_k, log=False)
        context = ForwardContext()
        self.tables = DeviceTables(held, self.experts)
        self.rows = RowModel(world.model, world.skeleton, batch, LENGTH, context)
        self.decoder = GraphDecoder(self.rows, self.experts, batch)
        self.step = torch.zeros(1, dtype=torch.long, device=world.device)
        bind_experts(world.model, world.skeleton, None, context)

    def start(self, position: int, routes: npt.NDArray[np.uint8] | None) -> None:
        """All sequences at this position; replayed routing if there is some."""
        self.decoder.inputs[ROWS] = torch.arange(self.batch, device=self.world.device)
        self.decoder.inputs[POSITIONS:] = position
        self.step.fill_(position)
        if self.world.routers and routes is not None:
            chosen = torch.from_numpy(routes.astype(np.int64)).to(self.world.device)
            for layer, router in enumerate(self.world.routers):
                router.routes, router.step = chosen[:, :, layer].contiguous(), self.step

    def go(self, tokens: Tensor, sequences: list[int], host: list[int]) -> None:
        """One step; nothing is waited for.

        Args:
            tokens: fed in.
            sequences: whose they are.
            host: the tokens, in host memory.
        """
        if self.live_predictor is not None:
            self.live_predictor.sampled(sequences, host)
        self.tables.begin(sequences)
        self.decoder.inputs[TOKENS].copy_(tokens)
        self.decoder.launch(self.batch, LENGTH)
        self.decoder.inputs[POSITIONS:] += 1
        self.step.add_(1)

    def probe(self) -> float:
        """GB/s that a fetch of a few rows reaches now; run before a slot is filled."""
        if self.world.device.type != "cuda":
            return 0.0
        rows = torch.arange(PROBED, dtype=torch.int32, device=self.world.device)
        ledger, bounds = Ledger.of(rows, rows), torch.tensor([0, PROBED], dtype=torch.int32, device=self.world.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fetch_records(self.world.store.buffer, self.spare, ledger, rows, bounds)
        end.record()
        torch.cuda.synchronize()
        return PROBED * self.world.store.layout.record_bytes / begin.elapsed_time(end) / 1e6

    def close(self) -> None:
        """Give everything back."""
        unbind_experts(self.world.model, self.world.skeleton)
        self.decoder.drop()
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def sync(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, steps: int, step: Callable[[], None]) -> float:
    """Milliseconds a step."""
    sync(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    sync(device)
    return (time.perf_counter() - began) / steps * 1e3


@torch.inference_mode()
def find_truth(world: World, batch: int, steps: int, tokens: Tensor, workload: Workload | None) -> Truth:
    """The all-resident graph, step by step; once more for its time."""
    run = Run(world, world.shape.total_experts, STRATEGIES["next-use"], batch, None, resident=True)
    layers, top_k = world.shape.layers, world.shape.top_k
    seen = torch.zeros(layers, batch, top_k, dtype=torch.uint8, device=world.device)
    compute = run.experts.run

    def watch(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen[layer].copy_(index)
        return compute(layer, hidden, index, weights)

    run.experts.run = watch  # type: ignore[method-assign]
    routes = None if workload is None else workload.trace.rows.experts[workload.members[:steps]].astype(np.uint8)
    sequences = np.tile(np.arange(batch), (steps, 1))
    if workload is not None:
        sequences = workload.trace.rows.sequence[workload.members[:steps]].astype(np.int64)
    run.start(0, routes)
    truth = Truth(tokens, sequences, np.zeros((steps, batch, layers, top_k), np.uint8), torch.zeros_like(tokens))
    host = tokens.tolist()
    for number in range(steps):
        run.go(tokens[number], sequences[number].tolist(), host[number])
        truth.best[number] = run.decoder.best
        truth.routes[number] = seen.transpose(0, 1).cpu().numpy()
        if number - BEGIN in CHECKED:
            truth.logits[number - BEGIN] = run.decoder.logits.cpu().clone()
    truth.experts = world.shape.experts
    truth.cache = [(layer.keys.cpu(), layer.values.cpu()) for layer in run.rows.cache.layers]
    run.experts.run = compute  # type: ignore[method-assign]
    run.decoder.drop()  # without the watcher
    run.start(BEGIN, routes)
    again = sequences[BEGIN].tolist(), host[BEGIN]
    run.go(tokens[BEGIN], *again)
    span = STEPS["g" if world.routers else "q"][batch][1]
    truth.ms = [timed(world.device, span, lambda: run.go(tokens[BEGIN], *again)) for _ in range(WINDOWS)]
    run.close()
    return truth


def remember(run: Run, truth: Truth) -> None:
    """What had been observed by step `BEGIN`: usage, and the predictor's state of the sequences that live then."""
    controller = run.controller
    usage = controller._ranker.usage  # noqa: SLF001 - as if the steps had been run
    for needed in truth.needed[:BEGIN]:
        usage.learn(needed)
    if run.live_predictor is None:
        return
    before = truth.sequences[BEGIN - 1].tolist()
    run.live_predictor.expect(NextBatch(before, rows=range(len(before))))
    for column, seat in enumerate(run.live_predictor.state_rows(before)):
        mine = truth.sequences[:BEGIN, column] == truth.sequences[BEGIN - 1, column]
        tokens = truth.tokens[:BEGIN, column][torch.from_numpy(mine).to(truth.tokens.device)]
        used = torch.from_numpy(truth.routes[:BEGIN, column][mine].astype(np.int64)).to(tokens.device)
        nobody = torch.full_like(used[:1], truth.experts)
        online = run.live_predictor._online  # noqa: SLF001
        online.observe(online.pieces([seat], [len(tokens)]), tokens, torch.cat([nobody, used[:-1]]))
        run.live_predictor.routes[seat] = used[-1].int()


@torch.inference_mode()
def measure(world: World, plan: Plan, row: Row, truth: Truth, name: str) -> None:
    """One configuration."""
    device = world.device
    gc.collect()  # whatever the run before still holds
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    strategy = TABLE[row.strategy]
    run = Run(world, row.slots, strategy, row.batch, truth.needed if strategy.needs_future else None, resident=False)
    for layer, (keys, values) in zip(run.rows.cache.layers, truth.cache, strict=True):
        layer.lazy_initialization(keys[:1, :, :1].to(device), values[:1, :, :1].to(device))
        layer.keys.copy_(keys)
        layer.values.copy_(values)
    remember(run, truth)
    run.start(BEGIN, truth.routes)
    state, count = run.experts.state, BEGIN
    best, host = torch.zeros_like(truth.best), truth.tokens.tolist()

    def go() -> None:
        nonlocal count
        now = truth.sequences[count].tolist()
        if run.live_predictor is not None:
            run.live_predictor.leave([number for number in truth.sequences[count - 1].tolist() if number not in now])
            run.live_predictor.expect(NextBatch(now, rows=range(len(now))))
            run.live_predictor.sampled(now, host[count])
        run.go(truth.tokens[count], now, host[count])
        best[count] = run.decoder.best
        count += 1

    before, steps = STEPS[name][row.batch]
    for number in range(before):
        go()
        if number in CHECKED:
            row.logits_equal &= torch.equal(run.decoder.logits.cpu(), truth.logits[number])
    state.take_tally()
    blocks = backend(device).blocks_of(plan.record_bytes)
    for _ in range(WINDOWS):
        row.probe_gbps.append(run.probe())
        row.ms.append(timed(device, steps, go))
        tally = state.take_tally()
        row.corrections.append(tally[LOADS] / steps)
        row.ahead.append(tally[AHEAD] / steps)
        row.ahead_used.append(tally[FRESH] / steps)
        row.wasted.append(tally[WASTES] / steps)
        row.carried.append(tally[BLOCKS] / blocks / steps)
        row.needed.append((tally[LOADS] + tally[HITS]) / steps)
    row.tokens_equal = torch.equal(best[BEGIN:count], truth.best[BEGIN:count])
    row.resident_ms = statistics.median(truth.ms)
    if run.live_predictor is not None and run.live_predictor.failure:
        raise SystemExit(f"the predictor failed: {run.live_predictor.failure}")
    if device.type == "cuda":
        row.peak_bytes = torch.cuda.max_memory_allocated() + run.decoder.pool_bytes - Run.spare.nbytes
    run.close()


def draw(world: World, name: str, trace: Trace | None, batch: int) -> tuple[Tensor, Workload | None]:
    """Tokens `[N, B]` of all steps, and what they used if that is replayed."""
    before, window = STEPS[name][batch]
    steps = BEGIN + before + WINDOWS * window
    if trace is not None:
        workload = live_sequences(trace, batch)
        tokens = torch.from_numpy(trace.rows.tokens[workload.members[:steps]].astype(np.int64))
        return tokens.to(world.device), workload
    random = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, world.shape.vocabulary, (steps, 16), generator=random)
    return tokens[:, :batch].contiguous().to(world.device), None


def with_known_tokens(trace: Trace) -> Trace:
    """The trace without sequences that hold a token nobody recorded: the model has to be fed."""
    rows = trace.rows
    unknown = np.unique(rows.sequence[rows.tokens < 0])
    kept = tuple(entry for entry in trace.sequences if entry["sequence"] not in unknown)
    return replace(trace, rows=rows.take(~np.isin(rows.sequence, unknown)), sequences=kept)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["q", "g"], default="q")
    parser.add_argument("--out", type=Path, default=Path("engine.json"))
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--batches", default="1,4,8,16")
    parser.add_argument("--strategies", default=ORDER)
    parser.add_argument("--shares", default="", help="slots as shares of all experts")
    parser.add_argument("--deadline", type=float, default=1e9, help="stop measuring then, seconds")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write the numbers."""
    began, options = time.perf_counter(), read_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = make_world(options.shape, device, tiny=device.type == "cpu")
    world.predictor = None if options.predictor is None else load_artifact(options.predictor)
    shape, total = world.shape, world.shape.total_experts
    batches = [int(text) for text in options.batches.split(",")]
    shares = options.shares or {"q": "0.5,0.25", "g": "0.25,0.5,0.125"}[options.shape]
    names = [n for n in options.strategies.split(",") if world.predictor is not None or not TABLE[n].predicted]
    trace = None if options.trace is None else with_known_tokens(load_trace(options.trace).without("repetition"))
    if device.type == "cuda":
        Run.spare = torch.zeros(PROBED, world.store.layout.record_bytes, dtype=torch.uint8, device=device)
    truths = {}
    for batch in batches:
        tokens, workload = draw(world, options.shape, trace, batch)
        truths[batch] = find_truth(world, batch, len(tokens), tokens, workload)
        print(
            f"{time.perf_counter() - began:4.0f} s  resident B={batch:<2d}",
            [round(ms, 3) for ms in truths[batch].ms],
            flush=True,
        )
    thinks = 0
    rows, stopped = [], False
    for share in shares.split(","):
        for batch in batches:
            for name in names:
                if name in SOME and batch >= 8 and share != SOME_SHARE:
                    continue
                if time.perf_counter() - began > options.deadline:
                    stopped = True
                    continue
                slots = int(total * float(share))
                if world.predictor is not None and TABLE[name].predicted:
                    thinks = predictor_bytes(world.predictor, device, 2 * batch, batch, 1)
                wish = EngineConfig(slots=slots, max_batch=batch, max_length=LENGTH, execution="graph")
                plan = make_plan(wish, shape, device.type, name, predictor=thinks if TABLE[name].predicted else 0)
                row = Row(slots=slots, strategy=name, batch=batch, budget_bytes=plan.total)
                measure(world, plan, row, truths[batch], options.shape)
                rows.append(row)
                print(f"{time.perf_counter() - began:4.0f} s {row.line(plan.record_bytes)}", flush=True)
    about = {
        "benchmark": "engine", "shape": options.shape, "date": time.strftime("%Y-%m-%d"), "seed": SEED,
        "config": {name: str(value) for name, value in vars(options).items() if name != "out"} | {"length": LENGTH, "begin": BEGIN},
        "machine": {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "cores": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
                     "transformers": transformers.__version__, "expertflow": __version__},
        "row_bytes": world.store.layout.record_bytes, "dense_bytes": shape.dense_bytes, "experts": total,
        "bounds": {"link_bytes_per_second": LINK, "memory_bytes_per_second": MEMORY},
        "resident_ms": {str(batch): truth.ms for batch, truth in truths.items()}, "complete": not stopped,
    }  # fmt: skip
    options.out.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    world.store.close()
    bad = [r for r in rows if not (r.tokens_equal and r.logits_equal and r.peak_bytes <= r.budget_bytes)]
    if bad:
        raise SystemExit(f"{len(bad)} rows are not exact, or over their budget")


if __name__ == "__main__":
    main()
