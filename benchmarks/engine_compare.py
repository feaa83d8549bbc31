"""Two source trees on one machine: the same measuring code over an old and a new engine, then the new tree through `LLM`.

Shapes `q` (Qwen3-MoE, embeddings drawn wide so that routing is spread, random tokens) and `g` (gpt-oss-20b, tokens and routing of a
recorded trace) of `stand_ins.py`. Dense weights are written once as a checkpoint folder; experts are drawn into the store by every
process, the same ones. Each run is a process of its own, in the order old, new, new, old. It reads prompts and then decodes with
`OffloadedModel.executor()`: steps that are queued one behind another, and steps whose tokens are waited for, as `LLM` does. The rows
of the new tree are then run through `LLM`. All trees have to give the same logits, bit for bit, unless `--other-logits` says that
the order of their sums differs; the file then says where they do. The oldest tree that this code measures is b2b3876.

Usage: PYTHONPATH=src python benchmarks/engine_compare.py --old .carry/old.tar.xz --trace TEST.trace --out FILE
       git archive COMMIT src | xz > .carry/old.tar.xz      packs the old tree
       --shapes q --runs old,new,new,old,llm: which models, and which trees in which order
       --tiny: small widths and few steps, for a CPU
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
EXCERPT = ROOT / "tests" / "data" / "gpt_oss_20b_excerpt" / "routing.trace"
RUNS = ("old", "new", "new", "old", "llm")
SHAPES = {"q": ("25%", 60.0), "g": ("50%", 1.0)}
"""Slots, and how wide embeddings are drawn."""
BATCHES, STRATEGIES = (1, 8), {"q": ("next-use", "lru-global"), "g": ("next-use",)}
PROMPT, WINDOWS, LENGTH, SEED = 32, 3, 512, 11
STEPS = {"q": {1: (30, 30), 8: (16, 12)}, "g": {1: (10, 10), 8: (4, 3)}}
"""By shape and batch: steps before the windows, and steps of a window; as many again are waited for."""
TINY_STEPS = 3, 2


class Model(Protocol):
    """A loaded model of either tree."""

    model: Any
    store: Any

    def executor(self) -> Any:
        """What runs passes and steps."""

    def close(self) -> None:
        """Free the memory."""


def find(path: str) -> Any:
    """A class by its full name."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sync() -> None:
    """Wait for the device."""
    if device() == "cuda":
        torch.cuda.synchronize()


