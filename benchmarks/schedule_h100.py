"""The scheduler at full size: live sequences in turns, divided by arrival or by predicted route, on recorded routing.

Shape `g`: gpt-oss-20b (24 layers x 32 experts top-4, 49.8 MB an expert). Shape `s`: the dimensions of Switch-128 (12 MoE layers x
128 experts top-1, 9.4 MB an expert, in the blocks of a decoder-only model), routed as gpt-oss-20b's best experts say, two of
its layers to one. Weights are random, tokens and routing a recorded trace's, the predictor trained on other sequences of it.
Everything else is the engine's own: requests, scheduler, rows, graphs, predictor, cache.

32 requests live, 8 step together. Each repeat runs other parts of 32 sequences, once by each schedule, in an order that turns. `blind` is
`fifo` with a cache that is not told of the turns that come. Figures are of the decode steps: tokens a second, time per
token of single requests, loads a token.

Usage: python benchmarks/schedule_h100.py --shape g --trace TEST.trace --predictor FOLDER --out FILE
       python benchmarks/schedule_h100.py --map TRAIN.trace --out TOP1.trace      (to train a predictor for shape s)
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import transformers
import triton
from engine_h100 import SEED, fill_randomly, make_config, random_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, Qwen3MoeConfig

from expertflow import SamplingParams, __version__
from expertflow.config import EngineConfig
from expertflow.engine import build
from expertflow.engine.build import OffloadedModel
from expertflow.engine.engine import Engine
from expertflow.engine.plan import make_plan
from expertflow.engine.prepare import Prepared, predictor_bytes
from expertflow.engine.request import Request
from expertflow.execution.kv_rows import DecodeInput
from expertflow.execution.runner import PromptChunk
from expertflow.models.shape import shape_of
from expertflow.models.skeleton import build_skeleton
from expertflow.predict.artifact import load_artifact
from expertflow.schedule.scheduler import Decode
from expertflow.trace.format import Header, Trace, TraceWriter, load_trace
from expertflow.trace.owners import NextBatch

LIVE, BATCH, REPEATS, PROMPT, LENGTH = 32, 8, 3, 64, 128
ROUNDS = {"g": 8, "s": 30}
WARM = 3
"""Rounds before the measured ones."""
SHARES = {"g": (0.5, 0.25), "s": (0.125, 0.03125)}
SCHEDULES = ("fifo", "group", "auto", "blind")


def sizes_of(shape: str, *, tiny: bool) -> PreTrainedConfig:
    """The model's sizes."""
    if shape == "g":
        return make_config("g", tiny=tiny)
    sizes = {"hidden_size": 768, "moe_intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12,
             "head_dim": 64, "vocab_size": 201088}  # fmt: skip
    small = {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "vocab_size": 201088}  # fmt: skip
    return Qwen3MoeConfig(
        num_hidden_layers=12, num_experts=128, num_experts_per_tok=1, intermediate_size=2048, pad_token_id=0,
        **(small if tiny else sizes),
    )  # fmt: skip


def as_top1(trace: Trace) -> Trace:
    """12 layers of 128 experts, one a token: the best expert of an even layer, and two bits of the best one behind it."""
    best = trace.rows.experts[:, :, 0].astype(np.int64)
    experts = (best[:, 0::2] * 4 + best[:, 1::2] % 4)[:, :, None].astype(np.uint8)
    header = replace(trace.header, layers=12, experts=128, top_k=1, model=f"{trace.header.model}, as top-1")
    rows = trace.rows._replace(experts=experts, weights=np.ones(experts.shape, dtype=np.float16))
    return replace(trace, header=header, rows=rows)


