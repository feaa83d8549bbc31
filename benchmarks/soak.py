"""Ten thousand decode steps with budgets, strategies and batches drawn at random: every logit the all-resident run's.

Through `LLM` and its engine. A small Qwen3-MoE with random bf16 weights, and a predictor with random weights, the worst
there is: it may cost loads, never a bit. Each draw opens the model anew inside a budget and feeds in the tokens of the
all-resident run. The logits of every step are compared bit for bit, and the measured peak with the budget. Halfway,
some draws of captured steps lose sequences.

With `--models` the checkpoint and the execution are drawn, too: from a folder of folders with the checkpoints `packed` and `decoded`,
as `tests/write_models.py` writes them. The all-resident run is then the decoded checkpoint's (`make soak` does both).

Usage: python benchmarks/soak.py [--steps 10000] [--models FOLDER] [--tokens N] [--deadline SECONDS] [--out FILE]
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from expertflow import LLM, SamplingParams
from expertflow.bench.about import about
from expertflow.cache.strategy import STRATEGIES
from expertflow.config import EngineConfig
from expertflow.engine.prepare import prepare
from expertflow.execution.kv.layout import PAGE, pages_of
from expertflow.execution.replay import Replay
from expertflow.kernels.residency.state import refusal
from expertflow.predict.artifact import Artifact, save_artifact
from expertflow.predict.counts import SOURCES, remember
from expertflow.predict.dataset import Shape
from expertflow.predict.kinds import make
from expertflow.predict.model import OUTPUTS, PredictorConfig

SEED, PROMPT, TOKENS, FEWER_TOKENS, LONGEST, BATCHES = 5, 12, 250, 50, 512, (1, 4)
NAMES = [name for name, row in STRATEGIES.items() if not row.needs_future and not refusal(row, given=row.predicted)]
LAYERS, EXPERTS, VOCABULARY = 6, 16, 512
TOGETHER = {"admission": "at once"}
"""With this, and with keys and values for all, every prompt is read in one pass: in stock code products round by their rows."""


def make_model(folder: Path) -> None:
    """A small checkpoint."""
    torch.manual_seed(SEED)
    config = Qwen3MoeConfig(
        num_hidden_layers=LAYERS, hidden_size=128, moe_intermediate_size=64, num_experts=EXPERTS, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY, intermediate_size=128,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


class Case(NamedTuple):
    """A checkpoint that is run, and the one whose logits it has to give.

    Attributes:
        name: for the result.
        folder: of the checkpoint.
        twin: folder of the same numbers, decoded.
        predictor: folder of its predictor.
    """

    name: str
    folder: Path
    twin: Path
    predictor: Path


class Truth(NamedTuple):
    """What the all-resident run of a twin gave: prompts, each sequence's tokens, and its logits `[V]` step by step."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    logits: list[list[Tensor]]


def cases(models: Path | None, place: Path) -> list[Case]:
    """The checkpoints to draw from, each with a predictor."""
    if models is None:
        make_model(place / "model")
        found = [Case("bfloat16", place / "model", place / "model", place / "predictor")]
    else:
        folders = sorted(folder for folder in models.iterdir() if (folder / "packed").is_dir())
        found = [Case(one.name, one / "packed", one / "decoded", place / one.name) for one in folders]
    for case in found:
        make_predictor(case.folder, case.predictor)
    return found


def make_predictor(model: Path, folder: Path) -> None:
    """A predictor that was not trained."""
    prepared = prepare(model, EngineConfig(device="cpu", predictor="none"))
    shape = prepared.plan.shape
    sizes = Shape(shape.layers, shape.experts, shape.top_k)
    network = make(PredictorConfig(**sizes._asdict(), vocabulary=shape.vocabulary, width=32, embedding=16))
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    network.vocabulary.learn(torch.arange(shape.vocabulary))
    artifact = Artifact(
        model=network.eval(), memory=remember((), sizes, shape.vocabulary, 0),
        calibration=torch.ones(2 + SOURCES, OUTPUTS, shape.layers, 1), fingerprint=prepared.fingerprint, made_for="soak",
    )  # fmt: skip
    save_artifact(artifact, folder)


def run(llm: LLM, prompts: list[list[int]], count: int, keep: int) -> tuple[list[list[int]], list[list[Tensor]]]:
    """Tokens of each sequence, and its logits `[V]` step by step, `count` steps. The second sequence is cancelled `keep` steps before."""
    engine, params = llm.engine, SamplingParams(max_tokens=count + 1, ignore_eos=True)
    numbers = [engine.add(llm.request(prompt, params, index=index)) for index, prompt in enumerate(prompts)]
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]

    def watch(stepped: Sequence[int], found: Tensor) -> None:
        for number, row in zip(stepped, found.to("cpu", copy=True), strict=True):
            logits[numbers.index(number)].append(row)

    engine.watch_logits(watch)
    while engine.unfinished:
        for _, output in engine.step():
            tokens[output.index].append(output.token_id)
        if keep and len(prompts) > 1 and len(tokens[1]) == count - keep + 1 and engine.knows(numbers[1]):
            engine.cancel(numbers[1])
    engine.watch_logits(None)
    return tokens, logits


