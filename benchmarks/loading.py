"""How long a checkpoint takes to load: a folder of random weights of a real shape, written here, through `LLM`.

The folder is written once, then loaded in a new process each time, so that nothing but the page cache is warm. Given
several source trees they take turns (A, B, B, A ...), which shows what a change costs.

Usage: python benchmarks/loading.py --trees src,/other/tree/src --repeats 4 --out FILE
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from expertflow.bench.about import about

SEED = 0
DRAWN, WRITERS = 1 << 26, 4
"""Numbers that are drawn, larger tensors repeat them; shards that are written at once."""
SIZES = {
    "q": {
        "hidden_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
        "vocab_size": 151936, "norm_topk_prob": True,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "moe_intermediate_size": 32, "intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 96,
    },
}  # fmt: skip
MXFP4 = {
    "g120": {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 9, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088,
    },
    "tiny-mxfp4": {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 96,
    },
}  # fmt: skip
"""Shapes whose experts are packed as gpt-oss is published; `g120` is a quarter of gpt-oss-120b's layers."""
_GROUP, _LEAST_SCALE, _SCALES = 32, 118, 8
"""Numbers of an MXFP4 scale, and the exponents that are drawn."""
_LOAD = """
import json, sys, threading, time
from pathlib import Path
import torch
from expertflow import LLM
from expertflow.memory.store import HostStore
from expertflow.models.files.identity import ContentHash
from expertflow.models.weights import sources

stages = {}

def timed(owner, name):  # seconds of a stage, those inside other stages included
    work = getattr(owner, name)
    def measured(*args, **names):
        began = time.perf_counter()
        try:
            return work(*args, **names)
        finally:
            stages[name] = stages.get(name, 0) + time.perf_counter() - began
    setattr(owner, name, measured)

for owner, name in ((sources.FileWeights, "locate"), (sources, "load_dense"), (sources, "fill_records"), (HostStore, "lock"), (ContentHash, "read")):
    timed(owner, name)

def anonymous():  # bytes of this process's memory that are no mapped file
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024

if torch.cuda.is_available():
    torch.empty(1, device="cuda")  # the driver's own memory is not the loader's
before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
began = time.perf_counter()
llm = LLM(sys.argv[1], max_length=128, max_batch=1, slots="25%", predictor="none")
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "store_bytes": llm.plan.host, "dense_bytes": llm.plan.dense, "host_bytes": peak[0] - before, "stages": stages}))
"""


def write_checkpoint(folder: Path, shape: str) -> int:
    """A shard a layer, weights cut out of one random block; bytes written."""
    if shape in MXFP4:
        config: PreTrainedConfig = GptOssConfig(
            **MXFP4[shape], dtype="bfloat16", pad_token_id=0, quantization_config={"quant_method": "mxfp4"}
        )
        model_class: type = transformers.GptOssForCausalLM
    else:
        config = Qwen3MoeConfig(
            **SIZES[shape], dtype="bfloat16", max_position_embeddings=4096, tie_word_embeddings=False
        )
        model_class = transformers.Qwen3MoeForCausalLM
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = model_class(config).state_dict()
    torch.manual_seed(SEED)
    need = max(tensor.numel() for tensor in wanted.values()) + len(wanted)
    block = (torch.randn(min(need, DRAWN)) * 0.02).bfloat16().repeat(-(-need // DRAWN))
    index = dict[str, str]()
    layers = {name: f"model-{name.split('.')[2] if '.layers.' in name else 'dense'}.safetensors" for name in wanted}

    def write(file: str) -> dict[str, str]:
        content = {
            key: part.clone()
            for place, (name, tensor) in enumerate(wanted.items())
            if layers[name] == file
            for key, part in _as_stored(
                name, block[place : place + tensor.numel()].view(tensor.shape), packed=shape in MXFP4
            )
        }
        save_file(content, folder / file, {"format": "pt"})
        return dict.fromkeys(content, file)

    with ThreadPoolExecutor(WRITERS) as pool:
        for written in pool.map(write, sorted(set(layers.values()))):
            index |= written
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _as_stored(name: str, values: torch.Tensor, *, packed: bool) -> list[tuple[str, torch.Tensor]]:
    """Published checkpoints hold an expert's gate, up and down apart; gpt-oss codes and scales of all experts of a layer."""
    if packed and name.endswith(("gate_up_proj", "down_proj")):  # `[E, inputs, outputs]`
        experts, inputs, outputs = values.shape
        drawn = values.reshape(-1).view(torch.uint8)
        blocks = drawn[: values.numel() // 2].view(experts, outputs, inputs // _GROUP, _GROUP // 2)
        scales = drawn[: values.numel() // _GROUP].view(experts, outputs, inputs // _GROUP) % _SCALES + _LEAST_SCALE
        return [(f"{name}_blocks", blocks), (f"{name}_scales", scales)]
    if name.endswith("gate_up_proj"):
        halves = [(f"{name.removesuffix('gate_up_proj')}{e}.", *v.chunk(2)) for e, v in enumerate(values)]
        return [
            (f"{at}{part}.weight", v)
            for at, *both in halves
            for part, v in zip(("gate_proj", "up_proj"), both, strict=True)
        ]
    if name.endswith("experts.down_proj"):
        return [(f"{name.removesuffix('down_proj')}{e}.down_proj.weight", v) for e, v in enumerate(values)]
    return [(name, values)]


def load(tree: str, folder: Path) -> dict[str, Any]:
    """One load in a process of its own: seconds, and bytes of the store, the dense part and the host's memory at most."""
    environment = {**os.environ, "PYTHONPATH": tree, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _LOAD, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Write, load in turns, print, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SIZES, *MXFP4], default="q")
    parser.add_argument(
        "--trees", default=str(Path(__file__).parents[1] / "src"), help="source trees, separated by commas"
    )
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("loading.json"))
    options = parser.parse_args()
    trees = options.trees.split(",")
    loads: list[list[dict[str, Any]]] = [[] for _ in trees]
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.shape)
        load(trees[0], Path(folder))  # what is compiled at the first use
        for repeat in range(options.repeats):
            for place in [*range(len(trees))][:: 1 if repeat % 2 == 0 else -1]:
                loads[place].append(load(trees[place], Path(folder)))
                stages = ", ".join(f"{name} {spent:.2f}" for name, spent in loads[place][-1]["stages"].items())
                print(f"tree {place}: {loads[place][-1]['seconds']:.2f} s ({stages})", flush=True)
                result = {
                    **about("cuda" if torch.cuda.is_available() else "cpu")._asdict(), "benchmark": "loading", "seed": SEED,
                    "config": {"shape": options.shape, "trees": len(trees), "repeats": options.repeats},
                    "complete": sum(map(len, loads)) == options.repeats * len(trees), "bytes": size, "seconds": [[one["seconds"] for one in found] for found in loads], "loads": loads,
                }  # fmt: skip
                # at once, because a later load may be cut off
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    for place, found in enumerate(loads):
        seconds = [one["seconds"] for one in found]
        middle, last = statistics.median(seconds), found[-1]
        print(
            f"tree {place}: median {middle:.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), {size / 1e9:.1f} GB, "
            f"{size / middle / 1e9:.2f} GB/s; host peak {max(one['host_bytes'] for one in found) / last['store_bytes'] - 1:+.1%} of the store"
        )


if __name__ == "__main__":
    main()