class RowRouter(nn.Module):
    """A router that computes its choice and then says what was recorded for the tokens that are fed."""

    def __init__(self, router: nn.Module, now: Tensor, layer: int) -> None:
        """Stand in for `router`; `now` is `[batch, L, K]`, written before each pass."""
        super().__init__()
        self.router, self.now, self.layer = router, now, layer

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the family's router."""
        logits, scores, index = self.router(hidden)
        return logits, scores, self.now[: len(index), self.layer].to(index.dtype)


class Routed(Protocol):
    """Tokens `[n]` and routes `[n, L, K]` of every request, prompt and answer, by its index."""

    tokens: list[list[int]]
    routes: list[npt.NDArray[np.uint8]]


class Recorded:
    """Parts of a trace's sequences, `LIVE` parts a repeat. See `Routed`."""

    def __init__(self, trace: Trace, length: int) -> None:
        """Of the sequences that are long enough, those whose tokens are known first; each repeat takes another part."""
        rows = [np.flatnonzero(trace.rows.sequence == number) for number in np.unique(trace.rows.sequence)]
        rows = [mine for mine in rows if len(mine) >= length]
        rows.sort(key=lambda mine: -trace.rows.tokens[mine].min())
        if len(rows) < LIVE:
            raise SystemExit(f"{len(rows)} sequences of {length} tokens or more, {LIVE} are needed")
        self.known = sum(trace.rows.tokens[mine].min() >= 0 for mine in rows[:LIVE])
        self.tokens: list[list[int]] = []
        self.routes: list[npt.NDArray[np.uint8]] = []
        for repeat in range(REPEATS):
            for mine in rows[:LIVE]:
                begin = repeat * length % (len(mine) - length + 1)
                part = mine[begin : begin + length]
                self.tokens.append(np.maximum(trace.rows.tokens[part], 0).tolist())
                self.routes.append(trace.rows.experts[part])


class ReplayEngine(Engine):
    """The engine, whose requests' tokens and routes are recorded ones."""

    def __init__(self, offloaded: OffloadedModel, now: Tensor, recorded: Routed) -> None:
        """Put the routes of what is fed where the routers find them."""
        super().__init__(offloaded)
        self.now, self.recorded, self.seconds = now, recorded, 0.0
        self.blind = False
        executor = self._executor
        self._real_decode, self._real_prefill = executor.decode, executor.prefill
        executor.decode, executor.prefill = self.replay_step, self.replay_pass  # type: ignore[method-assign]

    def replay_step(self, fed: Sequence[DecodeInput]) -> Tensor:
        """A step, behind its routes."""
        self._tell([self.recorded.routes[self._which(one.sequence)][one.position] for one in fed])
        return self._real_decode(fed)

    def replay_pass(self, pieces: Sequence[PromptChunk]) -> Tensor:
        """A pass over prompts, all of one length."""
        self._tell([
            route
            for piece in pieces
            for route in self.recorded.routes[self._which(piece.sequence)][piece.begin : piece.begin + len(piece.tokens)]
        ])  # fmt: skip
        return self._real_prefill(pieces)

    def _tell(self, routes: list[npt.NDArray[np.uint8]]) -> None:
        self.now[: len(routes)] = torch.from_numpy(np.stack(routes).astype(np.int64)).to(self.now.device)

    def _which(self, number: int) -> int:
        return self._running[number].request.index

    def _pick(self, requests: Sequence[Request], logits: Tensor) -> list[int]:
        best = self._executor.best()
        (logits.argmax(-1) if best is None else best).tolist()  # the device is waited for, as it is for real tokens
        return [
            self.recorded.tokens[request.index][len(request.prompt_token_ids) + len(request.token_ids)]
            for request in requests
        ]

    def _announce(self, coming: NextBatch) -> None:
        super()._announce(coming._replace(following=()) if self.blind else coming)

    def _decode(self, turn: Decode) -> int:
        began = time.perf_counter()
        count = super()._decode(turn)
        self.seconds += time.perf_counter() - began
        return count


