"""Outside the family: Hugging Face accelerate's CPU offload on the same checkpoint, prompts and tokens, at the same peak memory.

accelerate keeps on the GPU what its device map puts there and moves every other module in before each of its forwards.
The map is ours, `dense_first`. `device_map="auto"` places whole layers and keeps room for the largest. So where the
peak is less than a layer with all its experts, it puts the model on the CPU and hooks nothing. Greedy `generate`, batch
by batch, the prompts of `expertflow bench` with the same seed; prefill is timed apart by generating one token first.
Behind the clock the engine answers the last repeat's prompts, and the result counts equal answers, token by token. Not
all have to be equal, because in bfloat16 two logits may tie. Needs a GPU, and accelerate (`pip install accelerate`),
which the package itself does not use.

Usage: python benchmarks/accelerate_offload.py --model FOLDER --like RESULT.json --strategy plec --slots 48 --out FILE
       --like is a result of `expertflow bench` on the same model: peak, batches, tokens and prompts are taken from it.
"""

import argparse
import gc
import json
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.bench.result import DECODE, PEAK, WARM, Result, Row, read_result
from expertflow.bench.workload import PromptSet, read_prompt_set
from expertflow.engine.text import load_tokenizer

ROOM = 0.85
"""Share of the peak given to weights: the device map does not count activations. Raised or lowered by --room."""


def wanted(result: Result, strategy: str, slots: int) -> dict[int, Row]:
    """The rows to compare with, by batch; of several executions the fastest."""
    rows = [row for row in result.rows if row.state == WARM and (row.strategy, row.slots) == (strategy, slots)]
    rows.sort(key=lambda row: row.figures[DECODE].median)
    if not rows:
        raise SystemExit(f"the result has no warm rows of {strategy} with {slots} slots")
    return {row.batch: row for row in rows}


def dense_first(model: PreTrainedModel, room: int) -> dict[str, int | str]:
    """A device map of `room` bytes: what every token uses on the GPU, then a decoder's experts, an encoder's, less the space to move one in."""
    sizes: dict[str, int] = {}
    homes: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in chain(model.named_parameters(remove_duplicate=False), model.named_buffers()):
        module = name.rpartition(".")[0]
        home = homes.setdefault(id(tensor), module)
        if home == module:
            sizes[module] = sizes.get(module, 0) + tensor.nbytes
        else:  # a tied weight is stored once, and all its names belong on one device
            aliases[module] = home
    experts = {module: size for module, size in sizes.items() if "experts" in module.split(".")}
    spare = max(experts.values())
    places: dict[str, int | str] = {}
    for module in sorted(sizes, key=lambda module: (module in experts, module.startswith("encoder."))):
        fits = sizes[module] <= room - spare
        places[module] = 0 if fits else "cpu"
        room -= sizes[module] if fits else 0
    return places | {module: places[home] for module, home in aliases.items()}


def load(folder: Path, room: int) -> PreTrainedModel:
    """The stock model, dispatched by accelerate."""
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    places = dense_first(kind.from_pretrained(folder, dtype="auto", device_map="meta"), room)
    model: PreTrainedModel = kind.from_pretrained(folder, dtype="auto", device_map=places).eval()
    model.generation_config.eos_token_id = None  # every answer has as many tokens as are measured
    return model


def timed(model: PreTrainedModel, prompts: list[tuple[int, ...]], tokens: int) -> tuple[float, list[list[int]]]:
    """Seconds for so many new tokens of every prompt, and the tokens."""
    width, left = max(map(len, prompts)), not model.config.is_encoder_decoder
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.cuda(),
            attention_mask=mask.cuda(),
            do_sample=False,
            max_new_tokens=tokens,
        )
    torch.cuda.synchronize()
    return time.perf_counter() - began, out[:, -tokens:].tolist()