def draw_experts(buffer: Tensor) -> None:
    """Random bf16 records `[L * E, record_bytes]`, the same ones in every process."""
    random = torch.Generator(device()).manual_seed(SEED + 1)
    for record in buffer:
        values = torch.randn(len(record) // 2, device=device(), dtype=torch.bfloat16, generator=random) * 0.02
        record.copy_(values.view(torch.uint8))


class DenseFiles:
    """The new tree's source of weights: dense ones from files, experts drawn."""

    shared = False

    def __init__(self) -> None:
        """Read files as a checkpoint's."""
        self._files = find("expertflow.models.weights.sources.FileWeights")()

    def locate(self, skeleton: Any, *, convert: bool) -> Any:
        """The folder's tensors, none of which is an expert's."""
        del convert
        tensors = find("expertflow.models.files.checkpoint.walk")(skeleton.folder)
        layers = (skeleton.specs,) * len(skeleton.expert_modules)
        return find("expertflow.models.weights.sources.Located")(
            skeleton=skeleton, fingerprint="", layers=layers, tensors=tensors
        )

    def stamps(self, located: Any) -> Any:
        """As the files."""
        return self._files.stamps(located)

    def identity(self, located: Any) -> str:
        """As the files."""
        return str(self._files.identity(located))

    def load_dense(self, located: Any, where: torch.device) -> Any:
        """As the files."""
        return self._files.load_dense(located, where)

    def experts(self, located: Any, allocate: Callable[[], Any], where: torch.device, *, show: bool) -> tuple[Any, str]:
        """Draw into a locked store."""
        del where, show
        store = allocate()
        store.lock()
        draw_experts(store.buffer)
        return store, self.identity(located)


def open_model(folder: Path, config: Any, beside: Any) -> Any:
    """A model of the tree that this process sees."""
    weights = DenseFiles() if beside is None else beside.shared_weights
    return find("expertflow.engine.build.load_model")(folder, config, weights=weights)


class ReplayRouter(nn.Module):
    """A router that computes its choice and then gives what was recorded for the tokens of the pass."""

    def __init__(self, router: nn.Module, now: Tensor, layer: int) -> None:
        """Stand in for `router`; `now` is `[T, L, K]`, written before each pass."""
        super().__init__()
        self.router, self.now, self.layer = router, now, layer

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the family's router."""
        logits, scores, index = self.router(hidden)
        return logits, scores, self.now[: len(index), self.layer].to(index.dtype)


class Recorded(NamedTuple):
    """What is fed: tokens `[B, N]`, and routes `[B, N, L, K]` or none."""

    tokens: Any
    routes: Any

    @classmethod
    def read(cls, path: Path) -> "Recorded":
        """From the driver's file."""
        with np.load(path) as arrays:
            return cls(arrays["tokens"], arrays.get("routes"))


class Bench:
    """Measures one loaded model of either tree.

    Args:
        model: of the tree that this process sees.
        recorded: what is fed.
    """

    def __init__(self, model: Model, recorded: Recorded) -> None:
        """Put recorded routing in place of the router's."""
        self._decode = find("expertflow.execution.kv_rows.DecodeInput")
        self._chunk = find("expertflow.execution.runner.PromptChunk")
        self._executor, self._recorded = model.executor(), recorded
        self._routes = self._now = torch.zeros(0)
        self._sequence = 0
        if recorded.routes is not None:
            self._routes = torch.from_numpy(recorded.routes.astype(np.int64)).to(device())
            self._now = self._routes[:, :PROMPT].flatten(0, 1).clone()
            for place, layer in enumerate(model.model.model.layers):
                layer.mlp.set_submodule("router", ReplayRouter(layer.mlp.router, self._now, place))

    def _route(self, batch: int, begin: int, end: int) -> None:
        if len(self._routes):
            found = self._routes[:batch, begin:end].flatten(0, 1)
            self._now[: len(found)] = found

    @torch.inference_mode()
    def measure(self, batch: int, before: int, steps: int) -> dict[str, Any]:
        """Milliseconds a step, window by window, queued and waited for; and a hash of the last logits.

        All is run once before it counts: captures and compilations are over then.
        """
        self._run(batch, before, steps)
        return self._run(batch, before, steps)

    def _run(self, batch: int, before: int, steps: int) -> dict[str, Any]:
        first, self._sequence = self._sequence, self._sequence + batch
        tokens, position = self._recorded.tokens.tolist(), PROMPT
        self._route(batch, 0, PROMPT)
        self._executor.prefill([self._chunk(first + row, tokens[row][:PROMPT], row, 0) for row in range(batch)])

        def step() -> Tensor:
            nonlocal position
            self._route(batch, position, position + 1)
            fed = [self._decode(first + row, tokens[row][position], row, position) for row in range(batch)]
            position += 1
            logits: Tensor = self._executor.decode(fed)
            return logits

        for _ in range(before):
            step()
        queued, waited = [], []
        for _ in range(WINDOWS):
            queued.append(self._window(steps, step, wait=False))
            waited.append(self._window(steps, step, wait=True))
        last = step().float().cpu().numpy().tobytes()
        return {"ms": queued, "waited_ms": waited, "logits": hashlib.sha256(last).hexdigest()}

    def _window(self, steps: int, step: Callable[[], Tensor], *, wait: bool) -> float:
        sync()
        began = time.perf_counter()
        for _ in range(steps):
            step()
            if wait:
                self._executor.best().tolist()
        sync()
        return (time.perf_counter() - began) / steps * 1e3


def settings(shape: str, strategy: str) -> dict[str, Any]:
    """Fields of `EngineConfig`, the same in both trees."""
    batch = max(BATCHES)
    return {
        "strategy": strategy, "slots": SHAPES[shape][0], "max_batch": batch, "max_live": batch, "max_length": LENGTH,
        "prefill_chunk": batch * PROMPT, "execution": "graph", "predictor": "none", "dtype": "bfloat16", "device": device(),
    }  # fmt: skip


def steps_of(shape: str, batch: int, *, tiny: bool) -> tuple[int, int]:
    """Steps before the windows, and of a window."""
    return TINY_STEPS if tiny else STEPS[shape][batch]


def probe_tree(shape: str, folder: Path, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Every strategy and batch on one tree; the store is drawn once."""
    recorded, owner = Recorded.read(folder / "recorded.npz"), None
    for strategy in STRATEGIES[shape]:
        config = find("expertflow.config.EngineConfig")(**settings(shape, strategy))
        model = open_model(folder, config, owner)
        owner = owner or model
        bench = Bench(model, recorded)
        for batch in BATCHES:
            yield {"strategy": strategy, "batch": batch, **bench.measure(batch, *steps_of(shape, batch, tiny=tiny))}


class Timed:
    """Runs requests of one batch through `LLM` as `Bench.measure` runs the executor."""

    def __init__(self, llm: Any, recorded: Recorded) -> None:
        """Keep the last logits."""
        self._llm, self._recorded, self._last = llm, recorded, torch.zeros(0)

    def keep(self, numbers: Sequence[int], logits: Tensor) -> None:
        """Take a step's logits."""
        del numbers
        self._last = logits.float().cpu()

    def measure(self, batch: int, before: int, steps: int) -> dict[str, Any]:
        """Milliseconds a step, and what was loaded; run once before it counts."""
        self._run(batch, before, steps)
        return self._run(batch, before, steps)

    def _run(self, batch: int, before: int, steps: int) -> dict[str, Any]:
        engine, limit = self._llm.engine, before + 2 * WINDOWS * steps + 3
        params = find("expertflow.config.SamplingParams")(max_tokens=limit, ignore_eos=True)
        for index in range(batch):
            engine.add(self._llm.request(self._recorded.tokens[index, :PROMPT].tolist(), params, index=index))
        for _ in range(1 + before):
            engine.step()
        times, start = [], self._llm.stats.cache
        engine.step()  # not timed: it may have begun already, and meanwhile it has ended
        for _ in range(2 * WINDOWS):
            began = time.perf_counter()
            for _ in range(steps):
                engine.step()
            times.append((time.perf_counter() - began) / steps * 1e3)
        end = self._llm.stats.cache
        engine.watch_logits(self.keep)
        while engine.unfinished:
            engine.step()
        engine.watch_logits(None)
        loads = (end.loads + end.prefetched - start.loads - start.prefetched) / (2 * WINDOWS * steps + 1)
        last = self._last.numpy().tobytes()
        return {"waited_ms": times, "loads": loads, "logits": hashlib.sha256(last).hexdigest()}


def probe_llm(shape: str, folder: Path, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """The same rows through `LLM` of the new tree."""
    recorded, owner = Recorded.read(folder / "recorded.npz"), None
    routing = find("expertflow.execution.replay.Replay")(recorded.routes, recorded.tokens.tolist())
    for strategy in STRATEGIES[shape]:
        weights = DenseFiles() if owner is None else owner.shared_weights
        llm = find("expertflow.LLM")(folder, weights=weights, routing=routing, **settings(shape, strategy))
        owner = owner or llm
        timed = Timed(llm, recorded)
        for batch in BATCHES:
            yield {"strategy": strategy, "batch": batch, **timed.measure(batch, *steps_of(shape, batch, tiny=tiny))}


def write_folder(shape: str, folder: Path, trace: Path, *, tiny: bool) -> None:
    """A checkpoint folder with dense weights only, and what is fed. Runs on the new tree."""
    stand_ins = import_module("stand_ins")
    config = stand_ins.make_config(shape, tiny=tiny)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    skeleton = find("expertflow.models.skeleton.build_skeleton")(folder, "bfloat16")
    source = find("expertflow.models.weights.sources.RandomWeights")(seed=SEED, embedding=SHAPES[shape][1])
    located = source.locate(skeleton, convert=False)
    state = source.load_dense(located, torch.device(device())).state_dict()
    find("safetensors.torch.save_file")(
        {key: value.cpu().contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    length = PROMPT + 3 + max(sum((before, 2 * WINDOWS * steps)) for before, steps in (steps_of(shape, b, tiny=tiny) for b in BATCHES))  # fmt: skip
    if shape == "q":
        np.savez(
            folder / "recorded.npz", tokens=np.array(stand_ins.random_tokens(config.vocab_size, max(BATCHES), length))
        )
        return
    parts = stand_ins.parts_of(find("expertflow.trace.format.load_trace")(trace).without("repetition"), [length] * max(BATCHES))  # fmt: skip
    np.savez(folder / "recorded.npz", tokens=np.array(parts.tokens), routes=np.stack(parts.routes))


def start(task: str, shape: str, source: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run a task in a process that sees one source tree; its rows."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [
            sys.executable,
            __file__,
            "--task",
            task,
            "--shape",
            shape,
            "--folder",
            str(folder),
            "--out",
            file.name,
        ]
        command += ["--trace", str(options.trace)] + (["--tiny"] if options.tiny else [])
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(source.resolve())})
        rows: list[dict[str, Any]] = json.loads(Path(file.name).read_text() or "[]")
    return rows


def perform(options: argparse.Namespace) -> None:
    """A task, inside its process."""
    if options.task == "write":
        write_folder(options.shape, options.folder, options.trace, tiny=options.tiny)
        return
    llm = options.task == "llm"
    rows = (probe_llm if llm else probe_tree)(options.shape, options.folder, tiny=options.tiny)
    options.out.write_text(json.dumps(list(rows)))


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A source folder: given as one, or packed as a tar file that holds `src` or `expertflow`."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as place, tarfile.open(path) as packed:
        packed.extractall(place, filter="data")
        yield next(Path(place).rglob("expertflow/__init__.py")).parents[1]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of both trees and of `LLM` by shape, strategy and batch, and the ratios."""
    found = []
    keys = dict.fromkeys((row["shape"], row["strategy"], row["batch"]) for row in rows)
    for shape, strategy, batch in keys:
        mine = [row for row in rows if (row["shape"], row["strategy"], row["batch"]) == (shape, strategy, batch)]

        def figures(tree: str, key: str, mine: list[dict[str, Any]] = mine) -> list[float]:
            return [value for row in mine if row["tree"] == tree for value in row.get(key, ())]

        line: dict[str, Any] = {"shape": shape, "strategy": strategy, "batch": batch}
        for key in ("ms", "waited_ms"):
            for tree in ("old", "new", "llm"):
                if values := figures(tree, key):
                    line[f"{tree}_{key}"] = [statistics.median(values), min(values), max(values)]
            for over, under in (("new", "old"), ("llm", "new")):
                if {f"{over}_{key}", f"{under}_{key}"} <= line.keys():
                    line[f"{over}_over_{under}_{key}"] = line[f"{over}_{key}"][0] / line[f"{under}_{key}"][0]
        line["same_logits"] = len({row["logits"] for row in mine}) == 1
        found.append(line)
    return found


def show(line: dict[str, Any]) -> str:
    """As a line of a printed table."""
    cells = [
        f"{name} {line[key][0]:.3f} ({line[key][1]:.3f}-{line[key][2]:.3f})"
        for name, key in (("old", "old_ms"), ("new", "new_ms"), ("old waited", "old_waited_ms"), ("new waited", "new_waited_ms"), ("LLM", "llm_waited_ms"))
        if key in line
    ]  # fmt: skip
    ratios = [
        f"{key.replace('_over_', '/').replace('_', ' ')} {value:.4f}" for key, value in line.items() if "_over_" in key
    ]
    return (
        f"{line['shape']} {line['strategy']:10s} B={line['batch']}: ms a step {', '.join(cells)}; {', '.join(ratios)}; "
        f"{'same logits' if line['same_logits'] else 'OTHER LOGITS'}"
    )


def drive(options: argparse.Namespace) -> None:
    """All runs one after another; what is known is written and printed after each."""
    began, rows = time.perf_counter(), []
    about = find("expertflow.bench.about.about")(device())._asdict()

    def write() -> list[dict[str, Any]]:
        done = summary(rows)
        result = {**about, "benchmark": "engine_compare", "seed": SEED, "order": options.runs.split(","), "summary": done, "rows": rows,
                  "config": {"shapes": SHAPES, "prompt": PROMPT, "windows": WINDOWS, "steps": STEPS, "tiny": options.tiny, "trace": options.trace.name, "old": options.old.name}}  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        return done

    with unpacked(options.old) as old, unpacked(options.new) as new:
        trees = {"old": old, "new": new, "llm": new}
        for shape in options.shapes.split(","):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                start("write", shape, new, options, folder)
                for number, tree in enumerate(options.runs.split(",")):
                    found = start(tree, shape, trees[tree], options, folder)
                    rows += [{"shape": shape, "tree": tree, "run": number, **row} for row in found]
                    print(f"{time.perf_counter() - began:4.0f} s  {shape} {tree}", flush=True)
                    print("\n".join(show(line) for line in write() if line["shape"] == shape), flush=True)
    if not options.other_logits and not all(line["same_logits"] for line in write()):
        raise SystemExit("the trees give other logits")


def main(argv: list[str] | None = None) -> None:
    """Drive, or perform one task of a drive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--old", type=Path, default=ROOT / ".carry" / "old.tar.xz", help="source folder, or a tar file with one"
    )
    parser.add_argument("--new", type=Path, default=ROOT / "src")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--runs", default=",".join(RUNS))
    parser.add_argument("--other-logits", action="store_true", help="the trees' logits may differ")
    parser.add_argument("--trace", type=Path, default=EXCERPT, help="recorded routing for shape g")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "engine_compare.json")
    parser.add_argument("--tiny", action="store_true", help="small widths and few steps; always so without CUDA")
    parser.add_argument("--task", choices=["write", "old", "new", "llm"], help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.tiny |= device() == "cpu"
    if options.task:
        perform(options)
    else:
        drive(options)


if __name__ == "__main__":
    main()
