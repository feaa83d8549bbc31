"""Host execution at full size: a Qwen1.5-MoE-A2.7B shape, random bf16 weights, made here, against all-resident.

Makes a checkpoint folder (24 layers x 60 experts, 28.6 GB) in a scratch folder and loads it through the ordinary path.
Measured are loading (speed, peak host memory), peak device memory, and the link's GB/s. Decode tokens/s are measured at
batch 1 and 8 for each strategy at 25 % and 50 % of the experts. Logits are compared with the all-resident model's, bit
for bit. On a machine without CUDA it runs a small shape on the CPU, whose speed has no meaning for a GPU.

Usage: python benchmarks/host_execution.py [--out benchmarks/results/host_execution.json] [--scratch DIR] [--layers N]
"""

import argparse
import gc
import json
import os
import resource
import shutil
import statistics
import struct
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel, Qwen2MoeConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.events import CacheCounters

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 64, 24, 3
STRATEGIES = ("on-demand", "lru")
SHARES = ("25%", "50%")
BATCHES = (1, 8)
SEED = 11


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration. Times in seconds, sizes in bytes."""

    strategy: str
    share: str
    batch: int
    slots: int
    budget_bytes: int
    peak_bytes: int
    resident_bytes: int
    reserved_bytes: int
    decode_tokens_per_second: list[float]
    first_token_seconds: list[float]
    decode_hit_ratio: float
    decode_loads_per_step: float
    decode_link_gb_per_second: list[float]
    prefill_link_gb_per_second: list[float]


class HostPeak:
    """The most anonymous (not file-backed) memory of this process while active, sampled."""

    def __enter__(self) -> Self:
        """Start sampling."""
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return (int(fields["RssAnon"].split()[0]) + int(fields["RssShmem"].split()[0])) * 1024


def shape(layers: int, *, full: bool) -> Qwen2MoeConfig:
    """The published config of Qwen1.5-MoE-A2.7B, or a small one of its family."""
    if full:
        return Qwen2MoeConfig(num_hidden_layers=layers, dtype="bfloat16")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_experts": 16}
    return Qwen2MoeConfig(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, shared_expert_intermediate_size=512,
        vocab_size=4096, dtype="bfloat16", **sizes,
    )  # fmt: skip


def make_checkpoint(config: Qwen2MoeConfig, folder: Path) -> float:
    """Write random weights in the checkpoint format of the hub, a shard a layer; returns seconds."""
    began = time.perf_counter()
    config.architectures = ["Qwen2MoeForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            half = (tensor.shape[1] // 2, tensor.shape[2])
            for expert, part in product(range(tensor.shape[0]), ("gate", "up")):
                shapes[name.replace("gate_up_proj", f"{expert}.{part}_proj.weight")] = half
        elif name.endswith("experts.down_proj"):
            for expert in range(tensor.shape[0]):
                shapes[name.replace("down_proj", f"{expert}.down_proj.weight")] = tuple(tensor.shape[1:])
        else:
            shapes[name] = tuple(tensor.shape)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        shards.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)
    files = {name: f"model-{shard}.safetensors" for shard, names in shards.items() for name in names}
    for number, names in enumerate(shards.values()):
        _write_shard(folder / files[names[0]], {name: shapes[name] for name in names}, number)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return time.perf_counter() - began


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], number: int) -> None:
    """One safetensors file of normal random bf16 numbers (norms are ones); values repeat from one drawn block."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(SEED + number)
    header, offset = {}, 0
    for name, dims in shapes.items():
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, dims in shapes.items():
            value = (
                torch.ones(dims, device=device)
                if "norm" in name
                else torch.randn(dims, device=device, generator=generator) * 0.02
            )
            file.write(value.to(torch.bfloat16).view(torch.uint8).cpu().numpy().data)


def load_resident(folder: Path, device: str) -> PreTrainedModel:
    """Stock transformers, eager experts, every weight on the device."""
    config = AutoConfig.from_pretrained(folder)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        folder, dtype="auto", experts_implementation="eager"
    )
    return model.to(device).eval()


