"""Small faults put into the source one at a time; the tests named for each have to fail.

Each fault is a piece of text that occurs once in a file, and what takes its place. All runs are in a copy of the tree.
Usage: `make mutations`, or `python tools/mutations.py [WORD ...]` for the faults whose name has one of the words.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("src", "tests", "tools", "benchmarks", "docs", "README.md", "Makefile", "pyproject.toml")
PASSED, FAILED = 0, 1
"""Exit codes of pytest; any other means that the tests did not run."""


class Mutation(NamedTuple):
    """One fault.

    Attributes:
        name: what it does.
        file: below `src/expertflow`.
        old: text that occurs once in the file.
        new: what takes its place.
        tests: arguments for pytest, below `tests`.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ONE_FAMILY = ("test_exactness.py", "-k", "stock_model and olmoe-float32")
TOKENS = ("test_exactness.py", "-k", "stock_tokens and mixtral-float32")
PLAN = ("test_budget.py", "-k", "as_planned or larger_budget")
CACHE = ("test_cache.py",)
MXFP4 = ("test_packed.py", "-k", "decoded_checkpoints_bits and mxfp4-host")
SAMPLING = ("test_generation.py", "-k", "sampling or cut or draws")
MUTATIONS = (
    # the order of sums, memory plans, sampling and victims
    Mutation("experts added in the wrong order", "models/experts.py", "for rank in range(top_k):", "for rank in reversed(range(top_k)):", ("test_exactness.py", "-k", "any_width")),
    Mutation("experts of a model added in the wrong order", "models/experts.py", "for rank in range(top_k):", "for rank in reversed(range(top_k)):", ONE_FAMILY),
    Mutation("half of the keys and values planned", "engine/plan.py", "kv = shape.kv_bytes(max_length) * live", "kv = shape.kv_bytes(max_length) * live // 2", PLAN),
    Mutation("four columns too few planned", "engine/plan.py", "kv = shape.kv_bytes(max_length) * live", "kv = shape.kv_bytes(max_length - 4) * live", PLAN),
    Mutation("latents planned for every head", "models/shape.py", "if skeleton.family is not None else None\n    kept", "if False else None\n    kept", PLAN),
    Mutation("the padding column not planned", "models/shape.py", "int(self.in_rows and not layer.source_length)", "0", PLAN),
    Mutation("one slot more than the budget holds", "engine/plan.py", "return min(total, (budget - fixed - SlotPool.nbytes(slot_bytes, 0)) // slot_bytes)", "return min(total, (budget - fixed - SlotPool.nbytes(slot_bytes, 0)) // slot_bytes + 1)", PLAN),
    Mutation("dense weights planned without buffers", "models/shape.py", "total += tensor.numel() * dtype.itemsize", "total += tensor.numel() * dtype.itemsize * (name not in buffers)", PLAN),
    Mutation("top-p cut .02 too late", "execution/sampler.py", "before >= params.top_p", "before >= params.top_p + 0.02", SAMPLING),
    Mutation("top-p cut .02 too early", "execution/sampler.py", "before >= params.top_p", "before >= params.top_p - 0.02", SAMPLING),
    Mutation("top-k keeps one token more", "execution/sampler.py", "values[params.top_k :] = 0", "values[params.top_k + 1 :] = 0", SAMPLING),
    Mutation("top-p applied to what top-k left, unscaled", "execution/sampler.py", "        values /= values.sum()\n", "", SAMPLING),
    Mutation("temperature multiplied", "execution/sampler.py", "logits.float() / params.temperature", "logits.float() * params.temperature", SAMPLING),
    Mutation("ties go to the last token", "execution/sampler.py", "best = logits.argmax(dim=-1)", "best = logits.shape[-1] - 1 - logits.flip(-1).argmax(dim=-1)", SAMPLING),
    Mutation("the most recently used leaves", "cache/policy.py", "return Planes(before, now, usage.last_use, before)", "return Planes(-before, -now, -usage.last_use, -before)", CACHE),
    Mutation("the nearest next use leaves", "cache/policy.py", "rank = -(now + before * usage.layers)\n    return Planes(rank, -(following + used * usage.layers), -(following", "rank = now + before * usage.layers\n    return Planes(rank, following + used * usage.layers, (following", CACHE),
    Mutation("the highest rank of a layer leaves", "cache/core.py", "found, expert = layer, int(t.rank[layer].argmin())", "found, expert = layer, int(np.where(np.isinf(t.rank[layer]), -np.inf, t.rank[layer]).argmax())", CACHE),
    # caches, copies and rows
    Mutation("uses of a step not counted", "cache/policy.py", "return Planes(usage.count, usage.count + 1,", "return Planes(usage.count, usage.count,", CACHE),
    Mutation("a first use counted again and again", "cache/core.py", "int(t.fresh[layer, expert]))\n        t.fresh[layer, expert] = False", "int(t.fresh[layer, expert]))", CACHE),
    Mutation("what is loaded ahead may leave at once", "cache/core.py", "t.fresh[layer, expert] = True\n", "t.fresh[layer, expert] = True\n        t.rank[layer, expert], t.lowest[layer] = -1e8, -1\n", CACHE),
    Mutation("a copy starts one access early", "execution/provider.py", "and coming.after in over:", "and (coming.after in over or coming.after - 1 in over):", ("test_memory.py", "-k", "before_its_turn")),
    Mutation("a layer given up is trusted", "execution/provider.py", "if resident or brought or coming is not None:\n                    self.controller.forget()", "if False:\n                    self.controller.forget()", ("test_generation.py", "test_memory.py", "-k", "interrupted or given_up or waited_for")),
    Mutation("a slot is not given back", "execution/provider.py", "transfer.release(access.slot)", "pass", ("test_memory.py", "-k", "before_its_turn")),
    Mutation("a window one token too wide", "execution/kv_rows.py", "(distance < window)", "(distance <= window)", ("test_exactness.py", "-k", "stock_tokens and gpt_oss-float32")),
    Mutation("a row keeps its former owner's columns", "execution/kv_rows.py", "layer.clear(row, self._written[row])", "layer.clear(row, 0)", ("test_finite.py", "-k", "former_owner")),
    Mutation("padding is routed to experts", "execution/runner.py", "self._padding(mask == 0), [piece", "self._padding(mask < 0), [piece", ("test_scheduler.py", "-k", "padding_uses")),
    Mutation("a sequence steps at the position before", "execution/runner.py", "positions[:, None]\n", "positions[:, None] - 1\n", TOKENS),
    Mutation("a chunk of a prompt begins at zero", "execution/runner.py", "np.arange(span.begin, span.end)", "np.arange(span.end - span.begin)", ("test_attention.py", "-k", "size_of_a_pass and qwen3_moe")),
    Mutation("gate and up exchanged", "models/weights/mapping.py", "for place in sorted(stored) if place[0] == expert", "for place in sorted(stored, reverse=True) if place[0] == expert", TOKENS),
    # recorded routing, rules of admission, sources of weights
    Mutation("a token uses the experts of the one before", "execution/replay.py", "now.rows[:, None], now.columns]", "now.rows[:, None], now.columns - 1]", ("test_replay.py", "-k", "what_was_recorded")),
    Mutation("recorded routes of another KV row", "execution/replay.py", "now.rows[:, None], now.columns]", "now.rows.flip(0)[:, None], now.columns]", ("test_replay.py", "-k", "what_was_recorded")),
    Mutation("static batches are joined", "schedule/admission.py", "> 0 and not now.live", "> 0", ("test_scheduler.py", "-k", "rules")),
    Mutation("a request waits for longer than passes take", "schedule/admission.py", "self._waited < LONGEST_WAIT * costs.pass_", "self._waited < 2 * LONGEST_WAIT * costs.pass_", ("test_scheduler.py", "-k", "no_request_waits_longer")),
    Mutation("experts of another seed", "models/weights/sources.py", "manual_seed(self.seed + 1)", "manual_seed(1)", ("test_sources.py", "-k", "seed_decides")),
    # packed formats: codes, scales, zeros, grids of joined tensors; in decoders, records and kernels
    Mutation("codes exchanged within a byte", "formats/words.py", "codes >> (4 * nibble + bit) & 1", "codes >> (4 * (nibble ^ 1) + bit) & 1", MXFP4),
    Mutation("a decoded scale of another step", "formats/words.py", "part.view(steps, outputs, -1).transpose(0, 1)", "part.view(steps, outputs, -1).roll(1, 0).transpose(0, 1)", MXFP4),
    Mutation("kernels read the scale of another step", "kernels/reading/words.py", "(row[:, None] + (step * one)[None, :])", "(row[:, None] + ((steps - 1 - step) * one)[None, :])", ("test_readers.py", "-k", "mxfp4-float32-joined")),
    Mutation("kernels read e8m0 0 as 0", "kernels/reading/words.py", "tl.where(scale == 0, 1 << 22, scale << 23)", "(scale << 23)", ("test_mxfp4.py",)),
    Mutation("e8m0 0 is 0", "formats/published/mxfp4.py", "torch.where(scales == 0, 1 << 22, bits).view", "bits.view", ("test_mxfp4.py",)),
    Mutation("the code of zero is 7", "formats/published/int4.py", "MIDDLE = 8", "MIDDLE = 7", ("test_packed.py", "-k", "decoded_checkpoints_bits and int4 and g32 and host")),
    Mutation("kernels take 7 for zero", "kernels/reading/words.py", "code -= 8.0", "code -= 7.0", ("test_readers.py", "-k", "int4-g32-bfloat16-joined")),
    Mutation("up has the blocks of gate", "formats/format.py", "{name: part[place] for name", "{name: part[0 if name == 'scales' else place] for name", ("test_fp8.py", "-k", "joined_tensors")),
    Mutation("kernels give up the blocks of gate", "kernels/reading/bytes.py", "rows // one * grid_rows + rows % one // block_rows if", "rows % one // block_rows if", ("test_readers.py", "-k", "fp8-float32-joined")),
    Mutation("scales rounded to the config's number type", "formats/published/int4.py", "return replace(self, scale_dtype=dtype) if dtype in RUN_DTYPES else self", "return self", ("test_packed.py", "-k", "decoded_checkpoints_bits and float16 and scales and host")),
    Mutation("stacked experts read from the place of others", "models/weights/mapping.py", "expert * size, size)", "(expert ^ 1) * size, size)", ("test_packed.py", "-k", "stock_models_bits and mxfp4")),
    Mutation("packed dense weights are not decoded", "models/weights/load.py", "    return state | {key: DecodedOnRead", "    return slices or {key: DecodedOnRead", ("test_packed.py", "-k", "decoded_checkpoints_bits and g128 and attention and host")),
)  # fmt: skip