class Soak:
    """The draws so far.

    Args:
        device: where models run.
        tokens: steps of a draw.
    """

    def __init__(self, device: str, tokens: int) -> None:
        """Nothing is drawn yet."""
        self.tokens, self.random, self.began = tokens, np.random.default_rng(SEED), time.perf_counter()
        self.settings = {"device": device, "max_batch": 4, "prefill_chunk": 64}
        self.done = self.wrong = self.over = 0
        self.drawn: dict[str, Counter[str]] = {"strategy": Counter(), "model": Counter(), "execution": Counter()}
        self._truths: dict[tuple[str, str, int], Truth] = {}

    def lengths(self, case: Case) -> dict[str, int]:
        """Tokens that a sequence has room for, and all of them together, whatever the budget is."""
        longest = length(case)
        return {
            "max_length": longest,
            "kv_tokens": max(longest, max(BATCHES) * pages_of(PROMPT + self.tokens + 1, PAGE) * PAGE),
        }

    def truth(self, case: Case, execution: str, count: int) -> Truth:
        """Of `count` sequences; computed once."""
        key = (case.name, execution, count)
        if key not in self._truths:
            with LLM(
                case.twin, predictor="none", execution=execution, **TOGETHER, **self.settings, **self.lengths(case)
            ) as llm:
                prompts = self.random.integers(3, llm.plan.shape.vocabulary, (count, PROMPT)).tolist()
                self._truths[key] = Truth(prompts, *run(llm, prompts, self.tokens, 0))
        return self._truths[key]

    def draw(self, case: Case, execution: str) -> str:
        """Run a checkpoint with the rest drawn, and compare; a line that says what was found."""
        random, name, count = self.random, str(self.random.choice(NAMES)), int(self.random.choice(BATCHES))
        truth = self.truth(case, execution, count)
        chosen = {
            **self.settings, **self.lengths(case), "execution": execution, "strategy": name,
            "predictor": str(case.predictor) if name == "plec" else "none",
        }  # fmt: skip
        least = prepare(case.folder, EngineConfig(**chosen, slots=1)).plan
        most = least.fixed + least.shape.total_experts * least.record_bytes
        budget = int(random.integers(least.total, most + 1)) if random.random() < 0.8 else least.total
        fed = Replay(tokens=[[*prompt, *more] for prompt, more in zip(truth.prompts, truth.tokens, strict=True)])
        with LLM(case.folder, gpu_memory=budget, routing=fed, **TOGETHER, **chosen) as llm:
            # stock code's float32 products depend on how many sequences there are: only captured steps can lose one
            keep = self.tokens // 2 if random.random() < 0.5 and execution == "graph" else 0
            _, found = run(llm, truth.prompts, self.tokens, keep)
            other = 0
            for mine, theirs in zip(found, truth.logits, strict=True):
                other += sum(not torch.equal(one, right) for one, right in zip(mine, theirs, strict=False))
            assert [len(mine) for mine in found] == [self.tokens + 1 - keep * (place == 1) for place in range(count)]
            assert llm.predictor_failure is None
            peak, slots = llm.stats.peak_bytes, llm.plan.slots
        self.wrong, self.over, self.done = self.wrong + other, self.over + (peak > budget), self.done + self.tokens
        for what, value in (("strategy", name), ("model", case.name), ("execution", execution)):
            self.drawn[what][value] += 1
        return (
            f"{time.perf_counter() - self.began:4.0f} s {self.done:6d} steps  {case.name} {execution} {name} B={count} slots {slots} of "
            f"{least.shape.total_experts}, keep {keep}: {f'{other} WRONG' if other else 'exact'}, peak {peak} {'>' if peak > budget else '<='} {budget}"
        )


def length(case: Case) -> int:
    """Tokens that a sequence has room for."""
    context = prepare(case.folder, EngineConfig(device="cpu", predictor="none", slots=1)).plan.shape.context
    return min(LONGEST, context or LONGEST)


def main() -> None:
    """Draw, run, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--models", type=Path, help="a folder of folders with checkpoints packed and decoded")
    parser.add_argument("--tokens", type=int, help="steps of a draw")
    parser.add_argument("--deadline", type=float, default=1e9, help="draw no more after so many seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.models is not None and (options.tokens or 0) > FEWER_TOKENS:
        parser.error(
            f"--tokens {options.tokens}: with --models at most {FEWER_TOKENS}; the least budget holds all sequences of no more"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = options.tokens or (TOKENS if options.models is None else FEWER_TOKENS)
    soak, executions = Soak(device, tokens), ["graph"] if options.models is None else ["graph", "graph", "host"]
    with tempfile.TemporaryDirectory() as place:
        found, turn = cases(options.models, Path(place)), []
        while soak.done < options.steps and time.perf_counter() - soak.began < options.deadline:
            turn = turn or list(soak.random.permutation(len(found)))  # each has its turn before one comes again
            print(soak.draw(found[turn.pop()], str(soak.random.choice(executions))), flush=True)
    result = {
        **about(device)._asdict(), "benchmark": "soak", "seed": SEED, "steps": soak.done, "draws": soak.drawn,
        "steps_with_other_logits": soak.wrong, "draws_over_budget": soak.over, "seconds": time.perf_counter() - soak.began,
        "config": {"models": [case.name for case in found], "batches": BATCHES, "tokens_a_draw": tokens},
    }  # fmt: skip
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if soak.wrong or soak.over:
        raise SystemExit("not exact, or over budget")


if __name__ == "__main__":
    main()