def open_random(
    config: PreTrainedConfig, wish: dict[str, Any], predictor: Path | None = None, share: float | None = None
) -> OffloadedModel:
    """A model of random weights, the experts' in host memory.

    Args:
        config: the model's sizes.
        wish: fields of `EngineConfig`.
        predictor: folder; None: `next-use` decides.
        share: slots as a share of the experts; None: what the wish says.
    """
    build.load_dense, build._fill = random_dense, random_rows  # type: ignore[assignment]  # noqa: SLF001
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        skeleton = build_skeleton(Path(folder), "bfloat16")
    figures = shape_of(skeleton)
    artifact = None if predictor is None else load_artifact(predictor)
    if share is not None:
        wish = {**wish, "slots": int(share * figures.total_experts)}
    engine = EngineConfig(**wish)
    live = engine.max_live or engine.max_batch
    thinks = predictor_bytes(artifact, torch.device(engine.device), live, live, engine.prefill_chunk)
    name = "next-use" if artifact is None else "plec"
    plan = make_plan(engine, figures, engine.device, name, predictor=thinks)
    prepared = Prepared(skeleton=skeleton, pieces=[], plan=plan, fingerprint="", predictor=artifact)
    return OffloadedModel(prepared, engine)


def replaying(offloaded: OffloadedModel, width: int = BATCH * PROMPT) -> Tensor:
    """Replace the routers; `[width, L, K]`, where they look up what was recorded of a pass's tokens."""
    figures = offloaded.plan.shape
    now = torch.zeros(width, figures.layers, figures.top_k, dtype=torch.long, device=offloaded.device)
    for place, layer in enumerate(offloaded.model.model.layers):
        name = "router" if hasattr(layer.mlp, "router") else "gate"
        setattr(layer.mlp, name, RowRouter(getattr(layer.mlp, name), now, place))
    return now


def random_dense(skeleton: Any, _: Any, device: torch.device) -> Any:
    """In place of `load_dense`."""
    return random_model(skeleton, device)


