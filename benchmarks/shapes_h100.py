"""`expertflow bench` at full size without a checkpoint: published shapes, every weight drawn at random.

The measurement is the bench's own (`bench/measure.py`): the strategies take turns beside the all-resident model, Belady
and the plan. Only where weights come from differs: a folder has nothing but a config, and dense weights are drawn on
the device. Experts are drawn there too, record by record, into page-locked host memory, once for all models.

- `mixtral`: Mixtral-8x7B, 32 layers x 8 experts top-2, 352 MB an expert in bf16, 90 GB of experts.
- `qwen`: Qwen1.5-MoE-A2.7B, 24 layers x 60 experts top-4 and a shared one, 17 MB an expert, 25 GB.
- `deepseek`: DeepSeek-V2-Lite, 27 layers, of which 26 have 64 experts top-6 and two shared ones, 17 MB an expert, 29 GB. It
  stands in for DeepSeek-MoE-16B, whose experts have the same size but whose attention is plain multi-head: the family
  `deepseek_v2` has latent attention only. Rotary scaling for long contexts is left out.

Random weights show bytes, link, step times, and memory against the plan. They do not show how text is routed: hit
ratios, loads and what follows from them are no statement about real models, and there is no predictor to train. With
every matrix drawn alike, attention's average over the prompt would soon hide the token that is read. Then greedy
sequences repeat one token, and consecutive steps share nine experts of ten. Embeddings are therefore drawn wide
(`SPREAD`), which makes routing close to even, and a step's experts about as new as chance has it: the hard case for
every cache. It also makes the next token depend mostly on the last one. So equal tokens only show that no strategy uses
many wrong records; the tests compare bit for bit.

All contenders of one number of slots are on the device at once. Where they do not fit beside the all-resident model, it
is closed. Where they still do not fit, the strategies named last are left out, and the result lists them: name the
important ones first. On some machines no model with all experts fits, such as Mixtral on 80 GB. Then rows of captured
steps are compared with nothing (`exact` is null), and those of the host execution with on-demand loading.

Usage: python benchmarks/shapes_h100.py --shape mixtral,qwen,deepseek --out FOLDER
       python benchmarks/shapes_h100.py --shape qwen --tiny --out FOLDER      (small models of the families, for a CPU)
"""

import argparse
import json
import shlex
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stand_ins import SEED
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from expertflow.bench.measure import measure
from expertflow.bench.presets import make_settings, names, numbers
from expertflow.bench.result import PEAK, Result, Row, write_result
from expertflow.bench.shared_host import release
from expertflow.cli.bench import show
from expertflow.models.families import FAMILIES
from expertflow.models.weights.sources import RandomWeights

STARTED = time.perf_counter()
PROMPTS, SHORTEST, LONGEST = 64, 32, 64
"""How many prompts of random tokens, and their lengths."""
SPECIAL = 3
"""Tokens from here on are drawn: the first ones pad, begin and end."""
SPREAD = 200.0
"""Times the standard deviation of other weights that embeddings have: 4 instead of 0.02."""
WEIGHTS = RandomWeights(seed=SEED, embedding=SPREAD)
QUIET = 5.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's sizes.

    Attributes:
        title: name of the model.
        family: its `model_type`.
        sizes: what differs from the defaults of transformers' config.
        small: what differs from the family's small model, with `--tiny`.
        slots: measured by default.
    """

    title: str
    family: str
    slots: str
    sizes: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)

    def name(self, *, tiny: bool) -> str:
        """The model's name in the result."""
        return f"{self.title}-{'tiny-' if tiny else ''}random"

    def config(self, *, tiny: bool) -> PreTrainedConfig:
        """The model's config, in bf16."""
        sizes = {**FAMILIES[self.family].tiny, **self.small} if tiny else self.sizes
        return AutoConfig.for_model(self.family, dtype="bfloat16", **sizes)


SHAPES = {
    "mixtral": Shape(title="mixtral-8x7b", family="mixtral", slots="1/layer,2/layer,4/layer"),
    "qwen": Shape(title="qwen1.5-moe-a2.7b", family="qwen2_moe", slots="4/layer,8/layer,16/layer"),
    "deepseek": Shape(
        title="deepseek-v2-lite", family="deepseek_v2", slots="6/layer,8/layer,16/layer", small={"q_lora_rank": None},
        sizes={
            "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
            "num_key_value_heads": 16, "intermediate_size": 10944, "first_k_dense_replace": 1, "moe_intermediate_size": 1408,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "kv_lora_rank": 512,
            "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "max_position_embeddings": 4096,
        },
    ),
}  # fmt: skip
"""Mixtral's and Qwen's sizes are the defaults of transformers' configs."""
TINY_SLOTS = "2/layer,4/layer"