def measure(
    model: PreTrainedModel, rows: dict[int, Row], result: Result, workload: PromptSet
) -> tuple[list[dict[str, Any]], dict[int, list[list[int]]]]:
    """Every batch: tokens a second decoding, beside the row compared with; and the answers of the last repeat."""
    tokens, repeats = int(result.config["tokens"]), int(result.config["repeats"])
    found, answers = [], {}
    for batch, row in sorted(rows.items()):
        torch.cuda.reset_peak_memory_stats()
        timed(model, workload.batch(batch, 0), 2)
        speeds = []
        for repeat in range(1, repeats + 1):
            prompts = workload.batch(batch, repeat)
            first, _ = timed(model, prompts, 1)
            whole, answers[batch] = timed(model, prompts, tokens)
            speeds.append(batch * (tokens - 1) / (whole - first))
        ours = row.figures[DECODE].median
        found.append({
            "batch": batch, "decode_tokens_per_second": speeds, "peak_bytes": torch.cuda.max_memory_allocated(),
            "compared_with": {"strategy": row.strategy, "slots": row.slots, "decode_tokens_per_second": ours, "peak_bytes": row.figures[PEAK].median},
            "times_faster": ours / statistics.median(speeds),
        })  # fmt: skip
        print(
            f"batch {batch:2d}: accelerate {statistics.median(speeds):.2f} tokens/s, {row.strategy} {ours:.2f}",
            flush=True,
        )
    return found, answers


def same_answers(
    folder: Path, rows: dict[int, Row], result: Result, workload: PromptSet, answers: dict[int, list[list[int]]]
) -> dict[int, int]:
    """How many of the last repeat's answers are, token by token, those of the engine with the slots compared with; by batch."""
    tokens, repeat = int(result.config["tokens"]), int(result.config["repeats"])
    same = {}
    for batch, theirs in answers.items():
        prompts = workload.batch(batch, repeat)
        longest = max(map(len, prompts)) + tokens
        options = {
            "strategy": rows[batch].strategy,
            "slots": rows[batch].slots,
            "max_batch": batch,
            "max_length": longest,
        }
        with LLM(folder, device="cuda", **options) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True))
        same[batch] = sum(list(output.token_ids) == other for output, other in zip(outputs, theirs, strict=True))
        print(f"batch {batch:2d}: {same[batch]} of {batch} answers are the engine's, token by token", flush=True)
    return same


def main() -> None:
    """Load, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--strategy", default="plec")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--batches", default="", help="of those in --like; default: all")
    parser.add_argument("--prompts-file", type=Path)
    parser.add_argument("--room", type=float, default=ROOM)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if find_spec("accelerate") is None:
        raise SystemExit("accelerate is not installed here: nothing was measured. Install it: pip install accelerate")
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: nothing was measured")
    logging.set_verbosity_error()
    result = read_result(options.like)
    rows = wanted(result, options.strategy, options.slots)
    if options.batches:
        rows = {batch: rows[batch] for batch in map(int, options.batches.split(","))}
    peak = int(min(row.figures[PEAK].median for row in rows.values()))
    workload = read_prompt_set(options.prompts_file, load_tokenizer(options.model), long_prompt=0, seed=result.seed)
    model = load(options.model, int(peak * options.room))
    found, answers = measure(model, rows, result, workload)
    where = about("cuda")
    written = {
        **where._asdict(), "benchmark": "accelerate_offload", "seed": result.seed,
        "config": {"like": options.like.name, "room": options.room, "tokens": result.config["tokens"], "repeats": result.config["repeats"]},
        "versions": {**where.versions, "accelerate": version("accelerate")}, "rows": found,
    }  # fmt: skip
    options.out.write_text(json.dumps(written, indent=1) + "\n")  # the timings are kept, even if the comparison fails
    del model
    gc.collect()
    torch.cuda.empty_cache()
    same = same_answers(options.model, rows, result, workload, answers)
    for one in found:
        one["answers_equal"] = same[one["batch"]]
    options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