def random_rows(_: Any, store: Any, content: Any, *, show: bool) -> None:
    """In place of `_fill`."""
    del content, show
    fill_randomly(store, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def run(engine: ReplayEngine, offloaded: OffloadedModel, sequences: Sequence[int], rounds: int) -> dict[str, float]:
    """Requests from first to last token."""
    params = SamplingParams(max_tokens=1 + WARM + rounds, ignore_eos=True)
    for number in sequences:
        engine.add(Request(index=number, prompt=None, prompt_token_ids=tuple(engine.recorded.tokens[number][:PROMPT]),
                           params=params, ends=(), limit=1 + WARM + rounds, decoder=None))  # fmt: skip
    times: list[float] = []
    tokens, began, before = 0, 0.0, 0
    while engine.unfinished:
        if not began and all(len(one.request.token_ids) > WARM for one in engine._running.values()):  # noqa: SLF001
            engine.seconds, tokens, began, before = 0.0, 0, time.perf_counter(), moved(offloaded)
        outputs = engine.step()
        tokens += len(outputs)
        times += [output.output.token_seconds for _, output in outputs if output.output is not None]
    lasted, times = time.perf_counter() - began, sorted(times)
    loads = (moved(offloaded) - before) / offloaded.plan.record_bytes
    return {
        "tokens_per_second": tokens / lasted,
        "p95_token_seconds": times[int(0.95 * (len(times) - 1))],
        "loads_per_token": loads / tokens,
        "host_share": 1 - engine.seconds / lasted,
    }


def moved(offloaded: OffloadedModel) -> int:
    """Bytes over the link so far, what graphs have counted included."""
    offloaded.settle()
    return offloaded.counters.bytes_moved


def measure(
    offloaded: OffloadedModel, now: Tensor, recorded: Recorded, rounds: int, names: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """Every schedule on the same sequences, repeat by repeat."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for repeat in range(-1, REPEATS):
        sequences = range(max(repeat, 0) * LIVE, max(repeat, 0) * LIVE + LIVE)
        for turn in range(len(names)):
            name = names[(turn + repeat) % len(names)]
            offloaded.plan = replace(offloaded.plan, schedule="fifo" if name == "blind" else name)
            engine = ReplayEngine(offloaded, now, recorded)
            engine.blind = name == "blind"
            answer = run(engine, offloaded, sequences, rounds if repeat >= 0 else 1)
            if repeat >= 0:
                found[name].append(answer)
            if repeat < 0:
                break  # one warm-up for all
    return found


def write(options: argparse.Namespace, rows: list[dict[str, Any]], rounds: int, recorded: Recorded) -> None:
    """The result file, as far as it goes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "benchmark": "schedule", "shape": options.shape, "date": time.strftime("%Y-%m-%d"), "seed": SEED, "rows": rows,
        "config": {"live": LIVE, "batch": BATCH, "rounds": rounds, "warm": WARM, "repeats": REPEATS, "prompt": PROMPT, "known_tokens": int(recorded.known)},
        "machine": {"device": device},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
                     "transformers": transformers.__version__, "expertflow": __version__},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["g", "s"], default="g")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--predictor", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--schedules", default=",".join(SCHEDULES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--shares", default="", help="slots as shares of all experts")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.map:
        trace = as_top1(load_trace(options.map))
        header = Header(layers=12, experts=128, top_k=1, model=trace.header.model, fingerprint="")
        with TraceWriter(options.out, header) as writer:
            writer.sequences = trace.sequences
            writer.append(trace.rows)
        return
    began, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = options.rounds or ROUNDS[options.shape]
    trace = load_trace(options.trace).without("repetition")
    recorded = Recorded(as_top1(trace) if options.shape == "s" else trace, PROMPT + 2 + WARM + rounds)
    wish = {"max_batch": BATCH, "max_live": LIVE, "max_length": LENGTH, "prefill_chunk": BATCH * PROMPT, "execution": "graph",
            "schedule": "fifo", "device": device.type}  # fmt: skip
    names, rows = options.schedules.split(","), []
    for share in [float(text) for text in options.shares.split(",")] if options.shares else SHARES[options.shape]:
        offloaded = open_random(sizes_of(options.shape, tiny=device.type == "cpu"), wish, options.predictor, share)
        now = replaying(offloaded)
        found = measure(offloaded, now, recorded, rounds, names)
        fifo = found[names[0]]
        for name, answers in found.items():
            speeds = [answer["tokens_per_second"] for answer in answers]
            gains = [
                mine["tokens_per_second"] / theirs["tokens_per_second"]
                for mine, theirs in zip(answers, fifo, strict=True)
            ]
            late = [
                mine["p95_token_seconds"] / theirs["p95_token_seconds"]
                for mine, theirs in zip(answers, fifo, strict=True)
            ]
            print(f"{time.perf_counter() - began:4.0f} s  {share:.1%} {name:6s} {statistics.median(speeds):7.1f} tok/s ({min(speeds):.1f}-{max(speeds):.1f})  "
                  f"x{statistics.median(gains):.3f} of {names[0]}, p95 x{statistics.median(late):.3f}, "
                  f"{statistics.median(a['loads_per_token'] for a in answers):.2f} loads a token, host {statistics.median(a['host_share'] for a in answers):.1%}", flush=True)  # fmt: skip
            rows.append({"share": share, "slots": offloaded.plan.slots, "schedule": name, "runs": answers,
                         "peak_bytes": offloaded.measure(), "budget_bytes": offloaded.plan.total})  # fmt: skip
        write(options, rows, rounds, recorded)  # a share at a time: a run that is cut off has lost nothing
        failure = None if offloaded.live_predictor is None else offloaded.live_predictor.failure
        if failure:
            raise SystemExit(f"the predictor failed: {failure}")
        offloaded.close()
        del offloaded, now
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
