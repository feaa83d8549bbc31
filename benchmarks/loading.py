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
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from expertflow.bench.about import about

SEED = 0
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
_LOAD = """
import json, sys, time
from expertflow import LLM
began = time.perf_counter()
llm = LLM(sys.argv[1], max_length=128, max_batch=1, slots="25%", predictor="none")
print(json.dumps({"seconds": time.perf_counter() - began, "host_bytes": llm.plan.host, "dense_bytes": llm.plan.dense}))
"""


def write_checkpoint(folder: Path, shape: str) -> int:
    """A shard a layer, weights cut out of one random block; bytes written."""
    config = Qwen3MoeConfig(**SIZES[shape], dtype="bfloat16", max_position_embeddings=4096, tie_word_embeddings=False)
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = transformers.Qwen3MoeForCausalLM(config).state_dict()
    torch.manual_seed(SEED)
    block = (torch.randn(max(tensor.numel() for tensor in wanted.values()) + len(wanted)) * 0.02).bfloat16()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for place, (name, tensor) in enumerate(wanted.items()):
        layer = name.split(".")[2] if ".layers." in name else "dense"
        values = block[place : place + tensor.numel()].view(tensor.shape)
        for key, part in _as_stored(name, values):
            shards.setdefault(f"model-{layer}.safetensors", {})[key] = part.clone()
    for name, content in shards.items():
        save_file(content, folder / name, {"format": "pt"})
    index = {key: name for name, content in shards.items() for key in content}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _as_stored(name: str, values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Published checkpoints hold an expert's gate, up and down apart."""
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


def load(tree: str, folder: Path) -> float:
    """Seconds of one load in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": tree, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _LOAD, str(folder)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own program
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    """Write, load in turns, print, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=[*SIZES], default="q")
    parser.add_argument(
        "--trees", default=str(Path(__file__).parents[1] / "src"), help="source trees, separated by commas"
    )
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("loading.json"))
    options = parser.parse_args()
    trees = options.trees.split(",")
    seconds: dict[int, list[float]] = {place: [] for place in range(len(trees))}
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), options.shape)
        load(trees[0], Path(folder))  # what is compiled at the first use
        for repeat in range(options.repeats):
            for place in [*seconds] if repeat % 2 == 0 else [*seconds][::-1]:
                seconds[place].append(load(trees[place], Path(folder)))
                print(f"tree {place}: {seconds[place][-1]:.2f} s", flush=True)
    result = {
        **about("cuda" if torch.cuda.is_available() else "cpu")._asdict(), "benchmark": "loading", "seed": SEED,
        "config": {"shape": options.shape, "trees": len(trees), "repeats": options.repeats},
        "bytes": size, "seconds": list(seconds.values()),
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for place, found in seconds.items():
        print(
            f"tree {place}: median {statistics.median(found):.2f} s ({min(found):.2f}-{max(found):.2f}), {size / 1e9:.1f} GB"
        )


if __name__ == "__main__":
    main()