def main() -> None:
    """Apply, run, print the table."""
    words = sys.argv[1:]
    chosen = [one for one in MUTATIONS if not words or any(word in one.name for word in words)]
    if not chosen:
        sys.exit(f"no fault's name has one of {words}")
    with tempfile.TemporaryDirectory() as place:
        tree = copy_tree(Path(place))
        for tests in sorted({one.tests for one in chosen}):
            if (code := run(tree, tests)) != PASSED:
                sys.exit(f"{' '.join(tests)} ends with {code} on the source as it is")
        missed = [one.name for one in chosen if not caught(tree, one)]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    sys.exit(f"not caught: {', '.join(missed)}" if missed else 0)


def copy_tree(place: Path) -> Path:
    """A copy of what the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / name)
    return place


def caught(tree: Path, one: Mutation) -> bool:
    """Put the fault in, run its tests, take it out again; one line of the table."""
    path = tree / "src" / "expertflow" / one.file
    text = path.read_text()
    if text.count(one.old) != 1:
        print(f"{one.file:20} {one.name:48} occurs {text.count(one.old)} times", flush=True)
        return False
    began = time.monotonic()
    path.write_text(text.replace(one.old, one.new))
    try:
        code = run(tree, one.tests)
    finally:
        path.write_text(text)
    verdict = {PASSED: "NOT CAUGHT", FAILED: "caught"}.get(code, f"tests did not run ({code})")
    print(f"{one.file:20} {one.name:48} {verdict} by {one.tests[0]} in {time.monotonic() - began:.0f} s", flush=True)
    return code == FAILED


def run(tree: Path, tests: tuple[str, ...]) -> int:
    """Exit code of pytest over a fault's tests, which stop at the first failure."""
    files = [f"tests/{word}" if word.endswith(".py") else word for word in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=1", *files]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    main()