def drop_page_cache(folder: Path) -> bool:
    """Make the next read come from the disk; return whether that was possible."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def read_speed(folder: Path) -> float:
    """Bytes a second of plain sequential reading of the first 4 GB, from where the page cache has been dropped."""
    drop_page_cache(folder)
    began, done = time.perf_counter(), 0
    buffer = bytearray(2**24)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                done += count
        if done > 4 * 10**9:
            break
    return done / (time.perf_counter() - began)


def measure_loading(folder: Path, device: str) -> dict[str, Any]:
    """Seconds and peak host memory of loading, cold and with the files cached."""
    result: dict[str, Any] = {"disk_bytes_per_second": read_speed(folder)}
    for name in ("cold", "cached"):
        dropped = drop_page_cache(folder) if name == "cold" else True
        gc.collect()
        with HostPeak() as host:
            began = time.perf_counter()
            llm = LLM(folder, slots="25%", device=device, max_length=256, execution="host")
            seconds = time.perf_counter() - began
        total = llm.plan.host + llm.plan.dense
        result[name] = {
            "dropped_page_cache": dropped,
            "seconds": seconds,
            "bytes_per_second": total / seconds,
            "store_bytes": llm.plan.host,
            "host_peak_bytes": host.peak - host.start,
            "host_peak_over_store": (host.peak - host.start) / llm.plan.host,
        }
        llm.close()
        del llm
        release()
    return result


def release() -> None:
    """Free device memory between models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prompts(batch: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, the same for every configuration."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocabulary, (batch, PROMPT_TOKENS), generator=generator).tolist()


@torch.inference_mode()
def resident_reference(folder: Path, device: str) -> dict[str, Any]:
    """Peak memory, decode tokens/s (time of all tokens less time of the first) and logits of the stock model."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = load_resident(folder, device)
    vocabulary = model.config.vocab_size
    speeds: dict[int, list[float]] = {}
    for batch in BATCHES:
        ids = torch.tensor(prompts(batch, vocabulary), device=device)
        speeds[batch] = []
        for repeat in range(1 + REPEATS):
            first, whole = (_generate_seconds(model, ids, tokens) for tokens in (1, NEW_TOKENS))
            if repeat:
                speeds[batch].append(batch * (NEW_TOKENS - 1) / (whole - first))
    logits = [model(torch.tensor(prompts(b, vocabulary), device=device)).logits.cpu() for b in BATCHES]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"logits": logits, "peak_bytes": peak, "tokens_per_second": speeds}


def _generate_seconds(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@dataclass(kw_only=True)
class Phase:
    """Prefill or decode of one generation."""

    seconds: float
    tokens: int
    cache: CacheCounters

    @property
    def link(self) -> float:
        """GB a second moved, over the whole phase."""
        return self.cache.bytes_moved / self.seconds / 1e9


def timed(llm: LLM, ids: list[list[int]]) -> tuple[Phase, Phase]:
    """Generate greedily; what prefill (up to the first tokens) and decode took and moved."""
    marks = [(time.perf_counter(), llm.stats.cache)]
    seen = 0
    for _ in llm.stream(ids, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)):
        seen += 1
        if seen == 1 or seen == len(ids) * NEW_TOKENS:
            marks.append((time.perf_counter(), llm.stats.cache))
    phases = []
    for (began, before), (ended, after), tokens in zip(marks, marks[1:], (len(ids), seen - len(ids)), strict=False):
        moved = {f.name: getattr(after, f.name) - getattr(before, f.name) for f in fields(CacheCounters)}
        phases.append(Phase(seconds=ended - began, tokens=tokens, cache=CacheCounters(**moved)))
    return phases[0], phases[1]


@torch.inference_mode()
def measure(
    folder: Path, device: str, strategy: str, share: str, expected: list[torch.Tensor]
) -> tuple[list[Row], bool]:
    """Speed and memory of one strategy and share at every batch size, and whether logits are the resident's bits."""
    limits = {"device": device, "max_batch": max(BATCHES), "max_length": PROMPT_TOKENS + NEW_TOKENS}
    rows, equal = [], True
    with LLM(folder, slots=share, strategy=strategy, execution="host", **limits) as llm:
        vocabulary = llm.plan.shape.vocabulary
        for batch in BATCHES:
            runs = [timed(llm, prompts(batch, vocabulary)) for _ in range(1 + REPEATS)][1:]
            decodes = [decode for _, decode in runs]
            hits, accesses = sum(d.cache.hits for d in decodes), sum(d.cache.accesses for d in decodes)
            rows.append(
                Row(
                    strategy=strategy,
                    share=share,
                    batch=batch,
                    slots=llm.plan.slots,
                    budget_bytes=llm.plan.total,
                    peak_bytes=llm.stats.peak_bytes,
                    resident_bytes=llm.plan.resident_total,
                    reserved_bytes=torch.cuda.max_memory_reserved() if device == "cuda" else 0,
                    decode_tokens_per_second=[d.tokens / d.seconds for d in decodes],
                    first_token_seconds=[p.seconds for p, _ in runs],
                    decode_hit_ratio=hits / max(accesses, 1),
                    decode_loads_per_step=sum(d.cache.loads for d in decodes) / (REPEATS * (NEW_TOKENS - 1)),
                    decode_link_gb_per_second=[d.link for d in decodes],
                    prefill_link_gb_per_second=[p.link for p, _ in runs],
                )
            )
        for batch, logits in zip(BATCHES, expected, strict=True):
            got = llm.model(torch.tensor(prompts(batch, vocabulary), device=device)).logits.cpu()
            equal &= torch.equal(got, logits)
    return rows, equal


def link_speed(row_bytes: int) -> float:
    """Bytes a second of back-to-back page-locked copies of one record's size: the roofline of loading."""
    host = torch.empty(row_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(row_bytes, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(100):
        target.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 100 * row_bytes / (time.perf_counter() - began)


def library_bytes() -> int:
    """What the first matrix products make the libraries keep in the allocator."""
    before = torch.cuda.memory_allocated()
    for dtype, rows in product((torch.bfloat16, torch.float32), (1, 64, 4096)):
        left, right = (
            torch.randn(rows, 2048, device="cuda", dtype=dtype),
            torch.randn(2048, 2048, device="cuda", dtype=dtype),
        )
        torch.nn.functional.linear(left, right)
    del left, right
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before


def environment() -> dict[str, Any]:
    """Machine and versions."""
    found = about("cuda" if torch.cuda.is_available() else "cpu")
    return {**found.machine, **found.versions, "date": found.date, "revision": found.commit or "unknown"}


def show(result: dict[str, Any]) -> None:
    """The short table."""
    names = ("strategy", "slots", "batch", "decode tokens/s (min-max)", "hit ratio", "GB/s decode", "GB/s prefill")
    table = Table(*names, "peak / budget GiB", "first token s")
    for row in result["rows"]:
        speed = row["decode_tokens_per_second"]
        table.add_row(
            row["strategy"], f"{row['slots']} ({row['share']})", str(row["batch"]),
            f"{statistics.median(speed):.1f} ({min(speed):.1f}-{max(speed):.1f})", f"{row['decode_hit_ratio']:.3f}",
            f"{statistics.median(row['decode_link_gb_per_second']):.1f}",
            f"{statistics.median(row['prefill_link_gb_per_second']):.1f}",
            f"{row['peak_bytes'] / 2**30:.2f} / {row['budget_bytes'] / 2**30:.2f}",
            f"{statistics.median(row['first_token_seconds']):.2f}",
        )  # fmt: skip
    console = Console(width=130)
    console.print(table)
    resident = result["resident"]
    speeds = {batch: round(statistics.median(values), 1) for batch, values in resident["tokens_per_second"].items()}
    console.print(
        f"all resident (stock transformers, eager): {resident['peak_bytes'] / 2**30:.2f} GiB, tokens/s {speeds}"
    )
    within = all(row["peak_bytes"] <= row["budget_bytes"] for row in result["rows"])
    console.print(
        f"peak within budget in every row: {within}   libraries keep {result['library_bytes'] / 2**20:.1f} MiB"
    )
    console.print(
        f"logits bit-equal to resident: {result['bit_equal']}   link roofline {result['link_gb_per_second']:.1f} GB/s"
    )
    console.print(dict(result["loading"].items()))


def main() -> None:
    """Make, load, measure, compare, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/host_execution.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(tempfile.mkdtemp(dir=options.scratch))
    try:
        config = shape(options.layers, full=device == "cuda")
        result: dict[str, Any] = {"environment": environment(), "seed": SEED, "config": config.to_dict()}
        result["settings"] = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "repeats": REPEATS}
        result["library_bytes"] = library_bytes() if device == "cuda" else 0
        result["make_seconds"] = make_checkpoint(config, folder)
        print(f"checkpoint made in {result['make_seconds']:.0f} s", flush=True)
        result["loading"] = measure_loading(folder, device)
        print(f"loading: {result['loading']}", flush=True)
        resident = resident_reference(folder, device)
        expected = resident.pop("logits")
        result["resident"] = resident
        release()
        print(f"resident: {resident}", flush=True)
        result["rows"], result["bit_equal"] = [], True
        for share, strategy in product(SHARES, STRATEGIES):
            rows, equal = measure(folder, device, strategy, share, expected)
            release()
            result["rows"] += [asdict(row) for row in rows]
            result["bit_equal"] &= equal
            print(f"{strategy} {share}: equal {equal}", flush=True)
        result["link_gb_per_second"] = link_speed(16 * 2**20) / 1e9 if device == "cuda" else 0.0
        result["host_max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))
        show(result)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