def log(text: str) -> None:
    """A line with the time."""
    print(f"{time.perf_counter() - STARTED:5.0f} s  {text}", flush=True)


def write_prompts(path: Path, vocabulary: int) -> None:
    """Prompts of random tokens, the same ones every time."""
    random = np.random.default_rng(SEED)
    lengths = random.integers(SHORTEST, LONGEST, PROMPTS, endpoint=True)
    lines = [json.dumps({"tokens": random.integers(SPECIAL, vocabulary, length).tolist()}) for length in lengths]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def command_of(shape: str, options: argparse.Namespace) -> str:
    """The command line that measures one shape again."""
    words = ["python", "benchmarks/shapes_h100.py", "--shape", shape, "--out", options.out.name]
    words += ["--slots", slots_of(shape, options)]
    for name in ("batches", "strategies", "tokens", "repeats", "deadline", "long_prompt", "executions"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words + (["--tiny"] if options.tiny else []))


def slots_of(shape: str, options: argparse.Namespace) -> str:
    """The stated slots, or the shape's own."""
    return str(options.slots or (TINY_SLOTS if options.tiny else SHAPES[shape].slots))


def measure_shape(shape: str, options: argparse.Namespace) -> Result:
    """One shape through the bench."""
    sizes, last = SHAPES[shape], [0.0]
    name, config = sizes.name(tiny=options.tiny), sizes.config(tiny=options.tiny)

    def report(what: str, done: int, total: int) -> None:
        if time.perf_counter() - last[0] > QUIET:
            last[0] = time.perf_counter()
            log(f"{shape}: run {done + 1} of about {total}: {what}")

    with tempfile.TemporaryDirectory() as scratch:
        folder, prompts = Path(scratch) / name, Path(scratch) / "random_tokens.jsonl"
        config.save_pretrained(folder)
        write_prompts(prompts, config.vocab_size)
        given = {
            "model": str(folder), "prompts_file": prompts, "slots": names(slots_of(shape, options)),
            "batches": numbers(options.batches, "--batches"), "strategies": names(options.strategies),
            "tokens": options.tokens, "repeats": options.repeats, "deadline": options.deadline,
            "long_prompt": options.long_prompt, "executions": names(options.executions),
        }  # fmt: skip
        result = measure(make_settings("paper", given), command_of(shape, options), report, WEIGHTS)
    release()
    own = {"prompts_file": prompts.name, "weights": f"random, seed {SEED}"}  # the scratch folder is gone
    return replace(result, config={**result.config, **own})


def broken(result: Result) -> list[Row]:
    """Rows with other tokens than the reference's, or over their plan."""

    def over(row: Row) -> bool:
        peak = row.figures.get(PEAK)
        return peak is not None and peak.bound is not None and peak.high > peak.bound

    return [row for row in result.rows if row.exact is False or over(row)]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}; several by commas")
    parser.add_argument("--out", type=Path, required=True, help="folder for shape_NAME.json")
    parser.add_argument("--slots", help="counts, shares or N/layer; default: the shape's own")
    parser.add_argument("--batches", default="4,16,32")
    parser.add_argument("--strategies", default="on-demand,lru,ring,next-use")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--deadline", type=float, help="seconds for each shape, after which nothing new is begun")
    parser.add_argument("--long-prompt", type=int, default=0)
    parser.add_argument("--executions", default="auto", help="auto, host, graph; several side by side")
    parser.add_argument("--tiny", action="store_true", help="small models of the same families; always so without CUDA")
    options = parser.parse_args(argv)
    options.tiny |= not torch.cuda.is_available()
    options.shape = names(options.shape)
    if unknown := [name for name in options.shape if name not in SHAPES]:
        parser.error(f"--shape: {unknown[0]!r} is none of {', '.join(SHAPES)}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, write, show, shape by shape."""
    options, wrong = arguments(argv), 0
    logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    for shape in options.shape:
        log(f"{shape}: {SHAPES[shape].name(tiny=options.tiny)}")
        result = measure_shape(shape, options)
        path = options.out / f"shape_{shape}.json"
        write_result(result, path)
        show(result)
        bad = broken(result)
        wrong += len(bad)
        log(f"{path}: {len(result.rows)} rows, {len(bad)} of them not exact or over their plan")
    if wrong:
        raise SystemExit(f"{wrong} rows are not exact, or over their plan")


if __name__ == "__main__":
    main()
